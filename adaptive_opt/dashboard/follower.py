"""Reads the runs that someone looks at, in the background, so that a page never waits for a file."""

from __future__ import annotations

import time
from threading import Event, Lock, Thread

from adaptive_opt.dashboard.run import Run
from adaptive_opt.dashboard.runs import Runs

MOST = 7  # runs kept in memory: the one that is shown and six compared with it
IDLE = 60.0  # seconds after which a run that nobody looks at is not read on
PAUSE = 0.2  # seconds between looks at files in which nothing came
CALM, LONG = 2.0, 1 << 20  # seconds after a page was opened in which a file with more than so many bytes to read waits
LISTED = 3.0  # seconds for which the list of runs is good


class Follower:
    """The runs of a folder, each read on as long as it is asked for. `until`: the last step to be read of any."""

    def __init__(self, runs: Runs, until: int | None = None):
        self.runs, self.until = runs, until
        self._open: dict[str, Run] = {}
        self._asked: dict[str, float] = {}
        self._opened = -CALM
        self._names: tuple[float, list[str]] = (-LISTED, [])
        self._lock = Lock()
        self._stop = Event()
        self._thread = Thread(target=self._follow, name="adaptive_opt dashboard reader", daemon=True)
        self._thread.start()

    def names(self) -> list[str]:
        """The runs of the folder, newest first."""
        if time.monotonic() - self._names[0] > LISTED:
            self._names = time.monotonic(), self.runs.names()
        return self._names[1]

    def get(self, name: str) -> Run:
        """A run of the folder, read as far as the background has come. Raises ValueError when there is none of that name."""
        if name not in self.names():
            raise ValueError(f"no run {name!r} in {self.runs.folder}")
        with self._lock:
            if name not in self._open:
                self._open[name] = Run(self.runs.path(name), self.until)
            self._asked[name] = time.monotonic()
            for old in sorted(self._open, key=lambda n: self._asked[n])[:-MOST]:
                del self._open[old]
            return self._open[name]

    def opened(self) -> None:
        """A page is being opened: reading a long file would take the time that drawing it needs."""
        self._opened = time.monotonic()

    def close(self) -> None:
        """Stop reading."""
        self._stop.set()
        self._thread.join()

    def _follow(self) -> None:
        while not self._stop.is_set():
            with self._lock:
                wanted = [run for name, run in self._open.items() if time.monotonic() - self._asked[name] < IDLE]
            calm = time.monotonic() - self._opened < CALM
            came = [run.update(0.1) for run in wanted if not (calm and run.tail.left > LONG)]
            if not any(came):
                self._stop.wait(PAUSE)
