"""The telemetry of `telemetry.py` for tensors in host memory: the same sums, by few calls.

What counts is how often they go over the values and how much they write beside them. Of a piece of the rows,
which stays in the cache:

    peak         the root of the largest square, which is |x| to the last bit
    squares      summed down the columns, then over the chunks
    zeros        none if the least square is none, else comparisons, summed as bytes
    total        sums of every chunk in a row, products with ones, summed over the rows,
    row_squares  and their squares likewise

Arrays are made once a thread and reused. The products are numpy's, cut into parts too small for its BLAS to
hand out to threads: they are less work than waking one.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from morphc.kernels.dead import dead_values
from morphc.kernels.reference.activations import (
    DEAD_BELOW_ZERO,
    DEAD_FAR_BELOW_ZERO,
    DEAD_ONLY_AT_ZERO,
    activation,
)

PIECE_ELEMENTS = 1 << 17
"""Elements of a piece of the rows, which is to stay in the second-level cache between the passes."""

PIECE_ROWS = 1024
"""A float32 sum of more would lose digits that count."""

BYTE = 255
"""As many ones can be counted in a byte."""

SHORT_ROW = 1024
"""Rows of fewer features are laid side by side where there are many, as a pass also costs per row."""

ONE_THREAD = 8192
"""Elements of a matrix that BLAS multiplies by a vector in the calling thread; OpenBLAS's bound is 9216."""

UNROLLED = 4
"""Up to this width the largest of a chunk is found slice by slice: short reductions cost per result."""

HUGE = 1e12
"""Up to this peak no sum leaves the range of float32."""

FEW = 16
"""So many float32 can be summed in a row without a digit lost that counts."""

LINE = 64
"""Bytes of a cache line. Rows that begin within one are read and written half as fast."""

ZERO = np.zeros((), np.float32)
"""A Python number would be converted every time."""

METERS = 512
"""A thread keeps so many."""

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Array = NDArray[Any]
Call = tuple[Callable[..., Any], tuple[Any, ...]]
RowProduct = tuple[slice | None, tuple[int, ...], Array | None, Array]

# `np.einsum` without the layers of Python above it, which take as long as the sums of a small piece.
_multiarray: Any = getattr(np, "_core", None) or np.core  # numpy 1 has no `_core`
einsum: Callable[..., Array] = getattr(_multiarray.multiarray, "c_einsum", np.einsum)


class Run(NamedTuple):
    """Neighbouring chunks of one width, and the slices they take of [S] and [F]."""

    seed: int
    chunks: int
    feature: int
    width: int

    @property
    def seeds(self) -> slice:
        """Of [S]."""
        return slice(self.seed, self.seed + self.chunks)

    @property
    def features(self) -> slice:
        """Of [F]."""
        return slice(self.feature, self.feature + self.chunks * self.width)

    def parts(self) -> Iterator[Run]:
        """Runs short enough for `ONE_THREAD`."""
        size = max(1, ONE_THREAD // self.width)
        for first in range(0, self.chunks, size):
            chunks = min(size, self.chunks - first)
            yield Run(self.seed + first, chunks, self.feature + first * self.width, self.width)


class Cut(NamedTuple):
    """A split: `starts` and `widths` are [S]."""

    starts: Ints
    widths: Ints
    runs: tuple[Run, ...]


@lru_cache(maxsize=4096)
def cut_of(features: int, seeds: int) -> Cut:
    """The chunks of `torch.tensor_split`."""
    base, wider = divmod(features, seeds)
    widths = np.full(seeds, base, dtype=np.int64)
    widths[:wider] += 1
    starts = np.concatenate((np.zeros(1, dtype=np.int64), widths.cumsum()[:-1]))
    runs = (Run(0, wider, 0, base + 1), Run(wider, seeds - wider, wider * (base + 1), base))
    return Cut(starts, widths, tuple(run for run in runs if run.chunks))


@np.errstate(invalid="ignore", over="ignore")
def first_shift(values: Array, cut: Cut) -> Floats:
    """What telemetry's sums are taken around: zero, unless the first rows lie further from it than three
    times their spread.

    Then the means of the chunks over those rows, as sums around zero would lose their digits.
    """
    head = values[: max(1, 2 * PIECE_ELEMENTS // values.shape[1])].astype(np.float64)
    count = cut.widths * len(head)
    mean = np.add.reduceat(head.sum(0), cut.starts) / count
    square = np.add.reduceat(np.einsum("rc,rc->c", head, head), cut.starts) / count
    if (mean * mean <= 9 * (square - mean * mean)).all():
        return np.zeros_like(mean)
    return mean.astype(values.dtype).astype(np.float64)


def center_of(shift: Floats, cut: Cut, dtype: np.dtype[Any]) -> Array | None:
    """The shift as [F], in the type that sums are formed in; None where it is zero."""
    return shift.repeat(cut.widths).astype(dtype) if shift.any() else None


def aligned(shape: tuple[int, ...], kind: Any) -> Array:
    """Zeros that begin at a cache line."""
    bytes_ = math.prod(shape) * np.dtype(kind).itemsize
    memory = np.zeros(bytes_ + LINE, np.uint8)
    first = -memory.ctypes.data % LINE
    found: Array = memory[first : first + bytes_].view(kind).reshape(shape)
    return found


class Dead(NamedTuple):
    """What counts as dead: |act(x)| <= near_zero.

    stored: `bfloat16` or `float16`, where x are copies of values of that type; act(x) is rounded to it. That is told
    by intervals of x, of which there are few.
    """

    epilogue: str | None
    near_zero: float
    stored: str = ""

    @property
    def rounded(self) -> bool:
        """Whether only the intervals say it."""
        return bool(self.epilogue and self.stored)

    @property
    def far(self) -> float:
        """A bound above which the function is zero at zero only; 0 where there is none below it either."""
        return 0.0 if self.rounded else DEAD_FAR_BELOW_ZERO.get(self.epilogue or "identity", 0.0)

    @property
    def below(self) -> bool:
        """Whether x <= 0 says it."""
        return not self.rounded and self.near_zero == 0.0 and self.epilogue in DEAD_BELOW_ZERO

    @property
    def at_zero(self) -> bool:
        """Whether x == 0 says it, but for what lies below `far`."""
        only = self.epilogue is None or self.epilogue in DEAD_ONLY_AT_ZERO or self.far < 0.0
        return not self.rounded and self.near_zero == 0.0 and only

    def of(self, x: Array) -> Array:
        """By the function itself."""
        if self.rounded:
            within = np.zeros(x.shape, bool)
            for low, high in dead_values(self.epilogue, self.near_zero, self.stored):
                inside = np.less_equal(x, high)
                if low > -math.inf:
                    np.logical_and(inside, np.greater_equal(x, low), inside)
                np.logical_or(within, inside, within)
            return within
        value = x if self.epilogue is None else activation(self.epilogue)(torch.from_numpy(x)).numpy()
        found: Array = np.less_equal(np.absolute(value), self.near_zero)
        return found


class _Kept(threading.local):
    """What a thread reuses: fresh memory of this size would be paged in every time."""

    def __init__(self) -> None:
        self.arrays: dict[tuple[str, np.dtype[Any]], Array] = {}
        self.meters: dict[tuple[Any, ...], Meter] = {}

    def array(self, name: str, shape: tuple[int, ...], kind: Any) -> Array:
        size, key = math.prod(shape), (name, np.dtype(kind))
        found = self.arrays.get(key)
        if found is None or len(found) < size:
            found = self.arrays[key] = aligned((max(size, PIECE_ELEMENTS),), kind)
        return found[:size].reshape(shape)

    def meter(self, *key: Any) -> Meter:
        found = self.meters.get(key)
        if found is None:
            if len(self.meters) >= METERS:
                self.meters.clear()
            found = self.meters[key] = Meter(*key)
        return found


_kept = _Kept()


def meter_of(rows: int, features: int, seeds: int, wide: np.dtype[Any], dead: Dead) -> Meter:
    """What measures [rows, F] for the calling thread; to be used before it is asked for another."""
    return _kept.meter(rows, features, seeds, wide, dead)


class Piece(NamedTuple):
    """Some of the rows, and where what is found of their columns and chunks goes."""

    rows: slice
    changed: Array
    most: Array
    squares: Array
    mask: Array
    mask_bytes: tuple[Array, ...]
    row_products: list[RowProduct]
    row_sums: list[Call]
    single_total: Array | None


class Meter:
    """Measures activations of one shape.

    `moments` [2, 2, S] ((total, row squares), (squares, zeros)) and `peak` [S] are what the last one gave. What
    is to be done with the meter's own arrays is written down once, as calls.
    """

    def __init__(self, rows: int, features: int, seeds: int, wide: np.dtype[Any], dead: Dead) -> None:
        self.dead, self.wide = dead, wide
        self.below, self.at_zero = dead.below, dead.at_zero
        self.tiny = float(np.finfo(wide).tiny)  # less may be a square that lost its digits
        self.abreast = 1
        if rows >= SHORT_ROW // 2 and features % seeds == 0:  # side by side, equal chunks are equal again
            self.abreast = _divisor(rows, SHORT_ROW // features)
        rows, features, seeds = rows // self.abreast, features * self.abreast, seeds * self.abreast
        self.shape = rows, features
        pieces = -(-rows // max(1, min(PIECE_ROWS, PIECE_ELEMENTS // features)))
        size = -(-rows // pieces)
        starts = range(0, rows, size)
        runs = cut_of(features, seeds).runs
        wider = [run for run in runs if run.width > 1]
        self.single = next((run.features for run in runs if run.width == 1), None)
        summed = sum(run.chunks for run in wider)

        # One piece's sums are those of the whole. Many are added up in float64.
        several = len(starts) > 1
        total = np.dtype(np.float64) if len(starts) > FEW else wide
        self.moments, self.peak = aligned((2, 2, seeds), total), aligned((seeds,), wide)
        self.columns = aligned((2, features), total) if wider else self.moments[1]
        self.piece_squares = aligned((len(starts), features), wide) if several else self.columns[:1]
        most = aligned((len(starts), features), wide) if several or wider else self.peak[None]
        self.piece_most, self.largest = most, most[0] if wider else self.peak
        self.piece_moments = aligned((len(starts), 2, seeds), wide) if several else self.moments[:1]
        self.pieces = [
            self._piece(index, slice(start, min(start + size, rows)), wider, summed)
            for index, start in enumerate(starts)
        ]
        self.dead_bytes = aligned((features,), np.uint8)
        self.any_dead = False
        self.peak_folds = [call for run in runs if wider for call in self._fold_peak(run)]
        self.folds: list[Call] = []
        if several:
            self.folds.append((np.add.reduce, (self.piece_squares, 0, total, self.columns[0])))
            self.folds.append((np.add.reduce, (self.piece_moments, 0, total, self.moments[0])))
        for run in runs:
            self.folds.extend(self._fold_wide(run) if run.width > 1 else self._fold_single(run, not wider))
        self.inner_peak = self.peak
        if self.abreast > 1:
            moments, peak = self.moments.reshape(2, 2, self.abreast, -1), self.peak.reshape(self.abreast, -1)
            self.moments, self.peak = np.zeros_like(moments[:, :, 0]), np.zeros_like(peak[0])
            self.folds.append((np.add.reduce, (moments, 2, None, self.moments)))
            self.folds.append((np.maximum.reduce, (peak, 0, None, self.peak)))

    @np.errstate(invalid="ignore", over="ignore")
    def measure(self, x: Array, center: Array | None) -> bool:
        """x: [rows, F] around `center` [F]. False, with nothing found, where a value is not finite or huge."""
        x = x.reshape(self.shape)
        if center is not None:
            center = np.tile(center, self.abreast)
        if self.any_dead:
            self.columns[1].fill(0)
            self.any_dead = False
        for piece in self.pieces:
            part, changed = x[piece.rows], piece.changed
            (np.square if center is None else np.absolute)(part, changed)
            np.maximum.reduce(changed, 0, None, piece.most)
            if not (self.at_zero and np.minimum.reduce(changed, None) >= self.tiny):
                self._count_dead(part, piece)
            main = part if center is None else np.subtract(part, center, changed)
            for features, shape, ones, out in piece.row_products:
                values = (main if features is None else main[:, features]).reshape(shape)
                if ones is None:
                    np.add.reduce(values, -1, None, out)
                else:
                    np.matmul(values, ones, out)
            for function, operands in piece.row_sums:
                function(*operands)
            if self.single:
                np.add.reduce(main[:, self.single], 0, None, piece.single_total)
            if center is not None:
                np.square(changed, changed)
            np.add.reduce(changed, 0, None, piece.squares)
        if not self._find_peak(x, squared=center is None) < HUGE:
            return False
        if self.dead.far and self.at_zero:
            self._dead_far_below(x, squared=center is None)
        for function, operands in self.folds:
            function(*operands)
        return True

    def _piece(self, index: int, rows: slice, wider: list[Run], summed: int) -> Piece:
        count, features = rows.stop - rows.start, self.shape[1]
        mask = _kept.array("mask", (count, features), np.bool_)
        blocks = -(-count // BYTE)
        in_rows = _kept.array("in_rows", (2, count, summed), self.wide)
        sums = self.piece_moments[index]
        return Piece(
            rows=rows,
            changed=_kept.array("changed", (count, features), self.wide),
            most=self.piece_most[index],
            squares=self.piece_squares[index],
            mask=mask,
            mask_bytes=tuple(mask[first::blocks].view(np.uint8) for first in range(blocks)),
            row_products=[_row_product(part, in_rows[0], features) for run in wider for part in run.parts()],
            row_sums=_row_sums(in_rows, sums[:, :summed]) if wider else [],
            single_total=sums[0, summed:] if self.single else None,
        )

    def _fold_peak(self, run: Run) -> Iterator[Call]:
        largest, out = self.largest[run.features].reshape(run.chunks, run.width), self.peak[run.seeds]
        if run.width == 1:
            yield np.copyto, (out, largest[:, 0])
        elif run.width > UNROLLED:
            yield np.maximum.reduce, (largest, 1, None, out)
        else:
            yield _maximum, (largest[:, 0], largest[:, 1], out)
            for column in range(2, run.width):
                yield _maximum, (out, largest[:, column], out)

    def _fold_wide(self, run: Run) -> Iterator[Call]:
        for part in run.parts():
            columns = self.columns[:, part.features].reshape(2, part.chunks, part.width)
            sums = self.moments[1][:, part.seeds]
            if part.width > ONE_THREAD:
                yield np.add.reduce, (columns, -1, None, sums)
            else:
                yield np.matmul, (columns, np.ones(part.width, sums.dtype), sums)

    def _fold_single(self, run: Run, alone: bool) -> Iterator[Call]:
        if not alone:
            yield np.copyto, (self.moments[1][:, run.seeds], self.columns[:, run.features])
        yield np.copyto, (self.moments[0, 1, run.seeds], self.moments[1, 0, run.seeds])

    def _find_peak(self, x: Array, squared: bool) -> Any:
        """The largest of all, after the pieces found the squares, or the absolute values, of the largest."""
        peak = self.inner_peak
        if len(self.piece_most) > 1:
            np.maximum.reduce(self.piece_most, 0, None, self.largest)
        for function, operands in self.peak_folds:
            function(*operands)
        if squared and np.minimum.reduce(peak) < self.tiny:  # squares lost their digits: once more without
            np.maximum.reduce(np.absolute(x), 0, None, self.largest)
            for function, operands in self.peak_folds:
                function(*operands)
            if self.largest is not peak:
                np.square(self.largest, self.largest)
        elif squared:
            np.sqrt(peak, peak)
        return np.maximum.reduce(peak)

    def _count_dead(self, x: Array, piece: Piece) -> None:
        """How many of each column are dead behind the epilogue; summing bytes as bytes is the fastest."""
        if self.below or self.at_zero:
            (np.less_equal if self.below else np.equal)(x, ZERO, piece.mask)
        else:
            np.copyto(piece.mask, self.dead.of(x))
        dead = self.columns[1]
        for block in piece.mask_bytes:
            einsum("rc->c", block, out=self.dead_bytes)
            np.add(dead, self.dead_bytes, dead)
        self.any_dead = True

    def _dead_far_below(self, x: Array, squared: bool) -> None:
        """Columns that may reach below `far` need the function itself; they are few."""
        far = -self.dead.far
        bound = far * far if squared and self.largest is not self.inner_peak else far
        chosen = np.flatnonzero(self.largest > bound)
        if len(chosen):
            self.columns[1][chosen] = self.dead.of(x[:, chosen]).sum(0)
            self.any_dead = True


def _maximum(one: Array, other: Array, out: Array) -> None:
    """By position numpy deprecates this output, and only this one."""
    np.maximum(one, other, out=out)


def _row_product(part: Run, out: Array, features: int) -> RowProduct:
    """How the sums of the chunks of every row are found: of which features, as what, by what, to where."""
    rows, sums = len(out), out[:, part.seeds]
    ones = np.ones(part.width, out.dtype) if part.width <= ONE_THREAD else None
    if part.chunks * part.width < features:
        return part.features, (rows, part.chunks, part.width), ones, sums
    together = _divisor(rows, ONE_THREAD // features) * part.chunks
    return None, (-1, together, part.width), ones, sums.reshape(-1, together)


def _row_sums(in_rows: Array, sums: Array) -> list[Call]:
    """in_rows: [2, rows, S], of which the first are given and the second become their squares."""
    rows, squares = in_rows
    calls: list[Call] = [(np.square, (rows, squares))]
    count, seeds = rows.shape
    together = _divisor(count, ONE_THREAD // seeds)
    parts = in_rows.reshape(2, -1, together, seeds)
    ones = np.ones(together, rows.dtype)
    if together == count:
        calls.append((np.matmul, (ones, in_rows, sums)))
    elif together > 8:
        part_sums = np.zeros((2, count // together, seeds), rows.dtype)
        calls.append((np.matmul, (ones, parts, part_sums)))
        calls.append((np.add.reduce, (part_sums, 1, None, sums)))
    else:
        calls.append((np.add.reduce, (in_rows, 1, None, sums)))
    return calls


def _divisor(number: int, most: int) -> int:
    """The largest divisor of `number` up to `most`, at least 1."""
    return next((d for d in range(min(number, most), 1, -1) if number % d == 0), 1)
