"""Reconstruction on kernels: the forward saves the chunks of isolated seeds, and their step learns to give them back.

One launch saves them; two make the whole step, gradients and AdamW together (`morphc.kernels.training`). It serves
sites at which nothing blends, one forward a step. Everywhere else, and from the second forward before a step on,
`morphc.runtime.isolation` adds gradients up in torch, and the slots are stepped as all others are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from morphc.kernels import training
from morphc.kernels.layout import View, is_dense
from morphc.kernels.reference.active_list import HEADER
from morphc.kernels.site import BankKernels
from morphc.lifecycle import BLENDS, ISOLATED, TRAINS, Mode
from morphc.runtime import engine

if TYPE_CHECKING:
    from morphc.runtime.bank import SlotBank
    from morphc.runtime.site import SeedSite


class Saved(NamedTuple):
    """The chunks [K, rows, C] (or [K, C, rows]) of a forward by their place in `listed`; versions: of whose slots."""

    kernels: BankKernels
    stash: Tensor
    view: View
    listed: Tensor
    versions: tuple[int, int]


def save(site: SeedSite, name: str, bank: SlotBank, y: Tensor) -> Saved | None:
    """The chunks of the isolated seeds; None where kernels don't do it."""
    if site.mode is not Mode.TRAINING or bank.spatial or not is_dense(y):
        return None
    view = engine.view(site, y)
    kernels = site.engine.bank(site, name, bank, y, view) if view is not None else None
    if view is None or not isinstance(kernels, BankKernels) or training.refuses(kernels.spec):
        return None
    lifecycle, alpha = site._states_on(y.device)
    listed = kernels.new_list()
    kernels.make_list(bank.owner, lifecycle, alpha, listed, BLENDS, ISOLATED, TRAINS)
    stash = kernels.new_stash(view)
    params = tuple(bank.get_parameter(name) for name in bank.names)
    # Nothing on the list blends, so the activation is only read.
    kernels.forward(y.detach(), view, listed, params, stash)
    return Saved(kernels, stash, view, listed, versions_of(site, bank))


def versions_of(site: SeedSite, bank: SlotBank) -> tuple[int, int]:
    """Changes when a slot changes hands or a seed its state."""
    return bank.owner._version, site.state.lifecycle._version


def by_slot(saved: Saved, bank: SlotBank) -> Tensor:
    """[K, rows, C]: the chunks by slot; what stands in padding and in other slots means nothing."""
    chunks = saved.stash if saved.view.walk != "channels_first" else saved.stash.transpose(1, 2)
    place = torch.arange(bank.slots, device=chunks.device)
    slot = saved.listed[HEADER : HEADER + bank.slots].long()
    target = torch.where(place < saved.listed[0], slot, bank.slots)
    found = chunks.new_zeros(bank.slots + 1, *chunks.shape[1:])
    return found.index_copy_(0, target, chunks)[: bank.slots]


def step(bank: SlotBank, saved: Saved, options: dict[str, Any]) -> Tensor:
    """One step of the isolated slots; their losses [K]."""
    loss = torch.zeros(bank.slots, dtype=torch.float32, device=bank.owner.device)
    tensors = training.bank_of(bank, bank.names)
    rates = training.Rates(**options)
    saved.kernels.reconstruct(saved.stash, saved.view, saved.listed, tensors, loss, rates)
    return loss
