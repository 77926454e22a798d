"""Blueprints with a layer or block tap (`lowrank`, `widen`) behind linear layers, on kernels.

    seeds = TapSeeds(spec, geometry, device)
    z, packed = seeds.project(tap, active, params)                       # for all listed slots
    seeds.join(y, view, active, params, z, stash)                        # y is written in place
    ...
    dz, dx, gradients = seeds.backward(dy, view, active, params, z, stash)
    seeds.weight_gradients(tap, dz, active, gradients)                   # those of the in-projections
    d_tap = seeds.tap_gradient(dz, active, params, packed)               # for the slots that blend

z = tap W_in + b is one product for all listed slots (morphc.kernels.tap); from z on it is the forward that chunk
taps have too, with s = act(z) W_out. A seed that is only isolated needs `project` and the backward, nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from math import gcd
from typing import Any, Final

import msgspec
import torch
from torch import Tensor

from morphc.errors import UnsupportedKernelError
from morphc.kernels import active as chunks
from morphc.kernels import codegen, launch
from morphc.kernels.active import Precision
from morphc.kernels.blueprints.base import Geometry, get
from morphc.kernels.blueprints.lowrank import LowRank
from morphc.kernels.blueprints.widen import Widen
from morphc.kernels.codegen import Source
from morphc.kernels.compile import SHARED_LIMITS, Job
from morphc.kernels.gradient import options_of, precision_of
from morphc.kernels.layout import View
from morphc.kernels.reference.activations import ACTIVATIONS
from morphc.kernels.reference.blends import blend_shapes
from morphc.kernels.spec import KernelSpec, TuneConfig
from morphc.kernels.tap import TapKernels, TapPlan
from morphc.kernels.templating import cdiv, next_pow2

LINEAR_BLENDS: Final = ("residual", "lerp")
"""Blends whose gradients need neither x nor s."""

REDUCED: Final = 256
"""Floats of a slot's partial sums that one program adds up."""


class TapShape(msgspec.Struct, frozen=True):
    """What a tap blueprint is, beside its spec. tap: features of what is read. parts: in-projections. biased: with
    biases. activation: between z and the out-projection."""

    tap: int
    parts: int = 1
    biased: bool = False
    activation: str = "identity"


def shared_bytes(spec: KernelSpec) -> int:
    """Bound of a program's shared memory with the tiles of the rules below, measured: its out-weight as dots want it,
    in parts for tf32x3, and once more where the backward makes s anew.
    """
    held = next_pow2(spec.chunk) * next_pow2(spec.rank)
    if spec.blend in LINEAR_BLENDS:
        return (10 if spec.dtype == "float32" else 3) * held + (16 << 10)
    return (20 if spec.dtype == "float32" else 5) * held + (16 << 10)


def refuses(spec: KernelSpec, geometry: Geometry, shared: int = SHARED_LIMITS["cuda:90"]) -> str:
    """Why no kernel is made for a tap blueprint there, or an empty string. shared: bytes that a program can have."""
    if type(get(spec.blueprint)) not in (LowRank, Widen):
        return (
            f"blueprint {spec.blueprint!r} reads an input, and only lowrank and widen have kernels for that"
        )
    if geometry.spatial:
        return f"blueprint {spec.blueprint!r} behind a convolution runs as convolutions"
    if spec.layout != "last":
        return f"blueprint {spec.blueprint!r} reads rows of features, not the layout {spec.layout!r}"
    if spec.blueprint == "widen" and geometry.activation not in ACTIVATIONS:
        return f"no kernel computes the block's function {geometry.activation!r}"
    if spec.dtype not in ("float32", "bfloat16", "float16"):
        return f"no kernel reads {spec.dtype}"
    if spec.chunk > chunks.WIDEST:
        return f"chunks of {spec.chunk} features are wider than the {chunks.WIDEST} that a tile holds"
    if spec.rank > chunks.DEEPEST:
        return f"rank {spec.rank} is above the {chunks.DEEPEST} that a tile holds"
    if shared_bytes(spec) > shared:
        return f"{spec.dtype} weights of {spec.rank} units and {spec.chunk} features are more than a program holds"
    return ""


def shape_of(spec: KernelSpec, geometry: Geometry) -> TapShape:
    """Raises UnsupportedKernelError where `refuses` names a reason."""
    if reason := refuses(spec, geometry):
        raise UnsupportedKernelError(f"{spec.name}: {reason}")
    if spec.blueprint == "lowrank":
        return TapShape(geometry.tap_features)
    return TapShape(geometry.tap_features, 2 if geometry.gated else 1, True, geometry.activation)


def names_of(spec: KernelSpec, geometry: Geometry) -> tuple[str, ...]:
    """Names of the bank's parameters, in its order."""
    return (*get(spec.blueprint).shapes(geometry), *blend_shapes(spec.blend, spec.chunk))


def sections(spec: KernelSpec, shape: TapShape) -> list[tuple[str, int, int]]:
    """(name, floats, start) of every parameter but the in-weights in a slot's partial sums."""
    sizes = {}
    if shape.biased:
        sizes["in_bias"] = spec.rank
    sizes["out_weight"] = spec.rank * spec.chunk
    if shape.biased and shape.parts == 2:
        sizes["gate_in_bias"] = spec.rank
    for name, (size, *_) in blend_shapes(spec.blend, spec.chunk).items():
        sizes[name] = size
    found, start = [], 0
    for name, size in sizes.items():
        found.append((name, size, start))
        start += size
    return found


@lru_cache(maxsize=256)
def join_source(spec: KernelSpec, shape: TapShape) -> Source:
    """The forward from z on."""
    return codegen.render(
        "forward.py.jinja",
        spec,
        params=_join_params(spec, shape),
        parts=shape.parts,
        activation=shape.activation,
        lanes=False,
        hint=gcd(spec.rank, 16),
    )


def _join_params(spec: KernelSpec, shape: TapShape) -> tuple[str, ...]:
    """What takes the place of the bank's parameters in the forward."""
    return (*("z", "z_gate")[: shape.parts], "out_weight", *blend_shapes(spec.blend, spec.chunk))


@lru_cache(maxsize=256)
def backward_source(spec: KernelSpec, shape: TapShape, interpreted: bool) -> Source:
    """The backward down to z, and its reduction."""
    found = sections(spec, shape)
    return codegen.render(
        "tap_backward.py.jinja",
        msgspec.structs.replace(spec, kind="tap_backward"),
        parts=shape.parts,
        activation=shape.activation,
        hint=gcd(spec.rank, 16),
        interpreted=interpreted,
        sections=found,
        per_slot=sum(size for _, size, _ in found),
    )


def join_job(
    spec: KernelSpec,
    shape: TapShape,
    config: TuneConfig,
    *,
    stash: bool = False,
    even: bool = False,
    aligned: bool = True,
    precision: Precision = "tf32x3",
    target: str = "cuda:90",
) -> Job:
    """The forward from z on. Arguments as for `morphc.kernels.active.forward_job`."""
    item = _pointer(spec)
    params = {f"{name}_ptr": item if name.startswith("z") else "*fp32" for name in _join_params(spec, shape)}
    pointers = {"x_ptr": item, "list_ptr": "*i32", "stash_ptr": item, **params}
    constants = {
        "ROWS": config.block_rows,
        "GROUP": config.group,
        "STAGES": config.num_stages,
        "STASH": int(stash),
        "MATH": "exact" if target == "cpu" or spec.dtype == "float32" else "plain",
        "PRECISION": precision_of(spec, precision, target),
        "EVEN": int(even),
        "EARLY": 0,
    }
    return Job(
        join_source(spec, shape),
        "forward",
        pointers | {"rows": "i32", "stride": "i32", "inner": "i32"},
        constants,
        [*pointers, "stride"] if aligned else [],
        options_of(config, target),
        target,
    )


def backward_jobs(
    spec: KernelSpec,
    shape: TapShape,
    config: TuneConfig,
    *,
    precision: Precision = "tf32x3",
    target: str = "cuda:90",
) -> tuple[Job, Job]:
    """The backward down to z, and its reduction."""
    source = backward_source(spec, shape, target == "cpu")
    item = _pointer(spec)
    names = ["dy"]
    if spec.blend != "residual":
        names.append("dx")
    if spec.blend not in LINEAR_BLENDS:
        names.append("stash")
    names += [*("z", "z_gate")[: shape.parts], *("dz", "dz_gate")[: shape.parts]]
    pointers = {f"{name}_ptr": item for name in names} | {"list_ptr": "*i32", "out_weight_ptr": "*fp32"}
    if spec.blend == "gate":
        pointers |= {"gate_weight_ptr": "*fp32", "gate_bias_ptr": "*fp32"}
    pointers["partial_ptr"] = "*fp32"
    strides = ["dy_stride"] + (["dx_stride"] if spec.blend != "residual" else [])
    numbers = {"rows": "i32", **dict.fromkeys(strides, "i32")}
    tile = {"ROWS": config.block_rows, "GROUP": config.group}
    walk = Job(
        source,
        "tap_backward",
        pointers | numbers,
        tile | {"PRECISION": precision_of(spec, precision, target)},
        [*pointers, *strides],
        options_of(config, target),
        target,
    )
    gradients = {f"{name}_ptr": "*fp32" for name, _, _ in sections(spec, shape)}
    reduce = Job(
        source,
        "tap_reduce",
        {"partial_ptr": "*fp32", "list_ptr": "*i32"} | gradients
        | {"rows": "i32", "programs": "i32"},
        tile | {"FLOATS": min(REDUCED, next_pow2(sum(size for _, size, _ in sections(spec, shape))))},
        options={"num_warps": 2},
        target=target,
    )  # fmt: skip
    return walk, reduce


def _pointer(spec: KernelSpec) -> str:
    return f"*{launch.triton_type(getattr(torch, spec.dtype))}"


def config_of(spec: KernelSpec, target: str = "cuda:90") -> TuneConfig:
    """The forward's config by rule: chunks under 16 share a tile, and wide ones have low ones, since W_out and the
    hidden values of all units are in registers."""
    columns, units = next_pow2(spec.chunk), next_pow2(spec.rank)
    group = max(1, min(16 // columns, 64 // units))
    wide = max(16, group * max(columns, units))
    full = spec.dtype == "float32"
    if wide >= (128 if full else 256) or units >= 128:
        rows, warps = 16, 8
    elif wide > 64 or (full and columns >= 64 and units >= 64):
        rows, warps = 32, 8
    else:
        # The compiler for AMD spills with four, and where it loads ahead.
        rows, warps = 64, 8 if target.startswith("hip") else 4
    # ptxas spills a few values on other architectures to fit more warps into a multiprocessor.
    most = 255 if target.startswith("cuda") and target != "cuda:90" else None
    stages = 1 if target.startswith("hip") else 2
    return TuneConfig(rows, 0, num_warps=warps, num_stages=stages, group=group, programs=4, maxnreg=most)


def backward_config_of(spec: KernelSpec, shape: TapShape, target: str = "cuda:90") -> TuneConfig:
    """The backward's config by rule: low tiles, as it holds several of them, and sums besides. Chunks under 16 share
    a tile where that leaves registers enough."""
    wide = next_pow2(spec.chunk) + next_pow2(spec.rank)
    linear, narrow = spec.blend in LINEAR_BLENDS, spec.dtype != "float32"
    if linear and (narrow or shape.parts == 1) and not target.startswith("hip"):
        units = 64 if narrow else 32
        group = max(1, min(16 // next_pow2(spec.chunk), units // next_pow2(spec.rank)))
        rows = 32 if narrow and group * wide <= 128 else 16
        return TuneConfig(rows, 0, 4 if group * wide <= 64 else 8, num_stages=2, group=group, programs=4)
    return TuneConfig(16, 0, num_warps=8, num_stages=2, group=1, programs=4)


class TapSeeds:
    """The kernels of one bank with a tap, on one device.

    Tensors: tap [rows, T], features side by side; y, dy as `View` says, `last`; params: the bank's, float32
    [K, ...], contiguous, by name; z, dz [parts, K, rows, R]; stash [K, rows, C], for blends that need it.
    """

    def __init__(
        self,
        spec: KernelSpec,
        geometry: Geometry,
        device: torch.device,
        *,
        plan: TapPlan | None = None,
        config: TuneConfig | None = None,
        back: TuneConfig | None = None,
        precision: Precision = "tf32x3",
    ) -> None:
        self.spec = spec
        self.shape = shape = shape_of(spec, geometry)
        self.device = device
        self.target = chunks.target_of(device)
        self.config = config or config_of(spec, self.target)
        self.back = back or backward_config_of(spec, shape, self.target)
        self.precision = precision
        self.products = TapKernels(
            msgspec.structs.replace(spec, kind="tap"),
            shape.tap,
            device,
            parts=shape.parts,
            biased=shape.biased,
            plan=plan,
            precision=precision,
        )
        self._weights = ("in_weight", "gate_in_weight")[: shape.parts]
        self._biases = ("in_bias", "gate_in_bias")[: shape.parts if shape.biased else 0]
        self._blend = tuple(blend_shapes(spec.blend, spec.chunk))
        self._processors = launch.multiprocessors(device)
        self._walk, self._reduce = backward_jobs(
            spec, shape, self.back, precision=precision, target=self.target
        )
        self._ready: dict[tuple[object, ...], launch.Prepared] = {}

    @property
    def stashes(self) -> bool:
        """Whether the backward needs the original columns."""
        return self.spec.blend not in LINEAR_BLENDS

    def project(
        self,
        x: Tensor,
        listing: Tensor,
        params: Mapping[str, Tensor],
        *,
        z: Tensor | None = None,
        blending_only: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """z of the listed slots, in `z` if given, and the packed weights for `tap_gradient`. blending_only: where no
        gradient is taken, isolated slots need no z."""
        weights = [params[name] for name in self._weights]
        biases = [params[name] for name in self._biases]
        return self.products.project(x, listing, weights, biases, z=z, blending_only=blending_only)

    def join(
        self,
        y: Tensor,
        view: View,
        listing: Tensor,
        params: Mapping[str, Tensor],
        z: Tensor,
        stash: Tensor | None = None,
    ) -> None:
        """Overwrite the columns of the slots that blend; `stash` gets the original ones of all that are listed."""
        if not view.rows:
            return
        rest = [params[name] for name in ("out_weight", *self._blend)]
        tensors = [y, listing, y if stash is None else stash, *z.unbind(0), *rest]
        aligned = launch.aligned(tensors, view.stride)
        even = view.rows % self.config.block_rows == 0
        key = ("join", stash is not None, even, aligned)
        if key not in self._ready:
            job = join_job(
                self.spec,
                self.shape,
                self.config,
                stash=stash is not None,
                even=even,
                aligned=aligned,
                precision=self.precision,
                target=self.target,
            )
            self._ready[key] = launch.prepare_job(job, self.device, aligned=aligned)
        groups = cdiv(self.spec.slots, self.config.group)
        most = cdiv(view.rows, self.config.block_rows) * groups
        programs = min(most, self._processors * max(1, self.config.programs))
        self._ready[key]((programs, 1, 1), *tensors, view.rows, view.stride, view.inner)

    def backward(
        self,
        dy: Tensor,
        view: View,
        listing: Tensor,
        params: Mapping[str, Tensor],
        z: Tensor,
        stash: Tensor | None = None,
        dx: Tensor | None = None,
        dx_view: View | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """dz, and the gradients of all parameters but the in-weights: float32 [K, ...], zero where nothing trains.

        view: of dy. dx: a copy of dy, walked by `dx_view` (None: like dy), whose columns of blending slots are
        overwritten; not asked for with `residual`, where dx is dy.
        """
        spec, rows = self.spec, view.rows
        dz = torch.empty_like(z)
        found = sections(spec, self.shape)
        gradients = {name: torch.empty_like(params[name]) for name, _, _ in found}
        groups = cdiv(spec.slots, self.back.group)
        blocks = cdiv(rows, self.back.block_rows)
        programs = max(1, min(blocks * groups, self._processors * max(1, self.back.programs)))
        # Every program writes a row of sums for each group that it touches, a group's last and the next one's first.
        partial = torch.empty(
            (programs + groups) * self.back.group * sum(size for _, size, _ in found),
            dtype=torch.float32,
            device=self.device,
        )
        tensors = [dy]
        strides = [view.stride]
        if spec.blend != "residual":
            assert dx is not None
            tensors.append(dx)
            strides.append((dx_view or view).stride)
        if self.stashes:
            assert stash is not None
            tensors.append(stash)
        rest = [params[name] for name in ("out_weight", *self._blend)]
        tensors += [*z.unbind(0), *dz.unbind(0), listing, *rest, partial]
        if rows:
            self._run(self._walk, launch.aligned(tensors, *strides), programs, *tensors, rows, *strides)
        aligned = launch.aligned([])
        grid = (
            cdiv(
                partial.numel() // ((programs + groups) * self.back.group), self._reduce.constants["FLOATS"]
            ),
            spec.slots,
            1,
        )
        self._prepared(self._reduce, aligned)(grid, partial, listing, *gradients.values(), rows, programs)
        return dz, gradients

    def weight_gradients(
        self, x: Tensor, dz: Tensor, listing: Tensor, params: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Those of the in-weights."""
        gradients = {name: torch.empty_like(params[name]) for name in self._weights}
        self.products.weight_gradient(x, dz, listing, list(gradients.values()))
        return gradients

    def tap_gradient(
        self, dz: Tensor, listing: Tensor, params: Mapping[str, Tensor], packed: Tensor | None
    ) -> Tensor:
        """[rows, T]; zeros where no slot blends."""
        return self.products.tap_gradient(dz, listing, [params[name] for name in self._weights], packed)

    def _run(self, job: Job, aligned: bool, programs: int, *arguments: Any) -> None:
        self._prepared(job, aligned)((programs, 1, 1), *arguments)

    def _prepared(self, job: Job, aligned: bool) -> launch.Prepared:
        key = (job.function, aligned)
        if key not in self._ready:
            self._ready[key] = launch.prepare_job(job, self.device, aligned=aligned)
        return self._ready[key]
