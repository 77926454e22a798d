"""What a tick knows of a run: its losses, the seeds' health, gradients and worth, and what isolation has measured."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import nn

from morphc.grow.evaluation import Evaluate, Worth, contributions
from morphc.grow.gradients import Ratios
from morphc.grow.ranks import Ranks
from morphc.grow.signals import Losses
from morphc.lifecycle import Lifecycle
from morphc.runtime import commands, ticking
from morphc.runtime.seeds import Seeds

if TYPE_CHECKING:
    from collections.abc import Mapping

_L = Lifecycle
AGAIN: Final = 10
"""Ticks between two evaluations of a seed that didn't pass."""


class Measuring:
    """The measurements of one run. `health` [N]: telemetry of each seed as it was last measured.

    fresh [N]: whether that was in the tick that `take_health` was called for last.
    """

    def __init__(
        self,
        model: nn.Module,
        seeds: Seeds,
        evaluate: Evaluate | None,
        lower: bool,
        ranks: Ranks | None = None,
    ) -> None:
        self.model, self.seeds, self.evaluate, self.lower = model, seeds, evaluate, lower
        self.store = seeds._store
        self.ranks = ranks if ranks is not None else Ranks()
        self.config = self.store.config
        self.losses = Losses(self.config.rollback_sigma, self.config.rollback_times)
        self.ratios = Ratios(self.store)
        self.evaluated: dict[int, tuple[int, float]] = {}
        self.health = self.ranks.health(self.store)
        self.fresh = self.health["count"] > 0
        self._measured_at = (0, 0)

    def take_health(self, steps: int) -> None:
        """Close the telemetry window if something was measured in it; seeds that weren't keep their last health."""
        forwards = sum(-(-site.pulse.count // max(1, site.pulse.every)) for site in self.store.sites.values())
        seen, at = self._measured_at
        # Forwards in a compiled graph are counted on the device: then it is looked as often as it measures.
        self.fresh = torch.zeros_like(self.fresh)
        if forwards == seen and steps - at < max(1, self.config.telemetry_every):
            return
        found = self.ranks.health(self.store)
        measured = self.fresh = found["count"] > 0
        self.health = {name: torch.where(measured, value, self.health[name]) for name, value in found.items()}
        self._measured_at = (forwards, steps)
        self.seeds.reset_telemetry()

    def worth(self, ticks: int) -> dict[tuple[str, int], dict[str, float]]:
        """Contribution, improvement, stability and error rate of the seeds whose gates ask for them."""
        states = self.store.mirror()
        due, found = [], {}
        for path, seed, row in self.rows():
            state, age = Lifecycle(int(states.lifecycle[row])), int(states.ticks_in_state[row]) + 1
            if state not in (_L.EVALUATING, _L.FINE_TUNING):
                self.evaluated.pop(row, None)
                continue
            found[path, seed] = {
                "stability": self.losses.stability,
                "error_rate": self.ratios.error_rate(row),
            }
            least = self.config.minimum_ticks[3 if state is _L.EVALUATING else 4]
            known = self.evaluated.get(row)
            if known is not None and known[0] > ticks - 1 - age and ticks - known[0] < AGAIN:
                continue
            if age >= least:
                due.append(row)
        if due and self.evaluate is not None:
            worth = Worth(self.model, self.store, self.evaluate)
            for row, gain in contributions(worth, due, self.lower, draw=ticks).items():
                self.evaluated[row] = (ticks, gain)
        for path, seed, row in self.rows():
            if (path, seed) in found and row in self.evaluated:
                gain = self.evaluated[row][1]
                fine = int(states.lifecycle[row]) == int(_L.FINE_TUNING)
                found[path, seed]["improvement" if fine else "contribution"] = gain
        return found

    def rows(self) -> list[tuple[str, int, int]]:
        """(path, seed, row) of the seeds that hold a slot."""
        held = self.store.mirror().slot >= 0
        out = []
        for row in (int(row) for row in held.nonzero()[0]):
            site, seed = ticking.site_at(self.store, row)
            out.append((site.path, seed, row))
        return out

    def learning(self) -> dict[tuple[str, int], dict[str, float]]:
        """What was measured of every seed that holds a slot; see `Grower.learning`."""
        mirror = self.store.mirror()
        found: dict[tuple[str, int], dict[str, float]] = {}
        for path, site in self.store.sites.items():
            for seed, known in commands.measured(self.store, site, mirror).items():
                ratio = {"gradient_ratio": self.ratios.of(site.offset + seed)}
                slots = self.seeds[path].candidates(seed)
                best = max(
                    slots,
                    key=lambda slot: -1.0 if math.isnan(slot["explained"]) else slot["explained"],
                    default={},
                )
                names = ("explained", "chunk_gradient", "site_gradient")
                found[path, seed] = {**known, **ratio, **{name: best[name] for name in names if name in best}}
        return found

    def state_dict(self) -> dict[str, Any]:
        """Everything that `load_state_dict` needs."""
        return {
            "losses": self.losses.state_dict(),
            "ratios": self.ratios.state_dict(),
            "health": self.health,
            "measured_at": self._measured_at,
            "evaluated": {row: list(known) for row, known in self.evaluated.items()},
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.losses.load_state_dict(saved["losses"])
        self.ratios.load_state_dict(saved["ratios"])
        self.health = dict(saved["health"])
        self._measured_at = (saved["measured_at"][0], saved["measured_at"][1])
        self.evaluated = {int(row): (known[0], known[1]) for row, known in saved["evaluated"].items()}
