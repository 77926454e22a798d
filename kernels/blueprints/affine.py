"""`affine`: s = scale * x + shift, one pair a feature. Folds into the host layer's own weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Generator, Tensor

from morphc.kernels.blueprints.base import Blueprint, Geometry

if TYPE_CHECKING:
    import sympy


class Affine(Blueprint):
    """Per-feature scale and shift of the chunk; both are zero at birth."""

    name = "affine"
    tap = "chunk"

    def shapes(self, geometry: Geometry) -> dict[str, tuple[int, ...]]:
        return {"scale": (geometry.chunk,), "shift": (geometry.chunk,)}

    def init(self, geometry: Geometry, slots: int, generator: Generator) -> dict[str, Tensor]:
        return {name: torch.zeros(slots, *shape) for name, shape in self.shapes(geometry).items()}

    def apply(self, x: Tensor, params: Mapping[str, Tensor], geometry: Geometry) -> Tensor:
        return x * params["scale"].unsqueeze(1) + params["shift"].unsqueeze(1)

    def outs(self, geometry: Geometry) -> tuple[str, ...]:
        return ("scale", "shift")

    def flops(self, geometry: Geometry, rows: sympy.Expr) -> sympy.Expr:
        return 2 * geometry.chunk * rows
