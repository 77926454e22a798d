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

BLOCK_ELEMENTS = 1 << 17
"""Elements of a block of rows: input and buffer are 1 MiB in float32."""

LAGS = 3
"""Chunks up to this width get their row sums from products of neighbouring columns, wider ones from a
product with ones.
"""

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
    """A buffer a thread, kept: a fresh one of this size would be paged in every time."""

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


def first_shift(x: Tensor, cut: Cut) -> Floats:
    """The mean of every chunk over the first rows: what telemetry's sums are taken around."""
    block = x[: _block_rows(x)]
    columns = block.sum(0, dtype=_wide(x)).double().numpy()
    return np.add.reduceat(columns, cut.starts) / (cut.widths * len(block))


def center_of(shift: Floats, cut: Cut, x: Tensor) -> Tensor:
    """The shift as [F], in the type that sums are formed in."""
    return torch.from_numpy(shift.repeat(cut.widths)).to(_wide(x))


def measure_host(
    x: Tensor, center: Tensor, cut: Cut, epilogue: str | None, near_zero: float
) -> HostSums | None:
    """x: [rows, F] in host memory, detached. None where a value is not finite: those take the masked form."""
    rows, features = x.shape
    block = _block_rows(x)
    blocks = -(-rows // block)
    columns = torch.zeros(blocks, 5 + len(cut.together), features, dtype=center.dtype, device="cpu")
    row_sums = np.zeros((blocks, len(cut.starts))) if cut.widest > LAGS else None
    for index in range(blocks):
        part = x if blocks == 1 else x[index * block : (index + 1) * block]
        if part.dtype != center.dtype:
            part = part.to(center.dtype)
        main = _workspace.get(part.shape[0], features, center.dtype)
        _block(part, center, cut, epilogue, near_zero, main, columns[index])
        if row_sums is not None:
            _row_squares(main, cut, row_sums[index])
    return _gather(columns, row_sums, cut)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _block_rows(x: Tensor) -> int:
    return max(1, min(x.shape[0], BLOCK_ELEMENTS // x.shape[1]))


def _block(
    part: Tensor,
    center: Tensor,
    cut: Cut,
    epilogue: str | None,
    near_zero: float,
    main: Tensor,
    out: Tensor,
) -> None:
    """Rows of `out`: sum of x - m, of its square, nothing yet, the dead, the peak, products with columns
    behind.

    `main` is left holding x - m.
    """
    total, squares, _, dead, peak, *products = out.unbind(0)
    torch.abs(part, out=main)
    torch.amax(main, 0, out=peak)
    _dead(part, main, epilogue, near_zero, peak, dead)
    torch.sub(part, center, out=main)
    torch.sum(main, 0, out=total)
    shared = main.numpy()
    for lag, product in enumerate(products, 1):
        # The widest lag only occurs in the wider chunks, which stand first.
        stop = cut.edge if cut.wider and lag == cut.widest - 1 else part.shape[1]
        behind, out_row = shared[:, lag:stop], product.numpy()[: stop - lag]
        np.einsum("rc,rc->c", shared[:, : stop - lag], behind, out=out_row)
    # einsum multiplies and sums in one pass, without a product in memory.
    np.einsum("rc,rc->c", shared, shared, out=squares.numpy())


def _row_squares(main: Tensor, cut: Cut, out: NDArray[Any]) -> None:
    """Sum over the rows of (sum of the chunk)^2, for every chunk."""
    rows = main.shape[0]
    seeds = len(cut.starts)
    groups = ((0, cut.wider, cut.base + 1), (cut.edge, seeds - cut.wider, cut.base))
    place = 0
    for start, count, width in groups:
        if count:
            values = main[:, start : start + count * width].reshape(-1, width)
            sums = torch.mv(values, torch.ones(width, dtype=main.dtype)).view(rows, count)
            out[place : place + count] = sums.square_().sum(0).numpy()
            place += count


def _dead(
    part: Tensor, magnitude: Tensor, epilogue: str | None, near_zero: float, peak: Tensor, out: Tensor
) -> None:
    """How many of a column are dead behind the epilogue, into the zeroed `out`; `magnitude` is overwritten.

    The comparison is written as floats, since summing booleans is ten times slower.
    """
    if near_zero == 0.0:
        if epilogue in DEAD_BELOW_ZERO:
            torch.le(part, 0, out=magnitude)
            torch.sum(magnitude, 0, out=out)
            return
        far = DEAD_FAR_BELOW_ZERO.get(epilogue or "identity")
        if epilogue is None or epilogue in DEAD_ONLY_AT_ZERO or far:
            if magnitude.amin(0).numpy().min() == 0.0:
                torch.eq(part, 0, out=magnitude)
                torch.sum(magnitude, 0, out=out)
            if far and epilogue is not None:
                _dead_far_below(part, epilogue, far, peak, out)
            return
    value = part if epilogue is None else activation(epilogue)(part)
    torch.le(value.abs(), near_zero, out=magnitude)
    torch.sum(magnitude, 0, out=out)


def _dead_far_below(part: Tensor, epilogue: str, far: float, peak: Tensor, out: Tensor) -> None:
    """Columns that reach below `far` need the function itself; they are few."""
    columns = np.flatnonzero(peak.numpy() > -far)
    if len(columns):
        chosen = torch.from_numpy(columns)
        after = activation(epilogue)(part.index_select(1, chosen))
        out.index_copy_(0, chosen, (after == 0).sum(0, dtype=out.dtype))


def _gather(columns: Tensor, row_sums: Floats | None, cut: Cut) -> HostSums | None:
    single = len(columns) == 1
    peak: NDArray[Any] = (columns[0, 4] if single else columns[:, 4].amax(0)).numpy()
    # A NaN or an Inf is among the peaks, and so in their largest.
    if not math.isfinite(peak.max()):
        return None
    summed: NDArray[Any] = (columns[0] if single else columns.sum(0)).numpy()
    if cut.widest == 1:
        summed[2] = summed[1]
        return HostSums(summed[:4], peak)
    if cut.together:
        # (row sum)^2 is the squares and twice the products of all pairs.
        summed[2] = summed[1]
        for weight, products in zip(cut.together, summed[5:], strict=True):
            summed[2, : len(weight)] += weight * products[: len(weight)]
    moments = _fold(summed[:4].astype(np.float64), cut, np.add)
    if row_sums is not None:
        moments[2] = row_sums.sum(0)
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
