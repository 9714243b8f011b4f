"""The tables: one a workload with a line an arm, and one over all workloads. Plain cells, written as Markdown, CSV or LaTeX."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median

import numpy as np
from numpy.typing import NDArray

from .runs import RunRow
from .statistics import Difference, Interval, adjusted, difference, iqm_interval, mean_interval, profile, sign_test


@dataclass(frozen=True)
class Line:
    """One arm on one workload."""

    workload: str
    arm: str
    metric: str
    higher: bool
    n: int
    not_finite: int
    mean: Interval
    iqm: Interval
    versus: Difference | None  # None: the reference itself, or no seed in common
    reached: int | None  # runs that reached the target; None: there is none
    steps: float | None  # to the target, median over those that reached it
    gradients: float | None
    seconds: float | None
    kept: float  # treatments a run
    reverted: float


@dataclass(frozen=True)
class Overall:
    """One arm over all workloads and seeds, against the reference."""

    arm: str
    wins: int
    ties: int
    losses: int
    p: float
    solved: int
    problems: int  # workload and seed pairs that have a target
    gradients: float  # gradient-equivalents a step, mean
    seconds: float  # a run, mean


def lines(rows: Sequence[RunRow], reference: str) -> list[Line]:
    """In the order of the workloads and arms as they were found, the reference first; p values adjusted over all of them."""
    out = []
    for workload in dict.fromkeys(r.workload for r in rows):
        mine = [r for r in rows if r.workload == workload]
        base = {r.seed: r.value for r in mine if r.arm == reference}
        out += [_line([r for r in mine if r.arm == arm], base, reference) for arm in arms(mine, reference)]
    compared = [line for line in out if line.versus is not None]
    fixed = iter(adjusted([line.versus.p for line in compared if line.versus is not None]))
    return [replace(li, versus=replace(li.versus, adjusted=next(fixed))) if li.versus is not None else li for li in out]


def arms(rows: Sequence[RunRow], reference: str) -> list[str]:
    """Every arm once, the reference first."""
    found = list(dict.fromkeys(r.arm for r in rows))
    return [*(a for a in found if a == reference), *(a for a in found if a != reference)]


def _line(runs: Sequence[RunRow], base: dict[int, float], reference: str) -> Line:
    first = runs[0]
    pairs = [(r.value, base[r.seed]) for r in runs if r.seed in base] if first.arm != reference else []
    aimed = [r for r in runs if r.steps_to_target is not None]
    there = [r for r in aimed if r.steps_to_target != math.inf]
    values = [r.value for r in runs]
    return Line(
        first.workload,
        first.arm,
        first.metric,
        first.higher,
        len(runs),
        sum(not r.finite for r in runs),
        mean_interval(values),
        iqm_interval(values),
        difference([a for a, _ in pairs], [b for _, b in pairs]) if pairs else None,
        len(there) if aimed else None,
        median(r.steps_to_target or 0.0 for r in there) if there else None,
        median(r.gradients_to_target or 0.0 for r in there) if there else None,
        median(r.seconds_to_target or 0.0 for r in there) if there else None,
        sum(r.kept for r in runs) / len(runs),
        sum(r.reverted for r in runs) / len(runs),
    )


def overall(rows: Sequence[RunRow], reference: str) -> list[Overall]:
    """A line an arm."""
    base = {(r.workload, r.seed): r.value for r in rows if r.arm == reference}
    return [_overall([r for r in rows if r.arm == arm], base) for arm in arms(rows, reference)]


def _overall(runs: Sequence[RunRow], base: dict[tuple[str, int], float]) -> Overall:
    signs = [(r.value - base[r.workload, r.seed]) * (1 if r.higher else -1) for r in runs if (r.workload, r.seed) in base]
    wins, losses = sum(s > 0 for s in signs), sum(s < 0 for s in signs)
    aimed = [r for r in runs if r.steps_to_target is not None]
    return Overall(
        runs[0].arm,
        wins,
        len(signs) - wins - losses,
        losses,
        sign_test(wins, losses),
        sum(r.steps_to_target != math.inf for r in aimed),
        len(aimed),
        sum(r.gradients for r in runs) / sum(r.steps for r in runs),
        sum(r.seconds for r in runs) / len(runs),
    )


def profiles(rows: Sequence[RunRow], cost: str, reference: str, factors: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """Performance profile of each arm; a problem is a workload and seed with a target; `cost` names a field of RunRow."""
    aimed = [r for r in rows if r.steps_to_target is not None]
    problems = list(dict.fromkeys((r.workload, r.seed) for r in aimed))
    names = arms(aimed, reference)
    if not problems:
        return {}
    spent = {(r.workload, r.seed, r.arm): getattr(r, cost) for r in aimed}
    costs = np.array([[spent.get((*problem, arm), math.inf) for arm in names] for problem in problems])
    return dict(zip(names, profile(costs, factors), strict=True))


# ---- cells ----------------------------------------------------------------------------------------------------------------

HEAD = ("arm", "n", "not finite", "mean", "IQM", "95 %", "against {}", "95 %", "p", "adjusted", "at target", "steps",
        "gradients", "seconds", "kept", "taken back")  # fmt: skip
OVERALL_HEAD = ("arm", "better", "equal", "worse", "p", "at target", "gradients a step", "seconds a run")


def cells(line: Line) -> list[str]:
    v = line.versus
    return [
        line.arm,
        str(line.n),
        str(line.not_finite),
        f"{line.mean.value:.4g}",
        f"{line.iqm.value:.4g}",
        _interval(line.iqm),
        "" if v is None else f"{v.mean.value:+.3g}",
        "" if v is None else _interval(v.mean),
        "" if v is None else _p(v.p),
        "" if v is None else _p(v.adjusted),
        "" if line.reached is None else f"{line.reached} of {line.n}",
        _number(line.steps, ".0f"),
        _number(line.gradients, ".0f"),
        _number(line.seconds, ".2f"),
        f"{line.kept:.2g}",
        f"{line.reverted:.2g}",
    ]


def overall_cells(o: Overall) -> list[str]:
    reached = f"{o.solved} of {o.problems}" if o.problems else ""
    counts = [str(o.wins), str(o.ties), str(o.losses), _p(o.p)]
    return [o.arm, *counts, reached, f"{o.gradients:.2f}", f"{o.seconds:.2f}"]


def _number(x: float | None, form: str) -> str:
    return "" if x is None else format(x, form)


def _interval(i: Interval) -> str:
    return "" if i.low is None or i.high is None else f"{i.low:.4g} to {i.high:.4g}"


def _p(p: float) -> str:
    return "" if math.isnan(p) else "<0.001" if p < 0.001 else f"{p:.3f}"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    body = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(c.replace("|", "\\|") for c in line) + " |" for line in body)


def latex(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A tabular for booktabs."""
    lines = [" & ".join(map(_tex, line)) + r" \\" for line in (head, *rows)]
    columns = "l" + "r" * (len(head) - 1)
    parts = [
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        lines[0],
        r"\midrule",
        *lines[1:],
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join(parts)


def _tex(text: str) -> str:
    text = text.replace("\\", r"\textbackslash{}")
    for sign in "&%$#_{}":
        text = text.replace(sign, "\\" + sign)
    return text.replace("<", "$<$").replace(r"\textbackslash\{\}", r"\textbackslash{}")


def csv_text(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(rows)
    return out.getvalue()
