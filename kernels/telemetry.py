"""Telemetry on the device: one read of an activation gives the sums of all its chunks.

    measure = Telemetry(spec, near_zero, device)
    cells = measure.new_cells(view)
    measure.shift(x, view, sums, counts, offset)      # once a window, before its first sample
    measure(x, view, cells, sums, counts, offset)     # a sample, in one launch
    measure.merge(cells, sums, counts, offset)        # whenever the sums are to be read

A sample adds to `cells`, sums of every chunk and split of the rows, each of which belongs to one program of the grid.
`merge` hands them on to the state, `sums` [8, N] float64 and `counts` [3, N] int64, in float64 and in a fixed order.
"""

from __future__ import annotations

from functools import lru_cache
from types import SimpleNamespace
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from morphc.errors import UnsupportedKernelError
from morphc.kernels import codegen, launch, tuning
from morphc.kernels.codegen import Source
from morphc.kernels.compile import Job
from morphc.kernels.dead import dead_expression, dead_ptx, dead_values
from morphc.kernels.layout import View
from morphc.kernels.reference import health
from morphc.kernels.spec import KernelSpec, Layout, TuneConfig
from morphc.kernels.telemetry_plan import ITEM, LOAD, WIDEST, Plan, plan, regions, tiling
from morphc.kernels.templating import cdiv, next_pow2
from morphc.kernels.triton_api import Launch

WRITTEN: Final = ("relu", "gelu", "gelu_tanh", "silu")
"""Activations that a pass can write along."""

MOST_INTERVALS: Final = 4
"""Of dead values."""

MERGE_EVERY: Final = 16
"""Samples whose sums are added up in float32 before they are handed on in float64."""

MERGE_TILE: Final = 1 << 13
"""Values of a program of `merge`, of 8 for every chunk and split."""

HEAD: Final = 1 << 18
"""Values that shifts are found from, in all."""

SHIFT_ROWS: Final = 16
SHIFT_WARPS: Final = 4

KEPT: Final = 1024
"""Shapes of activations that launches are remembered for."""

ROWS: Final = SimpleNamespace(
    SHIFT=health.SHIFT,
    SUM=health.SUM,
    SQUARES=health.SQUARES,
    ROW_SQUARES=health.ROW_SQUARES,
    ZEROS=health.ZEROS,
    PEAK=health.PEAK,
    ROWS=health.ROWS,
    NONFINITE=health.NONFINITE,
)


def spec_of(
    features: int, seeds: int, dtype: torch.dtype, layout: Layout = "last", epilogue: str | None = None
) -> KernelSpec:
    """The spec of a site's telemetry. Channels-last memory is `last` with a row for every position."""
    return KernelSpec(
        kind="telemetry",
        features=features,
        seeds=seeds,
        chunk=cdiv(features, seeds),
        slots=0,
        rank=0,
        blueprint="",
        blend="",
        epilogue=epilogue,
        layout="last" if layout == "channels_last" else layout,
        dtype=str(dtype).removeprefix("torch."),
    )


def refuses(spec: KernelSpec, near_zero: float = 0.0) -> str:
    """Why no kernel is made for `spec`, or an empty string."""
    if spec.dtype not in ITEM:
        return f"no kernel reads {spec.dtype}"
    if spec.chunk > WIDEST:
        return f"chunks of {spec.chunk} features are wider than {WIDEST}; use more seeds"
    if len(dead_values(spec.epilogue, near_zero, spec.dtype)) > MOST_INTERVALS:
        return f"near_zero={near_zero} behind {spec.epilogue} has no simple test"
    return ""


@lru_cache(maxsize=256)
def source(spec: KernelSpec, near_zero: float = 0.0) -> Source:
    """The kernel file. Raises UnsupportedKernelError for a spec that `refuses` names a reason for."""
    if reason := refuses(spec, near_zero):
        raise UnsupportedKernelError(f"{spec.name}: {reason}")
    dead = dead_values(spec.epilogue, near_zero, spec.dtype)
    after = f"{spec.epilogue}(v)" if spec.epilogue else "v"
    return codegen.render(
        "telemetry.py.jinja",
        spec,
        regions=regions(spec.features, spec.seeds),
        dead=dead_expression(dead),
        dead_text=f"Whether |{after}| <= {near_zero!r}.",
        dead_packed=dead_ptx(dead, spec.dtype),
        rows=ROWS,
    )


class Variant(NamedTuple):
    """What a compiled pass depends on beside its spec and config.

    unit: power of two up to 16 that divides the distance of rows (of samples and features, where those aren't last)
    and the pointers, in elements. dense: rows follow each other. write: act(x) is written. clocked: the device
    counts the launches. exact: the cells are float64. add: to what they hold.
    """

    unit: int = 16
    dense: bool = True
    write: bool = False
    clocked: bool = False
    exact: bool = False
    add: bool = True


USUAL: Final = Variant()


def signature(spec: KernelSpec, exact: bool = False) -> dict[str, str]:
    """Of the pass."""
    item = f"*{launch.triton_type(getattr(torch, spec.dtype))}"
    return {
        "x_ptr": item,
        "y_ptr": item,
        "part_ptr": "*fp64" if exact else "*fp32",
        "measured_ptr": "*i64",
        "shift_ptr": "*fp64",
        "clock_ptr": "*i32",
        "every": "i32",
        "rows": "i32",
        "stride": "i32",
        "y_stride": "i32",
        "inner": "i32",
        "span": "i32",
    }


def job(
    spec: KernelSpec,
    config: TuneConfig,
    variant: Variant = USUAL,
    near_zero: float = 0.0,
    target: str = "cuda:90",
) -> Job:
    """The pass as `compile_all` and `launch.prepare` take it. target: `cpu` is Triton's interpreter."""
    kind, _, arch = target.partition(":")
    constants: dict[str, Any] = {
        "ADD": variant.add,
        "SLIM": config.num_stages == 1,
        "CLOCKED": variant.clocked,
    }
    for region, suffix in zip(regions(spec.features, spec.seeds), ("", "_2"), strict=False):
        for name, value in tiling(spec, region, config, variant.unit)._asdict().items():
            constants[f"{name.upper()}{suffix}"] = value
    words = ITEM[spec.dtype] == 2 and variant.unit > 1
    constants |= {"UNIT": variant.unit, "DENSE": variant.dense, "WRITE": variant.write, "WORDS": words}
    # The instructions for two 16-bit values at once came with capability 9.
    constants["PTX"] = kind == "cuda" and (not arch or int(arch) >= 90)
    # So did kernels that overlap.
    constants["NOTIFIES"] = constants["PTX"]
    pointers = ["part_ptr", "measured_ptr", "clock_ptr"]
    if variant.unit > 1:
        pointers += ["x_ptr", "y_ptr"]
    options: dict[str, Any] = {"num_warps": config.num_warps, "num_stages": 1}
    if config.maxnreg is not None and kind == "cuda":
        options["maxnreg"] = config.maxnreg
    made = source(spec, near_zero)
    return Job(made, "telemetry", signature(spec, variant.exact), constants, pointers, options, target)


def choose(spec: KernelSpec, rows: int, processors: int = 132) -> TuneConfig:
    """A config for `rows` rows on a device of so many multiprocessors, from what is known of one."""
    return candidates(spec, rows, processors)[0]


@lru_cache(maxsize=1024)
def candidates(spec: KernelSpec, rows: int, processors: int = 132) -> tuple[TuneConfig, ...]:
    """Configs worth timing, best guess first. The rows of a 128-byte stretch of the features, in a thousand programs
    that ask for four vectors a thread at once; fewer and smaller ones where there is less to read.
    """
    line = 128 // ITEM[spec.dtype]
    full = LOAD // ITEM[spec.dtype]
    widest = next_pow2(spec.features)
    values = rows * spec.features

    def config(width: int, warps: int, loads: int, programs: float) -> TuneConfig:
        width = min(max(width, min(next_pow2(spec.chunk), 32 * warps * full)), widest)
        height = max(1, 32 * warps * full * loads // width)
        tiles = cdiv(spec.features, width)
        splits = max(1, min(round(programs / tiles), cdiv(rows, height)))
        # Left alone, ptxas spills a register there, on capability 8.0, to fit one more warp into a multiprocessor.
        tall = spec.layout == "channels_first" and spec.chunk > 64 and spec.dtype == "float32"
        # And on 9.0 it does so for chunks that begin anywhere, in programs of few warps.
        few = spec.dtype == "float32" and warps <= 2
        return TuneConfig(
            height, width, warps, 2, splits=splits, maxnreg=255 if few else 128 if tall else None
        )

    found: list[TuneConfig] = []
    if values <= 1 << 22:
        # One step each, on as many multiprocessors as it makes programs for.
        for width, warps in ((line // 2, 1), (line, 2), (line, 4), (line, 1), (2 * line, 4)):
            for loads in (4, 8, 2):
                found.append(
                    config(width, warps, loads, max(processors, values / (32 * warps * full * loads)))
                )
    # Cells of small chunks are a share of what is moved, so programs there are fewer and larger. Where a chunk is one
    # feature, or begins anywhere, adding up over warps costs most: a program there is one warp. All orders are what
    # won on an H200.
    even = next_pow2(spec.chunk) * spec.seeds == spec.features
    order = ((4, 4, 8), (4, 8, 4), (8, 4, 4))
    half, last = ITEM[spec.dtype] == 2, spec.layout == "last"
    # An activation, and writing it, want more threads.
    plain = spec.epilogue is None
    if last and half and spec.chunk == 1:
        order = ((1, 16, 8), (1, 8, 16), (2, 8, 8))
    elif last and half and not even:
        order = ((1, 8, 16), (2, 8, 8), (1, 16, 8))
    elif last and half and plain:
        order = ((2, 8, 8), (4, 8, 4), (4, 4, 8)) if spec.chunk <= line else ((4, 8, 4), (8, 8, 2), (4, 4, 8))
    elif last and even and plain and 4 <= spec.chunk <= 2 * line:
        order = (
            ((2, 8, 8), (1, 8, 16), (4, 8, 4)) if spec.chunk <= line else ((1, 8, 16), (2, 8, 8), (4, 8, 4))
        )
    elif spec.chunk * ITEM[spec.dtype] <= 4:
        # A multiprocessor has room for 7 of 4 warps there, whose threads have 66 to 72 registers.
        order = ((4, 4, 7), (8, 4, 4), (4, 8, 4))
    rest = ((4, 4, 8), (4, 8, 4), (4, 4, 16), (2, 8, 8), (1, 8, 16), (8, 8, 2), (2, 4, 16))
    for warps, loads, programs in dict.fromkeys((*order, *rest)):
        for width in (line, 2 * line, line // 2):
            found.append(config(width, warps, loads, programs * processors))
    return tuple(dict.fromkeys(found))


def merge_job(
    spec: KernelSpec,
    block: int = 32,
    splits: int = 16,
    exact: bool = False,
    near_zero: float = 0.0,
    target: str = "cuda:90",
) -> Job:
    """`merge` as `compile_all` and `launch.prepare` take it. block: chunks of a program; splits: a power of two."""
    part = "*fp64" if exact else "*fp32"
    pointers = {"part_ptr": part, "measured_ptr": "*i64", "seen_ptr": "*i64"}
    signature = pointers | {"sums_ptr": "*fp64", "counts_ptr": "*i64", "state_stride": "i32", "splits": "i32"}
    splits = min(splits, MERGE_TILE // (8 * block))
    constants = {"BLOCK": block, "SPLITS": splits}
    options = {"num_warps": 8 if splits * 8 * block >= MERGE_TILE // 2 else 4}
    return Job(source(spec, near_zero), "merge", signature, constants, [*pointers], options, target)


def shift_job(spec: KernelSpec, near_zero: float = 0.0, target: str = "cuda:90") -> Job:
    """`shift` as `compile_all` and `launch.prepare` take it."""
    signature = {
        "x_ptr": f"*{launch.triton_type(getattr(torch, spec.dtype))}",
        "sums_ptr": "*fp64",
        "counts_ptr": "*i64",
        "state_stride": "i32",
        "rows": "i32",
        "inner": "i32",
        "stride": "i64",
        "inner_stride": "i64",
        "feature_stride": "i64",
    }
    constants = {"BLOCK_ROWS": SHIFT_ROWS, "BLOCK_COLS": min(32, next_pow2(spec.chunk))}
    return Job(source(spec, near_zero), "shift", signature, constants, (), {"num_warps": SHIFT_WARPS}, target)


class Cells:
    """Sums on their way to the state, of one site on one device.

    part: [splits, 6, S], float64 if `exact`. measured: [1] int64, rows that were measured; seen: [S] int64, those
    that the state knows of. pending: samples since the last merge, as far as this process launched them.
    """

    __slots__ = ("exact", "measured", "part", "pending", "pointers", "retired", "seen", "splits")

    def __init__(self, seeds: int, splits: int, device: torch.device, exact: bool) -> None:
        self.exact = exact
        self.splits = splits
        self.part = torch.zeros(
            splits, 6, seeds, dtype=torch.float64 if exact else torch.float32, device=device
        )
        self.measured = torch.zeros(1, dtype=torch.int64, device=device)
        self.seen = torch.zeros(seeds, dtype=torch.int64, device=device)
        self.pointers = self.part.data_ptr(), self.measured.data_ptr()
        self.pending = 0
        # Cells that were too few: graphs that were captured with them go on adding to them.
        self.retired: list[Cells] = []

    def clear(self) -> None:
        """Forget what was not handed on."""
        for cells in (self, *self.retired):
            cells.part.zero_()
            cells.measured.zero_()
            cells.seen.zero_()
            cells.pending = 0

    def enlarge(self, splits: int) -> None:
        """Have more splits; what the ones so far hold is still handed on."""
        before = Cells.__new__(Cells)
        for name in Cells.__slots__:
            setattr(before, name, getattr(self, name))
        retired, before.retired = [before, *self.retired], []
        self.__init__(self.part.shape[2], splits, self.part.device, self.exact)  # type: ignore[misc]
        self.retired = retired


class Pass(NamedTuple):
    """A pass, ready for activations of one shape. samples: that are added up before they are to be merged."""

    launch: Launch
    grid: tuple[int, int, int]
    samples: int
    numbers: tuple[int, ...]


class Telemetry:
    """The kernels of one spec on one device; with a config of their own, or one chosen by the number of rows.

    What is compiled is shared by all that measure alike. Launches that use the same cells belong on one stream.
    """

    __slots__ = (
        "_merges",
        "_on_gpu",
        "_passes",
        "_shifts",
        "config",
        "device",
        "near_zero",
        "processors",
        "spec",
        "target",
    )

    def __init__(
        self, spec: KernelSpec, near_zero: float, device: torch.device, config: TuneConfig | None = None
    ) -> None:
        """Raises UnsupportedKernelError for a spec that `refuses` names a reason for."""
        self.spec = spec
        self.near_zero = near_zero
        self.device = device
        self.config = config
        self.target = target_of(device)
        self.processors = launch.multiprocessors(device)
        self._on_gpu = device.type == "cuda"
        self._passes: dict[tuple[object, ...], Pass] = {}
        self._merges: dict[tuple[bool, int], tuple[Launch, int]] = {}
        self._shifts: dict[None, Launch] = {}
        source(spec, near_zero)

    def config_for(self, rows: int) -> TuneConfig:
        """The config for that many rows."""
        return (
            self.config
            or tuning.lookup(self.spec, rows)
            or choose(self.spec, next_pow2(rows), self.processors)
        )

    def plan(self, view: View, unit: int = 16, splits: int = 0) -> Plan:
        """The grid for an activation, see `plan`. unit: see `Variant`."""
        return plan(self.spec, self.config_for(view.rows), view, unit, splits)

    def new_cells(self, view: View, *, exact: bool = False) -> Cells:
        """Cells for activations of about that shape; more are made where one needs them.

        exact: in float64. Such sums are as good as the state's, so that only who reads them need merge them.
        """
        return Cells(self.spec.seeds, self.plan(view).splits, self.device, exact)

    def new_clock(self, view: View) -> Tensor:
        """What counts the launches for activations of that very shape."""
        found = [self.plan(view, unit) for unit in (1, 2, 4, 8, 16)]
        programs = max(planned.tiles * planned.splits for planned in found)
        return torch.zeros(programs, dtype=torch.int32, device=self.device)

    def __call__(
        self,
        x: Tensor,
        view: View,
        cells: Cells,
        sums: Tensor,
        counts: Tensor,
        offset: int = 0,
        *,
        y: Tensor | None = None,
        y_view: View | None = None,
        clock: Tensor | None = None,
        every: int = 1,
        merged: bool = False,
    ) -> None:
        """Measure `x`: add a sample to the cells, in one launch, and every few samples hand them on to the state.

        view: how x is walked. sums [8, N], counts [3, N]: the state, contiguous, in which the site's seeds begin at
        `offset`; sums are taken around their shifts. y: where act(x) is written in the same launch, other memory
        than x, walked as `y_view` (or `view`) says. clock: see `new_clock`; then each `every`th launch measures,
        the first included, and every one writes y. merged: hand the sample on at once.

        Raises UnsupportedKernelError where act(x) can't be written along.
        """
        if not view.rows:
            return
        out, out_stride = x, view.stride
        if y is not None:
            self._check_written(x, y)
            out, out_stride = y, (y_view or view).stride
        pointer, out_pointer = x.data_ptr(), out.data_ptr()
        key = (
            view.rows, view.inner, view.stride, out_stride, (pointer | out_pointer) % LOAD, y is None, clock is None,
            cells.exact, cells.splits,
        )  # fmt: skip
        launched, grid, most, numbers = self._passes.get(key) or self._prepare(
            key, view, out_stride, cells, y is not None, clock is not None
        )
        if grid[1] > cells.splits:
            cells.enlarge(grid[1])
        if cells.pending >= most:
            self.merge(cells, sums, counts, offset)
        cells.pending += 1
        if self._on_gpu:
            part, measured = cells.pointers
            shifts = _address(sums, health.SHIFT, offset)
            ticks = measured if clock is None else clock.data_ptr()
            launched(grid, pointer, out_pointer, part, measured, shifts, ticks, every, *numbers)
        else:
            counted = torch.zeros(1, dtype=torch.int32) if clock is None else clock
            around = sums[health.SHIFT, offset:]
            launched(grid, x, out, cells.part, cells.measured, around, counted, every, *numbers)
        if merged:
            self.merge(cells, sums, counts, offset)

    def merge(self, cells: Cells, sums: Tensor, counts: Tensor, offset: int = 0) -> None:
        """Hand the sums on to the state, and clear them."""
        for part in (cells, *cells.retired):
            key = part.exact, next_pow2(part.splits)
            merging, block = self._merges.get(key) or self._prepare_merge(*key)
            state = self._state(sums, counts, offset)
            grid = (cdiv(self.spec.seeds, block), 1, 1)
            merging(grid, part.part, part.measured, part.seen, *state, sums.stride(0), part.splits)
            part.pending = 0

    def shift(self, x: Tensor, view: View, sums: Tensor, counts: Tensor, offset: int = 0) -> None:
        """Set the shift of the seeds that have measured nothing yet, by the first rows of `x`.

        Belongs before a window's first sample: sums that the cells hold were taken around the shift of before.
        """
        if not view.rows:
            return
        shifting = self._shifts.get(None) or self._prepare_shift()
        rows = max(1, min(view.rows, HEAD // self.spec.features))
        # Of a sample's positions; of samples; of positions; of features.
        strides = (1, view.stride, 0, 1)
        if view.walk == "channels_first":
            strides = (view.inner, view.stride, 1, view.inner)
        state = self._state(sums, counts, offset)
        shifting((self.spec.seeds, 1, 1), x, *state, sums.stride(0), rows, *strides)

    def _state(self, sums: Tensor, counts: Tensor, offset: int) -> tuple[Any, Any]:
        """The state from the site's first seed on, as pointers."""
        if self.device.type == "cuda":
            return _address(sums, 0, offset), _address(counts, 0, offset)
        return sums[:, offset:], counts[:, offset:]

    def _check_written(self, x: Tensor, y: Tensor) -> None:
        if self.spec.epilogue not in WRITTEN:
            known = ", ".join(WRITTEN)
            raise UnsupportedKernelError(
                f"{self.spec.name}: {self.spec.epilogue} is not written along; {known} are"
            )
        if y.data_ptr() == x.data_ptr():
            raise UnsupportedKernelError(
                f"{self.spec.name}: act(x) can't be written over x, which may be read again"
            )

    def _prepare(
        self,
        key: tuple[object, ...],
        view: View,
        out_stride: int,
        cells: Cells,
        write: bool,
        clocked: bool,
    ) -> Pass:
        aligned = key[4] == 0
        distances = view.stride | out_stride
        if view.walk == "channels_first":
            distances |= view.inner
        else:
            distances |= self.spec.features
        unit = min(16, distances & -distances) if aligned else 1
        dense = view.walk == "last" and view.stride == out_stride == self.spec.features
        variant = Variant(unit, dense, write, clocked, cells.exact)
        made = job(self.spec, self.config_for(view.rows), variant, self.near_zero, self.target)
        planned = self.plan(view, unit, cells.splits)
        if len(self._passes) >= KEPT:
            self._passes.clear()
        rows, inner = view.rows, 1
        if view.walk == "channels_first":
            rows, inner = rows // view.inner, view.inner // unit
        found = self._passes[key] = Pass(
            self._prepared(made),
            (planned.tiles, planned.splits, 1),
            MERGE_EVERY if cells.exact else min(MERGE_EVERY, planned.samples),
            (rows, view.stride // unit, out_stride // unit, inner, planned.span),
        )
        return found

    def _prepare_merge(self, exact: bool, splits: int) -> tuple[Launch, int]:
        # As many chunks a program that all multiprocessors have some.
        block = max(4, min(32, next_pow2(cdiv(self.spec.seeds, self.processors))))
        made = merge_job(self.spec, block, splits, exact, self.near_zero, self.target)
        found = self._merges[exact, splits] = self._prepared(made), block
        return found

    def _prepare_shift(self) -> Launch:
        found = self._shifts[None] = self._prepared(shift_job(self.spec, self.near_zero, self.target))
        return found

    def _prepared(self, made: Job) -> Launch:
        return launch.prepare_job(made, self.device).launch


def target_of(device: torch.device) -> str:
    """The target of `job` that is `device`."""
    if target := launch.collected_target(device):
        return target if target.startswith("cuda") else "hip"
    if device.type != "cuda":
        return "cpu"
    if torch.version.hip:
        return "hip"
    major, minor = torch.cuda.get_device_capability(device)
    return f"cuda:{10 * major + minor}"


def _address(state: Tensor, row: int, offset: int) -> int:
    """Of a row's element in contiguous state [.., N], all of whose types have 8 bytes."""
    address: int = state.data_ptr() + 8 * (row * state.stride(0) + offset)
    return address
