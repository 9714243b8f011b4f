import torch
from accelerate import Accelerator

from adaptive_opt import AdaptiveOptimizer

accelerator, model, criterion = Accelerator(), torch.nn.Linear(8, 2), torch.nn.CrossEntropyLoss()
optimizer = AdaptiveOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-2), model, loss_fn=criterion)
model, prepared = accelerator.prepare(model, optimizer)
for _ in range(20):
    x = torch.randn(16, 8)
    prepared.zero_grad()
    accelerator.backward(criterion(model(x), (x[:, 0] > 0).long()))
    accelerator.clip_grad_norm_(model.parameters(), 1.0)
    prepared.step()
print(optimizer.reading)
