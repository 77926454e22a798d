"""The seeds of a bank in the backward of their site: what the gradient of an activation becomes, and the slots' own.

    backward = Backward(spec, config, device)
    dx = dy.clone()        # or empty_like(dy), and copied=False, where `backward.copies`; or dy, which then becomes dx
    backward(dy, view, dx, view, active, params, stash, gradient, copied=True)
    in_weight_gradient = sections(spec, gradient)["in_weight"]

Two launches. `backward` writes the columns of blending chunks into dx and, for slots that train, sums over ranges
of rows; its grid is fixed, and its programs share the blocks of `config.block_rows` rows of all groups of
`config.group` listed chunks evenly, so nothing is read from the device to launch it. `reduce` adds the sums up in a
fixed order into one flat buffer: parameter after parameter, each [K, ...], zeros for slots that don't train. So two
runs agree bit for bit.

An Inf or NaN stays in its own chunk's rows of dx, and in its own slot's gradients. Several chunks may share a product,
where 0 * Inf would carry it over: a group whose sums are not all finite is walked again, each chunk alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Final, NamedTuple, Protocol

import torch
from torch import Tensor

from morphc.errors import UnsupportedKernelError
from morphc.kernels import codegen, ladder, lanes, launch, tuning
from morphc.kernels.active import DEEPEST, WIDEST, Precision, target_of
from morphc.kernels.blueprints.base import Geometry, get
from morphc.kernels.codegen import Source
from morphc.kernels.compile import Job
from morphc.kernels.layout import View
from morphc.kernels.reference.blends import blend_shapes
from morphc.kernels.spec import KernelSpec, TuneConfig
from morphc.kernels.templating import cdiv, next_pow2
from morphc.kernels.triton_api import Launch

BLUEPRINTS: Final = ("affine", "bottleneck")
"""Blueprints whose gradients have kernels."""

CROWDED: Final = 128
"""Features of a chunk up to which every blend's gradients fit a thread's registers, whatever the rank."""

PARTS: Final = 64
BLOCKS: Final = 16
"""A group is cut into so many ranges of rows, and into more where these would have more than so many blocks, unless a
config says otherwise: there are few groups where only a few of a tall activation's chunks are listed."""

LANE_PARTS: Final = 128
LANE_BLOCKS: Final = 8
"""The same for blocks that take no matrix products, which are lower."""

MOST_PLANS: Final = 64
"""Activations of which is remembered what follows from their memory."""

REDUCE_FLOATS: Final = 256
REDUCE_DEPTH: Final = 8
REDUCE_WARPS: Final = 4
REDUCE_DEEP: Final = (16, 256, 8)
"""Floats, depth and warps of a program that adds up many sums of few slots."""

COPY_BYTES: Final = 256
"""Bytes that each thread of a program that copies has on their way."""

_ITEM: Final = {"float32": 4, "bfloat16": 2, "float16": 2}


class Param(NamedTuple):
    """A parameter in a slot's gradient: `size` floats from `start` on."""

    name: str
    size: int
    start: int


class Tile(NamedTuple):
    """What one program works on at a time: the constexprs of that name."""

    rows: int
    columns: int
    units: int
    group: int
    pieces: int
    units_first: bool
    dense: bool
    lanes: int = 0

    @property
    def keeps(self) -> bool:
        """Whether what is overwritten may have to be walked over again."""
        return self.group > 1 and not self.lanes

    @property
    def constants(self) -> dict[str, Any]:
        """Of the walk over a group."""
        return {
            "ROWS": self.rows,
            "COLUMNS": self.columns,
            "UNITS": self.units,
            "GROUP": self.group,
            "PIECES": self.pieces,
            "UNITS_FIRST": int(self.units_first),
        }


def refuses(spec: KernelSpec) -> str:
    """Why there are no kernels for the gradients of `spec`, or an empty string."""
    if spec.blueprint not in BLUEPRINTS:
        return f"blueprint {spec.blueprint!r} has no kernel for its gradients"
    if spec.dtype not in _ITEM:
        return f"no kernel reads {spec.dtype}"
    if spec.chunk > WIDEST:
        return (
            f"chunks of {spec.chunk} features are wider than the {WIDEST} that a tile holds; use more seeds"
        )
    if spec.rank > DEEPEST:
        return f"rank {spec.rank} is above the {DEEPEST} that a tile holds"
    if spec.blueprint == "bottleneck" and spec.chunk > CROWDED:
        full, deep = spec.dtype == "float32", spec.rank > 16
        if (spec.blend == "gate" and (full or deep)) or (spec.blend == "multiply" and full and deep):
            return (
                f"gradients of blend {spec.blend!r} with rank {spec.rank} over chunks of {spec.chunk} features in "
                f"{spec.dtype} take more registers than a thread has; use more seeds, for chunks of {CROWDED} at most"
            )
    return ""


@lru_cache(maxsize=256)
def shapes(spec: KernelSpec) -> Mapping[str, tuple[int, ...]]:
    """Shape of each parameter of one slot, in the bank's order."""
    geometry = Geometry(spec.features, spec.chunk, spec.rank, tap_features=spec.features)
    return get(spec.blueprint).shapes(geometry) | blend_shapes(spec.blend, spec.chunk)


@lru_cache(maxsize=256)
def params_of(spec: KernelSpec) -> tuple[Param, ...]:
    """The parameters in a slot's gradient, one behind the other."""
    found, start = [], 0
    for name, shape in shapes(spec).items():
        size = int(torch.Size(shape).numel())
        found.append(Param(name, size, start))
        start += size
    return tuple(found)


@lru_cache(maxsize=256)
def gradient_size(spec: KernelSpec) -> int:
    """Floats in one slot's gradient."""
    return params_of(spec)[-1].start + params_of(spec)[-1].size


def sections(spec: KernelSpec, gradient: Tensor) -> dict[str, Tensor]:
    """The gradient of every parameter [K, ...] as a view of the flat buffer [K * gradient_size]."""
    return {
        param.name: gradient[spec.slots * param.start : spec.slots * (param.start + param.size)].view(
            spec.slots, *shapes(spec)[param.name]
        )
        for param in params_of(spec)
    }


def row_size(spec: KernelSpec, extra: int = 0) -> int:
    """Floats in a row of partial sums: a slot's gradient and `extra`, up to whole 16 bytes."""
    return cdiv(gradient_size(spec) + extra, 4) * 4


def regular(spec: KernelSpec) -> bool:
    """Whether all chunks are equally wide, and that width a power of two."""
    return spec.features == spec.chunk * spec.seeds and spec.chunk == next_pow2(spec.chunk)


@lru_cache(maxsize=256)
def source(spec: KernelSpec, interpreted: bool) -> Source:
    """The file of `backward` and `reduce`. Raises UnsupportedKernelError where `refuses` names a reason."""
    if reason := refuses(spec):
        raise UnsupportedKernelError(f"{spec.name}: {reason}")
    return codegen.render(
        "backward.py.jinja",
        spec,
        params=params_of(spec),
        per_slot=row_size(spec),
        dense_columns=16 // _ITEM[spec.dtype] if _may_be_dense(spec) else 0,
        copies=copies(spec),
        lanes=lanes.has(spec),
        interpreted=interpreted,
    )


def copies(spec: KernelSpec) -> bool:
    """Whether the backward can make the copy of dy itself, around the chunks it overwrites: where these are whole
    memory sectors, which nobody else then writes a part of.
    """
    return spec.layout != "channels_first" and regular(spec) and spec.chunk * _ITEM[spec.dtype] >= 32


def _may_be_dense(spec: KernelSpec) -> bool:
    """Whether chunks are so small that reading a run of them at once pays."""
    return regular(spec) and spec.layout != "channels_first" and spec.chunk * _ITEM[spec.dtype] < 8


@lru_cache(maxsize=1024)
def tile_of(spec: KernelSpec, config: TuneConfig) -> Tile:
    """What `config` makes of `spec`. A dot needs 16 columns and 16 units."""
    pad, deep = next_pow2(spec.chunk), next_pow2(spec.rank)
    if spec.blueprint != "bottleneck":
        return Tile(config.block_rows, config.group * pad, 1, config.group, config.pieces or 1, False, False)
    group = config.group
    if config.lanes:
        units = max(1, deep // config.lanes)
        return Tile(config.block_rows, group * config.lanes, units, group, 1, False, False, config.lanes)
    columns = max(16, group * pad)
    units = max(deep, cdiv(16, group))
    if group == 1:
        # Both weight gradients stay in registers: at most 64 floats of a thread's 255, fewer beside a wide tile.
        most = 16 if columns > 128 else max(16, 1024 * config.num_warps // columns)
        units = min(units, config.units or most)
    # A piece is as wide as a dot takes it at least.
    pieces = min(config.pieces or 1, columns // 16) if group == 1 else 1
    rows = max(16, config.block_rows)
    dense = _may_be_dense(spec) and group * spec.chunk == columns
    # Hopper's tensor cores take float32 only as it lies in memory, which across it doesn't.
    units_first = spec.dtype != "float32" and group * units >= 64 and pieces == 1
    return Tile(rows, columns, units, group, pieces, units_first, dense)


def default(spec: KernelSpec, rows: int) -> TuneConfig:
    """A config that spills on no target, where none was tuned."""
    if (by_lane := lanes.usual(spec, rows)) is not None:
        return by_lane
    pad = next_pow2(spec.chunk)
    if spec.blueprint != "bottleneck":
        return TuneConfig(16, max(64, pad), 4, 1, group=max(1, 64 // pad), programs=4)
    wide, bent = spec.dtype == "float32", spec.blend in ("multiply", "gate")
    if not wide and not bent and next_pow2(spec.rank) <= 16:
        # What won on an H200, where little stands in registers; dense: most seeds are active.
        dense, even = 2 * spec.slots > spec.seeds, spec.features == pad * spec.seeds
        if pad == 64 and dense and even:
            return TuneConfig(64, 64, 4, 3, programs=4)
        if pad == 16 and dense and even:
            return TuneConfig(128, 16, 4, 3, programs=8)
        if pad == 16:
            return TuneConfig(64, 16, 2, 3, programs=8)
        if pad < 16:
            group = tuning.spread(spec, rows, min(4, 16 // pad), 32, dense)
            if (dense and even) or pad == 1 or next_pow2(spec.rank) <= 8 or group < min(4, 16 // pad):
                return TuneConfig(32, group * pad, 2, 3, group=group, programs=8)
    if wide and not bent and next_pow2(spec.rank) <= 16 and pad <= 64:
        height, programs = (16, 4) if pad == 64 else (32, 8 if pad < 16 else 4)
        return TuneConfig(height, pad, 2, 3, programs=programs)
    if pad >= 64:
        warps = 4 if pad == 64 and not bent else 8
        pieces = 8 if wide and pad > 64 else 1
        return TuneConfig(16 if wide else 32, pad, warps, 3, programs=2, pieces=pieces)
    if wide or pad >= 16:
        return TuneConfig(32, max(16, pad), 4, 3, programs=2)
    group = max(1, min((32 if bent else 64) // next_pow2(spec.rank), 16 // pad))
    return TuneConfig(32, max(16, group * pad), 4, 3, group=group, programs=2)


def blocks_of(spec: KernelSpec, view: View, rows: int) -> tuple[bool, int]:
    """Whether no block of `rows` is cut short, and how many blocks there are."""
    if view.walk == "channels_first":
        return view.inner % rows == 0, view.rows // view.inner * cdiv(view.inner, rows)
    return view.rows % rows == 0, cdiv(view.rows, rows)


def common_power(*numbers: int) -> int:
    """The largest power of two up to 16 that divides all."""
    together = 16
    for number in numbers:
        together |= number
    return together & -together


def is_wide(tile: Tile, spec: KernelSpec, view: View, blocks: int) -> bool:
    """Whether 31 bits don't count the elements of a group's saved chunks, or all blocks of all groups."""
    elements = tile.group * next_pow2(spec.chunk) * view.rows
    return max(elements, cdiv(spec.slots, tile.group) * blocks) >= 2**31


class Plan(NamedTuple):
    """What follows from how an activation is walked, and whether its gradient is copied."""

    even: bool
    wide: bool
    deep: bool
    least: int
    programs: int
    partial: int
    grid: tuple[int, int, int]


class Variant(NamedTuple):
    """What a launch depends on that isn't known before the call."""

    even: bool
    stride: int
    wide: bool
    aligned: bool
    copied: bool
    early: bool


def backward_job(
    spec: KernelSpec,
    config: TuneConfig,
    variant: Variant | None = None,
    *,
    precision: Precision = "tf32x3",
    target: str = "cuda:90",
) -> Job:
    """`backward` as `compile_all` and `launch.prepare` take it. target: `cpu` for the interpreter."""
    variant = variant or Variant(False, 16, False, True, True, False)
    item = f"*{launch.triton_type(getattr(torch, spec.dtype))}"
    tile = tile_of(spec, config)
    pointers = {"dy_ptr": item, "dx_ptr": item, "stash_ptr": item, "list_ptr": "*i32"}
    pointers |= {f"{param.name}_ptr": "*fp32" for param in params_of(spec)} | {"partial_ptr": "*fp32"}
    numbers = ("rows", "dy_stride", "dx_stride", "inner", "least")
    wide = max(spec.chunk, 512)
    constants = tile.constants | {
        "DENSE": int(tile.dense),
        "EVEN": int(variant.even),
        "STRIDE": variant.stride,
        "WIDE": int(variant.wide),
        "IN_PLACE": int(variant.copied),
        "COPY_ROWS": max(1, 32 * config.num_warps * COPY_BYTES // (wide * _ITEM[spec.dtype])),
        "COPY_COLUMNS": wide,
        "FAST": int(target.startswith("cuda") and spec.dtype != "float32"),
        "PRECISION": precision_of(spec, precision, target),
        "EARLY": int(variant.early),
    }
    if lanes.has(spec):
        constants |= {"LANES": tile.lanes, "SIDE": lanes.side(config)}
    return Job(
        source(spec, target == "cpu"),
        "backward",
        pointers | dict.fromkeys(numbers, "i32"),
        constants,
        list(pointers) if variant.aligned else [],
        options_of(config, target),
        target,
    )


def precision_of(spec: KernelSpec, precision: Precision, target: str) -> str:
    """How dots multiply float32."""
    if spec.dtype != "float32":
        return "tf32"
    return precision if target.startswith("cuda") else "ieee"


def options_of(config: TuneConfig, target: str) -> dict[str, Any]:
    """Triton's own part of a config."""
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    if config.maxnreg is not None and target.startswith("cuda"):
        options["maxnreg"] = config.maxnreg
    return options


def reduce_job(
    spec: KernelSpec,
    config: TuneConfig,
    *,
    wide: bool = False,
    copied: bool = True,
    add: bool = False,
    early: bool = False,
    deep: bool = False,
    target: str = "cuda:90",
) -> Job:
    """`reduce` as `compile_all` and `launch.prepare` take it. deep: there are many sums to add up for each slot."""
    floats, positions = reduce_block(spec, deep)
    tile = tile_of(spec, config)
    pointers = {"partial_ptr": "*fp32", "gradient_ptr": "*fp32", "list_ptr": "*i32"}
    constants = {
        "ROWS": tile.rows,
        "GROUP": tile.group,
        "WIDE": int(wide),
        "IN_PLACE": int(copied),
        "DEPTH": REDUCE_DEEP[1] if deep else REDUCE_DEPTH,
        "POSITIONS": positions,
        "FLOATS": floats,
        "ADD": int(add),
        "EARLY": int(early),
    }
    numbers = dict.fromkeys(("rows", "inner", "programs", "least"), "i32")
    return Job(
        source(spec, target == "cpu"),
        "reduce",
        pointers | numbers,
        constants,
        (),
        {"num_warps": REDUCE_DEEP[2] if deep else REDUCE_WARPS},
        target,
    )


def least_of(config: TuneConfig, blocks: int) -> int:
    """Blocks of a group that a program does at least."""
    if config.splits:
        return cdiv(blocks, config.splits)
    parts, most = (LANE_PARTS, LANE_BLOCKS) if config.lanes else (PARTS, BLOCKS)
    return min(cdiv(blocks, parts), most)


def reduce_block(spec: KernelSpec, deep: bool) -> tuple[int, int]:
    """Floats of a slot's gradient, and positions of the list, that one program of `reduce` adds up."""
    if deep:
        return REDUCE_DEEP[0], 1
    floats = min(REDUCE_FLOATS, next_pow2(gradient_size(spec)))
    return floats, REDUCE_FLOATS // floats


class Bound(Protocol):
    """A backward of activations that are all walked alike, in place; see `Backward`."""

    def __call__(self, dy: Tensor, active: Tensor, stash: Tensor, gradient: Tensor) -> None: ...


class Backward:
    """The backward of one spec with one config on one device; its variants are compiled when first called for.

    copies: whether a call with `copied=False` can be made. behind: configs to go on to where one spills.
    """

    __slots__ = (
        "behind",
        "config",
        "copies",
        "device",
        "plans",
        "precision",
        "programs",
        "reducers",
        "spec",
        "tile",
        "variants",
    )

    def __init__(
        self,
        spec: KernelSpec,
        config: TuneConfig | None,
        device: torch.device,
        precision: Precision = "tf32x3",
        behind: Sequence[TuneConfig] = (),
    ) -> None:
        self.spec = spec
        self.device = device
        self.precision = precision
        self.behind = behind
        self.copies = copies(spec)
        self._take(config or default(spec, 1))
        source(spec, device.type == "cpu")

    def _take(self, config: TuneConfig) -> None:
        """Go by `config` from now on."""
        self.config = config
        self.tile = tile_of(self.spec, config)
        self.programs = launch.multiprocessors(self.device) * max(1, config.programs)
        self.variants: dict[Variant, launch.Prepared] = {}
        self.reducers: dict[tuple[bool, bool, bool, bool], launch.Prepared] = {}
        self.plans: dict[tuple[View, bool], Plan] = {}

    def __call__(
        self,
        dy: Tensor,
        dy_view: View,
        dx: Tensor | None,
        dx_view: View | None,
        active: Tensor,
        params: Sequence[Tensor],
        stash: Tensor,
        gradient: Tensor | None,
        *,
        copied: bool = True,
        add: bool = False,
        early: bool = False,
    ) -> None:
        """Gradients through the listed seeds.

        dy: gradient of the site's value; only read. dx: holds a copy of dy, and may be dy itself, which then becomes
        it; with `copied=False` it holds nothing yet; None where no seed blends. active: the list. params: the bank's,
        float32 [K, ...], contiguous, in its order. stash: what the forward saved. gradient: flat,
        [K * gradient_size] float32; None where no slot trains.
        add: to what is in it. early: the launch before this one is one of morphc's own that waits by itself.
        """
        if not dy_view.rows:
            if gradient is not None and not add:
                gradient.zero_()
            return
        given = dx, dx_view, copied
        # Programs that have nothing to compute can still copy.
        copies = dx is not None and not copied
        plan = self.plans.get((dy_view, copies)) or self._plan(dy_view, copies)
        read = dy
        if dx is None or dx_view is None:
            dx, dx_view, copied = dy, dy_view, True
        elif copied:
            # It reads dx alone, and keeps there what it may have to walk over again.
            read = torch.empty(stash.shape, dtype=dy.dtype, device=self.device) if self.tile.keeps else dx
            dy_view = dx_view
        partial = torch.empty(plan.partial, dtype=torch.float32, device=self.device)
        front = (read, dx, stash, active)
        pointers = [*[tensor.data_ptr() for tensor in front], *launch.pointers_of(params), partial.data_ptr()]
        bits = 0
        for pointer in pointers:
            bits |= pointer
        inner = dy_view.inner if self.spec.layout == "channels_first" else 0
        stride = common_power(dy_view.stride, dx_view.stride, inner)
        variant = Variant(plan.even, stride, plan.wide, bits % 16 == 0, copied, early)
        prepared = self.variants.get(variant) or self._prepare(variant)
        if prepared is None:
            dx, dx_view, copied = given
            self(
                dy, dy_view, dx, dx_view, active, params, stash, gradient, copied=copied, add=add, early=early
            )
            return
        passed = pointers if self.device.type == "cuda" else (*front, *params, partial)
        strides = dy_view.stride, dx_view.stride
        prepared.launch((plan.programs, 1, 1), *passed, dy_view.rows, *strides, dy_view.inner, plan.least)
        if gradient is None:
            return
        key = plan.wide, copied, add, plan.deep
        reducer = self.reducers.get(key) or self._prepare_reduce(*key)
        last = dy_view.rows, dy_view.inner, plan.programs, plan.least
        if self.device.type == "cuda":
            reducer.launch(plan.grid, pointers[-1], gradient.data_ptr(), pointers[3], *last)
        else:
            reducer.launch(plan.grid, partial, gradient, active, *last)

    def bound(self, view: View, params: launch.Resident) -> Bound:
        """The same for activations that are all walked as `view`, in place, of the bank that has `params`."""
        plan = self.plans.get((view, False)) or self._plan(view, False)
        config, on_gpu, grid, keeps = self.config, self.device.type == "cuda", plan.grid, self.tile.keeps
        stride = common_power(view.stride, view.inner if self.spec.layout == "channels_first" else 0)
        programs = (plan.programs, 1, 1)
        numbers = view.rows, view.stride, view.stride, view.inner, plan.least
        last = view.rows, view.inner, plan.programs, plan.least
        room = torch.empty(0, dtype=torch.float32, device=self.device)
        fixed, bits_of_fixed = params.pointers, 0
        for pointer in fixed:
            bits_of_fixed |= pointer
        known: dict[bool, tuple[Launch, Launch]] = {}

        def call(dy: Tensor, active: Tensor, stash: Tensor, gradient: Tensor) -> None:
            if self.config is not config:  # it has spilled, and what follows from it holds no longer
                self(dy, view, dy, view, active, params, stash, gradient)
                return
            read = torch.empty_like(stash) if keeps else dy
            partial = room.new_empty(plan.partial)
            front = (read.data_ptr(), dy.data_ptr(), stash.data_ptr(), active.data_ptr())
            sums = partial.data_ptr()
            aligned = not (front[0] | front[1] | front[2] | front[3] | sums | bits_of_fixed) & 15
            found = known.get(aligned)
            if found is None:
                variant = Variant(plan.even, stride, plan.wide, aligned, True, False)
                prepared = self.variants.get(variant) or self._prepare(variant)
                if prepared is None:
                    self(dy, view, dy, view, active, params, stash, gradient)
                    return
                key = plan.wide, True, False, plan.deep
                reducer = self.reducers.get(key) or self._prepare_reduce(*key)
                found = known[aligned] = prepared.launch, reducer.launch
            walk, reduce = found
            if on_gpu:
                walk(programs, *front, *fixed, sums, *numbers)
                reduce(grid, sums, gradient.data_ptr(), front[3], *last)
            else:
                walk(programs, read, dy, stash, active, *params, partial, *numbers)
                reduce(grid, partial, gradient, active, *last)

        return call

    def _plan(self, view: View, copies: bool) -> Plan:
        even, blocks = blocks_of(self.spec, view, self.tile.rows)
        least = least_of(self.config, blocks)
        groups = cdiv(self.spec.slots, self.tile.group)
        programs = self.programs if copies else min(self.programs, blocks * groups)
        # A row of partial sums for every program, and one more whenever it goes on to another group.
        partial = (programs + groups) * self.tile.group * row_size(self.spec)
        wide = is_wide(self.tile, self.spec, view, blocks)
        if len(self.plans) >= MOST_PLANS:
            self.plans.clear()
        deep = min(programs, cdiv(blocks, least)) > 2 * PARTS
        floats, positions = reduce_block(self.spec, deep)
        grid = (cdiv(gradient_size(self.spec), floats), cdiv(self.spec.slots, positions), 1)
        plan = self.plans[view, copies] = Plan(even, wide, deep, least, programs, partial, grid)
        return plan

    def _prepare(self, variant: Variant) -> launch.Prepared | None:
        """The kernel of a variant; None where it spilled, and another config has been taken instead."""
        target = target_of(self.device)

        def prepare(config: TuneConfig) -> launch.Prepared:
            job = backward_job(self.spec, config, variant, precision=self.precision, target=target)
            return launch.prepare_job(job, self.device, pdl=variant.early)

        config, prepared = ladder.first_clean(self.config, self.behind, prepare)
        if config != self.config:
            self.behind = self.behind[self.behind.index(config) + 1 :]
            self._take(config)
            return None
        self.variants[variant] = prepared
        return prepared

    def _prepare_reduce(self, wide: bool, copied: bool, add: bool, deep: bool) -> launch.Prepared:
        job = reduce_job(
            self.spec,
            self.config,
            wide=wide,
            copied=copied,
            add=add,
            early=follows_early(self.device),
            deep=deep,
            target=target_of(self.device),
        )
        self.reducers[wide, copied, add, deep] = launch.prepare_job(
            job, self.device, pdl=bool(job.constants["EARLY"])
        )
        return self.reducers[wide, copied, add, deep]


def follows_early(device: torch.device) -> bool:
    """Whether a kernel can be launched there before the one ahead of it has ended."""
    if target_of(device) != "cuda":
        return False
    if target := launch.collected_target(device):
        return int(target.partition(":")[2]) >= 90
    return torch.cuda.get_device_capability(device)[0] >= 9
