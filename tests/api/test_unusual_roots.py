"""Roots that look at their own children, and parameters with names that morphc uses itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import morphc
from morphc import Config


class WalksItsChildren(nn.Module):
    """Whatever stands among its children is run."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        for child in self.children():
            x = child(x).relu()
        return x


class WalksElsewhere(WalksItsChildren):
    """The same, in a method that forward calls."""

    def forward(self, x: Tensor) -> Tensor:
        return self.walked(x)

    def walked(self, x: Tensor) -> Tensor:
        for _, child in self.named_children():
            x = child(x).tanh()
        return x


class OwnParameter(nn.Module):
    """A functional layer in the root, its parameter named as asked."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.register_parameter(name, nn.Parameter(torch.randn(4, 4)))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, getattr(self, self.name)).relu()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("make", [WalksItsChildren, WalksElsewhere])
def test_a_root_that_walks_its_children_meets_only_its_own(make: type[nn.Module], x: Tensor) -> None:
    host = make()
    model = morphc.compile(host, (x,), config=Config(seeds_per_layer=2))
    assert torch.equal(model(x), host(x))
    assert [name for name, _ in model.named_children()] == ["first", "second"]
    assert [site.path for site in morphc.report(model).plan.sites] == ["first", "second"]
    state = model.state_dict()
    assert "morphc.seeds.lifecycle" in state
    model.load_state_dict(state, strict=True)
    morphc.seeds(model)["first"].assign([0], morphc.Lifecycle.FINE_TUNING)
    assert list(morphc.detach(model).state_dict()) == list(host.state_dict())


@pytest.mark.parametrize("name", ["w", "weight", "store", "site", "seeds", "slots", "children_"])
def test_a_functional_layer_may_be_named_like_something_of_ours(name: str, x: Tensor) -> None:
    host = OwnParameter(name)
    model = morphc.compile(host, (x,), config=Config(seeds_per_layer=2, telemetry_every=1))
    assert torch.equal(model.eval()(x), host(x))
    assert list(morphc.seeds(model).sites) == [name]
    assert "morphc.seeds.lifecycle" in model.state_dict()
    model.train()(x)
    assert morphc.seeds(model).telemetry()["count"].tolist() == [6, 6]


def test_without_verification_no_graph_takes_the_place_of_a_forward(x: Tensor) -> None:
    for verify, runs in ((True, True), (False, False)):
        model = morphc.compile(OwnParameter("w"), (x,), config=Config(seeds_per_layer=2), verify=verify)
        assert [region.runs for region in morphc.report(model).plan.regions] == [runs]
        assert list(morphc.seeds(model).sites) == ["w"]


def test_a_rewritten_root_can_be_exported(x: Tensor) -> None:
    host = OwnParameter("w").eval()
    model = morphc.compile(host, (x,), config=Config(seeds_per_layer=2))
    exported = torch.export.export(model, (x,)).module()
    assert torch.equal(exported(x), host(x))


def test_a_functional_layer_of_a_root_that_hides_its_sites_follows_train_and_eval(x: Tensor) -> None:
    class Both(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Linear(4, 4))
            self.w = nn.Parameter(torch.randn(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(F.linear(x, self.w))

    host = Both()
    model = morphc.compile(host, (x,), config=Config(seeds_per_layer=2, telemetry_every=1))
    assert len(model) == 1
    assert torch.equal(model.eval()(x), host(x))
    assert morphc.seeds(model).telemetry()["count"].tolist() == [0, 0, 0, 0]
    model.train()(x)
    assert morphc.seeds(model).telemetry()["count"].tolist() == [6, 6, 6, 6]
