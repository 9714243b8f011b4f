"""python scripts/ablate.py RUNS_DIR [--reference ARM] [--out DIR]: tables and figures from any set of finished runs.

Writes ablation.md, ablation.tex, arms.csv (a line an arm and workload), runs.csv (a line a run), differences.png and
profiles.png. `make ablation` runs the study first: python experiments/train.py -m study=ablation
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from experiments.ablation import plots, tables  # noqa: E402
from experiments.ablation.runs import Found, find  # noqa: E402
from experiments.ablation.statistics import RESAMPLES  # noqa: E402

EXPLAINED = """n: seeds. not finite: runs that ended with NaN; a loss as the metric is then the one it began with.
IQM: interquartile mean. 95 %: bootstrap interval ({resamples} resamples, percentiles). against {reference}: mean difference on
equal seeds; p: two-sided permutation test on the signs of these differences, which with {seeds} pairs cannot come below
{smallest:.2g}; adjusted: over all {tests} comparisons below (Benjamini and Hochberg). steps, gradients, seconds: to the target
loss (median of 15 steps), median over the runs that reach it. A gradient is one forward and backward pass, probing and replays
included; a mode's own arithmetic is in the seconds only. better, equal, worse: pairs of runs of one workload and seed."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", metavar="RUNS_DIR", type=Path)
    parser.add_argument("--reference", default="rules", help="the arm that the others are compared with (default %(default)s)")
    parser.add_argument("--out", type=Path, help="default: RUNS_DIR/tables")
    args = parser.parse_args()
    try:
        found = find(args.runs)
    except ValueError as error:
        print(f"ablate: {error}", file=sys.stderr)
        return 2
    for name, why in found.skipped:
        print(f"ablate: left out {name}: {why}", file=sys.stderr)
    if not found.rows:
        print(f"ablate: no finished run below {args.runs}", file=sys.stderr)
        return 1
    if args.reference not in {r.arm for r in found.rows}:
        there = ", ".join(dict.fromkeys(r.arm for r in found.rows))
        print(f"ablate: --reference {args.reference}: no such arm; there are {there}", file=sys.stderr)
        return 2
    out = args.out or args.runs / "tables"
    out.mkdir(parents=True, exist_ok=True)
    text = write(found, args.reference, out)
    print(text)
    print(f"\nWritten to {out}")
    return 0


def write(found: Found, reference: str, out: Path) -> str:
    """All files; the Markdown is returned."""
    rows = found.rows
    table, summary = tables.lines(rows, reference), tables.overall(rows, reference)
    parts, tex = [_intro(table, reference)], []
    head = list(tables.OVERALL_HEAD)
    parts += [f"## All workloads, against {reference}", tables.markdown(head, [tables.overall_cells(o) for o in summary])]
    tex.append(tables.latex(head, [tables.overall_cells(o) for o in summary]))
    head = [name.format(reference) for name in tables.HEAD]
    for workload in dict.fromkeys(line.workload for line in table):
        mine = [line for line in table if line.workload == workload]
        way = "more" if mine[0].higher else "less"
        title = f"{workload}: {mine[0].metric} ({way} is better)"
        parts += [f"## {title}", tables.markdown(head, [tables.cells(line) for line in mine])]
        tex += [f"% {title}", tables.latex(head, [tables.cells(line) for line in mine])]
    if found.skipped:
        parts += [f"## Left out: {len(found.skipped)}", "\n".join(f"- {name}: {why}" for name, why in found.skipped)]
    text = "\n\n".join(parts) + "\n"
    (out / "ablation.md").write_text(text)
    (out / "ablation.tex").write_text("\n\n".join(tex) + "\n")
    every = [[line.workload, line.metric, *tables.cells(line)] for line in table]
    (out / "arms.csv").write_text(tables.csv_text(["workload", "metric", *head], every))
    (out / "runs.csv").write_text(tables.csv_text(list(asdict(rows[0])), [list(asdict(r).values()) for r in rows]))
    plots.differences(table, reference, out / "differences.png")
    plots.performance(rows, reference, out / "profiles.png")
    return text


def _intro(table: list[tables.Line], reference: str) -> str:
    compared = [line.versus for line in table if line.versus is not None]
    seeds = max((d.pairs for d in compared), default=0)
    smallest = min((d.smallest for d in compared), default=1.0)
    words = EXPLAINED.format(resamples=RESAMPLES, reference=reference, seeds=seeds, smallest=smallest, tests=len(compared))
    return f"{time.strftime('%Y-%m-%d')}, `{' '.join(['python', *sys.argv])}`\n\n{words}"


if __name__ == "__main__":
    sys.exit(main())
