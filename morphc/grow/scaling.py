"""The scale that a GradScaler multiplies a step's loss with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from morphc.runtime.plain import Watcher


class Scale(Watcher):
    """A forward pre-hook that notes the scale of this step's backward: by the time of `Grower.step` the scaler may have
    moved on. `value` is None before the first training forward.

    A copy or pickle of the model takes an inert one along: its steps are nobody's.
    """

    def __init__(self, scaler: Any = None) -> None:
        self.scaler = scaler
        self.value: Tensor | None = None

    def __call__(self, model: nn.Module, *_: Any) -> None:
        if self.scaler is None or not model.training:
            return
        scale = self.scaler._scale
        if isinstance(scale, Tensor):
            self.value = scale.detach().clone()
        else:
            self.value = torch.tensor(self.scaler.get_scale())

    def of_step(self, optimizer: torch.optim.Optimizer) -> Tensor | None:
        """`value`, or NaN where the scaler has the optimizer skip this step: divided by it no gradient is finite, so no
        slot moves either. Nothing waits for the device.

        Before `scaler.update()` it is known what the optimizer's gradients held, afterwards that the scale has shrunk.
        """
        value = self.value
        if value is None or not isinstance(self.scaler._scale, Tensor):
            return value
        skipped = self.scaler._scale < value
        states = self.scaler._per_optimizer_states
        if id(optimizer) in states:
            for found in states[id(optimizer)]["found_inf_per_device"].values():
                skipped = skipped | (found.to(value.device, non_blocking=True) > 0)
        return torch.where(skipped, torch.nan, value)

    def __reduce__(self) -> tuple[type[Scale], tuple[()]]:
        return Scale, ()
