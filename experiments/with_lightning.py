import lightning.pytorch as pl
import torch

from adaptive_opt import AdaptiveOptimizer
from adaptive_opt.integrations.lightning import LogReadings


class Module(pl.LightningModule):
    net, criterion = torch.nn.Linear(8, 2), torch.nn.CrossEntropyLoss()

    def training_step(self, batch, _):
        return self.criterion(self.net(batch), (batch[:, 0] > 0).long())

    def configure_optimizers(self):
        return AdaptiveOptimizer(torch.optim.AdamW(self.net.parameters()), self.net, loss_fn=self.criterion)


pl.Trainer(max_steps=20, callbacks=[LogReadings()]).fit(Module(), torch.utils.data.DataLoader(torch.randn(320, 8), 16))
