"""`python -m adaptive_opt watch RUN_DIR`: status, numbers and last events as text, for people on ssh."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time

from adaptive_opt.dashboard.run import Run
from adaptive_opt.dashboard.runs import Runs
from adaptive_opt.dashboard.text import text


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="RUN_DIR", help="the run_dir of a JsonlSink, or a folder of such folders")
    parser.add_argument("--run", metavar="NAME", help="the run of the folder; the newest otherwise")
    parser.add_argument("--every", type=float, default=2.0, help="seconds between looks (default 2)")
    parser.add_argument("--once", action="store_true", help="print once and stop; so it is where the output is no terminal")
    parser.add_argument("--events", type=int, default=8, help="events shown (default 8)")
    parser.add_argument("--snapshot", type=int, metavar="STEP", help="the run as it was at this step")


def run(args: argparse.Namespace) -> int:
    """Print until interrupted. 0: done; 1: there is nothing to watch, and the message says why."""
    if args.every <= 0 or args.events < 0 or (args.snapshot is not None and args.snapshot < 0):
        return _refused("--every must be above 0, --events and --snapshot 0 or more")
    try:
        runs = Runs(args.folder)
        names = runs.names()
        name = args.run or next(iter(names), None)
        if name is None:
            return _refused(f"no run in {runs.folder}: no folder in it has a steps.jsonl")
        watched = Run(runs.path(name), args.snapshot)
    except ValueError as error:
        return _refused(str(error))
    tty = sys.stdout.isatty()
    colour = tty and not os.environ.get("NO_COLOR")
    watched.finish()
    try:
        while True:
            page = text(watched, runs.label(name), shutil.get_terminal_size().columns, args.events, colour)
            if args.once or not tty:
                print(page)
                return 0
            print("\x1b[H\x1b[2J" + page, flush=True)
            time.sleep(args.every)
            watched.finish()
    except KeyboardInterrupt:
        return 0


def _refused(why: str) -> int:
    print(f"watch: {why}", file=sys.stderr)
    return 1
