"""Row-wise AdamW (Loshchilov & Hutter 2019, algorithm 2): every slot has its own moments and its own step."""

from __future__ import annotations

import torch
from torch import Tensor


def adamw_rows(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    rows: Tensor,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
) -> None:
    """Update in place the slots where `rows` is true; nothing of the others moves, whatever they hold.

    param, grad, exp_avg, exp_avg_sq: [K, ...]; step: [K] int64, already counting this update; rows: [K] bool.
    """
    shape = (-1, *(1,) * (param.dim() - 1))
    chosen = rows.view(shape)
    beta1, beta2 = betas
    steps = step.to(param.dtype)
    correction1 = (1 - torch.pow(beta1, steps)).view(shape)
    correction2 = (1 - torch.pow(beta2, steps)).view(shape)
    first = torch.lerp(exp_avg, grad, 1 - beta1)
    second = exp_avg_sq * beta2 + grad * grad * (1 - beta2)
    denominator = second.sqrt() / correction2.sqrt() + eps
    updated = param * (1 - lr * weight_decay) - lr * (first / correction1) / denominator
    exp_avg.copy_(torch.where(chosen, first, exp_avg))
    exp_avg_sq.copy_(torch.where(chosen, second, exp_avg_sq))
    param.copy_(torch.where(chosen, updated, param))
