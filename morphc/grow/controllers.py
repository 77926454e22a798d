"""Controllers: an observation in, commands out. Where and when to grow is theirs; gates and rollback are the Grower's.

Any object with `decide(observation)` is one, a learned one too. What else it may have:

state_dict, load_state_dict: then it is saved with the Grower.
begin(model, optimizer): called once, when the Grower is made. after_step(model, optimizer): called after every step.
recycled(parameter, axis, indices): called for what was made anew.
germinates = False: it never grows anything, so that no `evaluate` is missed.
ranks_candidates = True: it recycles with candidates, for which the Grower looks at the batch before a tick.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, Literal, Protocol, overload

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from morphc.config import Config
from morphc.errors import ConfigError, MorphcWarning, UnknownNameError
from morphc.grow.checks import whole
from morphc.lifecycle import Lifecycle
from morphc.runtime.moves import banks_of, free_slots
from morphc.runtime.requests import SiteRequest
from morphc.runtime.seeds import Seeds
from morphc.runtime.store import store_of


@dataclass(frozen=True)
class Germinate:
    """`site.germinate(...)`."""

    path: str
    seeds: tuple[int, ...]
    blueprint: str | None = None
    graft: str = "fixed_ramp"
    candidates: int = 1


@dataclass(frozen=True)
class Do:
    """`site.cancel`, `.prune`, `.rollback`, `.reset` or `Grower.recycle`, which has `candidates`."""

    what: Literal["cancel", "prune", "rollback", "reset", "recycle"]
    path: str
    seeds: tuple[int, ...]
    candidates: int = 1


@dataclass(frozen=True)
class Advance:
    """`Grower.advance`: without gates a schedule grafts at once."""

    path: str
    seeds: tuple[int, ...]
    to: Lifecycle
    gates: bool = True


@dataclass(frozen=True)
class ResetMoments:
    """The host's optimizer begins anew: its moments and steps become 0."""


Command = Germinate | Do | Advance | ResetMoments
DOES: Final = ("cancel", "prune", "rollback", "reset", "recycle")


class States(Sequence[Lifecycle]):
    """The states of all seeds as a sequence; none is made before it is asked for."""

    def __init__(self, values: npt.NDArray[np.int32]) -> None:
        self.values = values

    def __len__(self) -> int:
        return len(self.values)

    @overload
    def __getitem__(self, place: int) -> Lifecycle: ...
    @overload
    def __getitem__(self, place: slice) -> States: ...
    def __getitem__(self, place: int | slice) -> Lifecycle | States:
        if isinstance(place, slice):
            return States(self.values[place])
        return Lifecycle(int(self.values[place]))


@dataclass
class Observation:
    """What a controller sees at a tick.

    step, tick: counted from the run's begin. loss: mean over the tick. metrics: of the epochs so far, as given to
    `Grower.epoch`; new_epoch: whether the last is new. lifecycle [N]: the seeds' states. telemetry: health per seed
    [N] float64 on the CPU, each seed's as it was last measured; measured [N]: whether that was in this tick.
    """

    seeds: Seeds
    config: Config
    step: int
    tick: int
    loss: float
    metrics: Sequence[float]
    new_epoch: bool
    lower_is_better: bool
    lifecycle: States
    telemetry: Mapping[str, Tensor]
    measured: Tensor

    @cached_property
    def scores(self) -> Tensor:
        """[N] float64: where growing is likely to help; written to the seeds' `score`."""
        found = score(self.telemetry, self.config.score_weights)
        self.seeds.set_scores(found)
        return found

    def rows(self) -> Iterable[tuple[str, int, int]]:
        """(path, seed, row) of every seed."""
        for path, handle in self.seeds.sites.items():
            for seed in range(len(handle)):
                yield path, seed, handle.rows.start + seed

    def busy(self) -> int:
        """Seeds between germination and the end of their fine-tuning."""
        states = self.lifecycle.values
        return int(((states >= Lifecycle.GERMINATED) & (states <= Lifecycle.FINE_TUNING)).sum())

    def free(self, path: str, blueprint: str | None = None) -> int:
        """Free slots of a site's bank; 0 where there is no such bank."""
        banks = self.seeds[path].slots
        name = blueprint or next(iter(banks), "")
        return len(free_slots(banks[name])) if name in banks else 0


class Controller(Protocol):
    """Decides what is commanded at a tick."""

    def decide(self, seen: Observation) -> Sequence[Command]:
        """The commands for this tick."""
        ...


def score(telemetry: Mapping[str, Tensor], weights: Sequence[float]) -> Tensor:
    """[N] float64: sum of weight times term over the terms that were measured, each from 0 to 1.

    Terms: the dead fraction · 1 - variance relative to the largest · |correlation| within the chunk · gradient norm and
    saliency, relative to the largest. NaN terms count as 0.
    """

    def share(values: Tensor) -> Tensor:
        known = torch.nan_to_num(values, nan=0.0, posinf=0.0).clamp(min=0)
        top = known.max() if known.numel() else torch.tensor(0.0)
        return known / top if top > 0 else torch.zeros_like(known)

    variance = telemetry["variance"]
    terms = (
        telemetry["dead_fraction"],
        torch.where(variance.isfinite(), 1 - share(variance), torch.nan),
        telemetry["correlation"].abs(),
        share(telemetry["gradient_norm"]),
        share(telemetry["saliency"]),
    )
    total = torch.zeros_like(terms[0])
    for weight, term in zip(weights, terms, strict=True):
        total += weight * torch.nan_to_num(term, nan=0.0)
    return total


def _stays(request: SiteRequest, blueprint: str) -> bool:
    """Whether fold refuses the blueprint there: it would have to hang a module where none can hang, or isn't called."""
    if request.parameter is not None:
        return blueprint != "affine"
    return request.past_hooks and blueprint not in ("affine", "lowrank", "widen")


class PlateauController:
    """Germinates where the score says, when the metric (or, without epochs, the tick's loss) stops getting better.

    patience: epochs (or ticks) without an improvement by `threshold` (relative). seeds: how many germinate at a time;
    most: how many in all over the run. Nothing germinates while earlier seeds are on their way, or for `cooldown`
    epochs (ticks) after; nor where `morphc.fold` couldn't take the blueprint back, unless that is so everywhere.
    """

    def __init__(
        self,
        patience: int = 3,
        threshold: float = 0.01,
        seeds: int = 1,
        most: int | None = None,
        cooldown: int = 0,
        blueprint: str | None = None,
        graft: str = "fixed_ramp",
        candidates: int = 1,
    ) -> None:
        whole("patience", patience), whole("seeds", seeds), whole("candidates", candidates)
        whole("cooldown", cooldown, 0), whole("most", 0 if most is None else most, 0)
        self.patience, self.threshold, self.seeds, self.most = patience, threshold, seeds, most
        self.cooldown, self.blueprint, self.graft, self.candidates = cooldown, blueprint, graft, candidates
        self.best = math.nan
        self.stalled = self.germinated = self.waiting = 0
        self.shunned: frozenset[str] = frozenset()

    def begin(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Called by the Grower that it is given to: it has to be able to germinate somewhere. Raises ConfigError."""
        room: dict[str, int] = {}
        known: set[str] = set()
        stays: set[str] = set()
        store = store_of(model)
        for path, site in store.sites.items():
            banks = banks_of(site)
            known |= set(banks)
            name = self.blueprint or next(iter(banks), None)
            if name in banks:
                room[path] = banks[name].slots
                if _stays(store.requests[path], name):
                    stays.add(path)
        self.shunned = frozenset(stays if len(stays) < len(room) else ())
        if not room:
            there = f"; there are banks of {', '.join(sorted(known))}" if known else ""
            raise ConfigError(
                f"PlateauController(blueprint={self.blueprint!r}): no site has a bank to germinate from{there}. "
                "Compile with a Config(blueprint=...) that the layers can have; morphc.report(model) says why not"
            )
        short = [path for path, slots in room.items() if slots < self.candidates]
        told = f"PlateauController(candidates={self.candidates}): a seed takes so many slots, and "
        way_out = f"; make more with morphc.enlarge(model, slots={self.candidates})"
        if len(short) == len(room):
            raise ConfigError(
                f"{told}no site has more than {max(room.values())}{way_out}, or ask for fewer candidates"
            )
        if short:
            more = f" and {len(short) - 3} more" if len(short) > 3 else ""
            names = ", ".join(repr(path) for path in short[:3])
            warnings.warn(
                f"{told}{names}{more} have fewer: nothing germinates there{way_out}, as far as they have seeds",
                MorphcWarning,
                stacklevel=3,
            )

    def decide(self, seen: Observation) -> Sequence[Command]:
        """The commands for this tick."""
        if seen.metrics:
            if not seen.new_epoch:
                return ()
            value, lower = seen.metrics[-1], seen.lower_is_better
        else:
            value, lower = seen.loss, True
        if not math.isfinite(value):
            return ()
        self._compare(value if lower else -value)
        if seen.busy():
            self.stalled, self.waiting = 0, self.cooldown
            return ()
        if self.waiting:
            self.waiting -= 1
            return ()
        left = self.seeds if self.most is None else min(self.seeds, self.most - self.germinated)
        if self.stalled < self.patience or left < 1:
            return ()
        chosen = self._choose(seen, left)
        self.germinated += sum(len(command.seeds) for command in chosen)
        self.stalled = 0
        return chosen

    def _compare(self, value: float) -> None:
        if math.isnan(self.best) or value < self.best - self.threshold * abs(self.best):
            self.best, self.stalled = value, 0
        else:
            self.stalled += 1

    def _choose(self, seen: Observation, count: int) -> list[Germinate]:
        room = {path: seen.free(path, self.blueprint) // self.candidates for path in seen.seeds.sites}
        embargo = seen.seeds.embargo
        scores = seen.scores
        open_rows = [
            (path, seed, row)
            for path, seed, row in seen.rows()
            if seen.lifecycle[row] is Lifecycle.DORMANT
            and not embargo[row]
            and room[path]
            and path not in self.shunned
        ]
        open_rows.sort(key=lambda place: -float(scores[place[2]]))
        chosen: dict[str, list[int]] = {}
        for path, seed, _ in open_rows:
            if sum(map(len, chosen.values())) == count:
                break
            if room[path] > len(chosen.get(path, ())):
                chosen.setdefault(path, []).append(seed)
        return [
            Germinate(path, tuple(found), self.blueprint, self.graft, self.candidates)
            for path, found in chosen.items()
        ]

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {name: getattr(self, name) for name in ("best", "stalled", "germinated", "waiting")}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`."""
        for name, value in saved.items():
            setattr(self, name, value)


class ScheduleController:
    """Does what a list says: (step, command), each at the first tick at or after its step."""

    def __init__(self, schedule: Iterable[tuple[int, Command]]) -> None:
        entries = list(schedule) if isinstance(schedule, Iterable) else [schedule]
        for entry in entries:
            if not (
                isinstance(entry, tuple | list)
                and len(entry) == 2
                and isinstance(entry[0], int)
                and isinstance(entry[1], Command)
            ):
                raise ConfigError(f"ScheduleController: {entry!r} is no pair of a step and a command")
        self.schedule = sorted(entries, key=lambda entry: entry[0])
        self.done = 0

    def decide(self, seen: Observation) -> Sequence[Command]:
        """The commands that are due."""
        first = self.done
        while self.done < len(self.schedule) and self.schedule[self.done][0] <= seen.step:
            self.done += 1
        return [command for _, command in self.schedule[first : self.done]]

    def state_dict(self) -> dict[str, Any]:
        """How far the list has been done."""
        return {"done": self.done}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.done = saved["done"]


class CallbackController:
    """Asks a function: observation in, commands out."""

    def __init__(self, decide: Callable[[Observation], Sequence[Command] | None]) -> None:
        self.function = decide

    def decide(self, seen: Observation) -> Sequence[Command]:
        """What the function says; None is nothing."""
        return self.function(seen) or ()


def commands_of(controller: Controller, seen: Observation) -> list[Command]:
    """What the controller decides; None is nothing. Raises ConfigError where something isn't a command."""
    found = controller.decide(seen)
    if found is not None and not isinstance(found, Iterable):
        raise ConfigError(f"{type(controller).__name__} decided {found!r}; it has to be a list of commands")
    commands = list(found or ())
    for command in commands:
        if not isinstance(command, Command):
            raise ConfigError(
                f"{type(controller).__name__} decided {command!r}, which is no command: Germinate, Advance, Do or "
                "ResetMoments of morphc.grow.controllers"
            )
        if isinstance(command, Do) and command.what not in DOES:
            raise UnknownNameError("command of Do", command.what, DOES)
    return commands
