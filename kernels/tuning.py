"""Which tile, grid and group a kernel gets: by timing on the device, by a model of its cost where there is none.

A row count is rounded up to a power of two, its *bucket*, so that a model's batch sizes share a handful of answers.
`candidates` is the pruned grid of a spec, best guess first; `choose` answers at once, with what was timed or with
that guess; `tune` compiles candidates in parallel, drops those that spill or don't fit, and times the rest.

The model is for the kernels over active seeds, and knows what measurements on an H200 showed to matter: chunks of a
few features cost whole 32-byte sectors and share a dot, block-diagonally; memory is busy when enough bytes are on
their way; a persistent grid wants a few programs a multiprocessor and enough items to share.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import msgspec
import torch

from morphc.errors import KernelError, ResourceError, UnknownNameError
from morphc.kernels import devices, lanes
from morphc.kernels.cache.tables import Trial
from morphc.kernels.compile import TIME_LIMIT, Failure, Job, Resources, compile_all
from morphc.kernels.devices import Device
from morphc.kernels.spec import KernelSpec, TuneConfig
from morphc.kernels.templating import cdiv, next_pow2

KEPT: Final = 24
"""Candidates of a grid that are compiled and timed at most."""

FINAL: Final = 1.25
"""A candidate slower than the best by this factor in the first rounds is not timed further."""

SHORT, LONG = 5, 25

Run = Callable[[int], None]
"""`run(i)` starts the kernel on the i-th of the rotated buffers."""

TimeFunction = Callable[[Sequence[Run], int], Sequence[float]]
"""`time(runs, rounds)`: microseconds of one call of each."""


class Tuned(msgspec.Struct, frozen=True):
    """The answer for a spec and a bucket of rows, with every candidate that led to it."""

    key: str
    config: TuneConfig
    us: float
    trials: tuple[Trial, ...]


def bucket(rows: int) -> int:
    """The power of two that stands for `rows`."""
    return next_pow2(rows)


def key(spec: KernelSpec, rows: int) -> str:
    """Name of an answer, in `Plan.tuned` and here: the same for a plan's spec and the one that runs.

    The architecture is the device's that was tuned on; only telemetry has to do with the epilogue.
    """
    epilogue = spec.epilogue if spec.kind == "telemetry" else None
    plain = msgspec.structs.replace(spec, arch="any", epilogue=epilogue)
    return f"{plain.name}-{plain.digest[:12]}@{bucket(rows)}"


_known: dict[str, TuneConfig] = {}


def adopt(tuned: Mapping[str, TuneConfig]) -> None:
    """Take over answers, those of a plan for instance; `choose` then gives them."""
    _known.update(tuned)


def known(specs: Iterable[KernelSpec] | None = None) -> dict[str, TuneConfig]:
    """Answers that were timed or adopted, as `Plan.tuned` has them; with `specs` only those of them."""
    if specs is None:
        return dict(sorted(_known.items()))
    wanted = {key(spec, 1).rpartition("@")[0] for spec in specs}
    return {name: config for name, config in sorted(_known.items()) if name.rpartition("@")[0] in wanted}


def forget() -> None:
    """Drop every answer."""
    _known.clear()


def lookup(spec: KernelSpec, rows: int) -> TuneConfig | None:
    """The timed or adopted config for `rows` rows, if there is one."""
    return _known.get(key(spec, rows))


def choose(spec: KernelSpec, rows: int, device: Device = devices.H200) -> TuneConfig:
    """The config for `rows` rows: a timed or adopted one, else the model's best guess for `device`."""
    return lookup(spec, rows) or candidates(spec, rows, device)[0]


@lru_cache(maxsize=1024)
def candidates(spec: KernelSpec, rows: int, device: Device = devices.H200) -> tuple[TuneConfig, ...]:
    """The pruned grid of a kernel over active seeds (`forward`, `backward`, `train`), cheapest by the model first.

    Raises UnknownNameError for other kinds: their host modules know what is worth timing.
    """
    if spec.kind not in _WORK:
        raise UnknownNameError("kind of kernel over active seeds", spec.kind, _WORK)
    rows = bucket(rows)
    # Equal costs keep the grid's order, so that the answer is the same everywhere.
    order = sorted(_grid(spec, rows), key=lambda config: _cost(spec, rows, config, device))
    if (usual := _usual(spec, rows)) is not None:
        order = [usual, *(config for config in order if config != usual)]
    # The best of every value of every parameter, and then what the model likes: it may be wrong about a parameter.
    kept: dict[TuneConfig, None] = dict.fromkeys(order[:1])
    for field in TuneConfig.__struct_fields__:
        for value in dict.fromkeys(getattr(config, field) for config in order):
            kept.setdefault(next(config for config in order if getattr(config, field) == value))
    for config in order:
        if len(kept) < KEPT:
            kept.setdefault(config)
    return tuple(sorted(kept, key=order.index))


MULTIPROCESSORS: Final = {
    "H200": 132,
    "H100": 132,
    "A100": 108,
    "L4": 58,
    "RTX 4090": 128,
    "B200": 148,
    "MI300X": 304,
}
SECTOR: Final = 32
ITEM_US: Final = 1.2
FEW_TILES: Final = 40
"""Fewer than these, and smaller ones were faster on an H200."""
IN_FLIGHT: Final = 26_000
"""Bytes a multiprocessor has on their way when memory is busy: 4.3 TB/s for 0.8 us, over 132 of them."""

# Times that an active kernel moves its chunks' bytes, and does its dots, against the forward's one read, one write
# and two dots.
_WORK: Final = {"forward": (1.0, 1.0), "backward": (2.0, 2.5), "train": (0.5, 3.0)}
_BYTES: Final = {"bfloat16": 2, "float16": 2, "float32": 4}


def processors(device: Device) -> int:
    """Multiprocessors of a device of the cost model."""
    return next((count for name, count in MULTIPROCESSORS.items() if name in device.name), 108)


TARGETS: Final = {"cuda:80": 108, "cuda:89": 58, "cuda:90": 132, "cuda:100": 148, "hip:gfx942": 304}
"""Architectures that kernels are compiled ahead of time for, and the multiprocessors of their usual device: whether
a launch has few programs decides which form of a kernel it takes."""


def processors_of(target: str) -> int:
    """Multiprocessors of the usual device of an architecture. Raises UnknownNameError for one not in TARGETS."""
    if target not in TARGETS:
        raise UnknownNameError("target", target, TARGETS)
    return TARGETS[target]


def _grid(spec: KernelSpec, rows: int) -> list[TuneConfig]:
    """block_cols is the tile's width: `group` chunks, each padded to a power of two."""
    pad = next_pow2(spec.chunk)
    most = max(1, min(128 // pad, 16, next_pow2(max(spec.slots, 1))))
    least = min(most, max(1, 4 // pad)) if spec.rank else 1
    groups = [group for group in (1, 2, 4, 8, 16) if least <= group <= most] or [1]
    heights = [height for height in (16, 32, 64, 128, 256) if height <= max(16, rows)]
    found = lanes.grid(spec, rows)
    if spec.kind != "forward":
        return found + _gradient_grid(spec, pad, dict.fromkeys((1, *groups)), heights)
    for group, height, programs, warps, stages in itertools.product(
        groups, heights, (2, 4, 8), (2, 4, 8), (1, 2, 3)
    ):
        values = height * max(16, group * pad) / (32 * warps)
        # Fewer values a thread than one 16-byte load, or more than its registers hold, has never paid.
        if 4 <= values <= 64 or (height == heights[0] and values < 4 and warps == 2):
            config = TuneConfig(height, group * pad, warps, stages, group=group, programs=programs)
            if not reads_beyond(spec, config):
                found.append(config)
    return found


def _gradient_grid(
    spec: KernelSpec, pad: int, groups: Iterable[int], heights: Sequence[int]
) -> list[TuneConfig]:
    """Kernels that form gradients hold several tiles and sums, so only low ones fit a thread's registers: of some three
    hundred that were compiled, those with up to 32 values of a tile a thread, half as many in float32. Stages and a
    cap on registers changed nothing there, or spilled.
    """
    most = 16 if spec.dtype == "float32" else 32
    found = []
    for group, height, programs, warps in itertools.product(groups, heights, (2, 4, 8), (1, 2, 4, 8)):
        broadest = max(16, group * pad, group * next_pow2(spec.rank) if spec.rank else 0)
        config = TuneConfig(height, group * pad, warps, 3, group=group, programs=programs)
        fits = 4 <= height * broadest / (32 * warps) <= most
        if (fits or (height == heights[0] and warps == 8)) and not reads_beyond(spec, config):
            found.append(config)
    return found


def reads_beyond(spec: KernelSpec, config: TuneConfig) -> bool:
    """Whether warps have no rows of their own in float32, and read what isn't theirs: `compile_worker.overlaid`."""
    return spec.dtype == "float32" and 64 <= config.block_rows < 16 * config.num_warps


def _usual(spec: KernelSpec, rows: int) -> TuneConfig | None:
    """What won on an H200 for rank 16, at one, ten and a hundred percent active; of gradients `gradient.default` knows.

    A tile is 16 columns of small chunks, or the 64 of a line of memory where chunks are that wide or nearly all of
    them are active; a program holds two to four kilobytes of it.
    """
    if spec.kind != "forward" or spec.blueprint != "bottleneck":
        return None
    if (by_lane := lanes.usual(spec, rows)) is not None:
        return by_lane
    pad, deep = next_pow2(spec.chunk), next_pow2(spec.rank)
    if deep > 32:
        return None
    if spec.dtype == "float32":
        # Dots of three passes leave room for half as much.
        group = max(1, min(16 // pad, 32 // deep))
        height = min(64 if pad <= 64 else 32, max(16, next_pow2(rows)))
        group = spread(spec, rows, group, height, 2 * spec.slots > spec.seeds)
        warps = 8 if pad > 64 else 2 if pad == 16 or height < 64 else 4
        return TuneConfig(height, group * pad, warps, 3, group=group, programs=8)
    dense = 2 * spec.slots > spec.seeds
    columns = max(pad, 64) if pad >= 16 and dense else max(pad, 16)
    group = columns // pad
    if group * deep > 128:
        group = max(1, 128 // deep)
        columns = group * pad
    # Hidden values are what a tile of small chunks has most of.
    height = 64 if columns >= 64 or group * deep >= 128 else 128
    if pad == 64 and rows >= 32 and not dense and rows * spec.slots < 1 << 14:
        height = 32
    if pad > 128 and dense:
        height = 32
    height = min(height, max(16, next_pow2(rows)))
    group = spread(spec, rows, group, height, dense)
    columns = group * pad
    # Addresses of columns that lie anyhow, and a gate's weights, want registers too.
    crowded = columns >= 64 and (spec.blend in ("multiply", "gate") or spec.features != pad * spec.seeds)
    warps = (8 if columns > 64 else 4 if height >= 64 else 2) * (2 if crowded and columns == 64 else 1)
    return TuneConfig(height, columns, warps, 3, group=group, programs=8)


def spread(spec: KernelSpec, rows: int, group: int, height: int, dense: bool) -> int:
    """Chunks of a tile, fewer than `group` where there would be so few tiles that most of the device stood idle."""
    active = spec.slots if dense else max(1, min(spec.slots, cdiv(spec.seeds, 10)))
    while (
        group > 1
        and group * next_pow2(spec.chunk) > 4
        and cdiv(active, group) * cdiv(rows, height) < FEW_TILES
    ):
        group //= 2
    return group


def _cost(spec: KernelSpec, rows: int, config: TuneConfig, device: Device) -> float:
    """Microseconds with a tenth of the seeds active: what moves, what is computed, and what waits in turn."""
    item = _BYTES.get(spec.dtype, 4)
    moved, computed = _WORK[spec.kind]
    multiprocessors = processors(device)
    active = max(1, min(spec.slots, cdiv(spec.seeds, 10)))
    items = cdiv(active, config.group) * cdiv(rows, config.block_rows)
    registers = _registers(spec, config)
    held = 65536 // (32 * config.num_warps * max(32, min(config.maxnreg or 255, int(registers))))
    resident = max(1, min(config.programs, 2048 // (32 * config.num_warps), held))

    traffic = moved * 2 * active * rows * cdiv(spec.chunk * item, SECTOR) * SECTOR
    on_its_way = resident * config.block_rows * config.block_cols * item * max(0.5, config.num_stages - 1)
    memory = traffic / (device.bandwidth * min(1.0, on_its_way / IN_FLIGHT))
    if config.lanes:
        dots = 0.0
        a_row = computed * (2 * spec.chunk + 8) * next_pow2(spec.rank) + 20 * config.lanes
        vector = 2 * active * rows * a_row / device.vector
    else:
        wide, deep = (
            max(16, config.block_cols),
            max(16, config.group * next_pow2(spec.rank)) if spec.rank else 0,
        )
        dots = computed * items * 4 * config.block_rows * wide * deep / (0.5 * device.peak(spec.dtype))
        # An activation of the hidden values, two dozen operations each.
        vector = computed * items * 24 * config.block_rows * max(deep, wide) / device.vector
    # A block is loaded, multiplied, activated, multiplied and stored in turn, and hides behind those beside it.
    waiting = cdiv(items, multiprocessors * resident) * ITEM_US / math.sqrt(config.num_stages)
    spilled = 1.0 if registers <= (config.maxnreg or 255) else 2.0 * registers / (config.maxnreg or 255)
    # Programs without an item are started for nothing; a few hundred ns a thousand.
    idle = 0.3 * max(0, multiprocessors * config.programs - items) / 1000
    return device.launch_us + idle + spilled * (max(memory, dots + vector) * 1e6 + waiting)


def memory_us(spec: KernelSpec, rows: int, device: Device) -> float:
    """Microseconds that the bytes alone take which a kernel can't do without, with a tenth of the seeds active.

    Telemetry reads all of an activation; the others what `_WORK` says of the active chunks' sectors.
    """
    item = _BYTES.get(spec.dtype, 4)
    if spec.kind == "telemetry":
        return 1e6 * rows * spec.features * item / device.bandwidth
    moved, _ = _WORK.get(spec.kind, (1.0, 1.0))
    active = max(1, min(spec.slots, cdiv(spec.seeds, 10)))
    return 1e6 * moved * 2 * active * rows * cdiv(spec.chunk * item, SECTOR) * SECTOR / device.bandwidth


def _registers(spec: KernelSpec, config: TuneConfig) -> float:
    """Registers a thread, from what it holds of the tile, of the hidden values and of the weights.

    The factors are fitted to some seventy cross-compiled forwards; float32 dots are split into three of tf32, and
    float16 hidden values go two to a register.
    """
    if config.lanes:
        held = lanes.weights(spec) / config.lanes
        return 60 + (2 if spec.kind == "backward" else 1) * held
    wide, deep = max(16, config.block_cols), max(16, config.group * next_pow2(spec.rank)) if spec.rank else 0
    tile = config.block_rows * (wide + 2 * deep) / (32 * config.num_warps)
    weights = 2 * wide * deep / (32 * config.num_warps)
    if spec.dtype == "float32":
        return 40 + 2.5 * tile + 1.5 * weights
    return 40 + (0.7 if wide <= 16 else 1.5) * tile + 0.8 * weights


@dataclass(frozen=True)
class Candidate:
    """A config, the kernels to compile for it (none where Triton has compiled them), and how it is started.

    `start` is called once the config is known to compile.
    """

    config: TuneConfig
    jobs: Sequence[Job]
    start: Callable[[], Run]


def tune(
    spec: KernelSpec,
    rows: int,
    offered: Sequence[Candidate],
    time: TimeFunction,
    *,
    processes: int | None = None,
    time_limit: float = TIME_LIMIT,
    progress: Callable[[int, int], None] | None = None,
) -> Tuned:
    """Time the candidates and keep the fastest for `choose`; with equal times the earlier one.

    Candidates that don't compile, spill, or need more shared memory than the target has are not timed, and their
    trial says why. Equal binaries are timed once. Raises ResourceError where none fits the target's shared memory,
    KernelError where none is left for other reasons.
    """
    if not offered:
        raise KernelError(f"{spec.name}: no candidate to tune")
    jobs = [job for candidate in offered for job in candidate.jobs]
    results = iter(compile_all(jobs, processes=processes, time_limit=time_limit, progress=progress))
    compiled = [[next(results) for _ in candidate.jobs] for candidate in offered]
    trials = examined(offered, compiled)
    alive = [at for at, trial in enumerate(trials) if not trial.problem and trial.same_as is None]
    if not alive:
        raise _nothing_left(spec, trials, compiled)
    runs = {at: offered[at].start() for at in alive}
    times = dict(zip(alive, time([runs[at] for at in alive], SHORT), strict=True))
    fastest = min(times.values())
    finalists = [at for at in alive if times[at] <= FINAL * fastest]
    if len(finalists) > 1:
        times |= dict(zip(finalists, time([runs[at] for at in finalists], LONG), strict=True))
    for at, trial in enumerate(trials):
        source = at if trial.same_as is None else trial.same_as
        trials[at] = msgspec.structs.replace(trial, us=times.get(source))
    best = min(finalists, key=lambda at: (times[at], at))
    name = key(spec, rows)
    _known[name] = offered[best].config
    return Tuned(name, offered[best].config, times[best], tuple(trials))


def examined(offered: Sequence[Candidate], compiled: Sequence[Sequence[Resources | Failure]]) -> list[Trial]:
    """What is known of candidates once they are compiled: why one isn't timed, and which have equal binaries."""
    trials: list[Trial] = []
    first: dict[tuple[str, ...], int] = {}
    for at, (candidate, found) in enumerate(zip(offered, compiled, strict=True)):
        trial = _examined(candidate.config, found)
        if not trial.problem and found:
            binary = (
                *(one.digest for one in found if isinstance(one, Resources)),
                *_grid_of(candidate.config),
            )
            trial = msgspec.structs.replace(trial, same_as=first.get(binary))
            first.setdefault(binary, at)
        trials.append(trial)
    return trials


def _grid_of(config: TuneConfig) -> tuple[str, ...]:
    """What differs between two launches of one binary."""
    return (str(config.programs), str(config.splits))


def _examined(config: TuneConfig, found: Sequence[Resources | Failure]) -> Trial:
    problem = "; ".join(dict.fromkeys(one.problem for one in found if one.problem))
    built = [one for one in found if isinstance(one, Resources)]
    return Trial(
        config,
        problem=problem,
        registers=max((one.registers for one in built), default=0),
        shared=max((one.shared for one in built), default=0),
    )


def _nothing_left(
    spec: KernelSpec, trials: Sequence[Trial], compiled: Sequence[Sequence[Resources | Failure]]
) -> KernelError:
    over = [
        max(found, key=lambda one: one.shared)
        for found in ([one for one in row if isinstance(one, Resources) and one.excess] for row in compiled)
        if found
    ]
    if len(over) == len(trials):
        least = min(over, key=lambda one: one.shared)
        return ResourceError(f"{spec.name} fits no tile of {len(trials)}: the smallest {least.problem}")
    told = "; ".join(dict.fromkeys(trial.problem for trial in trials))
    return KernelError(f"{spec.name}: none of {len(trials)} candidates can be used: {told}")


def graph_times(runs: Sequence[Run], rounds: int) -> list[float]:
    """Microseconds of one call of each of `runs` on the current CUDA device: medians of CUDA-graph replays.

    A graph holds enough calls to last some 200 us, each on the next of the rotated buffers; all graphs are
    replayed in turns, since clocks drift.
    """
    if not runs:
        return []
    graphs = []
    for run in runs:
        calls = _calls_for(run)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in range(calls):
                run(call)
        graphs.append((graph, calls))
    times: list[list[float]] = [[] for _ in runs]
    for turn in range(rounds + 1):
        marks = []
        for at in range(len(graphs)):
            graph, calls = graphs[(at + turn) % len(graphs)]
            before, after = _event(), _event()
            before.record()
            graph.replay()
            after.record()
            marks.append(((at + turn) % len(graphs), calls, before, after))
        torch.cuda.synchronize()
        # The first round warms the caches and the clocks.
        if turn:
            for index, calls, before, after in marks:
                times[index].append(1e3 * before.elapsed_time(after) / calls)
    return [statistics.median(found) for found in times]


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _calls_for(run: Run) -> int:
    """Calls that take about 200 us, 4 to 64: the first call loads the kernel, the others are timed."""
    run(0)
    torch.cuda.synchronize()
    before, after = _event(), _event()
    before.record()
    for call in range(4):
        run(call)
    after.record()
    torch.cuda.synchronize()
    each = max(1.0, 250.0 * before.elapsed_time(after))
    return max(4, min(64, int(200.0 / each)))
