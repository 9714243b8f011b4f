"""Valleys: steep across, flat along."""

from __future__ import annotations

import torch

from ...tasks.autoencoder import Autoencoder
from ...tasks.canyon import Canyon
from ...tasks.poisson import Poisson
from ...tasks.tabular import Tabular
from ..records import Human, Workload


def canyon(seed: int) -> Canyon:
    """Heavy ball's limit at lambda_max = 1 is 3.8."""
    return Canyon(seed, inputs=100, outputs=50, samples=4000, steps=300)


def whitened(seed: int) -> Canyon:
    """The same weights to be found, the inputs turned into their principal axes and divided by their spread."""
    task = canyon(seed)
    _, sizes, axes = torch.linalg.svd(task.x, full_matrices=False)
    task.x = task.x @ axes.T / sizes * len(task.x) ** 0.5
    return task


TUNED = Human("takes AdamW, at the best of three learning rates (1e-2)", base=("AdamW", 1e-2))
WORKLOADS = (
    Workload(
        "canyon", "ill-conditioned", canyon, {"AdamW": 0.03, "SGD": 1.0}, "log10 loss", 270.0,
        human=Human("whitens the inputs", whitened),
    ),
    Workload(
        "raw features", "ill-conditioned", lambda s: Tabular(s), {"AdamW": 1e-3, "SGD": 0.02}, "log10 train_loss", 0.66,
        human=Human("standardises the features", lambda s: Tabular(s, scaled=True)),
    ),
    Workload(
        "PINN", "ill-conditioned", lambda s: Poisson(s, steps=500), {"AdamW": 1e-3, "SGD": 1e-4}, "relative_error", 1.0,
        human=TUNED,
    ),
    Workload(
        "autoencoder", "ill-conditioned", lambda s: Autoencoder(s), {"AdamW": 1e-3, "SGD": 1.0}, "mse", 0.0733,
        human=TUNED,
    ),
)  # fmt: skip
