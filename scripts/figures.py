"""python scripts/figures.py [--only instruments canyon ...] [--out DIR]: the article's figures, computed.

Trains what each needs (a few minutes in all), draws it, and writes DIR/figures/*.png and DIR/figures.md, in which every number
of every caption is measured in that very run. Default: docs/.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
import time
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from adaptive_opt.dashboard.picture import NoBrowser  # noqa: E402
from experiments.figures.common import Drawn  # noqa: E402

FIGURES = ("instruments", "canyon", "minima", "saddle", "layers", "panels")  # 2, 3, 4, 5, 6, 7
HEAD = """# The article's figures, computed

The pictures of "Three Numbers" were drawn by hand; these are measured. `make figures` ({date}, torch {torch}, {minutes:.1f}
minutes on {threads} thread) trains the nets, draws the figures and writes this page: every number below comes from that run.
"What holds" and "what does not" speak of the article's claims. Another machine or torch version moves the last digits.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=FIGURES, default=list(FIGURES))
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    args = parser.parse_args()
    torch.set_num_threads(1)
    folder = args.out / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    began = time.time()
    sections = []
    for name in args.only:
        start = time.time()
        try:
            drawn = import_module(f"experiments.figures.{name}").draw(folder)
        except NoBrowser as why:
            print(f"figures: {name} left out: {why}", file=sys.stderr)
            continue
        sections.append(section(drawn, name))
        print(f"{name}: {', '.join(drawn.files)} ({time.time() - start:.0f} s)", flush=True)
    head = HEAD.format(
        date=time.strftime("%Y-%m-%d"),
        torch=torch.__version__,
        minutes=(time.time() - began) / 60,
        threads=torch.get_num_threads(),
    )
    page = args.out / ("figures.md" if len(args.only) == len(FIGURES) else "figures-some.md")
    page.write_text("\n".join([head, *sections]))
    print(page)
    return 0


def wrapped(text: str) -> str:
    """A paragraph, or a point of a list, in lines of 120 characters."""
    indent = "  " if text.startswith("- ") else ""
    return textwrap.fill(text, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def section(drawn: Drawn, name: str) -> str:
    """One figure's part of the page."""
    lines = [f"## {drawn.title}", ""]
    lines += [f"![{drawn.title}](figures/{file})" for file in drawn.files]
    lines += ["", wrapped(drawn.caption), "", f"Seed {drawn.seed}; `python scripts/figures.py --only {name}`."]
    lines += ["", "What holds:", ""]
    lines += [wrapped(f"- {sentence}") for sentence in drawn.holds]
    lines += ["", "What does not, or not without a limit:", ""]
    lines += [wrapped(f"- {sentence}") for sentence in drawn.fails]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(main())
