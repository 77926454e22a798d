"""`bottleneck`: s = gelu(x W_in + b_in) W_out + b_out, C -> R -> C with the tanh form of GELU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from morphc.kernels.blueprints.base import Blueprint, Geometry, uniform

if TYPE_CHECKING:
    import sympy


class Bottleneck(Blueprint):
    """A two-layer net on the chunk. `out_weight` and `out_bias` are zero at birth."""

    name = "bottleneck"
    tap = "chunk"

    def shapes(self, geometry: Geometry) -> dict[str, tuple[int, ...]]:
        chunk, rank = geometry.chunk, geometry.rank
        return {
            "in_weight": (chunk, rank),
            "in_bias": (rank,),
            "out_weight": (rank, chunk),
            "out_bias": (chunk,),
        }

    def init(self, geometry: Geometry, slots: int, generator: Generator) -> dict[str, Tensor]:
        params = {name: torch.zeros(slots, *shape) for name, shape in self.shapes(geometry).items()}
        params["in_weight"] = uniform(params["in_weight"].shape, geometry.chunk, generator)
        return params

    def apply(self, x: Tensor, params: Mapping[str, Tensor], geometry: Geometry) -> Tensor:
        hidden = self.basis(x, params, geometry)
        return torch.baddbmm(params["out_bias"].unsqueeze(1), hidden, params["out_weight"])

    def outs(self, geometry: Geometry) -> tuple[str, ...]:
        return ("out_weight", "out_bias")

    def has_basis(self, geometry: Geometry) -> bool:
        return True

    def basis(self, x: Tensor, params: Mapping[str, Tensor], geometry: Geometry) -> Tensor:
        hidden = torch.baddbmm(params["in_bias"].unsqueeze(1), x, params["in_weight"])
        return F.gelu(hidden, approximate="tanh")

    def flops(self, geometry: Geometry, rows: sympy.Expr) -> sympy.Expr:
        return 4 * geometry.chunk * geometry.rank * rows
