"""Graft strategies: at every tick, does alpha of a grafting seed go on, or wait?

Alpha follows the ramp of `Config.graft_curve` over `Config.graft_ticks`; a tick that waits re-times what is left of
it, so alpha never goes back and never jumps. What a strategy looks at is a `Signs`; what wasn't measured doesn't hold a
graft up, except in `stability`, which asks for proof.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final, NamedTuple

from morphc.config import Config
from morphc.errors import UnknownNameError
from morphc.kernels.reference.lifecycle import CHOICE, PAUSE_SHIFT, PAUSED, STRATEGY_BITS, graft_code

TOLERANCE: Final = 0.02
"""How much worse than at the graft's begin the loss may be for `performance_linked`, relatively."""
ADAPTIVE_DRIFT: Final = 0.5
"""`adaptive` minds the drift from this share of its bound on."""


class Signs(NamedTuple):
    """What is known of one grafting seed at a tick; NaN where nothing was measured.

    alpha; loss: mean of the tick, relative to that when the graft began (1.0 is the same); trend: the loss's
    momentum, an average of its relative changes from tick to tick; drift: how far the chunk's mean and spread
    have moved since then, in standard deviations; gradient: RMS gradient of the slot over that of its host layer;
    stability: 1 - spread of the recent losses around their line, over their mean.
    """

    alpha: float = 0.0
    loss: float = math.nan
    trend: float = math.nan
    drift: float = math.nan
    gradient: float = math.nan
    stability: float = math.nan


Strategy = Callable[[Signs, Config], bool]


def fixed_ramp(signs: Signs, config: Config) -> bool:
    """Never waits."""
    return False


def performance_linked(signs: Signs, config: Config) -> bool:
    """Waits while the loss is more than 2 % above what it was when the graft began."""
    return signs.loss > 1 + TOLERANCE


def drift_controlled(signs: Signs, config: Config) -> bool:
    """Waits while the chunk has drifted by more than `max_drift` standard deviations."""
    return signs.drift > config.max_drift


def grad_norm_gated(signs: Signs, config: Config) -> bool:
    """Waits while the seed's gradient is outside of [`min_gradient`, `max_gradient`] times its host layer's.

    A slot's gradient carries the factor alpha, which is divided out; at alpha 0 there is none, and nothing waits.
    """
    if signs.alpha <= 0 or math.isnan(signs.gradient):
        return False
    return not config.min_gradient <= signs.gradient / signs.alpha <= config.max_gradient


def momentum(signs: Signs, config: Config) -> bool:
    """Waits while the loss rises on average."""
    return signs.trend > 0


def stability(signs: Signs, config: Config) -> bool:
    """Waits unless the recent losses were stable, by at least `min_stability`."""
    return not signs.stability >= config.min_stability


def adaptive(signs: Signs, config: Config) -> bool:
    """Minds what is nearest to going wrong: the drift, then an unsteady loss, then the loss itself."""
    if signs.drift > ADAPTIVE_DRIFT * config.max_drift:
        return drift_controlled(signs, config)
    if signs.stability < config.min_stability:
        return momentum(signs, config)
    return performance_linked(signs, config)


STRATEGIES: Final[Mapping[str, Strategy]] = MappingProxyType(
    {
        "fixed_ramp": fixed_ramp,
        "performance_linked": performance_linked,
        "drift_controlled": drift_controlled,
        "grad_norm_gated": grad_norm_gated,
        "momentum": momentum,
        "stability": stability,
        "adaptive": adaptive,
    }
)
"""By name; the place in this table is what a seed's `graft` holds, so new ones go to the end."""


def code(name: str, curve: str) -> int:
    """What a seed's `graft` holds for a strategy and a curve. Raises UnknownNameError."""
    if name not in STRATEGIES:
        raise UnknownNameError("graft", name, STRATEGIES)
    return graft_code(curve, strategy=list(STRATEGIES).index(name))  # type: ignore[arg-type]


def name_of(graft: int) -> str:
    """The strategy of a seed's `graft`."""
    number = max(graft, 0) & ((1 << STRATEGY_BITS) - 1)
    names = list(STRATEGIES)
    return names[number] if number < len(names) else names[0]


def paused_code(graft: int, paused: bool) -> int:
    """The same graft with its pause set or lifted; the pauses counted so far stay."""
    return (max(graft, 0) & ~PAUSED) | (PAUSED if paused else 0)


def pauses_of(graft: int) -> int:
    """Ticks that this graft has waited."""
    return max(graft, 0) >> PAUSE_SHIFT


def choice_of(graft: int) -> int:
    """Strategy and curve alone."""
    return max(graft, 0) & CHOICE


def waits(graft: int, signs: Signs, config: Config) -> bool:
    """Whether alpha stays where it is at the next tick."""
    return STRATEGIES[name_of(graft)](signs, config)
