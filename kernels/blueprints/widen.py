"""`widen`: R new hidden units of the enclosing block, as seen from one chunk of its output.

Linear:  s = act(u W_in + b) W_out              u is the block's input
Gated:   s = (act(u W_gate + b_gate) * (u W_in + b)) W_out
Conv:    s = conv_out(act(conv_in(u) + b))      with the two layers' own kernels and strides

A BatchNorm of the block doesn't see the new units. Folds into wider host layers (Net2Net, Chen et al. 2016;
GradMax, Evci et al. 2022).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Generator, Tensor

from morphc.kernels.blueprints.base import Blueprint, Geometry, uniform
from morphc.kernels.blueprints.convolution import convolve, volume
from morphc.kernels.reference.activations import activation
from morphc.kernels.reference.chunks import split
from morphc.kernels.reference.tap import products
from morphc.kernels.spec import NO_BLOCK

if TYPE_CHECKING:
    import sympy


class Widen(Blueprint):
    """New hidden units; `out_weight` is zero at birth."""

    name = "widen"
    tap = "block"

    def refuses(self, geometry: Geometry) -> str:
        if geometry.block_obstacle or geometry.tap_features < 1:
            return geometry.block_obstacle or NO_BLOCK
        for conv in (geometry.block_in, geometry.block_out):
            if conv is not None and conv.groups != 1:
                return f"a convolution of the block has {conv.groups} groups"
        return ""

    def shapes(self, geometry: Geometry) -> dict[str, tuple[int, ...]]:
        rank, chunk, width = geometry.rank, geometry.chunk, geometry.tap_features
        if geometry.block_in is not None and geometry.block_out is not None:
            return {
                "in_weight": (rank, width, *geometry.block_in.kernel),
                "in_bias": (rank,),
                "out_weight": (chunk, rank, *geometry.block_out.kernel),
            }
        shapes = {"in_weight": (width, rank), "in_bias": (rank,), "out_weight": (rank, chunk)}
        if geometry.gated:
            shapes |= {"gate_in_weight": (width, rank), "gate_in_bias": (rank,)}
        return shapes

    def init(self, geometry: Geometry, slots: int, generator: Generator) -> dict[str, Tensor]:
        fan_in = geometry.tap_features * volume(geometry.block_in)
        fresh = {}
        for name, shape in self.shapes(geometry).items():
            drawn = name in ("in_weight", "gate_in_weight")
            full = (slots, *shape)
            fresh[name] = uniform(full, fan_in, generator) if drawn else torch.zeros(full)
        return fresh

    def apply(self, x: Tensor, params: Mapping[str, Tensor], geometry: Geometry) -> Tensor:
        act = activation(geometry.activation)
        if geometry.block_in is not None and geometry.block_out is not None:
            slots = params["in_weight"].shape[0]
            hidden = convolve(
                x, params["in_weight"].flatten(0, 1), params["in_bias"].flatten(), geometry.block_in
            )
            out = convolve(
                act(hidden), params["out_weight"].flatten(0, 1), None, geometry.block_out, groups=slots
            )
            return split(out, 1, slots, geometry.chunk).movedim(1, 0)
        return torch.bmm(self.basis(x, params, geometry), params["out_weight"])

    def outs(self, geometry: Geometry) -> tuple[str, ...]:
        return ("out_weight",)

    def has_basis(self, geometry: Geometry) -> bool:
        return geometry.block_in is None

    def basis(self, x: Tensor, params: Mapping[str, Tensor], geometry: Geometry) -> Tensor:
        act = activation(geometry.activation)
        hidden = products(x, params["in_weight"]) + params["in_bias"].unsqueeze(1)
        if not geometry.gated:
            return act(hidden)
        gate = products(x, params["gate_in_weight"]) + params["gate_in_bias"].unsqueeze(1)
        return act(gate) * hidden

    def is_homogeneous(self, geometry: Geometry) -> bool:
        return geometry.gated or geometry.activation in ("relu", "leaky_relu", "identity")

    def flops(self, geometry: Geometry, rows: sympy.Expr) -> sympy.Expr:
        branches = 2 if geometry.gated else 1
        into = branches * geometry.tap_features * volume(geometry.block_in)
        return 2 * geometry.rank * (into + geometry.chunk * volume(geometry.block_out)) * rows
