"""A finished model to look at before it is shipped: `python experiments/finished.py` trains and saves it, then

python -m adaptive_opt checkup experiments/finished.py:build --checkpoint runs/finished.pt
"""

import sys
from pathlib import Path

import torch
from torch.optim import AdamW
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from experiments.tasks.mnist import MNIST, images

CHECKPOINT = Path("runs/finished.pt")


def build() -> tuple[torch.nn.Module, torch.nn.Module, DataLoader]:
    """(model, loss_fn, data): what `checkup` measures; 512 real MNIST images that the model was not trained on."""
    x, y = images()
    return MNIST().model, torch.nn.CrossEntropyLoss(), DataLoader(TensorDataset(x[4000:4512], y[4000:4512]), batch_size=128)


def main() -> None:
    task = MNIST()
    optimizer = AdamW(task.model.parameters(), lr=1e-3)
    for step in range(task.steps):
        x, y = task.batch(step)
        optimizer.zero_grad()
        task.loss_fn(task.model(x), y).backward()
        optimizer.step()
    CHECKPOINT.parent.mkdir(exist_ok=True)
    torch.save(task.model.state_dict(), CHECKPOINT)
    print(f"saved {CHECKPOINT}")


if __name__ == "__main__":
    main()
