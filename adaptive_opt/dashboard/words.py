"""Each number in one sentence, with what it does not mean. The long form is docs/numbers.md."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Word:
    """How a number is called, its unit, and what it says."""

    label: str
    unit: str  # "" for a pure number
    says: str


WORDS: dict[str, Word] = {
    "kappa": Word(
        "kappa",
        "at least",
        "Certified lower bound on |lambda|max / |lambda|min of this batch's Hessian; it grows with the number of Lanczos "
        "steps, so act on kappa_effective instead.",
    ),
    "kappa_effective": Word(
        "kappa_effective",
        "",
        "The condition number that the coming steps feel, from the Krylov space of the averaged, preconditioned gradient; "
        "noisy from batch to batch, so the rules use the median of three.",
    ),
    "epsilon": Word(
        "epsilon",
        "loss per squared weight",
        "Largest eigenvalue magnitude found on this batch, a lower bound; sharp is not bad in itself.",
    ),
    "lambda_max": Word(
        "lambda_max",
        "loss per squared weight",
        "Largest eigenvalue found; one lies within the error, and the true end may lie further out.",
    ),
    "lambda_min": Word(
        "lambda_min",
        "loss per squared weight",
        "Most negative eigenvalue found; one lies within the error, and the true end may lie further out.",
    ),
    "delta": Word(
        "delta",
        "at least",
        "Certified lower bound on the number of eigenvalues below -delta_tol * epsilon; healthy nets have them all the way, "
        "and only a stall makes a saddle.",
    ),
    "delta_estimate": Word(
        "delta, estimated",
        "eigenvalues",
        "The same number over the whole spectrum, by quadrature; the error covers the random start vector only: take it as "
        "an order of magnitude.",
    ),
    "stall": Word(
        "stall",
        "",
        "Whether the loss gained less than 1 % over the last 40 steps while it was quiet; steps that are still to be seen "
        "count as no.",
    ),
    "stability": Word(
        "stability",
        "of the limit",
        "The step against its stability limit: 1 is the edge, and normal; the limit is exact for a quadratic with a frozen "
        "preconditioner.",
    ),
    "overshoot": Word(
        "overshoot",
        "",
        "Above 1 the quadratic model of this batch says that this very step raises its loss; one direction, one batch.",
    ),
    "sharpness_score": Word(
        "sharpness score",
        "of 100",
        "100 * min(1, stability): a score of 100 is the edge of stability, where training often settles, and not an alarm.",
    ),
    "sigma_rms": Word(
        "sigma_rms",
        "",
        "The layer's factor on the signal's root mean square, measured on 8 samples: 1 keeps it, outside 0.1 to 10 the rules "
        "act.",
    ),
    "sigma_max": Word(
        "sigma_max",
        "at least",
        "Largest singular value of the layer's Jacobian on 8 samples, a lower bound: another sample may stretch more.",
    ),
    "sigma_min": Word(
        "sigma_min",
        "at most",
        "Smallest singular value of the layer's Jacobian on 8 samples, zeros of the shape alone left out: an upper bound.",
    ),
    "chain": Word(
        "product",
        "",
        "Product of sigma_rms over the layers: what the chain of them makes of the signal if each meets a typical direction.",
    ),
    "lipschitz_bound": Word(
        "bound",
        "at most",
        "No input near this batch's can be stretched more than this, by the chain rule over the layers; usually far above "
        "what is there.",
    ),
    "lipschitz_local": Word(
        "local",
        "at least",
        "Largest singular value of the whole model's Jacobian on this batch; another batch may stretch more.",
    ),
    "loss": Word("loss", "", "The training loss of single batches, as the user's backward saw it."),
    "lr": Word(
        "effective lr",
        "",
        "The learning rate that steps are taken with: the user's times what damp and rollback hold it at.",
    ),
    "probing": Word(
        "probing",
        "of the gradient work",
        "Gradient-equivalents (a forward and a backward pass of the whole batch) spent on measuring, per step; counted at "
        "fixed prices, not in seconds.",
    ),
    "treatment": Word(
        "treatments",
        "of the gradient work",
        "Gradient-equivalents spent on replays by modes, treatments and their verification, per step.",
    ),
    "trace": Word(
        "trace",
        "loss per squared weight",
        "Sum of all eigenvalues, from one random vector: the error is that vector's.",
    ),
    "spectrum": Word(
        "spectrum",
        "",
        "Each spike is a Ritz value, its height the share of all eigenvalues that it stands for; one random vector and few "
        "steps, so a few spikes stand for all.",
    ),
}

NOT_MEASURED = "not measured"


def number(x: float | None, error: float | None = None) -> str:
    """`0.0123 ± 0.0004`: three figures, the error behind it where there is one."""
    if x is None:
        return NOT_MEASURED
    if not math.isfinite(x):
        return str(x)
    shown = f"{x:,.0f}" if float(x).is_integer() and abs(x) < 1e6 else _short(f"{x:.3g}")
    return f"{shown} ± {_short(f'{error:.2g}')}" if error is not None and math.isfinite(error) else shown


def _short(x: str) -> str:
    """4.57e+05 as 4.57e5."""
    return x.replace("e+0", "e").replace("e+", "e").replace("e-0", "e-")


def lines(sentence: str, width: int = 46) -> str:
    """A sentence over several lines, for a hover label."""
    out: list[str] = [""]
    for word in sentence.split():
        if out[-1] and len(out[-1]) + len(word) >= width:
            out.append("")
        out[-1] += f" {word}" if out[-1] else word
    return "<br>".join(out)
