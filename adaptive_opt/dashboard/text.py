"""A run as plain text: status, numbers, last events."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Sequence

from adaptive_opt.dashboard.log import entries
from adaptive_opt.dashboard.run import Run
from adaptive_opt.dashboard.status import status
from adaptive_opt.dashboard.words import NOT_MEASURED, number
from adaptive_opt.records import Reading, StepReport

LIGHTS = {"red": "\x1b[41;97m", "amber": "\x1b[43;30m", "green": "\x1b[42;97m", "grey": "\x1b[100;97m"}
NUMBERS = (  # what is shown: label, sign, field, field of its error
    ("kappa", ">= ", "kappa", None),
    ("kappa_effective", "", "kappa_effective", None),
    ("lambda_max", "", "lambda_max", "lambda_max_error"),
    ("lambda_min", "", "lambda_min", "lambda_min_error"),
    ("delta", ">= ", "delta", None),
    ("delta, estimated", "", "delta_estimate", "delta_stderr"),
    ("stability", "", "stability", "stability_error"),
    ("overshoot", "", "overshoot", None),
    ("sharpness score", "", "sharpness_score", None),
    ("Lipschitz, bound", "<= ", "lipschitz_bound", None),
    ("Lipschitz, local", ">= ", "lipschitz_local", "lipschitz_local_error"),
)


def text(run: Run, name: str, columns: int = 80, events: int = 8, colour: bool = False) -> str:
    """One screen. Characters that would steer a terminal are shown as `?`: a log may hold anything."""
    reports = run.reports
    state = status(reports)
    width = max(40, min(columns, 120))
    light = f" {state.light.upper()} "
    shown = f"{LIGHTS[state.light]}{light}\x1b[0m" if colour else f"[{light.strip()}]"
    out = [f"{shown} {_plain(name)}", *_wrapped(state.headline, width)]
    out += [line for a in state.alerts if a.sentence() != state.headline for line in _wrapped(f"- {a.sentence()}", width)]
    if reports:
        out += ["", _facts(run, reports[-1]), "", *_numbers(reports), "", *_layer(reports, width)]
        told = entries(r for r in reports if r.events)
        out += ["", "last events:" if told else "nothing was treated: there was no reason to"]
        out += [line for e in told[-events:] if events for line in _wrapped(f"- step {e.event.step}: {e.words()}", width)]
    return "\n".join([*out, *(_plain(note) for note in run.notes)])


def _facts(run: Run, r: StepReport) -> str:
    age = (
        ""
        if run.tail.written is None or run.until is not None
        else f"  last line {max(0, time.time() - run.tail.written):.0f} s ago"
    )
    cost = 100 * r.probe_cost / (r.step + 1)
    return (
        f"step {r.step}  loss {number(r.loss)}  mode {_plain(r.mode)}  lr {number(r.lr * r.lr_scale)}  "
        f"probing {number(cost)} % of gradient work{age}"
    )


def _numbers(reports: Sequence[StepReport]) -> list[str]:
    """The latest of each number, with its error and the step that it is of."""
    readings = [r.reading for r in reversed(reports) if r.reading is not None]
    out = []
    for label, sign, field, error in NUMBERS:
        r = next((r for r in readings if getattr(r, field) is not None), None)
        value = NOT_MEASURED if r is None else f"{sign}{number(getattr(r, field), getattr(r, error) if error else None)}"
        out.append(f"  {label:<18}{value:<26}{'' if r is None else f'step {r.step}'}".rstrip())
    return out


def _layer(reports: Sequence[StepReport], width: int) -> list[str]:
    r: Reading | None = next((r.reading for r in reversed(reports) if r.reading is not None and r.reading.layers), None)
    if r is None:
        return ["  layers            not measured"]
    worst = max(r.layers, key=lambda layer: layer.distance)
    name = worst.name or "the model itself"
    said = f"layer furthest from 1: {name}, sigma_rms {number(worst.sigma_rms, worst.sigma_rms_error)} (step {r.step})"
    return [f"  {line}" for line in _wrapped(said, width - 2)]


def _wrapped(sentence: str, width: int) -> list[str]:
    return textwrap.wrap(_plain(sentence), width, subsequent_indent="  ") or [""]


def _plain(words: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in words)
