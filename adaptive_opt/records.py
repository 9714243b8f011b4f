"""The nouns of adaptive_opt: what is measured, what it means, what is decided, what happened. Frozen, plain, loggable.

Read this file first, then controller.py, then optimizer.py. What was not measured is None, never a made-up number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

NEARLY, LEARNT = 0.1, 0.01  # nats: a mean confidence of 90 and of 99 %; docs/evidence.md, "who need not try kfac"
RAW = 30.0  # root mean square of a feature from which on data counts as unscaled; docs/evidence.md, "raw features"


@dataclass(frozen=True)
class LayerReading:
    """Singular values of one layer's Jacobian (with the activation that follows it) on a few samples of the batch."""

    name: str
    sigma_max: float  # largest singular value; a lower bound
    sigma_max_error: float  # a singular value lies within this of sigma_max
    sigma_rms: float  # |J|_F / sqrt(outputs): 1 keeps the signal's mean square, 12 layers of 0.4 kill it
    sigma_rms_error: float  # standard error
    gain: float | None  # |gradient at the layer's input| / |gradient at its output|
    sigma_min: float | None = None  # smallest singular value, zeros of the shape alone left out; an upper bound
    sigma_min_error: float | None = None  # a singular value lies within this of sigma_min
    kind: str = "weight"  # (linear, convolution), "norm", "attention", "rnn", "recurrent": a vanilla RNN's hidden-to-hidden
    # matrix, or "module": one asked for by name
    drift: float | None = None  # log(sigma_rms now / at the first reading)
    chained: bool = False  # its input is the output of the layer before it, with nothing between that adds or normalises
    copies: float | None = None  # share of its units that are exact copies of others, in and out; None: not in a chain
    times: int = 1  # passes of the signal through it: a recurrent matrix is met at every element of the sequence
    fed: float | None = None  # root mean square of the largest feature, of a layer whose input is data; None: it is not

    @property
    def raw(self) -> bool:
        """Fed with data that nobody scaled: its singular values are in the data's units, and say nothing of the signal."""
        return self.fed is not None and self.fed > RAW

    @property
    def distance(self) -> float:
        """|log sigma_rms|: how far the layer is from keeping the signal's mean square; 0 keeps it, infinite kills it."""
        return abs(math.log(self.sigma_rms)) if self.sigma_rms > 0 else math.inf


def chains(layers: Sequence[LayerReading], least: int = 1) -> list[list[LayerReading]]:
    """The layers, those together through which the signal goes one after the other; what passes no signal is left out.

    Only in a chain do the singular values multiply: a normalisation sets the scale anew, a skip connection goes around.
    Chains of fewer than `least` layers are left out, but for one of two layers and more that is all there is.
    """
    found: list[list[LayerReading]] = []
    for layer in layers:
        if layer.kind == "recurrent" or layer.raw or not layer.sigma_rms > 0:
            continue
        if layer.chained and found:
            found[-1].append(layer)
        else:
            found.append([layer])
    least = min(least, 2) if len(found) == 1 else least
    return [chain for chain in found if len(chain) >= least]


@dataclass(frozen=True)
class Reading:
    """One measurement of the replayed batch loss, its Hessian H (n x n) and the layers. See docs/numbers.md."""

    step: int  # steps taken before it
    loss: float  # of the replayed batch (or of the stated part of it)
    grad_norm: float  # Euclidean norm of its gradient
    # the three numbers
    kappa: float | None = None  # certified lower bound on |lambda|_max / |lambda|_min
    kappa_effective: float | None = None  # the condition number that the optimizer's next steps feel, >= 1
    epsilon: float | None = None  # largest eigenvalue magnitude found; a lower bound
    delta: int | None = None  # certified lower bound on the number of eigenvalues below -delta_tol * epsilon
    delta_tol: float | None = None  # relative to epsilon
    delta_estimate: float | None = None  # estimate of that number over the whole spectrum
    delta_stderr: float | None = None
    # both ends of the spectrum; an eigenvalue lies within the error of each
    lambda_max: float | None = None
    lambda_max_error: float | None = None
    lambda_min: float | None = None
    lambda_min_error: float | None = None
    lambda_max_outer: float | None = None  # no eigenvalue lies above it, with probability 0.99; None: the run was too short
    lambda_min_outer: float | None = None  # none lies below it, likewise
    weight_norm: float | None = None  # |w| of the measured parameters
    # what the base optimizer feels
    stability: float | None = None  # lr * lambda_max(P^1/2 H P^1/2) / limit: 1 is the edge of stability
    stability_error: float | None = None
    overshoot: float | None = None  # (d'Hd / 2) / |g'd| of the step d, momentum filled: above 1 it steps over the valley
    sharpness_score: float | None = None  # 0..100 = 100 * min(1, stability)
    # the whole spectrum
    trace: float | None = None
    trace_stderr: float | None = None
    ritz_values: tuple[float, ...] = ()
    ritz_weights: tuple[float, ...] = ()
    ritz_residuals: tuple[float, ...] = ()  # an eigenvalue lies within each of its Ritz value
    # the layers, in the order in which the model calls them
    layers: tuple[LayerReading, ...] = ()
    lipschitz_bound: float | None = None  # product of the layers' norms; None until measured by a chain of layers
    lipschitz_local: float | None = None  # largest singular value of the whole Jacobian on the batch
    lipschitz_local_error: float | None = None
    # how it was measured
    kind: str = "full"  # "full"; "cheap": stability alone, from a warm start; "layers": they alone
    hvps: int = 0  # Hessian-vector products spent
    cost: float = 0.0  # gradient-equivalents spent: one is a forward and backward pass of the whole batch
    seconds: float = 0.0
    curvature: str = "hessian"  # or "gauss_newton": of which matrix the numbers are
    backend: str = "exact"  # "exact_rebuilt": the same in less memory; "finite_difference": approximate
    method: str = "full"  # how Lanczos kept its basis: "full", "half", "host", "restarted", "two-pass", "shared"
    asymmetry: float | None = None  # norm of what the operator did that no symmetric one does, over epsilon
    batch_size: int | None = None  # samples that were measured
    fraction: float = 1.0  # of the batch
    notes: tuple[str, ...] = ()  # what was not measured, and why

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> Reading:
        """Back from `dataclasses.asdict`, or from its JSON, where a loss that is not a number is null."""
        layers = tuple(LayerReading(**layer) for layer in d["layers"])
        lists = {k: tuple(d.get(k, ())) for k in ("ritz_values", "ritz_weights", "ritz_residuals", "notes")}
        numbers = {k: math.nan if d[k] is None else d[k] for k in ("loss", "grad_norm")}
        fields: dict[str, Any] = {**d, **lists, **numbers, "layers": layers}
        return cls(**fields)


class Condition(StrEnum):
    """What can be wrong (or right) with a step."""

    NON_FINITE = "non_finite"  # loss or gradient is NaN or infinite
    BROKEN = "broken"  # loss and gradient jumped far out of what this run has shown
    UNSTABLE = "unstable"  # the step is well above the stability limit
    SADDLE = "saddle"  # progress stalled where curvature is negative
    ILL_CONDITIONED = "ill_conditioned"  # the optimizer zig-zags
    SHARP = "sharp"  # at the edge of stability
    UNSCALED = "unscaled"  # the data that the first layer gets is far from the size that weights are made for
    DRIFTING = "drifting"  # a layer's Jacobian left its band
    HEALTHY = "healthy"


@dataclass(frozen=True)
class Finding:
    """One condition with the dimensionless number that shows it."""

    condition: Condition
    value: float
    threshold: float
    evidence: str  # a sentence


@dataclass(frozen=True)
class Diagnosis:
    """Which conditions hold, most urgent first. `HEALTHY` alone when none of the others does."""

    step: int
    findings: tuple[Finding, ...]

    def has(self, condition: Condition) -> bool:
        return any(f.condition is condition for f in self.findings)

    def find(self, condition: Condition) -> Finding | None:
        return next((f for f in self.findings if f.condition is condition), None)


@dataclass(frozen=True)
class Outlier:
    """A batch that is not like the others."""

    step: int  # whose batch it was
    factor: float  # times what is usual
    threshold: float  # from which it stands out


@dataclass(frozen=True)
class Trend:
    """What is free at every step: signals from the loss and the gradient norm, nothing replayed."""

    step: int
    loss: float | None  # of this step, as the user's backward saw it
    grad_norm: float | None
    usual_loss: float | None = None  # running median
    usual_grad_norm: float | None = None
    finite: bool = True
    spike: bool = False  # loss and gradient norm both jumped
    stalled: bool = False  # no progress over the stall window
    rising: bool = False  # loss well above its running median, or after ten steps no lower than at the start
    outlier: Outlier | None = None  # one of the first batches lost far more than the others at the same parameters
    poison: Outlier | None = None  # a batch far out of what the running statistics have seen
    lost: float = 0.0  # share of all progress that is gone again: 0 at the best level so far, 1 at the start's
    nats: float = math.inf  # the mean cross-entropy of one label a row that loss_fn returned; inf: it is no such loss


@dataclass(frozen=True)
class Look:
    """One look at the user's validation loss."""

    step: int  # steps taken before it
    validation: float
    training: float | None  # the run's own loss then: median of its last ten steps


@dataclass(frozen=True)
class Decision:
    """What to do now. `expects` names the number that must improve for a change of mode to be kept."""

    mode: str = "base"
    interventions: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()  # why, for each intervention
    reason: str = ""  # why this mode
    expects: str | None = None


@dataclass(frozen=True)
class Event:
    """One turn of treat-and-verify: what was seen, what was done, what came of it."""

    step: int
    name: str  # of the mode or intervention, or "gate"
    seen: str
    done: str
    outcome: str = "pending"  # "kept", "reverted", "done" or "pending"
    result: str = ""  # the number it was meant to move, before and after

    def sentence(self) -> str:
        tail = f" -> {self.outcome}" + (f": {self.result}" if self.result else "")
        return f"step {self.step}: {self.seen}; {self.done}{tail}"


@dataclass(frozen=True)
class StepReport:
    """What happened in a step and why: the one thing that is logged, plotted and tested."""

    step: int
    loss: float | None
    grad_norm: float | None
    lr: float  # the user's, of the first param group
    lr_scale: float  # what damp and rollback multiplied it by
    mode: str
    stepped: bool  # False: the step was skipped
    reading: Reading | None = None
    diagnosis: Diagnosis | None = None
    decision: Decision | None = None
    events: tuple[Event, ...] = ()
    probe_cost: float = 0.0  # gradient-equivalents spent on probing so far
    treatment_cost: float = 0.0  # and on replays by modes, treatments and verification, and on the validation loss
    validation: float | None = None  # the user's validation loss, in a step that asked for it
    lr_limit: float | None = None  # effective learning rate of that group at the stability limit, by the latest reading
    lr_limit_age: int | None = None  # steps since that reading


@dataclass(frozen=True)
class Stay:
    """A stretch of steps in one mode."""

    mode: str
    since: int  # its first step
    steps: int = 0  # taken in it so far
    spent: float = 0.0  # gradient-equivalents: its steps, and the replays of its mode and of treatments
    levels: tuple[float, ...] = ()  # median loss of every ten steps, oldest first; the latest 60


@dataclass(frozen=True)
class History:
    """What a policy may know of the past: pure data."""

    step: int = 0
    mode: str = "base"
    mode_since: int = 0
    trial: str | None = None  # what is on trial now
    not_before: dict[str, int] = field(
        default_factory=dict[str, int]
    )  # treatment -> first step at which it may be tried (again)
    kappas: tuple[float, ...] = ()  # the last few kappa_effective, oldest first
    available: frozenset[str] | None = None  # modes and interventions that are there and fit the base; None: all
    can_replay: bool = False
    can_validate: bool = False
    stays: tuple[Stay, ...] = ()  # the latest, oldest first; the last one is the present
    can_try: bool = True  # a mode may be tried without a cause: the loss is seen, and nothing holds the step
    agreement: float | None = None  # mean |cosine| between the gradients of successive batches; None: not seen lately
    nats: float | None = None  # recent level of a mean cross-entropy; None: the loss is nothing of the kind, or too new
    ending: bool = False  # the schedule's learning rate is below a tenth of its peak

    @property
    def free_to_try(self) -> bool:
        """In the base, and nothing about the run stands in the way of a mode that is tried without a cause."""
        learnt = self.nats is not None and self.nats < NEARLY
        return self.mode == "base" and self.can_try and not self.ending and not learnt
