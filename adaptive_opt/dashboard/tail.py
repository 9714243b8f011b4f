"""Follows a steps.jsonl that is being written: whole lines only, each read once, broken ones counted and passed over."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from adaptive_opt.dashboard.sound import sound
from adaptive_opt.records import StepReport
from adaptive_opt.telemetry import from_json

CHUNK = 1 << 18  # bytes a read
LONGEST = 1 << 20  # bytes of a line: a reading with a thousand layers takes 300,000
HEAD = 128  # bytes by which a file that was written anew is known
BEGINNING = b'{"schema"'  # of every line that JsonlSink writes


@dataclass(frozen=True)
class Line:
    """A report and the size of its line."""

    report: StepReport
    size: int  # bytes


class Tail:
    """Reads what was added to a file since the last look.

    `began` counts how often the file began anew (it got shorter, or another one took its place); `broken` the lines that
    are no sound report. A line longer than 1 MiB is broken, and never held in memory whole.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.broken = 0
        self.began = 0
        self.size = 0  # of the file at the last look
        self.written: float | None = None  # when the file was last written to
        self._start()

    def _start(self) -> None:
        self.offset = 0
        self._identity: tuple[int, int] | None = None
        self._head = b""
        self._rest = b""
        self._too_long = False

    @property
    def left(self) -> int:
        """Bytes still to be read, by the size of the file at the last look."""
        return self.size - self.offset

    @property
    def behind(self) -> float:
        """Share of the file that is still to be read: 0 when it is read up to its end."""
        return self.left / self.size if self.size else 0.0

    def look(self, seconds: float = 1.0) -> Iterator[Line | None]:
        """The reports that came since, as long as `seconds` last; None first where the file began anew.

        A file that is not there, or cannot be read, gives nothing. Raises nothing on any content.
        """
        until = time.monotonic() + seconds
        try:
            with _opened(self.path) as file:
                status = os.fstat(file.fileno())
                self.size, self.written = status.st_size, status.st_mtime
                if self._another(status, file.read(HEAD)):
                    yield None
                file.seek(self.offset)
                while time.monotonic() < until and (chunk := file.read(CHUNK)):
                    self.offset += len(chunk)
                    yield from self._lines(chunk)
        except OSError:
            return

    def _another(self, status: os.stat_result, head: bytes) -> bool:
        """Whether this is not the file of the last look; if so, all is read again from its start."""
        identity = (status.st_dev, status.st_ino)
        known = self._identity is not None
        changed = known and (
            identity != self._identity or status.st_size < self.offset or head[: len(self._head)] != self._head
        )
        if changed:
            self._start()
            self.began += 1
        self._identity, self._head = identity, head
        return changed

    def _lines(self, chunk: bytes) -> Iterator[Line]:
        *whole, rest = chunk.split(b"\n")
        for i, part in enumerate(whole):
            line = self._rest + part if i == 0 else part
            if i == 0:
                self._rest = b""
            if self._too_long or len(line) > LONGEST:
                self._too_long = False
                self.broken += 1
            elif line.strip():
                yield from self._parsed(line)
        self._rest = rest if whole else self._rest + rest
        if self._too_long or len(self._rest) > LONGEST:
            self._rest, self._too_long = b"", True

    def _parsed(self, line: bytes) -> Iterator[Line]:
        report = parse(line)
        if report is None:
            self.broken += 1
            again = line.rfind(BEGINNING)  # a crash left half a line, and the resumed run went on behind it
            report = parse(line[again:]) if again > 0 else None
        if report is not None:
            yield Line(report, len(line))


def parse(line: bytes) -> StepReport | None:
    """The report of a line, or None when it is not a sound one."""
    try:
        report = from_json(line.decode())
        return report if sound(report) else None
    except (ValueError, OverflowError, RecursionError):
        return None


def _opened(path: Path):
    """A regular file, opened without waiting: a pipe in its place would block for ever."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{path} is no regular file")
    return os.fdopen(descriptor, "rb")
