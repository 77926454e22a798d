"""`depthwise`: s = one k x k filter a channel plus a bias, behind convolutions (k = 3, same size out)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Generator, Tensor

from morphc.kernels.blueprints.base import Blueprint, ConvGeometry, Geometry
from morphc.kernels.blueprints.convolution import convolve
from morphc.kernels.reference.chunks import split

if TYPE_CHECKING:
    import sympy

KERNEL = 3


class Depthwise(Blueprint):
    """A depthwise convolution of the chunk's channels. It is zero at birth."""

    name = "depthwise"
    tap = "chunk"
    arrangement = "spatial"

    def refuses(self, geometry: Geometry) -> str:
        return (
            ""
            if geometry.spatial
            else "the layer has no spatial axes; depthwise belongs behind a convolution"
        )

    def shapes(self, geometry: Geometry) -> dict[str, tuple[int, ...]]:
        return {"weight": (geometry.chunk, *(KERNEL,) * geometry.spatial), "bias": (geometry.chunk,)}

    def init(self, geometry: Geometry, slots: int, generator: Generator) -> dict[str, Tensor]:
        return {name: torch.zeros(slots, *shape) for name, shape in self.shapes(geometry).items()}

    def apply(self, x: Tensor, params: Mapping[str, Tensor], geometry: Geometry) -> Tensor:
        slots, chunk, axes = x.shape[0], geometry.chunk, geometry.spatial
        ones = (1,) * axes
        conv = ConvGeometry((KERNEL,) * axes, ones, (KERNEL // 2,) * axes, ones)
        channels = x.movedim(0, 1).flatten(1, 2)
        out = convolve(
            channels,
            params["weight"].flatten(0, 1).unsqueeze(1),
            params["bias"].flatten(),
            conv,
            groups=slots * chunk,
        )
        return split(out, 1, slots, chunk).movedim(1, 0)

    def outs(self, geometry: Geometry) -> tuple[str, ...]:
        return ("weight", "bias")

    def flops(self, geometry: Geometry, rows: sympy.Expr) -> sympy.Expr:
        return 2 * geometry.chunk * KERNEL**geometry.spatial * rows
