"""A page or a figure as a PNG, drawn by the Chromium or Chrome of this machine."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--headless", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--disable-quic", "--disable-extensions", "--hide-scrollbars", "--allow-file-access-from-files",
    "--virtual-time-budget=10000",
)  # fmt: skip
LONGEST = 120  # seconds that a drawing may take
COLUMNS, TITLE = 3, 30  # figures beside each other; pixels of the name above each
ALONE = """<!DOCTYPE html><meta charset="utf-8"><style>
body {{ margin: 0; background: #fff; display: grid; grid-template-columns: repeat({columns}, {width}px); }}
h2 {{ font: 600 14px/{title}px system-ui, sans-serif; margin: 0 0 0 12px; height: {title}px; color: #1c2229; }}
</style><script>{plotly}</script>{places}<script>{calls}</script>"""


class NoBrowser(Exception):
    """There is nothing to draw with."""


def browser() -> str:
    """Path of a Chromium or Chrome. Raises NoBrowser when there is none."""
    found = next((path for path in map(shutil.which, NAMES) if path), None)
    if found is None:
        raise NoBrowser(
            f"a PNG is drawn by Chromium or Chrome, and none of {', '.join(NAMES)} is on the PATH (Debian, Ubuntu: apt install "
            "chromium); --export writes an HTML file without one"
        )
    return found


def page_picture(document: str, path: str | Path, width: int = 1280, dark: bool = False) -> None:
    """Draw an exported page, whole, `width` pixels wide. Raises NoBrowser, or RuntimeError with what the browser said."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # the browser may still write
        file = Path(folder) / "page.html"
        file.write_text(document, encoding="utf-8")
        drawn = _run(["--dump-dom", f"--window-size={width},800"], file, folder, dark)
        height = re.search(r'data-drawn="(\d+)"', drawn)
        if height is None:
            raise RuntimeError("the browser did not draw the page")
        _shoot(file, folder, Path(path), width, int(height[1]), dark)


def figure_picture(figure: Any, path: str | Path, width: int = 640) -> None:
    """Draw one figure. Raises as `page_picture` does."""
    _draw([("", figure)], Path(path), 1, width)


def figures_picture(figures: Mapping[str, Any], path: str | Path, width: int = 1280) -> None:
    """Draw several figures, each below its name, three beside each other. Raises as `page_picture` does."""
    _draw(list(figures.items()), Path(path), COLUMNS, width // COLUMNS)


def _draw(named: list[tuple[str, Any]], path: Path, columns: int, width: int) -> None:
    from plotly.offline import get_plotlyjs

    from adaptive_opt.dashboard.export import figure_json

    title = TITLE if any(name for name, _ in named) else 0
    heights = [int(figure.layout.height or 400) for _, figure in named]
    places, calls = [], []
    for i, (name, figure) in enumerate(named):
        head = f"<h2>{escape(name)}</h2>" if title else ""
        places.append(f'<div>{head}<div id="f{i}" style="width:{width}px;height:{heights[i]}px"></div></div>')
        calls.append(f'Plotly.newPlot("f{i}", {figure_json(figure)});')
    height = sum(max(heights[i : i + columns]) + title for i in range(0, len(named), columns))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # the browser may still write
        file = Path(folder) / "figures.html"
        page = ALONE.format(
            title=TITLE, columns=columns, width=width, plotly=get_plotlyjs(), places="".join(places), calls="".join(calls)
        )
        file.write_text(page, encoding="utf-8")
        _shoot(file, folder, path, columns * width, height, dark=False)


def _shoot(file: Path, folder: str, path: Path, width: int, height: int, dark: bool) -> None:
    shot = Path(folder) / "shot.png"
    told = _run([f"--screenshot={shot}", f"--window-size={width},{height}"], file, folder, dark)
    if not shot.exists():
        raise RuntimeError(f"the browser drew nothing: {told[-500:]}")
    shutil.copyfile(shot, path)


def _run(what: list[str], file: Path, folder: str, dark: bool) -> str:
    root = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []  # Chromium refuses a sandbox to root
    theme = ["--blink-settings=preferredColorScheme=0"] if dark else ["--blink-settings=preferredColorScheme=1"]
    command = [browser(), *FLAGS, *root, *theme, f"--user-data-dir={folder}/profile", *what, file.as_uri()]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LONGEST)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"{command[0]} had drawn nothing after {LONGEST} s") from error
    if done.returncode != 0:
        raise RuntimeError(f"{command[0]} failed with status {done.returncode}: {done.stderr[-500:]}")
    return done.stdout
