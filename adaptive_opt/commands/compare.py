"""`python -m adaptive_opt compare RUN RUN ...`: run folders side by side, as a Markdown table."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from adaptive_opt.report import Unreadable, compare, summary


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", metavar="RUN", nargs="+", help="a run folder: steps.jsonl, metrics.json or both in it")
    parser.add_argument("--out", metavar="FILE.md", help="write the table there too")


def run(args: argparse.Namespace) -> int:
    """Print the table. 0: at least one run could be read, the others are named on stderr; 1: none could."""
    runs = []
    for folder in args.folders:
        try:
            runs.append(summary(folder))
        except Unreadable as why:
            print(f"compare: skipped {why}", file=sys.stderr)
    if not runs:
        return 1
    text = compare(runs)
    print(text)
    if args.out is not None:
        try:
            Path(args.out).write_text(text + "\n")
        except OSError as error:
            print(f"compare: --out {args.out}: {error}", file=sys.stderr)
            return 1
    return 0
