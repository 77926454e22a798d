"""`lowrank`: s = (input of the host layer) W_in W_out, LoRA's shape for one chunk (Hu et al. 2021, eq. 3).

Behind a convolution: the host's own k x k walk to R channels, then 1 x 1 to the chunk. Both fold into the
host's weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Generator, Tensor

from morphc.kernels.blueprints.base import Blueprint, Geometry, uniform
from morphc.kernels.blueprints.convolution import convolve, volume
from morphc.kernels.reference.chunks import split
from morphc.kernels.reference.tap import products

if TYPE_CHECKING:
    import sympy


class LowRank(Blueprint):
    """in -> R -> C without bias, reading the layer's input. `out_weight` is zero at birth."""

    name = "lowrank"
    tap = "layer"

    def refuses(self, geometry: Geometry) -> str:
        if geometry.tap_features < 1:
            return "the layer has no floating-point input of known width to read"
        if geometry.spatial and geometry.layer_conv is None:
            return "the layer has spatial axes and is no convolution"
        if geometry.layer_conv is not None and geometry.layer_conv.groups != 1:
            return f"the layer is a convolution in {geometry.layer_conv.groups} groups"
        return ""

    def shapes(self, geometry: Geometry) -> dict[str, tuple[int, ...]]:
        kernel = geometry.layer_conv.kernel if geometry.layer_conv is not None else ()
        if kernel:
            into: tuple[int, ...] = (geometry.rank, geometry.tap_features, *kernel)
        else:
            into = (geometry.tap_features, geometry.rank)
        return {"in_weight": into, "out_weight": (geometry.rank, geometry.chunk)}

    def init(self, geometry: Geometry, slots: int, generator: Generator) -> dict[str, Tensor]:
        shapes = self.shapes(geometry)
        fan_in = geometry.tap_features * volume(geometry.layer_conv)
        return {
            "in_weight": uniform((slots, *shapes["in_weight"]), fan_in, generator),
            "out_weight": torch.zeros(slots, *shapes["out_weight"]),
        }

    def apply(self, x: Tensor, params: Mapping[str, Tensor], geometry: Geometry) -> Tensor:
        into, out = params["in_weight"], params["out_weight"]
        slots = into.shape[0]
        if geometry.layer_conv is None:
            return torch.bmm(self.basis(x, params, geometry), out)
        hidden = convolve(x, into.flatten(0, 1), None, geometry.layer_conv)
        hidden = split(hidden, 1, slots, geometry.rank)
        return torch.einsum("nkr...,krc->knc...", hidden, out)

    def outs(self, geometry: Geometry) -> tuple[str, ...]:
        return ("out_weight",)

    def has_basis(self, geometry: Geometry) -> bool:
        return geometry.layer_conv is None

    def basis(self, x: Tensor, params: Mapping[str, Tensor], geometry: Geometry) -> Tensor:
        return products(x, params["in_weight"])

    def is_homogeneous(self, geometry: Geometry) -> bool:
        return True

    def flops(self, geometry: Geometry, rows: sympy.Expr) -> sympy.Expr:
        return (
            2 * geometry.rank * (geometry.tap_features * volume(geometry.layer_conv) + geometry.chunk) * rows
        )
