"""python experiments/train.py [-m] [task=...] [base=...] [policy=...] [seed=...]: one run, or a sweep, by Hydra."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import hydra  # noqa: E402
import torch  # noqa: E402
from hydra.core.hydra_config import HydraConfig  # noqa: E402
from hydra.utils import instantiate  # noqa: E402
from omegaconf import DictConfig, OmegaConf  # noqa: E402
from tqdm import tqdm  # noqa: E402

from adaptive_opt import AdaptiveOptimizer  # noqa: E402
from adaptive_opt.telemetry import ConsoleSink, JsonlSink, TensorBoardSink  # noqa: E402
from experiments.faults import Faults  # noqa: E402
from experiments.loop import Outcome, train  # noqa: E402

CONFIGS = os.environ.get("ADAPTIVE_OPT_CONFIGS", str(ROOT / "configs"))


def run(cfg: DictConfig, run_dir: Path) -> Outcome:
    """One training run as the config says; writes steps.jsonl, run.json and metrics.json to `run_dir`."""
    torch.set_num_threads(cfg.threads)
    task = instantiate(cfg.task, seed=cfg.seed)
    steps = cfg.steps or task.steps
    base = instantiate(cfg.base)(task.model.parameters())
    sinks = _sinks(cfg, run_dir)
    optimizer: torch.optim.Optimizer = base
    if cfg.policy.get("_target_") is not None:
        optimizer = AdaptiveOptimizer(
            base,
            task.model,
            loss_fn=task.loss_fn,
            probe=instantiate(cfg.probe),
            policy=instantiate(cfg.policy, _convert_="all"),
            modes={name: instantiate(part) for name, part in cfg.mode.items()},
            interventions={name: instantiate(part) for name, part in cfg.intervention.items()},
            sinks=sinks,
        )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps) if cfg.schedule == "cosine" else None
    torch.manual_seed(cfg.seed)
    faults = Faults(cfg.faults.rate, cfg.faults.kind, cfg.faults.scale, cfg.seed)
    outcome = train(task, optimizer, steps=steps, faults=faults, schedule=schedule)
    for sink in sinks:
        if hasattr(sink, "close"):
            sink.close()
    if cfg.telemetry.page:
        from adaptive_opt.dashboard.export import export
        from adaptive_opt.dashboard.run import Run

        export(Run(run_dir / "steps.jsonl").finish(), run_dir.name, run_dir / "run.html")
    numbers = {
        **outcome.metrics,
        "final_loss": outcome.losses[-1],
        "probing": outcome.overhead,
        "treatment": outcome.treatment,
    }
    (run_dir / "metrics.json").write_text(
        json.dumps({"steps": outcome.steps, "seconds": outcome.seconds, **numbers}, indent=2) + "\n"
    )
    return outcome


def _sinks(cfg: DictConfig, run_dir: Path) -> list[Any]:
    sinks: list[Any] = []
    if cfg.telemetry.jsonl:
        sinks.append(JsonlSink(run_dir, OmegaConf.to_container(cfg, resolve=True), cfg.seed))  # type: ignore[arg-type]
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
def main(cfg: DictConfig) -> float:
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    outcome = run(cfg, run_dir)
    shown = "  ".join(f"{name} {value:.4g}" for name, value in outcome.metrics.items())
    print(f"{shown}  after {outcome.steps} steps, {outcome.seconds:.1f} s; run folder {run_dir}")
    return outcome.losses[-1]


if __name__ == "__main__":
    main()
