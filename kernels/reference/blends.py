"""How a slot's result s joins its chunk x at strength a. Each is x itself at a = 0; the caller selects there.

residual   y = x + a s
lerp       y = (1 - a) x + a s
multiply   y = x (1 + a tanh s)
gate       y = x + a sigmoid(g(x)) s,    g(x) = x . w + b with the slot's own w [C] and b
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from morphc.config import BLENDS
from morphc.errors import UnknownNameError


def blend_shapes(name: str, chunk: int) -> dict[str, tuple[int, ...]]:
    """The parameters that a blend adds to every slot, without the slot axis. They are zero at birth."""
    if name not in BLENDS:
        raise UnknownNameError("blend", name, BLENDS)
    return {"gate_weight": (chunk,), "gate_bias": (1,)} if name == "gate" else {}


def blend(name: str, x: Tensor, s: Tensor, alpha: Tensor, params: Mapping[str, Tensor]) -> Tensor:
    """x, s: [K, rows, C] or [K, N, C, *spatial]; alpha: [K]."""
    spatial = x.dim() - 3
    a = alpha.view(-1, *(1,) * (x.dim() - 1))
    if name == "residual":
        return x + a * s
    if name == "lerp":
        return (1 - a) * x + a * s
    if name == "multiply":
        return x * (1 + a * torch.tanh(s))
    if name == "gate":
        weight = params["gate_weight"].view(x.shape[0], 1, -1, *(1,) * spatial)
        score = (x * weight).sum(2, keepdim=True) + params["gate_bias"].view(-1, *(1,) * (x.dim() - 1))
        return x + a * torch.sigmoid(score) * s
    raise UnknownNameError("blend", name, BLENDS)
