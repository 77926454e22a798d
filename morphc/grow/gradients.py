"""How strong the gradient of a newborn is beside its incumbent's: a seed's slot against its host layer."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from morphc.lifecycle import TABLE, Lifecycle, Mode
from morphc.runtime.sharded import whole

if TYPE_CHECKING:
    from morphc.runtime.store import SeedStore


class Ratios:
    """RMS gradient of each slot over that of its host layer's parameters, taken at ticks.

    `take` queues work on the device and waits for nothing; `read` copies the results. Rows whose slot's gradient wasn't
    finite, out of all that were measured, are a seed's error rate.
    """

    def __init__(self, store: SeedStore) -> None:
        self.store = store
        self.ratio: dict[int, float] = {}
        self.measured: dict[int, int] = {}
        self.errors: dict[int, int] = {}
        self._taken: list[tuple[str, Tensor, Tensor]] = []

    @torch.no_grad()
    def take(self) -> None:
        """Before the gradients of slots and host are cleared: the ratios of every site that is at work."""
        self._taken = []
        for path, site in self.store.sites.items():
            if site.mode is Mode.DORMANT:
                continue
            host = [
                p.grad
                for p in self.store.requests[path].layer.parameters(recurse=False)
                if p.grad is not None
            ]
            for _, bank in site.slots.items():
                grads = [grad for grad in bank.grads().values() if grad is not None]
                if not grads or not host:
                    continue
                squares = torch.stack([grad.float().square().flatten(1).sum(1) for grad in grads]).sum(0)
                slot = squares / sum(grad[0].numel() for grad in grads)
                layer = torch.stack([whole(grad.float().square().sum()) for grad in host]).sum()
                layer = layer / sum(grad.numel() for grad in host)
                ratio = (slot / layer.to(slot.device)).sqrt()
                self._taken.append((path, bank.owner, ratio))

    def read(self) -> None:
        """Copy what was taken."""
        states = self.store.mirror()
        for path, owner, ratio in self._taken:
            offset = self.store.sites[path].offset
            for seed, value in zip(owner.tolist(), ratio.tolist(), strict=True):
                row = offset + seed
                if seed < 0 or TABLE[Lifecycle(int(states.lifecycle[row]))].trains == "nothing":
                    continue
                self.measured[row] = self.measured.get(row, 0) + 1
                if math.isfinite(value):
                    self.ratio[row] = value
                else:
                    self.errors[row] = self.errors.get(row, 0) + 1
        self._taken = []
        free = {row for row in self.measured if states.slot[row] < 0}
        for known in (self.ratio, self.measured, self.errors):
            for row in free & known.keys():
                del known[row]

    def of(self, row: int) -> float:
        """The last finite ratio of a row, NaN where there is none."""
        return self.ratio.get(row, math.nan)

    def error_rate(self, row: int) -> float:
        """Share of the measured ticks at which the slot's gradient wasn't finite; NaN where none was measured."""
        count = self.measured.get(row, 0)
        return self.errors.get(row, 0) / count if count else math.nan

    def state_dict(self) -> dict[str, Any]:
        """Everything that `load_state_dict` needs."""
        return {"ratio": dict(self.ratio), "measured": dict(self.measured), "errors": dict(self.errors)}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.ratio = {int(row): value for row, value in saved["ratio"].items()}
        self.measured = {int(row): value for row, value in saved["measured"].items()}
        self.errors = {int(row): value for row, value in saved["errors"].items()}
