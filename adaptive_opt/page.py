"""A Reading as one page of text for the terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from adaptive_opt.records import LayerReading, Reading
from adaptive_opt.verdict import Verdict

WIDTH = 100
LAYERS = 40  # rows at the most; the others are counted


def page(r: Reading, v: Verdict, title: str) -> str:
    """The verdict first, then every number with its bound, then what was not measured and why."""
    lines = [title, "=" * min(len(title), WIDTH)]
    for sentence in v.sentences:
        lines += textwrap.wrap(sentence, WIDTH, subsequent_indent="  ")
    lines += ["", *_numbers(r)]
    if r.layers:
        lines += ["", *_layers(r.layers, v.layer)]
    lines += ["", *_how(r)]
    for note in r.notes:
        lines += textwrap.wrap(f"- {note}", WIDTH, initial_indent="  ", subsequent_indent="    ")
    return "\n".join(lines) + "\n"


def _numbers(r: Reading) -> Iterator[str]:
    yield _row("loss", _g(r.loss), f"gradient norm {_g(r.grad_norm)}")
    yield _row("lambda_max", _pm(r.lambda_max, r.lambda_max_error), _none_beyond("above", r.lambda_max_outer))
    yield _row("lambda_min", _pm(r.lambda_min, r.lambda_min_error), _none_beyond("below", r.lambda_min_outer))
    yield _row("epsilon", _at_least(r.epsilon), "largest eigenvalue magnitude")
    yield _row("kappa", _at_least(r.kappa), "condition number; a bound that grows with the number of steps")
    below = "" if r.epsilon is None or r.delta_tol is None else f"eigenvalues below {-r.delta_tol * r.epsilon:.2g}"
    estimate = "" if r.delta_estimate is None else f"; estimated {_pm(r.delta_estimate, r.delta_stderr)}"
    yield _row("delta", _at_least(r.delta), below + estimate)
    yield _row("trace", _pm(r.trace, r.trace_stderr), "sum of all eigenvalues")
    yield _row("Lipschitz", _pm(r.lipschitz_local, r.lipschitz_local_error), f"on the batch; bound {_g(r.lipschitz_bound)}")


def _layers(layers: tuple[LayerReading, ...], worrying: str | None) -> Iterator[str]:
    width = max(len("layer"), *(len(layer.name) for layer in layers[:LAYERS]))
    yield f"  {'layer':<{width}}  {'sigma_min':>10}  {'sigma_rms':>10}  {'sigma_max':>10}  {'gain':>10}"
    for layer in layers[:LAYERS]:
        sigmas = (layer.sigma_min, layer.sigma_rms, layer.sigma_max, layer.gain)
        mark = "  <- worries" if layer.name == worrying else ""
        yield f"  {layer.name:<{width}}  " + "  ".join(f"{_g(x):>10}" for x in sigmas) + mark
    if len(layers) > LAYERS:
        yield f"  and {len(layers) - LAYERS} more (all of them are in the JSON)"


def _how(r: Reading) -> Iterator[str]:
    of = "the Hessian" if r.curvature == "hessian" else "the Gauss-Newton matrix"
    samples = "one batch" if r.batch_size is None else f"{r.batch_size} sample{'' if r.batch_size == 1 else 's'}"
    yield f"Measured {of} of the mean loss of {samples}: {r.hvps} products ({r.backend}, {r.method}), {r.seconds:.2g} s."
    if r.notes:
        yield "What was not measured, or not as usual:"


def _row(name: str, value: str, remark: str) -> str:
    return f"  {name:<12}{value:<22}{remark}".rstrip()


def _g(x: float | None) -> str:
    return "not measured" if x is None else f"{x:.4g}"


def _pm(x: float | None, error: float | None) -> str:
    return _g(x) if x is None or error is None else f"{x:.4g} +- {error:.1g}"


def _at_least(x: float | None) -> str:
    return _g(x) if x is None else f">= {x:.4g}"


def _none_beyond(side: str, x: float | None) -> str:
    return f"too few steps to say that none lies {side}" if x is None else f"none {side} {x:.4g}, with probability 0.99"
