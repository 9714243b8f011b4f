"""The loop of every step: measure, diagnose, decide, act, verify. Read after records.py and before optimizer.py."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from adaptive_opt import verify
from adaptive_opt.capture import Ambient, Capture, device_of
from adaptive_opt.diagnosis import diagnose
from adaptive_opt.interventions import Applied, Damp, Patient, Rollback, Snapshot
from adaptive_opt.modes import Mode, StepContext
from adaptive_opt.modes.base import overridden
from adaptive_opt.objective import CapturedBatch, Closure, GivenLoss, Objective, ReplayError, agreement
from adaptive_opt.policy import Policy
from adaptive_opt.probe import FORWARD, GRADIENT, LanczosProbe, ProbeMemory
from adaptive_opt.records import (
    Decision,
    Diagnosis,
    Event,
    History,
    LayerReading,
    Reading,
    StepReport,
    Trend,
)
from adaptive_opt.signals import Signals

SAMPLE_EVERY = 10  # steps between looks at a loss that nothing else shows (objective= without a closure)


@dataclass
class Trial:
    """A treatment waiting for its verdict."""

    name: str
    event: Event
    until: int  # step of the verdict
    level: float | None  # the loss before
    losses_before: list[float]
    before: Snapshot | None  # the way back
    displacement: bool = False  # judged by the loss with and without it on the next batch


class Controller:
    """Runs the loop around a base optimizer. The optimizer gives it the batch; it gives back a StepReport."""

    def __init__(
        self,
        base: Optimizer,
        model: nn.Module | None,
        capture: Capture | None,
        objective: Callable[[], Tensor] | None,
        probe: LanczosProbe,
        policy: Policy,
        modes: Mapping[str, Mode],
        interventions: Mapping[str, Any],
        validate: Callable[[], float] | None,
    ):
        self.base, self.model, self.capture, self.given = base, model, capture, objective
        self.probe, self.policy, self.validate = probe, policy, validate
        self.modes, self.interventions = dict(modes), dict(interventions)
        self.memory = ProbeMemory(torch.Generator().manual_seed(probe.seed))
        self.signals = Signals()
        self.steps = 0
        self.mode, self.mode_since = "base", 0
        self.mode_is_treatment = False  # entered because something was wrong, not because a baseline says so
        self.trial: Trial | None = None
        self.not_before: dict[str, int] = {}
        self.failures: dict[str, int] = {}
        self.kappas: list[float] = []
        self.first_layers: tuple[LayerReading, ...] | None = None
        self.trusted: bool | None = None  # None: not compared yet
        self.distrust = ""
        self.scaled_loss = 0.0  # a gradient scaler's factor on the sum of the captured weights; 0: there is none
        self.clip_norm: float | None = None
        self.treatment_cost = 0.0
        self.alarm = False  # something was just undone: look again as soon as possible
        self.reading: Reading | None = None
        self.diagnosis: Diagnosis | None = None
        self.buffers: dict[str, Tensor] = {}

    # ---- one step -----------------------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None, ambient: Ambient | None, loss: Any) -> StepReport:
        """Everything that happens between the gradients and the next batch."""
        events: list[Event] = []
        ctx = self._context(closure, ambient)
        trend = self._trend(ctx, loss)
        reading: Reading | None = None
        decision: Decision | None = None
        sick = not trend.finite or trend.spike
        taken_back = not sick and self._verdict(ctx, trend, events)  # the gradients belong to where it was: skip them
        if not sick and not taken_back:
            reading = self._measure(ctx, trend, events)
        diagnosis = diagnose(trend, reading, self.kappas, self.first_layers)
        if reading is not None and reading.layers and self.first_layers is None:
            self.first_layers = reading.layers
        self._follow(reading, events, trend)
        stepped = False
        if not taken_back:
            decision = self.policy.decide(diagnosis, self._history())
            applied = self._act(decision, diagnosis, trend, reading, ctx, events)
            self._switch(decision, ctx, trend, events)
            if applied is None:
                self._keep(trend)
                with (
                    overridden(self.base.param_groups, lr=lambda lr: lr * self.lr_scale)
                    if self.lr_scale != 1
                    else _nothing()
                ):
                    self.modes[self.mode].step(ctx)
                stepped = True
                self._good(trend)
        self.treatment_cost += ctx.cost
        report = self._report(trend, reading, diagnosis, decision, events, stepped)
        self.steps += 1
        self.reading, self.diagnosis = reading or self.reading, diagnosis
        self.forget_batch()
        return report

    def pass_on(self) -> StepReport:
        """The step of a wrapper that has nothing to look at and nothing to do: the base's own."""
        self.base.step()
        self.forget_batch()
        self.steps += 1
        return StepReport(self.steps - 1, None, None, float(self.base.param_groups[0]["lr"]), 1.0, "base", stepped=True)

    @property
    def lr_scale(self) -> float:
        """What the effective learning rate is of the user's."""
        return math.prod(getattr(i, "scale", 1.0) for i in self.interventions.values())

    @property
    def passive(self) -> bool:
        """Nothing is measured by itself and nothing is ever done: the wrapper need not even look."""
        return (
            self.probe.idle
            and getattr(self.policy, "mode", None) == "base"
            and not getattr(self.policy, "interventions", True)
        )

    # ---- measure ------------------------------------------------------------------------------------------------

    def _trend(self, ctx: StepContext, loss: Any) -> Trend:
        """The free signals, with one synchronisation of the host."""
        grads = [p.grad for p in self._all_params() if p.grad is not None]
        grads = [g.coalesce().values() if g.is_sparse else g for g in grads]
        norm = torch.nn.utils.get_total_norm(grads) if grads else torch.zeros(())
        value = loss if loss is not None else self.capture.loss() if self.capture is not None else None
        if (
            value is None
            and self.given is not None
            and self.trusted
            and self.steps % SAMPLE_EVERY == 0
            and ctx.objective
        ):
            value = ctx.objective.loss()
            self.memory.spent += FORWARD
        if isinstance(value, Tensor):
            value, size = torch.stack([value.detach().reshape(-1)[0].float().to(norm.device), norm.float()]).tolist()
        else:
            value, size = None if value is None else float(value), float(norm)
        return self.signals.judge(self.steps, value, size)

    def _measure(self, ctx: StepContext, trend: Trend, events: list[Event]) -> Reading | None:
        """A reading, if the schedule wants one and the replay can be trusted."""
        if ctx.objective is None or self.trusted is False:
            return None
        layers = len(self.first_layers or ()) if self.first_layers is not None else int(self.model is not None)
        cheap, full = self.probe.costs(ctx.objective, layers)
        kind = self.probe.due(trend, self.memory, cheap, full, watchful=self.lr_scale < 1, alarm=self.alarm)
        self.alarm = False
        if kind is None:
            return None
        try:
            if (kind == "full" or self.trusted is None) and not self._gate(ctx, events):
                return None
            reading = self.probe.measure(
                ctx.objective,
                self.base,
                self.model,
                self.memory,
                self.steps,
                kind,
                layers=kind == "full" or self.first_layers is None,
            )
        except Exception as error:
            self._distrust(f"the batch could not be evaluated again: {_first_line(error)}", events)
            return None
        self._account(reading, kind)
        return self._with_notes(reading)

    def probe_now(self, ctx: StepContext) -> Reading:
        """A full reading of the whole present batch, off schedule. Raises ReplayError when there is nothing to replay."""
        if ctx.objective is None:
            raise ReplayError(f"probe_now(): {self._why_no_objective()}")
        reading = self.probe.measure(ctx.objective, self.base, self.model, self.memory, self.steps, "full", whole=True)
        self.memory.spent += reading.cost
        self.reading = self._with_notes(reading)
        return self.reading

    def _with_notes(self, reading: Reading) -> Reading:
        left_out = self._unmeasured()
        return replace(reading, notes=(*reading.notes, f"not measured: {left_out}")) if left_out else reading

    def _account(self, reading: Reading, kind: str) -> None:
        self.memory.spent += reading.cost
        self.memory.last_cheap = self.steps
        if kind == "full":
            self.memory.last_full = self.steps
        if reading.kappa_effective is not None:
            self.kappas = [*self.kappas[-2:], reading.kappa_effective]

    def _gate(self, ctx: StepContext, events: list[Event]) -> bool:
        """The trust gate: does a replay reproduce the gradient that the user's backward left?"""
        assert ctx.objective is not None
        ctx.objective.loss_scale = self._loss_scale()
        replayed = ctx.objective.gradient()
        self.memory.spent += GRADIENT
        cosine, ratio = agreement(replayed, [p.grad for p in ctx.objective.params])
        if math.isnan(cosine):
            return False  # this batch is sick: it proves nothing
        low = any(p.dtype not in (torch.float32, torch.float64) for p in ctx.objective.params) or self._autocast()
        if cosine < (0.99 if low else 0.999):
            self._distrust(
                f"the replayed gradient does not reproduce the one that backward left (cosine {cosine:.4f}): "
                f"{ctx.objective.source.cause}",
                events,
            )
            return False
        captured = self._captured_scale()
        if not self.scaled_loss and captured >= 2 and ratio >= 8:
            # A gradient scaler multiplied the loss and has divided the gradients already? It does so by powers of two.
            if _power_of_two(ratio):  # also where the loss is a sum, or weighted by sample
                self.scaled_loss = ratio / captured
            elif _power_of_two(captured) and ratio >= 0.99 * captured:  # and the user clips
                self.scaled_loss = 1.0
            ctx.objective.loss_scale = self._loss_scale()
            ratio /= ctx.objective.loss_scale
        self.clip_norm = self._grad_norm(ctx) if ratio > 1.01 else None
        ctx.objective.clip_norm = self.clip_norm
        self.trusted = True
        return True

    def _distrust(self, why: str, events: list[Event]) -> None:
        self.trusted, self.distrust = False, why
        message = f"adaptive_opt measures and treats no longer what needs a replay: {why}"
        warnings.warn(message, UserWarning, stacklevel=5)
        events.append(Event(self.steps, "gate", why, "switched off what needs a replay", "done"))

    # ---- decide and act -----------------------------------------------------------------------------------------

    def _history(self) -> History:
        return History(
            step=self.steps,
            mode=self.mode,
            mode_since=self.mode_since,
            trial=None if self.trial is None else self.trial.name,
            not_before=dict(self.not_before),
            kappas=tuple(self.kappas),
            can_replay=self.trusted is True,
            can_validate=self.validate is not None,
        )

    def _act(
        self,
        decision: Decision,
        diagnosis: Diagnosis,
        trend: Trend,
        reading: Reading | None,
        ctx: StepContext,
        events: list[Event],
    ) -> Applied | None:
        """The interventions decided on; returns what stands in for this step, if anything does."""
        patient = Patient(ctx, trend, reading, self.memory.bottom, self.model)
        instead: Applied | None = None
        for name, why in zip(decision.interventions, decision.reasons, strict=True):
            if name not in self.interventions or instead is not None:
                continue
            applied: Applied | None = self.interventions[name].apply(patient)
            if applied is None:
                if name not in ("damp", "rollback"):
                    self._wait(name)
                    events.append(Event(self.steps, name, why, "found nothing that helps", "done"))
                continue
            event = Event(self.steps, name, why, applied.done, applied.outcome, applied.result)
            events.append(event)
            if applied.trial:
                self._start_trial(name, event, applied, trend)
            if applied.skip:
                self._restore_buffers()
                if applied.trial:
                    self.signals.forget()
                    self.alarm = True
            if applied.skip or applied.step_taken:
                instead = applied
            if applied.trial and name != "damp":
                self._moved(name, ctx, events)
        return instead

    def _moved(self, name: str, ctx: StepContext, events: list[Event]) -> None:
        """The parameters jumped: damp's averages are of another place, and a mode that broke the run is out."""
        damp = self.interventions.get("damp")
        if isinstance(damp, Damp):
            damp.moved = True
        if name == "rollback" and self.mode_is_treatment:
            self.modes[self.mode].exit(ctx)
            events.append(
                Event(self.steps, self.mode, "the run broke in this mode", f"back from {self.mode} to base", "reverted")
            )
            self._wait(self.mode)
            self.mode, self.mode_since, self.mode_is_treatment = "base", self.steps, False

    def _start_trial(self, name: str, event: Event, applied: Applied, trend: Trend) -> None:
        level = trend.usual_loss if trend.usual_loss is not None else trend.loss
        if self.trial is None or name == "rollback":
            self.trial = Trial(
                name,
                event,
                self.steps + applied.trial,
                level,
                self.signals.losses[-50:],
                applied.before,
                name == "escape",
            )

    def _switch(self, decision: Decision, ctx: StepContext, trend: Trend, events: list[Event]) -> None:
        """Into another mode, with a snapshot to come back to when the policy expects something of it."""
        wanted = decision.mode
        if wanted == self.mode or wanted not in self.modes:
            return
        if self.modes[wanted].needs_replay and not (self.trusted or self._first_look(ctx, events)):
            return
        self.modes[self.mode].exit(ctx)
        self.modes[wanted].enter(ctx)
        event = Event(
            self.steps, wanted, decision.reason or "the policy says so", f"switched from {self.mode} to {wanted}"
        )
        if decision.expects is not None and wanted != "base":
            before = Snapshot.take(self.steps, self.base)
            level = self._validation() if wanted == "sam" and self.validate is not None else trend.usual_loss
            self.trial = Trial(wanted, event, self.steps + 50, level, self.signals.losses[-50:], before)
            events.append(event)
        else:
            events.append(replace(event, outcome="done"))
        self.mode, self.mode_since, self.mode_is_treatment = (
            wanted,
            self.steps,
            self.trial is not None and self.trial.name == wanted,
        )

    def _first_look(self, ctx: StepContext, events: list[Event]) -> bool:
        """A mode that replays is wanted before anything was measured: ask the gate first."""
        if ctx.objective is None or self.trusted is False:
            return False
        try:
            return self._gate(ctx, events)
        except Exception as error:
            self._distrust(f"the batch could not be evaluated again: {_first_line(error)}", events)
            return False

    def _follow(self, reading: Reading | None, events: list[Event], trend: Trend) -> None:
        """A damped step follows each reading of the limit."""
        damp = self.interventions.get("damp")
        if isinstance(damp, Damp) and reading is not None and damp.follow(reading):
            seen = f"the user's step is at {reading.stability:.3g} of its stability limit again"
            if self.trial is not None and self.trial.name == "damp":
                self.trial = None
            events.append(Event(self.steps, "damp", seen, "let go of the learning rate", "done"))

    # ---- verify -------------------------------------------------------------------------------------------------

    def _verdict(self, ctx: StepContext, trend: Trend, events: list[Event]) -> bool:
        """Judge what is on trial when its time has come. True: it was taken back and this batch's gradients are void."""
        trial = self.trial
        if trial is None or self.steps < trial.until:
            return False
        self.trial = None
        since = [*self.signals.losses, *([trend.loss] if trend.loss is not None else [])][
            -(self.steps - trial.event.step) or None :
        ]
        if trial.displacement:
            kept, result = self._with_and_without(trial, ctx)
        elif trial.name == "sam" and self.validate is not None:
            kept, result = verify.lower_level(trial.level, [self._validation() or math.nan])
            result = result.replace("loss", "validation loss")
        elif trial.name in self.modes:
            kept, result = verify.faster_progress(trial.losses_before, since)
        else:
            kept, result = verify.lower_level(trial.level, since)
        if trial.name == "rollback":
            kept = True  # there is nothing better to go back to
        if trial.name == "damp":
            damp = self.interventions["damp"]
            if not kept and damp.press_on():
                result += f"; holding at {damp.scale:.3g} now"
                self.trial = replace(trial, until=self.steps + damp.trial)
            kept = True  # the step above the limit is no better
        events.append(replace(trial.event, outcome="kept" if kept else "reverted", result=result))
        if kept:
            self.failures.pop(trial.name, None)
            return False
        self._wait(trial.name)
        return self._take_back(trial, ctx)

    def _take_back(self, trial: Trial, ctx: StepContext) -> bool:
        """Out of a mode; back to the snapshot if the loss is worse than it was there."""
        if trial.name in self.modes:
            self.modes[self.mode].exit(ctx)
            self.mode, self.mode_since, self.mode_is_treatment = "base", self.steps, False
            now = self.signals.losses[-10:]
            if trial.level is not None and now and sorted(now)[len(now) // 2] <= trial.level:
                return False  # the loss did fall: only the mode goes
        if trial.before is None:
            return False
        trial.before.restore(self.base)
        self._restore_buffers()
        return True

    def _with_and_without(self, trial: Trial, ctx: StepContext) -> verify.Verdict:
        """The next batch's loss where the treatment led, and where the parameters were before it."""
        if ctx.objective is None or trial.before is None:
            return True, "no batch to compare on"
        with_it = ctx.objective.loss()
        here = [p.detach().clone() for p in ctx.objective.params]
        old = dict(zip(map(id, self._all_params()), trial.before.params, strict=True))
        try:
            with torch.no_grad():
                for p in ctx.objective.params:
                    p.copy_(old[id(p)])
            without = ctx.objective.loss()
        finally:
            with torch.no_grad():
                for p, h in zip(ctx.objective.params, here, strict=True):
                    p.copy_(h)
        ctx.cost += 2 * FORWARD
        return with_it < without, f"next batch's loss {without:.6g} without, {with_it:.6g} with it"

    def _wait(self, name: str) -> None:
        """The same treatment is not tried again before twice as long as last time."""
        self.failures[name] = self.failures.get(name, 0) + 1
        self.not_before[name] = self.steps + 100 * 2 ** min(self.failures[name] - 1, 10)

    def _validation(self) -> float | None:
        if self.validate is None:
            return None
        with torch.no_grad():
            return float(self.validate())

    # ---- the rim ------------------------------------------------------------------------------------------------

    def _context(self, closure: Callable[[], Any] | None, ambient: Ambient | None) -> StepContext:
        chosen = self._measurable()
        params = [p for _, p in chosen]
        objective = self._objective(closure, ambient, params) if self.trusted is not False and params else None
        return StepContext(self.base, params, [i for i, _ in chosen], objective)

    def _measurable(self) -> list[tuple[int, Tensor]]:
        """Dense, real parameters with a gradient, and their positions among all."""
        everything = enumerate(self._all_params())
        return [(i, p) for i, p in everything if p.grad is not None and _plain(p) and not p.grad.is_sparse]

    def _objective(
        self, closure: Callable[[], Any] | None, ambient: Ambient | None, params: list[Tensor]
    ) -> Objective | None:
        calls = self.capture.step_calls() if self.capture is not None else []
        modules = self.capture.modules if self.capture is not None else []
        if self.given is not None:
            seen = self.capture.calls[0].ambient if self.capture is not None and self.capture.calls else None
            source: Any = GivenLoss(self.given, modules, seen)
        elif calls and not any(c.refusal for c in calls):
            assert self.capture is not None
            source = CapturedBatch(self.capture, [c for c in calls if c.weighted])
        elif closure is not None:
            source = Closure(closure, modules, ambient)
        else:
            return None
        objective = Objective(source, params, self.capture)
        objective.clip_norm = self.clip_norm
        objective.loss_scale = self._loss_scale()
        return objective

    def _why_no_objective(self) -> str:
        if self.trusted is False:
            return self.distrust
        refusals = [c.refusal for c in self.capture.calls if c.refusal] if self.capture is not None else []
        if self.capture is not None and (refusals or self.capture.problem):
            return refusals[0] if refusals else str(self.capture.problem)
        if not any(p.grad is not None for p in self._all_params()):
            return "no parameter has a gradient: run backward on a batch first"
        if not self._measurable():
            return f"no parameter has a dense, real gradient ({self._unmeasured()})"
        return (
            "there is no way to evaluate the loss again: give AdaptiveOptimizer model= and loss_fn= (a Module), a model with "
            "output.loss, objective=, or step(closure)"
        )

    def without_replay(self, closure: bool = False) -> str | None:
        """Why this step's loss cannot be evaluated again, or None."""
        if self.trusted is False:
            return None  # said already
        if any(p.grad is not None for p in self._all_params()) and not self._measurable():
            return self._why_no_objective()
        if closure:
            return None
        calls = self.capture.step_calls() if self.capture is not None else []
        if self.given is not None or (any(c.weighted for c in calls) and not any(c.refusal for c in calls)):
            return None
        return self._why_no_objective()

    def _keep(self, trend: Trend) -> None:
        rollback = self.interventions.get("rollback")
        if isinstance(rollback, Rollback) and self._may("rollback"):
            rollback.keep(self.steps, trend, self.base)

    def _good(self, trend: Trend) -> None:
        self.signals.remember(trend)
        rollback = self.interventions.get("rollback")
        if isinstance(rollback, Rollback) and self._may("rollback"):
            rollback.good_step()
            self._keep_buffers()

    def _may(self, name: str) -> bool:
        """Whether the policy could ever ask for it: baselines pay for no snapshots."""
        allowed = getattr(self.policy, "interventions", None)
        return allowed is None or name in allowed

    def _keep_buffers(self) -> None:
        """Running statistics as they are after a good batch: a broken one poisons them in its forward pass."""
        for name, buffer in self._statistics():
            if name in self.buffers:
                self.buffers[name].copy_(buffer)
            else:
                self.buffers[name] = buffer.detach().clone()

    def _restore_buffers(self) -> None:
        with torch.no_grad():
            for name, buffer in self._statistics():
                if name in self.buffers:
                    buffer.copy_(self.buffers[name])

    def _statistics(self) -> Iterator[tuple[str, Tensor]]:
        if self.model is not None:
            for name, module in self.model.named_modules():
                if module._buffers.get("running_mean") is not None:
                    yield from ((f"{name}.{k}", b) for k, b in module._buffers.items() if b is not None)

    def _report(
        self,
        trend: Trend,
        reading: Reading | None,
        diagnosis: Diagnosis,
        decision: Decision | None,
        events: list[Event],
        stepped: bool,
    ) -> StepReport:
        return StepReport(
            step=self.steps,
            loss=trend.loss,
            grad_norm=trend.grad_norm,
            lr=float(self.base.param_groups[0]["lr"]),
            lr_scale=self.lr_scale,
            mode=self.mode,
            stepped=stepped,
            reading=reading,
            diagnosis=diagnosis,
            decision=decision,
            events=tuple(events),
            probe_cost=self.memory.spent,
            treatment_cost=self.treatment_cost,
        )

    def forget_batch(self) -> None:
        if self.capture is not None:
            self.capture.forget_used()
            if self.given is not None or self.capture.problem:
                self.capture.calls.clear()

    def _all_params(self) -> list[Tensor]:
        return [p for group in self.base.param_groups for p in group["params"]]

    def _captured_scale(self) -> float:
        """Sum of the weights that backward gave the captured losses: 1, or what a gradient scaler multiplied by."""
        calls = self.capture.step_calls() if self.capture is not None else []
        weights = [r.weight for c in calls for r in c.losses if r.weight is not None]
        return float(torch.stack([w.float().sum() for w in weights]).sum()) if weights else 1.0

    def _loss_scale(self) -> float:
        return (self._captured_scale() * self.scaled_loss or 1.0) if self.scaled_loss else 1.0

    def _unmeasured(self) -> str:
        """The parameters with a gradient that no reading covers, in words; empty when there are none."""
        grads = [(p, p.grad) for p in self._all_params() if p.grad is not None]
        sparse, odd = sum(g.is_sparse for _, g in grads), sum(not p.is_floating_point() for p, _ in grads)
        parts = [f"{sparse} with sparse gradients"] * bool(sparse) + [f"{odd} with complex values"] * bool(odd)
        return f"{' and '.join(parts)} of {len(grads)} parameters" if parts else ""

    def _autocast(self) -> bool:
        calls = self.capture.calls if self.capture is not None else []
        device = device_of(self.model) if self.model is not None else torch.device("cpu")
        return any(c.ambient.autocast[1] for c in calls) or torch.is_autocast_enabled(device.type)

    @staticmethod
    def _grad_norm(ctx: StepContext) -> float:
        return float(torch.nn.utils.get_total_norm([p.grad for p in ctx.params if p.grad is not None]))

    # ---- checkpoint: plain types and tensors only -----------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that a run needs to go on bit for bit, beside the base optimizer's own state."""
        trial = self.trial
        return {
            "version": 1,
            "steps": self.steps,
            "mode": self.mode,
            "mode_since": self.mode_since,
            "mode_is_treatment": self.mode_is_treatment,
            "not_before": dict(self.not_before),
            "failures": dict(self.failures),
            "kappas": list(self.kappas),
            "first_layers": None if self.first_layers is None else [asdict(layer) for layer in self.first_layers],
            "trusted": self.trusted,
            "distrust": self.distrust,
            "scaled_loss": self.scaled_loss,
            "clip_norm": self.clip_norm,
            "treatment_cost": self.treatment_cost,
            "alarm": self.alarm,
            "probe": self.memory.state_dict(),
            "signals": self.signals.state_dict(),
            "modes": {name: mode.state_dict() for name, mode in self.modes.items()},
            "interventions": {name: i.state_dict() for name, i in self.interventions.items()},
            "buffers": dict(self.buffers),
            "trial": None
            if trial is None
            else {
                **{k: v for k, v in vars(trial).items() if k not in ("event", "before")},
                "event": asdict(trial.event),
                "before": None if trial.before is None else trial.before.state_dict(),
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a checkpoint; tensors are put where the parameters are."""
        device = self._all_params()[0].device
        state = _on(state, device)
        for name in (
            "steps",
            "mode",
            "mode_since",
            "mode_is_treatment",
            "trusted",
            "distrust",
            "scaled_loss",
            "clip_norm",
            "treatment_cost",
            "alarm",
        ):
            setattr(self, name, state[name])
        self.not_before, self.failures = dict(state["not_before"]), dict(state["failures"])
        self.kappas, self.buffers = list(state["kappas"]), dict(state["buffers"])
        layers = state["first_layers"]
        self.first_layers = None if layers is None else tuple(LayerReading(**layer) for layer in layers)
        self.memory.load_state_dict(state["probe"])
        self.signals.load_state_dict(state["signals"])
        for name, mode in self.modes.items():
            if name in state["modes"]:
                mode.load_state_dict(state["modes"][name])
        for name, intervention in self.interventions.items():
            if name in state["interventions"]:
                intervention.load_state_dict(state["interventions"][name])
        trial = state["trial"]
        self.trial = (
            None
            if trial is None
            else Trial(
                **{**trial, "event": Event(**trial["event"]), "before": Snapshot.from_state_dict(trial["before"])}
            )
        )


def _power_of_two(x: float) -> bool:
    return abs(math.log2(x) - round(math.log2(x))) < 1e-4


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


def _plain(p: Tensor) -> bool:
    return p.requires_grad and p.is_floating_point()


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def _on(tree: Any, device: torch.device) -> Any:
    """A copy of nested plain containers with every tensor but RNG states on the device."""
    if isinstance(tree, Tensor):
        return tree.detach().clone() if tree.dtype == torch.uint8 else tree.detach().clone().to(device)
    if isinstance(tree, Mapping):
        return {k: _on(v, device) for k, v in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(_on(v, device) for v in tree)
    return tree
