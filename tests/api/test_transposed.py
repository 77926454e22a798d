"""Transposed convolutions: what reads an input on another grid is refused, the rest works and folds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import morphc
from morphc import Config, Lifecycle
from morphc.errors import SeedError

# The last axis is as wide as the input's channels: a wrong axis would not show by its width.
HOSTS = {
    "alone": (lambda: nn.Sequential(nn.ConvTranspose1d(8, 6, 3, padding=1)), (4, 8, 8), "0"),
    "grouped in a block": (
        lambda: nn.Sequential(
            nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(4, 6, 3, groups=2)
        ),
        (2, 4, 5, 5),
        "2",
    ),
}


@pytest.fixture(params=HOSTS)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor, str]:
    make, shape, path = HOSTS[request.param]
    torch.manual_seed(0)
    return make(), torch.randn(shape), path


@pytest.mark.parametrize("blueprint", ["lowrank", "widen"])
def test_a_blueprint_that_reads_an_input_is_refused(
    case: tuple[nn.Module, Tensor, str], blueprint: str
) -> None:
    host, x, path = case
    model = morphc.compile(host, (x,), config=Config(seeds_per_layer=3, slots=3, blueprint=blueprint))
    site = next(site for site in morphc.report(model).plan.sites if site.path == path)
    assert site.slots == 0
    assert f"no {blueprint}: the layer is a transposed convolution" in site.note
    with pytest.raises(SeedError, match="transposed convolution"):
        morphc.seeds(model)[path].assign([0], Lifecycle.FINE_TUNING)


@pytest.mark.parametrize("blueprint", ["affine", "bottleneck", "depthwise"])
def test_a_blueprint_that_reads_its_chunk_trains_and_folds(
    case: tuple[nn.Module, Tensor, str], blueprint: str
) -> None:
    host, x, path = case
    model = morphc.compile(host, (x,), config=Config(seeds_per_layer=3, slots=3, blueprint=blueprint))
    seeds = morphc.seeds(model)
    seeds[path].assign([0], Lifecycle.FINE_TUNING)
    model(x).square().sum().backward()
    seeds.step_optimizer(lr=0.1)
    grown = model.eval()(x)
    assert not torch.equal(grown[:, :2], host.eval()(x)[:, :2])
    assert torch.equal(grown[:, 2:], host(x)[:, 2:])
    torch.testing.assert_close(morphc.fold(model)(x), grown, rtol=1e-5, atol=1e-5)
