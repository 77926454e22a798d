"""The optimizer step of the slots, on generated kernels."""

from __future__ import annotations

from operator import is_
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from morphc.kernels import backend, training
from morphc.kernels.layout import View
from morphc.kernels.site import BankKernels, TapBankKernels
from morphc.runtime.bank import SlotBank
from morphc.runtime.cells import capturing

if TYPE_CHECKING:
    from morphc.runtime.site import SeedSite


class Held:
    """A bank as a step on kernels takes it."""

    __slots__ = ("_backend", "_flat", "_own", "_tensors", "active", "addresses", "bank", "kernels", "tensors")

    def __init__(
        self, site: SeedSite, bank: SlotBank, kernels: BankKernels | TapBankKernels, active: Tensor
    ) -> None:
        self.bank, self.kernels, self.active = bank, kernels, active
        self.tensors = training.bank_of(bank, bank.names)
        self.addresses = training.addresses(active, self.tensors)
        self._backend, self._flat = site.backend, bank.flat
        self._own = (*bank._parameters.values(), *bank.opt._buffers.values())
        # So that nobody else gets the memory, even if theirs becomes another.
        self._tensors = [own.detach() for own in self._own if own is not None]

    def holds(self, site: SeedSite, bank: SlotBank) -> bool:
        """Whether the site still has all of it but, perhaps, the list of active seeds."""
        return (
            bank.flat is self._flat
            and all(map(is_, (*bank._parameters.values(), *bank.opt._buffers.values()), self._own))
            and site.backend == self._backend
        )


class Steps:
    """One AdamW step of the banks of a model that kernels step, equal banks in one launch.

    scale: what the loss was multiplied by. Slots whose gradient isn't finite are left as they are.
    """

    def __init__(self, rates: training.Rates, scale: Tensor | None) -> None:
        self.rates, self.scale = rates, scale
        self._together: dict[BankKernels, tuple[list[Held], list[Tensor]]] = {}

    def add(self, site: SeedSite, name: str, bank: SlotBank) -> bool:
        """Step the slots of a bank that train, by the end of `run`; False where torch has to do it."""
        held = site.engine.held.get(name)
        if held is not None and not held.holds(site, bank):
            held = None
        kernels = held.kernels if held is not None else self._kernels(site, name, bank)
        if kernels is None or (self.scale is not None and not site.isolated_states):
            return (
                False  # the list doesn't tell the seeds whose gradients come from a loss that wasn't scaled
            )
        active = site.engine.listed(site, name, bank, kernels, kernels.device)
        if held is None or held.active is not active:
            held = site.engine.held[name] = Held(site, bank, kernels, active)
        if isinstance(kernels, BankKernels):
            flat = _flat(bank)
            if flat is None:
                return True
            if not capturing(kernels.device):
                banks, gradients = self._together.setdefault(kernels, ([], []))
                banks.append(held)
                gradients.append(flat)
                return True
            # Nobody fills a table of addresses when a captured graph is replayed.
            kernels.stepper.step(active, held.tensors, flat, self.rates, self._scale_on(kernels.device))
        else:
            parts = _parts(bank)
            if parts is not None:
                kernels.stepper.step(active, held.tensors, parts, self.rates, self._scale_on(kernels.device))
        _stepped([bank])
        return True

    def run(self) -> None:
        """Do what is left of all that was added. The gradients are gone then."""
        for kernels, (banks, gradients) in self._together.items():
            scale = self._scale_on(kernels.device)
            kernels.stepper.step_all([held.addresses for held in banks], gradients, self.rates, scale)
            _stepped([held.bank for held in banks])
        self._together.clear()

    def _kernels(self, site: SeedSite, name: str, bank: SlotBank) -> BankKernels | TapBankKernels | None:
        site.engine.held.pop(name, None)
        device = bank.owner.device
        if bank.flat.dtype != torch.float32 or backend.chosen(site.backend, device) != "triton":
            return None
        return site.engine.bank(site, name, bank, bank.flat, View("last", 1, site.features, 1))

    def _scale_on(self, device: torch.device) -> Tensor | None:
        return None if self.scale is None else self.scale.detach().to(device, torch.float32)


def _stepped(banks: list[SlotBank]) -> None:
    # A backward that waits for the parameters as they were looks at the first.
    increment_version([bank._leaves[bank.names[0]] for bank in banks])
    for bank in banks:
        bank.zero_grads()


def _flat(bank: SlotBank) -> Tensor | None:
    """The gradients of the bank's parameters in one buffer, one behind the other; None where there are none."""
    found = bank.flat_grad()
    if found is None:
        parts = _parts(bank)
        return None if parts is None else torch.cat([part.flatten() for part in parts])
    for key, part in zip(bank.names, bank.sections(found), strict=True) if bank.frozen else ():
        if key in bank.frozen:
            part.zero_()  # from zero, AdamW leaves it zero
    return found


def _parts(bank: SlotBank) -> list[Tensor] | None:
    """The same, a tensor each."""
    grads = bank.grads()
    if all(grad is None for grad in grads.values()):
        return None
    return [
        torch.zeros_like(leaf) if grad is None or key in bank.frozen else grad.contiguous()
        for (key, grad), leaf in zip(grads.items(), bank._leaves.values(), strict=True)
    ]
