"""`torch.jit.trace` of a model with seeds in use gives what the model gives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import morphc
from morphc import Config, Lifecycle
from morphc.errors import SeedError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")


class Residual(nn.Module):
    """A block, a functional layer behind it, and a sum that ties the state to the root's children."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(12, 20)
        self.down = nn.Linear(20, 12)
        self.weight = nn.Parameter(torch.randn(12, 12) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + nn.functional.linear(self.down(torch.relu(self.up(x))), self.weight)


def convolutions() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 3, padding=1))


def grown(host: nn.Module, x: Tensor, blueprint: str, state: Lifecycle, blend: str = "residual") -> nn.Module:
    config = Config(seeds_per_layer=3, slots=3, blueprint=blueprint, blend=blend, telemetry_every=2)
    model = morphc.compile(host, (x,), config=config, verify=False)
    seeds = morphc.seeds(model)
    taken = 0
    for site in seeds.sites.values():
        try:
            site.assign([0, 2], state)
            taken += 1
        except SeedError:
            continue
    assert taken
    model(x).square().mean().backward()
    seeds.step_optimizer(lr=0.1)
    return model


@pytest.mark.parametrize("gradients", [True, False], ids=["grad", "no grad"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("state", [Lifecycle.TRAINING, Lifecycle.FINE_TUNING], ids=lambda s: s.name)
@pytest.mark.parametrize("blueprint", ["affine", "bottleneck", "lowrank", "widen", "depthwise"])
def test_a_trace_gives_what_the_model_gives(blueprint, state, training, gradients):
    host, x = (
        (convolutions(), torch.randn(2, 3, 5, 5))
        if blueprint == "depthwise"
        else (Residual(), torch.randn(3, 12))
    )
    model = grown(host, x, blueprint, state).train(training)
    with torch.set_grad_enabled(gradients):
        traced = torch.jit.trace(model, (x,))
        for again in (x, torch.cat((x, x + 1))):
            torch.testing.assert_close(traced(again), model(again))
    if state is Lifecycle.FINE_TUNING:
        assert not torch.allclose(model(x), host(x))


def test_seeds_that_train_and_seeds_that_blend_trace_together():
    x = torch.randn(3, 12)
    model = grown(Residual(), x, "lowrank", Lifecycle.FINE_TUNING, "gate")
    morphc.seeds(model)["up"].assign([2], Lifecycle.TRAINING)
    torch.testing.assert_close(torch.jit.trace(model, (x,))(x), model(x))


def test_the_hosts_gradients_pass_through_a_trace():
    x = torch.randn(3, 12)
    model = grown(Residual(), x, "lowrank", Lifecycle.STABILIZATION)
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    expected = torch.autograd.grad(model(x).square().sum(), list(own.values()))
    traced = torch.jit.trace(model, (x,))
    copies = dict(traced.named_parameters())
    got = torch.autograd.grad(traced(x).square().sum(), [copies[name] for name in own])
    torch.testing.assert_close(got, expected)
