"""Pointwise functions by name: what a site's epilogue or a block's own activation can be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F

from morphc.errors import UnknownNameError

Pointwise = Callable[[Tensor], Tensor]


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _relu_squared(x: Tensor) -> Tensor:
    return F.relu(x).square()


def _identity(x: Tensor) -> Tensor:
    return x


ACTIVATIONS: Final[Mapping[str, Pointwise]] = MappingProxyType(
    {
        "celu": F.celu,
        "elu": F.elu,
        "gelu": F.gelu,
        "gelu_tanh": _gelu_tanh,
        "hardsigmoid": F.hardsigmoid,
        "hardswish": F.hardswish,
        "hardtanh": F.hardtanh,
        "identity": _identity,
        "leaky_relu": F.leaky_relu,
        "logsigmoid": F.logsigmoid,
        "mish": F.mish,
        "quick_gelu": _quick_gelu,
        "relu": F.relu,
        "relu6": F.relu6,
        "relu_squared": _relu_squared,
        "selu": F.selu,
        "sigmoid": torch.sigmoid,
        "silu": F.silu,
        "softplus": F.softplus,
        "softsign": F.softsign,
        "tanh": torch.tanh,
    }
)

DEAD_BELOW_ZERO: Final = frozenset({"relu", "relu6", "relu_squared"})
"""Functions that are exactly zero wherever x <= 0 and nowhere else."""

DEAD_ONLY_AT_ZERO: Final = frozenset({"celu", "elu", "identity", "leaky_relu", "selu", "softsign", "tanh"})
"""Functions that are exactly zero at x = 0 only."""

DEAD_FAR_BELOW_ZERO: Final[Mapping[str, float]] = MappingProxyType(
    {"gelu": -5.0, "gelu_tanh": -4.5, "mish": -60.0, "quick_gelu": -40.0, "silu": -80.0}
)
"""Functions that are exactly zero at x = 0, and below the bound where float32 runs out of digits."""


def activation(name: str) -> Pointwise:
    """The function of that name. Raises UnknownNameError with the nearest known one."""
    if name not in ACTIVATIONS:
        raise UnknownNameError("activation", name, ACTIVATIONS)
    return ACTIVATIONS[name]
