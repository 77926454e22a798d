"""Copies of what a forward may change: so that a run of the compiler's own leaves nothing behind.

`private_copy` copies an attribute's or argument's value: containers, plain tensors, arrays, generators, and objects
of the user's classes with what is in them. Modules, parameters, functions and whatever refuses to be copied stay
themselves.
"""

from __future__ import annotations

import copy
import random
import types
from collections import deque
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

MAX_DEPTH = 6
_MOST_BYTES = 1 << 30
_KEPT = (nn.Module, nn.Parameter, type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType)
_RANDOM = (random.Random, np.random.Generator, np.random.RandomState)


def private_copy(value: Any, memo: dict[int, Any], depth: int = 0) -> Any:
    """A copy of `value` that can be changed without `value` noticing.

    memo: id -> copy, for all values copied together: aliases stay aliases. The originals must outlive it.
    """
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, _KEPT) or depth > MAX_DEPTH:
        return value
    if isinstance(value, torch.Tensor):
        return _remember(memo, value, _tensor(value))
    if isinstance(value, np.ndarray):
        return _remember(memo, value, value.copy())
    if isinstance(value, torch.Generator):
        return _remember(memo, value, value.clone_state())
    if isinstance(value, _RANDOM):
        return _remember(memo, value, copy.deepcopy(value))
    if isinstance(value, types.MethodType):
        target = private_copy(value.__self__, memo, depth + 1)
        return value if target is value.__self__ else types.MethodType(value.__func__, target)
    if isinstance(value, tuple):
        items = [private_copy(item, memo, depth + 1) for item in value]
        if all(new is old for new, old in zip(items, value, strict=True)):
            return value
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, list | dict | set | deque) or is_users_object(value):
        return _container(value, memo, depth)
    return value


def is_users_object(value: object) -> bool:
    """An instance of a class of somebody's own that keeps its state in a `__dict__`."""
    if isinstance(value, (torch.Tensor, types.MethodType, BaseException, *_KEPT)):
        return False
    root = (type(value).__module__ or "").partition(".")[0]
    return root not in ("torch", "morphc", "builtins", "functools") and hasattr(value, "__dict__")


def _remember(memo: dict[int, Any], value: Any, fresh: Any) -> Any:
    memo[id(value)] = fresh
    return fresh


def _tensor(value: torch.Tensor) -> torch.Tensor:
    # A leaf that collects gradients is somebody's parameter, registered or not.
    if value.is_meta or value.requires_grad or value.layout != torch.strided:
        return value
    return value.clone()


def _container(value: Any, memo: dict[int, Any], depth: int) -> Any:
    fresh = shallow(value)
    memo[id(value)] = fresh
    if fresh is value:
        return value
    if isinstance(value, list | deque):
        for index, item in enumerate(value):
            fresh[index] = private_copy(item, memo, depth + 1)
    elif isinstance(value, dict):
        for key, item in value.items():
            dict.__setitem__(fresh, key, private_copy(item, memo, depth + 1))
    if hasattr(value, "__dict__"):
        own: MutableMapping[str, Any] = vars(fresh)
        for name, item in vars(value).items():
            own[name] = private_copy(item, memo, depth + 1)
    return fresh


def shallow(value: Any) -> Any:
    """`copy.copy(value)`, or the value itself where its class refuses or its copy would share its `__dict__`."""
    if is_users_object(value) and not vars(value) and not isinstance(value, list | dict | set | deque):
        return value  # an object without state is a mark that is compared by `is`
    try:
        fresh = copy.copy(value)
    except Exception:  # a foreign class may refuse in any way; what can't be copied stays shared
        return value
    if type(fresh) is not type(value) or (hasattr(value, "__dict__") and vars(fresh) is vars(value)):
        return value
    return fresh


class KeptParameters:
    """Values and gradients of the parameters, to be put back: a forward may normalise or clip its own weights.

    Nothing is kept on meta, nor above `_MOST_BYTES` in all, where a second copy may not fit.
    """

    def __init__(self, *roots: nn.Module) -> None:
        found = {id(p): p for root in roots for p in root.parameters() if not p.is_meta}
        size = sum(p.numel() * p.element_size() for p in found.values())
        kept = found.values() if size <= _MOST_BYTES else ()
        self.values = [(p, p.data, p.data.clone()) for p in kept]
        self.grads = [(p, p.grad, None if p.grad is None else p.grad.clone()) for p in found.values()]

    def restore(self) -> None:
        """Put back what differs. Values are compared: an update of `.data` leaves no other trace."""
        for parameter, data, value in self.values:
            if parameter.data.data_ptr() != data.data_ptr():
                parameter.data = data
            if data.layout == torch.strided and not torch.equal(data, value):
                data.copy_(value)
        for parameter, grad, before in self.grads:
            if parameter.grad is not grad:
                parameter.grad = grad
            if grad is not None and before is not None and not torch.equal(grad, before):
                grad.copy_(before)


@contextmanager
def kept_random_state() -> Iterator[None]:
    """Put Python's and numpy's global generators back as they were."""
    states = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
