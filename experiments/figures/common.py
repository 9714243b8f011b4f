"""What the figures share: colours, what a figure says of itself, and a closer look at small nets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor, nn

from adaptive_opt import Reading

BLUE, ORANGE, GREEN, VERMILLION, SKY, PURPLE = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7"  # Okabe, Ito
GREY = "#606870"


@dataclass(frozen=True)
class Drawn:
    """A figure and what is to be read beside it."""

    title: str
    files: tuple[str, ...]
    caption: str  # what was run and what is shown
    holds: tuple[str, ...]  # sentences with their numbers
    fails: tuple[str, ...]  # claims of the article that the measurement contradicts, or that need a limit
    seed: int = 0


def save(fig: Figure, path: Path) -> str:
    """Write the figure, close it, give its name back."""
    fig.savefig(path, dpi=100)
    plt.close(fig)
    return path.name


def with_error(x: float | None, error: float | None = None, digits: int = 3) -> str:
    if x is None:
        return "not measured"
    return f"{x:.{digits}g}" if error is None else f"{x:.{digits}g} ± {error:.1g}"


def three(r: Reading) -> str:
    """kappa, epsilon and delta of a reading in one line."""
    return f"kappa >= {with_error(r.kappa)}, epsilon {with_error(r.epsilon)}, delta >= {r.delta}"


def dense_spectrum(loss_of: Callable[[], Tensor], params: Sequence[nn.Parameter]) -> NDArray[np.float64]:
    """All eigenvalues of the Hessian, smallest first, by one double backward a row: nets of a few thousand weights."""
    grads = torch.autograd.grad(loss_of(), params, create_graph=True)
    flat = torch.cat([g.reshape(-1) for g in grads])
    rows = [torch.cat([h.reshape(-1) for h in torch.autograd.grad(g, params, retain_graph=True)]) for g in flat]
    H = torch.stack(rows).double()  # (n, n)
    return torch.linalg.eigvalsh((H + H.T) / 2).numpy()


def median_of(losses: Sequence[float], window: int = 15) -> list[float]:
    """Running median, for drawing."""
    return [float(np.median(losses[max(0, i - window + 1) : i + 1])) for i in range(len(losses))]
