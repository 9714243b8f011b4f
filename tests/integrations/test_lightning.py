"""Lightning: `configure_optimizers`, the precisions, accumulation and clipping, manual optimization, the log, resume."""

import warnings

import pytest
import torch
from bases import FIVE
from problems import make
from torch import nn

with warnings.catch_warnings():  # what its import says of other packages is not ours
    warnings.simplefilter("ignore")
    import lightning.pytorch as pl
    from lightning.pytorch.loggers import CSVLogger
    from lightning.pytorch.plugins.precision import MixedPrecision

from adaptive_opt import AdaptiveOptimizer, ConstantPolicy, LanczosProbe
from adaptive_opt.integrations.lightning import LogReadings
from adaptive_opt.integrations.unwrap import wrapper_in

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),  # its advice
    pytest.mark.filterwarnings("ignore:.*fp16 is not supported on CPU.*"),
    pytest.mark.filterwarnings("ignore:.*treespec.*:FutureWarning"),
]
IDLE = {"probe": LanczosProbe(every=3, num_steps=3), "policy": ConstantPolicy("base")}
RULES = {"probe": LanczosProbe(overhead=1.0, num_steps=3, price=1.0)}


class Module(pl.LightningModule):
    """The module of Lightning's documentation; the optimizer alone differs."""

    def __init__(self, base="adamw", wrapped=IDLE, name="cnn"):
        super().__init__()
        self.problem = make(name, 24, batch=8)
        self.net, self.criterion = self.problem.model, self.problem.criterion
        self.base, self.wrapped = base, wrapped

    def training_step(self, batch, _):
        x, y = batch
        return self.criterion(self.net(x), y)

    def configure_optimizers(self):
        optimizer = FIVE[self.base](self.parameters())
        if self.wrapped is not None:
            optimizer = AdaptiveOptimizer(optimizer, self.net, loss_fn=self.criterion, **self.wrapped)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def train_dataloader(self):
        return torch.utils.data.DataLoader(self.problem.batches, batch_size=None)


def fit(module, folder, steps=24, ckpt_path=None, callbacks=(), **kwargs):
    torch.manual_seed(1)
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=steps, default_root_dir=folder, enable_progress_bar=False, enable_model_summary=False,
        callbacks=list(callbacks), **{"logger": False, "enable_checkpointing": False, **kwargs},
    )  # fmt: skip
    trainer.fit(module, ckpt_path=ckpt_path)
    return trainer


def assert_same(a, b):
    for (key, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(x, y), key


def scaled():
    """16-mixed with a gradient scaler; asked for by name, Lightning takes bfloat16 on a CPU."""
    return {"plugins": MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10))}


OPTIONS = {
    "32": lambda: {"precision": "32-true"},
    "bf16-mixed": lambda: {"precision": "bf16-mixed"},
    "16-mixed on a CPU": lambda: {"precision": "16-mixed"},
    "16-mixed with a scaler": scaled,
    "clipping": lambda: {"gradient_clip_val": 0.1},
    "accumulation": lambda: {"accumulate_grad_batches": 3, "steps": 8},
    "accumulation and clipping, bf16": lambda: {
        "accumulate_grad_batches": 3, "steps": 8, "gradient_clip_val": 0.1, "precision": "bf16-mixed"
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("base", "options"),
    [
        *(("adamw", options) for options in OPTIONS),
        *((base, options) for base in FIVE if base != "adamw" for options in ("clipping", "16-mixed with a scaler")),
    ],
)
def test_a_probed_fit_equals_the_bare_one_bit_for_bit(tmp_path, base, options):
    bare, probed = Module(base, None), Module(base)
    fit(bare, tmp_path, **OPTIONS[options]())
    trainer = fit(probed, tmp_path, **OPTIONS[options]())
    optimizer = wrapper_in(trainer.optimizers[0])
    assert optimizer.steps == trainer.global_step
    assert optimizer.control.gate.trusted is True
    assert base == "lion" or optimizer.reading.stability > 0
    assert_same(bare.net, probed.net)


@pytest.mark.parametrize("wrapped", [IDLE, RULES, {"policy": ConstantPolicy("kfac")}], ids=["base", "rules", "kfac"])
def test_a_resumed_fit_goes_on_bit_for_bit(tmp_path, wrapped):
    class BySteps(Module):  # a loader's place and dropout's generator are not the optimizer's to put back
        def training_step(self, batch, n):
            torch.manual_seed(self.trainer.global_step)
            return super().training_step(self.problem.batches[self.trainer.global_step], n)

    whole, begun, resumed = (BySteps(wrapped=wrapped) for _ in range(3))
    a = fit(whole, tmp_path)
    fit(begun, tmp_path, steps=9).save_checkpoint(tmp_path / "begun.ckpt")
    b = fit(resumed, tmp_path, ckpt_path=tmp_path / "begun.ckpt")
    a, b = (wrapper_in(t.optimizers[0]) for t in (a, b))
    assert a.steps == b.steps == 24
    assert (a.reading is None) is (b.reading is None)
    assert a.reading is None or (a.reading.step, a.reading.stability) == (b.reading.step, b.reading.stability)
    assert_same(whole.net, resumed.net)


def test_readings_reach_the_trainers_logger(tmp_path):
    logger = CSVLogger(tmp_path)
    trainer = fit(Module(), tmp_path, logger=logger, callbacks=[LogReadings()])
    lines = [m for m in logger.experiment.metrics if "adaptive/reading/stability" in m] or _saved(logger)
    assert len(lines) == 8
    assert float(lines[-1]["adaptive/reading/stability"]) == pytest.approx(trainer.optimizers[0].reading.stability)


def _saved(logger):
    import csv
    from pathlib import Path

    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        return [row for row in csv.DictReader(file) if row.get("adaptive/reading/stability")]


def test_two_wrapped_optimizers_in_manual_optimization(tmp_path):
    class Two(Module):
        automatic_optimization = False

        def __init__(self):
            super().__init__(name="mlp")
            torch.manual_seed(3)
            self.other = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 4))

        def training_step(self, batch, _):
            x, y = batch
            for optimizer, net in zip(self.optimizers(), (self.net, self.other), strict=True):
                optimizer.zero_grad()
                self.manual_backward(self.criterion(net(x), y))
                optimizer.step()

        def configure_optimizers(self):
            nets = (self.net, self.other)
            return [AdaptiveOptimizer(FIVE["adamw"](n.parameters()), n, loss_fn=self.criterion, **IDLE) for n in nets]

    trainer = fit(Two(), tmp_path, callbacks=[LogReadings()])
    for proxy in trainer.lightning_module.optimizers():
        optimizer = wrapper_in(proxy)
        assert optimizer is not proxy
        assert optimizer.control.gate.trusted is True
        assert optimizer.reading is not None
