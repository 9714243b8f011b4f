"""LanczosProbe: measures the loss of the present batch and says when to; gives a Reading."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from adaptive_opt.ahead import overshoot_ahead
from adaptive_opt.curvature import BACKENDS, CURVATURES, CannotMeasure, Part, flatten, operator_on
from adaptive_opt.curvature.vectors import norm, total_norm
from adaptive_opt.layers import KINDS, measure_layers, tensors
from adaptive_opt.lipschitz import measure_lipschitz
from adaptive_opt.memory import ProbeMemory
from adaptive_opt.metric import Metric, metric
from adaptive_opt.objective import Objective, ReplayError
from adaptive_opt.parallel import operator_of
from adaptive_opt.records import LayerReading, Reading
from adaptive_opt.schedule import Schedule
from adaptive_opt.spectra import COLD, WARM, Spectra

# Cost of one part in gradient-equivalents of the samples it runs on (an exact product takes 1.4 to 2.2: docs/evidence.md)
FORWARD, GRADIENT, LAYERS = 0.35, 1.0, 7.0  # layers: a gradient, and 1.5 for each of four steps
PRODUCTS = {"exact": 2.2, "exact_rebuilt": 3.6, "finite_difference": 2.0}
NAMES = {"exact_rebuilt": "graphs rebuilt for every product", "finite_difference": "finite differences"}
LIPSCHITZ_STEPS, LIPSCHITZ = 4, 25.0  # the whole and its segments: two graphs, and 1.5 for each product with J or J'
ASIDE = 0.15  # of a reading's cost, for what nothing acts on
LAYER_SAMPLES = 8


@dataclass(frozen=True)
class LanczosProbe(Schedule):
    """Measures curvature by Lanczos, either every N steps or within a share of the training work.

    `LanczosProbe(every=N)` takes a full reading of the whole batch at every N-th step. `LanczosProbe(overhead=0.05)` may
    spend 5 % of the training time; the first readings are financed by the first 500 steps. Within that it looks ahead at
    steps 0, 1, 2, 4, ... 64 and every 70th whether the step is too long (where it cannot look: a cheap reading until step 64),
    takes cheap warm-started readings of lambda_max and stability there and evenly, and full ones as the budget allows or when
    progress stalls, both on `fraction` of the batch and on 16 samples at least. A damped learning rate is followed more
    closely, on credit. `LanczosProbe(overhead=0)` never measures unless `probe_now()` is called.

    The schedule counts in gradient-equivalents. What one of them takes in the run's own steps is its `price`: None measures it
    at steps 128, 256, 512, ... (process time on the CPU, events on CUDA), rounds it up to a power of the root of two, and
    spaces the readings out by it; a number fixes it, and the schedule is a function of the seed alone. So does a trial of a
    mode count in measured time, and with a number in steps.

    num_steps: Lanczos steps of each run in a full reading. tol: if given, stop a run early once both ends of the spectrum
    are known to tol * epsilon (costs a host synchronisation every few steps). delta_tol: eigenvalues below
    -delta_tol * epsilon count as negative. curvature: "hessian", or "gauss_newton" where the model's output is seen. backend:
    None chooses ("exact", "exact_rebuilt" in less memory, "finite_difference"). memory: bytes that kept graphs, and again the
    vectors of a Lanczos run, may take; see `curvature.lanczos_within`. layers: kinds of layers to measure ("weight", "norm",
    "attention", "rnn"). lipschitz: whether full readings measure the whole model's Jacobian norm and its bound; None: where
    that costs at most 15 % of the reading (batches of about 128 and more, or whole batches). Raises ValueError on what makes
    no sense.
    """

    num_steps: int = 10
    tol: float | None = None
    fraction: float = 0.25  # docs/evidence.md: a quarter of the batch is enough for a limit
    delta_tol: float = 0.01
    seed: int = 0
    curvature: str = "hessian"
    backend: str | None = None
    memory: int | None = None
    layers: Sequence[str] = ("weight",)
    lipschitz: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
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
        if self.curvature not in CURVATURES:
            raise ValueError(f"LanczosProbe(curvature={self.curvature!r}): one of {', '.join(CURVATURES)}")
        if self.backend not in (None, *BACKENDS):
            raise ValueError(f"LanczosProbe(backend={self.backend!r}): None, or one of {', '.join(BACKENDS)}")
        if self.memory is not None and self.memory < 1:
            raise ValueError(f"LanczosProbe(memory={self.memory}): bytes, or None for no limit")
        if isinstance(self.layers, str) or not set(self.layers) <= set(KINDS):
            raise ValueError(f"LanczosProbe(layers={self.layers!r}): a tuple of kinds out of {', '.join(KINDS)}")

    @property
    def least(self) -> tuple[float, float]:
        """What a cheap and a full reading cost at least, whatever the batch: a share is rounded to whole samples."""
        f = 0.5 * self.fraction
        product = PRODUCTS[self.backend or "exact"]
        return f * (GRADIENT + (WARM + 1) * product), f * (GRADIENT + (2 * self.num_steps + 1) * product)

    def costs(self, objective: Objective, memory: ProbeMemory, layers: bool) -> tuple[float, float]:
        """Gradient-equivalents of a cheap and of a full reading, before they are taken."""
        whole = memory.whole or self.every is not None
        f = 1.0 if whole else objective.share(self.fraction) or 1.0  # asked at every step: nothing is cut for it
        few = min(1.0, LAYER_SAMPLES / (objective.batch_size or LAYER_SAMPLES))
        product = PRODUCTS[self.backend or "exact"]
        steps = COLD if memory.top is None and memory.last_cheap < 0 else WARM
        cheap, full = f * (GRADIENT + (steps + 1) * product), f * (GRADIENT + (2 * self.num_steps + 1) * product)
        if layers:
            full += few * (LAYERS + LIPSCHITZ * self._measures_lipschitz(few, full))
        return cheap, full + GRADIENT

    def _measures_lipschitz(self, fraction: float, rest: float) -> bool:
        return fraction * LIPSCHITZ <= ASIDE * rest if self.lipschitz is None else self.lipschitz

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
            step=step,
            loss=math.nan,
            grad_norm=math.nan,
            kind=kind,
            batch_size=_samples(target),
            fraction=fraction,
            curvature=self.curvature,
            weight_norm=float(norm(flatten(target.params))),
        )
        m = self._metric(base, target.params, memory, step, notes)  # before the replay, which lends no .grad
        cost = 0.0

        def instead(why: str) -> Reading:
            """The whole batch, from now on."""
            memory.whole = True
            reading = self.measure(objective, base, model, memory, step, kind, layers=layers)
            notes = (f"fraction: {why}, it is measured whole", *reading.notes)
            return replace(reading, cost=reading.cost + cost, notes=notes)

        try:
            draft, cost = self._curvature(target, model, m, memory, draft, fraction, notes)
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
        if layers if layers is not None else kind == "full":
            draft, spent = self._layers(objective, model, memory, replace(draft, cost=cost), notes)
            cost += spent
        return self._agreed(replace(draft, cost=cost), objective, memory, began, notes)

    def measure_layers(self, objective: Objective, model: nn.Module | None, memory: ProbeMemory, step: int) -> Reading:
        """A Reading of kind "layers": theirs alone; loss and gradient norm are those of the user's own pass."""
        began = time.perf_counter()
        notes: list[str] = ["curvature: looks ahead see that the step is not too long"]
        loss, grads = objective.seen_loss(), [p.grad for p in objective.params if p.grad is not None]
        draft = Reading(
            step=step,
            loss=math.nan if loss is None else loss,
            grad_norm=float(total_norm(grads)),
            kind="layers",
            batch_size=_samples(objective),
            curvature=self.curvature,
        )
        draft, cost = self._layers(objective, model, memory, draft, notes)
        return self._agreed(replace(draft, cost=cost), objective, memory, began, notes)

    @staticmethod
    def _agreed(draft: Reading, objective: Objective, memory: ProbeMemory, began: float, notes: list[str]) -> Reading:
        reading = replace(draft, seconds=time.perf_counter() - began, notes=tuple(notes))
        if objective.team.size > 1:
            # one process's word for all: they differ in their time, and in what they drew for layers of different batches
            reading, drawn = objective.team.first((reading, memory.generator.get_state()))
            memory.generator.set_state(drawn)
        return reading

    def look_ahead(self, objective: Objective, base: Optimizer, memory: ProbeMemory, step: int, share: float) -> float | None:
        """Overshoot of the step that `base` is about to take, from one forward pass at `share` of it; None: not to be had."""
        m = self._metric(base, objective.params, memory, step, [], reading=False)
        memory.last_look = step
        if m is None:
            return None
        overshoot, passes = overshoot_ahead(
            objective, m, flatten([p.grad for p in objective.params if p.grad is not None]), share
        )
        memory.spent += passes * FORWARD
        return overshoot

    def _metric(
        self,
        base: Optimizer | None,
        params: Sequence[Tensor],
        memory: ProbeMemory,
        step: int,
        notes: list[str],
        reading: bool = True,
    ) -> Metric | None:
        if base is not None and not base.state:
            memory.began = step
        age = None if memory.began is None else step - memory.began
        m = None if base is None else metric(base, {p: p.grad for p in params if p.grad is not None}, age)
        if m is not None and m.root.numel() == sum(p.numel() for p in params):
            if reading and m.averaged is m.momentum and not m.averages:  # what the steps since the last reading add up to
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
        model: nn.Module | None,
        m: Metric | None,
        memory: ProbeMemory,
        draft: Reading,
        fraction: float,
        notes: list[str],
    ) -> tuple[Reading, float]:
        """The draft with the operator's numbers in it, and what they cost."""
        with target.replay() as evaluate, _outputs(model, self.curvature == "gauss_newton") as outputs:
            losses: dict[int, Tensor] = {}

            def part(i: int, loss_of: Callable[[], Tensor]) -> Part:
                outputs.clear()
                loss = loss_of()
                losses.setdefault(i, loss.detach())  # at the parameters' own values; differences evaluate elsewhere too
                return Part(loss, tuple(outputs))

            parts = [lambda i=i, f=f: part(i, f) for i, f in enumerate(target.parts(evaluate))]

            def numbers(backend: str | None) -> tuple[Reading, float]:
                H, why = operator_of(
                    target.team,
                    lambda backend: operator_on(parts, target.leaves, self.curvature, backend, self.memory),
                    backend,
                    BACKENDS,
                )
                if why is not None:
                    notes.append(f"backend: {NAMES[H.backend]}, because {why}")
                value, size = torch.stack([_sum(losses.values()), norm(H.gradient).cpu().double()]).tolist()
                value = target.team.mean(value)
                found = replace(draft, loss=value, grad_norm=size, backend=H.backend)
                if not math.isfinite(value) or not math.isfinite(size):
                    notes.append("curvature: the loss or its gradient is not finite")
                    return found, fraction * GRADIENT
                spectra = Spectra(self.num_steps, self.tol, self.delta_tol, self.memory, target.team.shares(H.gradient))
                measured = spectra.full if draft.kind == "full" else spectra.cheap
                found = replace(measured(H, m, memory, found, notes), hvps=H.products)
                return found, fraction * (GRADIENT + H.products * PRODUCTS[H.backend])

            try:
                return numbers(self.backend)
            except ReplayError:
                raise
            except (RuntimeError, CannotMeasure) as error:
                why = str(error).partition("\n")[0]
                if isinstance(error, CannotMeasure) or self.backend is not None or self.curvature != "hessian":
                    notes.append(f"curvature: {why}")
                    return draft, fraction * GRADIENT
                # the graph was built, and then an operation had no second derivative after all
                notes.append(f"backend: {NAMES['finite_difference']}, because an exact product failed ({why})")
                return numbers("finite_difference")

    def _layers(
        self, objective: Objective, model: nn.Module | None, memory: ProbeMemory, draft: Reading, notes: list[str]
    ) -> tuple[Reading, float]:
        if model is None:
            notes.append("layers, lipschitz: no model was given")
            return draft, 0.0
        share = LAYER_SAMPLES / (objective.batch_size or LAYER_SAMPLES)
        target, fraction = self._piece(objective, memory, share, least=LAYER_SAMPLES)
        measured: tuple[LayerReading, ...] = ()
        skipped: tuple[str, ...] = ()
        try:
            with target.replay() as evaluate:
                measured, skipped = measure_layers(model, evaluate, memory.generator, kinds=self.layers, team=target.team)
        except Exception as error:
            why, cost = str(error).partition("\n")[0], fraction * GRADIENT
            if target is not objective:  # a cut input may not be what the model expects
                memory.whole = True
                found, spent = self._layers(objective, model, memory, draft, notes)
                memory.whole = bool(found.layers)
                if found.layers:
                    notes.insert(0, f"fraction: the batch cannot be cut ({why}), it is measured whole")
                return found, cost + spent
            if not isinstance(error, RuntimeError):
                raise
            notes.append(f"layers, lipschitz: not measured ({why})")  # a checkpointed block will not have its input watched
            return draft, cost
        notes.extend(f"layers: {layer}" for layer in skipped)
        if not measured and not skipped:
            notes.append("layers: the model has no layer of these kinds that the replay calls")
        draft, cost = replace(draft, layers=measured), fraction * LAYERS
        if draft.kind != "full" or not self._measures_lipschitz(fraction, draft.cost):
            return draft, cost
        try:
            with target.replay() as evaluate:
                found = measure_lipschitz(model, evaluate, memory.generator, LIPSCHITZ_STEPS, target.team)
        except (RuntimeError, FloatingPointError) as error:
            notes.append(f"lipschitz: not measured ({str(error).partition(chr(10))[0]})")
            return draft, cost + fraction * GRADIENT
        if found.note:
            notes.append(f"lipschitz: {found.note}")
        draft = replace(
            draft,
            lipschitz_bound=found.bound,
            lipschitz_local=found.local,
            lipschitz_local_error=found.local_error,
        )
        return draft, cost + fraction * LIPSCHITZ

    @staticmethod
    def _piece(objective: Objective, memory: ProbeMemory, fraction: float, least: int = 16) -> tuple[Objective, float]:
        """The first samples of the batch and their true share, or the whole where it cannot be cut."""
        cut = None if memory.whole else objective.part(fraction, least)
        if not objective.team.all(cut is not None) or cut is None:
            return objective, 1.0
        return cut[0], objective.team.mean(cut[1])


@contextmanager
def _outputs(model: nn.Module | None, wanted: bool) -> Iterator[list[Tensor]]:
    """The floating tensors that the model gives while this is open; the list is the caller's to clear."""
    found: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        found.extend(tensors(output))

    if model is None or not wanted:
        yield found
        return
    hook = model.register_forward_hook(keep)
    try:
        yield found
    finally:
        hook.remove()


def _samples(objective: Objective) -> int | None:
    """Of all processes together."""
    return round(objective.team.mean(objective.batch_size or 0)) or None


def _sum(losses: Iterable[Tensor]) -> Tensor:
    return torch.stack([loss.cpu().double() for loss in losses]).sum()
