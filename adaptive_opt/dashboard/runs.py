"""The runs below a folder, and the file of one that is asked for by name: nothing outside the folder is ever opened."""

from __future__ import annotations

import os
from pathlib import Path

FILE = "steps.jsonl"
DEPTH, MOST = 5, 1000  # folders deep; runs


class Runs:
    """Folder of one run or of many. Names are paths relative to it; "." is the folder itself."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder).resolve()
        if not self.folder.is_dir():
            raise ValueError(f"{folder}: no such folder; give the run_dir of a JsonlSink, or a folder of them")

    def names(self) -> list[str]:
        """The runs that are there now, newest first."""
        found: list[tuple[float, str]] = []
        for here, folders, files in os.walk(self.folder):  # does not follow links
            if len(Path(here).relative_to(self.folder).parts) >= DEPTH:
                folders.clear()
            path = Path(here) / FILE
            if FILE in files and self._inside(path):
                found.append((path.stat().st_mtime, Path(here).relative_to(self.folder).as_posix()))
            if len(found) >= MOST:
                break
        return [name for _, name in sorted(found, key=lambda f: (-f[0], f[1]))]

    def path(self, name: str) -> Path:
        """The file of a listed run. Raises ValueError on every other name."""
        if not isinstance(name, str) or name not in self.names():
            raise ValueError(f"no run {name!r} in {self.folder}")
        path = self.folder / name / FILE
        if not self._inside(path):
            raise ValueError(f"run {name!r} lies outside {self.folder}")
        return path

    def label(self, name: str) -> str:
        """What people call it."""
        return self.folder.name if name == "." else name

    def _inside(self, path: Path) -> bool:
        return path.is_file() and not path.is_symlink() and path.resolve().is_relative_to(self.folder)
