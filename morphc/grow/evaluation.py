"""What a seed is worth: the user's metric with it and without it, on the same data, and nothing else disturbed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

import torch
from torch import Tensor, nn

from morphc.errors import ConfigError
from morphc.grow.snapshot import restore_rng, rng_state
from morphc.runtime.sharded import reshard
from morphc.runtime.store import SeedStore

Evaluate = Callable[[nn.Module], float]

EXACT: Final = 4
"""So many seeds at once are each left out in turn; with more, Shapley values are sampled."""
PERMUTATIONS: Final = 8


def number(value: object, whose: str) -> float:
    """What a user's function or call gave, as a number. Raises ConfigError naming `whose` it is."""
    if isinstance(value, Tensor):
        if value.numel() == 1 and not value.is_complex():
            return float(value.detach())
        given = f"a tensor of shape {list(value.shape)} and {value.dtype}"
    else:
        try:
            return float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            given = repr(value)
    raise ConfigError(f"{whose} is {given}; it must be one real number, such as a mean loss")


@contextmanager
def undisturbed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluation without gradients, in eval mode; training flags and random states are as before afterwards."""
    flags = [(module, module.training) for module in model.modules()]
    chance = rng_state(device)
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, training in flags:
            module.training = training
        restore_rng(chance, device)
        reshard(model)


class Worth:
    """Evaluates a model with sets of seeds switched off; each set once."""

    def __init__(self, model: nn.Module, store: SeedStore, evaluate: Evaluate) -> None:
        self.model, self.store, self.evaluate = model, store, evaluate
        self.known: dict[frozenset[int], float] = {}

    def without(self, rows: frozenset[int]) -> float:
        """The metric with these rows' seeds switched off: at alpha 0 a site is the identity, bit for bit."""
        if rows not in self.known:
            alpha = self.store.state.alpha
            before = alpha.clone()
            try:
                if rows:
                    with torch.no_grad():
                        alpha[sorted(rows)] = 0.0
                with undisturbed(self.model, alpha.device):
                    self.known[rows] = float(self.evaluate(self.model))
            finally:
                if rows:
                    with torch.no_grad():
                        alpha.copy_(before)
        return self.known[rows]


def contributions(worth: Worth, rows: Sequence[int], lower_is_better: bool, draw: int) -> dict[int, float]:
    """For each row by how much the metric is better with its seed, relative to the metric without; NaN if not finite.

    Up to four seeds are each compared with the model that lacks only them. More share what they bring together by
    their Shapley values, averaged over `PERMUTATIONS` random orders and their reverses (Castro et al. 2009); `draw`
    seeds the orders.
    """
    everything = frozenset(rows)
    if len(rows) <= EXACT:
        whole = worth.without(frozenset())
        return {row: _gain(worth.without(frozenset({row})), whole, lower_is_better) for row in rows}
    nothing = worth.without(everything)
    generator = torch.Generator().manual_seed(draw)
    sums = dict.fromkeys(rows, 0.0)
    for _ in range(PERMUTATIONS):
        order = [rows[place] for place in torch.randperm(len(rows), generator=generator).tolist()]
        for path in (order, order[::-1]):
            off, value = everything, nothing
            for row in path:
                off = off - {row}
                better = worth.without(off)
                sums[row] += (value - better) if lower_is_better else (better - value)
                value = better
    scale = max(abs(nothing), 1e-12)
    found = {row: total / (2 * PERMUTATIONS) / scale for row, total in sums.items()}
    return {row: value if math.isfinite(value) else math.nan for row, value in found.items()}


def _gain(without: float, whole: float, lower_is_better: bool) -> float:
    gain = (without - whole) if lower_is_better else (whole - without)
    found = gain / max(abs(without), 1e-12)
    return found if math.isfinite(found) else math.nan
