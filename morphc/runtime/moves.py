"""How seeds get into a state: slots taken and given back, rows of the arrays written, the mode of the site.

Nothing here asks a gate; `commands` and the tick do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from morphc.errors import SeedError, did_you_mean
from morphc.kernels.reference.lifecycle import HISTORY
from morphc.lifecycle import TABLE, Lifecycle
from morphc.runtime.bank import FREE, SlotBank, draw_of
from morphc.runtime.site import SeedSite

if TYPE_CHECKING:
    from morphc.runtime.store import SeedStore


class Move(NamedTuple):
    """The slot that a seed will hold: its bank, its number in it, and whether the seed has it already."""

    bank: str | None
    slot: int
    keep: bool


def banks_of(site: SeedSite) -> dict[str, SlotBank]:
    """The site's banks by blueprint."""
    return dict(site.slots.items())


def slot_of(site: SeedSite, number: int) -> tuple[str, int]:
    """Blueprint and slot from a seed's slot number, which counts through the site's banks."""
    names = list(banks_of(site))
    slots = banks_of(site)[names[0]].slots
    return names[number // slots], number % slots


def number_of(site: SeedSite, blueprint: str, slot: int) -> int:
    """Inverse of `slot_of`."""
    banks = banks_of(site)
    return list(banks).index(blueprint) * banks[blueprint].slots + slot


def free_slots(bank: SlotBank) -> list[int]:
    """The slots that nobody holds. Reads the device."""
    return [slot for slot, owner in enumerate(bank.owner.tolist()) if owner == FREE]


def held_slots(site: SeedSite, seed: int) -> list[tuple[str, int]]:
    """All slots of a seed, its candidates' too. Reads the device."""
    return [
        (name, slot)
        for name, bank in site.slots.items()
        for slot, owner in enumerate(bank.owner.tolist())
        if owner == seed
    ]


def release(site: SeedSite, seed: int, keep: tuple[str, int] | None = None) -> None:
    """Give the seed's slots back, all but `keep`."""
    for name, slot in held_slots(site, seed):
        if (name, slot) != keep:
            banks_of(site)[name].free(slot)


def plan(
    store: SeedStore, site: SeedSite, chosen: list[int], target: Lifecycle, blueprint: str | None
) -> dict[int, Move]:
    """Which slot each seed will hold in `target`; raises SeedError before anything is changed."""
    banks = banks_of(site)
    if blueprint is not None and blueprint not in banks:
        raise SeedError(no_bank(site, blueprint))
    if not TABLE[target].holds_slot:
        return {seed: Move(None, -1, False) for seed in chosen}
    if not banks:
        raise SeedError(no_bank(site, None))
    if any(bank.on_meta for bank in banks.values()):
        store.leave_meta()
        if any(bank.on_meta for bank in banks.values()):
            raise SeedError(
                f"the layer of site {site.path!r} is on the meta device and so are its slots; give it values first: "
                "model.to_empty(device=...), or load_state_dict(..., assign=True)"
            )
    held = store.live().slot[site.offset : site.offset + site.seeds].tolist()
    free = {name: free_slots(bank) for name, bank in banks.items()}
    moves = {}
    for seed in chosen:
        own, slot = slot_of(site, held[seed]) if held[seed] >= 0 else (None, -1)
        wanted = blueprint or own or next(iter(banks))
        if own == wanted:
            moves[seed] = Move(wanted, slot, True)
            continue
        if not free[wanted]:
            raise SeedError(
                f"no free slot of {wanted!r} at {site.path!r} for seed {seed}: {len(chosen)} asked, "
                f"{banks[wanted].slots} slots in all; free some, or make more with morphc.enlarge(model, slots=...)"
            )
        moves[seed] = Move(wanted, free[wanted].pop(0), False)
    return moves


def no_bank(site: SeedSite, blueprint: str | None) -> str:
    """Why a blueprint, or any, has no bank at the site."""
    banks = banks_of(site)
    here = ", ".join(banks) or "none"
    reasons = "; ".join(f"{name}: {why}" for name, why in site.refusals.items())
    if blueprint is None:
        return f"site {site.path!r} has no bank to take a slot from ({reasons})"
    if blueprint in site.refusals:
        return f"blueprint {blueprint!r} can't be used at {site.path!r}: {site.refusals[blueprint]}"
    return (
        f"blueprint {blueprint!r} has no bank at {site.path!r} (there: {here});"
        f"{did_you_mean(blueprint, banks)} Banks are made at compile, "
        f"for Config(blueprint=...): compile again with {blueprint!r} among them"
    )


def take(site: SeedSite, blueprint: str, slot: int, seed: int, transition: int, candidate: int = 0) -> None:
    """Give a slot with fresh parameters to a seed; `transition` and `candidate` make the draw its own."""
    draw = draw_of(site.path, blueprint, seed, transition, candidate)
    banks_of(site)[blueprint].take(slot, seed, draw)


@torch.no_grad()
def record(
    store: SeedStore,
    site: SeedSite,
    chosen: list[int],
    target: Lifecycle,
    *,
    numbers: list[int],
    alpha: float | None = None,
    graft: int | None = None,
    failed: bool = False,
    embargo: int = 0,
) -> None:
    """Write a transition of `chosen` into the arrays, and let the site's mode follow.

    numbers: each seed's slot number from now on. failed: it counts as an error. embargo: at least so many ticks.
    """
    arrays = store.state
    device = arrays.lifecycle.device
    rows = torch.tensor(chosen, dtype=torch.int64, device=device) + site.offset
    before = arrays.lifecycle[rows]
    place = (arrays.transitions[rows] % HISTORY).long()
    tick = arrays.tick.to(torch.int32).expand(len(chosen))
    arrays.history[rows, place] = torch.stack((tick, before, torch.full_like(before, int(target))), 1)
    arrays.transitions[rows] += 1
    arrays.parent_state[rows] = before
    arrays.lifecycle[rows] = int(target)
    arrays.ticks_in_state[rows] = 0
    arrays.slot[rows] = torch.tensor(numbers, dtype=torch.int32, device=device)
    if failed:
        arrays.error_count[rows] += 1
    if embargo:
        arrays.embargo[rows] = arrays.embargo[rows].clamp(min=embargo)
    if graft is not None:
        arrays.graft[rows] = graft
    if TABLE[target].forward != "blend":
        arrays.alpha[rows] = 0.0 if alpha is None else alpha
    elif alpha is not None:
        arrays.alpha[rows] = alpha
    elif target is not Lifecycle.GRAFTING:
        arrays.alpha[rows] = 1.0
    states = arrays.lifecycle[site.offset : site.offset + site.seeds].tolist()
    store.follow(site, {Lifecycle(state) for state in states})
