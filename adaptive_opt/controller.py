"""The loop of every step: measure, diagnose, decide, act, verify. Read after records.py and before optimizer.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from adaptive_opt import checkpoint, verify
from adaptive_opt.agreement import WINDOW, Agreement
from adaptive_opt.capture import Ambient, Capture
from adaptive_opt.curvature.vectors import on_host, total_norm
from adaptive_opt.diagnosis import diagnose
from adaptive_opt.gate import Gate
from adaptive_opt.interventions import Applied, AutoStep, Damp, Patient, Rollback, RunningStatistics, Snapshot
from adaptive_opt.interventions.base import copied
from adaptive_opt.interventions.statistics import STANDS_OUT
from adaptive_opt.layers import with_drift
from adaptive_opt.length import StepLength
from adaptive_opt.memory import ProbeMemory
from adaptive_opt.modes import Mode, StepContext, all_params
from adaptive_opt.modes.base import overridden
from adaptive_opt.notice import warn
from adaptive_opt.objective import Objective, ReplayError
from adaptive_opt.parallel import ALONE, ProcessLost, Team
from adaptive_opt.policy import Policy
from adaptive_opt.probe import FORWARD, GRADIENT, LanczosProbe
from adaptive_opt.records import LEARNT, Decision, Event, History, LayerReading, Look, Outlier, Reading, StepReport, Trend
from adaptive_opt.signals import TAIL, Signals
from adaptive_opt.stays import Stays
from adaptive_opt.validation import Validation
from adaptive_opt.verify import FEWEST, MORE, Trial, Verdict

SAMPLE_EVERY = (
    10  # steps at first, and steps between later looks at a loss that nothing else shows (objective= without a closure)
)
SAMPLE_TRIED = 2  # while a mode is on trial: the verdict needs FEWEST of MODE_TRIAL steps
BEFORE = 100  # losses that a trial of a mode may be compared with
MODE_TRIAL = 25  # steps that a mode is given to show its gain, and again as long as it is not slower
LOOKS = 3  # at the validation loss in a trial that it decides
TRUST_MODE, TRUST_READING = 100, 200  # steps after which a mode that replays, or a reading, asks the gate again
FRESH = 10  # steps for which a reading still speaks of the steps that follow it
GLANCE = 0.1  # of the coming step: at the end of a whole one a loss that grows linearly hides how far it is too long
OVERSHOOTS = 2.0  # by a glance: then a reading is asked for; docs/evidence.md, "looks ahead"
COOL_DOWN, MODE_COOL_DOWN = 100, 400  # steps before a treatment, or a mode, that was taken back may be tried again;
# doubled each time


class Controller:
    """Runs the loop around a base optimizer. The optimizer gives it the batch; it gives back a StepReport."""

    def __init__(
        self,
        base: Optimizer,
        probe: LanczosProbe,
        policy: Policy,
        modes: Mapping[str, Mode],
        interventions: Mapping[str, Any],
        validate: Callable[[], float] | None,
    ):
        self.base, self.probe, self.policy, self.validate = base, probe, policy, validate
        self.modes, self.interventions = dict(modes), dict(interventions)
        self.validation = Validation(reproducible=probe.price is not None or probe.every is not None)
        self.all_validate = True  # every process that trains with this one has a `validate` too
        self.gate = Gate(base)
        automatic = any(isinstance(i, AutoStep) for i in self.interventions.values())  # of coordinates that must stay
        fitting = (n for n, m in self.modes.items() if m.refuses(base) is None and not (automatic and self._starts_over(n)))
        self.available = frozenset({*fitting, *self.interventions})
        self.memory = ProbeMemory(torch.Generator().manual_seed(probe.seed))
        self.signals = Signals()
        self.statistics = RunningStatistics()
        self.stays = Stays()
        self.agreement = Agreement()
        self.steps = 0
        self.mode, self.mode_since = "base", 0
        self.mode_is_treatment = False  # entered because something was wrong, not because a baseline says so
        self.length: StepLength | None = None  # of a mode that is on as a treatment and steps by a rule of its own
        self.trial: Trial | None = None
        self.not_before: dict[str, int] = {}  # treatment -> first step at which it may be tried again
        self.failures: dict[str, int] = {}
        self.kappas: list[float] = []  # the last three effective condition numbers
        self.first_layers: tuple[LayerReading, ...] | None = None
        self.treatment_cost = 0.0  # gradient-equivalents
        self.said_untreated = False
        self.last_trust = -TRUST_READING  # step at which the gate was last asked
        self.alarm = False  # something was just undone: look again as soon as possible
        self._still: tuple[Any, Any, bool] = (None, None, False)  # policy, probe, whether they never do anything
        self.reading: Reading | None = None
        self.limit: tuple[float, int] | None = None  # effective learning rate at the stability limit, and when it was read

    def listen(self, model: nn.Module | None, capture: Capture | None, objective: Callable[[], Tensor] | None) -> None:
        """Where the batches come from."""
        self.gate.model, self.gate.capture, self.gate.given = model, capture, objective
        self.statistics.attach(model if self.rollback is not None else None)
        self._listen()

    def deaf(self) -> None:
        """No mode hears a model any more."""
        for mode in self.modes.values():
            mode.listen(None, self.base)

    def _listen(self) -> None:
        """Only the mode that is on hears the model's layers."""
        for name, mode in self.modes.items():
            mode.listen(self.gate.model if name == self.mode else None, self.base)

    # ---- one step -----------------------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None, ambient: Ambient | None, loss: Any) -> StepReport:
        """Everything that happens between the gradients and the next batch."""
        events: list[Event] = []
        ctx = self.gate.context(self.modes[self.mode], closure, ambient)
        if self.damp is not None:
            self.damp.see(self._largest_lr)
        trend = self._compared(self._trend(ctx, loss, events), ctx, events)
        sick = not trend.finite or trend.spike or trend.outlier is not None  # this batch proves nothing
        taken_back = not sick and self._verdict(ctx, trend, events)  # then its gradients belong to where we are no more
        reading = None if sick or taken_back else self._measure(ctx, trend, events)
        if reading is None and not sick and not taken_back:
            self._look_ahead(ctx, trend, events)
        fresh = self.reading is not None and self.steps - self.reading.step <= FRESH
        recent = self.reading if fresh else None
        looks = self._look(ctx, sick or taken_back, events)
        if not sick and not taken_back:
            self._agrees(ctx)
        diagnosis = diagnose(trend, reading, self.kappas, self.first_layers, recent, looks)
        self._remember(reading, events)
        decision, instead = None, taken_back
        if not taken_back:
            patient = Patient(ctx, trend, reading, recent, self.memory.bottom, self.memory.below, self.gate.model)
            for _ in range(2):  # again where a mode has nothing to do: it waits now, and the rest of the diagnosis has its turn
                decision = self.policy.decide(diagnosis, self._history())
                self._say_untreated(trend, decision, events)
                decided_in = self.mode
                instead = self._act(decision, patient, events)
                if instead or self.mode != decided_in:  # what was thrown out does not come back by the same decision
                    break
                if self._switch(decision, ctx, trend, events) or decision.interventions:
                    break
            instead = instead or ctx.moved is not None
        if not instead:
            self._take_step(ctx, trend, events)
        self.treatment_cost += ctx.cost
        if not instead:
            self.stays.remember(self.steps, self.mode, trend.loss, self.treatment_cost)
        report = StepReport(
            step=self.steps,
            loss=trend.loss,
            grad_norm=trend.grad_norm,
            lr=float(self.base.param_groups[0]["lr"]),
            lr_scale=self.lr_scale,
            mode=self.mode,
            stepped=not instead,
            reading=reading,
            diagnosis=diagnosis,
            decision=decision,
            events=tuple(events),
            probe_cost=self.memory.spent,
            treatment_cost=self.treatment_cost,
            lr_limit=None if self.limit is None else self.limit[0],
            lr_limit_age=None if self.limit is None else self.steps - self.limit[1],
            validation=looks[-1].validation if looks else None,
        )
        self.steps += 1
        self.gate.forget()
        if self.validate is not None:
            self.validation.clock.tick(self._device)
        if self.probe.keep_time(self.steps, self.memory, self._device) and not ctx.short:
            self.memory.price = self.team.first(self.memory.price)  # each process measured its own time
        return report

    def pass_on(self, count: bool = True) -> partial[StepReport]:
        """The mode's own step, where there is nothing to look at or nothing to change. Returns what makes its report."""
        step, lr = self.steps, float(self.base.param_groups[0]["lr"])
        if self.mode == "base":
            self.base.step()
        else:
            with torch.no_grad():
                self.modes[self.mode].step(self.gate.context(self.modes[self.mode]))
        self.gate.forget()
        self.steps = step + count
        return partial(StepReport, step, None, None, lr, self.lr_scale, self.mode, True)

    @property
    def passive(self) -> bool:
        """Nothing is measured by itself and nothing is ever done: the wrapper need not even look."""
        policy, probe, still = self._still
        if policy is not self.policy or probe is not self.probe:
            baseline = getattr(self.policy, "mode", None) == "base" and not getattr(self.policy, "interventions", True)
            still = baseline and self.probe.idle
            self._still = (self.policy, self.probe, still)
        return still and self.mode == "base" and self.lr_scale == 1

    @property
    def team(self) -> Team:
        """The processes that decide together; who never decides anything need not ask the others."""
        return ALONE if self.passive else self.gate.team

    @property
    def _device(self) -> torch.device:
        """Of the first parameter."""
        return next(p for group in self.base.param_groups for p in group["params"]).device

    @property
    def _largest_lr(self) -> float:
        """The user's, over the param groups."""
        return max(float(group["lr"]) for group in self.base.param_groups)

    @property
    def lr_scale(self) -> float:
        """What the effective learning rate is of the user's."""
        scale = 1.0
        for intervention in self.interventions.values():
            scale *= getattr(intervention, "scale", 1.0)
        return scale if self.length is None else scale * self.length.scale

    @property
    def _held(self) -> float:
        """The share that damp leaves of the user's step; an automatic one holds nothing back."""
        damp = self.damp
        return 1.0 if damp is None or damp.looks else min(damp.scale, 1.0)

    @property
    def _nats(self) -> float | None:
        """The level of a mean cross-entropy; None where the loss is nothing of the kind, or too new."""
        recent = self.signals.nats[-FEWEST:]
        return median(recent) if len(recent) == FEWEST else None

    @property
    def _validates(self) -> bool:
        """There is a validation loss, on every process."""
        return self.validate is not None and self.all_validate

    @property
    def _training(self) -> float:
        """Seconds that the run's own steps have taken: readings and looks at the validation loss are left out."""
        return self.memory.clock.training - self.validation.clock.probing

    @property
    def _watchful(self) -> bool:
        """Something holds the step short and has to be followed closely, and can be."""
        if not self.modes[self.mode].steps_as_base:
            return False
        return any(getattr(i, "watched", getattr(i, "scale", 1.0) < 1) for i in self.interventions.values())

    @property
    def damp(self) -> Damp | None:
        """The damp among the interventions, which follows every reading and every step."""
        found = self.interventions.get("damp")
        return found if isinstance(found, Damp) else None

    @property
    def rollback(self) -> Rollback | None:
        """The rollback among the interventions, if the policy may use it: baselines pay for no snapshots."""
        found = self.interventions.get("rollback")
        allowed = "rollback" in getattr(self.policy, "interventions", ("rollback",))
        return found if allowed and isinstance(found, Rollback) else None

    def _take_step(self, ctx: StepContext, trend: Trend, events: list[Event]) -> None:
        ctx.mode = self.modes[self.mode]
        if ctx.mode.needs_replay and self.steps - self.last_trust >= TRUST_MODE and not self._trust(ctx, events):
            ctx.objective = None
        rollback = self.rollback
        if rollback is not None:
            rollback.keep(self.steps, trend, ctx)
            done = rollback.hold(self.steps, trend, ctx)
            if done is not None:
                seen = "a signal that keeps its size over a long sequence meets cliffs"
                events.append(Event(self.steps, "spectral", seen, done, "done"))
        watched = nullcontext() if self.length is None else self.length.watching(ctx.params, ctx.indices)
        with watched, self._at_scale():  # in this order: watching sets the scale
            ctx.mode.step(ctx)
        self._failed(ctx, events)
        self.signals.remember(trend)
        if self.damp is not None:
            self.damp.good_step()
        if rollback is not None:
            rollback.good_step()
            self.statistics.keep()

    def _at_scale(self) -> AbstractContextManager[None]:
        scale = self.lr_scale
        return nullcontext() if scale == 1 else overridden(self.base.param_groups, lr=lambda lr: lr * scale)

    # ---- measure ------------------------------------------------------------------------------------------------

    def _trend(self, ctx: StepContext, loss: Any, events: list[Event]) -> Trend:
        """The free signals, with one synchronisation of the host."""
        moments, rollback = None, self.rollback
        if rollback is not None:
            self.statistics.attach(self.gate.model)  # the policy may be another than it was
            moments = self.statistics.look()
        value, nats = loss if loss is not None else self.gate.loss(), self.gate.nats()
        numbers = [total_norm(ctx.given)]
        numbers += [value.detach().reshape(-1)[:1]] if isinstance(value, Tensor) else []
        numbers += [nats.reshape(1)] if nats is not None else []
        numbers += [moments] if moments is not None else []
        (size, *_), *rest = on_host(numbers)
        value = rest.pop(0)[0] if isinstance(value, Tensor) else None if value is None else float(value)
        nats = rest.pop(0)[0] if nats is not None else math.inf
        poison = self.statistics.judge(self.steps, rest[0]) if moments is not None else None
        value, size, poison, nats = self._agree(ctx, value, size, poison, nats)
        unseen = value is None and self.gate.given is not None and self.gate.trusted
        tried = self.trial is not None and self.trial.name in self.modes
        due = self.steps < SAMPLE_EVERY or self.steps % (SAMPLE_TRIED if tried else SAMPLE_EVERY) == 0
        if unseen and due and ctx.objective is not None:
            self.memory.spent += FORWARD
            try:
                value = ctx.objective.loss()
            except Exception as error:
                ctx.failure = error
                self._failed(ctx, events)
        trend = self.signals.judge(self.steps, value, size, self._largest_lr, self._held, nats)
        if rollback is not None and rollback.cliffs:
            trend = replace(trend, rising=False)
        return replace(trend, poison=poison) if poison is not None and trend.finite and not trend.spike else trend

    def _compared(self, trend: Trend, ctx: StepContext, events: list[Event]) -> Trend:
        """The trend, and whether one of the first batches was broken, which only the others show."""
        rollback, good = self.rollback, trend.finite and not trend.spike
        if rollback is None or rollback.latest is None or rollback.first.losses is None or not good or ctx.short:
            return trend
        if self.probe.idle or not (self.gate.trusted or self._trust(ctx, events)):
            return trend
        found = rollback.first.look(self.steps, ctx, rollback.latest)
        self._failed(ctx, events)
        return trend if found is None else replace(trend, outlier=found)

    def _agree(
        self, ctx: StepContext, loss: float | None, grad_norm: float, poison: Outlier | None, nats: float
    ) -> tuple[float | None, float, Outlier | None, float]:
        """What the processes of a team know of this step, as one: the mean loss, and what all can do. One collective."""
        team = self.team
        if team.size == 1:
            return loss, grad_norm, poison, nats
        able, judge = ctx.objective is not None, self.validate is not None
        costs = self._costs(ctx.objective) if ctx.objective is not None else (0.0, 0.0)
        bad = 0.0 if poison is None else poison.factor
        mine = [1.0, able, judge, loss is not None, loss or 0.0, grad_norm, *costs, bad, nats]
        here, able, judge, seen, *sums = team.sums(mine)
        self.all_validate = judge == team.size
        ctx.short = here < team.size
        ctx.costs = (sums[2] / here, sums[3] / here)
        if ctx.short:
            ctx.team = ALONE
        if able < here or ctx.short:
            ctx.objective = None
        if sums[4] > 0 and poison is None:  # another process has seen it
            poison = Outlier(self.steps, sums[4], STANDS_OUT)
        return sums[0] / seen if seen else None, sums[1] / here, poison, sums[5] / here

    def shadow(self) -> None:
        """The part of a step in which a process that has no batch left must join in, so that the others need not wait."""
        if self.team.size > 1:
            self.team.sums([0.0] * 10)

    def _costs(self, objective: Objective) -> tuple[float, float]:
        layers = self.gate.model is not None and self.first_layers != ()  # () after a reading that found none
        return self.probe.costs(objective, self.memory, layers)

    def _measure(self, ctx: StepContext, trend: Trend, events: list[Event]) -> Reading | None:
        """A reading, if the schedule or a look ahead wants one and the replay can be trusted."""
        if ctx.objective is None:
            return None
        alarm, self.alarm = self.alarm, False
        ahead = self._glances(ctx, trend)
        kind = self._due(ctx, trend, alarm, ahead)
        if kind is None and self.damp is not None and self.damp.asks(self.steps):
            kind = "cheap"
        if kind is None and ahead and (alarm or self.probe.glances(self.steps, self.memory, FORWARD)):
            kind = self._glance(ctx, trend, events)
        stale = kind == "full" or self.gate.trusted is None or self.steps - self.last_trust >= TRUST_READING
        if kind is None or (stale and not self._trust(ctx, events)):
            return None
        layers_too = kind != "cheap" or self.first_layers is None
        try:
            with self.memory.clock.measuring(self._device):
                return self._read(ctx.objective, ctx.mode, kind, layers=layers_too)
        except Exception as error:
            self._distrust(error, events)
            return None

    def _due(self, ctx: StepContext, trend: Trend, alarm: bool, ahead: bool) -> str | None:
        """What the schedule wants. `ahead`: looks ahead stand in for the early readings and for those after an alarm."""
        early = ctx.mode.steps_as_base and not (ahead or self._looks)  # in another rule's steps they show nothing
        watchful, alarm, first = self._watchful, alarm and not ahead, not ahead
        asked = partial(self.probe.due, trend, self.memory, watchful=watchful, alarm=alarm, early=early, first=first)
        if ctx.costs is None and asked(*self.probe.least) is None:
            return None  # whatever the size of the batch, which takes longer to ask for
        return None if ctx.objective is None else asked(*(ctx.costs or self._costs(ctx.objective)))

    def _glances(self, ctx: StepContext, trend: Trend) -> bool:
        """Whether looks ahead can see if the user's step, which nothing holds, is too long."""
        damp = self.damp if "damp" in getattr(self.policy, "interventions", ("damp",)) else None
        if damp is None or damp.looks or self._watchful or not ctx.mode.steps_as_base or self._clipped(trend):
            return False
        return damp.can_look(self.base)

    def _glance(self, ctx: StepContext, trend: Trend, events: list[Event]) -> str | None:
        """A look along a tenth of the coming step: a reading is asked for where that overshoots, or where none was yet."""
        if (self.gate.trusted is None and not self._trust(ctx, events)) or ctx.objective is None:
            return None
        seen = None if self._clipped(trend) else self._ahead(ctx, GLANCE, events)
        if self._clipped(trend) or (seen is not None and seen > OVERSHOOTS):
            cheap, _ = ctx.costs or self._costs(ctx.objective)
            return "cheap" if self.probe.lends(self.steps, self.memory, cheap) else None
        unread = self.first_layers is None and self.gate.model is not None and bool(self.probe.layers)
        return "layers" if unread and self.gate.trusted else None

    def _look_ahead(self, ctx: StepContext, trend: Trend, events: list[Event]) -> None:
        """Between readings the length of a step that is held, or automatic, follows looks ahead."""
        damp, automatic = self.damp, self._looks
        if damp is None or not (automatic or damp.engaged) or not ctx.mode.steps_as_base or not self.gate.trusted:
            return
        if self._clipped(trend) or not self.lr_scale > 0:
            return
        if self.probe.looks_ahead(self.steps, self.memory, FORWARD, automatic):
            seen = self._ahead(ctx, self.lr_scale, events)
            if seen is not None:
                damp.look(self.steps, seen)

    def _ahead(self, ctx: StepContext, share: float, events: list[Event]) -> float | None:
        """The overshoot of the coming step, from the loss at `share` of it."""
        if ctx.objective is None:
            return None
        try:
            with self.memory.clock.measuring(self._device):
                return self.probe.look_ahead(ctx.objective, self.base, self.memory, self.steps, share)
        except Exception as error:
            self._distrust(error, events)
            return None

    def _clipped(self, trend: Trend) -> bool:
        """The user's clipping has shortened this gradient: it is not the loss's slope."""
        return self.gate.clip_norm is not None and (trend.grad_norm or 0.0) > 0.99 * self.gate.clip_norm

    @property
    def _looks(self) -> bool:
        """The step size comes from looks ahead."""
        damp = self.damp
        return damp is not None and damp.looks

    def _read(self, objective: Objective, mode: Mode, kind: str, whole: bool = False, layers: bool = True) -> Reading:
        """What is known of the coming step holds where the mode steps by the base's rule in the parameters' own basis."""
        base = self.base if mode.steps_as_base else None
        model, left_out = self.gate.model, self.gate.unmeasured()
        if kind == "layers":
            reading = self.probe.measure_layers(objective, model, self.memory, self.steps)
        else:
            reading = self.probe.measure(objective, base, model, self.memory, self.steps, kind, whole=whole, layers=layers)
        reading = replace(reading, layers=with_drift(reading.layers, self.first_layers or ()))
        return replace(reading, notes=(*reading.notes, f"not measured: {left_out}")) if left_out else reading

    def _trust(self, ctx: StepContext, events: list[Event]) -> bool:
        """Ask the gate; what it refuses is said once and switched off."""
        if ctx.objective is None or self.gate.trusted is False:
            return False
        self.memory.spent += GRADIENT
        self.last_trust = self.steps
        try:
            return self.gate.passes(ctx)
        except Exception as error:
            self._distrust(error, events)
            return False

    def _distrust(self, error: Exception, events: list[Event]) -> None:
        if isinstance(error, ProcessLost):
            raise error
        if self.gate.trusted is False:
            return  # said already
        why = self.gate.refuse(error)
        if self.team.rank == 0:
            warn(f"adaptive_opt measures and treats no longer what needs a replay: {why}")
        events.append(Event(self.steps, "gate", why, "switched off what needs a replay", "done"))

    def probe_now(self) -> Reading:
        """A full reading of the whole present batch, off schedule and off the budget.

        Raises ReplayError when there is nothing to replay, or when the replay does not reproduce the gradient. Of several
        processes each must call it.
        """
        ctx = self.gate.context(self.modes[self.mode])
        if not self.gate.team.all(ctx.objective is not None) or ctx.objective is None:
            why = self.gate.why_not() if ctx.objective is None else "another process cannot evaluate its batch again"
            raise ReplayError(f"probe_now(): {why}")
        self.gate.passes(ctx)
        self.reading = self._read(ctx.objective, ctx.mode, "full", whole=True)
        return self.reading

    def _failed(self, ctx: StepContext, events: list[Event]) -> None:
        """A replay raised in a mode or a treatment, which went on without it: no more replays."""
        if ctx.failure is not None:
            self._distrust(ctx.failure, events)
            ctx.failure, ctx.objective = None, None

    def _remember(self, reading: Reading | None, events: list[Event]) -> None:
        """What a reading leaves behind: its cost, the trends over readings, and a damped step that follows it."""
        if reading is None:
            return
        self.reading = reading
        if reading.stability is not None and reading.stability > 0:
            self.limit = float(self.base.param_groups[0]["lr"]) / reading.stability, self.steps
        self.memory.spent += reading.cost
        if reading.kind != "layers":
            self.memory.last_cheap = self.steps
        if reading.kind == "full":
            self.memory.last_full = self.steps
        if reading.kappa_effective is not None:
            self.kappas = [*self.kappas[-2:], reading.kappa_effective]
        if self.first_layers is None:
            self.first_layers = reading.layers
        done = None if self.damp is None else self.damp.follow(reading)
        if done is not None:
            seen = f"the user's step is at {reading.stability:.3g} of its stability limit"
            events.append(Event(self.steps, "damp", seen, done, "done"))
            if self.trial is not None and self.trial.name == "damp":
                self.trial = None

    def _agrees(self, ctx: StepContext) -> None:
        """Whether the gradients of successive batches agree, where a mode may be tried for it."""
        tries = self.available.intersection(getattr(self.policy, "tries", ()))
        soon = any(self.not_before.get(name, 0) <= self.steps + WINDOW for name in tries)
        due = soon and self.agreement.due(self.steps) and bool(ctx.params) and not ctx.short
        if not due or not self._history().free_to_try:
            self.agreement.forget()
        elif self.agreement.see(self.steps, ctx.params, ctx.indices):
            self.agreement.mean = self.team.first(self.agreement.mean)

    def _look(self, ctx: StepContext, sick: bool, events: list[Event]) -> Sequence[Look] | None:
        """All looks at the user's validation loss, in a step with a new one; None where there is no such loss."""
        v = self.validation
        if not self._validates or self.probe.idle:
            return None
        if sick or ctx.short or not v.due(self.steps):
            return ()
        v.reprice(self.team.first(v.measured(self.steps)))  # each process measured its own time
        if not v.due(self.steps):
            return ()
        samples = None if ctx.objective is None else ctx.objective.batch_size
        asked = self._ask(None if samples is None else samples / self.team.size, events)
        if asked is None:
            return None
        value, counted = asked
        ctx.cost += counted
        v.remember(self.steps, value, counted, self.signals.losses)
        return [v.looks[0], *v.since(self.mode_since)] if self.mode == "sam" else v.looks

    def _ask(self, samples: float | None, events: list[Event]) -> tuple[float, float] | None:
        """The processes' mean validation loss, and what it cost in gradient-equivalents. Leaves no trace in the run.

        None where it raised: then it is said, and asked for no more.
        """
        validate = self.validate
        assert validate is not None
        ask = partial(self.validation.ask, validate, all_params(self.base), self.gate.model, samples)
        try:
            value, counted = self.team.sums(self.team.together(ask))
        except ProcessLost:
            raise
        except Exception as error:
            self.validate = None
            why = f"validate() raised {type(error).__name__}: {error}"
            if self.team.rank == 0:
                warn(f"adaptive_opt asks for no validation loss any more: {why}")
            events.append(Event(self.steps, "validate", why, "asked for no more", "done"))
            return None
        return value / self.team.size, counted / self.team.size

    # ---- decide and act -----------------------------------------------------------------------------------------

    def _history(self) -> History:
        return History(
            step=self.steps,
            mode=self.mode,
            mode_since=self.mode_since,
            trial=None if self.trial is None else self.trial.name,
            not_before=dict(self.not_before),
            kappas=tuple(self.kappas),
            available=self.available,
            can_replay=self.gate.trusted is True,
            can_validate=self._validates,
            can_try=len(self.signals.losses) >= FEWEST and not self.probe.idle and self._held == 1,
            stays=tuple(self.stays.stays),
            agreement=self.agreement.now(self.steps),
            nats=self._nats,
            ending=self._largest_lr < TAIL * self.signals.peak,
        )

    def _say_untreated(self, trend: Trend, decision: Decision, events: list[Event]) -> None:
        """A step that is not finite and that nobody treats goes through as the base takes it, but not in silence."""
        if not trend.finite and not decision.interventions and not self.said_untreated:
            self.said_untreated = True
            seen = f"loss {trend.loss}, gradient norm {trend.grad_norm}"
            events.append(Event(self.steps, "none", seen, "stepped all the same: no treatment is allowed for it", "done"))

    def _act(self, decision: Decision, patient: Patient, events: list[Event]) -> bool:
        """The interventions decided on; True when one of them stands in for this step."""
        ctx, trend = patient.ctx, patient.trend
        for name, why in zip(decision.interventions, decision.reasons, strict=True):
            if self.trial is not None and self.trial.name in self.modes and name not in ("damp", "rollback"):
                self._break_off(name, ctx, events)  # that mode was tried without a cause, and here is one
            applied: Applied | None = self.interventions[name].apply(patient)
            self._failed(ctx, events)
            if applied is None:
                if name not in ("damp", "rollback"):  # those two had nothing new to do
                    self._wait(name)
                    events.append(Event(self.steps, name, why, "found nothing that helps", "done"))
                continue
            on_trial = applied.trial > 0 and (self.trial is None or name == "rollback") and not self._goes_on(applied)
            event = Event(self.steps, name, why, applied.done, "pending" if on_trial else "done")
            events.append(event)
            if on_trial:
                self._cut_short(name, events)
                level = trend.usual_loss if trend.usual_loss is not None else trend.loss
                self.trial = Trial(name, event, self.steps + applied.trial, level, before=applied.before)
            mode_then = self.mode
            if applied.back_to is not None:
                self._restore(applied.back_to)
            if applied.cleanse is not None:
                self.statistics.cleanse(applied.cleanse)
            if applied.skip:
                self.statistics.restore()
            if applied.forget:
                self.signals.forget(applied.but)
            if applied.cliffs and self.rollback is not None:
                self.rollback.expect_cliffs()
            if applied.moved:
                self._moved(name, mode_then, ctx, events)
            if applied.skip or applied.moved:
                return True
            if applied.last:
                break
        return False

    def _break_off(self, name: str, ctx: StepContext, events: list[Event]) -> None:
        """A mode's trial ends without a verdict."""
        assert self.trial is not None
        self.not_before[self.trial.name] = self.steps + COOL_DOWN
        self._cut_short(name, events)
        self._enter("base", ctx)

    def _cut_short(self, name: str, events: list[Event]) -> None:
        """What is on trial, if anything is, gets no verdict."""
        if self.trial is not None:
            events.append(replace(self.trial.event, outcome="done", result=f"no verdict: cut short by {name}"))
            self.trial = None

    def _goes_on(self, applied: Applied) -> bool:
        """A return into a mode on trial that started over: it will be judged all the same."""
        back, trial = applied.back_to, self.trial
        return back is not None and trial is not None and back.mode == trial.name and self._starts_over(trial.name)

    def _moved(self, name: str, mode_then: str, ctx: StepContext, events: list[Event]) -> None:
        """The parameters jumped: what was averaged is of another place, and a mode in which the run broke is out."""
        if self.damp is not None:
            self.damp.moved = True
        self.agreement.forget()
        if self.length is not None:
            self.length.forget()
        self.alarm = self.alarm or name in ("rollback", "spectral")
        stays = self.mode == mode_then and self._starts_over(self.mode)  # elsewhere these parameters stand still
        if name == "rollback" and self.mode_is_treatment and not stays:
            self.mode_is_treatment = False
            if self.trial is not None and self.trial.name == mode_then:
                self._cut_short(name, events)
            events.append(Event(self.steps, mode_then, "the run broke in this mode", "back to base", "reverted"))
            self._wait(mode_then)
            if self.mode != "base":
                self._enter("base", ctx)

    def _restore(self, snapshot: Snapshot) -> None:
        """Back to a snapshot, and into the mode whose basis its moments are in: leaving that mode is a step of its own."""
        snapshot.restore(self.base)
        elsewhere = self.rollback is not None and self.rollback.device is not None
        device = all_params(self.base)[0].device if elsewhere else None
        self.modes[snapshot.mode].load_state_dict(copied(snapshot.mode_state, device))
        self.validation.forget(snapshot.step)
        self.agreement.forget()
        if self.length is not None:
            self.length.forget()
        if self.mode != snapshot.mode:
            self.mode, self.mode_since, self.length = snapshot.mode, self.steps, None
            self._listen()

    def _starts_over(self, mode: str) -> bool:
        """Whether this mode changes the parameters as it begins, where that helps."""
        return hasattr(self.modes.get(mode), "helps")

    def _helps(self, name: str, ctx: StepContext, events: list[Event]) -> bool:
        """Whether a mode that starts over finds a better start; any other may be tried."""
        if not self._starts_over(name):
            return True
        mode: Any = self.modes[name]
        mode.listen(self.gate.model, self.base)
        found = mode.helps(ctx)
        mode.listen(None, self.base)
        self._failed(ctx, events)
        return found

    def _switch(self, decision: Decision, ctx: StepContext, trend: Trend, events: list[Event]) -> bool:
        """Into another mode, with a snapshot to come back to when the policy expects something of it.

        False where that mode has nothing to do here: everything is as it was, and it waits.
        """
        wanted, old = decision.mode, self.mode
        if wanted not in self.modes or (wanted == old and decision.expects is None):
            return True
        replays = self.modes[wanted].needs_replay or self._starts_over(wanted)
        if replays and not (self.gate.trusted or self._trust(ctx, events)):
            return True
        on_trial = decision.expects is not None and wanted != "base"
        why = decision.reason or "the policy says so"
        if on_trial and wanted != old and not self._helps(wanted, ctx, events):
            self._wait(wanted)
            events.append(Event(self.steps, wanted, why, "found nothing that helps", "done"))
            return False
        looked = wanted == "sam" and self._validates
        before = Snapshot.take(self.steps, ctx) if on_trial else None
        length = self.length
        done = f"switched from {old} to {wanted}"
        stronger: Callable[[], str | None] = getattr(self.modes[wanted], "stronger", lambda: None)
        if wanted != old:
            if wanted == "base" and self.mode_is_treatment:
                self._wait(old)
            self._enter(wanted, ctx, as_treatment=on_trial)
            if ctx.moved is not None:
                m = ctx.moved
                done = f"{done}: {m.done}, loss {m.before:.4g} -> {m.after:.4g}; this batch's step was skipped"
            if on_trial and wanted not in self.failures and (words := stronger()) is not None:  # see sam.py, DOSES
                done = f"{done}, {words}"
        elif (words := stronger()) is not None:
            self.mode_since, done = self.steps, f"{wanted} with {words}"
        else:
            return True
        shown = self._validation(events) if on_trial and not looked else None
        event = Event(self.steps, wanted, why, done, "pending" if on_trial else "done")
        events.append(event)
        if on_trial:
            until = self.steps + self._trial_of(wanted)
            steps, losses = self.signals.loss_steps[-BEFORE:], self.signals.losses[-BEFORE:]
            level = trend.usual_loss if ctx.moved is None else ctx.moved.after
            self.trial = Trial(wanted, event, until, level, steps, losses, before, shown, moved=ctx.moved is not None)
            self.trial.seconds, self.trial.length = self._training, None if length is None else length.state_dict()
            if looked:
                self.signals.forget()  # what was learnt by heart shall be lost: lost progress counts from here
        return True

    def _trial_of(self, mode: str) -> int:
        """Steps: sam's needs looks at the validation loss."""
        return max(2 * MODE_TRIAL, LOOKS * self.validation.spacing + 1) if mode == "sam" else MODE_TRIAL

    def _enter(self, mode: str, ctx: StepContext, as_treatment: bool = False) -> None:
        self.modes[self.mode].exit(ctx)
        self.mode, self.mode_since, self.mode_is_treatment = mode, self.steps, as_treatment
        self.length = StepLength() if as_treatment and not self.modes[mode].steps_as_base else None
        self._listen()
        self.modes[mode].enter(ctx)

    # ---- verify -------------------------------------------------------------------------------------------------

    def _verdict(self, ctx: StepContext, trend: Trend, events: list[Event]) -> bool:
        """Judge what is on trial when its time has come. True: parameters were taken back, this batch's gradients are void."""
        trial = self.trial
        if trial is None or ctx.short:
            return False
        nats = self._nats if trial.name in getattr(self.policy, "tries", ()) else None
        if nats is not None and nats < LEARNT:
            result = f"all labels are learnt (loss {nats:.2g}): nothing left to gain, back to base"
            events.append(replace(trial.event, outcome="done", result=result))
            self.trial = None
            self._wait(trial.name)
            self._enter("base", ctx)
            return False
        if not self._holds(trial, ctx, events):
            events.append(replace(trial.event, outcome="reverted", result="the next batch is of another size"))
            self.trial = None
            self._wait(trial.name)
            return self._take_back(trial, ctx)
        if self.steps < trial.until:
            return False
        self.trial = None
        try:
            verdict = self._judge(trial, trend, ctx, events)
        except Exception as error:
            self._distrust(error, events)
            verdict = Verdict(True, "no verdict: the batch could not be evaluated again")
        kept, result = verdict.kept, verdict.result
        if kept is None and trial.longer < MORE:
            more = self._trial_of(trial.name)
            self.trial = replace(trial, until=self.steps + more, longer=trial.longer + 1)
            events.append(replace(trial.event, outcome="pending", result=f"{result}; {more} steps more"))
            return False
        if kept is None:
            result = f"{result}; no gain in {self.steps - trial.event.step} steps"
        outcome = "kept" if kept else "reverted"
        if not kept and trial.name in ("damp", "rollback"):
            outcome = "done"  # there is nothing better to go back to
            if trial.name == "damp" and self.damp is not None and self.damp.press_on():
                outcome, result = "pending", f"{result}; holding at {self.damp.scale:.3g} now"
                self.trial = replace(trial, until=self.steps + self.damp.trial)
        events.append(replace(trial.event, outcome=outcome, result=result))
        if kept:
            self.failures.pop(trial.name, None)
        if outcome != "reverted":
            return False
        self._wait(trial.name)
        return self._take_back(trial, ctx)

    def _holds(self, trial: Trial, ctx: StepContext, events: list[Event]) -> bool:
        """Whether what a mode on trial was entered for is there in this batch too."""
        holds: Callable[[StepContext], bool] = getattr(self.modes.get(trial.name), "holds", lambda ctx: True)
        try:
            return holds(ctx)
        except Exception as error:
            self._distrust(error, events)
            return True

    def _judge(self, trial: Trial, trend: Trend, ctx: StepContext, events: list[Event]) -> Verdict:
        if trial.name == "escape" and trial.until == trial.event.step + 1:
            ctx.cost += 2 * FORWARD
            return verify.with_and_without(ctx.objective, trial.before.values(self.base) if trial.before else {})
        since = self.signals.since(trial.event.step + 1) + ([] if trend.loss is None else [trend.loss])
        if trial.name == "sam" and self._validates:
            looks = self.validation.looks
            before = [look for look in looks if look.step <= trial.event.step]
            return verify.better_validation(before, self.validation.since(trial.event.step))
        if trial.moved:  # of progress before there is none that compares
            return verify.no_worse(verify.below_its_start(trial.level, since), trial.validation, self._validation(events))
        if trial.name in self.modes:
            price = self.team.first(self._price(trial))  # each process measured its own time
            steps = [step for step in (*self.signals.loss_steps, self.steps) if step > trial.event.step][: len(since)]
            return verify.better_mode(trial, (steps, since), self._validation(events), price)
        return verify.lower_level(trial.level, since)

    def _price(self, trial: Trial) -> float:
        """Steps of the run before that a step of the mode on trial takes in measured time; 1 where no time is kept.

        To the nearest power of the square root of two, so that runs that differ by the clock's noise seldom differ in it.
        """
        before, since = trial.seconds, self._training - trial.seconds
        if not before > 0 or not since > 0:
            return 1.0
        ratio = (since / (self.steps - trial.event.step)) / (before / trial.event.step)
        return 2.0 ** max(round(2 * math.log2(ratio)) / 2, 0.0)

    def _take_back(self, trial: Trial, ctx: StepContext) -> bool:
        """Out of a mode; back to the snapshot too, unless the loss is no higher than it was there."""
        larger_dose = trial.before is not None and trial.before.mode == trial.name  # of the mode that goes on
        of_a_mode = trial.name in self.modes and not larger_dose
        if of_a_mode:
            self._enter("base", ctx)
            losses = self.signals.losses
            no_higher = trial.level is None or not losses or median(losses[-10:]) <= trial.level  # or nothing shows that it is
            if no_higher and trial.name != "sam" and not trial.moved:  # what is learnt by heart has a low loss
                return False
        if trial.before is None:
            return False
        self._restore(trial.before)
        if of_a_mode:  # the mode before is on again, as it was
            self.length = StepLength.from_state_dict(trial.length)
            self.mode_is_treatment = self.length is not None
        if trial.moved:  # nothing of the other start is a level, or a place to go back to, for this one
            self.signals.forget(trial.event.step)
            if self.rollback is not None:
                self.rollback.forget()
        self.statistics.restore()
        return True

    def _wait(self, name: str) -> None:
        """The same treatment is not tried again before twice as long as last time."""
        self.failures[name] = self.failures.get(name, 0) + 1
        first = MODE_COOL_DOWN if name in self.modes else COOL_DOWN
        self.not_before[name] = self.steps + first * 2 ** min(self.failures[name] - 1, 10)

    def _validation(self, events: list[Event]) -> float | None:
        asked = self._ask(None, events) if self._validates else None
        if asked is None:
            return None
        value, counted = asked
        self.treatment_cost += counted
        return value

    # ---- checkpoint ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that a run needs to go on bit for bit, beside the base optimizer's own state: plain types, tensors."""
        return checkpoint.written(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a checkpoint; tensors are put where the parameters are."""
        self.check(state)
        self.mode = state["mode"]
        self._listen()  # first: a mode that begins to hear the layers forgets, and its own state is to come
        checkpoint.read(self, state)

    def check(self, state: Mapping[str, Any]) -> None:
        """Raises ValueError when this checkpoint cannot be taken over; touches nothing."""
        checkpoint.check(state, self.modes)
