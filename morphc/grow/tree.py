"""Nested states: cloned in memory, or as tensors beside JSON on disk. Nothing is pickled."""

from __future__ import annotations

import math
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from morphc.errors import CheckpointError


def clone(tree: Any) -> Any:
    """A copy that shares nothing with `tree`."""
    if isinstance(tree, Tensor):
        return tree.detach().clone()
    if isinstance(tree, np.ndarray):
        return tree.copy()
    if isinstance(tree, Counter):
        return Counter(tree)
    if isinstance(tree, Mapping):
        return {key: clone(value) for key, value in tree.items()}
    if isinstance(tree, tuple) and not hasattr(tree, "_fields"):
        return tuple(clone(value) for value in tree)
    if isinstance(tree, list | deque):
        return [clone(value) for value in tree]
    return tree


def pack(tree: Any, tensors: dict[str, Tensor], path: str = "") -> Any:
    """`tree` as JSON; its tensors go into `tensors` by the path at which they stand.

    Raises CheckpointError naming the path of what is neither a number, text, tensor, list, tuple nor mapping.
    """
    if tree is None or isinstance(tree, bool | str):
        return tree
    if isinstance(tree, int) and not isinstance(tree, np.integer):
        return tree
    if isinstance(tree, float | np.floating | np.integer):
        number = tree.item() if isinstance(tree, np.floating | np.integer) else tree
        return number if math.isfinite(number) else {"float": repr(float(number))}
    if isinstance(tree, Tensor):
        name = path.lstrip("/")
        tensors[name] = tree.detach().to("cpu", copy=True).contiguous()
        return {"tensor": name}
    if isinstance(tree, np.ndarray):
        name = path.lstrip("/")
        tensors[name] = (
            torch.from_numpy(tree.astype(np.int64)) if tree.dtype.kind in "ui" else torch.tensor(tree)
        )
        return {"array": name, "dtype": str(tree.dtype)}
    if isinstance(tree, Counter):
        return {"counter": [[pack(k, tensors), v] for k, v in tree.items()]}
    if type(tree) in (dict, defaultdict, OrderedDict):
        return {"dict": [[pack(k, tensors), pack(v, tensors, f"{path}/{k}")] for k, v in tree.items()]}
    if type(tree) in (list, tuple, deque):
        kind = "tuple" if isinstance(tree, tuple) else "list"
        return {kind: [pack(value, tensors, f"{path}/{place}") for place, value in enumerate(tree)]}
    raise CheckpointError(
        f"{path.lstrip('/') or 'the state'} is a {type(tree).__name__}, which is neither a tensor nor plain data; "
        "keep this snapshot in memory, or let that state_dict() hold numbers, text and tensors"
    )


def unpack(packed: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Inverse of `pack`. Raises KeyError, TypeError or ValueError for what `pack` didn't write."""
    if packed is None or isinstance(packed, bool | int | float | str):
        return packed
    if not isinstance(packed, dict) or not packed:
        raise ValueError(f"{packed!r} stands for nothing")
    kind = next(iter(packed))
    held = packed[kind]
    if kind == "float":
        return float(held)
    if kind == "tensor":
        return tensors[held]
    if kind == "array":
        return tensors[held].numpy().astype(np.dtype(packed["dtype"]))
    if kind == "counter":
        return Counter({unpack(k, tensors): v for k, v in held})
    if kind == "dict":
        return {unpack(k, tensors): unpack(v, tensors) for k, v in held}
    if kind in ("list", "tuple"):
        values = [unpack(value, tensors) for value in held]
        return tuple(values) if kind == "tuple" else values
    raise ValueError(f"{kind!r} stands for nothing")
