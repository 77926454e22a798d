"""The built-in blueprints, one file each; importing this package registers them."""

from morphc.kernels.blueprints.affine import Affine
from morphc.kernels.blueprints.base import Blueprint, ConvGeometry, Geometry, get, names, register
from morphc.kernels.blueprints.bottleneck import Bottleneck
from morphc.kernels.blueprints.depthwise import Depthwise
from morphc.kernels.blueprints.lowrank import LowRank
from morphc.kernels.blueprints.widen import Widen

for _builtin in (Affine(), LowRank(), Bottleneck(), Widen(), Depthwise()):
    register(_builtin)

__all__ = [
    "Affine",
    "Blueprint",
    "Bottleneck",
    "ConvGeometry",
    "Depthwise",
    "Geometry",
    "LowRank",
    "Widen",
    "get",
    "names",
    "register",
]
