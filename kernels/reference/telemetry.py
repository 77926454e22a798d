"""Telemetry of one activation, per chunk, in one pass over blocks of rows that fit the cache.

Of every chunk, around a shift m of its own (the mean of its first rows, so that mean 1000 and std 0.01 keep
their variance):

    total    sum of (x - m)            squares   sum of (x - m)^2
    row_squares  sum over rows of (sum over the chunk of (x - m))^2
    peak     max |x|                   zeros     how many are dead: |act(x)| <= near_zero
    finite   how many are finite       nonfinite how many are not

Non-finite values are left out of the moments, the peak and the dead, and stand as m in the row sums. Sums
are formed in float32 (float64 for a float64 activation) and handed on in float64.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from morphc.kernels.reference.activations import DEAD_BELOW_ZERO, activation
from morphc.kernels.reference.chunks import chunk_max, chunk_sums, chunk_widths, spread

BLOCK_ELEMENTS = 1 << 17
"""Elements a block of rows may have on the CPU: half a MiB of float32 stays in the second-level cache."""


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
    rows: int


def as_rows(x: Tensor, axis: int) -> Tensor:
    """[rows, F]; a view wherever the strides allow one."""
    return x.movedim(axis, -1).reshape(-1, x.shape[axis])


def measure(x: Tensor, seeds: int, epilogue: str | None = None, near_zero: float = 0.0) -> Sums:
    """x: [rows, F] with at least one row.

    On the CPU the values decide whether the slower form that masks non-finite ones is needed; elsewhere
    nothing is read back and the masks are always there.
    """
    if x.device.type == "cpu":
        found = _sums(x, seeds, epilogue, near_zero, masked=False)
        # numpy shares the memory: asking the tensor itself would go through the dispatcher as a device read.
        if bool(_all_finite(found.peak)):
            return found
    return _sums(x, seeds, epilogue, near_zero, masked=True)


def _all_finite(values: Tensor) -> bool:
    total = float(values.numpy().sum())
    return total - total == 0.0


def _sums(x: Tensor, seeds: int, epilogue: str | None, near_zero: float, *, masked: bool) -> Sums:
    rows, features = x.shape
    accumulate = torch.float64 if x.dtype == torch.float64 else torch.float32
    block = max(1, min(rows, BLOCK_ELEMENTS // features)) if x.device.type == "cpu" else rows
    blocks = -(-rows // block)
    shift = _shift(x[:block], seeds, accumulate, masked)
    center = spread(shift, features)
    work = torch.empty(block, features, dtype=accumulate, device=x.device)
    partial = torch.zeros(blocks, 5, features, dtype=accumulate, device=x.device)
    row_partial = torch.empty(blocks, seeds, dtype=accumulate, device=x.device)
    for index in range(blocks):
        part = x[index * block : (index + 1) * block]
        _block(
            part,
            center,
            seeds,
            epilogue,
            near_zero,
            masked,
            work[: part.shape[0]],
            partial[index],
            row_partial[index],
        )
    return _gather(partial, row_partial, shift, rows, seeds, masked)


def _shift(part: Tensor, seeds: int, accumulate: torch.dtype, masked: bool) -> Tensor:
    values = part.to(accumulate)
    width = chunk_widths(torch.arange(seeds, device=part.device), part.shape[1], seeds)
    count = width * part.shape[0]
    if masked:
        finite = values.isfinite()
        values = values.where(finite, 0)
        count = chunk_sums(finite.sum(0), seeds).clamp(min=1)
    return chunk_sums(values.sum(0), seeds) / count


def _block(
    part: Tensor,
    center: Tensor,
    seeds: int,
    epilogue: str | None,
    near_zero: float,
    masked: bool,
    work: Tensor,
    out: Tensor,
    row_out: Tensor,
) -> None:
    """Column sums of one block into `out` (sum, squares, dead, peak, finite) [5, F] and `row_out` [S]."""
    finite = part.isfinite() if masked else None
    torch.sub(part, center, out=work)
    if finite is not None:
        work.masked_fill_(~finite, 0)
    torch.sum(work, 0, out=out[0])
    per_row = chunk_sums(work, seeds) if seeds < part.shape[1] else None
    torch.mul(work, work, out=work)
    torch.sum(work, 0, out=out[1])
    if per_row is None:
        row_out.copy_(out[1])
    else:
        torch.sum(per_row.square_(), 0, out=row_out)
    _dead(part, epilogue, near_zero, work)
    if finite is not None:
        work.masked_fill_(~finite, 0)
        torch.sum(finite.to(work.dtype), 0, out=out[4])
    torch.sum(work, 0, out=out[2])
    torch.abs(part, out=work) if part.dtype == work.dtype else work.copy_(part).abs_()
    if finite is not None:
        work.masked_fill_(~finite, 0)
    torch.amax(work, 0, out=out[3])


def _dead(part: Tensor, epilogue: str | None, near_zero: float, out: Tensor) -> None:
    """1 where the value is dead, 0 elsewhere, written as floats: summing booleans is ten times slower."""
    if epilogue in DEAD_BELOW_ZERO and near_zero == 0.0:
        torch.le(part, 0, out=out)
        return
    value = part if epilogue is None else activation(epilogue)(part)
    if near_zero == 0.0:
        torch.eq(value, 0, out=out)
    else:
        torch.le(value.abs(), near_zero, out=out)


def _gather(partial: Tensor, row_partial: Tensor, shift: Tensor, rows: int, seeds: int, masked: bool) -> Sums:
    features = partial.shape[2]
    columns = partial[:, :3].sum(0, dtype=torch.float64)
    sums = chunk_sums(columns, seeds)
    width = chunk_widths(torch.arange(seeds, device=partial.device), features, seeds)
    total = width * rows
    finite = partial[:, 4].sum(0, dtype=torch.float64) if masked else None
    count = total if finite is None else chunk_sums(finite, seeds).to(torch.int64)
    return Sums(
        shift=shift.to(torch.float64),
        total=sums[0],
        squares=sums[1],
        row_squares=row_partial.sum(0, dtype=torch.float64),
        peak=chunk_max(partial[:, 3].amax(0), seeds).to(torch.float64),
        finite=count,
        zeros=sums[2].to(torch.int64),
        nonfinite=total - count,
        rows=rows,
    )
