"""The gates of the lifecycle as data: what must have been measured before a seed moves on.

A move passes if the table of states has it, no embargo stands against it, the seed is old enough in its state, and
all gates of the move hold; for a cull out of EVALUATING one of them is enough. What wasn't measured doesn't hold.
docs/lifecycle.md has the same table and says how each metric is computed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final, Literal, NamedTuple

from morphc.config import Config
from morphc.lifecycle import MINIMUM_TICKS, TABLE, Lifecycle

Sign = Literal[">=", ">", "<=", "<"]

_L = Lifecycle


class Gate(NamedTuple):
    """`metric sign bound` for a move. bound: an option of `Config`, or a number. isolation: where it applies."""

    source: Lifecycle
    target: Lifecycle
    metric: str
    sign: Sign
    bound: str | float
    isolation: str = ""


GATES: Final = (
    Gate(
        _L.TRAINING, _L.GRAFTING, "isolated_improvement", ">=", "min_isolated_improvement", "straight_through"
    ),
    Gate(_L.TRAINING, _L.GRAFTING, "reconstruction_loss", "<=", "max_reconstruction_loss", "reconstruction"),
    Gate(_L.TRAINING, _L.GRAFTING, "finite_gradients", ">=", 0.9),
    Gate(_L.GRAFTING, _L.STABILIZATION, "alpha", ">=", 1.0),
    Gate(_L.EVALUATING, _L.FINE_TUNING, "contribution", ">", "min_contribution"),
    Gate(_L.EVALUATING, _L.FINE_TUNING, "stability", ">=", "min_stability"),
    Gate(_L.EVALUATING, _L.CULLED, "contribution", "<", "cull_contribution"),
    Gate(_L.EVALUATING, _L.CULLED, "error_rate", ">", "cull_error_rate"),
    Gate(_L.EVALUATING, _L.CULLED, "errors", ">", "cull_errors"),
    Gate(_L.FINE_TUNING, _L.FOSSILIZED, "improvement", ">=", "min_improvement"),
    Gate(_L.FINE_TUNING, _L.FOSSILIZED, "stability", ">=", "min_final_stability"),
)

ANY_OF: Final = frozenset({(_L.EVALUATING, _L.CULLED)})
"""Moves for which one gate is enough."""

EVALUATED: Final = frozenset({"contribution", "improvement"})
"""Metrics that are only there if `evaluate` was asked."""

ONWARD: Final[Mapping[Lifecycle, tuple[Lifecycle, ...]]] = {
    _L.GERMINATED: (_L.TRAINING,),
    _L.TRAINING: (_L.GRAFTING,),
    _L.GRAFTING: (_L.STABILIZATION,),
    _L.STABILIZATION: (_L.EVALUATING,),
    _L.EVALUATING: (_L.CULLED, _L.FINE_TUNING),
    _L.FINE_TUNING: (_L.FOSSILIZED,),
}
"""Where a tick takes a seed by itself: the first of these whose gates hold."""


def way(source: Lifecycle, target: Lifecycle) -> tuple[Lifecycle, ...]:
    """The states after `source` up to `target`: along the way to FOSSILIZED, or one move of the table; or none."""
    states = (_L.DORMANT, _L.GERMINATED, *(targets[-1] for targets in ONWARD.values()))
    if source in states and target in states and states.index(source) < states.index(target):
        return states[states.index(source) + 1 : states.index(target) + 1]
    return (target,) if target in TABLE[source].leaves_to else ()


class Failure(NamedTuple):
    """The gate that refused, as words and numbers. `value` is NaN where nothing was measured."""

    gate: str
    value: float
    bound: float
    reason: str


def bound_of(gate: Gate, config: Config) -> float:
    """The number that a gate's metric is held against."""
    return float(getattr(config, gate.bound)) if isinstance(gate.bound, str) else gate.bound


def minimum_of(config: Config) -> dict[Lifecycle, int]:
    """Ticks in each state before a request is heard."""
    return dict(zip(MINIMUM_TICKS, config.minimum_ticks, strict=True))


def gates_of(source: Lifecycle, target: Lifecycle, config: Config) -> list[Gate]:
    """The gates of one move under `config`."""
    return [
        gate
        for gate in GATES
        if (gate.source, gate.target) == (source, target) and gate.isolation in ("", config.isolation)
    ]


def holds(gate: Gate, value: float | None, bound: float) -> bool:
    """Whether the gate lets through; nothing measured doesn't."""
    if value is None or math.isnan(value):
        return False
    return {">=": value >= bound, ">": value > bound, "<=": value <= bound, "<": value < bound}[gate.sign]


def table_failure(source: Lifecycle, target: Lifecycle) -> Failure:
    """That the table has no such move."""
    allowed = ", ".join(state.name for state in TABLE[source].leaves_to)
    reason = f"{source.name} doesn't lead to {target.name}, only to {allowed}"
    return Failure("table", float(source), float(target), reason)


def age_failure(
    source: Lifecycle, target: Lifecycle, age: int, embargo: int, config: Config
) -> Failure | None:
    """What stands against a move whatever was measured: the table, the embargo, the minimum ticks."""
    if target not in TABLE[source].leaves_to:
        return table_failure(source, target)
    barred = target is _L.GERMINATED or source is _L.CULLED
    if barred and embargo > 0:
        return Failure("embargo", embargo, 0, f"embargo: {embargo} more ticks, must be 0")
    least = minimum_of(config).get(source, 0)
    if target is not _L.ROLLED_BACK and age < least:
        reason = f"minimum ticks: {age} in {source.name}, must be at least {least} (a rollback doesn't wait)"
        return Failure("minimum_ticks", age, least, reason)
    return None


def gate_failure(
    source: Lifecycle, target: Lifecycle, metrics: Mapping[str, float], config: Config
) -> Failure | None:
    """The first gate that refuses the move, or None."""
    failures = []
    found = gates_of(source, target, config)
    for gate in found:
        value, bound = metrics.get(gate.metric), bound_of(gate, config)
        if holds(gate, value, bound):
            if (source, target) in ANY_OF:
                return None
            continue
        measured = value is not None and not math.isnan(value)
        told = f"{value:.6g}" if measured else "not measured"
        if not measured and value is not None and gate.metric in EVALUATED:
            told = "nan, the evaluation gave no finite number"
        failures.append(
            Failure(
                gate.metric,
                float(value) if value is not None else math.nan,
                bound,
                f"{gate.metric}: {told}, must be {gate.sign} {bound:g}",
            )
        )
    return failures[0] if failures else None
