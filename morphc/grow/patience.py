"""Which seeds are given up: a gate has held them up, or their graft has waited, for longer than `graft_patience`."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from morphc.errors import MorphcWarning
from morphc.lifecycle import Lifecycle
from morphc.runtime import gates, grafts
from morphc.runtime.commands import Transition

if TYPE_CHECKING:
    from morphc.grow.measuring import Measuring

_L = Lifecycle


def give_up(measuring: Measuring, told: Sequence[Transition], warned: set[str]) -> list[Transition]:
    """Cull them; each transition has the reason. told: what the tick refused. warned: gates that were warned of."""
    store, config = measuring.store, measuring.config
    states, minimum = store.mirror(), gates.minimum_of(config)
    late: dict[tuple[str, int], Transition | None] = {}
    for transition in told:
        row = store.sites[transition.path].offset + transition.seed
        least = minimum.get(Lifecycle(int(states.lifecycle[row])), 0)
        stuck = not transition.ok and transition.gate != "hold" and transition.source is not _L.STABILIZATION
        if stuck and int(states.ticks_in_state[row]) > least + config.graft_patience:
            late[transition.path, transition.seed] = transition
    for path, seed, row in measuring.rows():
        waited = grafts.pauses_of(int(states.graft[row]))
        if int(states.lifecycle[row]) == int(_L.GRAFTING) and waited > config.graft_patience:
            late.setdefault((path, seed))
    out: list[Transition] = []
    for (path, seed), held in late.items():
        why = held.reason if held is not None else "its graft waited"
        (culled,) = measuring.seeds[path].prune([seed])
        if culled:
            culled = replace(culled, reason=f"given up after graft_patience={config.graft_patience}: {why}")
            _warn_once(held, warned)
        out.append(culled)
    return out


def _warn_once(held: Transition | None, warned: set[str]) -> None:
    """Who doesn't read events would never know why nothing is grafted."""
    if held is None or held.source is not _L.TRAINING or held.gate in warned or math.isnan(held.value):
        return
    warned.add(held.gate)
    gate = next(gate for gate in gates.GATES if (gate.source, gate.metric) == (_L.TRAINING, held.gate))
    way_out = (
        f"; the bound is Config({gate.bound}=...), see docs/growing.md" if isinstance(gate.bound, str) else ""
    )
    warnings.warn(
        f"{held.path or '<root>'}[{held.seed}] was never grafted and is culled, because of {held.reason}{way_out}",
        MorphcWarning,
        stacklevel=6,
    )
