"""Fig. 7: the six panels, of a real sick run."""

from __future__ import annotations

import json
from pathlib import Path

from hydra import compose, initialize_config_dir

from adaptive_opt.dashboard.picture import page_picture
from adaptive_opt.dashboard.run import Run
from adaptive_opt.report import summary

from .. import train
from .common import Drawn, with_error

SEED = 0
WORDS = ["experiment=mnist_sick", "probe=every", "probe.every=50", "telemetry=quiet", f"seed={SEED}"]


def draw(folder: Path) -> Drawn:
    """Raises dashboard.picture.NoBrowser where there is no Chromium to draw with."""
    from adaptive_opt.dashboard.export import document

    run_dir = folder / "runs" / "fig7"
    with initialize_config_dir(train.CONFIGS, version_base="1.3"):
        cfg = compose("train", WORDS)
    train.run(cfg, run_dir)
    bare_dir = folder / "runs" / "fig7-bare"
    with initialize_config_dir(train.CONFIGS, version_base="1.3"):
        cfg = compose("train", [*WORDS, "policy=bare"])
    train.run(cfg, bare_dir)
    read = Run(run_dir / "steps.jsonl").finish()
    page_picture(document(read, "AdamW at lr 0.1, 1 % broken batches, MNIST"), folder / "fig7.png", width=1280)
    s = summary(run_dir)
    bare = json.loads((bare_dir / "metrics.json").read_text())
    bare_loss = "NaN" if bare["train_loss"] is None else f"{bare['train_loss']:.3f}"
    damped = next((e for e in s.log if e.event.name == "damp"), None)
    first, full = s.readings[0], [r for r in s.readings if r.kind == "full"]
    negative = [r for r in full if r.delta]
    return Drawn(
        "Fig. 7: the dashboard that was missing",
        ("fig7.png",),
        f"The dashboard's page of a real sick run: `python experiments/train.py {' '.join(WORDS)}` (AdamW at a hundred times a "
        "sensible learning rate, 1 % of the batches broken, a CNN on 4000 real MNIST images; a full reading every 50 "
        "steps, far more "
        f"than the usual 5 %).",
        (
            "Every panel of the article's picture exists and is filled by a measurement with its error: at step "
            f"{first.step} the step "
            f"was {with_error(first.stability)} times its stability limit and overshot {with_error(first.overshoot)} times.",
            f"It acts instead of recommending: {damped.words() if damped else 'nothing was damped'}. It ends at a "
            "training loss "
            f"of {s.metrics['train_loss']:.3f} and {s.metrics['test_accuracy']:.1f} % test accuracy; bare AdamW in the "
            "same run "
            f"at {bare_loss} and {bare['test_accuracy']:.1f} %.",
        ),
        (
            'The article\'s panel says "recommended action: PAUSE & PERTURB" at three negative eigenvalues. In this run '
            f"{len(negative)} of {len(full)} full readings have some (delta up to {max(r.delta or 0 for r in full)}) "
            "while the loss "
            "falls, and nothing perturbs it: only a stall makes a saddle.",
            'Its "sharpness 75/100: use SAM" is no alarm either: a score of 100 is the edge of stability, where training often '
            "settles.",
        ),
        SEED,
    )
