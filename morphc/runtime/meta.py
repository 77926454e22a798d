"""Tensors of morphc's own on the meta device: what values they start with, and where they go when the model leaves it.

The seeds' state and the banks have values that no checkpoint of the host holds. So whatever takes them off meta, be it
`to_empty`, `load_state_dict(assign=True)` or their first use, gives them those of a model compiled on a real device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn


def started(fn: Callable[[Tensor], Tensor], tensor: Tensor, start: int = 0) -> Tensor:
    """`fn(tensor)`, as `nn.Module._apply` calls it; full of `start` where that took a tensor off the meta device."""
    moved = fn(tensor)
    return torch.full_like(moved, start) if tensor.is_meta and not moved.is_meta else moved


def refuses(fn: Callable[[Tensor], Tensor], tensor: Tensor) -> bool:
    """Whether `fn` is a move that finds no values to copy: torch's `.to(device)` of a tensor on meta."""
    try:
        fn(tensor)
    except NotImplementedError:
        return True
    return False


def leave(module: nn.Module, device: torch.device) -> None:
    """Give start values on `device` to what of `module` is still on meta."""
    if any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers())):
        module._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t)  # type: ignore[no-untyped-call]


def device_of(tensors: Iterable[tuple[str, Tensor]], reserved: str) -> torch.device | None:
    """Of the first tensor off meta whose name has no part `reserved`; None where there is none."""
    for name, tensor in tensors:
        if not tensor.is_meta and reserved not in name.split("."):
            return tensor.device
    return None
