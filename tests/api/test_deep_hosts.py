"""Hosts whose modules are nested so deeply that they come near to Python's recursion limit by themselves."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import morphc
from morphc import Config
from morphc.passes import quiet
from morphc.passes.verify import same_bits

DEPTH = 200


class Residual(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.inner = Residual(depth - 1) if depth else nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.inner(self.layer(x))
        return y


class FunctionalResidual(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3) / 10)
        self.inner = FunctionalResidual(depth - 1) if depth else nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.inner(F.linear(x, self.weight))
        return y


def nested(depth: int) -> nn.Module:
    host: nn.Module = nn.Linear(3, 3)
    for _ in range(depth):
        host = nn.Sequential(host)
    return host


def compiled(host: nn.Module) -> nn.Module:
    return morphc.compile(host, (torch.randn(2, 3),), config=Config(seeds_per_layer=1, slots=1))


@pytest.mark.parametrize(
    ("make", "depth", "sites"), [(nested, DEPTH, 1), (Residual, DEPTH // 2, DEPTH // 2 + 1)]
)
def test_a_deep_host_is_compiled_folded_detached_and_saved(
    make: type, depth: int, sites: int, tmp_path: Path
) -> None:
    host = make(depth)
    limit = sys.getrecursionlimit()
    model = compiled(host)
    assert sys.getrecursionlimit() == limit
    report = morphc.report(model)
    assert len(report.plan.sites) == sites
    assert "as_written" not in {region.level for region in report.plan.regions}
    assert report.plan.sites[0].path in str(report)
    x = torch.randn(2, 3)
    assert same_bits(model(x), host(x))
    seeds = morphc.seeds(model)
    seeds[report.plan.sites[-1].path].assign([0], morphc.Lifecycle.FINE_TUNING, blueprint="bottleneck")
    assert torch.allclose(morphc.fold(model)(x), model(x), atol=1e-6)
    assert same_bits(morphc.detach(model)(x), host(x))
    morphc.save(model, tmp_path)
    assert same_bits(morphc.load(host, tmp_path)(x), model(x))


def test_a_host_too_deep_to_be_watched_runs_as_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quiet, "_DEEPER", 1)
    host = nested(DEPTH)
    model = compiled(host)
    plan = morphc.report(model).plan
    assert [site.layer_class for site in plan.sites] == ["Linear"]
    assert {region.level for region in plan.regions} == {"as_written"}
    assert "nested too deeply to be watched" in plan.regions[0].reason
    assert "nested too deeply to be watched" in plan.sites[0].note
    x = torch.randn(2, 3)
    assert same_bits(model(x), host(x))


def test_sites_that_would_nest_calls_too_deeply_are_left_out_and_named_shortly() -> None:
    host = FunctionalResidual(DEPTH)
    model = compiled(host)
    report = morphc.report(model)
    (line,) = (line for line in report.verification if "RecursionError" in line)
    assert f"{DEPTH - 3} more" in line
    x = torch.randn(2, 3)
    assert same_bits(model(x), host(x))


def test_a_host_that_calls_itself_for_ever_is_to_blame() -> None:
    class Endless(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self(self.layer(x))
            return y

    limit = sys.getrecursionlimit()
    with pytest.raises(morphc.errors.HostForwardError, match="RecursionError"):
        compiled(Endless())
    assert sys.getrecursionlimit() == limit
