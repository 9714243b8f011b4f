"""Lightning: readings and events of every wrapped optimizer go to the trainer's loggers.

Trainer(callbacks=[LogReadings()]) with a module whose `configure_optimizers` returns
AdaptiveOptimizer(AdamW(self.parameters()), self.net, loss_fn=self.criterion)
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer  # pyright: ignore[reportMissingImports]

from adaptive_opt.integrations.unwrap import wrapper_in
from adaptive_opt.optimizer import AdaptiveOptimizer
from adaptive_opt.telemetry import scalars


class LogReadings(Callback):
    """Logs every reading's numbers, by step of the optimizer; with several wrapped optimizers each under its number.

    Treatments are told by the optimizer itself, to the logger "adaptive_opt".
    """

    def __init__(self) -> None:
        self.seen: dict[int, Any] = {}  # id of the optimizer -> its latest report: the same one is not logged twice

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        wrapped = [o for o in map(_found, trainer.optimizers) if o is not None]
        for n, optimizer in enumerate(wrapped):
            report = optimizer.report
            if report is None or report is self.seen.get(id(optimizer)):
                continue
            self.seen[id(optimizer)] = report
            if report.reading is not None:
                under = "adaptive" if len(wrapped) == 1 else f"adaptive/{n}"
                numbers = {f"{under}/{name}": value for name, value in scalars(report).items()}
                for logger in trainer.loggers:
                    logger.log_metrics(numbers, step=report.step)


def _found(optimizer: Any) -> AdaptiveOptimizer | None:
    try:
        return wrapper_in(optimizer)
    except TypeError:
        return None
