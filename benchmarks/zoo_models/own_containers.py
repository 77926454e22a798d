"""Own models: unusual containers, attributes and roots."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .registry import features, zoo

FAMILY = "containers"
WIDE = features(32)


@zoo("plain_list_and_dict", FAMILY, WIDE)
class PlainListAndDict(nn.Module):
    """Registered modules called through a plain list and a plain dict, too."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 64)
        self.order = [self.a, self.b]
        self.table = {"out": self.c, "deep": {"again": (self.a, self.b)}}

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.order:
            x = torch.relu(layer(x))
        first, second = self.table["deep"]["again"]
        return self.table["out"](second(first(x)))


@zoo("unregistered_list", FAMILY, WIDE)
class UnregisteredList(nn.Module):
    """Modules that live in a plain list only: no name, no state-dict key."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = [nn.Linear(32, 32), nn.Linear(32, 32)]
        self.out = nn.Linear(32, 64)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.hidden:
            x = torch.tanh(layer(x))
        return self.out(x)


@zoo("bound_methods", FAMILY, WIDE)
class BoundMethods(nn.Module):
    """Bound methods of itself and of children kept in attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 64), nn.Linear(64, 64)
        self.step = self.first.forward
        self.finish = self._finish
        self.call = self.second.__call__

    def _finish(self, x: Tensor) -> Tensor:
        return self.call(torch.relu(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.finish(self.step(x))


@zoo("lambdas", FAMILY, WIDE)
class Lambdas(nn.Module):
    """Lambdas in attributes that close over self."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 64)
        self.out = nn.Linear(64, 64)
        self.act: Callable[[Tensor], Tensor] = lambda x: x.clamp(min=0)
        self.tail = lambda x: self.out(self.act(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.layer(x))


@zoo("with_lock", FAMILY, WIDE)
class WithLock(nn.Module):
    """Holds a lock, which neither pickles nor deep-copies."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()
        self.layer = nn.Linear(32, 64)

    def forward(self, x: Tensor) -> Tensor:
        with self.lock:
            return self.layer(x)


class _Slotted(nn.Module):
    __slots__ = ("gain",)

    def __init__(self) -> None:
        super().__init__()
        self.gain = 3.0
        self.layer = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.gain


class _Forwarding(nn.Module):
    """`__getattr__` falls through to the wrapped module; `__setattr__` counts."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.sets = 0

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "sets" and "sets" in self.__dict__:
            self.__dict__["sets"] += 1
        super().__setattr__(name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + self.gain


@zoo("slots_and_getattr", FAMILY, WIDE)
def slots_and_getattr() -> nn.Module:
    """__slots__, and attribute access redirected to a child."""
    return nn.Sequential(_Forwarding(_Slotted()), nn.Linear(32, 64))


@zoo("wrapper_getattr_root", FAMILY, WIDE)
def wrapper_getattr_root() -> nn.Module:
    """The forwarding wrapper is the root."""
    return _Forwarding(_Slotted())


@zoo("moduledict_root", FAMILY, WIDE)
class HeadsDict(nn.ModuleDict):
    """Root is a ModuleDict whose forward runs over items()."""

    def __init__(self) -> None:
        super().__init__(
            {"a": nn.Linear(32, 64), "b": nn.Linear(32, 16), "c": nn.Sequential(nn.Linear(32, 8), nn.GELU())}
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {name: head(x) for name, head in self.items()}


@zoo("modulelist_root", FAMILY, WIDE)
class LayersList(nn.ModuleList):
    """Root is a ModuleList with a forward; uses len, indexing and slices of itself."""

    def __init__(self, layers: Any = None) -> None:
        super().__init__(layers or [nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 64)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self[:-1]:
            x = torch.relu(layer(x))
        return self[-1](x) / len(self)


@zoo("sequential_root", FAMILY, WIDE)
class CountingSequential(nn.Sequential):
    """Root is a Sequential subclass with its own forward; sees its own length."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(32, 64), nn.ReLU(inplace=True), nn.Linear(64, 64))

    def forward(self, input: Tensor) -> Tensor:
        for _, module in self.named_children():
            input = module(input)
        return input * len(self) / len(list(self.children()))


@zoo("sequential_plain", FAMILY, WIDE)
def sequential_plain() -> nn.Module:
    """A plain Sequential."""
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(inplace=True), nn.Dropout(0.2), nn.Linear(64, 10))


@zoo("sequential_nested", FAMILY, WIDE)
def sequential_nested() -> nn.Module:
    """Containers in containers."""
    return nn.Sequential(
        nn.Sequential(nn.Sequential(nn.Linear(32, 64)), nn.Sequential(), nn.Identity()),
        BranchTree(),
        nn.ModuleList([nn.Linear(64, 64)])[0],
    )


class BranchTree(nn.Module):
    """A ModuleDict of ModuleLists of Sequentials."""

    def __init__(self) -> None:
        super().__init__()
        self.tree = nn.ModuleDict({
            "x": nn.ModuleList([nn.Sequential(nn.Linear(64, 64), nn.ReLU()), nn.Linear(64, 64)]),
            "y": nn.ModuleList([nn.ModuleDict({"z": nn.Linear(64, 64)})]),
        })  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        for branch in self.tree["x"]:
            x = branch(x)
        return x + self.tree["y"][0]["z"](x)


@zoo("linear_root", FAMILY, WIDE)
def linear_root() -> nn.Module:
    """A Linear is the root."""
    return nn.Linear(32, 64)


@zoo("conv_root", FAMILY, features(3, -1, -1), length=8, other_length=6)
def conv_root() -> nn.Module:
    """A Conv2d is the root."""
    return nn.Conv2d(3, 64, 3)


@zoo("no_parameters", FAMILY, WIDE)
class NoParameters(nn.Module):
    """Nothing to watch, nothing to train."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x) * 2


@zoo("zero_rows", FAMILY, lambda batch, _: features(32)(batch, 0), batch=0, other_batch=3)
def zero_rows() -> nn.Module:
    """The example has no rows at all."""
    return nn.Sequential(nn.Linear(32, 64), nn.LayerNorm(64), nn.ReLU(inplace=True), nn.Linear(64, 64))


@zoo("one_row_scalars", FAMILY, lambda batch, _: features()(batch, 0), batch=32, other_batch=None)
def one_row() -> nn.Module:
    """A vector in, without batch axis; one output feature."""
    return nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 1))


@zoo("names_that_clash", FAMILY, WIDE)
class NamesThatClash(nn.Module):
    """Children named like methods of dicts and like words of the compiler."""

    def __init__(self) -> None:
        super().__init__()
        self.seeds = nn.Linear(32, 64)
        self.slots = nn.ModuleDict({"keys_": nn.Linear(64, 64), "site": nn.Linear(64, 64)})
        self.input = nn.Linear(64, 64)
        self.mode = "relu"

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.seeds(x))
        return self.input(self.slots["keys_"](x) + self.slots["site"](x))


@zoo("unused_layers", FAMILY, WIDE)
class UnusedLayers(nn.Module):
    """Layers that the example never reaches: their gradients stay None."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(32, 64)
        self.unused = nn.Linear(32, 64)
        self.nothing: nn.Module | None = None
        self.register_module("also_nothing", None)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


@zoo("swapped_forward", FAMILY, WIDE)
def swapped_forward() -> nn.Module:
    """Instance-level forwards, set by the user, on a watched layer and on the root."""
    host = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 64))
    layer = host[0]
    layer.forward = lambda x: nn.functional.linear(x, layer.weight) - 1.0
    return host


@zoo("own_call", FAMILY, WIDE)
class OwnCall(nn.Module):
    """Overrides __call__, and calls child.forward directly (past the hooks)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 64), nn.Linear(64, 64)

    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x) * 2

    def forward(self, x: Tensor) -> Tensor:
        return self.second.forward(torch.relu(self.first.forward(x)))
