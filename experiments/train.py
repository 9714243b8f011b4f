"""python experiments/train.py [-m] [task=...] [base=...] [policy=...] [seed=...]: one run, or a sweep, by Hydra.

The same from an installed wheel: python -m adaptive_opt_experiments ...
"""
# ruff: noqa: E402

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
if not __package__:  # run as a file
    sys.path.insert(0, str(HERE.parent))
    import experiments

    __package__ = experiments.__name__  # so that relative imports work (PEP 366)

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from adaptive_opt import AdaptiveOptimizer
from adaptive_opt.telemetry import ConsoleSink, JsonlSink, TensorBoardSink

from . import folder, launch, near
from .faults import Faults
from .loop import Outcome, train
from .schema import register
from .unverified import UnverifiedPolicy, unverified

HOMES = (HERE / "configs", HERE.parent / "configs")  # in the wheel, in the clone
CONFIGS = os.environ.get("ADAPTIVE_OPT_CONFIGS") or str(next(home for home in HOMES if home.is_dir()))
register()


def run(cfg: DictConfig, run_dir: Path) -> Outcome:
    """One training run as the config says, in a folder of its own (see folder.py). With `resume=true` it is not run twice."""
    config: Any = OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)
    if cfg.resume and (done := folder.finished(run_dir, config)) is not None:
        return done
    folder.begin(run_dir, config, cfg.seed)
    try:
        torch.set_num_threads(cfg.threads)
        outcome = _run(cfg, config, run_dir) if cfg.trainer.nproc == 1 else launch.launch(cfg, config, run_dir)
    except BaseException as error:
        folder.fail(run_dir, error)
        raise
    if cfg.telemetry.page:
        from adaptive_opt.dashboard.export import export
        from adaptive_opt.dashboard.run import Run

        export(Run(run_dir / "steps.jsonl").finish(), run_dir.name, run_dir / "run.html")
    folder.finish(run_dir, outcome)
    return outcome


def _run(cfg: DictConfig, config: dict[str, Any], run_dir: Path) -> Outcome:
    task = instantiate(cfg.task, seed=cfg.seed)
    steps = task.steps if cfg.steps is None else cfg.steps
    if steps < 1:
        raise SystemExit(f"steps={steps}: 1 or more, or null for the task's own number")
    ranks = launch.Ranks.here()
    task.model = ranks.wrapped(task.model)
    base = instantiate(cfg.base)(task.model.parameters())
    sinks = _sinks(cfg, config, run_dir) if ranks.rank == 0 else []
    optimizer = base if cfg.policy.get("_target_") is None else _wrapped(cfg, task, base, sinks)
    cosine = cfg.schedule.name == "cosine"
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps) if cosine else None
    torch.manual_seed(cfg.seed)
    faults = Faults(cfg.faults.rate, cfg.faults.kind, cfg.faults.scale, cfg.seed)
    try:
        return train(task, optimizer, steps=steps, faults=faults, schedule=schedule, ranks=ranks)
    finally:
        for sink in sinks:
            if hasattr(sink, "close"):
                sink.close()


def _wrapped(cfg: DictConfig, task: Any, base: torch.optim.Optimizer, sinks: list[Any]) -> AdaptiveOptimizer:
    """The wrapper as the config says; a mode or an intervention that is null there is left out."""
    policy = instantiate(cfg.policy, _convert_="all")
    treatments = {name: instantiate(part) for name, part in cfg.intervention.items() if part is not None}
    if cfg.validate and getattr(task, "validation", None) is None:
        raise SystemExit(f"validate=true: {type(task).__name__} holds no samples out; try task=digits task.validation=200")
    return AdaptiveOptimizer(
        base,
        task.model,
        loss_fn=task.loss_fn,
        probe=instantiate(cfg.probe, _convert_="all"),
        policy=policy if cfg.verify else UnverifiedPolicy(policy),
        modes={name: instantiate(part) for name, part in cfg.mode.items() if part is not None},
        interventions=treatments if cfg.verify else {name: unverified(part) for name, part in treatments.items()},
        validate=task.validation_loss if cfg.validate else None,
        sinks=sinks,
    )


def _sinks(cfg: DictConfig, config: dict[str, Any], run_dir: Path) -> list[Any]:
    sinks: list[Any] = []
    if cfg.telemetry.jsonl:
        sinks.append(JsonlSink(run_dir, config, cfg.seed))
    if cfg.telemetry.console:
        sinks.append(ConsoleSink(write=tqdm.write))
    if cfg.telemetry.tensorboard:
        pictures = None
        if cfg.telemetry.pictures:
            from adaptive_opt.dashboard.pictures import Pictures

            pictures = Pictures(cfg.telemetry.pictures)
        sinks.append(TensorBoardSink(run_dir, pictures))
    return sinks


@hydra.main(version_base="1.3", config_path=CONFIGS, config_name="train")
def _main(cfg: DictConfig) -> float:
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    outcome = run(cfg, run_dir)
    shown = "  ".join(f"{name} {value:.4g}" for name, value in outcome.metrics.items())
    print(f"{shown}  after {outcome.steps} steps, {outcome.seconds:.1f} s; run folder {run_dir}")
    return outcome.train_loss


def main() -> None:
    """Hydra's main; where a name on the command line is unknown, the names near it follow Hydra's own message."""
    launch.refuse_torchrun()
    try:
        _main()
    except SystemExit as stop:
        if stop.code:
            near.say(CONFIGS, sys.argv[1:])
        raise


if __name__ == "__main__":
    main()
