"""Keeping a run of any length in bounded memory: even thinning, so that what is kept is spread over the whole run."""

from __future__ import annotations

from collections import deque

from adaptive_opt.records import StepReport


class Even:
    """Every k-th of what came, k doubling whenever there are more than `count` or they take more than `size` bytes."""

    def __init__(self, count: int, size: int):
        self.count, self.size = count, size
        self.kept: list[tuple[StepReport, int]] = []
        self.bytes = 0
        self.stride = 1
        self._seen = 0

    def add(self, report: StepReport, size: int) -> None:
        if self._seen % self.stride == 0:
            self.kept.append((report, size))
            self.bytes += size
        self._seen += 1
        while len(self.kept) > self.count or (self.bytes > self.size and len(self.kept) > 1):
            self.kept = self.kept[::2]
            self.bytes = sum(size for _, size in self.kept)
            self.stride *= 2

    def drop_from(self, step: int) -> None:
        while self.kept and self.kept[-1][0].step >= step:
            self.bytes -= self.kept.pop()[1]

    def reports(self) -> list[StepReport]:
        return [report for report, _ in self.kept]


class Latest:
    """The last `count`, in at most `size` bytes."""

    def __init__(self, count: int, size: int):
        self.count, self.size = count, size
        self.kept: deque[tuple[StepReport, int]] = deque()
        self.bytes = 0
        self.dropped = 0

    def add(self, report: StepReport, size: int) -> None:
        self.kept.append((report, size))
        self.bytes += size
        while len(self.kept) > self.count or (self.bytes > self.size and len(self.kept) > 1):
            self.bytes -= self.kept.popleft()[1]
            self.dropped += 1

    def drop_from(self, step: int) -> None:
        while self.kept and self.kept[-1][0].step >= step:
            self.bytes -= self.kept.pop()[1]

    def reports(self) -> list[StepReport]:
        return [report for report, _ in self.kept]


class Extremes:
    """Of every bucket of steps the one with the lowest and the one with the highest loss: no peak is lost by thinning."""

    def __init__(self, buckets: int):
        self.most = buckets
        self.buckets: list[tuple[StepReport, StepReport]] = []  # lowest, highest
        self.width = 1  # reports a bucket
        self._filled = 0  # reports in the last bucket

    def add(self, report: StepReport) -> None:
        if self._filled == 0 or not self.buckets:
            self.buckets.append((report, report))
        else:
            self.buckets[-1] = _merged(self.buckets[-1], (report, report))
        self._filled = (self._filled + 1) % self.width
        if len(self.buckets) > self.most and self._filled == 0:
            pairs = zip(self.buckets[::2], self.buckets[1::2], strict=False)
            odd = [self.buckets[-1]] if len(self.buckets) % 2 else []
            self.buckets = [_merged(a, b) for a, b in pairs] + odd
            self._filled = self.width if odd else 0
            self.width *= 2

    def drop_from(self, step: int) -> None:
        while self.buckets and max(r.step for r in self.buckets[-1]) >= step:
            self.buckets.pop()
            self._filled = 0

    def reports(self) -> list[StepReport]:
        return sorted({r.step: r for bucket in self.buckets for r in bucket}.values(), key=lambda r: r.step)


def _merged(a: tuple[StepReport, StepReport], b: tuple[StepReport, StepReport]) -> tuple[StepReport, StepReport]:
    known = [r for r in (*a, *b) if r.loss is not None]
    if not known:
        return a[0], b[1]
    return min(known, key=lambda r: r.loss or 0.0), max(known, key=lambda r: r.loss or 0.0)
