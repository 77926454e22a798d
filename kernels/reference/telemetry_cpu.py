"""The telemetry of `telemetry.py` for tensors in host memory: same sums, a third of the time.

What is different: the passes over the rows go block by block, so that a block stays in the second-level
cache; whatever has one entry a feature or a seed is left to numpy, which shares the memory and costs less to
call; chunks of a few features are summed by products of neighbours, as short inner reductions cost per
result; and whether values need masking, or an epilogue needs computing, is read off the extremes that are
found anyway.
"""

from __future__ import annotations

import math
import threading
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from morphc.kernels.reference.activations import (
    DEAD_BELOW_ZERO,
    DEAD_FAR_BELOW_ZERO,
    DEAD_ONLY_AT_ZERO,
    activation,
)

BLOCK_ELEMENTS = 1 << 18
"""Elements of a block of rows: a MiB in float32."""

LAGS = 3
"""Chunks up to this width get their row sums from products of neighbouring columns, wider ones from a
product with ones.
"""

TILE = 64
"""Narrow even chunks are summed by a block-diagonal matrix of about this many rows: a product with ones runs
short.
"""

NARROW = 8

# Rows of what is gathered per column; the first four are the moments in the order of the state.
TOTAL, SQUARES, ROW_SQUARES, DEAD, MOST, LEAST, PRODUCTS = range(7)

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class Cut(NamedTuple):
    """A split as numpy arrays [S]; `together[l - 1]` [F - l] says where columns c and c + l are of one
    chunk, doubled.
    """

    starts: Ints
    widths: Ints
    base: int
    wider: int
    widest: int
    edge: int
    together: tuple[NDArray[np.float32], ...]


class HostSums(NamedTuple):
    """`telemetry.Sums` around a given shift; `moments` [4, S] is total, squares, row squares, zeros."""

    moments: NDArray[Any]
    peak: NDArray[Any]


class _Workspace(threading.local):
    """Buffers of a thread, kept: fresh ones of this size would be paged in every time."""

    def __init__(self) -> None:
        self.buffers: dict[torch.dtype, Tensor] = {}

    def get(self, rows: int, features: int, dtype: torch.dtype) -> Tensor:
        size = rows * features
        buffer = self.buffers.get(dtype)
        if buffer is None or buffer.shape[0] < size:
            buffer = self.buffers[dtype] = torch.empty(max(size, BLOCK_ELEMENTS), dtype=dtype, device="cpu")
        return buffer[:size].view(rows, features)


_workspace = _Workspace()


@lru_cache(maxsize=4096)
def cut_of(features: int, seeds: int) -> Cut:
    """The chunks of `torch.tensor_split`."""
    base, wider = divmod(features, seeds)
    widths = np.full(seeds, base, dtype=np.int64)
    widths[:wider] += 1
    starts = np.concatenate((np.zeros(1, dtype=np.int64), widths.cumsum()[:-1]))
    widest = base + (wider > 0)
    owner = np.arange(seeds).repeat(widths)
    lags = range(1, widest) if widest <= LAGS else ()
    together = tuple(np.float32(2.0) * (owner[lag:] == owner[:-lag]) for lag in lags)
    return Cut(starts, widths, base, wider, widest, wider * (base + 1), together)


@np.errstate(invalid="ignore", over="ignore")
def first_shift(x: Tensor, cut: Cut) -> Floats:
    """What telemetry's sums are taken around: zero, unless the first rows lie further from it than twice
    their spread.

    Then the means of the chunks over those rows, as sums around zero would lose their digits.
    """
    block = x[: _block_rows(x)].double().numpy()
    count = cut.widths * len(block)
    mean = np.add.reduceat(block.sum(0), cut.starts) / count
    square = np.add.reduceat(np.einsum("rc,rc->c", block, block), cut.starts) / count
    if (mean * mean <= 4 * (square - mean * mean)).all():
        return np.zeros_like(mean)
    return mean if x.dtype == torch.float64 else mean.astype(np.float32).astype(np.float64)


def center_of(shift: Floats, cut: Cut, x: Tensor) -> Tensor:
    """The shift as [F], in the type that sums are formed in; empty where it is zero."""
    wide = torch.from_numpy(shift.repeat(cut.widths)).to(_wide(x))
    return wide if shift.any() else wide[:0]


@np.errstate(invalid="ignore", over="ignore")
def measure_host(
    x: Tensor, center: Tensor, cut: Cut, epilogue: str | None, near_zero: float
) -> HostSums | None:
    """x: [rows, F] in host memory, detached. None where a value is not finite: those take the masked form."""
    rows, features = x.shape
    block = _block_rows(x)
    blocks = -(-rows // block)
    columns = torch.zeros(blocks, 6 + len(cut.together), features, dtype=center.dtype, device="cpu")
    row_sums = np.zeros((blocks, 2, len(cut.starts))) if cut.widest > LAGS else None
    for index in range(blocks):
        part = x if blocks == 1 else x[index * block : (index + 1) * block]
        if part.dtype != center.dtype:
            part = part.to(center.dtype)
        main = part
        out = columns[index]
        torch.amax(part, 0, out=out[MOST])
        torch.amin(part, 0, out=out[LEAST])
        _dead(part, epilogue, near_zero, out)
        if len(center):
            main = torch.sub(part, center, out=_workspace.get(part.shape[0], features, center.dtype))
        _moments(main, cut, out, row_sums[index] if row_sums is not None else None)
    return _gather(columns, row_sums, cut)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _block_rows(x: Tensor) -> int:
    return max(1, min(x.shape[0], BLOCK_ELEMENTS // x.shape[1]))


def _moments(main: Tensor, cut: Cut, out: Tensor, row_out: Floats | None) -> None:
    """Per column the sum of squares, and the sum with products of the columns behind; or per chunk its row
    sums.
    """
    shared = main.numpy()
    # einsum multiplies and sums in one pass, without a product in memory.
    np.einsum("rc,rc->c", shared, shared, out=out[SQUARES].numpy())
    if row_out is not None:
        _row_sums(main, cut, row_out)
        return
    torch.sum(main, 0, out=out[TOTAL])
    for lag, weight in enumerate(cut.together, 1):
        # The widest lag only occurs in the wider chunks, which stand first.
        stop = cut.edge if cut.wider and lag == cut.widest - 1 else len(weight) + lag
        product = out[PRODUCTS + lag - 1].numpy()[: stop - lag]
        np.einsum("rc,rc->c", shared[:, : stop - lag], shared[:, lag:stop], out=product)


def _row_sums(main: Tensor, cut: Cut, out: Floats) -> None:
    """The sum of every chunk in a row, summed over the rows into out[0], and squared into out[1]."""
    rows = main.shape[0]
    groups = ((0, cut.wider, cut.base + 1), (cut.edge, len(cut.starts) - cut.wider, cut.base))
    place = 0
    for start, count, width in groups:
        if not count:
            continue
        values = main[:, start : start + count * width].reshape(-1)
        tile = TILE // width
        if width < NARROW and rows * count % tile == 0:
            summed = torch.mm(values.view(-1, tile * width), _tile(width, main.dtype))
        else:
            summed = torch.mv(values.view(-1, width), torch.ones(width, dtype=main.dtype))
        shared = summed.view(rows, count).numpy()
        out[0, place : place + count] = shared.sum(0)
        out[1, place : place + count] = np.einsum("rc,rc->c", shared, shared)
        place += count


@lru_cache(maxsize=64)
def _tile(width: int, dtype: torch.dtype) -> Tensor:
    return torch.eye(TILE // width, dtype=dtype).repeat_interleave(width, 0)


def _dead(part: Tensor, epilogue: str | None, near_zero: float, columns: Tensor) -> None:
    """How many of a column are dead behind the epilogue.

    The comparison is written as floats where it has to be summed, since summing booleans is ten times slower.
    """
    out = columns[DEAD]
    mask = _workspace.get(part.shape[0], part.shape[1], part.dtype)
    if near_zero == 0.0:
        if epilogue in DEAD_BELOW_ZERO:
            torch.le(part, 0, out=mask)
            torch.sum(mask, 0, out=out)
            return
        far = DEAD_FAR_BELOW_ZERO.get(epilogue or "identity")
        if epilogue is None or epilogue in DEAD_ONLY_AT_ZERO or far:
            if np.equal(part.numpy(), 0).any():
                torch.eq(part, 0, out=mask)
                torch.sum(mask, 0, out=out)
            if far and epilogue is not None:
                _dead_far_below(part, epilogue, far, columns)
            return
    value = part if epilogue is None else activation(epilogue)(part)
    torch.le(value.abs(), near_zero, out=mask)
    torch.sum(mask, 0, out=out)


def _dead_far_below(part: Tensor, epilogue: str, far: float, out: Tensor) -> None:
    """Columns that reach below `far` need the function itself; they are few."""
    columns = np.flatnonzero(out[LEAST].numpy() < far)
    if len(columns):
        chosen = torch.from_numpy(columns)
        after = activation(epilogue)(part.index_select(1, chosen))
        out[DEAD].index_copy_(0, chosen, (after == 0).sum(0, dtype=out.dtype))


def _gather(columns: Tensor, row_sums: Floats | None, cut: Cut) -> HostSums | None:
    if len(columns) == 1:
        summed: NDArray[Any] = columns[0].numpy()
        peak = np.maximum(summed[MOST], -summed[LEAST])
    else:
        shared = columns.numpy()
        peak = np.maximum(shared[:, MOST].max(0), -shared[:, LEAST].min(0))
        summed = columns.sum(0).numpy()
    # A NaN or an Inf is among the peaks, and so in their largest.
    if not math.isfinite(peak.max()):
        return None
    if cut.widest == 1:
        summed[ROW_SQUARES] = summed[SQUARES]
        return HostSums(summed[: DEAD + 1], peak)
    if cut.together:
        # (row sum)^2 is the squares and twice the products of all pairs.
        summed[ROW_SQUARES] = summed[SQUARES]
        for weight, products in zip(cut.together, summed[PRODUCTS:], strict=True):
            summed[ROW_SQUARES, : len(weight)] += weight * products[: len(weight)]
    moments = _fold(summed[: DEAD + 1].astype(np.float64), cut, np.add)
    if row_sums is not None:
        moments[TOTAL], moments[ROW_SQUARES] = row_sums.sum(0)
    return HostSums(moments, _fold(peak, cut, np.maximum))


def _fold(values: NDArray[Any], cut: Cut, function: np.ufunc) -> NDArray[Any]:
    """Reduce [..., F] to [..., S]; narrow chunks by adding slices, which beats short inner reductions."""
    if cut.widest > LAGS:
        return function.reduceat(values, cut.starts, axis=-1)
    parts = []
    for start, stop, width in ((0, cut.edge, cut.base + 1), (cut.edge, values.shape[-1], cut.base)):
        if start < stop:
            folded = values[..., start:stop:width]
            for column in range(1, width):
                folded = function(folded, values[..., start + column : stop : width])
            parts.append(folded)
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)
