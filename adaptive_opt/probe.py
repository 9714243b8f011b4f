"""LanczosProbe: measures the loss of the present batch and says when to; gives a Reading."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from adaptive_opt.curvature import (
    FiniteDifferenceHessian,
    Hessian,
    Spectrum,
    condition_number_bound,
    count_below,
    effective_condition_number,
    ends,
    estimate_below,
    flatten,
    lanczos,
    scaled,
    trace_estimate,
)
from adaptive_opt.layers import measure_layers
from adaptive_opt.metric import Metric, metric
from adaptive_opt.objective import Objective
from adaptive_opt.records import LayerReading, Reading, Trend

# Cost of one part in gradient-equivalents of the samples it runs on (an exact product takes 1.4 to 2.2: docs/evidence.md)
FORWARD, GRADIENT, PRODUCT, LAYERS = 0.35, 1.0, 2.2, 7.0  # layers: a gradient, and 1.5 for each of four Lanczos steps
FINANCED = 500  # steps: the first readings are paid for by the budget of this many steps
LAYER_SAMPLES = 8


@dataclass
class ProbeMemory:
    """What the probe remembers between readings; everything here goes into the checkpoint."""

    generator: torch.Generator
    top: Tensor | None = None  # (n,) Ritz vector of the largest eigenvalue in the optimizer's metric
    bottom: Tensor | None = None  # (n,) Ritz vector of the most negative eigenvalue of H, from the latest full reading
    spent: float = 0.0  # gradient-equivalents
    anchor: Tensor | None = None  # (n,) parameters at the latest reading
    whole: bool = False  # the batch cannot be cut
    last_cheap: int = -1
    last_full: int = -1

    def state_dict(self) -> dict[str, Any]:
        return {
            "generator": self.generator.get_state(),
            "top": self.top,
            "bottom": self.bottom,
            "anchor": self.anchor,
            "spent": self.spent,
            "whole": self.whole,
            "last_cheap": self.last_cheap,
            "last_full": self.last_full,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["generator"].cpu())
        self.top, self.bottom, self.anchor = state["top"], state["bottom"], state["anchor"]
        self.spent, self.whole = state["spent"], state["whole"]
        self.last_cheap, self.last_full = state["last_cheap"], state["last_full"]


@dataclass(frozen=True)
class LanczosProbe:
    """Measures curvature by Lanczos, either every N steps or within a share of the training work.

    `LanczosProbe(every=N)` takes a full reading of the whole batch at every N-th step. `LanczosProbe(overhead=0.05)` may
    spend 5 % of the gradient work, counted in gradient-equivalents, not in seconds, so that a run is reproducible; the first
    readings are financed by the first 500 steps. Within that it takes cheap warm-started readings of the stability at steps
    0, 1, 2, 4, ... 64 and evenly after that, and full ones as the budget allows or when progress stalls, both on `fraction`
    of the batch and on 16 samples at least: with small batches the budget ends before step 64. A damped learning rate is
    followed more closely, on credit. `LanczosProbe(overhead=0)` never measures unless `probe_now()` is called.

    num_steps: Lanczos steps of each run in a full reading. tol: if given, stop a run early once both ends of the spectrum
    are known to tol * epsilon (costs a host synchronisation every four steps). delta_tol: eigenvalues below
    -delta_tol * epsilon count as negative. Raises ValueError on numbers that make no sense.
    """

    every: int | None = None
    overhead: float | None = None
    num_steps: int = 10
    tol: float | None = None
    fraction: float = 0.25  # docs/evidence.md: a quarter of the batch is enough for a limit
    delta_tol: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        if self.every is not None and self.overhead is not None:
            raise ValueError(f"LanczosProbe(every={self.every}, overhead={self.overhead}): give one of the two")
        if self.every is None and self.overhead is None:
            object.__setattr__(self, "overhead", 0.05)
        if self.every is not None and (not isinstance(self.every, int) or self.every < 1):
            raise ValueError(f"LanczosProbe(every={self.every!r}): a whole number of steps, 1 or more")
        if self.overhead is not None and not 0 <= self.overhead <= 10:
            raise ValueError(f"LanczosProbe(overhead={self.overhead!r}): a share of the training work, for example 0.05")
        if not isinstance(self.num_steps, int) or self.num_steps < 3:
            raise ValueError(
                f"LanczosProbe(num_steps={self.num_steps}): a whole number, 3 at least, or no bound means anything"
            )
        if self.delta_tol < 0 or (self.tol is not None and not self.tol > 0):
            raise ValueError(
                f"LanczosProbe(tol={self.tol}, delta_tol={self.delta_tol}): tol above 0 or None, delta_tol 0 or more"
            )
        if not 0 < self.fraction <= 1:
            raise ValueError(f"LanczosProbe(fraction={self.fraction}): a share of the batch in (0, 1]")

    @property
    def idle(self) -> bool:
        """Never measures by itself."""
        return self.every is None and self.overhead == 0

    def due(
        self,
        trend: Trend,
        memory: ProbeMemory,
        cheap_cost: float,
        full_cost: float,
        watchful: bool = False,
        alarm: bool = False,
    ) -> str | None:
        """What to take in this step, "full", "cheap" or None: deterministic, from counts and costs alone.

        `watchful`: a treatment follows the readings; the whole budget goes into them. `alarm`: look now.
        """
        step = trend.step
        if self.every is not None:
            return "full" if step % self.every == 0 else None
        if not self.overhead:
            return None
        allowance = self.overhead * max(step, FINANCED)
        if (
            trend.stalled
            and step - memory.last_full >= 50
            and memory.spent + full_cost <= self.overhead * (step + 2 * FINANCED)
        ):
            return "full"  # an alarm may borrow from the steps to come
        if memory.spent + full_cost <= allowance and (step - memory.last_full) * self.overhead >= 2 * full_cost:
            return "full"
        if alarm and memory.spent + cheap_cost <= self.overhead * (step + 2 * FINANCED):
            return "cheap"
        if watchful and (step - memory.last_cheap) * self.overhead >= cheap_cost:
            return "cheap" if memory.spent + cheap_cost <= self.overhead * (step + FINANCED) else None
        early = step <= 64 and (step & (step - 1)) == 0  # 0, 1, 2, 4, ... 64
        late = (step - memory.last_cheap) * self.overhead >= 2 * cheap_cost  # half of the budget
        return "cheap" if (early or late) and memory.spent + cheap_cost <= allowance else None

    def costs(self, objective: Objective, memory: ProbeMemory, layers: bool) -> tuple[float, float]:
        """Gradient-equivalents of a cheap and of a full reading, before they are taken."""
        whole = memory.whole or self.every is not None
        f = 1.0 if whole else objective.share(self.fraction) or 1.0  # asked at every step: nothing is cut for it
        few = min(1.0, LAYER_SAMPLES / (objective.batch_size or LAYER_SAMPLES))
        of_layers = few * LAYERS if layers else 0.0
        cheap = f * (GRADIENT + 4 * PRODUCT)
        return cheap, f * (GRADIENT + (2 * self.num_steps + 1) * PRODUCT) + of_layers + GRADIENT

    def measure(
        self,
        objective: Objective,
        base: Optimizer | None,
        model: nn.Module | None,
        memory: ProbeMemory,
        step: int,
        kind: str = "full",
        whole: bool = False,
        layers: bool | None = None,
    ) -> Reading:
        """A Reading of the objective at the parameters' present values. `whole`: on the whole batch.

        What cannot be measured is None in it and named in `notes`; nothing of the training state changes. The
        parameters' `.grad` must be those of the step to come: the optimizer's metric is that step's.
        """
        began = time.perf_counter()
        notes: list[str] = []
        whole = whole or self.every is not None
        target, fraction = (objective, 1.0) if whole else self._piece(objective, memory, self.fraction)
        draft = Reading(
            step=step, loss=math.nan, grad_norm=math.nan, kind=kind, batch_size=target.batch_size, fraction=fraction
        )
        m = self._metric(base, target.params, memory, notes)  # before the replay, which lends no .grad
        cost = 0.0

        def instead(why: str) -> Reading:
            """The whole batch, from now on."""
            memory.whole = True
            reading = self.measure(objective, base, model, memory, step, kind, layers=layers)
            notes = (f"fraction: {why}, it is measured whole", *reading.notes)
            return replace(reading, cost=reading.cost + cost, notes=notes)

        try:
            draft, cost = self._curvature(target, m, memory, draft, fraction, notes)
        except FloatingPointError as error:
            notes.append(f"curvature: {error}")
        except Exception as error:  # a cut input was not what the model expects: position ids, an adjacency matrix
            if target is objective:
                raise
            return instead(f"the batch cannot be cut ({str(error).partition(chr(10))[0]})")
        seen = objective.seen_loss() if target is not objective and memory.last_cheap < 0 else None
        if seen is not None and 0 < draft.loss < seen * math.sqrt(fraction):
            # A mean over fewer samples is about the same, a sum is smaller: then fewer samples are no sample of it.
            return instead(f"a part of the batch has the loss {draft.loss:.3g} of {seen:.3g}")
        measured: tuple[LayerReading, ...] = ()
        if layers if layers is not None else kind == "full":
            measured, spent = self._layers(objective, model, memory, notes)
            cost += spent
        return replace(draft, layers=measured, cost=cost, seconds=time.perf_counter() - began, notes=tuple(notes))

    def _metric(self, base: Optimizer | None, params: Sequence[Tensor], memory: ProbeMemory, notes: list[str]) -> Metric | None:
        m = None if base is None else metric(base, {p: p.grad for p in params if p.grad is not None})
        if m is not None and m.root.numel() == sum(p.numel() for p in params):
            if m.averaged is m.momentum and not m.averages:  # what the steps since the last reading add up to
                here = flatten(params)
                if memory.anchor is not None and memory.anchor.shape == here.shape:
                    m = replace(m, averaged=(memory.anchor - here) / m.root.clamp_min(torch.finfo(here.dtype).tiny))
                memory.anchor = here
            return m
        unknown = (
            "the coming step is not an optimizer's own"
            if base is None
            else f"the coming step of {type(base).__name__} is not known"
        )
        notes.append(f"stability, kappa_effective: {unknown}")
        return None

    def _curvature(
        self,
        target: Objective,
        m: Metric | None,
        memory: ProbeMemory,
        draft: Reading,
        fraction: float,
        notes: list[str],
    ) -> tuple[Reading, float]:
        with target.replay() as evaluate:
            loss = evaluate()
            try:
                return self._spectra(Hessian(loss, target.params), loss, m, memory, draft, fraction)
            except RuntimeError as error:  # torch's word for: no second derivative here, or no memory for its graph
                notes.append(f"backend: finite differences, because an exact product failed ({str(error).splitlines()[0]})")
            operator = FiniteDifferenceHessian(lambda: flatten(target.gradient()), target.params)
            return self._spectra(operator, loss, m, memory, draft, fraction)

    def _spectra(
        self,
        operator: Hessian | FiniteDifferenceHessian,
        loss: Tensor,
        m: Metric | None,
        memory: ProbeMemory,
        draft: Reading,
        fraction: float,
    ) -> tuple[Reading, float]:
        value, size = torch.stack([loss.detach().cpu().double(), operator.gradient.norm().cpu().double()]).tolist()
        draft = replace(draft, loss=value, grad_norm=size, backend=operator.backend)
        if not math.isfinite(value) or not math.isfinite(size):
            raise FloatingPointError("the loss or its gradient is not finite")
        if draft.kind == "full":
            draft = self._full(operator, m, memory, draft)
        elif m is not None:
            A = scaled(operator, m.root)
            spectrum = self._run(A, self._warm(m, memory), 3 if memory.top is not None else 6)
            draft = replace(
                self._stability(draft, spectrum, m, memory), overshoot=_overshoot(m, operator.gradient, A(m.momentum))
            )
        price = PRODUCT if operator.backend == "exact" else 2 * GRADIENT
        return replace(draft, hvps=operator.products), fraction * (GRADIENT + operator.products * price)

    def _full(
        self, operator: Hessian | FiniteDifferenceHessian, m: Metric | None, memory: ProbeMemory, draft: Reading
    ) -> Reading:
        h = self._run(operator, self._random(operator.gradient, memory), self.num_steps)
        memory.bottom = h.ritz_vector(0) if h.ritz_values[0] < 0 else None
        epsilon = h.epsilon
        threshold = -self.delta_tol * epsilon
        trace, trace_stderr = trace_estimate([h])
        estimate, stderr = estimate_below([h], threshold)
        draft = replace(
            draft,
            epsilon=epsilon,
            kappa=_number(condition_number_bound(h)),
            delta=count_below(h, threshold),
            delta_tol=self.delta_tol,
            delta_estimate=estimate,
            delta_stderr=stderr,
            lambda_max=float(h.ritz_values[-1]),
            lambda_max_error=float(h.residuals[-1]),
            lambda_min=float(h.ritz_values[0]),
            lambda_min_error=float(h.residuals[0]),
            trace=trace,
            trace_stderr=trace_stderr,
            ritz_values=tuple(h.ritz_values.tolist()),
            ritz_weights=tuple(h.weights.tolist()),
        )
        if m is None or not bool(m.root.any()):
            return draft
        start = m.averaged if bool(m.averaged.any()) else self._random(m.averaged, memory)
        a = self._run(scaled(operator, m.root), start, self.num_steps)
        return replace(
            self._stability(draft, a, m, memory),
            kappa_effective=_number(effective_condition_number(a)),
            overshoot=_overshoot(m, operator.gradient, scaled(operator, m.root)(m.momentum)),
        )

    def _stability(self, draft: Reading, spectrum: Spectrum, m: Metric, memory: ProbeMemory) -> Reading:
        top = spectrum.ritz_vector(-1)
        if bool(torch.isfinite(top).all()):
            memory.top = top
        stability = max(float(spectrum.ritz_values[-1]), 0.0) / m.limit
        return replace(
            draft,
            stability=stability,
            stability_error=float(spectrum.residuals[-1]) / m.limit,
            sharpness_score=100 * min(1.0, stability),
        )

    def _layers(
        self, objective: Objective, model: nn.Module | None, memory: ProbeMemory, notes: list[str]
    ) -> tuple[tuple[LayerReading, ...], float]:
        if model is None:
            notes.append("layers: no model was given")
            return (), 0.0
        share = LAYER_SAMPLES / (objective.batch_size or LAYER_SAMPLES)
        target, fraction = self._piece(objective, memory, share, least=LAYER_SAMPLES)
        try:
            with target.replay() as evaluate:
                measured, skipped = measure_layers(model, evaluate, memory.generator)
        except RuntimeError as error:  # a checkpointed block will not have its input watched
            notes.append(f"layers: not measured ({str(error).splitlines()[0]})")
            return (), fraction * GRADIENT
        notes.extend(f"layers: {layer}" for layer in skipped)
        if not measured and not skipped:
            notes.append("layers: the model has no linear or convolutional layer that the replay calls")
        return measured, fraction * LAYERS

    def _run(self, matvec: Any, start: Tensor, num_steps: int) -> Spectrum:
        return lanczos(matvec, start, num_steps, until=None if self.tol is None else ends(self.tol))

    def _warm(self, m: Metric, memory: ProbeMemory) -> Tensor:
        if memory.top is not None and memory.top.shape == m.root.shape:
            return memory.top.to(m.root)
        start = self._random(m.root, memory)
        if bool(m.momentum.any()):  # the step's own direction sees its sharpest direction early
            start = start / start.norm() + m.momentum / m.momentum.norm()
        return start

    def _random(self, like: Tensor, memory: ProbeMemory) -> Tensor:
        v = torch.randn(like.numel(), generator=memory.generator, dtype=torch.float32)
        return v.to(device=like.device, dtype=like.dtype)

    @staticmethod
    def _piece(objective: Objective, memory: ProbeMemory, fraction: float, least: int = 16) -> tuple[Objective, float]:
        """The first samples of the batch and their true share, or the whole where it cannot be cut."""
        cut = None if memory.whole else objective.part(fraction, least)
        return (objective, 1.0) if cut is None else cut


def _overshoot(m: Metric, g: Tensor, Am: Tensor) -> float | None:
    """(d'Hd / 2) / |g'd| for the coming step d = -root * momentum; None when d does not descend here, or curves down."""
    descent, curvature = torch.stack([torch.dot(g, m.root * m.momentum), torch.dot(m.momentum, Am)]).cpu().tolist()
    return curvature / (2 * descent) if descent > 0 and curvature > 0 else None


def _number(x: float) -> float | None:
    return x if np.isfinite(x) else None
