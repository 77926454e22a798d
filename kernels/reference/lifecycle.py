"""One tick of the lifecycle, for every seed at once. The moves are those of the table in `morphc.lifecycle`.

Of one seed, in this order:

    1. it is one tick older in its state, and its embargo one tick shorter
    2. CANCELLED goes back to DORMANT, CULLED does once its embargo is over
    3. what was requested is done if the table has the move, its minimum ticks have passed (a rollback doesn't
       wait) and no embargo stands against it; else `refused` says why
    4. a seed that stays in GRAFTING follows its ramp; a paused one keeps alpha, and its ramp waits for it

A seed that moves is 0 ticks old, remembers where it came from, and leaves an entry in its history: the number
of this tick, from, to. It has alpha 0 in a state that the host doesn't see, and 1 in one that blends, except
that GRAFTING starts from the alpha it finds. A state that holds no slot has slot -1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from enum import IntEnum
from typing import Final, Literal, NamedTuple, Protocol, get_args

import torch
from torch import Tensor

from morphc.lifecycle import BLENDS, HOLDS_SLOT, MINIMUM_TICKS, TABLE, Lifecycle, bits

HISTORY: Final = 10
"""Transitions that are remembered."""

TARGETS: Final = tuple(sum(1 << target for target in TABLE[state].leaves_to) for state in Lifecycle)
"""For each state, the set of those that may follow."""

LAPSES: Final = bits(lambda state: state is Lifecycle.CANCELLED)
"""States left for DORMANT by themselves."""
WAITS: Final = bits(lambda state: state is Lifecycle.CULLED)
"""States left for DORMANT by themselves when the embargo is over, and not before."""
EMBARGOED: Final = bits(lambda state: state in (Lifecycle.CULLED, Lifecycle.ROLLED_BACK))
"""States that begin with an embargo."""
BARRED: Final = bits(lambda state: state is Lifecycle.GERMINATED)
"""States that are not entered while an embargo lasts."""
AT_ONCE: Final = bits(lambda state: state is Lifecycle.ROLLED_BACK)
"""States that are entered whether or not the minimum ticks have passed."""
FAILURES: Final = bits(lambda state: state is Lifecycle.ROLLED_BACK)
"""States whose entry counts as an error of the seed."""

Curve = Literal["linear", "cosine", "sigmoid"]
CURVES: Final[tuple[Curve, ...]] = get_args(Curve)

# A seed's `graft`: bits 0-3 name a strategy, which is the controller's affair; bits 4-5 the curve; bit 6 is
# set while alpha is paused; the bits above count the ticks of this graft that were paused. -1 is 0.
STRATEGY_BITS: Final = 4
CURVE_SHIFT: Final = STRATEGY_BITS
CURVE_MASK: Final = 3
PAUSED: Final = 64
PAUSE_SHIFT: Final = 8
PAUSES: Final = (1 << 23) - 1
CHOICE: Final = PAUSED - 1
"""The part of the code that outlives a graft: strategy and curve."""

SIGMOID_STEEPNESS: Final = 10.0
DURATION: Final = 30
"""Ticks of a ramp."""


class Refusal(IntEnum):
    """Why a requested move was not made."""

    NONE = 0
    ILLEGAL = 1
    EARLY = 2
    EMBARGO = 3


class SeedArrays(Protocol):
    """The arrays [N] that a tick changes: int32, `alpha` float32, `history` [N, 10, 3], `tick` [] int64."""

    lifecycle: Tensor
    slot: Tensor
    ticks_in_state: Tensor
    graft: Tensor
    parent_state: Tensor
    error_count: Tensor
    embargo: Tensor
    alpha: Tensor
    history: Tensor
    transitions: Tensor
    tick: Tensor


class Policy(NamedTuple):
    """What a tick is told, on the seeds' device.

    ramp [curves, duration + 1] float32: alpha after so many ticks, never falling, 1 at the end. minimum
    [states] int32: ticks before a request is heard. embargo: ticks that a cull or a rollback bars a seed for,
    if it isn't barred for longer already.
    """

    ramp: Tensor
    minimum: Tensor
    embargo: int


def policy(
    device: torch.device | None = None,
    *,
    duration: int = DURATION,
    minimum_ticks: Mapping[Lifecycle, int] = MINIMUM_TICKS,
    embargo: int = 0,
) -> Policy:
    """A policy from numbers; `duration` of at least 1 tick."""
    ramp = [[_alpha(curve, tick / duration) for tick in range(duration + 1)] for curve in CURVES]
    minimum = [minimum_ticks.get(state, 0) for state in Lifecycle]
    return Policy(
        torch.tensor(ramp, dtype=torch.float32, device=device),
        torch.tensor(minimum, dtype=torch.int32, device=device),
        embargo,
    )


def _alpha(curve: Curve, progress: float) -> float:
    """All are 0 at 0 and 1 at 1."""
    if progress >= 1:
        return 1.0
    if curve == "cosine":
        return (1 - math.cos(math.pi * progress)) / 2
    if curve == "sigmoid":
        low, here = _logistic(-SIGMOID_STEEPNESS / 2), _logistic(SIGMOID_STEEPNESS * (progress - 0.5))
        return (here - low) / (1 - 2 * low)
    return progress


def _logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def graft_code(curve: Curve = "linear", *, strategy: int = 0, paused: bool = False) -> int:
    """What a seed's `graft` holds for a ramp that begins; strategy: 0 to 15."""
    return strategy | CURVES.index(curve) << CURVE_SHIFT | (PAUSED if paused else 0)


def among(lifecycle: Tensor, states: int) -> Tensor:
    """Whether each state is in the set; no table on the device, no copy to it."""
    return torch.bitwise_right_shift(states, lifecycle).bitwise_and(1).to(torch.bool)


@torch.no_grad()
def advance(arrays: SeedArrays, told: Policy, request: Tensor | None = None) -> Tensor | None:
    """One tick, in place; `refused` [N] int8 (see `Refusal`) if there was a `request`.

    request: [N] int32, the state that each seed is to go to, negative for none.
    """
    state = arrays.lifecycle.clone()
    age = arrays.ticks_in_state + 1
    embargo = torch.where(arrays.embargo > 0, arrays.embargo - 1, arrays.embargo)
    lapsed = among(state, LAPSES) | (among(state, WAITS) & (embargo <= 0))
    target = torch.where(lapsed, int(Lifecycle.DORMANT), state)
    refused = None
    if request is not None:
        refused = _refused(state, age, embargo, request, told.minimum)
        target = torch.where((request >= 0) & (refused == Refusal.NONE), request, target)
    moved = target != state

    arrays.tick += 1
    _ramp(arrays, told.ramp, age, (state == Lifecycle.GRAFTING) & ~moved)
    _move(arrays, moved, state, target)
    arrays.ticks_in_state.copy_(torch.where(moved, 0, age))
    barred = moved & among(target, EMBARGOED)
    arrays.embargo.copy_(torch.where(barred, embargo.clamp(min=told.embargo), embargo))
    return refused


def _refused(state: Tensor, age: Tensor, embargo: Tensor, request: Tensor, minimum: Tensor) -> Tensor:
    known = (request >= 0) & (request < len(TARGETS))
    wanted = torch.where(known, request, 0)
    legal = torch.zeros_like(known)
    for source, targets in enumerate(TARGETS):
        legal |= known & (state == source) & among(wanted, targets)
    early = (age < minimum[torch.where(legal, state, 0)]) & ~among(wanted, AT_ONCE)
    barred = (embargo > 0) & (among(torch.where(legal, state, 0), WAITS) | among(wanted, BARRED))
    why = torch.where(barred, int(Refusal.EMBARGO), int(Refusal.NONE))
    why = torch.where(early, int(Refusal.EARLY), why)
    why = torch.where(legal, why, int(Refusal.ILLEGAL))
    return torch.where(request < 0, int(Refusal.NONE), why).to(torch.int8)


def _ramp(arrays: SeedArrays, ramp: Tensor, age: Tensor, grafting: Tensor) -> None:
    code = arrays.graft.clamp(min=0)
    paused = (code & PAUSED) != 0
    pauses = torch.bitwise_right_shift(code, PAUSE_SHIFT)
    longer = grafting & paused & (pauses < PAUSES)
    step = (age - pauses).clamp(0, ramp.shape[1] - 1)
    curve = (torch.bitwise_right_shift(code, CURVE_SHIFT) & CURVE_MASK).clamp(max=ramp.shape[0] - 1)
    goal = ramp[curve, step]
    rises = grafting & ~paused & (goal > arrays.alpha)
    arrays.alpha.copy_(torch.where(rises, goal, arrays.alpha))
    arrays.graft.copy_(torch.where(longer, code + (1 << PAUSE_SHIFT), arrays.graft))


def _move(arrays: SeedArrays, moved: Tensor, state: Tensor, target: Tensor) -> None:
    arrays.lifecycle.copy_(target)
    arrays.parent_state.copy_(torch.where(moved, state, arrays.parent_state))
    arrays.slot.copy_(torch.where(moved & ~among(target, HOLDS_SLOT), -1, arrays.slot))
    arrays.error_count.add_(moved & among(target, FAILURES))
    grafting = target == Lifecycle.GRAFTING
    alpha = among(target, BLENDS).to(arrays.alpha.dtype)
    arrays.alpha.copy_(torch.where(moved & ~grafting, alpha, arrays.alpha))
    again = moved & grafting & (arrays.graft >= 0)
    arrays.graft.copy_(torch.where(again, arrays.graft & CHOICE, arrays.graft))

    place = (arrays.transitions % HISTORY).long().view(-1, 1, 1).expand(-1, 1, 3)
    number = arrays.tick.to(torch.int32).expand_as(state)
    entry = torch.stack((number, state, target), 1).unsqueeze(1)
    kept = arrays.history.gather(1, place)
    arrays.history.scatter_(1, place, torch.where(moved.view(-1, 1, 1), entry, kept))
    arrays.transitions.add_(moved)
