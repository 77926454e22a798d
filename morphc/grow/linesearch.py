"""How large a grafted seed's out-weights are to be: a search over their scale, by the loss itself.

What isolation learns has a direction and no size. Least squares gives it one that is right for a squared loss at a
linear head, whether it is a mean or a sum. For cross-entropy, and for sites deeper in the host, that is only where the
search begins: the loss of the model with the seed fully blended (alpha 1) is asked for at scale 0 and 1, then 2 and 4
while it falls or 1/4, 1/16, 1/64 until it falls, and up to twice where a parabola through the best three has its
minimum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor, nn

from morphc.grow.evaluation import undisturbed
from morphc.runtime import isolation, moves, ticking

if TYPE_CHECKING:
    from morphc.runtime.bank import SlotBank
    from morphc.runtime.store import SeedStore

UP: Final = (2.0, 4.0)
DOWN: Final = (0.25, 0.0625, 0.015625)
REFINEMENTS: Final = 2
NEAR: Final = 0.05
"""A scale within so much of one that was tried isn't worth another evaluation."""


@dataclass(frozen=True)
class Refit:
    """How a seed's out-weights got their size.

    by: `loss` (a search over the step's own loss), `evaluate` (over the validation metric), or `estimate` (least
    squares alone). scale: what the search made of the estimate. before, after: what was searched over without and with
    the seed; NaN for an estimate.
    """

    by: str
    scale: float = 1.0
    before: float = math.nan
    after: float = math.nan


def search(value_at: Callable[[float], float]) -> tuple[float, float, float]:
    """The scale at which `value_at` is lowest, what it is at 0, and there.

    Scale 1 where 0 and 1 give the same (nothing is to be learned from it) or 0 gives nothing finite; the smallest one
    tried where none is better than 0.
    """
    known = {0.0: value_at(0.0)}
    if not math.isfinite(known[0.0]):
        return 1.0, known[0.0], math.nan

    def at(scale: float) -> float:
        value = value_at(scale)
        known[scale] = value if math.isfinite(value) else math.inf
        return known[scale]

    if at(1.0) == known[0.0]:
        return 1.0, known[0.0], known[1.0]
    if known[1.0] < known[0.0]:
        last = 1.0
        for scale in UP:
            if at(scale) >= known[last]:
                break
            last = scale
    else:
        for scale in DOWN:
            if at(scale) < known[0.0]:
                break
    tried = sorted(known)
    if min(tried, key=known.__getitem__) == 0.0:
        return tried[1], known[0.0], known[tried[1]]
    for _ in range(REFINEMENTS):
        tried = sorted(known)
        place = tried.index(min(tried, key=known.__getitem__))
        if place + 1 == len(tried):
            break
        bottom = _bottom(*((scale, known[scale]) for scale in tried[place - 1 : place + 2]))
        if bottom is None or abs(bottom - tried[place]) < NEAR * tried[place]:
            break
        at(bottom)
    best = min(known, key=known.__getitem__)
    return best, known[0.0], known[best]


def _bottom(low: tuple[float, float], mid: tuple[float, float], high: tuple[float, float]) -> float | None:
    """Where the parabola through three points has its minimum, if it has one between the outer two."""
    if not all(math.isfinite(value) for _, value in (low, mid, high)):
        return None
    (a, fa), (b, fb), (c, fc) = low, mid, high
    left, right = (b - a) * (fb - fc), (b - c) * (fb - fa)
    if left == right:
        return None
    found = b - 0.5 * ((b - a) * left - (b - c) * right) / (left - right)
    return found if a < found < c else None


@torch.no_grad()
def size(
    model: nn.Module, store: SeedStore, rows: Sequence[int], objective: Callable[[], Tensor | float]
) -> dict[int, tuple[float, float, float]]:
    """Scale the out-weights of seeds that are being grafted, one after the other; `search`'s answer by row.

    objective: what is to be low, of the model as it then is; it is called in eval mode, without gradients.
    """
    alpha = store.state.alpha
    before = alpha.clone()
    found: dict[int, tuple[float, float, float]] = {}
    with undisturbed(model, alpha.device):
        try:
            for row in rows:
                site, seed = ticking.site_at(store, row)
                ((name, slot),) = moves.held_slots(site, seed)
                bank = moves.banks_of(site)[name]
                outs = bank.kind.outs(bank.geometry)
                if not outs or bank.blend == "lerp":
                    continue
                alpha[row] = 1.0
                own = {out: bank.get_parameter(out)[slot].clone() for out in outs}
                scale = 1.0
                try:
                    found[row] = search(partial(_value, objective, bank, slot, own))
                    scale = found[row][0]
                finally:
                    _scale(bank, slot, own, scale)
                isolation.balance(bank, slot)
        finally:
            alpha.copy_(before)
    return found


def _value(
    objective: Callable[[], Tensor | float], bank: SlotBank, slot: int, own: dict[str, Tensor], scale: float
) -> float:
    _scale(bank, slot, own, scale)
    return float(objective())


def _scale(bank: SlotBank, slot: int, own: dict[str, Tensor], scale: float) -> None:
    for out, weight in own.items():
        bank.get_parameter(out)[slot] = weight * scale
