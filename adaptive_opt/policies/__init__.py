"""Policies that the rules are measured against. One file a policy; each is frozen and pure."""

from adaptive_opt.policies.random import RandomPolicy
from adaptive_opt.policies.round_robin import RoundRobinPolicy
from adaptive_opt.policies.trial import TrialPolicy

__all__ = ["RandomPolicy", "RoundRobinPolicy", "TrialPolicy"]
