"""One tick of the whole model: who moves is decided on the host from one copy of the states, done in one launch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from morphc.kernels import backend
from morphc.kernels.lifecycle import Ticker
from morphc.kernels.reference.lifecycle import Policy, Refusal, advance, policy
from morphc.lifecycle import Lifecycle
from morphc.runtime import commands, gates, grafts, mirror, moves
from morphc.runtime.commands import Metrics, Transition
from morphc.runtime.gates import Failure
from morphc.runtime.site import SeedSite

if TYPE_CHECKING:
    from morphc.runtime.store import SeedStore

_L = Lifecycle


@dataclass
class TickPlan:
    """What a tick is to do: the state that each row asks for, and what was refused beforehand."""

    requests: dict[int, Lifecycle] = field(default_factory=dict)
    refused: list[Transition] = field(default_factory=list)

    def into(self, target: Lifecycle) -> list[int]:
        """The rows that are to enter a state."""
        return [row for row, wanted in self.requests.items() if wanted is target]


def site_at(store: SeedStore, row: int) -> tuple[SeedSite, int]:
    """The site and the seed of a row."""
    for site in store.sites.values():
        if site.offset <= row < site.offset + site.seeds:
            return site, row - site.offset
    raise IndexError(row)


def decide(
    store: SeedStore,
    metrics: Metrics | None = None,
    per_seed: Mapping[tuple[str, int], Metrics] | None = None,
    hold: Mapping[int, str] | None = None,
) -> TickPlan:
    """Where each seed goes at the coming tick. hold: rows that stay where they are, and why."""
    states = store.mirror()
    plan = TickPlan()
    for site in store.sites.values():
        here = states.lifecycle[site.offset : site.offset + site.seeds]
        busy = [int(seed) for seed in here.nonzero()[0] if Lifecycle(int(here[seed])) in gates.ONWARD]
        if not busy:
            continue
        known = commands.measured(store, site, states)
        for seed in busy:
            row = site.offset + seed
            source = Lifecycle(int(here[seed]))
            age, embargo = int(states.ticks_in_state[row]) + 1, int(states.embargo[row])
            told = {**known.get(seed, {}), **(metrics or {}), **(per_seed or {}).get((site.path, seed), {})}
            for target in gates.ONWARD[source]:
                why = gates.age_failure(source, target, age, embargo, store.config)
                if why is not None:
                    break
                why = gates.gate_failure(source, target, told, store.config)
                if why is None and hold is not None and row in hold:
                    why = Failure("hold", math.nan, math.nan, hold[row])
                if why is None:
                    plan.requests[row] = target
                    break
                if target is not _L.CULLED:
                    plan.refused.append(commands.refused(site, seed, source, target, why))
    return plan


def run(store: SeedStore, plan: TickPlan) -> list[Transition]:
    """The tick itself: one launch, one copy back, then what follows from the moves: slots, modes."""
    before = store.mirror()
    state = store.state
    told = policy_of(store)
    request = None
    if plan.requests:
        asked = torch.full((len(before.lifecycle),), -1, dtype=torch.int32)
        for row, target in plan.requests.items():
            asked[row] = int(target)
        request = asked.to(state.lifecycle.device)
    if backend.chosen(store.config.backend, state.lifecycle.device) == "triton":
        assert store.ticker is not None
        answer = store.ticker.advance(state, request)
        mirror.touched(state)
    else:
        answer = advance(state, told, request)
    after = store.mirror()
    moved = [int(row) for row in (before.lifecycle != after.lifecycle).nonzero()[0]]
    out = []
    changed: set[str] = set()
    for row in moved:
        site, seed = site_at(store, row)
        source, target = Lifecycle(int(before.lifecycle[row])), Lifecycle(int(after.lifecycle[row]))
        number = commands.settle(store, site, seed, target, int(before.slot[row]))
        if number >= 0 and number != int(after.slot[row]):
            state.slot[row] = number
        changed.add(site.path)
        out.append(Transition(site.path, seed, source, target, True))
    for path in changed:
        site = store.sites[path]
        here = after.lifecycle[site.offset : site.offset + site.seeds]
        store.follow(site, {Lifecycle(int(value)) for value in here})
    for row, target in plan.requests.items():
        if Lifecycle(int(after.lifecycle[row])) is not target and answer is not None:
            site, seed = site_at(store, row)
            why = Refusal(int(answer[row])).name.lower()
            source = Lifecycle(int(before.lifecycle[row]))
            failure = Failure(why, math.nan, math.nan, f"{why}: the tick refused it")
            out.append(commands.refused(site, seed, source, target, failure))
    return out + plan.refused


def policy_of(store: SeedStore) -> Policy:
    """The policy of the store's configuration on its device; the ticker is made for it."""
    device = store.state.lifecycle.device
    if store.ticker is None or store.ticker.policy.ramp.device != device:
        config = store.config
        made = policy(
            device,
            duration=config.graft_ticks,
            minimum_ticks=gates.minimum_of(config),
            embargo=config.embargo_ticks,
        )
        store.ticker = Ticker(made)
    return store.ticker.policy


@torch.no_grad()
def pause(store: SeedStore, signs: Mapping[int, grafts.Signs]) -> dict[int, bool]:
    """Let every grafting seed's strategy say whether the coming tick moves its alpha; by row, whether it waits."""
    states = store.mirror()
    found: dict[int, bool] = {}
    changed: dict[int, int] = {}
    for row in (int(row) for row in (states.lifecycle == int(_L.GRAFTING)).nonzero()[0]):
        graft = int(states.graft[row])
        known = signs.get(row, grafts.Signs())._replace(alpha=float(states.alpha[row]))
        found[row] = grafts.waits(graft, known, store.config)
        code = grafts.paused_code(graft, found[row])
        if code != graft:
            changed[row] = code
    if changed:
        device = store.state.graft.device
        rows = torch.tensor(list(changed), dtype=torch.int64).to(device)
        codes = torch.tensor(list(changed.values()), dtype=torch.int32).to(device)
        store.state.graft[rows] = codes
        # The host has written these numbers, so its copy is made right rather than read again.
        for row, code in changed.items():
            states.graft[row] = code
        states.versions = mirror.versions_of(store.state)
    return found


def slot_numbers(store: SeedStore) -> dict[tuple[str, int], list[tuple[str, int]]]:
    """Every seed's slots, by site and seed. Reads the device."""
    found: dict[tuple[str, int], list[tuple[str, int]]] = {}
    for path, site in store.sites.items():
        for name, bank in moves.banks_of(site).items():
            for slot, owner in enumerate(bank.owner.tolist()):
                if owner >= 0:
                    found.setdefault((path, owner), []).append((name, slot))
    return found
