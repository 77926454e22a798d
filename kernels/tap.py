"""In-projections of blueprints that read the layer's or the block's input: one matrix product for all listed slots.

A slot's hidden units lie side by side with those of the next slot on the list, so that `lowrank` with 100 active
seeds at rank 16 is one product with 1600 columns, and not 100 small ones. What comes after (the pointwise function,
the out-projection, the blend) belongs to the forward kernel, which reads z in place of the chunk.

    project           z [part, i, r, u] = tap W + b            for the listed slots i
    tap_gradient      [r, f] = sum of dz W^T                   over the slots that blend
    weight_gradient   [slot, f, u] = tap^T dz                  for the slots that train, zeros for the others

`lowrank` and a plain `widen` have one part, a gated `widen` two (`in_weight`, `gate_in_weight`). Weights are float32;
with `packed` they are first copied, in the activation's type and features last, which pays off as soon as several
tiles of rows read them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Final

import msgspec
import torch
from torch import Tensor

from morphc.kernels import codegen, launch
from morphc.kernels.active import Precision, target_of
from morphc.kernels.codegen import Source
from morphc.kernels.compile import Job
from morphc.kernels.gradient import precision_of
from morphc.kernels.spec import KernelSpec
from morphc.kernels.templating import cdiv

PACKED_ROW: Final = 64
"""A packed row is filled up to a multiple of so many features."""

PACKED_FROM: Final = 256
"""Above so many rows weights are packed by rule: more than two tiles of rows then read them."""

PACK_BLOCK: Final = 128
PACK_WARPS: Final = 4


class Tiles(msgspec.Struct, frozen=True):
    """One product [m, k] x [k, n]. rows x columns: the tile of a program; depth: a step along k, at most 64. group:
    rows of tiles that are done together. programs: of the persistent grid, a multiprocessor."""

    rows: int = 128
    columns: int = 128
    depth: int = 64
    warps: int = 8
    stages: int = 3
    group: int = 8
    programs: int = 1


class TapPlan(msgspec.Struct, frozen=True):
    """How the products of one spec are cut up, by the kernel's name, and whether weights are packed."""

    packed: bool = True
    project: Tiles = Tiles()
    tap_gradient: Tiles = Tiles()
    weight_gradient: Tiles = Tiles()


def plan(spec: KernelSpec, rows: int, parts: int = 1, target: str = "cuda:90") -> TapPlan:
    """A plan by rule: few rows take tiles as low as they are, and read the weights where they lie."""
    wide = spec.dtype == "float32"
    depth = 32 if wide or target.startswith("hip") else 64
    stages = 2 if target.startswith("hip") else 3
    low = min(128, max(16, 1 << (max(rows, 1) - 1).bit_length()))
    forward = 128 if parts == 1 and low > 16 and not wide else 64
    into = 64 if low == 16 or (parts == 2 and wide) else 128
    return TapPlan(
        packed=rows > PACKED_FROM,
        project=Tiles(low, forward, depth, 8 if low * forward > 64 * 64 else 4, stages, programs=2),
        # Eight warps have no rows of their own in a float32 tile of 64: see `compile_worker.overlaid`.
        tap_gradient=Tiles(low, into, depth, 8 if low > (64 if wide else 32) else 4, stages),
        weight_gradient=Tiles(128, 64, min(depth, low), 8, stages, programs=2),
    )


@lru_cache(maxsize=256)
def tap_source(
    spec: KernelSpec, tap: int, parts: int, biased: bool, packed: bool, interpreted: bool
) -> Source:
    """The kernels of one spec. tap: features of what is read."""
    return codegen.render(
        "tap.py.jinja",
        spec,
        tap=tap,
        parts=parts,
        biased=biased,
        packed=packed,
        hint=math.gcd(spec.rank, 16),
        interpreted=interpreted,
    )


_LIST: Final = {"list_ptr": "*i32"}
_WEIGHTS: Final = ("weight_ptr", "gate_weight_ptr")
_BIASES: Final = ("bias_ptr", "gate_bias_ptr")
_GRADIENTS: Final = ("grad_ptr", "gate_grad_ptr")


def jobs(
    spec: KernelSpec,
    tap: int,
    *,
    parts: int = 1,
    biased: bool = False,
    plan: TapPlan | None = None,
    precision: Precision = "tf32x3",
    target: str = "cuda:90",
) -> dict[str, Job]:
    """Every kernel of one spec, by name, with rows and strides that are divisible by 16 as far as that helps.

    tap: features of what is read. parts: in-projections, 2 for a gated block. precision: of float32 products:
    `tf32x3`, `tf32` or `ieee`. target: `cuda:90`, `hip:gfx942`, or `cpu` for the interpreter.
    """
    plan = plan or TapPlan()
    interpreted = target == "cpu"
    dots = precision_of(spec, precision, target)
    source = tap_source(spec, tap, parts, biased, plan.packed, interpreted)
    x = f"*{launch.triton_type(getattr(torch, spec.dtype))}"
    weights = dict.fromkeys(_WEIGHTS[:parts], "*fp32")
    biases = dict.fromkeys(_BIASES[: parts if biased else 0], "*fp32")
    gradients = dict.fromkeys(_GRADIENTS[:parts], "*fp32")
    read = {"packed_ptr": "*fp32" if interpreted else x} if plan.packed else weights

    def job(name: str, signature: dict[str, str], constants: dict[str, Any], tiles: Tiles | None) -> Job:
        aligned = tuple(key for key in signature if key.endswith(("_ptr", "stride", "plane")))
        warps, stages = (tiles.warps, tiles.stages) if tiles else (PACK_WARPS, 3)
        options = {"num_warps": warps, "num_stages": stages}
        if target.startswith("cuda") and target != "cuda:90":
            # ptxas spills a few values there to fit more warps into a multiprocessor.
            options["maxnreg"] = 255
        return Job(source, name, signature, constants, aligned, options, target)

    forward, into, back = plan.project, plan.tap_gradient, plan.weight_gradient
    shape = {"BLOCK_TAP": back.rows, "BLOCK_COLS": back.columns, "BLOCK_ROWS": back.depth}
    made = {
        "project": job(
            "project",
            {"tap_ptr": x} | _LIST | read | biases | {"z_ptr": x}
            | {"rows": "i32", "tap_stride": "i32", "plane": "i64", "count": "i32"},
            {"BLOCK_ROWS": forward.rows, "BLOCK_COLS": forward.columns, "BLOCK_TAP": forward.depth}
            | {"GROUP": forward.group, "PRECISION": dots},
            forward,
        ),
        "tap_gradient": job(
            "tap_gradient",
            {"dz_ptr": x} | _LIST | read | {"gradient_ptr": x}
            | {"rows": "i32", "stride": "i32", "plane": "i64"},
            {"BLOCK_ROWS": into.rows, "BLOCK_COLS": into.columns, "BLOCK_UNITS": into.depth}
            | {"GROUP": into.group, "PRECISION": dots},
            into,
        ),
        "weight_gradient": job(
            "weight_gradient",
            {"tap_ptr": x, "dz_ptr": x} | _LIST | gradients | {"partial_ptr": "*fp32"}
            | {"rows": "i32", "tap_stride": "i32", "plane": "i64"},
            shape | {"PRECISION": dots},
            back,
        ),
        "settle": job(
            "settle",
            _LIST | gradients | {"partial_ptr": "*fp32", "rows": "i32", "programs": "i32"},
            shape,
            back,
        ),
    }  # fmt: skip
    if plan.packed:
        made["pack"] = job("pack", weights | read | _LIST | {"count": "i32"}, {"BLOCK_TAP": PACK_BLOCK}, None)
    return made


class TapKernels:
    """The kernels of one spec on one device; arguments as for `jobs`.

    Tensors: tap [rows, T] with its features side by side; listing: the bank's active list; weights, biases: one
    of each part, [K, T, R] and [K, R] float32; z, dz: [parts, positions, rows, R], with as many positions as
    slots are listed at most.
    """

    def __init__(
        self,
        spec: KernelSpec,
        tap: int,
        device: torch.device,
        *,
        parts: int = 1,
        biased: bool = False,
        plan: TapPlan | None = None,
        precision: Precision = "tf32x3",
    ) -> None:
        self.spec = spec
        self.tap = tap
        self.device = device
        self.parts = parts
        self.plan = plan or TapPlan()
        self.jobs = jobs(
            spec,
            tap,
            parts=parts,
            biased=biased,
            plan=self.plan,
            precision=precision,
            target=target_of(device),
        )
        self._processors = launch.multiprocessors(device)
        self._ready: dict[tuple[str, bool], launch.Prepared] = {}

    def project(
        self,
        tap: Tensor,
        listing: Tensor,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor] = (),
        *,
        positions: int | None = None,
        z: Tensor | None = None,
        blending_only: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """z, and the packed weights that `tap_gradient` can use again (None without packing).

        z: where it goes, if that is there already. positions: how many slots are listed at most (None: all).
        blending_only: leave out the isolated ones, of which nobody sees anything where no gradient is taken. z is
        written for the listed slots only.
        """
        rows, spec = tap.shape[0], self.spec
        places = spec.slots if positions is None else positions
        if z is None:
            z = tap.new_empty(self.parts, places, rows, spec.rank)
        count = int(blending_only)
        packed = None
        read = weights
        if self.plan.packed:
            packed = self._pack(tap, listing, weights, count)
            read = (packed,)
        if rows and places:
            self._run(
                "project",
                self.plan.project.programs,
                (tap, listing, *read, *biases, z),
                (rows, tap.stride(0), places * rows * spec.rank, count),
            )
        return z, packed

    def _pack(self, tap: Tensor, listing: Tensor, weights: Sequence[Tensor], count: int) -> Tensor:
        length = cdiv(self.tap, PACKED_ROW) * PACKED_ROW
        # The interpreter rounds to bfloat16 towards zero.
        dtype = torch.float32 if self.device.type == "cpu" else tap.dtype
        packed = tap.new_empty(self.parts, self.spec.slots * self.spec.rank, length, dtype=dtype)
        self._run("pack", 4, (*weights, packed, listing), (count,))
        return packed

    def tap_gradient(
        self, dz: Tensor, listing: Tensor, weights: Sequence[Tensor], packed: Tensor | None
    ) -> Tensor:
        """[rows, T]; zeros if no slot blends. packed: what `project` gave, for the same list and weights."""
        rows = dz.shape[2]
        gradient = dz.new_empty(rows, self.tap)
        if self.plan.packed and packed is None:
            packed = self._pack(dz, listing, weights, 1)
        read = weights if packed is None else (packed,)
        if rows:
            self._run(
                "tap_gradient",
                self.plan.tap_gradient.programs,
                (dz, listing, *read, gradient),
                (rows, gradient.stride(0), dz.stride(0)),
            )
        return gradient

    def weight_gradient(self, tap: Tensor, dz: Tensor, listing: Tensor, gradients: Sequence[Tensor]) -> None:
        """Writes `gradients`, one [K, T, R] float32 a part: of the slots that train, zeros for the others."""
        rows = tap.shape[0]
        tiles = self.plan.weight_gradient
        programs = self._processors * tiles.programs
        # A range of rows is cut up only while there are more programs than tiles, so this holds all partials.
        partial = torch.empty(programs * tiles.rows * tiles.columns, dtype=torch.float32, device=self.device)
        self._run(
            "weight_gradient",
            tiles.programs,
            (tap, dz, listing, *gradients, partial),
            (rows, tap.stride(0), dz.stride(0)),
        )
        self._run("settle", 4, (listing, *gradients, partial), (rows, programs))

    def _run(self, name: str, programs: int, tensors: tuple[Tensor, ...], numbers: tuple[int, ...]) -> None:
        job = self.jobs[name]
        names = [key for key in job.signature if not key.endswith("_ptr")]
        fits = launch.aligned(
            tensors, *(number for key, number in zip(names, numbers, strict=True) if key in job.aligned)
        )
        kernel = self._ready.get((name, fits))
        if kernel is None:
            kernel = self._ready[name, fits] = launch.prepare_job(job, self.device, aligned=fits)
        kernel((self._processors * programs, 1, 1), *tensors, *numbers)
