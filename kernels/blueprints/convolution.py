"""The convolution that conv blueprints share: `torch.nn.functional.conv{1,2,3}d` with a host's geometry."""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn import functional as F

from morphc.kernels.blueprints.base import ConvGeometry

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def volume(conv: ConvGeometry | None) -> int:
    """Taps of the kernel: 9 for 3 x 3, 1 where there is no convolution."""
    return math.prod(conv.kernel) if conv is not None else 1


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, conv: ConvGeometry, groups: int | None = None
) -> Tensor:
    """x: [N, in, *spatial], weight: [out, in / groups, *kernel] -> [N, out, *spatial]."""
    groups = conv.groups if groups is None else groups
    padding = conv.padding
    if conv.padding_mode != "zeros":
        x = F.pad(x, _explicit(conv), mode=conv.padding_mode)
        padding = (0,) * len(conv.kernel)
    function = _CONV[len(conv.kernel)]
    out: Tensor = function(x, weight, bias, conv.stride, padding, conv.dilation, groups)
    return out


def _explicit(conv: ConvGeometry) -> list[int]:
    """`F.pad`'s list, last axis first, as `torch.nn.modules.conv._ConvNd` makes it."""
    pads: list[int] = []
    for axis in reversed(range(len(conv.kernel))):
        if conv.padding == "same":
            total = conv.dilation[axis] * (conv.kernel[axis] - 1)
            pads += [total // 2, total - total // 2]
        elif conv.padding == "valid":
            pads += [0, 0]
        else:
            pads += [int(conv.padding[axis])] * 2
    return pads
