"""What the rows say: who healed what, at which regret, and what it cost the healthy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from scipy.stats import binomtest

from ..ablation.statistics import Interval, mean_interval
from ..ablation.tables import markdown
from .arms import ARMS
from .records import Row
from .workloads import WORKLOADS

NEAR = 0.1  # of the reference's metric: that near counts as healed
WORSE = 0.05  # of the bare base's metric: that much worse is a harm
NOISE = 0.01  # of the bare base's metric: that much may part two healthy runs
Place = tuple[str, str]  # workload, base


# ---- one row --------------------------------------------------------------------------------------------------------------


def judged(rows: Sequence[Row]) -> list[Row]:
    """The rows with `healthy_value`, of the same base and seed, and `healed`; None where there is no reference."""
    known = {(r["workload"], r["arm"], r["base"], r["seed"]): r["value"] for r in done(rows) if r["budget"] == "compute"}
    out = []
    for row in rows:
        w = WORKLOADS[row["workload"]]
        twin = (w.name, "human") if w.reference == "human" else (w.reference, "bare")
        healthy = None if w.healthy else known.get((*twin, row["base"], row["seed"]))
        healed = None
        if healthy is not None and "error" not in row:
            healed = row["value"] is not None and short_of(row["value"], healthy, w.higher) <= NEAR
        out.append({**row, "healthy_value": healthy, "healed": healed})
    return out


def done(rows: Sequence[Row]) -> list[Row]:
    return [r for r in rows if "error" not in r]


def short_of(value: float, reference: float, higher: bool) -> float:
    """By how much of the reference's size the value is worse than it; negative: better."""
    gap = reference - value if higher else value - reference
    return gap / abs(reference) if reference else (0.0 if gap <= 0 else float("inf"))


def counted(row: Row) -> float:
    """The row's value; that of nothing learned where it is not a number."""
    return row["chance"] if row["value"] is None else row["value"]


# ---- arms over all workloads ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Standing:
    """One arm over the places (workload and base) that all compared arms have rows of."""

    arm: str
    places: int
    mean: float  # regret
    worst: float
    worst_at: str
    healed: int
    sick: int  # runs in which the bare base of the same seed fails
    errors: int


def compute_rows(rows: Sequence[Row]) -> list[Row]:
    return [r for r in rows if r["budget"] == "compute"]


def means(rows: Sequence[Row]) -> dict[Place, dict[str, float]]:
    """Each arm's mean over the seeds that every arm of the place has."""
    out: dict[Place, dict[str, float]] = {}
    for place in dict.fromkeys((r["workload"], r["base"]) for r in rows):
        mine = [r for r in rows if (r["workload"], r["base"]) == place]
        arms = dict.fromkeys(r["arm"] for r in mine)
        seeds = set.intersection(*({r["seed"] for r in mine if r["arm"] == arm} for arm in arms))
        if seeds:
            out[place] = {arm: fmean(counted(r) for r in mine if r["arm"] == arm and r["seed"] in seeds) for arm in arms}
    return out


def regrets(rows: Sequence[Row]) -> dict[Place, dict[str, float]]:
    """How far an arm's mean is behind the best arm's, as a share of the way from nothing learned to the best known; at most 1.

    The human is not among the arms, but its value may be the best known: below 0 it did better than all of them.
    """
    out = {}
    for place, values in means(compute_rows(done(rows))).items():
        w = WORKLOADS[place[0]]
        others = [v for arm, v in values.items() if arm != "human"]
        best = max(others) if w.higher else min(others)
        chance = 0.0 if w.metric.startswith("log10") else w.chance
        way = max(abs(v - chance) for v in (best, values.get("human", best)))
        sign = 1 if w.higher else -1
        out[place] = {arm: min(1.0, sign * (best - v) / way) if way > 0 else 0.0 for arm, v in values.items()}
    return out


def failing(rows: Sequence[Row]) -> set[tuple[str, str, int]]:
    """Workload, base and seed where the bare base fails; of judged rows."""
    return {(r["workload"], r["base"], r["seed"]) for r in rows if r["arm"] == "bare" and r["healed"] is False}


def at_equal_steps(rows: Sequence[Row]) -> str:
    """What the rules heal when their price is left out."""
    rows = judged(rows)
    fails = failing(rows)
    mine = [r for r in rows if r["budget"] == "steps" and (r["workload"], r["base"], r["seed"]) in fails]
    if not mine:
        return ""
    k, n = sum(r["healed"] is True for r in mine), len(mine)
    low, high = wilson(k, n)
    return (
        f"With as many steps as bare, their price left out, the rules heal {k} of {n} = {k / n:.0%} ({low:.0%} to {high:.0%})."
    )


def standings(rows: Sequence[Row]) -> list[Standing]:
    rows = judged(rows)
    regret = regrets(rows)
    fails = failing(rows)
    out = []
    for arm in (a for a in ARMS if any(r["arm"] == a for r in rows)):
        mine = compute_rows([r for r in rows if r["arm"] == arm])
        found = {place: values[arm] for place, values in regret.items() if arm in values}
        worst = max(found, key=lambda p: found[p], default=None)
        sick = [r for r in mine if (r["workload"], r["base"], r["seed"]) in fails]
        out.append(
            Standing(
                arm,
                len(found),
                fmean(found.values()) if found else float("nan"),
                found[worst] if worst else float("nan"),
                ", ".join(worst) if worst else "",
                sum(r["healed"] is True for r in sick),
                len(sick),
                sum("error" in r for r in mine),
            )
        )
    return out


def wilson(k: int, n: int) -> tuple[float, float]:
    """95 % interval of a rate."""
    ci = binomtest(k, n).proportion_ci(method="wilson")
    return float(ci.low), float(ci.high)


def standing_cells(s: Standing) -> list[str]:
    rate = ""
    if s.sick:
        low, high = wilson(s.healed, s.sick)
        rate = f"{s.healed} of {s.sick} = {s.healed / s.sick:.0%} ({low:.0%} to {high:.0%})"
    return [s.arm, str(s.places), f"{s.mean:.3f}", f"{s.worst:.3f}", s.worst_at, rate, str(s.errors)]


# ---- place by place -------------------------------------------------------------------------------------------------------


def place_cells(rows: Sequence[Row], arms: Sequence[str]) -> list[list[str]]:
    """A line a workload and base: the healthy value, then each arm's mean, and in how many of its runs it healed."""
    rows, out = judged(rows), []
    for workload, base in dict.fromkeys((r["workload"], r["base"]) for r in rows):
        mine = compute_rows([r for r in rows if (r["workload"], r["base"]) == (workload, base)])
        w = WORKLOADS[workload]
        healthy = [r["healthy_value"] for r in mine if r["arm"] == "bare" and r["healthy_value"] is not None]
        line = [f"{workload}, {base}", w.metric, f"{fmean(healthy):.4g}" if healthy else ""]
        for arm in arms:
            line.append(_cell([r for r in mine if r["arm"] == arm]))
        out.append(line)
    return out


def _cell(mine: Sequence[Row]) -> str:
    good = done(mine)
    if not good:
        return "error" if mine else ""
    text = f"{fmean(counted(r) for r in good):.4g}"
    known = [r["healed"] for r in good if r["healed"] is not None]
    return text + (f" ({sum(known)}/{len(known)})" if known else "")


@dataclass(frozen=True)
class Versus:
    """The rules against the bare base on equal seeds, on one workload with one base."""

    workload: str
    base: str
    budget: str
    bare: float  # mean
    rules: float
    short: Interval  # share of the bare base's metric by which the rules are worse


def against_bare(rows: Sequence[Row], budget: str, arm: str = "rules") -> list[Versus]:
    good = done(rows)
    out = []
    for workload, base in dict.fromkeys((r["workload"], r["base"]) for r in good):
        w = WORKLOADS[workload]
        mine = [r for r in good if (r["workload"], r["base"]) == (workload, base)]
        bare = {r["seed"]: counted(r) for r in mine if r["arm"] == "bare"}
        ours = {r["seed"]: counted(r) for r in mine if r["arm"] == arm and r["budget"] == budget}
        both = sorted(bare.keys() & ours.keys())
        if both:
            size = fmean(abs(bare[s]) for s in both) or 1.0
            gaps = [((bare[s] - ours[s]) if w.higher else (ours[s] - bare[s])) / size for s in both]
            a, b = fmean(bare[s] for s in both), fmean(ours[s] for s in both)
            out.append(Versus(workload, base, budget, a, b, mean_interval(gaps)))
    return out


def versus_cells(v: Versus) -> list[str]:
    short = v.short
    spread = "" if short.low is None or short.high is None else f"{0 - short.high:+.1%} to {0 - short.low:+.1%}"
    return [f"{v.workload}, {v.base}", v.budget, f"{v.bare:.4g}", f"{v.rules:.4g}", f"{0 - short.value:+.1%}", spread]


def alarms(rows: Sequence[Row], arm: str = "rules") -> str:
    """What the arm did on the healthy controls; a batch that is skipped there was a good one."""
    mine = [r for r in done(rows) if WORKLOADS[r["workload"]].healthy and r["arm"] == arm]
    steps, treatments = sum(r["steps"] for r in mine), sum(r["interventions"] for r in mine)
    if not steps:
        return ""
    false = sum(r["reverted"] + r["gainless"] + r["skipped"] for r in mine)
    return (
        f"{arm}: {treatments} treatments in {len(mine)} healthy runs of {steps} steps in all, {false} of them false alarms "
        "(taken back, kept without the gain that they were meant for, or good batches skipped): "
        f"{1000 * false / steps:.2f} per 1000 steps."
    )


# ---- the text -------------------------------------------------------------------------------------------------------------

SHOWN = ("bare", "human", "rules", "sgd", "sam", "kfac", "sgd+", "sam+", "kfac+", "random", "trial", "StabilityGuard", "ZClip")


def write(rows: Sequence[Row]) -> str:
    """All tables, as Markdown."""
    there = [arm for arm in SHOWN if any(r["arm"] == arm for r in rows)]
    parts = ["## Arms", markdown(
        ["arm", "places", "mean regret", "worst", "where", "healed where bare fails", "errors"],
        [standing_cells(s) for s in standings(rows)],
    )]  # fmt: skip
    parts.append(at_equal_steps(rows))
    for budget in ("compute", "steps"):
        found = [v for v in against_bare(rows, budget) if v.short.value > WORSE]
        parts.append(f"## Where the rules end more than {WORSE:.0%} worse than bare, equal {budget}")
        parts.append(_versus(found) if found else "Nowhere.")
    healthy = [v for b in ("steps", "compute") for v in against_bare(rows, b) if WORKLOADS[v.workload].healthy]
    if healthy:
        parts += ["## Healthy controls: the rules against bare", _versus(healthy), alarms(rows)]
    parts += ["## What is run", described(list(dict.fromkeys(r["workload"] for r in rows)))]
    parts += [
        "## Place by place: mean (runs healed / runs)",
        markdown(["", "metric", "healthy", *there], place_cells(rows, there)),
    ]
    failed = [r for r in rows if "error" in r]
    parts += [f"## Runs that failed: {len(failed)}"]
    parts += ["\n".join(f"- {r['workload']}, {r['arm']}, {r['base']}, seed {r['seed']}: {r['error']}" for r in failed)] * bool(
        failed
    )
    return "\n\n".join(parts) + "\n"


def described(names: Sequence[str]) -> str:
    """What is run: a line a workload."""
    lines = []
    for w in (WORKLOADS[name] for name in names):
        rates = ", ".join(f"{w.factor * rate:g} {base}" for base, rate in w.rates.items())
        human = w.human.words if w.human is not None else ""
        lines.append([w.name, w.group, rates, f"{w.metric}, {'more' if w.higher else 'less'} is better", human])
    return markdown(["", "what is wrong", "learning rates", "metric", "the human"], lines)


def _versus(found: Sequence[Versus]) -> str:
    head = ["", "equal", "bare", "rules", "rules better by", "95 %"]
    return markdown(head, [versus_cells(v) for v in found])
