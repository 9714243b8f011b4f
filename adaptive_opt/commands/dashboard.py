"""`python -m adaptive_opt dashboard RUN_DIR`: the live page, or the run as one HTML file or picture."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from adaptive_opt.dashboard import EXTRA, drawable
from adaptive_opt.dashboard.follower import Follower
from adaptive_opt.dashboard.run import Run
from adaptive_opt.dashboard.runs import Runs


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="RUN_DIR", help="the run_dir of a JsonlSink, or a folder of such folders")
    parser.add_argument("--run", metavar="NAME", help="the run of the folder to begin with, or to export; the newest otherwise")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1: this machine only)")
    parser.add_argument("--port", type=int, default=8050, help="port to listen on (default 8050; 0: any that is free)")
    parser.add_argument("--export", metavar="OUT.html", help="write one HTML file that needs nothing else, and stop")
    parser.add_argument("--png", metavar="OUT.png", help="write a picture of the page (needs Chromium or Chrome), and stop")
    parser.add_argument("--width", type=int, default=1280, help="pixels, of the picture (default 1280)")
    parser.add_argument("--dark", action="store_true", help="the picture in dark colours")
    parser.add_argument("--snapshot", type=int, metavar="STEP", help="the run as it was at this step")


def run(args: argparse.Namespace) -> int:
    """Serve until interrupted, or write what was asked for. 0: done; 1: it cannot be done, and the message says why."""
    if not drawable():
        return _refused(EXTRA)
    if not 0 <= args.port < 65536 or args.width < 200 or (args.snapshot is not None and args.snapshot < 0):
        return _refused("--port must be 0 to 65535, --width 200 or more, --snapshot 0 or more")
    try:
        runs = Runs(args.folder)
        names = runs.names()
        if args.run is not None and args.run not in names:
            return _refused(f"no run {args.run!r} in {runs.folder}; there are: {', '.join(names[:20]) or 'none'}")
        if args.export or args.png:
            return _write(args, runs, args.run or (names[0] if names else None))
        return _serve(args, runs)
    except (ValueError, OSError) as error:
        return _refused(str(error))


def _write(args: argparse.Namespace, runs: Runs, name: str | None) -> int:
    from adaptive_opt.dashboard.export import document
    from adaptive_opt.dashboard.picture import NoBrowser, page_picture

    if name is None:
        return _refused(f"no run in {runs.folder}: no folder in it has a steps.jsonl")
    read = Run(runs.path(name), args.snapshot).finish()
    text = document(read, runs.label(name))
    if args.export:
        Path(args.export).write_text(text, encoding="utf-8")
        print(f"{args.export}: {runs.label(name)}, {read.lines:,} lines")
    if args.png:
        try:
            page_picture(text, args.png, args.width, args.dark)
        except (NoBrowser, RuntimeError) as error:
            return _refused(f"--png: {error}")
        print(f"{args.png}: {runs.label(name)}, {args.width} pixels wide")
    return 0


def _serve(args: argparse.Namespace, runs: Runs) -> int:
    follower = Follower(runs, args.snapshot)  # reads while the rest is loaded
    first = args.run or next(iter(follower.names()), None)
    if first is not None:
        follower.get(first)

    from adaptive_opt.dashboard.page import page
    from adaptive_opt.dashboard.server import PortTaken, address, serving

    try:
        with serving(page(follower, args.run), args.host, args.port) as server:
            print(f"{address(server)}  shows {runs.folder}; stop with Ctrl-C", flush=True)
            server.serve_forever()
    except PortTaken as error:
        return _refused(str(error))
    except KeyboardInterrupt:
        pass
    finally:
        follower.close()
    return 0


def _refused(why: str) -> int:
    print(f"dashboard: {why}", file=sys.stderr)
    return 1
