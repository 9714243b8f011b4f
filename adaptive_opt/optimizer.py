"""AdaptiveOptimizer: a torch Optimizer around a torch Optimizer. Read last of the three; the loop is in controller.py."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.optimizer import (
    _global_optimizer_post_hooks,  # pyright: ignore[reportPrivateUsage]
    _global_optimizer_pre_hooks,  # pyright: ignore[reportPrivateUsage]
)

from adaptive_opt.capture import Ambient, Capture, device_of, original
from adaptive_opt.controller import Controller
from adaptive_opt.interventions import INTERVENTIONS, AutoStep
from adaptive_opt.modes import MODES, Mode, all_params
from adaptive_opt.notice import warn
from adaptive_opt.parallel import JoinedStep, check_join, world
from adaptive_opt.policy import Policy, RulePolicy
from adaptive_opt.probe import LanczosProbe
from adaptive_opt.records import Reading, StepReport
from adaptive_opt.sharded import first_fsdp

LOG = logging.getLogger("adaptive_opt")
GLOBAL_STEP_HOOKS: tuple[dict[int, Any], ...] = (_global_optimizer_pre_hooks, _global_optimizer_post_hooks)
Sink = Callable[[StepReport], None]


class AdaptiveOptimizer(Optimizer):
    """Wraps any base optimizer; measures, treats what is wrong, takes back what did not help, and says so.

        optimizer = AdaptiveOptimizer(AdamW(model.parameters(), lr=1e-3), model, loss_fn=criterion)

    base: the optimizer that takes the steps; its param_groups and state are shared, so schedulers work on either.
    model, loss_fn: the batch is remembered by forward hooks on both. loss_fn must be the very Module that the training loop
    calls; without it the model's own `output.loss` is used (Hugging Face). objective: instead, a callable that returns the
    loss of the present batch and does no backward (PINNs, several losses). Without any of them the closure given to
    `step` is replayed. probe: what is measured and when. policy: what is done about it. modes, interventions: by name, in
    place of the defaults. step_size: "user", your learning rate, damped when it is unstable; "auto" (or an AutoStep with
    bounds), a learning rate from curvature, to which yours and its schedule give only the shape over time.
    validate: a callable that returns a validation loss, asked now and then for 3 % of the training work; it leaves no trace in
    the run (torch's random states, modes, buffers). SAM is tried only if it is given. sinks: called with every StepReport;
    without any, what is treated is logged as warnings of the logger "adaptive_opt".

    Raises TypeError and ValueError that quote the call on arguments that cannot work.
    """

    def __init__(
        self,
        base: Optimizer,
        model: nn.Module | None = None,
        *,
        loss_fn: nn.Module | None = None,
        objective: Callable[[], Tensor] | None = None,
        probe: LanczosProbe | None = None,
        policy: Policy | None = None,
        modes: Mapping[str, Mode] | None = None,
        interventions: Mapping[str, Any] | None = None,
        step_size: str | AutoStep = "user",
        validate: Callable[[], float] | None = None,
        sinks: Iterable[Sink] = (),
    ):
        if probe is not None and not isinstance(probe, LanczosProbe):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"AdaptiveOptimizer(probe={probe!r}): a LanczosProbe, for example LanczosProbe(overhead=0.05)")
        policy = RulePolicy() if policy is None else policy
        modes = {name: make() for name, make in MODES.items()} if modes is None else dict(modes)
        interventions = {name: make() for name, make in INTERVENTIONS.items()} if interventions is None else dict(interventions)
        _check(base, model, loss_fn, objective, policy, modes, interventions, step_size)
        probe = LanczosProbe() if probe is None else probe
        if step_size != "user":
            interventions["damp"] = _automatic(step_size, base, probe)
        self._link(base)
        super().__init__([{"params": base.param_groups[0]["params"]}], base.defaults)
        self._link(base)  # __init__ made groups of its own
        self.sinks: list[Sink] = list(sinks)
        self.control = Controller(base, probe, policy, modes, interventions, validate)
        self._beginning = self.control.state_dict()
        self._said: set[str] = set()
        self._report: StepReport | partial[StepReport] | None = None
        self.attach(model, loss_fn=loss_fn, objective=objective)

    # ---- what one sees ----------------------------------------------------------------------------------------------

    @property
    def reading(self) -> Reading | None:
        """The latest Reading; None before the first."""
        return self.control.reading

    @property
    def report(self) -> StepReport | None:
        """The StepReport of the latest step; None before the first."""
        if isinstance(self._report, partial):  # of an idle step: it is made when it is looked at
            self._report = self._report()
        return self._report

    @property
    def steps(self) -> int:
        """Steps so far, skipped ones included."""
        return self.control.steps

    # ---- training -----------------------------------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One optimisation step; torch's meaning of `closure`: it clears gradients, runs backward, returns the loss.

        The closure is called once; it is called again only where nothing else shows the loss (no model with loss_fn, no
        objective), without its backward. Returns the closure's loss.
        """
        if (
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or _global_optimizer_pre_hooks
            or _global_optimizer_post_hooks
        ):
            return self._hooked_step() if closure is None else self._hooked_step(closure=closure)
        if torch.compiler.is_compiling():
            return self._uncompiled_step(closure)
        return self._step(closure)

    step.hooked = True  # pyright: ignore[reportFunctionMemberAccess]
    # torch shall not wrap it: that costs 10 microseconds, and the profiler has the base's own step already

    def _step(self, closure: Callable[[], Any] | None = None) -> Any:
        control, loss, ambient = self.control, None, None
        idle = not self.sinks and control.passive
        if closure is not None:
            ambient = None if idle else self._ambient()
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["lr"] != 0:
                break
        else:  # at a rate of 0 nothing can change: checkpoint helpers call step() so to create the state
            self._report = control.pass_on(count=False)
            return loss
        if idle:
            self._report = control.pass_on()
        else:
            self._looked_at_step(closure, ambient, loss)
        return loss

    # Not compiled, as torch's own: the loop synchronises, forks RNG and calls autograd.
    _uncompiled_step = torch._disable_dynamo(_step)  # pyright: ignore[reportPrivateImportUsage, reportPrivateUsage]

    @torch.no_grad()
    def _looked_at_step(self, closure: Callable[[], Any] | None, ambient: Ambient | None, loss: Any) -> None:
        if (why := self.control.gate.without_replay(closure is not None)) is not None:
            self._say(f"adaptive_opt cannot evaluate this loss again and measures nothing: {why}")
        if self._capture is None and world() > 1:
            self._say(
                f"adaptive_opt was given no model and there are {world()} processes: what is decided here is not shared with "
                "the others; give AdaptiveOptimizer(base, model) if they train one model"
            )
        if self.control.team.size > 1 and self._capture is not None:
            check_join(self._capture.ddp, self)
        self._report = report = self.control.step(closure, ambient, loss)
        for event in (
            report.events if self.control.team.rank == 0 else ()
        ):  # never silent: with no sink to say it, on the terminal
            LOG.log(logging.INFO if self.sinks else logging.WARNING, event.sentence())
        for sink in self.sinks:
            sink(report)

    def _unhooked_base(self, closure: Callable[[], Any] | None = None) -> Any:
        """Global step hooks fire for the wrapper's step; for the base's step inside they would fire again."""
        kept = [dict(hooks) for hooks in GLOBAL_STEP_HOOKS]
        try:
            for hooks in GLOBAL_STEP_HOOKS:
                hooks.clear()
            return self._uncompiled_step(closure)
        finally:
            for hooks, old in zip(GLOBAL_STEP_HOOKS, kept, strict=True):
                hooks.update(old)

    _hooked_step = Optimizer.profile_hook_step(_unhooked_base)  # torch's own order and meaning of hooks

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients, and forgets the batches that made them."""
        self.base.zero_grad(set_to_none)
        if self._capture is not None and not Capture.replaying:
            self._capture.forget_used()

    @torch.no_grad()
    def probe_now(self) -> Reading:
        """A full Reading of the whole present batch, off schedule: call it between backward and step.

        Raises ReplayError when the batch cannot be evaluated again; the message says why.
        """
        return self.control.probe_now()

    # ---- the batch ----------------------------------------------------------------------------------------------------

    def attach(
        self,
        model: nn.Module | None = None,
        *,
        loss_fn: nn.Module | None = None,
        objective: Callable[[], Tensor] | None = None,
    ) -> None:
        """Listen to this model and loss from now on: at construction, and again after unpickling or deepcopy."""
        self.detach()
        _check_sources(self.base, model, loss_fn, objective)
        self._capture = None if model is None else Capture(model, loss_fn, all_params(self.base))
        self.control.listen(None if model is None else original(model), self._capture, objective)

    def detach(self) -> None:
        """Take the hooks off the model."""
        if getattr(self, "_capture", None) is not None:
            assert self._capture is not None
            self._capture.close()
            self.control.deaf()
        self._capture: Capture | None = None

    # ---- several processes: `with Join([ddp, optimizer]):` for uneven inputs ------------------------------------------

    def join_hook(self, **kwargs: Any) -> JoinedStep:
        """What a process does that has no batch left, in `torch.distributed.algorithms.Join`: give the model first."""
        return JoinedStep(self._ddp(), self.control.shadow, self.state_dict, self.load_state_dict)

    @property
    def join_device(self) -> torch.device:
        """Where Join's own collective calls are made."""
        ddp: Any = self._ddp()  # torch gives these two no type
        return ddp.join_device

    @property
    def join_process_group(self) -> Any:
        """The processes that Join waits for."""
        ddp: Any = self._ddp()
        return ddp.join_process_group

    def _ddp(self) -> DistributedDataParallel:
        if self._capture is None or self._capture.ddp is None:
            raise ValueError("Join([model, optimizer]): AdaptiveOptimizer(base, model) was given no DistributedDataParallel")
        return self._capture.ddp

    # ---- PyTorch's contract ----------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """To base and wrapper alike: they share the groups."""
        if self.param_groups is self.base.param_groups and hasattr(self, "control"):
            self.base.add_param_group(param_group)
            self._link(self.base)
            if self._capture is not None:
                self._capture.hold(all_params(self.base))
        else:
            super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """The base's state dict and a block "adaptive" of plain types and tensors: a run goes on from it bit for bit."""
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        state_dict: dict[str, Any] = {**self.base.state_dict(), "adaptive": self.control.state_dict()}
        for after in self._optimizer_state_dict_post_hooks.values():
            changed = after(self, state_dict)
            state_dict = state_dict if changed is None else changed
        return state_dict

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what `state_dict` gave, or a bare base optimizer's: then the wrapper starts from its own beginning.

        Raises ValueError when the groups do not fit, or the block needs a mode that is not here; all stays as it was.
        """
        loaded = dict(state_dict)
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, loaded)
            loaded = loaded if changed is None else dict(changed)
        adaptive = {**self._beginning, **loaded.pop("adaptive", {})}  # what an older version did not write starts again
        self.control.check(adaptive)
        self.base.load_state_dict(loaded)
        self._link(self.base)
        self.control.load_state_dict(adaptive)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def __getstate__(self) -> dict[str, Any]:
        """Model, hooks, objective, validate and sinks stay behind: `attach`, `control.validate` and `sinks` take them again."""
        taken = (
            "defaults",
            "state",
            "param_groups",
            "base",
            "_said",
            "_report",
            "_beginning",
        )  # not a scheduler's `step`
        state = {k: v for k, v in self.__dict__.items() if k in taken}
        control = self.control
        probe_policy = (control.probe, control.policy, control.modes, control.interventions)
        return {**state, "_made_of": probe_policy, "_control_state": control.state_dict()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "_made_of" not in state:  # torch's own load_state_dict ends here
            super().__setstate__(state)
            self._link(self.base)
            return
        state = dict(state)
        probe, policy, modes, interventions = state.pop("_made_of")
        control_state = state.pop("_control_state")
        super().__setstate__(state)
        self._link(self.base)
        self._capture, self.sinks = None, []
        self.control = Controller(self.base, probe, policy, modes, interventions, None)
        self.control.load_state_dict(control_state)

    def _link(self, base: Optimizer) -> None:
        """Outer and base share the very same groups, state and defaults."""
        self.base = base
        self.param_groups, self.state, self.defaults = base.param_groups, base.state, base.defaults

    def _ambient(self) -> Ambient:
        modules, moving = ([], None) if self._capture is None else (self._capture.modules, self._capture.moving)
        model = self.control.gate.model
        device = device_of(model) if model is not None else self.param_groups[0]["params"][0].device
        return Ambient.now(modules, device, moving)

    def _say(self, message: str) -> None:
        """A warning, once."""
        if message not in self._said:
            self._said.add(message)
            warn(message)


def _check(
    base: Any,
    model: Any,
    loss_fn: Any,
    objective: Any,
    policy: Any,
    modes: Mapping[str, Any],
    interventions: Mapping[str, Any],
    step_size: Any,
) -> None:
    """Arguments that cannot work, refused before anything is touched."""
    if isinstance(base, type) or not isinstance(base, Optimizer):
        got = base.__name__ if isinstance(base, type) else type(base).__name__
        raise TypeError(
            f"AdaptiveOptimizer(base={got}): an optimizer that exists, for example AdamW(model.parameters(), lr=1e-3)"
        )
    if isinstance(base, AdaptiveOptimizer):
        raise TypeError("AdaptiveOptimizer(base=AdaptiveOptimizer(...)): the base is wrapped already")
    if type(base).__name__ == "LBFGS":
        raise ValueError("AdaptiveOptimizer(base=LBFGS(...)): it calls its closure many times a step and has no step to switch")
    if not any(group["params"] for group in base.param_groups):
        raise ValueError("AdaptiveOptimizer(base): the base optimizer has no parameters")
    if any(group.get("differentiable") for group in base.param_groups):
        raise ValueError(
            f"AdaptiveOptimizer(base={type(base).__name__}(..., differentiable=True)): its step is part of a graph, "
            "which a wrapper that steps without one would cut; use the base alone"
        )
    if not hasattr(policy, "decide"):
        raise TypeError(
            f"AdaptiveOptimizer(policy={policy!r}): an object with decide(diagnosis, history), for example RulePolicy()"
        )
    if "base" not in modes:
        raise ValueError(
            f"AdaptiveOptimizer(modes={sorted(modes)}): 'base' must be among them, it is where every switch returns"
        )
    missing = set(getattr(policy, "interventions", ())) - set(interventions)
    if missing:
        raise ValueError(f"AdaptiveOptimizer(policy={policy!r}): {sorted(missing)} is not one of {sorted(interventions)}")
    wanted = getattr(policy, "mode", "base")
    if wanted not in modes:
        raise ValueError(f"AdaptiveOptimizer(policy={policy!r}): mode {wanted!r} is not one of {', '.join(map(repr, modes))}")
    if (why := modes[wanted].refuses(base)) is not None:
        raise ValueError(f"AdaptiveOptimizer(base={type(base).__name__}(...), policy={policy!r}): {why}")
    if step_size not in ("user", "auto") and not isinstance(step_size, AutoStep):
        raise ValueError(f"AdaptiveOptimizer(step_size={step_size!r}): 'user', 'auto', or AutoStep(bounds=(least, largest))")
    _check_sources(base, model, loss_fn, objective)


def _automatic(step_size: str | AutoStep, base: Optimizer, probe: LanczosProbe) -> AutoStep:
    if probe.idle:
        raise ValueError(
            f"AdaptiveOptimizer(step_size={step_size!r}, probe={probe!r}): this probe never measures by itself, and "
            "the learning rate comes from what it measures; LanczosProbe(overhead=0.05) does"
        )
    auto = AutoStep() if isinstance(step_size, str) else step_size
    auto.choose(base)
    return auto


def _check_sources(base: Optimizer, model: Any, loss_fn: Any, objective: Any) -> None:
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"AdaptiveOptimizer(model={type(model).__name__}): a torch.nn.Module")
    if loss_fn is not None and not isinstance(loss_fn, nn.Module):
        name = getattr(loss_fn, "__name__", type(loss_fn).__name__)
        raise TypeError(
            f"AdaptiveOptimizer(loss_fn={name}): a plain function cannot be listened to; give the Module that the loop calls "
            "(for example criterion = torch.nn.CrossEntropyLoss()), or objective=, or step(closure)"
        )
    if loss_fn is not None and model is None:
        raise ValueError("AdaptiveOptimizer(loss_fn=..., model=None): the model is needed too, its input is what is replayed")
    if objective is not None and not callable(objective):
        raise TypeError(f"AdaptiveOptimizer(objective={type(objective).__name__}): a callable that returns the loss tensor")
    if model is not None and (old := first_fsdp(model)) is not None:
        raise ValueError(
            f"AdaptiveOptimizer(model={old}(...)): its flat shards are nobody's parameters; shard the model by "
            "torch.distributed.fsdp.fully_shard (FSDP2)"
        )
    if model is not None:
        inside = {id(p) for m in (model, loss_fn) if m is not None for p in m.parameters()}
        params = all_params(base)
        if objective is None and not any(id(p) in inside for p in params):
            raise ValueError(
                "AdaptiveOptimizer(base, model): none of the base optimizer's parameters is in this model; was the model "
                "built again, or moved by a function that copies it, after the optimizer was made?"
            )
