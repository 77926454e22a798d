"""Commands to the seeds of one site: each checks table, embargo, age and gates, and says what became of every seed.

A refused seed is told why and stays as it is; SeedError is for what makes no sense, such as an index that doesn't
exist. Commands read the device: they belong between steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from morphc.errors import ConfigError, SeedError
from morphc.kernels.reference.lifecycle import EMBARGOED
from morphc.lifecycle import TABLE, Lifecycle
from morphc.runtime import gates, grafts, isolation, moves
from morphc.runtime.gates import Failure
from morphc.runtime.mirror import Mirror
from morphc.runtime.site import SeedSite

if TYPE_CHECKING:
    from morphc.runtime.store import SeedStore

_L = Lifecycle
Metrics = Mapping[str, float]
NO_MINIMUM: Final = 1 << 30
"""An age at which no minimum of ticks stands against a move."""


@dataclass(frozen=True, slots=True)
class Transition:
    """What became of one request; true if it was done.

    reason: the gate with value and bound if refused; if done, empty, or why a seed was given up. gate: `table`,
    `embargo`, `minimum_ticks`, `slots` or a metric. value, bound: NaN where there is none.
    """

    path: str
    seed: int
    source: Lifecycle
    target: Lifecycle
    ok: bool
    reason: str = ""
    gate: str = ""
    value: float = math.nan
    bound: float = math.nan

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        told = f"{'' if self.ok else ' refused'}, {self.reason}" if self.reason else ""
        return f"{self.path or '<root>'}[{self.seed}] {self.source.name} -> {self.target.name}{told}"


def refused(site: SeedSite, seed: int, source: Lifecycle, target: Lifecycle, why: Failure) -> Transition:
    """A transition that wasn't made."""
    return Transition(site.path, seed, source, target, False, why.reason, why.gate, why.value, why.bound)


def germinate(
    store: SeedStore,
    site: SeedSite,
    chosen: list[int],
    blueprint: str | None = None,
    graft: str = "fixed_ramp",
    candidates: int = 1,
    curve: str | None = None,
) -> list[Transition]:
    """DORMANT -> GERMINATED with `candidates` slots each."""
    config = store.config
    if isinstance(candidates, bool) or not isinstance(candidates, int) or candidates < 1:
        raise SeedError(f"candidates={candidates!r} is not a whole number of at least 1")
    graft_bits = grafts.code(graft, _curve(curve or config.graft_curve))
    mirror = store.mirror()
    banks = moves.banks_of(site)
    name = blueprint or next(iter(banks), None)
    out = []
    for seed in chosen:
        row = site.offset + seed
        source = Lifecycle(int(mirror.lifecycle[row]))
        why = gates.age_failure(source, _L.GERMINATED, 0, int(mirror.embargo[row]), config)
        free: list[int] = []
        if why is None and (name is None or name not in banks):
            why = Failure("slots", 0, candidates, moves.no_bank(site, blueprint))
        if why is None:
            assert name is not None
            why = _untrainable(site, name, config.isolation)
            free = moves.free_slots(banks[name])
        if why is None and len(free) < candidates:
            reason = (
                f"slots: {len(free)} of {name!r} free at {site.path!r} ({banks[str(name)].slots} in all), must be "
                f"at least {candidates}; free some, or make more with morphc.enlarge(model, slots=...)"
            )
            why = Failure("slots", len(free), candidates, reason)
        if why is not None:
            out.append(refused(site, seed, source, _L.GERMINATED, why))
            continue
        assert name is not None
        for candidate, slot in enumerate(free[:candidates]):
            moves.take(site, name, slot, seed, int(mirror.transitions[row]), candidate)
            if site.fitting is not None:
                site.fitting.fit(name, banks[name]).forget(slot)
        numbers = [moves.number_of(site, name, free[0])]
        moves.record(store, site, [seed], _L.GERMINATED, numbers=numbers, graft=graft_bits)
        out.append(Transition(site.path, seed, source, _L.GERMINATED, True))
    return out


def advance(
    store: SeedStore,
    site: SeedSite,
    chosen: list[int],
    target: Lifecycle,
    metrics: Metrics | Sequence[Metrics] | None = None,
    gated: bool = True,
) -> list[Transition]:
    """Move seeds on, each if its table, embargo, age and (unless `gated` is False) its gates allow it."""
    if target is _L.GERMINATED:
        return germinate(store, site, chosen)
    given = _given(metrics, len(chosen))
    mirror = store.mirror()
    known = measured(store, site, mirror)
    out = []
    for seed, told in zip(chosen, given, strict=True):
        row = site.offset + seed
        source = Lifecycle(int(mirror.lifecycle[row]))
        age, embargo = int(mirror.ticks_in_state[row]), int(mirror.embargo[row])
        why = gates.age_failure(source, target, age, embargo, store.config)
        if why is None and gated:
            why = gates.gate_failure(source, target, {**known.get(seed, {}), **told}, store.config)
        if why is not None:
            out.append(refused(site, seed, source, target, why))
            continue
        enter(store, site, seed, target, int(mirror.slot[row]), int(mirror.graft[row]), told.get("loss"))
        out.append(Transition(site.path, seed, source, target, True))
    return out


def force(
    store: SeedStore,
    site: SeedSite,
    chosen: list[int],
    target: Lifecycle,
    metrics: Metrics | Sequence[Metrics] | None = None,
) -> list[Transition]:
    """Take seeds to `target` through the states between, without asking gates or ages; the embargo still holds."""
    given = _given(metrics, len(chosen))
    mirror = store.mirror()
    out = []
    for seed, told in zip(chosen, given, strict=True):
        row = site.offset + seed
        source = Lifecycle(int(mirror.lifecycle[row]))
        way = gates.way(source, target)
        why: Failure | None = gates.table_failure(source, target)
        if way:
            embargo = int(mirror.embargo[row])
            why = gates.age_failure(source, way[0], NO_MINIMUM, embargo, store.config)
        if why is None and way[0] is _L.GERMINATED:
            (born,) = germinate(store, site, [seed])
            if not born:
                out.append(replace(born, target=target))
                continue
            way = way[1:]
        if why is not None:
            out.append(refused(site, seed, source, target, why))
            continue
        for state in way:
            states = store.mirror()
            enter(store, site, seed, state, int(states.slot[row]), int(states.graft[row]), told.get("loss"))
        out.append(Transition(site.path, seed, source, target, True))
    return out


def enter(
    store: SeedStore,
    site: SeedSite,
    seed: int,
    target: Lifecycle,
    number: int,
    graft: int,
    loss: float | None = None,
) -> None:
    """Put one seed into `target`, with what a tick does on the way: slots, error count, embargo, the graft.

    loss: what a refit at a graft goes by, None for the store's.
    """
    number = settle(store, site, seed, target, number, loss)
    moves.record(
        store,
        site,
        [seed],
        target,
        numbers=[number],
        graft=grafts.choice_of(graft) if target is _L.GRAFTING else None,
        failed=target is _L.ROLLED_BACK,
        embargo=store.config.embargo_ticks if EMBARGOED >> target & 1 else 0,
    )


def settle(
    store: SeedStore,
    site: SeedSite,
    seed: int,
    target: Lifecycle,
    number: int,
    loss: float | None = None,
) -> int:
    """Slots of a seed that enters `target`: one candidate stays at a graft, none where none is held. Its number."""
    if not TABLE[target].holds_slot:
        moves.release(site, seed)
        return -1
    if target is not _L.GRAFTING:
        return number
    held = moves.held_slots(site, seed)
    best = isolation.best_candidate(site, held)
    isolation.refit(site, *best, store.loss if loss is None else loss, store.graft_share)
    moves.release(site, seed, keep=best)
    return moves.number_of(site, *best)


def measured(store: SeedStore, site: SeedSite, mirror: Mirror) -> dict[int, dict[str, float]]:
    """What morphc measures itself of the site's seeds that hold a slot, by seed."""
    rows = slice(site.offset, site.offset + site.seeds)
    found: dict[int, dict[str, float]] = {}
    for seed in (int(place) for place in (mirror.slot[rows] >= 0).nonzero()[0]):
        row = site.offset + seed
        found[seed] = {"alpha": float(mirror.alpha[row]), "errors": float(mirror.error_count[row])}
    fitting = site.fitting
    if fitting is None:
        return found
    reconstructs = not isolation.straight(site)
    for name, bank in site.slots.items():
        fit = fitting.fits.get(name)
        if fit is None:
            continue
        share, loss, steps, lost = fit.summary().tolist()
        for slot, owner in enumerate(bank.owner.tolist()):
            if owner not in found or not steps[slot] + lost[slot]:
                continue
            mine = found[owner]
            best = mine.get("isolated_improvement", -math.inf)
            mine["finite_gradients"] = 1.0 - lost[slot]
            if reconstructs:
                mine["reconstruction_loss"] = min(loss[slot], mine.get("reconstruction_loss", math.inf))
            elif share[slot] > best:
                mine["isolated_improvement"] = share[slot]
                mine["isolated_loss"] = loss[slot]
    return found


def _given(metrics: Metrics | Sequence[Metrics] | None, count: int) -> list[Metrics]:
    if metrics is None:
        return [{}] * count
    if isinstance(metrics, Mapping):
        return [metrics] * count
    if len(metrics) != count:
        raise SeedError(
            f"metrics for {len(metrics)} seeds were given with {count} seeds; give one mapping for each"
        )
    return list(metrics)


def _curve(curve: str) -> str:
    if curve not in ("linear", "cosine", "sigmoid"):
        raise ConfigError(f"curve={curve!r} is no curve of a graft; there are linear, cosine, sigmoid")
    return curve


def _untrainable(site: SeedSite, blueprint: str, kind: str) -> Failure | None:
    bank = site.slots.get(blueprint)
    if kind != "reconstruction" or bank is None or bank.kind.tap == "chunk":
        return None
    reason = (
        f"isolation: reconstruction trains blueprints that read their chunk, {blueprint!r} reads the "
        f'{bank.kind.tap}\'s input; use isolation="straight_through"'
    )
    return Failure("isolation", math.nan, math.nan, reason)
