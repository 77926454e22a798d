"""Ours on slowly changing regression: one compiled network that holds all runs side by side.

A million single examples are too many for one small network at a time, so R runs are one host, Linear(20 R, H R),
ReLU, Linear(H R, R): unit u belongs to run `owner[u]`, and weights between different runs are 0 and stay 0, since
their gradients are masked. Every hidden unit is a seed of its own. Telemetry keeps the norm of each unit's gradient;
every `every` examples the units at most `tau` times the mean of their run start anew. A growing host gets one unit
a run at a time: a `widen` seed behind every output trains a few candidates for a while beside the learner, the best
is grafted, refitted, and folded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import morphc
from benchmarks.growth.online import BITS, HOLD, LR, Learners, Method, Source

ISOLATED, TICK = 1000, 100


@dataclass(frozen=True)
class Ours:
    """How the runs recycle and grow: as `online.Method` by gradient.

    sampled: telemetry on every n-th example. candidates, seed_lr: of a new unit; alpha: of its graft.
    """

    hidden: int
    grow_to: int = 0
    grow_every: int = 40_000
    tau: float = 0.05
    every: int = 500
    sampled: int = 10
    candidates: int = 4
    seed_lr: float = 1.0
    alpha: float = 0.3


class SideBySide:
    """R runs in one host, compiled anew whenever it has grown."""

    def __init__(self, how: Ours, seeds: Sequence[int]) -> None:
        self.how, self.runs = how, len(seeds)
        start = Learners([Method(how.hidden)], seeds)
        hidden = how.hidden
        self.host = nn.Sequential(
            nn.Linear(self.runs * BITS, self.runs * hidden),
            nn.ReLU(),
            nn.Linear(self.runs * hidden, self.runs),
        )
        self.owner = torch.arange(self.runs).repeat_interleave(hidden)
        self.inner, self.outer = self.host[0], self.host[2]
        with torch.no_grad():
            for parameter in self.host.parameters():
                parameter.zero_()
            blocks = self.inner.weight.view(self.runs, hidden, self.runs, BITS)
            for run in range(self.runs):
                blocks[run, :, run] = start.weight[run, :hidden, :BITS]
                self.outer.weight[run, self.owner == run] = start.out[run, :hidden]
        self.draw = torch.Generator().manual_seed(8000 + seeds[0])
        self.born = torch.zeros(len(self.owner))
        self.recycled = torch.zeros(self.runs)
        self.example = 0
        self.compile()

    @property
    def units(self) -> int:
        """Hidden units of one run."""
        return len(self.owner) // self.runs

    @property
    def grows(self) -> bool:
        return self.units < self.how.grow_to

    def compile(self) -> None:
        """Seeds on the host as it is: one a hidden unit, and one an output."""
        how = self.how
        config = morphc.Config(
            seeds_per_layer={"0": len(self.owner), "2": self.runs},
            blueprint="widen",
            rank=1,
            slots=self.runs * how.candidates if self.grows else 1,
            seed_lr=how.seed_lr,
            telemetry_every=how.sampled,
            gradient_telemetry=True,
            isolation_every=1,
            minimum_ticks=(ISOLATED // TICK, 1, 1, 1, 1),
            min_isolated_improvement=-1.0,
            backend="torch",
        )
        self.model = morphc.compile(self.host, torch.zeros(1, self.runs * BITS), config=config, verify=False)
        self.seeds = morphc.seeds(self.model)
        self.inner, self.outer = self.model[0], self.model[2]
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(parameters, lr=LR)
        runs = torch.arange(self.runs)
        own = (self.owner.unsqueeze(1) == runs).float()
        self.masks = own.repeat_interleave(BITS, 1), own.T.contiguous()
        self.grower: morphc.Grower | None = None

    def learn(self, x: Tensor, y: Tensor) -> Tensor:
        """One example each: x [1, 20 R], y [1, R]; the squared error before the step, [R]."""
        error = (self.model(x) - y).square()
        loss = error.sum()
        self.optimizer.zero_grad()
        loss.backward()
        for parameter, mask in zip((self.inner.weight, self.outer.weight), self.masks, strict=True):
            assert parameter.grad is not None
            parameter.grad.mul_(mask)
        self.optimizer.step()
        self.example += 1
        if self.grower is not None:
            self.grower.step(loss.detach())
            self.keep_apart()
        if self.example % self.how.every == 0:
            self.recycle()
        if self.grows and (self.example + ISOLATED) % self.how.grow_every == 0:
            self.germinate()
        if self.grower is not None and self.example % self.how.grow_every == 0:
            self.graft()
        return error.detach()[0]

    def recycle(self) -> None:
        """The units of least gradient start anew, as the setting draws units."""
        site = self.seeds["0"]
        norm = self.seeds.telemetry()["gradient_norm"][site.rows].float()
        mean = torch.zeros(self.runs).index_add_(0, self.owner, norm) / self.units
        ripe = self.example - self.born >= self.how.every
        chosen = (ripe & (norm <= self.how.tau * mean[self.owner])).nonzero().flatten()
        self.seeds.reset_telemetry()
        if not len(chosen):
            return
        refused = [told for told in site.recycle(chosen.tolist(), self.optimizer) if not told]
        if refused:
            raise RuntimeError(str(refused[0]))
        fresh = (torch.rand(len(chosen), BITS, generator=self.draw) * 2 - 1) * (6 / BITS) ** 0.5
        with torch.no_grad():
            self.inner.weight[chosen] = 0.0
            blocks = self.inner.weight.view(len(self.owner), self.runs, BITS)
            blocks[chosen, self.owner[chosen]] = fresh
        self.born[chosen] = float(self.example)
        self.recycled.index_add_(0, self.owner[chosen], torch.ones(len(chosen)))

    def germinate(self) -> None:
        """A seed behind every output begins to train its candidates."""
        idle = morphc.CallbackController(lambda seen: ())
        self.grower = morphc.Grower(
            self.model, self.optimizer, idle, evaluate=lambda model: 0.0, tick_every=TICK
        )
        told = self.seeds["2"].germinate(list(range(self.runs)), candidates=self.how.candidates)
        refused = [each for each in told if not each]
        if refused:
            raise RuntimeError(str(refused[0]))
        self.grower.tick()
        self.draw_incoming(self.seeds["2"].slots["widen"].owner >= 0)

    def draw_incoming(self, slots: Tensor) -> None:
        """Slots of the mask `slots` read what a new unit of the setting reads, of their own run's bits alone."""
        bank = self.seeds["2"].slots["widen"]
        runs = torch.arange(self.runs).repeat_interleave(BITS)
        self.apart = (bank.owner.unsqueeze(1) == runs).unsqueeze(2)
        drawn = (torch.rand(bank.in_weight.shape, generator=self.draw) * 2 - 1) * (6 / BITS) ** 0.5
        with torch.no_grad():
            bank.in_weight[slots] = drawn[slots]
        self.keep_apart()

    def keep_apart(self) -> None:
        """Seeds read the bits of their own run alone."""
        with torch.no_grad():
            self.seeds["2"].slots["widen"].in_weight.mul_(self.apart)

    def graft(self) -> None:
        """The best candidate of each run becomes a unit of a wider host.

        A run whose candidates never fired has none that is best: its seed is still in TRAINING, and gets a newborn
        unit, which writes nothing yet.
        """
        site, bank = self.seeds["2"], self.seeds["2"].slots["widen"]
        dead = (site.lifecycle != int(morphc.Lifecycle.GRAFTING)).nonzero().flatten()
        site.assign(dead.tolist(), morphc.Lifecycle.DORMANT)
        site.assign(list(range(self.runs)), morphc.Lifecycle.FOSSILIZED, alpha=self.how.alpha)
        if len(dead):
            self.draw_incoming(torch.isin(bank.owner, dead))
        wider = morphc.fold(self.model)
        assert isinstance(wider, nn.Sequential)
        self.host = wider
        fresh = wider[0].weight[len(self.owner) :].detach().view(-1, self.runs, BITS)
        owner = fresh.abs().sum(2).argmax(1)
        if sorted(owner.tolist()) != list(range(self.runs)):
            raise RuntimeError("a run got no unit, or two")
        self.owner = torch.cat((self.owner, owner))
        self.born = torch.cat((self.born, torch.full((self.runs,), float(self.example))))
        self.compile()


def train_side_by_side(how: Ours, seeds: Sequence[int], examples: int) -> tuple[Tensor, Tensor, float]:
    """Mean squared error per 10 000 examples [T, R], recycled units [R], and the mean number of units."""
    source, runs = Source(seeds), SideBySide(how, seeds)
    errors, units = torch.zeros(examples // HOLD, len(seeds)), 0.0
    for hold in range(examples // HOLD):
        x, y = source.hold()
        x, y = x.view(HOLD, 1, -1), y.view(HOLD, 1, -1)
        for at in range(HOLD):
            errors[hold] += runs.learn(x[at], y[at])
        units += runs.units
    return errors / HOLD, runs.recycled, units / (examples // HOLD)
