"""AdamW of banks whose blueprint reads an input: their in-weights make slots too large for one program each.

    TapStepper(spec, geometry, device).step(active, bank, gradients, rates)

Two launches: `count` counts the steps of the slots that train, `adamw` steps them, several programs a slot. Nothing of
a slot that doesn't train moves. `morphc.kernels.reference.adamw` says what is computed.
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
from morphc.kernels.templating import cdiv
from morphc.kernels.training import Bank, Rates

FLOATS: Final = 1024
BLOCK: Final = 512
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


def jobs(spec: KernelSpec, geometry: Geometry, target: str = "cuda:90") -> tuple[Job, Job]:
    """`count` and `adamw` as `compile_all` and `launch.prepare` take them."""
    made = source(spec, geometry)
    count = Job(
        made,
        "count",
        {"list_ptr": "*i32", "step_ptr": "*i64"},
        {"BLOCK": BLOCK},
        options={"num_warps": 4},
        target=target,
    )
    signature = {"list_ptr": "*i32"}
    for name, _ in sizes_of(spec, geometry):
        for what in ("gradient_", "", "mean_", "square_"):
            signature[f"{name}_{what}ptr"] = "*fp32"
    signature["step_ptr"] = "*i64"
    moments = [f"{moment}_{what}" for moment in ("mean", "square") for what in ("keep", "rate", "log")]
    signature |= dict.fromkeys(("lr", "keep", *moments, "eps"), "fp32")
    adamw = Job(made, "adamw", signature, {"FLOATS": FLOATS}, options={"num_warps": 4}, target=target)
    return count, adamw


class TapStepper:
    """The step of one bank's shape on one device."""

    def __init__(self, spec: KernelSpec, geometry: Geometry, device: torch.device) -> None:
        self.slots = spec.slots
        self.across = max(1, cdiv(max(size for _, size in sizes_of(spec, geometry)), SHARED * FLOATS))
        self._count, self._adamw = (
            launch.prepare_job(job, device) for job in jobs(spec, geometry, target_of(device))
        )

    def step(self, active: Tensor, bank: Bank, gradients: Sequence[Tensor], rates: Rates) -> None:
        """AdamW of every slot that trains, listed or not. gradients: of the bank's parameters [K, ...], in order."""
        tensors: list[Tensor] = []
        for each in zip(gradients, bank.params, bank.means, bank.squares, strict=True):
            tensors += each
        self._count((cdiv(self.slots, BLOCK), 1, 1), active, bank.step)
        self._adamw((self.across, self.slots, 1), active, *tensors, bank.step, *rates.scalars)
