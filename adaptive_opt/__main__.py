"""`python -m adaptive_opt COMMAND`: a command is a file of adaptive_opt/commands with `arguments(parser)` and `run(args)`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

COMMANDS: dict[str, str] = {  # name -> what it does, in one line
    "checkup": "one page on a checkpoint: the curvature of its loss, and which layer worries",
    "compare": "run folders side by side: config, numbers, treatments, outcome",
    "dashboard": "a run, live in the browser, or as one HTML file or picture",
    "report": "a run folder as a page of Markdown",
    "watch": "a run as text: status, numbers, last events",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status. Only the named command's module is imported."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="python -m adaptive_opt", description="Tools around adaptive_opt.")
    commands = parser.add_subparsers(dest="command", required=True)
    named = words[0] if words and words[0] in COMMANDS else None
    for name, what in COMMANDS.items():
        sub = commands.add_parser(name, help=what, description=what)
        if name == named:
            import_module(f"adaptive_opt.commands.{name}").arguments(sub)
    args = parser.parse_args(words)
    return import_module(f"adaptive_opt.commands.{args.command}").run(args)


if __name__ == "__main__":
    sys.exit(main())
