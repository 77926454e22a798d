"""Ours on MNIST-1D through morphc: `widen` seeds behind both hidden layers compete for every few units.

At an event the host waits while rounds follow each other. In a round the network is compiled with one seed behind
layer 2 (it would widen layer 1) and one behind layer 3 (it would widen layer 2), each with many candidates. Two
passes over some training rows, without a step of the host, measure how much of the squared gradient at its site each
seed takes away. The better one is grafted, at the size of least loss on those rows, and folded into wider layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

import morphc

SITES = ("2", "4")
PASSES = 2
SEARCH = 8
"""At most so many forwards look for the size of a graft."""


@dataclass(frozen=True)
class Rounds:
    """events: steps after which `rounds` rounds add `units` units each.

    rows: training rows of a pass. place: the seed of more gain (`signal`), any (`random`) or the one that widens
    layer 1 (`first`).
    """

    events: tuple[int, ...]
    place: str = "signal"
    rounds: int = 5
    units: int = 4
    rows: int = 1000
    candidates: int = 16
    seed_lr: float = 3.0


def grow(
    host: nn.Sequential,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    labels: Tensor,
    how: Rounds,
    draw: torch.Generator,
) -> tuple[nn.Sequential, torch.optim.Optimizer]:
    """One round on the rows x, labels: the wider host, and its Adam with what the old one knew."""
    config = morphc.Config(
        seeds_per_layer=1,
        blueprint="widen",
        rank=how.units,
        slots=how.candidates,
        seed_lr=how.seed_lr,
        telemetry_every=0,
        isolation_every=1,
    )
    model = morphc.compile(host, x[:2], config=config, verify=False)
    seeds = morphc.seeds(model)
    idle = morphc.CallbackController(lambda seen: ())
    grower = morphc.Grower(model, optimizer, idle, evaluate=lambda model: 0.0, tick_every=PASSES)
    for site in SITES:
        (told,) = seeds[site].germinate([0], candidates=how.candidates)
        if not told:
            raise RuntimeError(str(told))
    grower.tick()
    for _ in range(PASSES):
        loss = functional.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        grower.step(
            loss, lambda: functional.cross_entropy(model(x), labels)
        )  # the seeds learn, the host doesn't
    optimizer.zero_grad()
    learned = grower.learning()

    def gain(site: str) -> float:
        return learned[site, 0]["explained"] * learned[site, 0]["chunk_gradient"]

    choices = {"signal": max(SITES, key=gain), "random": SITES[int(torch.randint(2, (1,), generator=draw))]}
    winner = choices.get(how.place, SITES[0])
    (told,) = grower.advance(winner, [0], morphc.Lifecycle.FOSSILIZED, gates=False)
    if not told:
        raise RuntimeError(str(told))
    wider = morphc.fold(model)
    assert isinstance(wider, nn.Sequential)
    return wider, carried(optimizer, host, wider)


def carried(
    optimizer: torch.optim.Optimizer,
    host: nn.Module,
    wider: nn.Module,
    make: Callable[[Iterable[nn.Parameter], float], torch.optim.Optimizer] = torch.optim.Adam,
) -> torch.optim.Optimizer:
    """An Adam over `wider`, with the host's rows and columns first: they keep their moments, new ones have none."""
    fresh = make(wider.parameters(), optimizer.param_groups[0]["lr"])
    for old, new in zip(host.parameters(), wider.parameters(), strict=True):
        known = optimizer.state[old]
        own = {"step": known["step"].clone()}
        for moment in ("exp_avg", "exp_avg_sq"):
            own[moment] = torch.zeros_like(new)
            own[moment][tuple(slice(size) for size in old.shape)] = known[moment]
        fresh.state[new] = own
    return fresh
