"""python scripts/dashboard_demo.py [--port P] [--steps N] [--out DIR]: the dashboard, live, while a sick run is treated.

AdamW at a hundred times its learning rate, 1 % of the batches broken, on real MNIST images; a full reading every 50 steps,
so that every panel has something to show (that costs far more than the usual 5 %: see the panel on cost). A healthy run
follows, to be chosen and compared. `--train` trains without serving.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

RUNS = {"sick": (1e-1, 0.01), "healthy": (1e-3, 0.0)}  # learning rate, share of broken batches


def train(folder: Path, steps: int) -> None:
    """Both runs, one after the other, each into a folder of its own."""
    import torch

    from adaptive_opt import AdaptiveOptimizer, LanczosProbe
    from adaptive_opt.telemetry import JsonlSink
    from experiments.faults import Faults
    from experiments.loop import train as loop
    from experiments.tasks.mnist import MNIST

    torch.set_num_threads(1)
    for name, (lr, rate) in RUNS.items():
        (folder / name / "steps.jsonl").unlink(missing_ok=True)
        sink = JsonlSink(folder / name, {"lr": lr, "faults": rate, "steps": steps}, seed=0)
        task = MNIST(seed=0, steps=steps)
        base = torch.optim.AdamW(task.model.parameters(), lr=lr)
        probe = LanczosProbe(every=50)
        optimizer = AdaptiveOptimizer(base, task.model, loss_fn=task.loss_fn, probe=probe, sinks=[sink])
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        torch.manual_seed(0)
        loop(task, optimizer, faults=Faults(rate, "mixed", seed=0), schedule=schedule)
        sink.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=8050)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "dashboard")
    parser.add_argument("--train", action="store_true", help="train only, serve nothing")
    args = parser.parse_args()
    if args.steps < 20:
        parser.error(f"--steps {args.steps}: 20 at least")
    args.out.mkdir(parents=True, exist_ok=True)
    if args.train:
        train(args.out, args.steps)
        return 0
    from adaptive_opt.__main__ import main as command

    training = [sys.executable, __file__, "--train", "--steps", str(args.steps), "--out", str(args.out)]
    trainer = subprocess.Popen(training, start_new_session=True)  # Ctrl-C is for the page; the training is ended below
    try:
        return command(["dashboard", str(args.out), "--port", str(args.port)])
    finally:
        trainer.terminate()
        trainer.wait()


if __name__ == "__main__":
    sys.exit(main())
