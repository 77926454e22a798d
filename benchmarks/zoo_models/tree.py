"""Output trees: walking them, a loss over them, comparing them bit for bit."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
OPAQUE = (nn.Module, type, types.FunctionType, types.MethodType, torch.dtype, torch.device)


def leaves(value: Any, path: str = "", seen: frozenset[int] = frozenset()) -> Iterator[tuple[str, Any]]:
    """`(path, leaf)` of tensors, arrays and plain values, and `(path, type)` of each container.

    1. tensors, numpy arrays, numbers, strings, None: as they are
    2. mappings, lists, tuples (named ones too), sets, generators: item by item
    3. dataclasses and any other object with a `__dict__` (caches): attribute by attribute
    """
    if isinstance(value, Tensor | np.ndarray | np.generic | int | float | complex | str | bytes | None):
        yield path, value
        return
    yield path, type(value)
    if isinstance(value, OPAQUE) or id(value) in seen:
        return
    seen = seen | {id(value)}
    if isinstance(value, Mapping):
        parts: Any = [(f"{path}[{key!r}]", item) for key, item in value.items()]
    elif isinstance(value, list | tuple | set | types.GeneratorType | map | zip):
        parts = ((f"{path}[{index}]", item) for index, item in enumerate(value))
    elif dataclasses.is_dataclass(value):
        parts = [(f"{path}.{field.name}", getattr(value, field.name)) for field in dataclasses.fields(value)]
    else:
        parts = [(f"{path}.{key}", item) for key, item in getattr(value, "__dict__", {}).items()]
    for name, item in parts:
        yield from leaves(item, name, seen)


def real(tensor: Tensor) -> Tensor:
    """The tensor as dense real values."""
    if tensor.is_nested:
        tensor = tensor.to_padded_tensor(0.0)
    if tensor.is_quantized:
        tensor = tensor.int_repr()
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def bits(tensor: Tensor) -> Tensor:
    """A copy of the bit patterns as integers: -0.0 differs from 0.0, and a NaN equals itself."""
    dense = real(tensor.detach()).resolve_conj().resolve_neg().contiguous()
    if dense.dtype == torch.bool:
        return dense.to(torch.uint8)
    return dense.flatten().view(INTEGERS[dense.element_size()]).clone()


@dataclass(frozen=True)
class Frozen:
    """A tensor as it was when it was recorded."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    requires_grad: bool
    bits: Tensor

    @classmethod
    def of(cls, tensor: Tensor) -> Frozen:
        """Record a tensor."""
        strided = not tensor.is_nested and tensor.layout == torch.strided
        return cls(
            tensor.dtype,
            tuple(real(tensor).shape),
            tensor.stride() if strided else (),
            tensor.requires_grad,
            bits(tensor),
        )

    def difference(self, other: Frozen) -> str:
        """How the other one differs; empty if it doesn't."""
        for field in ("dtype", "shape", "stride", "requires_grad"):
            mine, its = getattr(self, field), getattr(other, field)
            if mine != its:
                return f"{field} {mine} became {its}"
        if torch.equal(self.bits, other.bits):
            return ""
        wrong = int((self.bits != other.bits).sum())
        detail = ""
        if self.dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
            gap = (self.bits.view(self.dtype).double() - other.bits.view(self.dtype).double()).abs().max()
            detail = f", largest gap {gap.item():.3g}"
        return f"{wrong} of {self.bits.numel()} elements differ{detail}"


def freeze(value: Any) -> dict[str, Any]:
    """Path -> leaf, tensors recorded by their bits."""
    return {
        path: Frozen.of(leaf)
        if isinstance(leaf, Tensor)
        else leaf.tolist()
        if hasattr(leaf, "tolist")
        else leaf
        for path, leaf in leaves(value)
    }


def differences(expected: dict[str, Any], got: dict[str, Any]) -> list[str]:
    """One line for each leaf that is missing, new, or not the same bits."""
    found = [f"{path or 'value'}: missing" for path in expected if path not in got]
    found += [f"{path or 'value'}: not in the host" for path in got if path not in expected]
    for path, leaf in expected.items():
        other = got.get(path, leaf)
        if isinstance(leaf, Frozen) and isinstance(other, Frozen):
            gap = leaf.difference(other)
        elif isinstance(leaf, Frozen) or isinstance(other, Frozen):
            gap = f"a {type(leaf).__name__} became a {type(other).__name__}"
        else:
            gap = "" if repr(leaf) == repr(other) else f"{leaf!r} became {other!r}"
        if gap:
            found.append(f"{path or 'value'}: {gap}")
    return found


def loss(output_leaves: list[tuple[str, Any]]) -> Tensor | None:
    """Sum of every differentiable leaf times fixed pseudo-random weights; None when there is none.

    The weights make gradients asymmetric: a permuted or a dropped element shows.
    """
    total: Tensor | None = None
    for index, (_, leaf) in enumerate(output_leaves):
        if not isinstance(leaf, Tensor) or not leaf.requires_grad:
            continue
        value = real(leaf)
        generator = torch.Generator().manual_seed(1000 + index)
        weights = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        term = (value.double() * weights).sum()
        total = term if total is None else total + term
    return total
