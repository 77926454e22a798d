"""GrowCallback in Lightning's Trainer."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import morphc
from morphc import Lifecycle
from morphc.errors import ConfigError, NotMorphedError
from morphc.grow.controllers import Germinate

lightning = pytest.importorskip(
    "lightning.pytorch", reason="the Trainer is Lightning's: pip install 'morphc[lightning]'"
)

from morphc.integrations.lightning import GrowCallback  # noqa: E402

FAST = {
    "minimum_ticks": (3, 2, 1, 1, 2),
    "graft_ticks": 2,
    "min_isolated_improvement": -1.0,
    "min_contribution": -10.0,
    "cull_contribution": -20.0,
    "min_improvement": -10.0,
    "min_stability": 0.0,
    "min_final_stability": 0.0,
}
DRAW = torch.Generator().manual_seed(0)
X = torch.randn(64, 6, generator=DRAW)
Y = torch.tanh(X @ torch.randn(6, 4, generator=DRAW))
OPTIONS = {
    "max_epochs": 6,
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


@pytest.fixture(autouse=True)
def quiet():
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def net(**options) -> nn.Module:
    torch.manual_seed(1)
    host = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 4))
    config = morphc.Config(
        **{
            "seeds_per_layer": 1,
            "slots": 2,
            "rank": 3,
            "blueprint": "widen",
            "backend": "torch",
            **FAST,
            **options,
        }
    )
    return morphc.compile(host, (X[:2],), config=config)


class Module(lightning.LightningModule):
    """A regression; `manual` steps its optimizer itself."""

    def __init__(self, model: nn.Module, manual: bool = False) -> None:
        super().__init__()
        self.net = model
        self.automatic_optimization = not manual
        self.given: list[float] = []

    def training_step(self, batch, batch_idx):
        loss = (self.net(batch[0]) - batch[1]).square().mean()
        self.given.append(float(loss))
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            self.clip_gradients(optimizer, 0.5, "norm")
            optimizer.step()
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", (self.net(batch[0]) - batch[1]).square().mean())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


def loader(shuffle=False) -> DataLoader:
    return DataLoader(TensorDataset(X, Y), batch_size=8, shuffle=shuffle)


def callback(**options) -> GrowCallback:
    controller = morphc.ScheduleController([(4, Germinate("2", (0,), candidates=2))])
    return GrowCallback(controller, loss_of, tick_every=2, **options)


def loss_of(model: nn.Module) -> float:
    return float((model(X) - Y).square().mean())


def fit(folder, module, call, ckpt=None, **options):
    saves = lightning.callbacks.ModelCheckpoint(folder, every_n_epochs=1, save_top_k=-1, filename="{epoch}")
    trainer = lightning.Trainer(default_root_dir=folder, callbacks=[call, saves], **{**OPTIONS, **options})
    trainer.fit(module, loader(), loader(), ckpt_path=ckpt, weights_only=True if ckpt else None)
    return trainer


@pytest.mark.parametrize("way", ["automatic", "accumulated", "manual"])
def test_a_seed_grows_and_a_resume_goes_on_bit_for_bit(tmp_path, way):
    options = {"gradient_clip_val": 0.5} if way != "manual" else {}
    options |= {"accumulate_grad_batches": 2, "max_epochs": 12} if way == "accumulated" else {}
    moves = []
    call = callback(
        metric="val_loss", on_event=lambda event: moves.extend(t.target for t in event.transitions if t)
    )
    module = Module(net(), way == "manual")
    trainer = fit(tmp_path, module, call, **options)
    assert moves == [Lifecycle(number) for number in range(1, 8)]
    assert call.grower.steps == trainer.global_step == 48
    assert len(call.grower.metrics) == options.get("max_epochs", 6)
    first = module.given[:2] if way == "accumulated" else module.given[:1]
    parts = len(first)
    ticks = list(call.grower.losses.ticks)
    last = module.given[-2 * parts :]
    assert ticks[-1] == pytest.approx(sum(last) / len(last) / parts, rel=1e-5)

    other, again = callback(metric="val_loss"), Module(net(), way == "manual")
    fit(tmp_path / "again", again, other, str(tmp_path / "epoch=1.ckpt"), **options)
    for name, value in module.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert other.grower.state_dict()["losses"] == call.grower.state_dict()["losses"]
    assert other.grower.metrics == call.grower.metrics


def test_of_two_optimizers_the_one_that_trains_the_model_counts(tmp_path):
    class Two(Module):
        def __init__(self, model):
            super().__init__(model, manual=True)
            self.critic = nn.Linear(4, 1)

        def training_step(self, batch, batch_idx):
            one, other = self.optimizers()
            optimizer = one if batch_idx % 4 == 0 else other
            optimizer.zero_grad()
            loss = self.critic(self.net(batch[0])).square().mean()
            self.manual_backward(loss)
            optimizer.step()
            return {"loss": loss}

        def configure_optimizers(self):
            return [
                torch.optim.SGD(self.net.parameters(), 0.01),
                torch.optim.SGD(self.critic.parameters(), 0.01),
            ]

    call = callback()
    fit(tmp_path, Two(net()), call, max_epochs=2)
    assert call.grower.steps == 4


def test_a_manual_step_without_a_loss_says_what_to_return(tmp_path):
    class Silent(Module):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)

    with pytest.raises(ConfigError, match=r"Silent\.training_step returns no loss"):
        fit(tmp_path, Silent(net(), manual=True), callback(), max_epochs=1)


def test_a_metric_that_was_not_logged_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"metric='val_los' isn't.*Did you mean 'val_loss'"):
        fit(tmp_path, Module(net()), callback(metric="val_los"), max_epochs=1)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda m: setattr(m, "net", nn.Linear(6, 4)), NotMorphedError, r"Module holds no model with seeds.*compile"),
        (lambda m: setattr(m, "net", net(blueprint="depthwise")), ConfigError, r"Module\.net.* no slot for any"),
        (lambda m: setattr(m, "more", net()), ConfigError, "module='net' or 'more'"),
        (lambda m: setattr(m, "configure_optimizers", other_optimizer), ConfigError, "trains none of the"),
        (lambda m: setattr(m, "configure_optimizers", lambda: [torch.optim.SGD(m.net.parameters())] * 2), ConfigError,
         "optimizer=0 or 1"),
    ],
)  # fmt: skip
def test_a_model_that_can_not_grow_is_refused(tmp_path, change, error, message):
    module = Module(net(), manual=True)
    change(module)
    with pytest.raises(error, match=message):
        fit(tmp_path, module, callback(), max_epochs=1)


def other_optimizer():
    return torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1)


def test_the_older_name_of_the_package_is_served_too():
    pytest.importorskip("pytorch_lightning", reason="the older name: pip install pytorch-lightning")
    code = (
        "import pytorch_lightning, morphc.integrations.lightning as own; "
        "assert issubclass(own.GrowCallback, pytorch_lightning.Callback)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
