"""`morphc.enlarge`: more slots, nothing else changed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import morphc
from morphc import Config, Lifecycle
from morphc.errors import ConfigError, SeedError


def build() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))


@pytest.fixture
def x() -> Tensor:
    return torch.randn(8, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def model(x: Tensor) -> nn.Sequential:
    """Two sites of 8 seeds and 2 slots for each of two blueprints, both slots of one bank trained for a step."""
    config = Config(seeds_per_layer=8, slots=2, blueprint=("affine", "bottleneck"))
    made = morphc.compile(build(), (x,), config=config)
    seeds = morphc.seeds(made)
    seeds["0"].assign([1, 5], Lifecycle.FINE_TUNING, blueprint="bottleneck")
    made(x).square().sum().backward()
    seeds.step_optimizer(lr=0.1)
    return made


def test_what_the_slots_hold_is_kept(model: nn.Sequential, x: Tensor) -> None:
    before = model(x)
    moments = morphc.seeds(model)["0"].slots["bottleneck"].opt.exp_avg_out_bias.clone()
    assert morphc.enlarge(model, slots=6) is model
    assert torch.equal(model(x), before)
    bank = morphc.seeds(model)["0"].slots["bottleneck"]
    assert bank.slots == 6
    assert torch.equal(bank.opt.exp_avg_out_bias[:2], moments)


def test_new_slots_can_be_taken_and_old_ones_given_back(model: nn.Sequential, x: Tensor) -> None:
    handle = morphc.seeds(model)["0"]
    with pytest.raises(SeedError, match="enlarge"):
        handle.assign([2, 3, 4], Lifecycle.FINE_TUNING, blueprint="bottleneck")
    morphc.enlarge(model, slots=6)
    handle.assign([2, 3, 4], Lifecycle.FINE_TUNING, blueprint="bottleneck")
    handle.assign([1], Lifecycle.CULLED)
    assert handle.slots["bottleneck"].owner.tolist() == [-1, 5, 2, 3, 4, -1]
    model(x).square().sum().backward()
    morphc.seeds(model).step_optimizer(lr=0.1)
    assert handle.slots["bottleneck"].opt.step.tolist() == [0, 2, 1, 1, 1, 0]


def test_no_site_gets_more_slots_than_seeds_and_none_loses_any(model: nn.Sequential) -> None:
    morphc.enlarge(model, slots=100)
    morphc.enlarge(model, slots=1)
    assert [site.slots for site in morphc.report(model).plan.sites] == [8, 8]


def test_an_enlarged_model_is_saved_and_loaded(model: nn.Sequential, x: Tensor, tmp_path: Path) -> None:
    morphc.enlarge(model, slots=6)
    morphc.save(model, tmp_path / "checkpoint")
    again = morphc.load(build(), tmp_path / "checkpoint")
    assert torch.equal(again(x), model(x))


@pytest.mark.parametrize("slots", [0, -1, 2.0, True])
def test_a_bad_number_of_slots_is_refused(model: nn.Sequential, slots: int) -> None:
    with pytest.raises(ConfigError, match="slots="):
        morphc.enlarge(model, slots=slots)
