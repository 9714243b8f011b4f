"""What of a StepReport is a number, by the name under which every tracker shows it."""

from __future__ import annotations

from adaptive_opt.records import StepReport

NUMBERS = (
    "kappa",
    "kappa_effective",
    "epsilon",
    "delta",
    "lambda_max",
    "lambda_min",
    "stability",
    "overshoot",
    "trace",
)


def scalars(report: StepReport) -> dict[str, float]:
    """Loss and effective learning rate, and a reading's numbers when there is one; what is unknown is left out."""
    found = {} if report.loss is None else {"train/loss": report.loss}
    found["train/lr_effective"] = report.lr * report.lr_scale
    if report.lr_limit is not None:
        found["train/lr_limit"] = report.lr_limit
    if report.reading is not None:
        for name in NUMBERS:
            value = getattr(report.reading, name)
            if value is not None:
                found[f"reading/{name}"] = value
        found |= {f"sigma_rms/{layer.name}": layer.sigma_rms for layer in report.reading.layers}
    return found
