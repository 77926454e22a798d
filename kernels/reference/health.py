"""Health of every seed, derived from the sums of its telemetry window.

count = rows C,  n = count - nonfinite           values in all, and the finite ones
mean = shift + total / n                         variance = squares / n - (total / n)^2, at least 0
dead fraction = zeros / count
correlation = (V - C v) / (C (C - 1) v)          V the variance of the row sums, v the chunk's variance
gradient norm = sqrt(grad_squares / samples)     saliency = saliency / samples
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

# Rows of `sums` (float64) and `counts` (int64).
SHIFT, SUM, SQUARES, ROW_SQUARES, ZEROS, PEAK, GRAD_SQUARES, SALIENCY = range(8)
ROWS, NONFINITE, GRAD_SAMPLES = range(3)

HEALTH: Final = (
    "count",
    "mean",
    "variance",
    "dead_fraction",
    "correlation",
    "peak",
    "nonfinite",
    "gradient_norm",
    "saliency",
)


def health(sums: Tensor, counts: Tensor, widths: Tensor) -> Tensor:
    """[len(HEALTH), N] float64 from sums [8, N] float64, counts [3, N] int64 and widths [N] int32.

    mean and variance (population) of all finite values · dead fraction of all values · correlation: average
    over the pairs of features of a chunk (intraclass; NaN for one feature) · gradient norm: root of the mean
    over samples of the sum of g^2 · saliency: mean over samples of the sum of |x g|. NaN where nothing was
    measured.
    """
    rows = counts[ROWS].to(torch.float64)
    width = widths.to(torch.float64)
    total = rows * width
    count = total - counts[NONFINITE]
    offset = sums[SUM] / count
    variance = (sums[SQUARES] / count - offset.square()).clamp(min=0)
    row_variance = sums[ROW_SQUARES] / rows - (sums[SUM] / rows).square()
    spread = width * variance
    correlation = (row_variance - spread) / ((width - 1) * spread)
    nan = torch.full_like(count, torch.nan)
    samples = counts[GRAD_SAMPLES].to(torch.float64)
    return torch.stack(
        (
            total,
            sums[SHIFT] + offset,
            variance,
            sums[ZEROS] / total,
            torch.where(width > 1, correlation, nan),
            torch.where(count > 0, sums[PEAK], nan),
            counts[NONFINITE].to(torch.float64),
            (sums[GRAD_SQUARES] / samples).sqrt(),
            sums[SALIENCY] / samples,
        )
    )
