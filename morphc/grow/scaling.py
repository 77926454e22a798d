"""The scale that a GradScaler multiplies a step's loss with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Scale:
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

    def __reduce__(self) -> tuple[type[Scale], tuple[()]]:
        return Scale, ()
