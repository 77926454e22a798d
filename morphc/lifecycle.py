"""The eleven states of a seed and the moves between them, as data.

The table is the one place where states and transitions are written down; the runtime, the kernels and the
docs are generated from it or checked against it.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from types import MappingProxyType
from typing import Final, Literal, NamedTuple

Forward = Literal["identity", "blend"]
Trains = Literal["nothing", "isolated", "task"]


class Lifecycle(IntEnum):
    """State of one seed. The integer values are stored in checkpoints and never change."""

    DORMANT = 0
    GERMINATED = 1
    TRAINING = 2
    GRAFTING = 3
    STABILIZATION = 4
    EVALUATING = 5
    FINE_TUNING = 6
    FOSSILIZED = 7
    CULLED = 8
    CANCELLED = 9
    ROLLED_BACK = 10


class Mode(IntEnum):
    """What a site's forward has to do, derived from the states of its seeds."""

    DORMANT = 0
    TRAINING = 1
    ACTIVE = 2


class State(NamedTuple):
    """One row of the table.

    `forward` is what the host sees, `trains` says whether and how the slot learns, `holds_slot` whether the
    seed owns a slot, `leaves_to` the states that may follow.
    """

    forward: Forward
    trains: Trains
    holds_slot: bool
    leaves_to: tuple[Lifecycle, ...]


_L = Lifecycle
TABLE: Final = MappingProxyType(
    {
        _L.DORMANT: State("identity", "nothing", False, (_L.GERMINATED,)),
        _L.GERMINATED: State("identity", "nothing", True, (_L.TRAINING, _L.CANCELLED)),
        _L.TRAINING: State(
            "identity", "isolated", True, (_L.GRAFTING, _L.CULLED, _L.CANCELLED, _L.ROLLED_BACK)
        ),
        _L.GRAFTING: State("blend", "task", True, (_L.STABILIZATION, _L.CULLED, _L.ROLLED_BACK)),
        _L.STABILIZATION: State("blend", "nothing", True, (_L.EVALUATING, _L.ROLLED_BACK)),
        _L.EVALUATING: State("blend", "nothing", True, (_L.FINE_TUNING, _L.CULLED, _L.ROLLED_BACK)),
        _L.FINE_TUNING: State("blend", "task", True, (_L.FOSSILIZED, _L.CULLED, _L.ROLLED_BACK)),
        _L.FOSSILIZED: State("blend", "nothing", True, (_L.CULLED,)),
        _L.CULLED: State("identity", "nothing", False, (_L.DORMANT,)),
        _L.CANCELLED: State("identity", "nothing", False, (_L.DORMANT,)),
        _L.ROLLED_BACK: State("identity", "nothing", False, (_L.DORMANT,)),
    }
)


def mode_of(states: set[Lifecycle] | frozenset[Lifecycle]) -> Mode:
    """The mode of a site whose seeds are in `states`."""
    if any(TABLE[state].forward == "blend" for state in states):
        return Mode.ACTIVE
    if any(TABLE[state].trains == "isolated" for state in states):
        return Mode.TRAINING
    return Mode.DORMANT


def bits(states: Callable[[Lifecycle], bool]) -> int:
    """A set of states as an integer: bit n for state n."""
    return sum(1 << state for state in TABLE if states(state))


BLENDS: Final = bits(lambda state: TABLE[state].forward == "blend")
TRAINS: Final = bits(lambda state: TABLE[state].trains != "nothing")
ISOLATED: Final = bits(lambda state: TABLE[state].trains == "isolated")
HOLDS_SLOT: Final = bits(lambda state: TABLE[state].holds_slot)

MINIMUM_TICKS: Final = MappingProxyType(
    {_L.TRAINING: 100, _L.GRAFTING: 50, _L.STABILIZATION: 20, _L.EVALUATING: 30, _L.FINE_TUNING: 50}
)
"""Ticks that a seed stays in a state before it may leave by request; a rollback doesn't wait."""
