"""The telemetry of `telemetry.py` for tensors in host memory: the same sums, by few calls.

Inside a training step every call finds its code and its data out of the caches, so what counts is how many
calls there are, how often they go over the values, and how much they write beside them. Of a piece of the
rows:

    squares      summed down the columns without being stored, then over the chunks
    peak         the larger of the largest and the negated least
    zeros        comparisons, summed as bytes, 255 rows at a time
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

from morphc.kernels.dead import Interval, dead_values
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

SHORT_ROW = 512
"""Rows of fewer features are laid side by side where there are many, as a pass also costs per row."""

ONE_THREAD = 8192
"""Elements of a matrix that BLAS multiplies by a vector in the calling thread; OpenBLAS's bound is 9216."""

UNROLLED = 4
"""Up to this width the largest of a chunk is found slice by slice: short reductions cost per result."""

HUGE = 1e25
"""Up to this sum of squares of a column no sum leaves the range of float32, so that no call warns of it."""

FEW = 16
"""So many float32 can be summed in a row without a digit lost that counts."""

ZERO = np.zeros((), np.float32)
"""A Python number would be converted every time."""

METERS = 512
"""A thread keeps so many."""

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Array = NDArray[Any]
Call = tuple[Callable[..., Any], tuple[Any, ...]]
RowProduct = tuple[slice | None, tuple[int, ...], Array | None, Array]


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


class _Kept(threading.local):
    """What a thread reuses: fresh memory of this size would be paged in every time."""

    def __init__(self) -> None:
        self.arrays: dict[tuple[str, np.dtype[Any]], Array] = {}
        self.meters: dict[tuple[Any, ...], Meter] = {}

    def array(self, name: str, shape: tuple[int, ...], kind: Any) -> Array:
        size, key = math.prod(shape), (name, np.dtype(kind))
        found = self.arrays.get(key)
        if found is None or len(found) < size:
            found = self.arrays[key] = np.empty(max(size, PIECE_ELEMENTS), kind)
        return found[:size].reshape(shape)

    def meter(self, *key: Any) -> Meter:
        found = self.meters.get(key)
        if found is None:
            if len(self.meters) >= METERS:
                self.meters.clear()
            found = self.meters[key] = Meter(*key)
        return found


_kept = _Kept()


def meter_of(
    rows: int,
    features: int,
    seeds: int,
    wide: np.dtype[Any],
    epilogue: str | None,
    near_zero: float,
    stored: str = "",
) -> Meter:
    """What measures [rows, F] for the calling thread; to be used before it is asked for another.

    stored: `bfloat16` or `float16`, where the values are copies of an activation of that type.
    """
    abreast = 1
    if rows >= SHORT_ROW and features % seeds == 0:  # side by side, equal chunks are an equal split again
        abreast = _divisor(rows, SHORT_ROW // features)
    return _kept.meter(rows, features, seeds, abreast, wide, epilogue, near_zero, stored)


class Piece(NamedTuple):
    """Some of the rows, and where what is found of their columns and chunks goes."""

    rows: slice
    squares: Array
    most: Array
    least: Array
    dead: Array
    mask: Array
    mask_bytes: tuple[Array, ...]
    dead_bytes: Array
    centered: Array
    row_products: list[RowProduct]
    row_sums: list[Call]
    single_total: Array | None


class Meter:
    """Measures activations of one shape.

    `moments` [4, S] (total, squares, row squares, zeros) and `peak` [S] are what the last one gave. What is
    to be done with the meter's own arrays is written down once, as calls.
    """

    def __init__(
        self,
        rows: int,
        features: int,
        seeds: int,
        abreast: int,
        wide: np.dtype[Any],
        epilogue: str | None,
        near_zero: float,
        stored: str,
    ) -> None:
        self.epilogue, self.near_zero = epilogue, near_zero
        # What is rounded to 16 bits behind the epilogue is told by the values before it, of which there are few.
        self.intervals = dead_values(epilogue, near_zero, stored) if epilogue and stored else None
        self.far = DEAD_FAR_BELOW_ZERO.get(epilogue or "identity", 0.0)
        self.dead_below = near_zero == 0.0 and epilogue in DEAD_BELOW_ZERO
        at_zero = epilogue is None or epilogue in DEAD_ONLY_AT_ZERO or self.far < 0.0
        self.dead_at_zero = near_zero == 0.0 and at_zero
        self.wide, self.abreast = wide, abreast

        rows, features, seeds = rows // abreast, features * abreast, seeds * abreast
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
        self.moments, self.peak = np.zeros((4, seeds), total), np.zeros(seeds, wide)
        self.columns = np.zeros((2, features), total) if wider else self.moments[1::2]
        self.piece_columns = np.zeros((len(starts), 2, features), wide) if several else self.columns[None]
        self.extremes = np.zeros((2, len(starts), features), wide)
        self.largest = np.zeros(features, wide) if wider else self.peak
        self.piece_moments = np.zeros((len(starts), 2, seeds), wide) if several else self.moments[None, 0::2]
        self.pieces = [
            self._piece(index, slice(start, min(start + size, rows)), wider, summed)
            for index, start in enumerate(starts)
        ]
        self.folds = list(self._fold_extremes(several))
        if several:
            self.folds.append((np.add.reduce, (self.piece_columns, 0, total, self.columns)))
            self.folds.append((np.add.reduce, (self.piece_moments, 0, total, self.moments[0::2])))
        for run in runs:
            self.folds.extend(self._fold_wide(run) if run.width > 1 else self._fold_single(run, not wider))
        if abreast > 1:
            moments, peak = self.moments.reshape(4, abreast, -1), self.peak.reshape(abreast, -1)
            self.moments, self.peak = np.zeros_like(moments[:, 0]), np.zeros_like(peak[0])
            self.folds.append((np.add.reduce, (moments, 1, None, self.moments)))
            self.folds.append((np.maximum.reduce, (peak, 0, None, self.peak)))

    def measure(self, x: Array, center: Array | None) -> bool:
        """x: [rows, F] around `center` [F]. False, with nothing found, where a value is not finite or huge."""
        if self.abreast > 1:
            x = x.reshape(self.shape)
            center = None if center is None else np.tile(center, self.abreast)
        for piece in self.pieces:
            part = x[piece.rows]
            np.maximum.reduce(part, 0, None, piece.most)
            np.minimum.reduce(part, 0, None, piece.least)
            main = part if center is None else np.subtract(part, center, piece.centered)
            np.einsum("rc,rc->c", main, main, out=piece.squares)
            if not np.maximum.reduce(piece.squares) < HUGE:
                return False
            self._count_dead(part, piece)
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
        for function, operands in self.folds:
            function(*operands)
        return True

    def _piece(self, index: int, rows: slice, wider: list[Run], summed: int) -> Piece:
        count, features = rows.stop - rows.start, self.shape[1]
        mask = _kept.array("mask", (count, features), np.bool_)
        blocks = -(-count // BYTE)
        in_rows = _kept.array("in_rows", (2, count, summed), self.wide)
        squares, dead = self.piece_columns[index]
        sums = self.piece_moments[index]
        return Piece(
            rows=rows,
            squares=squares,
            most=self.extremes[0, index],
            least=self.extremes[1, index],
            dead=dead,
            mask=mask,
            mask_bytes=tuple(mask[first::blocks].view(np.uint8) for first in range(blocks)),
            dead_bytes=np.zeros(features, np.uint8),
            centered=_kept.array("centered", (count, features), self.wide),
            row_products=[_row_product(part, in_rows[0], features) for run in wider for part in run.parts()],
            row_sums=_row_sums(in_rows, sums[:, :summed]) if wider else [],
            single_total=sums[0, summed:] if self.single else None,
        )

    def _fold_extremes(self, several: bool) -> Iterator[Call]:
        most, least = self.extremes[:, 0]
        if several:
            yield np.maximum.reduce, (self.extremes[0], 0, None, most)
            yield np.minimum.reduce, (self.extremes[1], 0, None, least)
        yield np.negative, (least, least)
        yield np.maximum, (most, least, self.largest)

    def _fold_wide(self, run: Run) -> Iterator[Call]:
        largest, out = self.largest[run.features].reshape(run.chunks, run.width), self.peak[run.seeds]
        if run.width > UNROLLED:
            yield np.maximum.reduce, (largest, 1, None, out)
        else:
            yield np.maximum, (largest[:, 0], largest[:, 1], out)
            for column in range(2, run.width):
                yield np.maximum, (out, largest[:, column], out)
        for part in run.parts():
            columns = self.columns[:, part.features].reshape(2, part.chunks, part.width)
            sums = self.moments[1::2, part.seeds]
            if part.width > ONE_THREAD:
                yield np.add.reduce, (columns, -1, None, sums)
            else:
                yield np.matmul, (columns, np.ones(part.width, sums.dtype), sums)

    def _fold_single(self, run: Run, alone: bool) -> Iterator[Call]:
        if not alone:
            yield np.copyto, (self.peak[run.seeds], self.largest[run.features])
            yield np.copyto, (self.moments[1::2, run.seeds], self.columns[:, run.features])
        yield np.copyto, (self.moments[2, run.seeds], self.moments[1, run.seeds])

    def _count_dead(self, x: Array, piece: Piece) -> None:
        """How many of each column are dead behind the epilogue."""
        if self.intervals is not None:
            _mask_intervals(x, self.intervals, piece.mask)
            _sum_mask(piece)
        elif self.dead_below:
            np.less_equal(x, ZERO, piece.mask)
            _sum_mask(piece)
        elif self.dead_at_zero:
            np.equal(x, ZERO, piece.mask)
            if np.logical_or.reduce(piece.mask, None):
                _sum_mask(piece)
            else:
                piece.dead.fill(0)
            if self.far and np.minimum.reduce(piece.least) < self.far:
                self._dead_far_below(x, piece)
        else:
            value = x if self.epilogue is None else activation(self.epilogue)(torch.from_numpy(x)).numpy()
            np.less_equal(np.absolute(value), self.near_zero, piece.mask)
            _sum_mask(piece)

    def _dead_far_below(self, x: Array, piece: Piece) -> None:
        """Columns that reach below `far` need the function itself; they are few."""
        chosen = np.flatnonzero(piece.least < self.far)
        if self.epilogue is not None:
            after = activation(self.epilogue)(torch.from_numpy(x[:, chosen]))
            piece.dead[chosen] = (after == 0).sum(0).numpy()


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


def _mask_intervals(x: Array, intervals: tuple[Interval, ...], mask: Array) -> None:
    """mask: where x lies in one of them."""
    mask.fill(False)
    for low, high in intervals:
        inside = np.less_equal(x, high)
        if low > -math.inf:
            np.logical_and(inside, np.greater_equal(x, low), inside)
        np.logical_or(mask, inside, mask)


def _sum_mask(piece: Piece) -> None:
    """Summing bytes as bytes is ten times as fast as summing them as anything wider."""
    first, *others = piece.mask_bytes
    np.add.reduce(first, 0, np.uint8, piece.dead_bytes)
    piece.dead[:] = piece.dead_bytes
    for block in others:
        np.add.reduce(block, 0, np.uint8, piece.dead_bytes)
        np.add(piece.dead, piece.dead_bytes, piece.dead)


def _divisor(number: int, most: int) -> int:
    """The largest divisor of `number` up to `most`, at least 1."""
    return next((d for d in range(min(number, most), 1, -1) if number % d == 0), 1)
