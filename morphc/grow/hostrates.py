"""What the seeds' own optimizer takes from the host's training: its learning rate, and the scale of its loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from morphc.grow.scaling import Scale
from morphc.runtime.store import root_of


class HostRates:
    """Follows the user's optimizer and scaler, which are only read."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, scaler: Any, factor: float
    ) -> None:
        self.model, self.optimizer, self.scaler, self.factor = model, optimizer, scaler, factor
        self._known: float | None = None
        self.noted = Scale(scaler)
        if scaler is not None and scaler.is_enabled():
            root_of(model).register_forward_pre_hook(self.noted)

    @property
    def scale(self) -> Tensor | None:
        """What this step's loss was multiplied with, on the scaler's device; None without a scaler."""
        return self.noted.value

    @property
    def scale_of_step(self) -> Tensor | None:
        """`scale`, or NaN where the scaler has the host's optimizer skip this step."""
        return self.noted.of_step(self.optimizer)

    def lr(self, due: bool) -> float:
        """The first group's learning rate times `Config.seed_lr`; one on a device is read where a tick is `due`."""
        lr = self.optimizer.param_groups[0]["lr"]
        if isinstance(lr, Tensor) and lr.device.type != "cpu":
            # Reading it at every step would wait for the device.
            if self._known is None or due:
                self._known = float(lr)
            lr = self._known
        return float(lr) * self.factor
