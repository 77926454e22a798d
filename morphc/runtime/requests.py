"""What is asked of a site, and its geometry, which follows from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from morphc.kernels.blueprints.base import ConvGeometry, Geometry
from morphc.kernels.reference.activations import activation
from morphc.kernels.reference.chunks import widest
from morphc.kernels.spec import NO_BLOCK, Block

# What `SeedRoot` keeps under its own names, and an nn.Module in its instances.
_TAKEN = frozenset({"seeds", "slots", "store", "site", "training"})


@dataclass(frozen=True, slots=True, eq=False)
class SiteRequest:
    """One site to make.

    path: the site's key. layer: the layer that gets the child `morphc`. owner: the module whose forward is
    wrapped, where that is not the layer. parameter: name of the parameter of a functional layer; nothing is
    wrapped then, and the caller calls the site. tap_features: width of the layer's input, 0 where it has no
    floating one. slots: of each of the site's banks; None for `Config.slots`, or 4. output_index: which element
    of a tuple output is watched. past_hooks: the layer's forward is called directly, not through its hooks.
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
    past_hooks: bool = False


def functional_name(parameter: str) -> str:
    """Name of a functional layer's site under `morphc`: the parameter's, unless a module has that name itself."""
    plain = parameter.replace(".", "_")
    return f"{plain}_" if plain in _TAKEN or hasattr(nn.Module, plain) else plain


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
        return Geometry(**base, tap_features=0, block_obstacle=NO_BLOCK)
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
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) or is_transposed(layer):
        return len(layer.kernel_size)  # type: ignore[arg-type]
    return 0


def is_transposed(layer: nn.Module) -> bool:
    """Whether the layer is a transposed convolution, whose input lies on another grid than its output."""
    return isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d)


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
