"""`python -m adaptive_opt report RUN`: a run folder as a page of Markdown, written to its report.md."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from adaptive_opt.report import Unreadable, report


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", metavar="RUN", nargs="+", help="a run folder: steps.jsonl, metrics.json or both in it")
    parser.add_argument("--print", action="store_true", help="print the page and write nothing")


def run(args: argparse.Namespace) -> int:
    """Write report.md into each folder. 0: all were written; 1: some could not, and the message says why."""
    status = 0
    for folder in args.folders:
        try:
            text = report(folder)
            if args.print:
                print(text)
            else:
                (Path(folder) / "report.md").write_text(text)
                print(Path(folder) / "report.md")
        except (Unreadable, OSError) as why:
            print(f"report: {why}", file=sys.stderr)
            status = 1
    return status
