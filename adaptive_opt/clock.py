"""How long training and probing take: by the process's own time on the CPU, by events on a CUDA device."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

Mark = Any  # seconds of process time, or a recorded CUDA event


class Clock:
    """Two sums of seconds. Process time counts every thread of this process and nothing that other processes do."""

    def __init__(self) -> None:
        self.total = 0.0  # between the steps that were ticked
        self.probing = 0.0  # of that, inside `measuring`
        self._last: Mark | None = None  # the latest tick
        self._open: list[tuple[str, Mark, Mark]] = []  # spans between events that the device may not have reached yet

    def tick(self, device: torch.device) -> None:
        """The end of a step: what passed since the last one belongs to the run."""
        now = _mark(device)
        if self._last is not None:
            self._add("total", self._last, now)
        self._last = now

    @contextmanager
    def measuring(self, device: torch.device) -> Iterator[None]:
        """What happens inside is probing."""
        began = _mark(device)
        self._last = began if self._last is None else self._last  # in the first step nothing was ticked yet
        try:
            yield
        finally:
            self._add("probing", began, _mark(device))

    @property
    def training(self) -> float:
        """Seconds of the run without probing."""
        self.settle()
        return self.total - self.probing

    def settle(self) -> None:
        """Wait for the events, if there are any, and add their spans up."""
        for name, began, ended in self._open:
            ended.synchronize()
            setattr(self, name, getattr(self, name) + began.elapsed_time(ended) / 1000)
        self._open.clear()

    def state_dict(self) -> dict[str, float]:
        self.settle()
        return {"total": self.total, "probing": self.probing}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.total, self.probing, self._last = state["total"], state["probing"], None
        self._open.clear()

    def _add(self, name: str, began: Mark, ended: Mark) -> None:
        if isinstance(began, float) and isinstance(ended, float):
            setattr(self, name, getattr(self, name) + ended - began)
        elif not isinstance(began, float) and not isinstance(ended, float):
            self._open.append((name, began, ended))
            if len(self._open) > 1000:
                self.settle()


def _mark(device: torch.device) -> Mark:
    if device.type != "cuda":
        return time.process_time()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event
