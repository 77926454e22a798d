"""What a blueprint with a layer or block tap reads: z = tap W + b for every listed slot, and its gradients.

tap [rows, T] · weight [K, T, R] of all slots · slots [n] those that are listed, in that order · z, dz [n, rows, R]
"""

from __future__ import annotations

import torch
from torch import Tensor


def products(tap: Tensor, weight: Tensor) -> Tensor:
    """tap @ weight [K, rows, R] of all slots, in one product: as a batch of narrow ones it takes up to twenty times
    as long on a CPU.
    """
    slots, width, rank = weight.shape
    side_by_side = weight.transpose(0, 1).reshape(width, slots * rank)
    return (tap @ side_by_side).view(tap.shape[0], slots, rank).transpose(0, 1)


def project(tap: Tensor, weight: Tensor, bias: Tensor | None, slots: Tensor) -> Tensor:
    """z [n, rows, R]; bias: [K, R] or None."""
    z = torch.matmul(tap, weight[slots])
    return z if bias is None else z + bias[slots].unsqueeze(1)


def tap_gradient(dz: Tensor, weight: Tensor, slots: Tensor) -> Tensor:
    """[rows, T]: the sum over the slots of dz W^T."""
    return torch.einsum("nru,ntu->rt", dz, weight[slots])


def weight_gradient(tap: Tensor, dz: Tensor, slots: Tensor, count: int) -> Tensor:
    """[count, T, R]: tap^T dz of each of `slots`, zero for the others of the `count`."""
    gradient = tap.new_zeros(count, tap.shape[1], dz.shape[2])
    gradient[slots] = torch.einsum("rt,nru->ntu", tap, dz)
    return gradient
