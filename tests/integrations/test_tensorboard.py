"""Growth in a writer of the user's own."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

import morphc
from morphc import Lifecycle
from morphc.errors import ConfigError, NotMorphedError
from morphc.integrations.tensorboard import log


class Writer:
    """Remembers what was written, and refuses what TensorBoard would."""

    def __init__(self) -> None:
        self.scalars: dict[str, tuple[float, int]] = {}
        self.histograms: dict[str, tuple[torch.Tensor, int]] = {}

    def add_scalar(self, tag, value, step):
        self.scalars[tag] = (float(value), step)

    def add_histogram(self, tag, values, step):
        assert values.numel()
        assert values.isfinite().all()
        self.histograms[tag] = (values, step)


def grown() -> nn.Module:
    torch.manual_seed(0)
    config = morphc.Config(seeds_per_layer=2, slots=2, rank=3, blueprint="bottleneck", telemetry_every=1)
    return morphc.compile(
        nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)), (torch.ones(2, 6),), config=config
    )


def train(model: nn.Module) -> morphc.Grower:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    grower = morphc.Grower(model, optimizer, morphc.ScheduleController([]), lambda net: 1.0, tick_every=2)
    morphc.seeds(model)["2"].assign([1], Lifecycle.GRAFTING, alpha=0.25)
    for _ in range(4):
        optimizer.zero_grad()
        loss = model(torch.randn(16, 6)).square().mean()
        loss.backward()
        optimizer.step()
        grower.step(loss)
    return grower


def test_scalars_and_histograms_of_a_grower():
    grower, writer = train(grown()), Writer()
    log(writer, grower)
    assert {step for _, step in (*writer.scalars.values(), *writer.histograms.values())} == {4}
    assert writer.scalars["morphc/seeds/DORMANT"][0] == 3
    assert writer.scalars["morphc/seeds/GRAFTING"][0] == 1
    assert writer.scalars["morphc/2[1]/state"][0] == Lifecycle.GRAFTING
    assert writer.scalars["morphc/2[1]/alpha"][0] == pytest.approx(float(grower.seeds.alpha[3]))
    assert writer.scalars["morphc/2[1]/gradient_ratio"][0] == pytest.approx(
        grower.learning()["2", 1]["gradient_ratio"]
    )
    assert writer.scalars["morphc/loss"][0] == grower.losses.latest
    assert "morphc/stability" not in writer.scalars  # two ticks are too few to say
    assert torch.equal(writer.histograms["morphc/0/variance"][0], grower.measuring.health["variance"][:2])
    assert writer.histograms["morphc/2/bottleneck/in_weight"][0].numel() == 2 * 3
    assert "morphc/0/bottleneck/in_weight" not in writer.histograms


def test_a_model_alone_is_logged_at_the_step_that_is_told():
    model, writer = grown(), Writer()
    model.train()(torch.randn(16, 6))
    log(writer, model, 7, prefix="grown", histograms=False)
    assert writer.scalars["grown/seeds/DORMANT"] == (4, 7)
    assert not writer.histograms
    log(writer, model, 8)
    assert writer.histograms["morphc/2/variance"][1] == 8


def test_wrong_use_is_named():
    with pytest.raises(ConfigError, match="a StringIO has no add_scalar"):
        log(__import__("io").StringIO(), grown(), 1)
    with pytest.raises(ConfigError, match="needs step="):
        log(Writer(), grown())
    with pytest.raises(NotMorphedError, match=r"morphc\.compile"):
        log(Writer(), nn.Linear(2, 2), 1)


def test_a_real_writer_takes_it(tmp_path):
    pytest.importorskip("tensorboard", reason="needs TensorBoard: pip install tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        log(writer, train(grown()))
    (file,) = tmp_path.iterdir()
    assert b"morphc/2[1]/alpha" in file.read_bytes()


@pytest.mark.parametrize(
    ("module", "missing", "extra"),
    [("hf", ("transformers",), "hf"), ("lightning", ("lightning.pytorch", "pytorch_lightning"), "lightning")],
)
def test_a_missing_package_is_named_with_how_to_install_it(monkeypatch, module, missing, extra):
    monkeypatch.delitem(sys.modules, f"morphc.integrations.{module}", raising=False)
    for name in missing:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=rf"pip install 'morphc\[{extra}\]'"):
        __import__(f"morphc.integrations.{module}")
