"""Which backend computes each bank of a site, and why."""

from __future__ import annotations

from typing import NamedTuple

import torch

from morphc.kernels import backend
from morphc.runtime import engine
from morphc.runtime.site import SeedSite


class Backend(NamedTuple):
    """`triton` or `torch`; reason: why it isn't triton, empty where it is."""

    name: str
    reason: str = ""


def backends_of(site: SeedSite, dtype: torch.dtype) -> dict[str, Backend]:
    """Of each bank by its blueprint, for activations of `dtype` on the device where the bank lies now."""
    return {name: _backend(site, name, dtype) for name, _ in site.slots.items()}


def _backend(site: SeedSite, name: str, dtype: torch.dtype) -> Backend:
    bank = site.slots.get(name)
    assert bank is not None
    if site.backend == "torch":
        return Backend("torch", backend.why("torch", bank.owner.device))
    if reason := backend.unavailable(bank.owner.device):
        return Backend("torch", reason)
    if dtype not in backend.KERNEL_DTYPES:
        return Backend("torch", f"no kernel reads {str(dtype).removeprefix('torch.')}")
    reason = engine.spec_of_bank(site, bank).refusal(dtype, bank.owner.device)
    return Backend("torch", reason) if reason else Backend("triton")
