"""The list of active seeds, made by the kernel and by the reference."""

from __future__ import annotations

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from morphc.kernels.active import ActiveList
from morphc.kernels.reference.active_list import active_list
from morphc.lifecycle import BLENDS, ISOLATED, TRAINS, Lifecycle


def made(owner: Tensor, lifecycle: Tensor, alpha: Tensor, device: torch.device) -> Tensor:
    maker = ActiveList(device)
    active = maker.new(owner.shape[0])
    active.fill_(-7)
    maker(owner.to(device), lifecycle.to(device), alpha.to(device), active, BLENDS, ISOLATED, TRAINS)
    return active.cpu()


@given(
    slots=st.integers(1, 90),
    spare=st.integers(0, 60),
    free=st.floats(0, 1),
    zero=st.sampled_from([0.0, 0.3, 1.0]),
    draw=st.integers(0, 999),
)
@settings(max_examples=12)
@example(slots=530, spare=300, free=0.2, zero=0.2, draw=0)
def test_kernel_and_reference_agree(
    slots: int, spare: int, free: float, zero: float, draw: int, device: torch.device
) -> None:
    generator = torch.Generator().manual_seed(draw)
    seeds = slots + spare
    owner = torch.randperm(seeds, generator=generator)[:slots]
    owner[torch.rand(slots, generator=generator) < free] = -1
    lifecycle = torch.randint(0, len(Lifecycle), (seeds,), generator=generator, dtype=torch.int32)
    alpha = torch.rand(seeds, generator=generator)
    alpha[torch.rand(seeds, generator=generator) < zero] = 0.0
    want = active_list(owner, lifecycle, alpha, BLENDS, ISOLATED, TRAINS)
    assert torch.equal(made(owner, lifecycle, alpha, device), want)


def test_blending_seeds_come_first_then_isolated_ones_each_by_seed(device: torch.device) -> None:
    grafting, training, fossil = Lifecycle.GRAFTING, Lifecycle.TRAINING, Lifecycle.FOSSILIZED
    lifecycle = torch.zeros(10, dtype=torch.int32)
    for seed, state in {9: grafting, 2: fossil, 5: training, 1: training, 7: grafting}.items():
        lifecycle[seed] = state
    alpha = torch.zeros(10)
    alpha[9], alpha[2] = 0.25, 1.0
    owner = torch.tensor([9, -1, 5, 2, 1, 7, 3])
    active = made(owner, lifecycle, alpha, device)
    assert active[:4].tolist() == [4, 2, 3, 0]
    slot, seed, flags, strength = active[4:].view(4, 7)
    # Seed 7 grafts at alpha 0, slot 1 is free, seed 3 is dormant: none of them is listed.
    assert slot.tolist() == [3, 0, 4, 2, 1, 5, 6]
    assert seed.tolist() == [2, 9, 1, 5, -1, 7, 3]
    assert flags.tolist() == [1, 5, 6, 6, 0, 4, 0]
    assert strength.view(torch.float32).tolist() == [1.0, 0.25, 1.0, 1.0, 1.0, 1.0, 1.0]


def test_candidates_of_one_seed_are_all_listed(device: torch.device) -> None:
    owner = torch.tensor([4, 1, 4, 4])
    lifecycle = torch.full((5,), Lifecycle.TRAINING, dtype=torch.int32)
    active = made(owner, lifecycle, torch.zeros(5), device)
    assert active[4:8].tolist() == [1, 0, 2, 3]
    assert active[8:12].tolist() == [1, 4, 4, 4]


def test_nan_alpha_does_not_blend(device: torch.device) -> None:
    lifecycle = torch.full((2,), Lifecycle.GRAFTING, dtype=torch.int32)
    active = made(torch.tensor([0, 1]), lifecycle, torch.tensor([torch.nan, 0.5]), device)
    assert active[:2].tolist() == [1, 1]
    assert active[6:8].tolist() == [1, 0]
