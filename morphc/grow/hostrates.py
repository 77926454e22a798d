"""What the seeds' own optimizer takes from the host's training: its learning rate, and the scale of its loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from morphc.runtime.store import root_of


class HostRates:
    """Follows the user's optimizer and scaler, which are only read.

    scale: what this step's loss was multiplied with, on the scaler's device; None without a scaler.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, scaler: Any, factor: float
    ) -> None:
        self.model, self.optimizer, self.scaler, self.factor = model, optimizer, scaler, factor
        self.scale: Tensor | None = None
        self._known: float | None = None
        if scaler is not None and scaler.is_enabled():
            root_of(model).register_forward_pre_hook(self._note_scale)

    def lr(self, due: bool) -> float:
        """The first group's learning rate times `Config.seed_lr`; one on a device is read where a tick is `due`."""
        lr = self.optimizer.param_groups[0]["lr"]
        if isinstance(lr, Tensor) and lr.device.type != "cpu":
            # Reading it at every step would wait for the device.
            if self._known is None or due:
                self._known = float(lr)
            lr = self._known
        return float(lr) * self.factor

    def _note_scale(self, *_: Any) -> None:
        if not self.model.training:
            return
        # The scale of this step's backward: by the time of `step`, the scaler may have moved on.
        scale = self.scaler._scale
        self.scale = (
            scale.detach().clone() if isinstance(scale, Tensor) else torch.tensor(self.scaler.get_scale())
        )
