"""What a blueprint is: the kind of module that a slot holds.

A blueprint is stateless; the parameters of all slots of one site live in a *bank*: tensors with a leading
slot axis. So every function here is written for all slots at once and never loops over them.

Shapes: K slots, N batch, `rows` all positions flattened, C the chunk's width (the widest chunk of the site;
narrower ones are padded with zeros, and what stands in a padded column of the result is never looked at).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

import msgspec
import torch
from torch import Generator, Tensor

from morphc.errors import ConfigError, UnknownNameError

if TYPE_CHECKING:
    import sympy

Tap = Literal["chunk", "layer", "block"]
Arrangement = Literal["rows", "spatial"]


class ConvGeometry(msgspec.Struct, frozen=True):
    """How a convolution walks its input; tuples have one entry per spatial axis."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    padding_mode: str = "zeros"
    groups: int = 1


class Geometry(msgspec.Struct, frozen=True):
    """What a blueprint must know about the place it is put in.

    features, chunk: width of the site and of its widest chunk. rank: hidden width. tap_features: width of
    what it reads. spatial: number of spatial axes (0 behind a Linear). layer_conv: the host layer's own
    convolution for a `layer` tap. block_in, block_out: the two convolutions of a block for a `block` tap,
    None for Linear. activation: the block's own pointwise function. gated: the block multiplies two
    branches. block_obstacle: why the block can't be widened, empty when it can.
    """

    features: int
    chunk: int
    rank: int
    tap_features: int
    spatial: int = 0
    layer_conv: ConvGeometry | None = None
    block_in: ConvGeometry | None = None
    block_out: ConvGeometry | None = None
    activation: str = "gelu"
    gated: bool = False
    block_obstacle: str = ""


class Blueprint(ABC):
    """One kind of slot module. Subclass it, and register an instance with `register`.

    name: as users write it. tap: what it reads. arrangement: `rows` gets chunk taps as [K, rows, C] and
    layer or block taps as [rows, in]; `spatial` gets chunk taps as [K, N, C, *spatial] and layer or block
    taps as [N, in, *spatial]. The result is [K, rows, C] or [K, N, C, *spatial], to match. (Behind a
    convolution the layer and block taps are always spatial.)

    template: Jinja macros for its Triton kernels: a file (relative to the one that defines the class) or, if
    there is a line break in it, the template's text. None for a built-in one, which morphc brings itself, and
    for a blueprint that runs on the torch backend only.
    """

    name: ClassVar[str]
    tap: ClassVar[Tap]
    arrangement: ClassVar[Arrangement] = "rows"
    template: ClassVar[str | None] = None

    def refuses(self, geometry: Geometry) -> str:
        """Why this blueprint can't be used there, or an empty string."""
        return ""

    def is_spatial(self, geometry: Geometry) -> bool:
        """Whether the result is [K, N, C, *spatial] there, and not [K, rows, C]."""
        return self.arrangement == "spatial" or (self.tap != "chunk" and geometry.spatial > 0)

    @abstractmethod
    def shapes(self, geometry: Geometry) -> dict[str, tuple[int, ...]]:
        """Shape of each parameter of one slot, without the slot axis."""

    @abstractmethod
    def init(self, geometry: Geometry, slots: int, generator: Generator) -> dict[str, Tensor]:
        """Fresh float32 parameters [slots, *shape] on the CPU, with which the result is exactly zero.

        `generator` is morphc's own: the global one is never drawn from.
        """

    @abstractmethod
    def apply(self, x: Tensor, params: Mapping[str, Tensor], geometry: Geometry) -> Tensor:
        """The plain-torch reference: differentiable, for all slots at once."""

    def outs(self, geometry: Geometry) -> tuple[str, ...]:
        """The parameters in which the result is linear, and which are zero at birth; () where there are none.

        At a graft they get the size that lowers the loss most. Where `has_basis`, the first is what `basis` is
        multiplied with.
        """
        return ()

    def has_basis(self, geometry: Geometry) -> bool:
        """Whether the result is `basis @ params[outs[0]]`, [K, rows, R] by [K, R, C], plus what the other outs add."""
        return False

    def basis(self, x: Tensor, params: Mapping[str, Tensor], geometry: Geometry) -> Tensor:
        """[K, rows, R]: what the first of `outs` multiplies."""
        raise NotImplementedError(f"blueprint {self.name!r} has no basis")

    def is_homogeneous(self, geometry: Geometry) -> bool:
        """Whether `in_*` may be scaled up and `outs` down by one positive factor without changing the result."""
        return False

    @abstractmethod
    def flops(self, geometry: Geometry, rows: sympy.Expr) -> sympy.Expr:
        """Multiply-adds counted twice, of one slot's forward, in the number of rows."""


def uniform(shape: tuple[int, ...], fan_in: int, generator: Generator) -> Tensor:
    """Uniform in +-1/sqrt(fan_in), what `nn.Linear` and `nn.Conv` start from."""
    bound = fan_in**-0.5
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


_REGISTRY: dict[str, Blueprint] = {}


def register(blueprint: Blueprint, *, replace: bool = False) -> Blueprint:
    """Make `blueprint` known under its name. Raises ConfigError if the name is taken."""
    if blueprint.name in _REGISTRY and not replace:
        raise ConfigError(
            f"blueprint {blueprint.name!r} is registered already; pass replace=True to override"
        )
    _REGISTRY[blueprint.name] = blueprint
    return blueprint


def get(name: str) -> Blueprint:
    """The blueprint of that name. Raises UnknownNameError with the nearest known one."""
    if name not in _REGISTRY:
        raise UnknownNameError("blueprint", name, _REGISTRY)
    return _REGISTRY[name]


def names() -> tuple[str, ...]:
    """All registered names."""
    return tuple(sorted(_REGISTRY))
