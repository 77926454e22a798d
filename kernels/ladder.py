"""What a kernel falls back to where its config spills: more threads for a tile, lower tiles, pieces of a chunk.

Whether a tile fits a thread's registers depends on the architecture and on the compiler's mood, and no rule foretells
it. So the compiler is asked: `rungs` are the configs to try behind the first one, and `first_clean` takes the first
that spills nothing. What doesn't spill keeps the config that was chosen for its speed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

from msgspec.structs import replace

from morphc.errors import ResourceError
from morphc.kernels import tuning
from morphc.kernels.launch import Prepared
from morphc.kernels.spec import KernelSpec, TuneConfig
from morphc.kernels.templating import next_pow2


@lru_cache(maxsize=1024)
def rungs(spec: KernelSpec, config: TuneConfig) -> tuple[TuneConfig, ...]:
    """Configs of a kernel over active seeds to try where `config` spills, in their order."""
    if config.lanes:
        made = _by_lane(spec, config)
    else:
        made = _of_forward(spec, config) if spec.kind == "forward" else _of_gradients(spec, config)
    return tuple(
        each for each in dict.fromkeys(made) if each != config and not tuning.reads_beyond(spec, each)
    )


def first_clean(
    config: TuneConfig, behind: Sequence[TuneConfig], prepare: Callable[[TuneConfig], Prepared]
) -> tuple[TuneConfig, Prepared]:
    """The first config whose kernel spills nothing, else the one that spills least, and its kernel.

    Raises ResourceError where none fits the device's shared memory.
    """
    least: tuple[TuneConfig, Prepared] | None = None
    refused: ResourceError | None = None
    for each in (config, *behind):
        try:
            prepared = prepare(each)
        except ResourceError as error:
            refused = refused or error
            continue
        if not prepared.spills:
            return each, prepared
        if least is None or prepared.spills < least[1].spills:
            least = each, prepared
    if least is None:
        assert refused is not None
        raise refused
    return least


def _by_lane(spec: KernelSpec, config: TuneConfig) -> list[TuneConfig]:
    """Lower blocks, then more threads for a chunk's row, with fewer of its hidden units each."""
    found = []
    for share in (1, 2, 4, 8):
        lanes = min(8, config.lanes * share)
        across = max(config.group * config.lanes, lanes)
        group = across // lanes
        low = replace(
            config,
            block_rows=32 * config.num_warps // across,
            block_cols=group * next_pow2(spec.chunk),
            group=group,
            lanes=lanes,
        )
        found.append(replace(low, maxnreg=255))
    return found


def _of_forward(spec: KernelSpec, config: TuneConfig) -> list[TuneConfig]:
    """The cap on registers is for occupancy, and goes first."""
    pad = next_pow2(spec.chunk)
    found = [replace(config, maxnreg=255)]
    warps, rows = config.num_warps, config.block_rows
    while warps < 8:
        warps *= 2
        found.append(replace(config, num_warps=warps, maxnreg=255))
    while rows > 16:
        rows //= 2
        for warps in dict.fromkeys((config.num_warps, 4, 8)):
            found.append(replace(config, block_rows=rows, num_warps=warps, maxnreg=255))
    low = replace(config, block_rows=16, block_cols=pad, group=1, num_stages=1, maxnreg=255)
    return found + [replace(low, num_warps=warps) for warps in (4, 8, 2, 16)]


def _of_gradients(spec: KernelSpec, config: TuneConfig) -> list[TuneConfig]:
    """A tile's sums over rows stay in registers too, so few hidden units at a time come last."""
    pad = next_pow2(spec.chunk)
    found = [replace(config, num_warps=8)]
    if spec.blueprint != "bottleneck":
        return found + [replace(config, num_warps=8, block_rows=rows) for rows in (8, 4)]
    found += [replace(config, block_rows=16, num_warps=warps) for warps in (config.num_warps, 8)]
    alone = replace(config, block_rows=16, block_cols=max(16, pad), group=1)
    pieces = max(1, min(8, pad // 16))
    for stages in (config.num_stages, 1):
        for units in (0, 16):
            for warps in (4, 8) if pad < 128 else (8,):
                found.append(replace(alone, num_stages=stages, num_warps=warps, units=units, pieces=pieces))
    return [*found, replace(found[-1], maxnreg=255)]
