"""One step of isolated training: a slot learns to give its chunk back.

The loss of slot k is the mean of (s - x)^2 over the rows and the chunk's own columns, where s is what the blueprint
makes of the chunk x. No gradient reaches x.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from morphc.kernels.blueprints.base import Blueprint, Geometry


def reconstruct(
    x: Tensor, inside: Tensor, params: Mapping[str, Tensor], blueprint: Blueprint, geometry: Geometry
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss [K] and the gradient of every parameter [K, ...]; zero for a parameter that only a blend reads.

    x: [K, rows, C], zeros in padding; inside: [K, C], which columns are the chunk's own.
    """
    leaves = {name: param.detach().requires_grad_() for name, param in params.items()}
    with torch.enable_grad():
        miss = torch.where(inside.unsqueeze(1), blueprint.apply(x.detach(), leaves, geometry) - x.detach(), 0)
        loss = miss.square().sum((1, 2)) / (x.shape[1] * inside.sum(1)).clamp(min=1)
        found = torch.autograd.grad(loss.sum(), list(leaves.values()), allow_unused=True)
    grads = {
        name: torch.zeros_like(leaf) if grad is None else grad
        for (name, leaf), grad in zip(leaves.items(), found, strict=True)
    }
    return loss.detach(), grads
