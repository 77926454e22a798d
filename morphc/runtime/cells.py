"""Cells: what a compiled graph holds in place of a site's mode.

A site has one small tensor, its *cell*, for each mode, and `SeedSite.cell` is the one of the mode that it is in. Graphs
take it as an input like any buffer: dynamo guards on its type and shape, which are the same in all modes, so a switch
recompiles nothing. The op finds the site and the mode by the cell's address, without reading the device. A CUDA graph
remembers the addresses of such inputs, so torch records it anew when a site has switched, and takes the old recording
when the site switches back.
"""

from __future__ import annotations

import itertools
import weakref
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from morphc.errors import SeedError
from morphc.lifecycle import Mode

if TYPE_CHECKING:
    from morphc.runtime.site import SeedSite

_numbers = itertools.count()
_by_number: weakref.WeakValueDictionary[int, SeedSite] = weakref.WeakValueDictionary()
_by_address: dict[int, tuple[int, Mode]] = {}


class Cells:
    """The cells of one site on one device: int64 [2], the site's number in this process and the mode."""

    def __init__(self, site: SeedSite, device: torch.device) -> None:
        self.device = device
        self.number = next(_numbers)
        _by_number[self.number] = site
        values = torch.tensor([[self.number, mode] for mode in Mode]).to(device)
        self.of = {mode: values[mode].clone() for mode in Mode}
        # Where nothing in a graph but the slots' own weights wants gradients, its backward hangs on this.
        self.anchor = torch.zeros(1, device=device).requires_grad_()
        if device.type != "meta":
            self.addresses = {cell.data_ptr(): (self.number, mode) for mode, cell in self.of.items()}
            _by_address.update(self.addresses)
            weakref.finalize(self, _forget, self.addresses)


def _forget(addresses: dict[int, tuple[int, Mode]]) -> None:
    for address, entry in addresses.items():
        if _by_address.get(address) == entry:
            del _by_address[address]


def site_of(cell: Tensor) -> tuple[SeedSite, Mode]:
    """The site that `cell` belongs to, and the mode that it stands for. Raises SeedError."""
    found = _by_address.get(cell.data_ptr())
    if found is None:
        if capturing(cell.device):
            raise SeedError(
                "a CUDA graph is being captured with a copy of a site's cell; give it the model itself"
            )
        number, mode = cell.tolist()  # a copy, which somebody made of the graph's inputs
        found = number, Mode(mode)
    site = _by_number.get(found[0])
    if site is None:
        raise SeedError(
            "this compiled graph belongs to a model that is gone; torch.compile the model at hand"
        )
    return site, found[1]


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured on this thread's stream."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
