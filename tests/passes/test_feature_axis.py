"""Where a layer's features are, when its type alone doesn't settle it."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compiler_hosts import assert_same, compiled, misses_of, sites_of
from torch import Tensor, nn

import morphc
from morphc.config import KINDS, Config

ALL = Config(seeds_per_layer=2, slots=2, kinds=KINDS, telemetry_every=1)


class TurnedLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).transpose(1, 2)


class TurnedNorm(nn.LayerNorm):
    """Hands out [B, C, T] of [B, T, C]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).permute(0, 2, 1)


class ChannelNorm(nn.LayerNorm):
    """ConvNeXt's: over the channels of [N, C, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps).permute(0, 3, 1, 2)


class SwitchedNorm(nn.Module):
    """A norm by its name alone, with the axis as an option."""

    def __init__(self, width: int, first: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width))
        self.first = first

    def forward(self, x: Tensor) -> Tensor:
        if self.first:
            return x / (x.square().mean(1, keepdim=True) + 1e-6).sqrt() * self.weight[:, None]
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * self.weight


class RMSNorm(SwitchedNorm):
    pass


class LastConv(nn.Conv2d):
    """Hands its channels out last."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).permute(0, 2, 3, 1)


class LookAlike(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, out) / 3)
        self.out = out

    def forward(self, x: Tensor) -> Tensor:
        return torch.matmul(x.reshape(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], self.out)


class Pinned(nn.Linear):
    """Takes one size of input only."""

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1] == self.out_features
        return super().forward(x).transpose(1, 2)


class Pooled(nn.Linear):
    """[B, T, C] to [B, T]: nothing of its features is left."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).sum(-1)


def one(layer: nn.Module, *shape: int, config: Config = ALL) -> tuple[Any, nn.Module, Tensor]:
    torch.manual_seed(0)
    host = nn.Sequential(layer, nn.Flatten())
    x = torch.randn(*shape)
    return compiled(host, x, config=config), host, x


@pytest.mark.parametrize(
    ("layer", "shape", "axis"),
    [
        (TurnedLinear(3, 5), (2, 4, 3), -2),
        (TurnedLinear(3, 5), (2, 5, 3), -2),
        (TurnedLinear(5, 5), (5, 5, 5), -2),
        (TurnedNorm(5), (2, 4, 5), -2),
        (TurnedNorm(5), (2, 5, 5), -2),
        (ChannelNorm(5), (2, 5, 3, 4), -3),
        (ChannelNorm(5), (2, 5, 5, 5), -3),
        (RMSNorm(5, True), (5, 5, 5), -2),
        (RMSNorm(5, False), (5, 5, 5), -1),
        (LookAlike(3, 5), (2, 5, 3), -1),
        (LookAlike(5, 5), (5, 5, 5), -1),
        (nn.Linear(5, 5), (5, 5, 5), -1),
        (nn.Conv1d(5, 5, 3, padding=1), (5, 5, 5), -2),
        (nn.InstanceNorm1d(5, affine=True), (2, 5, 5), -2),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
)
def test_the_axis_is_where_the_features_are(layer, shape, axis):
    result, host, x = one(layer, *shape)
    site = sites_of(result)["0"]
    assert site.feature_axis % len(host[0](x).shape) == axis % len(host[0](x).shape)
    assert_same(host, result.model, x)
    # What telemetry says of a seed is of that axis, taken by hand.
    model = result.model.train()
    morphc.seeds(model).reset_telemetry()
    model(x)
    y = host[0](x).detach().movedim(site.feature_axis, 0).double()
    means = torch.stack([part.mean() for part in y.tensor_split(2)])
    assert torch.allclose(morphc.seeds(model)["0"].telemetry()["mean"], means, atol=1e-6)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [(TurnedLinear(3, 6), (2, 6, 3)), (TurnedLinear(3, 6), (2, 4, 3)), (ChannelNorm(6), (2, 6, 6, 6))],
    ids=["equal", "unequal", "channels first"],
)
def test_a_seed_at_a_turned_layer_changes_its_own_features_alone(layer, shape):
    result, host, x = one(layer, *shape, config=Config(seeds_per_layer=2, kinds=KINDS))
    seeds = morphc.seeds(result.model)
    seeds["0"].assign([1], morphc.Lifecycle.FINE_TUNING)
    bank = seeds["0"].slots["bottleneck"]
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    changed = (result.model[0](x) != host[0](x)).movedim(sites_of(result)["0"].feature_axis, 0)
    assert not changed[:3].any()
    assert changed[3:].any()
    folded = morphc.fold(result.model)
    assert torch.allclose(folded.eval()(x), result.model.eval()(x), atol=1e-5)


@pytest.mark.parametrize(
    ("layer", "shape", "reason"),
    [
        (Pinned(3, 5), (2, 5, 3), r"its output is \[2, 5, 5\]: axes 1 and 2 both have 5 features"),
        (LastConv(2, 5, 1), (2, 2, 5, 5), r"its features are at axis -1, where those of .*'conv' are at -3"),
        (LastConv(2, 5, 1), (2, 2, 3, 4), r"its features are at axis -1, where those of .*'conv' are at -3"),
        (Pooled(3, 5), (2, 5, 3), r"its output is \[2, 5\], and each axis of 5 grows with its input"),
    ],
    ids=["pinned", "conv", "conv unequal", "pooled"],
)
def test_what_stays_open_gets_no_site_and_says_why(layer, shape, reason):
    result, host, x = one(layer, *shape)
    assert "0" not in sites_of(result)
    assert re.search(reason, misses_of(result)["0"].reason)
    assert_same(host, result.model, x)


def test_a_forward_put_on_an_instance_is_asked_too():
    layer = nn.Linear(3, 5)
    layer.forward = lambda x: F.linear(x, layer.weight, layer.bias).transpose(1, 2)
    result, *_ = one(layer, 2, 5, 3)
    assert "0" not in sites_of(result) or sites_of(result)["0"].feature_axis == -2


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_a_host_recorded_on_fake_tensors_is_asked_as_well(device):
    with torch.device(device):
        host = nn.Sequential(TurnedLinear(4, 8), nn.Linear(8, 8))
        found = morphc.compiler.compile_program(host, (torch.empty(2, 8, 4),), config=ALL, verify=False)
    assert [site.feature_axis for site in found.report.plan.sites] == [-2, -1]


def test_a_layer_that_changes_itself_is_as_it_was():
    class Counting(nn.Linear):
        def __init__(self) -> None:
            super().__init__(3, 5)
            self.register_buffer("seen", torch.zeros(1))
            self.calls = [0]

        def forward(self, x: Tensor) -> Tensor:
            self.seen += 1
            self.calls[0] += 1
            self.weight.data.mul_(1.5)
            return super().forward(x)

    layer = Counting()
    before = layer.weight.detach().clone()
    compiled(nn.Sequential(layer), torch.randn(2, 5, 3), config=ALL)
    assert layer.seen.item() == 0
    assert layer.calls == [0]
    assert torch.equal(layer.weight, before)


def test_equal_layers_are_run_once(monkeypatch):
    from morphc.passes.axes import Probe

    runs = []
    original = Probe._growing
    monkeypatch.setattr(Probe, "_growing", lambda *args: runs.append(1) or original(*args))
    host = nn.Sequential(*[RMSNorm(5, False) for _ in range(6)], RMSNorm(5, True), nn.Linear(5, 5))
    result = compiled(host, torch.randn(2, 5, 5), config=ALL)
    assert len(runs) == 2
    assert [site.feature_axis for site in result.report.plan.sites] == [-1] * 6 + [-2, -1]


@pytest.mark.parametrize(
    ("equation", "weight", "site"),
    [
        ("bti,io->bto", (4, 4), True),
        ("bti,oi->bto", (4, 4), True),
        ("bti,io->bot", (4, 4), False),
        ("...i,io->...o", (4, 4), True),
        ("bti,oi", (4, 4), True),
        ("bti,ti->bti", (4, 4), False),
    ],
)
def test_an_einsum_is_read_by_its_letters(equation, weight, site):
    class Host(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(weight))

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(torch.einsum(equation, x, self.weight)) + 1

    # "bti,oi" sums i alone: implicit results have their letters in order, b, o, t.
    wanted = site and equation != "bti,oi"
    host, x = Host(), torch.randn(4, 4, 4)
    result = compiled(host, x, config=ALL)
    assert ("weight" in sites_of(result)) is wanted
    if not wanted:
        assert "isn't its last one" in misses_of(result)["weight"].reason
    assert_same(host, result.model, x)


def test_a_vector_as_weight_leaves_no_features():
    class Host(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4))

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(torch.matmul(x, self.weight)) + 1

    result = compiled(Host(), torch.randn(4, 4, 4), config=ALL)
    assert not sites_of(result)
    assert "one vector" in misses_of(result)["weight"].reason


@pytest.mark.parametrize("by_weight", [True, False])
def test_a_tensordot_is_watched_where_its_last_axis_is_the_weights(by_weight):
    class Host(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            operands = (x, self.weight) if by_weight else (self.weight, x)
            return torch.relu(torch.tensordot(*operands, dims=1)) + 1

    host, x = Host(), torch.randn(4, 4)
    result = compiled(host, x, config=ALL)
    assert ("weight" in sites_of(result)) is by_weight
    assert_same(host, result.model, x)
