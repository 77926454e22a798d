"""Copies of what a forward may change: so that a run of the compiler's own leaves nothing behind.

`private_copy` copies an attribute's or argument's value: containers, partials, plain tensors, arrays, generators, and
objects of the user's classes with what is in them. Modules, functions and whatever refuses to be copied stay
themselves, and so do parameters and other leaves that collect gradients, unless they are asked for too.
"""

from __future__ import annotations

import copy
import functools
import random
import sys
import types
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch
from torch import nn

MAX_DEPTH = 6
_MOST_BYTES = 1 << 30
_KEPT = (nn.Module, nn.Parameter, type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType)
_FILLED_LATER = (list, dict, set, deque, types.SimpleNamespace)
_RANDOM = (random.Random, np.random.Generator, np.random.RandomState)


def private_copy(value: Any, memo: dict[int, Any], depth: int = 0, *, leaves: bool = False) -> Any:
    """A copy of `value` that can be changed without `value` noticing.

    memo: id -> copy, for all values copied together: aliases stay aliases. The originals must outlive it. leaves:
    copy tensors that collect gradients too, parameters among them.
    """
    if id(value) in memo:
        return memo[id(value)]
    if is_proxy(value) or depth > MAX_DEPTH:
        return value
    if isinstance(value, nn.Parameter) and leaves:
        return _remember(memo, value, copy.deepcopy(value))
    if isinstance(value, _KEPT):
        return value
    if isinstance(value, torch.Tensor):
        return _remember(memo, value, _leaf(value) if leaves else _tensor(value))
    if isinstance(value, np.ndarray):
        return _remember(memo, value, value.copy())
    if isinstance(value, torch.Generator):
        return _remember(memo, value, value.clone_state())
    if isinstance(value, _RANDOM):
        return _remember(memo, value, copy.deepcopy(value))
    if isinstance(value, types.MethodType):
        target = private_copy(value.__self__, memo, depth + 1, leaves=leaves)
        return value if target is value.__self__ else types.MethodType(value.__func__, target)
    if type(value) is functools.partial:
        return _partial(value, memo, depth, leaves)
    if isinstance(value, tuple):
        items = [private_copy(item, memo, depth + 1, leaves=leaves) for item in value]
        if all(new is old for new, old in zip(items, value, strict=True)):
            return value
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, list | dict | set | deque) or is_users_object(value):
        return _container(value, memo, depth, leaves)
    return value


def is_users_object(value: object) -> bool:
    """An instance of a class of somebody's own that keeps its state in a `__dict__` or in slots."""
    if is_proxy(value) or isinstance(value, (torch.Tensor, types.MethodType, BaseException, *_KEPT)):
        return False
    root = (type(value).__module__ or "").partition(".")[0]
    if root in ("torch", "morphc", "builtins", "functools"):
        return False
    # Python's own classes with slots alone are values (paths, fractions) or references (weak ones).
    return hasattr(value, "__dict__") or (
        root not in sys.stdlib_module_names and next(slot_names(type(value)), None) is not None
    )


def is_proxy(value: object) -> bool:
    """Whether it is a `weakref.proxy`. One that is dead raises at every `isinstance`."""
    return type(value) in weakref.ProxyTypes


def behind(proxy: Any) -> Any:
    """What a `weakref.proxy` stands for; None if that is gone."""
    try:
        return proxy.__repr__.__self__
    except (ReferenceError, AttributeError):
        return None


def slot_names(cls: type) -> Iterator[str]:
    """The attributes that a class and its bases declare in `__slots__`, as they are named on an instance."""
    for base in cls.__mro__:
        declared = base.__dict__.get("__slots__", ())
        for slot in (declared,) if isinstance(declared, str) else declared:
            if slot in ("__dict__", "__weakref__"):
                continue
            private = slot.startswith("__") and not slot.endswith("__")
            yield f"_{base.__name__.lstrip('_')}{slot}" if private else slot


def held_by(value: object) -> dict[str, Any]:
    """The attributes of a user's object, those in slots among them."""
    held = dict(getattr(value, "__dict__", {}))
    for slot in slot_names(type(value)):
        with suppress(AttributeError):  # never set
            held[slot] = object.__getattribute__(value, slot)
    return held


def give(value: Any, attributes: dict[str, Any]) -> bool:
    """Set attributes of a user's object, past its own `__setattr__`. False if a slot refuses."""
    slots = set(slot_names(type(value)))
    if hasattr(value, "__dict__"):
        vars(value).update((name, item) for name, item in attributes.items() if name not in slots)
    try:
        for name in slots & attributes.keys():
            object.__setattr__(value, name, attributes[name])
    except (AttributeError, TypeError):
        return False
    return True


def _remember(memo: dict[int, Any], value: Any, fresh: Any) -> Any:
    memo[id(value)] = fresh
    return fresh


def _tensor(value: torch.Tensor) -> torch.Tensor:
    # A leaf that collects gradients is somebody's parameter, registered or not.
    if value.is_meta or value.requires_grad or value.layout != torch.strided:
        return value
    return value.clone()


def _leaf(value: torch.Tensor) -> torch.Tensor:
    # What has a history was computed from other tensors, and a copy would not be.
    if value.grad_fn is not None:
        return value
    return value.detach().clone().requires_grad_(value.requires_grad)


def _partial(value: functools.partial[Any], memo: dict[int, Any], depth: int, leaves: bool) -> Any:
    parts = value.func, value.args, value.keywords
    func, args, keywords = (private_copy(part, memo, depth + 1, leaves=leaves) for part in parts)
    same = func is value.func and args is value.args
    if same and all(keywords[name] is item for name, item in value.keywords.items()):
        return value
    fresh = _remember(memo, value, functools.partial(func, *args, **keywords))
    vars(fresh).update(vars(value))
    return fresh


def _container(value: Any, memo: dict[int, Any], depth: int, leaves: bool) -> Any:
    fresh = shallow(value)
    memo[id(value)] = fresh
    if fresh is value:
        return value
    if isinstance(value, list | deque):
        for index, item in enumerate(value):
            fresh[index] = private_copy(item, memo, depth + 1, leaves=leaves)
    elif isinstance(value, dict):
        for key, item in value.items():
            dict.__setitem__(fresh, key, private_copy(item, memo, depth + 1, leaves=leaves))
    if hasattr(value, "__dict__") or is_users_object(value):
        held = held_by(value)
        copied = {name: private_copy(item, memo, depth + 1, leaves=leaves) for name, item in held.items()}
        if not give(fresh, copied):
            return _remember(memo, value, value)
    return fresh


def shallow(value: Any) -> Any:
    """`copy.copy(value)`, or the value itself where its class refuses or its copy would share its `__dict__`."""
    if is_users_object(value) and not held_by(value) and not isinstance(value, _FILLED_LATER):
        return value  # an object without state is a mark that is compared by `is`
    try:
        fresh = copy.copy(value)
    except Exception:  # a foreign class may refuse in any way; what can't be copied stays shared
        return value
    shared = getattr(fresh, "__dict__", None) is getattr(value, "__dict__", ...)
    if type(fresh) is not type(value) or shared:
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
