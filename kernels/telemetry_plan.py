"""How telemetry walks an activation: regions, tiles and grids.

A split of the features is at most two *regions* of equally wide chunks. In a region whose chunks are a power of two
wide a tile is a stretch of the row (*flat*); otherwise a chunk is taken as the whole vectors that it touches, and
what they hold of its neighbours is masked, so that loads stay 16 bytes wide wherever the chunks begin.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Final, NamedTuple

from morphc.kernels.layout import View
from morphc.kernels.spec import KernelSpec, TuneConfig
from morphc.kernels.templating import cdiv, next_pow2

ITEM: Final = {"bfloat16": 2, "float16": 2, "float32": 4}
LOAD: Final = 16
"""Bytes of a thread's load."""

WIDEST: Final = 4096
"""Features of the widest chunk that has a kernel."""

MOST_PARTS: Final = 16
ADDS: Final = 128
"""So many float32 are added up one by one. Squares of values with few digits are rounded the same way again and
again: of 256 a sum can be off by 2e-6, of 128 by less than a tenth of that. (16-bit counters hold them as well.)"""

EXACT: Final = 1 << 24
"""Up to this a float32 counts exactly."""


class Region(NamedTuple):
    """Neighbouring chunks of one width."""

    width: int
    seeds: int
    first_seed: int
    first_column: int


class Tiling(NamedTuple):
    """How programs walk a region: the constexprs of the same names.

    flat: a tile is a stretch of the row. block_rows: rows of a tile (positions where features aren't last). chunks:
    of a tile. lanes, parts: a chunk is taken in `parts` parts of `lanes` vectors. vector: elements of a load.
    unroll: tiles (features of a chunk, where they aren't last) that are asked for at once.
    """

    flat: bool
    block_rows: int
    chunks: int
    lanes: int
    parts: int
    vector: int
    unroll: int


def regions(features: int, seeds: int) -> tuple[Region, ...]:
    """The chunks of `torch.tensor_split`, by width."""
    base, wider = divmod(features, seeds)
    found = (Region(base + 1, wider, 0, 0), Region(base, seeds - wider, wider, wider * (base + 1)))
    return tuple(region for region in found if region.seeds)


def tiling(spec: KernelSpec, region: Region, config: TuneConfig, unit: int) -> Tiling:
    """How programs of `config` walk a region whose rows lie a multiple of `unit` elements apart.

    block_rows x block_cols is what a program asks for at once, block_cols the width of its tile. With one stage
    that is one tile of the careful walk, with more it is tiles asked for ahead.
    """
    threads = 32 * config.num_warps
    full = LOAD // ITEM[spec.dtype]
    vector = min(full, unit)
    loads = max(1, min(32, config.block_rows * config.block_cols // (threads * full)))
    width = region.width
    few = next_pow2(region.seeds)
    if spec.layout == "channels_first":
        # The same in all regions, since a program's run of blocks is.
        chunks = min(next_pow2(spec.seeds), _pow2(config.block_cols // spec.chunk), threads)
        return Tiling(False, threads * vector // chunks, chunks, 1, 1, vector, min(loads, width, 8))
    if width == next_pow2(width) and (region.first_column % (width if width < vector else vector) == 0):
        chunks = max(min(few, max(1, config.block_cols // width)), cdiv(vector, width))
        rows = max(1, threads * full // (chunks * width))
        each = max(1, chunks * width * rows // (threads * full))
        return _staged(Tiling(True, rows, chunks, 1, 1, vector, _pow2(max(1, loads // each))), config)
    vector, lanes, parts = _parts(spec, region, vector)
    chunks = min(few, max(1, _pow2(config.block_cols // (lanes * vector))), threads // lanes)
    rows = threads // (chunks * lanes)
    return _staged(Tiling(False, rows, chunks, lanes, parts, vector, _pow2(max(1, loads // parts))), config)


def _staged(tiled: Tiling, config: TuneConfig) -> Tiling:
    if config.num_stages > 1:
        return tiled
    return tiled._replace(block_rows=tiled.block_rows * tiled.unroll, unroll=1)


@lru_cache(maxsize=1024)
def _parts(spec: KernelSpec, region: Region, most: int) -> tuple[int, int, int]:
    """Vector, lanes and parts of a chunk that is masked: those that load least beside it, in few instructions."""
    item = ITEM[spec.dtype]
    found = []
    for vector in (size for size in (8, 4, 2, 1) if size <= most):
        # How far into a vector a chunk can begin.
        step = math.gcd(region.width, vector)
        skip = vector - step + region.first_column % step
        for lanes in (1, 2, 4, 8, 16, 32, 64, 128):
            parts = cdiv(region.width + skip, lanes * vector)
            # 8 instructions a value, 3 a load; more where a thread's neighbour leaves half of a sector behind, and
            # where a row's sum goes through shared memory.
            cost = (
                parts
                * lanes
                * (8 * vector + 3)
                * (1.15 if lanes * vector * item < min(32, region.width * item) else 1)
            )
            if parts <= MOST_PARTS:
                found.append((cost * (2 if lanes > 32 else 1), (vector, lanes, parts)))
    return min(found)[1]


def _pow2(number: int) -> int:
    """Largest power of two that is not above `number`; 1 below 1."""
    return 1 << max(0, number.bit_length() - 1)


class Plan(NamedTuple):
    """A grid: tiles x splits programs, each with `span` rows (blocks of positions, where features aren't last).

    samples: how many can be added up until the float32 count of a cell might lose one.
    """

    tiles: int
    splits: int
    span: int
    samples: int


def plan(spec: KernelSpec, config: TuneConfig, view: View, unit: int, splits: int = 0) -> Plan:
    """The grid for an activation; of up to `splits` splits, if given, as far as counters allow."""
    tiles, step, length = 0, 1, view.rows
    # As many rows or blocks keep a thread's sums and the count of a cell exact.
    most, height = EXACT // spec.chunk, 1
    for region in regions(spec.features, spec.seeds):
        tiled = tiling(spec, region, config, unit)
        early = region.first_column % tiled.vector // region.width if tiled.flat else 0
        tiles += cdiv(region.seeds + early, tiled.chunks)
        if spec.layout == "channels_first":
            height = tiled.block_rows
            length = view.rows // view.inner * cdiv(view.inner, height)
            most = min(most, max(1, ADDS // region.width), EXACT // (region.width * height))
        else:
            step = max(step, tiled.block_rows * tiled.unroll)
            most = min(most, ADDS // tiled.parts * tiled.block_rows)
    wanted = max(1, min(config.splits or 1, splits or config.splits or 1))
    span = max(1, min(cdiv(cdiv(length, wanted), step), most // step)) * step
    return Plan(tiles, cdiv(length, span), span, max(1, EXACT // (spec.chunk * span * height)))
