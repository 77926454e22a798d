"""EMA and SWA copies of a model that grows: torch's `AveragedModel`, whose seeds follow those of the model.

averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999))
... optimizer.step(); grower.step(loss); averaged.update_parameters(model)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import swa_utils

from morphc.kernels.reference.lifecycle import among
from morphc.lifecycle import BLENDS, Lifecycle, mode_of
from morphc.runtime.bank import SlotBank
from morphc.runtime.mirror import Mirror
from morphc.runtime.site import SeedSite
from morphc.runtime.store import store_of

MEASURED = ("sums", "counts", "widths")


class AveragedModel(swa_utils.AveragedModel):
    """`torch.optim.swa_utils.AveragedModel` of a compiled model, with the same arguments.

    States, alphas and who holds which slot are the model's own and never averages, also with `use_buffers=True`. A slot
    is averaged while its seed blends in; before that, and when another seed takes it, it is copied, for an average
    with what came before would be of two different functions. Nothing ticks in the copy. Raises NotMorphedError
    for a model without seeds.
    """

    def __init__(self, model: nn.Module, *args: Any, **options: Any) -> None:
        store_of(model)
        super().__init__(model, *args, **options)
        self._seen: Mirror | None = None

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Average the parameters, and let the seeds follow. Reads the device only after a tick or a command."""
        own, theirs = store_of(self.module), store_of(model)
        slots = [
            (bank, dict(theirs.sites[path].slots.items())[name], bank.owner.clone(), blending(site, bank))
            for path, site in own.sites.items()
            for name, bank in site.slots.items()
        ]
        super().update_parameters(model)
        for bank, source, owner, blended in slots:
            bank.owner.copy_(source.owner)
            kept = blended & (bank.owner == owner)
            for name in bank.names:
                value = bank.get_parameter(name)
                fresh = source.get_parameter(name).to(value.device)
                value.copy_(torch.where(kept.view(-1, *(1,) * (value.dim() - 1)), value, fresh))
        for name, buffer in own.state.named_buffers():
            if name not in MEASURED:
                buffer.copy_(theirs.state.get_buffer(name))
        now = theirs.mirror()
        if now is not self._seen:
            for site in own.sites.values():
                states = now.lifecycle[site.offset : site.offset + site.seeds]
                own.set_mode(site, mode_of({Lifecycle(int(state)) for state in states}))
            self._seen = now


def blending(site: SeedSite, bank: SlotBank) -> Tensor:
    """[K] bool: the slots of `bank` whose seed's output the host sees."""
    state = site.state.lifecycle[site.offset : site.offset + site.seeds].to(bank.owner.device)
    return (bank.owner >= 0) & among(state[bank.owner.clamp(min=0)], BLENDS)
