"""Kernels over small chunks without matrix products: which there are, and how they are laid out.

A product needs 16 columns, which small chunks fill with zeros; here each thread has a row of one chunk, or `lanes`
threads share it, with the weights of the chunk in their registers. What is counted below won on an H200 at one, ten and
a hundred percent active, rank 16.
"""

from __future__ import annotations

from typing import Final

from morphc.kernels.spec import KernelSpec, TuneConfig
from morphc.kernels.templating import cdiv, next_pow2

NARROW: Final = 8
"""Features of a chunk up to which there are such kernels."""

WARP: Final = 32

_HELD: Final = {"forward": 56, "backward": 40}
"""Weights that a thread holds at most; in the backward it has as many sums beside them."""

BUSY: Final = 528
"""Programs from which on all multiprocessors of an H200 have enough to do."""


def has(spec: KernelSpec) -> bool:
    """Whether there is such a kernel for `spec`."""
    if spec.blueprint != "bottleneck" or spec.chunk > NARROW:
        return False
    return spec.kind == "forward" or (spec.kind == "backward" and spec.blend in ("residual", "lerp"))


def side(config: TuneConfig) -> int:
    """Rows that lie side by side in a program: each thread has one chunk's."""
    return WARP * config.num_warps // (config.group * config.lanes) if config.lanes else 0


def weights(spec: KernelSpec) -> int:
    """Numbers that a chunk's hidden units come with."""
    return (2 * spec.chunk + 1) * next_pow2(spec.rank)


def fewest(spec: KernelSpec) -> int:
    """Threads that have to share a chunk's row for its weights to fit."""
    return min(8, next_pow2(cdiv(weights(spec), _HELD[spec.kind])))


def usual(spec: KernelSpec, rows: int) -> TuneConfig | None:
    """The config to use where none was tuned; None where matrix products are faster."""
    dense = 2 * spec.slots > spec.seeds
    listed = spec.slots if dense else max(1, min(spec.slots, cdiv(spec.seeds, 10)))
    few = rows * listed <= 1 << 14
    exact = spec.dtype == "float32"
    widest = {"forward": 4 if exact else 2 if few and not dense else 1, "backward": 8 if exact else 3}
    if not has(spec) or spec.chunk > widest[spec.kind]:
        return None
    lanes = fewest(spec)
    if spec.kind == "forward":
        across = 32 if dense else 8
        tiles = 2 if dense or spec.chunk > 1 else 4
    else:
        across = 32 if listed >= 256 else 8 if listed >= 48 else 4
        tiles = 2 if across == 32 and spec.chunk <= 2 else 1
    across = min(max(across, lanes), lanes * next_pow2(listed))
    if spec.layout == "channels_first":
        # Rows lie side by side in memory, not chunks.
        across = lanes
    while tiles > 1 and cdiv(listed, across // lanes) * cdiv(rows, tiles * WARP // across) < BUSY:
        tiles //= 2
    return _config(spec, lanes, across, tiles, 8 if spec.kind == "backward" and tiles > 1 else 16)


def grid(spec: KernelSpec, rows: int) -> list[TuneConfig]:
    """What is worth timing."""
    if not has(spec):
        return []
    found = []
    for lanes in dict.fromkeys((fewest(spec), min(8, 2 * fewest(spec)))):
        for across in dict.fromkeys((32, 8, 4, lanes)):
            if not lanes <= across <= lanes * next_pow2(spec.slots):
                continue
            for tiles in (1, 2, 4):
                high = tiles * WARP // across
                if tiles * spec.chunk <= 8 and (high <= next_pow2(rows) or tiles == 1):
                    found += [_config(spec, lanes, across, tiles, programs) for programs in (8, 16)]
    return found


def _config(spec: KernelSpec, lanes: int, across: int, tiles: int, programs: int) -> TuneConfig:
    group = across // lanes
    columns = group * next_pow2(spec.chunk)
    return TuneConfig(tiles * WARP // across, columns, 1, 1, group=group, programs=programs, lanes=lanes)
