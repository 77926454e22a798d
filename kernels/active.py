"""The seeds of a bank in the forward of their site: the list of those that are active, and the kernel that joins them.

    listing = ActiveList(device)
    active = listing.new(slots)
    listing(owner, lifecycle, alpha, active, blending, isolated, training)        # when a state has changed
    Forward(spec, config, device)(y, view, active, params, stash)                 # y is written in place

The forward's grid is persistent: its programs share the blocks of `config.block_rows` rows of all groups of
`config.group` listed chunks evenly, however many are listed, so nothing is read from the device to launch it.

MATH, one of its constexprs, says what is rounded to what:

    exact  float32 throughout; dots by PRECISION                                     (float32; Triton's interpreter)
    plain  dots in the activation's type, float32 between them                       (16 bits where there is no PTX)
    mixed  the first dot in the activation's type, then float16                      (16 bits)
    half   float16 throughout, sums too, but the second dot's                        (16 bits, 16 columns at most)

With `config.lanes` there are no dots: so many threads share a chunk's row, all is float32, and nothing is shared
between chunks. GELU then is exact for float32, and by the special function for tanh where activations have 16 bits.

float16 keeps three bits more than bfloat16 and its GELU costs half of float32's. It ends at 65504 (hidden values at
131008): what lies beyond makes its block's result Inf or NaN, and such a block is done again in float32, each chunk
by itself. That is also how a value that isn't finite is kept out of the chunks that share a dot with its own.
Below 2^-24, and for weights and with `half` for activations, a value counts as 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Final, Literal, Protocol

import torch
from torch import Tensor

from morphc.errors import UnsupportedKernelError
from morphc.kernels import codegen, ladder, lanes, launch
from morphc.kernels.blueprints.base import Geometry, get
from morphc.kernels.codegen import Source
from morphc.kernels.compile import Job
from morphc.kernels.layout import View
from morphc.kernels.reference.active_list import length
from morphc.kernels.reference.blends import blend_shapes
from morphc.kernels.spec import KernelSpec, TuneConfig
from morphc.kernels.templating import cdiv, next_pow2
from morphc.kernels.triton_api import Launch

WIDEST: Final = 256
DEEPEST: Final = 128
"""Largest chunk and rank that have kernels."""

BUILT_IN: Final = ("affine", "bottleneck")
"""Blueprints whose macros morphc brings itself."""

Math = Literal["exact", "plain", "mixed", "half"]
Precision = Literal["tf32x3", "tf32", "ieee"]

ONCE: Final = 8
"""Programs a multiprocessor up to which each takes one block of one group, if all slots have theirs."""

LIST_OWN: Final = 16
LIST_BLOCK: Final = 512

_LIST_SIGNATURE: Final = {
    "owner_ptr": "*i64",
    "lifecycle_ptr": "*i32",
    "alpha_ptr": "*fp32",
    "list_ptr": "*i32",
    "slots": "i32",
    "seeds": "i32",
    "blending": "i32",
    "isolated": "i32",
    "training": "i32",
}


def params_of(spec: KernelSpec) -> tuple[str, ...]:
    """Names of the bank's parameters, in its order."""
    geometry = Geometry(spec.features, spec.chunk, spec.rank, tap_features=spec.features)
    return (*get(spec.blueprint).shapes(geometry), *blend_shapes(spec.blend, spec.chunk))


def refuses(spec: KernelSpec) -> str:
    """Why no kernel is made for `spec`, or an empty string."""
    blueprint = get(spec.blueprint)
    if blueprint.tap != "chunk":
        return f"blueprint {blueprint.name!r} reads the {blueprint.tap}'s input"
    if blueprint.arrangement != "rows":
        return f"blueprint {blueprint.name!r} looks at a position's neighbours"
    if blueprint.template is None and blueprint.name not in BUILT_IN:
        return f"blueprint {blueprint.name!r} has no kernel template"
    if spec.dtype not in ("float32", "bfloat16", "float16"):
        return f"no kernel reads {spec.dtype}"
    if spec.chunk > WIDEST:
        return (
            f"chunks of {spec.chunk} features are wider than the {WIDEST} that a tile holds; use more seeds"
        )
    if spec.rank > DEEPEST:
        return f"rank {spec.rank} is above the {DEEPEST} that a tile holds"
    return ""


@lru_cache(maxsize=256)
def source(spec: KernelSpec) -> Source:
    """The forward's file. Raises UnsupportedKernelError for a spec that `refuses` names a reason for."""
    if reason := refuses(spec):
        raise UnsupportedKernelError(f"{spec.name}: {reason}")
    return codegen.render("forward.py.jinja", spec, params=params_of(spec), lanes=lanes.has(spec))


def math_of(spec: KernelSpec, group: int, target: str) -> Math:
    """The MATH for a target: `cuda:90`, `hip:gfx942`, or `cpu` for the interpreter."""
    if spec.dtype == "float32" or target == "cpu":
        return "exact"
    if not target.startswith("cuda"):
        return "plain"
    return "half" if group * next_pow2(spec.chunk) <= 16 else "mixed"


def forward_job(
    spec: KernelSpec,
    config: TuneConfig,
    *,
    once: bool = False,
    stash: bool = False,
    even: bool = False,
    early: bool = False,
    aligned: bool = True,
    precision: Precision = "tf32x3",
    target: str = "cuda:90",
) -> Job:
    """The forward as `compile_all` and `launch.prepare` take it.

    once: the form for few rows. stash: the original columns are saved. even: no block of rows is cut short. early:
    it is launched before the kernel ahead of it has ended, and waits for that itself. aligned: all pointers and
    strides are divisible by 16. precision: of float32 dots.
    """
    item = f"*{launch.triton_type(getattr(torch, spec.dtype))}"
    params = {f"{name}_ptr": "*fp32" for name in params_of(spec)}
    numbers = {"rows": "i32", "stride": "i32", "inner": "i32"}
    pointers = {"x_ptr": item, "list_ptr": "*i32", "stash_ptr": item, **params}
    constants = {
        "ROWS": config.block_rows,
        "GROUP": config.group,
        "STAGES": config.num_stages,
        "STASH": int(stash),
        "MATH": math_of(spec, config.group, target),
        "PRECISION": _dot_precision(spec, precision, target),
        "EVEN": int(even),
        "EARLY": int(early),
    }
    entry = "forward_once" if once else "forward"
    if config.lanes:
        entry = "forward_by_lane"
        fast = target.startswith("cuda") and spec.dtype != "float32"
        constants |= {"SIDE": lanes.side(config), "LANES": config.lanes, "FAST": int(fast), "ONCE": int(once)}
    inner = ["inner"] if spec.layout == "channels_first" else []
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    if target.startswith("cuda"):
        # Left alone, ptxas spills some registers to fit one more warp into a multiprocessor.
        options["maxnreg"] = config.maxnreg or (255 if spec.dtype == "float32" else 168)
    return Job(
        source(spec),
        entry,
        pointers | numbers,
        constants,
        [*pointers, "stride", *inner] if aligned else [],
        options,
        target,
    )


def _dot_precision(spec: KernelSpec, precision: Precision, target: str) -> Precision:
    """Of float32 dots. Where activations have 16 bits, those are only in blocks that are done again."""
    if target.startswith("hip"):
        return "ieee"
    return precision if spec.dtype == "float32" else "tf32"


def stash_shape(spec: KernelSpec, view: View) -> tuple[int, int, int]:
    """Shape of the saved chunks of a bank, [K, rows, C], or [K, C, rows] where the activation is channels-first."""
    if view.walk == "channels_first":
        return spec.slots, spec.chunk, view.rows
    return spec.slots, view.rows, spec.chunk


class Bound(Protocol):
    """A forward of activations that are all walked alike; see `Forward`."""

    def __call__(
        self, x: Tensor, active: Tensor, params: Sequence[Tensor], stash: Tensor | None, early: bool = False
    ) -> None: ...


class Forward:
    """The forward of one spec with one config on one device; its variants are compiled when first called for.

    behind: configs to go on to where one spills.
    """

    __slots__ = ("behind", "config", "device", "precision", "processors", "spec", "variants")

    def __init__(
        self,
        spec: KernelSpec,
        config: TuneConfig,
        device: torch.device,
        precision: Precision = "tf32x3",
        behind: Sequence[TuneConfig] = (),
    ) -> None:
        self.spec = spec
        self.config = config
        self.behind = behind
        self.device = device
        self.precision = precision
        self.processors = launch.multiprocessors(device)
        self.variants: dict[tuple[bool, bool, bool, bool, bool], tuple[Launch, int]] = {}
        source(spec)

    def __call__(
        self,
        x: Tensor,
        view: View,
        active: Tensor,
        params: Sequence[Tensor],
        stash: Tensor | None = None,
        *,
        early: bool = False,
    ) -> None:
        """Join the listed seeds to `x`, in place.

        view: how x is walked. active: the list. params: the bank's, float32 [K, ...], contiguous, in its order.
        stash: where the original columns of all listed chunks go, see `stash_shape`. early: the launch before this
        one on the stream only reads x, and began when all before it had ended; this one starts during it, and
        waits for its end before it writes to x.
        """
        if view.rows:
            self.bound(view)(x, active, params, stash, early)

    def bound(self, view: View) -> Bound:
        """The same for activations that are all walked as `view`: what follows from that is found once."""
        blocks, even = self.blocks(view)
        groups = cdiv(self.spec.slots, self.config.group)
        once = groups * blocks <= ONCE * self.processors
        bits = view.stride | (view.inner if view.walk == "channels_first" else 0)
        numbers = view.rows, view.stride, view.inner
        variants, on_gpu, divisible = self.variants, self.device.type == "cuda", bits % 16 == 0
        known: dict[tuple[bool, bool, bool], tuple[Launch, tuple[int, int, int]]] = {}
        renewed: Bound | None = None

        def call(
            x: Tensor, active: Tensor, params: Sequence[Tensor], stash: Tensor | None, early: bool = False
        ) -> None:
            nonlocal renewed
            if renewed is not None:
                renewed(x, active, params, stash, early)
                return
            saved = x if stash is None else stash
            pointers = [x.data_ptr(), active.data_ptr(), saved.data_ptr(), *launch.pointers_of(params)]
            bits = 0
            for pointer in pointers:
                bits |= pointer
            short = (stash is None, early, bits & 15 == 0)
            ready = known.get(short)
            if ready is None:
                key = (once, stash is not None, even, early, divisible and not bits & 15)
                found = variants.get(key)
                if found is None and self.variants is variants:
                    found = self._prepare(key)
                if found is None:
                    # What is known of the config that spilled is of no use for the next one.
                    renewed = self.bound(view)
                    renewed(x, active, params, stash, early)
                    return
                launched, most = found
                ready = launched, ((groups, blocks, 1) if once else (min(most, groups * blocks), 1, 1))
                known[short] = ready
            launched, grid = ready
            launched(grid, *(pointers if on_gpu else (x, active, saved, *params)), *numbers)

        return call

    def blocks(self, view: View) -> tuple[int, bool]:
        """Blocks of rows in all, and whether none is cut short."""
        height = self.config.block_rows
        if view.walk == "channels_first":
            return view.rows // view.inner * cdiv(view.inner, height), view.inner % height == 0
        return cdiv(view.rows, height), view.rows % height == 0

    def _prepare(self, key: tuple[bool, bool, bool, bool, bool]) -> tuple[Launch, int] | None:
        """The kernel of a variant, and its programs: no more than run at once, since all are to walk together.

        None where it spilled, and another config has been taken instead.
        """
        once, stash, even, early, aligned = key

        def prepare(config: TuneConfig) -> launch.Prepared:
            job = forward_job(
                self.spec,
                config,
                once=once,
                stash=stash,
                even=even,
                early=early,
                aligned=aligned,
                precision=self.precision,
                target=target_of(self.device),
            )
            return launch.prepare_job(job, self.device, pdl=early)

        config, prepared = ladder.first_clean(self.config, self.behind, prepare)
        if config != self.config:
            self.behind = self.behind[self.behind.index(config) + 1 :]
            self.config, self.variants = config, {}
            return None
        at_once = resident(prepared, self.config.num_warps)
        programs = min(self.config.programs or at_once, at_once) * self.processors
        self.variants[key] = prepared.launch, programs
        return self.variants[key]


def resident(prepared: launch.Prepared, num_warps: int) -> int:
    """Programs that a multiprocessor (CUDA, capability 8 on) holds at once."""
    if not prepared.registers:
        return 32
    # Each of the four quarters has 16384 registers, handed out to warps in eights a thread, and room for 16 warps.
    warps = 4 * min(16, 16384 // (32 * cdiv(prepared.registers, 8) * 8))
    memory = (228 << 10) // (prepared.shared + 1024)
    return max(1, min(warps // num_warps, memory, 32))


def target_of(device: torch.device) -> str:
    """What kernels for `device` are compiled for, as far as their source depends on it."""
    if target := launch.collected_target(device):
        return target.partition(":")[0]
    if device.type != "cuda":
        return "cpu"
    return "hip" if torch.version.hip else "cuda"


@lru_cache(maxsize=1)
def list_source() -> Source:
    """The file of `active_list`; the same for every bank."""
    spec = KernelSpec(
        kind="active_list",
        features=0,
        seeds=0,
        chunk=0,
        slots=0,
        rank=0,
        blueprint="",
        blend="",
        epilogue=None,
        layout="last",
        dtype="int32",
    )
    return codegen.render("active_list.py.jinja", spec)


def list_job(target: str = "cuda:90") -> Job:
    """The list's kernel as `compile_all` takes it."""
    constants = {"OWN": LIST_OWN, "BLOCK": LIST_BLOCK}
    # The compiler for AMD spills with four.
    warps = 8 if target.startswith("hip") else 4
    return Job(
        list_source(), "active_list", _LIST_SIGNATURE, constants, options={"num_warps": warps}, target=target
    )


class ActiveList:
    """Makes lists of active seeds on one device."""

    __slots__ = ("device", "prepared")

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.prepared = launch.prepare_job(list_job(target_of(device)), device)

    def new(self, slots: int) -> Tensor:
        """An empty list for a bank: nothing is active."""
        return torch.zeros(length(slots), dtype=torch.int32, device=self.device)

    def __call__(
        self,
        owner: Tensor,
        lifecycle: Tensor,
        alpha: Tensor,
        active: Tensor,
        blending: int,
        isolated: int,
        training: int,
    ) -> None:
        """Fill `active`. owner: [K] int64; lifecycle [S] int32, alpha [S] float32; then sets of states as bits."""
        slots = owner.shape[0]
        grid = (cdiv(slots, LIST_OWN), 1, 1)
        self.prepared(
            grid, owner, lifecycle, alpha, active, slots, lifecycle.shape[0], blending, isolated, training
        )
