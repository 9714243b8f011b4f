"""What is seen, done and come of it, one line each, on the terminal."""

from __future__ import annotations

from collections.abc import Callable

from adaptive_opt.records import StepReport


class ConsoleSink:
    """Prints the events of each step, and with `every=N` a line of numbers every N steps. `write` may be tqdm.write."""

    def __init__(self, every: int | None = None, write: Callable[[str], object] = print):
        if every is not None and every < 1:
            raise ValueError(f"ConsoleSink(every={every}): a number of steps, 1 or more, or None for events only")
        self.every, self.write = every, write

    def __call__(self, report: StepReport) -> None:
        for event in report.events:
            self.write(event.sentence())
        if self.every is not None and report.step % self.every == 0:
            self.write(line(report))


def line(report: StepReport) -> str:
    """The step's numbers in one line; what is unknown is left out."""
    parts = [f"step {report.step}", f"mode {report.mode}", f"lr {report.lr * report.lr_scale:.3g}"]
    r = report.reading
    for name, value in (
        ("loss", report.loss),
        ("|g|", report.grad_norm),
        ("stability", r and r.stability),
        ("kappa_eff", r and r.kappa_effective),
        ("epsilon", r and r.epsilon),
        ("delta", r and r.delta),
    ):
        if value is not None:
            parts.append(f"{name} {value:.3g}")
    return "  ".join(parts)
