"""The five bases that the integrations are tried with: four of torch's, and one of another package."""

import warnings

import torch
from problems import BASES

with warnings.catch_warnings():  # what its import says of other packages is not ours
    warnings.simplefilter("ignore")
    from pytorch_optimizer import Lion

FIVE = {
    **BASES,
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01, weight_decay=1e-3),
    "lion": lambda p: Lion(p, lr=1e-3, weight_decay=1e-2),
}
