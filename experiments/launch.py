"""Several processes that train one model, started from inside of the job by torch's elastic launcher: `trainer.nproc=2`."""

from __future__ import annotations

import os
import sys
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.nn.parallel import DistributedDataParallel


def refuse_torchrun() -> None:
    """Raises SystemExit under torchrun, where each rank would run Hydra as a whole."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        raise SystemExit(
            "torchrun experiments/train.py: every rank would run Hydra as a whole, with -m the whole sweep, and write over the "
            f"others' run folders; start it plainly, the job starts its ranks itself: python {sys.argv[0]} "
            f"{' '.join(sys.argv[1:])} trainer.nproc={os.environ.get('LOCAL_WORLD_SIZE', 2)}"
        )


def launch(cfg: DictConfig, config: dict[str, Any], run_dir: Path) -> Any:
    """What the run gives on the first of `trainer.nproc` processes of this machine; one that fails ends all of them."""
    how = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=cfg.trainer.nproc,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",  # any free port: jobs of a sweep do not meet
        max_restarts=0,
        monitor_interval=0.1,
    )
    return elastic_launch(how, _rank)(OmegaConf.to_container(cfg, resolve=True), config, str(run_dir))[0]


@record
def _rank(cfg: dict[str, Any], config: dict[str, Any], run_dir: str) -> Any:
    from .train import _run

    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        torch.set_num_threads(config["threads"])
        outcome = _run(OmegaConf.create(cfg), config, Path(run_dir))
        return outcome if dist.get_rank() == 0 else None
    finally:
        dist.destroy_process_group()


@dataclass(frozen=True)
class Ranks:
    """The processes of this run: one, or as many as the group has."""

    rank: int = 0
    size: int = 1

    @classmethod
    def here(cls) -> Ranks:
        return cls(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else cls()

    def wrapped(self, model: nn.Module) -> nn.Module:
        return DistributedDataParallel(model) if self.size > 1 else model

    def share(self, x: Tensor) -> Tensor:
        """This process's samples of a batch, dealt out as DistributedSampler does."""
        if len(x) % self.size:
            raise SystemExit(f"trainer.nproc={self.size}: a batch of {len(x)} cannot be dealt out evenly")
        return x[self.rank :: self.size] if self.size > 1 else x

    def mean(self, loss: Tensor) -> float:
        """Over the processes: the whole batch's."""
        if self.size > 1:
            loss = loss.detach().double() / self.size
            dist.all_reduce(loss)
        return float(loss.detach())


ALONE = Ranks()
