"""A page or a figure as a PNG, drawn by the Chromium or Chrome of this machine."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--headless", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--disable-quic", "--disable-extensions", "--hide-scrollbars", "--allow-file-access-from-files",
    "--virtual-time-budget=10000",
)  # fmt: skip
ALONE = """<!DOCTYPE html><meta charset="utf-8"><style>body{{margin:0;background:#fff}}</style><script>{plotly}</script>
<div id="figure"></div><script>Plotly.newPlot("figure", {figure})</script>"""


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
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "page.html"
        file.write_text(document, encoding="utf-8")
        drawn = _run(["--dump-dom", f"--window-size={width},800"], file, folder, dark)
        height = re.search(r'data-drawn="(\d+)"', drawn)
        if height is None:
            raise RuntimeError("the browser did not draw the page")
        _shoot(file, folder, Path(path), width, int(height[1]), dark)


def figure_picture(figure: Any, path: str | Path, width: int = 640) -> None:
    """Draw one figure. Raises as `page_picture` does."""
    from plotly.offline import get_plotlyjs

    from adaptive_opt.dashboard.export import figure_json

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "figure.html"
        file.write_text(ALONE.format(plotly=get_plotlyjs(), figure=figure_json(figure)), encoding="utf-8")
        _shoot(file, folder, Path(path), width, int(figure.layout.height or 400), dark=False)


def _shoot(file: Path, folder: str, path: Path, width: int, height: int, dark: bool) -> None:
    shot = Path(folder) / "shot.png"
    told = _run([f"--screenshot={shot}", f"--window-size={width},{height}"], file, folder, dark)
    if not shot.exists():
        raise RuntimeError(f"the browser drew nothing: {told[-500:]}")
    shutil.copyfile(shot, path)


def _run(what: list[str], file: Path, folder: str, dark: bool) -> str:
    import os

    root = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []  # Chromium refuses a sandbox to root
    theme = ["--blink-settings=preferredColorScheme=0"] if dark else ["--blink-settings=preferredColorScheme=1"]
    command = [browser(), *FLAGS, *root, *theme, f"--user-data-dir={folder}/profile", *what, file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if done.returncode != 0:
        raise RuntimeError(f"{command[0]} failed with status {done.returncode}: {done.stderr[-500:]}")
    return done.stdout
