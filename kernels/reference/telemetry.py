"""Telemetry of one activation, per chunk.

Of every chunk, around a shift m of its own (the mean of its values, so that mean 1000 and std 0.01 keep
their variance):

    total    sum of (x - m)            squares   sum of (x - m)^2
    row_squares  sum over rows of (sum over the chunk of (x - m))^2
    peak     max |x|                   zeros     how many are dead: |act(x)| <= near_zero, of act(x) as it is stored
    finite   how many are finite       nonfinite how many are not

Non-finite values are left out of the moments, the peak and the dead, and stand as m in the row sums. Sums
are formed in float32 (float64 for a float64 activation) and handed on in float64.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from morphc.kernels.reference.activations import activation
from morphc.kernels.reference.chunks import chunk_max, chunk_sums, chunk_widths, spread


class Sums(NamedTuple):
    """What one activation adds: [S] float64, or int64 for `count`, `zeros` and `nonfinite`."""

    shift: Tensor
    total: Tensor
    squares: Tensor
    row_squares: Tensor
    peak: Tensor
    finite: Tensor
    zeros: Tensor
    nonfinite: Tensor
    rows: int | Tensor


def as_rows(x: Tensor, axis: int) -> Tensor:
    """[rows, F]; a view wherever the strides allow one."""
    return x.movedim(axis, -1).reshape(-1, x.shape[axis])


def measure(
    x: Tensor,
    seeds: int,
    epilogue: str | None = None,
    near_zero: float = 0.0,
    stored: torch.dtype | None = None,
) -> Sums:
    """x: [rows, F] with at least one row. Reads nothing back from the device.

    stored: of the activation, where x is a wider copy of it; act(x) is rounded to that.
    """
    rows, features = x.shape
    wide = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    finite = wide.isfinite()
    per_seed = chunk_sums(finite.sum(0), seeds)
    shift = chunk_sums(torch.where(finite, wide, 0).sum(0), seeds) / per_seed.clamp(min=1)
    centered = torch.where(finite, wide - spread(shift, features), 0)
    after = wide if epilogue is None else activation(epilogue)(wide).to(stored or x.dtype).to(wide.dtype)
    dead = finite & (after.abs() <= near_zero)
    width = chunk_widths(torch.arange(seeds, device=x.device), features, seeds)
    columns = torch.stack((centered.sum(0), (centered * centered).sum(0)))
    sums = chunk_sums(columns.to(torch.float64), seeds)
    return Sums(
        shift=shift.to(torch.float64),
        total=sums[0],
        squares=sums[1],
        row_squares=chunk_sums(centered, seeds).square().sum(0).to(torch.float64),
        peak=chunk_max(torch.where(finite, wide, 0).abs().amax(0), seeds).to(torch.float64),
        finite=per_seed,
        zeros=chunk_sums(dead.sum(0), seeds),
        nonfinite=width * rows - per_seed,
        rows=rows,
    )
