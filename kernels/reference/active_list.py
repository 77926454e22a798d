"""The list of a bank's active seeds, which the kernels over active seeds walk.

int32 [4 + 4 K] for a bank of K slots:

    listed, blending, training, 0     how many slots are listed, how many of these blend, how many of them train
    slot      [K]   a permutation of all slots
    seed      [K]   the site's seed that holds it, -1 where it is free
    flags     [K]   1 blends, 2 isolated, 4 trains
    strength  [K]   float32 bits: alpha where it blends, else 1

First come the slots that blend (their owner's state blends, and its alpha is above 0), ordered by seed, so that
neighbours in the list share memory sectors; then those that are isolated, likewise; then, unlisted, all others in
their own order. Slots of one seed stand in their own order.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

HEADER: Final = 4
ARRAYS: Final = 4
LISTED, BLENDING, TRAINING = range(3)
SLOT, SEED, FLAGS, STRENGTH = range(4)
BLENDS, ISOLATED, TRAINS = 1, 2, 4


def length(slots: int) -> int:
    """Numbers in the list of a bank."""
    return HEADER + ARRAYS * slots


def active_list(
    owner: Tensor, lifecycle: Tensor, alpha: Tensor, blending: int, isolated: int, training: int
) -> Tensor:
    """owner: [K] seed of the site or -1; lifecycle, alpha: [S]; the last three: sets of states, bit n for state n."""

    def among(states: int) -> Tensor:
        return held & (torch.bitwise_right_shift(states, state.long()) & 1).bool()

    seeds = lifecycle.shape[0]
    held = owner >= 0
    seed = owner.clamp(min=0)
    state, strength = lifecycle[seed], alpha[seed]
    blends = among(blending) & (strength > 0)
    isolates = among(isolated)
    trains = among(training)
    place = torch.where(blends, owner, torch.where(isolates, seeds + owner, 2 * seeds))
    order = torch.argsort(place, stable=True)
    flags = BLENDS * blends.int() + ISOLATED * isolates.int() + TRAINS * trains.int()
    listed = blends | isolates
    header = torch.stack(
        (listed.sum(), blends.sum(), (listed & trains).sum(), torch.zeros_like(listed.sum()))
    ).int()
    bits = torch.where(blends, strength, 1.0).float().view(torch.int32)
    return torch.cat((header, order.int(), owner.int()[order], flags[order], bits[order]))
