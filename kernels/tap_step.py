"""AdamW of banks whose blueprint reads an input: their in-weights make slots too large for one program each.

    TapStepper(spec, geometry, device).step(active, bank, gradients, rates)

Two launches: `count` counts the steps of the slots that train and looks whether their gradients are finite, `adamw`
steps them, several programs a slot. Nothing of a slot that doesn't train moves. `morphc.kernels.reference.adamw` says
what is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod
from typing import Final

import torch
from msgspec.structs import replace
from torch import Tensor

from morphc.kernels import codegen, launch
from morphc.kernels.active import target_of
from morphc.kernels.blueprints.base import Geometry, get
from morphc.kernels.codegen import Source
from morphc.kernels.compile import Job
from morphc.kernels.reference.blends import blend_shapes
from morphc.kernels.spec import KernelSpec
from morphc.kernels.templating import cdiv, next_pow2
from morphc.kernels.training import Bank, Rates

FLOATS: Final = 1024
SHARED: Final = 8
"""Blocks of FLOATS that one program does, where a slot's largest parameter has so many."""


def sizes_of(spec: KernelSpec, geometry: Geometry) -> tuple[tuple[str, int], ...]:
    """(name, floats of a slot) of every parameter, in the bank's order."""
    shapes = get(spec.blueprint).shapes(geometry) | blend_shapes(spec.blend, spec.chunk)
    return tuple((name, prod(shape)) for name, shape in shapes.items())


@lru_cache(maxsize=256)
def source(spec: KernelSpec, geometry: Geometry) -> Source:
    """The file of `count` and `adamw`."""
    spec = replace(spec, kind="tap_step", dtype="float32")
    return codegen.render("tap_step.py.jinja", spec, sizes=sizes_of(spec, geometry))


def across_of(spec: KernelSpec, geometry: Geometry) -> int:
    """Programs that share a slot."""
    return max(1, cdiv(max(size for _, size in sizes_of(spec, geometry)), SHARED * FLOATS))


def jobs(
    spec: KernelSpec, geometry: Geometry, target: str = "cuda:90", *, scaled: bool = False
) -> tuple[Job, Job]:
    """`count` and `adamw` as `compile_all` and `launch.prepare` take them."""
    made, sizes = source(spec, geometry), sizes_of(spec, geometry)
    last = {"step_ptr": "*i64", "lost_ptr": "*i32", "loss_scale_ptr": "*fp32"}
    constants = {"FLOATS": FLOATS, "SCALED": int(scaled)}
    given = {f"{name}_gradient_ptr": "*fp32" for name, _ in sizes}
    options = {"num_warps": 4}
    count = Job(made, "count", {"list_ptr": "*i32"} | given | last, constants, options=options, target=target)
    signature = {"list_ptr": "*i32"}
    for name, _ in sizes:
        for what in ("gradient_", "", "mean_", "square_"):
            signature[f"{name}_{what}ptr"] = "*fp32"
    moments = [f"{moment}_{what}" for moment in ("mean", "square") for what in ("keep", "rate", "log")]
    signature |= last | dict.fromkeys(("lr", "keep", *moments, "eps"), "fp32")
    constants = {"FLOATS": FLOATS, "LANES": next_pow2(across_of(spec, geometry)), "SCALED": int(scaled)}
    adamw = Job(made, "adamw", signature, constants, options=options, target=target)
    return count, adamw


class TapStepper:
    """The step of one bank's shape on one device."""

    def __init__(self, spec: KernelSpec, geometry: Geometry, device: torch.device) -> None:
        self.slots = spec.slots
        self.spec, self.geometry, self.device = spec, geometry, device
        self.across = across_of(spec, geometry)
        self._kernels: dict[bool, tuple[launch.Prepared, launch.Prepared]] = {}

    def step(
        self,
        active: Tensor,
        bank: Bank,
        gradients: Sequence[Tensor],
        rates: Rates,
        scale: Tensor | None = None,
    ) -> None:
        """AdamW of every slot that trains, listed or not; see `morphc.kernels.training.Trainer.step`."""
        tensors: list[Tensor] = []
        for each in zip(gradients, bank.params, bank.means, bank.squares, strict=True):
            tensors += each
        scaled = scale is not None
        if scaled not in self._kernels:
            target = target_of(self.device)
            count, adamw = jobs(self.spec, self.geometry, target, scaled=scaled)
            prepared = launch.prepare_job(count, self.device), launch.prepare_job(adamw, self.device)
            self._kernels[scaled] = prepared
        count_kernel, adamw_kernel = self._kernels[scaled]
        grid = (self.across, self.slots, 1)
        lost = torch.empty(self.slots * self.across, dtype=torch.int32, device=self.device)
        last = bank.step, lost, tensors[0] if scale is None else scale
        count_kernel(grid, active, *gradients, *last)
        adamw_kernel(grid, active, *tensors, *last, *rates.scalars)
