"""Hosts whose own code reaches around their layers: hooks that leave values behind, wrappers, replaced heads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import morphc
from morphc import Config
from morphc.errors import FoldError


class LeftByAHook(nn.Module):
    """The forward reads what a hook, a closure over the module, has left there."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 6)
        self.left: Tensor | None = None

        def hook(module: nn.Module, inputs: object, output: Tensor) -> None:
            self.left = output

        self.layer.register_forward_hook(hook)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y + (self.left if self.left is not None else 0)


class Wrapper(nn.Module):
    """Hands on what it doesn't know to the module inside."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def __getattr__(self, name: str) -> object:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def test_a_hook_over_the_host_is_one_over_the_clone() -> None:
    host = LeftByAHook()
    model = morphc.compile(host, (torch.randn(3, 4),), config=Config(seeds_per_layer=2))
    for _ in range(2):
        x = torch.randn(3, 4)
        assert torch.equal(model(x), host(x))
    kept = host.left
    model(torch.randn(3, 4))
    assert host.left is kept, "the host's own value is the host's"


@pytest.mark.parametrize("depth", [1, 2])
def test_a_wrapper_that_hands_on_attributes(depth: int) -> None:
    host: nn.Module = nn.Linear(4, 4)
    for _ in range(depth):
        host = Wrapper(host)
    x = torch.randn(3, 4)
    model = morphc.compile(host, (x,), config=Config(seeds_per_layer=2))
    assert list(morphc.seeds(model).sites) == [".".join(["inner"] * depth)]
    assert torch.equal(model(x), host(x))


def test_folding_without_a_layer_that_was_replaced_names_its_site() -> None:
    host = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model = morphc.compile(host, (torch.randn(3, 4),), config=Config(seeds_per_layer=2, slots=1))
    morphc.seeds(model)["1"].assign([0], morphc.Lifecycle.FINE_TUNING)
    model[1] = nn.Linear(4, 9)
    with pytest.raises(
        FoldError, match=r"site '1' has seeds that blend, but the layer it watches is no longer"
    ):
        morphc.fold(model)
