"""What a run's losses say at a tick: how steady they are, where they are going, and whether something broke."""

from __future__ import annotations

import math
from collections import deque
from typing import Any, Final

import numpy as np

WINDOW: Final = 10
"""Ticks over which stability is taken."""
LEAST: Final = 4
MEMORY: Final = 0.98
"""How much of the mean and the spread of the losses is kept at every step."""
WARM: Final = 32
"""Steps before a loss can be called an outlier."""
RECENT: Final = 16
"""Steps among which the outliers are counted."""
SLOWNESS: Final = 0.8


class Losses:
    """The losses of a run, told tick by tick."""

    def __init__(self, sigma: float, times: int) -> None:
        self.sigma, self.times = sigma, times
        self.mean = self.variance = 0.0
        self.count = 0
        self.recent: deque[bool] = deque(maxlen=RECENT)
        self.ticks: deque[float] = deque(maxlen=WINDOW)
        self.trend = math.nan

    def tell(self, losses: list[float]) -> str:
        """Take a tick's losses in; what is wrong with them, or nothing."""
        for loss in losses:
            if not math.isfinite(loss):
                return f"a loss of {loss}"
            self._see(loss)
        if losses:
            mean = math.fsum(losses) / len(losses)
            if self.ticks and self.ticks[-1]:
                change = (mean - self.ticks[-1]) / abs(self.ticks[-1])
                self.trend = (
                    change if math.isnan(self.trend) else SLOWNESS * self.trend + (1 - SLOWNESS) * change
                )
            self.ticks.append(mean)
        if sum(self.recent) >= self.times:
            return f"{sum(self.recent)} of the last {len(self.recent)} losses beyond {self.sigma:g} sigma"
        return ""

    def _see(self, loss: float) -> None:
        spread = max(math.sqrt(self.variance), 1e-3 * abs(self.mean), 1e-12)
        outlier = self.count >= WARM and loss > self.mean + self.sigma * spread
        self.recent.append(outlier)
        if outlier:
            return
        self.count += 1
        rate = max(1 - MEMORY, 1 / self.count)
        away = loss - self.mean
        self.mean += rate * away
        self.variance = (1 - rate) * (self.variance + rate * away * away)

    @property
    def latest(self) -> float:
        """Mean loss of the last tick, NaN before the first."""
        return self.ticks[-1] if self.ticks else math.nan

    @property
    def stability(self) -> float:
        """1 - spread around their line / mean, of the last ticks' mean losses, at least 0; NaN while there are few."""
        if len(self.ticks) < LEAST:
            return math.nan
        values = np.asarray(self.ticks)
        places = np.arange(len(values))
        slope, start = np.polyfit(places, values, 1)
        rest = values - (slope * places + start)
        level = abs(float(values.mean()))
        return (
            max(0.0, 1.0 - float(np.sqrt((rest**2).sum() / (len(values) - 2))) / level) if level else math.nan
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything that `load_state_dict` needs."""
        return {
            "mean": self.mean,
            "variance": self.variance,
            "count": self.count,
            "recent": list(self.recent),
            "ticks": list(self.ticks),
            "trend": self.trend,
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.mean, self.variance, self.count = saved["mean"], saved["variance"], saved["count"]
        self.trend = saved["trend"]
        self.recent = deque(saved["recent"], maxlen=RECENT)
        self.ticks = deque(saved["ticks"], maxlen=WINDOW)
