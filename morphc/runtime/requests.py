"""What is asked of a site, and what follows from it: its geometry and its number of slots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from morphc.config import Config
from morphc.kernels.blueprints.base import ConvGeometry, Geometry, get
from morphc.kernels.reference.activations import activation
from morphc.kernels.reference.blends import blend_shapes
from morphc.kernels.reference.chunks import widest
from morphc.kernels.spec import Block


@dataclass(frozen=True, slots=True, eq=False)
class SiteRequest:
    """One site to make.

    path: the site's key. layer: the layer that gets the child `morphc`. owner: the module whose forward is
    wrapped, where that is not the layer. parameter: name of the parameter of a functional layer; nothing is
    wrapped then, and the caller calls the site. tap_features: width of the layer's input, 0 where it has no
    floating one. slots: None for `default_slots`. output_index: which element of a tuple output is watched.
    """

    path: str
    layer: nn.Module
    features: int
    feature_axis: int = -1
    seeds: int = 1
    dtype: torch.dtype | None = None
    device: torch.device | None = None
    kind: str = "linear"
    epilogue: str | None = None
    output_index: int | None = None
    block: Block | None = None
    parameter: str | None = None
    tap_features: int = 0
    owner: nn.Module | None = None
    slots: int | None = None


def geometry_of(request: SiteRequest, rank: int, root: nn.Module, tap: str = "chunk") -> Geometry:
    """What a blueprint with that tap must know about the site."""
    layer = request.layer
    spatial = spatial_axes(layer)
    base: dict[str, Any] = {
        "features": request.features,
        "chunk": widest(request.features, request.seeds),
        "rank": rank,
        "spatial": spatial,
    }
    if tap == "layer":
        conv = conv_geometry(layer) if spatial else None
        return Geometry(**base, tap_features=request.tap_features, layer_conv=conv)
    block = request.block
    if tap == "block" and block is None:
        return Geometry(**base, tap_features=0, block_obstacle="the layer is not the output of a block")
    if tap == "block" and block is not None:
        first, last = root.get_submodule(block.inputs[0]), root.get_submodule(block.output)
        conv_block = block.kind == "conv"
        activation(block.activation)
        return Geometry(
            **base,
            tap_features=width_in(first),
            block_in=conv_geometry(first) if conv_block else None,
            block_out=conv_geometry(last) if conv_block else None,
            activation=block.activation,
            gated=block.kind == "gated",
            block_obstacle=block.obstacle,
        )
    return Geometry(**base, tap_features=base["chunk"])


def spatial_axes(layer: nn.Module) -> int:
    """Spatial axes of a convolution, 0 for any other layer."""
    return len(layer.kernel_size) if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) else 0


def width_in(layer: nn.Module) -> int:
    """Input width of a linear or convolution layer: look-alikes say it by attribute or by their weight."""
    for name in ("in_features", "in_channels", "nx"):
        width = getattr(layer, name, None)
        if isinstance(width, int):
            return width
    weight = getattr(layer, "weight", None)
    # transformers' Conv1D keeps its weight as [in, out].
    return int(weight.shape[0]) if isinstance(weight, Tensor) and weight.dim() == 2 else 0


def conv_geometry(layer: nn.Module) -> ConvGeometry | None:
    """The geometry of an nn.Conv layer, None for anything else."""
    if not isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return None
    padding = layer.padding if isinstance(layer.padding, str) else tuple(int(p) for p in layer.padding)
    return ConvGeometry(
        kernel=tuple(layer.kernel_size),
        stride=tuple(layer.stride),
        padding=padding,
        dilation=tuple(layer.dilation),
        padding_mode=layer.padding_mode,
        groups=layer.groups,
    )


def slot_numbers(request: SiteRequest, config: Config, root: nn.Module) -> int:
    """Numbers that one slot of every configured blueprint takes at the site."""
    total = 0
    for name in config.blueprints:
        geometry = geometry_of(request, config.rank, root, get(name).tap)
        if not get(name).refuses(geometry):
            shapes = get(name).shapes(geometry) | blend_shapes(config.blend, geometry.chunk)
            total += sum(torch.Size(shape).numel() for shape in shapes.values())
    return total


def default_slots(requests: Sequence[SiteRequest], config: Config, root: nn.Module) -> dict[str, int]:
    """Slots by path: min(seeds, max(4, 10 %)), shrunk alike until all banks stay within 2 % of the host.

    Parameters are counted on both sides (gradients and moments come to the same multiple of each). One slot
    a site is the least there is.
    """
    wanted = {r.path: min(r.seeds, max(4, -(-r.seeds // 10))) for r in requests}
    if config.slots is not None:
        return {r.path: min(r.seeds, config.slots) for r in requests}
    cost = {r.path: 4 * slot_numbers(r, config, root) for r in requests}
    asked = sum(wanted[path] * cost[path] for path in wanted)
    budget = host_bytes(root) // 50
    if asked <= budget:
        return wanted
    return {path: max(1, int(slots * budget / asked)) for path, slots in wanted.items()}


def host_bytes(root: nn.Module) -> int:
    """Bytes of the host's parameters and buffers, tied ones once."""
    seen = {id(t): t for t in (*root.parameters(), *root.buffers())}
    return sum(t.numel() * t.element_size() for t in seen.values())
