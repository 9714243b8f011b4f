"""python scripts/bench_ddp.py [--ranks 1 2 4]: what a full reading of one global batch costs each of several processes.

Counted: floating-point operations of products and gradients (torch's FlopCounterMode), as gradient-equivalents of the global
batch. Measured: the process's own CPU time (waiting for the others does not count). DistributedDataParallel over gloo.
Several processes measure once more with a memory that the whole basis does not fit into: then each keeps a share of it.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

from adaptive_opt import AdaptiveOptimizer, ConstantPolicy, LanczosProbe

BATCH, STEPS = 512, 10


def model() -> nn.Module:
    torch.manual_seed(0)
    conv = [nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    return nn.Sequential(*conv, nn.Linear(32 * 36, 64), nn.ReLU(), nn.Linear(64, 10))


def measure(rank: int, size: int, store: str, repeats: int, shared: bool, results: mp.SimpleQueue) -> None:
    torch.set_num_threads(1)
    net = whole = model()
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
        net = DistributedDataParallel(whole)
    x, y = torch.randn(BATCH, 1, 16, 16), torch.randint(0, 10, (BATCH,))
    x, y = x[rank::size], y[rank::size]
    criterion = nn.CrossEntropyLoss()
    base = torch.optim.AdamW(whole.parameters(), lr=1e-3)
    n = sum(p.numel() for p in whole.parameters())
    memory = (STEPS + 4) * n * 4 - 1 if shared else None  # one byte less than the whole basis takes
    probe = LanczosProbe(overhead=0, num_steps=STEPS, memory=memory, backend="exact")
    optimizer = AdaptiveOptimizer(base, net, loss_fn=criterion, probe=probe, policy=ConstantPolicy("base"))
    counted, seconds = [], []
    for _ in range(repeats):
        optimizer.zero_grad()
        criterion(net(x), y).backward()
        counter = FlopCounterMode(display=False)
        began = time.process_time()
        if counted:
            reading = optimizer.probe_now()
            seconds.append(time.process_time() - began)
        else:
            with counter:
                reading = optimizer.probe_now()
            counted.append(counter.get_total_flops())
    with FlopCounterMode(display=False) as one:
        criterion(whole(x), y).backward()
    vectors = (STEPS + 1) / size if reading.method == "shared" else STEPS + 1
    words = f"lambda_max {reading.lambda_max:.5f}, basis {reading.method}: {4e-6 * n * vectors:.2f} MB each"
    results.put((rank, counted[0], one.get_total_flops() * size, median(seconds), words))
    if size > 1:
        dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--repeats", type=int, default=6)
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    alone: tuple[float, float] | None = None
    for size, shared in [(n, shared) for n in args.ranks for shared in ([False, True] if n > 1 else [False])]:
        results = mp.get_context("spawn").SimpleQueue()
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(measure, (size, f"{folder}/store", args.repeats, shared, results), size)
        rows = sorted(results.get() for _ in range(size))
        work, seconds = max(flops / gradient for _, flops, gradient, _, _ in rows), max(row[3] for row in rows)
        alone = alone or (work, seconds)
        print(
            f"{size} processes: {work:6.2f} gradients of the global batch each ({100 * work / alone[0]:.1f} %), "
            f"{seconds:.3f} s of CPU each ({100 * seconds / alone[1]:.1f} %), {rows[0][4]}",
            flush=True,
        )


if __name__ == "__main__":
    main()
