"""A shallow clone of a module tree: new module objects, the same Parameter and buffer tensors.

A deepcopy with a memo for the parameters breaks on locks, on generators and on legacy weight_norm; here only
module objects are new, and whatever pointed at an old module from inside the tree points at its clone:

1. children, ties between them included (one clone for each module object);
2. modules, and bound methods of modules, kept in plain attributes, lists, tuples, dicts, sets and partials;
3. hooks: the dicts are new (a hook put on the clone is not on the host), bound-method hooks are rebound.

TorchScript modules can't be cloned (their state lives in C++) and are shared as they are.
"""

from __future__ import annotations

import copy
import functools
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar, cast

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)

_OWN_DICTS = ("_parameters", "_buffers", "_modules")
_MAX_DEPTH = 6


def clone_tree(
    root: M, *, copy_tensors: bool = False, attributes: Callable[[nn.Module], Mapping[str, Any]] = vars
) -> M:
    """Clone `root` and every module below it.

    copy_tensors: give the clone tensors of its own (ties kept) instead of sharing the host's. attributes: what
    each clone is filled with, `vars` of the module unless told otherwise.
    """
    memo: dict[int, nn.Module] = {}
    originals = list(_all_modules(root, attributes))
    for module in originals:
        if isinstance(module, torch.jit.ScriptModule):
            memo[id(module)] = copy.deepcopy(module) if copy_tensors else module
            continue
        memo[id(module)] = object.__new__(type(module))
    rebind = _Rebinder(memo)
    for module in originals:
        clone = memo[id(module)]
        if clone is not module and not isinstance(module, torch.jit.ScriptModule):
            _fill(clone, module, rebind, attributes(module))
    result = cast(M, memo[id(root)])
    if copy_tensors:
        _own_tensors(result)
    return result


def _all_modules(
    root: nn.Module, attributes: Callable[[nn.Module], Mapping[str, Any]]
) -> Iterator[nn.Module]:
    """`root.modules()` and the modules reachable only through plain attributes."""
    seen: set[int] = set()
    stack = [root]
    while stack:
        module = stack.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield module
        if isinstance(module, torch.jit.ScriptModule):
            continue
        own = attributes(module)
        stack.extend(child for child in own["_modules"].values() if child is not None)
        for name, value in own.items():
            if name not in _OWN_DICTS:
                stack.extend(_modules_in(value, 0))


def _modules_in(value: object, depth: int) -> list[nn.Module]:
    """Modules inside a plain attribute's value: containers are walked, foreign objects are not."""
    if isinstance(value, nn.Module):
        return [value]
    if depth >= _MAX_DEPTH:
        return []
    if isinstance(value, types.MethodType):
        return [value.__self__] if isinstance(value.__self__, nn.Module) else []
    if isinstance(value, functools.partial):
        return _modules_in([value.func, value.args, value.keywords], depth + 1)
    if isinstance(value, dict):
        values = list(value.values())
    elif isinstance(value, list | tuple | set | frozenset):
        values = list(value)
    else:
        return []
    return [module for item in values for module in _modules_in(item, depth + 1)]


class _Rebinder:
    """Replaces references to old modules by references to their clones, copying only what contains one."""

    def __init__(self, memo: dict[int, nn.Module]) -> None:
        self.memo = memo
        self.containers: dict[int, object] = {}

    def __call__(self, value: Any, depth: int = 0) -> Any:
        if isinstance(value, nn.Module):
            return self.memo.get(id(value), value)
        if depth >= _MAX_DEPTH:
            return value
        if isinstance(value, types.MethodType):
            target = self.memo.get(id(value.__self__))
            return value if target is None else types.MethodType(value.__func__, target)
        if isinstance(value, functools.partial):
            func, args, keywords = (
                self(part, depth + 1) for part in (value.func, value.args, value.keywords)
            )
            same = func is value.func and args is value.args and keywords is value.keywords
            return value if same else functools.partial(func, *args, **keywords)
        if isinstance(value, list | dict | set):
            return self._mutable(value, depth)
        if isinstance(value, tuple):
            items = [self(item, depth + 1) for item in value]
            if all(new is old for new, old in zip(items, value, strict=True)):
                return value
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        return self._wrapped_hook(value)

    def _mutable(self, value: Any, depth: int) -> Any:
        """Lists, dicts and sets are always copied: appending to the clone's must not show in the host's."""
        if id(value) in self.containers:
            return self.containers[id(value)]
        try:
            fresh = copy.copy(value)
        except Exception:  # a container of foreign making that refuses to be copied stays shared
            return value
        self.containers[id(value)] = fresh
        if isinstance(value, list):
            for index, item in enumerate(value):
                fresh[index] = self(item, depth + 1)
        elif isinstance(value, dict):
            for key, item in value.items():
                fresh[key] = self(item, depth + 1)
        elif any(isinstance(item, nn.Module) for item in value):
            fresh.clear()
            fresh.update(self(item, depth + 1) for item in value)
        return fresh

    def _wrapped_hook(self, value: Any) -> Any:
        """torch wraps `with_module=True` hooks in an object that keeps the module weakly; make another."""
        if type(value).__name__ != "_WrappedHook" or not hasattr(value, "hook"):
            return value
        module = value.module() if getattr(value, "with_module", False) else None
        target = None if module is None else self.memo.get(id(module), module)
        return type(value)(self(value.hook), target)


def _fill(clone: nn.Module, module: nn.Module, rebind: _Rebinder, attributes: Mapping[str, Any]) -> None:
    state: dict[str, Any] = {}
    for name, value in attributes.items():
        if name in ("_parameters", "_buffers"):
            state[name] = copy.copy(value)
        elif name == "_modules":
            state[name] = _copy_children(value, rebind)
        else:
            state[name] = rebind(value)
    # object.__setattr__ would go through a module's own slots and properties; the dict itself does not.
    vars(clone).update(state)
    for slot in _slots(type(module)):
        if hasattr(module, slot):
            object.__setattr__(clone, slot, rebind(getattr(module, slot)))


def _copy_children(children: Any, rebind: _Rebinder) -> Any:
    fresh = copy.copy(children)
    for name, child in children.items():
        fresh[name] = None if child is None else rebind(child)
    return fresh


def _slots(cls: type) -> Iterator[str]:
    for base in cls.__mro__:
        declared = base.__dict__.get("__slots__", ())
        for slot in (declared,) if isinstance(declared, str) else declared:
            if slot not in ("__dict__", "__weakref__"):
                yield slot


def _own_tensors(root: nn.Module) -> None:
    """Give every parameter and buffer of the tree a copy, one for each distinct tensor."""
    copies: dict[int, torch.Tensor] = {}

    def own(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in copies:
            copies[id(tensor)] = copy.deepcopy(tensor)
        return copies[id(tensor)]

    for module in root.modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is not None:
                    table[name] = cast(Any, own(tensor))
        for name, value in vars(module).items():
            if name not in _OWN_DICTS and _holds_tensors(value, copies):
                vars(module)[name] = [copies.get(id(item), item) for item in value]


def _holds_tensors(value: object, copies: dict[int, torch.Tensor]) -> bool:
    """A plain list of the module's own parameters, such as an LSTM's `_flat_weights`."""
    return isinstance(value, list) and any(
        isinstance(item, torch.Tensor) and id(item) in copies for item in value
    )


def walk_named(root: nn.Module) -> OrderedDict[str, nn.Module]:
    """`named_modules()` as a dict: each module once, under its first name."""
    return OrderedDict(root.named_modules())


def names_by_id(root: nn.Module) -> dict[int, str]:
    """id(module) -> its first name in `named_modules()`."""
    return {id(module): name for name, module in root.named_modules()}


def parameter_names(root: nn.Module) -> dict[int, str]:
    """id(parameter or buffer) -> its first full name."""
    named: dict[int, str] = {}
    for iterate in (root.named_parameters, root.named_buffers):
        for name, tensor in cast(Callable[[], Iterator[tuple[str, torch.Tensor]]], iterate)():
            named.setdefault(id(tensor), name)
    return named
