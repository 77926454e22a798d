"""A small regression that a host of four hidden units can't solve, and a loop that trains it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

import morphc
from morphc import Config

FAST = {"minimum_ticks": (4, 3, 1, 2, 3), "graft_ticks": 3, "isolation_every": 2, "embargo_ticks": 6}


def host(width: int = 4) -> nn.Sequential:
    """Linear, ReLU, Linear."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 4))


class Task:
    """Batches that are the same for every run, and a validation loss."""

    def __init__(self, batches: int = 400, rows: int = 32) -> None:
        generator = torch.Generator().manual_seed(5)
        teacher = [torch.randn(6, 24, generator=generator), torch.randn(24, 4, generator=generator) / 5]
        self.x = torch.randn(batches, rows, 6, generator=generator)
        self.y = torch.tanh(self.x @ teacher[0]) @ teacher[1]
        self.vx = torch.randn(256, 6, generator=generator)
        self.vy = torch.tanh(self.vx @ teacher[0]) @ teacher[1]

    def loss(self, model: nn.Module, step: int) -> Tensor:
        """Training loss of one batch."""
        return (model(self.x[step % len(self.x)]) - self.y[step % len(self.x)]).square().mean()

    def validate(self, model: nn.Module) -> float:
        """Validation loss."""
        with torch.no_grad():
            return float((model(self.vx) - self.vy).square().mean())


def grown(width: int = 4, **options: Any) -> tuple[nn.Sequential, nn.Sequential]:
    """(host, compiled model of a copy of it)."""
    plain = host(width)
    chosen: dict[str, Any] = {
        "seeds_per_layer": 2,
        "slots": 4,
        "rank": 3,
        "blueprint": ("widen", "bottleneck"),
        "backend": "torch",
        **FAST,
    }
    model = morphc.compile(copy.deepcopy(plain), (torch.zeros(2, 6),), config=Config(**{**chosen, **options}))
    return plain, model


def same(one: nn.Module, other: nn.Module) -> bool:
    """Whether all parameters of the host are the same bits."""
    mine = dict(one.named_parameters())
    theirs = {n: p for n, p in other.named_parameters() if "morphc" not in n.split(".")}
    mine = {n: p for n, p in mine.items() if "morphc" not in n.split(".")}
    assert mine.keys() == theirs.keys()
    return all(torch.equal(mine[n].view(torch.int32), theirs[n].view(torch.int32)) for n in mine)


class Never:
    """A controller that commands nothing."""

    def decide(self, seen: Any) -> tuple[()]:
        return ()
