"""python scripts/clinic.py [--quick] [--seeds K] [--workloads ...] [--arms ...] [--bases ...] [--out FILE.json]

The clinic: sick and healthy runs, and what the bare base, the cheap human fix, every policy and the peers make of them at equal
compute. A JSON line a finished run; what is there is not run again. Ends with the tables and figures of docs/clinic.md.
`--quick` is a cut of it: one seed, half the gradients, the most telling arms (`make clinic`, under 10 minutes).
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

from experiments.clinic import plots, tables  # noqa: E402
from experiments.clinic.book import ARMS, BASES, WORKLOADS, Book, jobs  # noqa: E402

QUICK = ("bare", "human", "rules", "kfac", "random", "trial", "StabilityGuard")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, half the gradients, seven arms")
    parser.add_argument("--seeds", type=int, help="0 to K-1 (default 5; --quick: 1)")
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS), metavar="NAME")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), metavar="NAME", help=", ".join(ARMS))
    parser.add_argument("--bases", nargs="+", choices=BASES, default=list(BASES))
    parser.add_argument("--steps", type=int, help="gradient-equivalents a run, in place of the workload's own")
    parser.add_argument("--out", type=Path, help="default runs/clinic.json, or runs/clinic_quick.json")
    parser.add_argument("--tables-only", action="store_true", help="run nothing")
    args = parser.parse_args()
    seeds = args.seeds if args.seeds is not None else 1 if args.quick else 5
    if seeds < 1 or (args.steps is not None and args.steps < 1):
        parser.error(f"--seeds {seeds} --steps {args.steps}: 1 or more")
    torch.set_num_threads(1)
    logging.getLogger("adaptive_opt").setLevel(logging.ERROR)  # the rows keep what is said
    arms = args.arms or (QUICK if args.quick else list(ARMS))
    book = Book(args.out or ROOT / "runs" / ("clinic_quick.json" if args.quick else "clinic.json"))
    if not args.tables_only:
        wanted = [job for job in jobs(args.workloads, arms, args.bases, seeds) if job not in book]
        with tqdm(total=len(wanted), desc="clinic", disable=not sys.stderr.isatty()) as bar:
            for row in book.fill(wanted, args.steps, share=0.5 if args.quick else 1.0):
                bar.set_postfix_str(f"{row['workload']}, {row['arm']}, {row['base']}, {row['seed']}")
                bar.update()
    book.replace(tables.judged(book.rows))
    out = book.path.with_suffix("")
    out.mkdir(parents=True, exist_ok=True)
    text = tables.write(book.rows)
    (out / "clinic.md").write_text(text)
    plots.draw(book.rows, out)
    print(text)
    print(f"Rows: {book.path}. Tables and figures: {out}")


if __name__ == "__main__":
    main()
