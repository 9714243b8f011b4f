"""python experiments/quickstart.py: the README's example."""

import torch
from sklearn.datasets import load_digits
from torch.optim import AdamW
from torch.utils.data import DataLoader, TensorDataset

from adaptive_opt import AdaptiveOptimizer
from adaptive_opt.telemetry import ConsoleSink

torch.manual_seed(0)
digits = load_digits()
x, y = torch.tensor(digits.data / 16.0, dtype=torch.float32), torch.tensor(digits.target)
loader = DataLoader(TensorDataset(x, y), batch_size=64, shuffle=True)
model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
criterion = torch.nn.CrossEntropyLoss()

base = AdamW(model.parameters(), lr=1.0)  # a thousand times too much
optimizer = AdaptiveOptimizer(base, model, loss_fn=criterion, sinks=[ConsoleSink()])
for epoch in range(10):
    for inputs, labels in loader:
        optimizer.zero_grad()
        loss = criterion(model(inputs), labels)
        loss.backward()
        optimizer.step()
    print(f"epoch {epoch}: loss {loss.item():.3f}, effective lr {optimizer.report.lr * optimizer.report.lr_scale:.2g}")
print(optimizer.reading)  # the latest measurement: every number with its error, None where it was not measured
