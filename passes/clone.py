"""A shallow clone of a module tree: new module objects, the same Parameter and buffer tensors.

A deepcopy with a memo for the parameters breaks on locks, on generators and on legacy weight_norm; here only
module objects are new, and whatever pointed at an old module from inside the tree points at its clone:

1. children, ties between them included (one clone for each module object);
2. modules, and bound methods of modules, kept in plain attributes: in lists, tuples, dicts (keys too), sets,
   partials, weak references, proxies and containers, closures and default arguments, and in objects of the user's own
   classes (in their `__dict__` or `__slots__`), which are copied when a module is in them;
3. hooks: the dicts are new (a hook put on the clone is not on the host), bound-method hooks are rebound.

TorchScript modules can't be cloned (their state lives in C++) and are shared as they are. What is found in none
of these ways (a module in a global table, in a class attribute, in an object of C) stays the host's: `verify` says so.
"""

from __future__ import annotations

import copy
import functools
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar, cast

import torch
from torch import nn

from morphc.passes.isolation import (
    MAX_DEPTH,
    behind,
    give,
    held_by,
    is_proxy,
    is_users_object,
    private_copy,
    shallow,
    slot_names,
)

M = TypeVar("M", bound=nn.Module)

_WEAK_CONTAINERS = (weakref.WeakSet, weakref.WeakKeyDictionary, weakref.WeakValueDictionary)
_OWN_DICTS = ("_parameters", "_buffers", "_modules")


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
    owned = {id(value) for module in originals for value in _own_containers(module, attributes)}
    rebind = _Rebinder(memo, owned, {kind for module in originals for kind in type(module).__mro__})
    for module in originals:
        clone = memo[id(module)]
        if clone is not module and not isinstance(module, torch.jit.ScriptModule):
            _fill(clone, module, rebind, attributes(module))
    result = cast(M, memo[id(root)])
    if copy_tensors:
        _own_tensors(result)
    return result


def _own_containers(
    module: nn.Module, attributes: Callable[[nn.Module], Mapping[str, Any]]
) -> Iterator[object]:
    """The lists, dicts and sets that are attributes of the user's."""
    if isinstance(module, torch.jit.ScriptModule):
        return
    for name, value in attributes(module).items():
        if isinstance(value, list | dict | set) and name not in _OWN_DICTS and not name.endswith("_hooks"):
            yield value


def every_module(root: nn.Module) -> list[nn.Module]:
    """`root.modules()` and the modules reachable only through plain attributes."""
    return list(_all_modules(root, vars))


def _all_modules(
    root: nn.Module, attributes: Callable[[nn.Module], Mapping[str, Any]]
) -> Iterator[nn.Module]:
    seen: set[int] = set()
    walked: set[int] = set()
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
        for child in own["_modules"].values():
            stack.extend(_modules_in(child, walked))
        for name, value in own.items():
            if name.endswith("_hooks") and isinstance(value, dict):
                stack.extend(hook.__self__ for hook in value.values() if _is_method_of_module(hook))
            elif name not in _OWN_DICTS:
                stack.extend(_modules_in(value, walked))


def _is_method_of_module(hook: object) -> bool:
    return isinstance(hook, types.MethodType) and isinstance(hook.__self__, nn.Module)


def _modules_in(value: object, walked: set[int], depth: int = 0) -> list[nn.Module]:
    """Modules inside a plain attribute's value. `walked`: ids of what was looked into before."""
    if is_proxy(value):
        value = behind(value)
    if isinstance(value, nn.Module):
        return [value]
    if depth >= MAX_DEPTH or isinstance(value, str | int | float | torch.Tensor | type(None)):
        return []
    inside = _parts(value)
    if not inside or id(value) in walked:
        return []
    # A bound method is a new object each time that it is read: its id says nothing later.
    if not isinstance(value, types.MethodType):
        walked.add(id(value))
    return [module for item in inside for module in _modules_in(item, walked, depth + 1)]


def _parts(value: object) -> list[Any]:
    """What a value is made of, as far as modules can be in it."""
    if isinstance(value, types.MethodType):
        return [value.__self__]
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, weakref.ref):
        return [value()]
    if isinstance(value, types.FunctionType):
        cells = [_contents(cell) for cell in value.__closure__ or ()]
        return [*cells, *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
    if isinstance(value, _WEAK_CONTAINERS):
        return _weak_items(value)
    inside = list(held_by(value).values()) if is_users_object(value) else []
    if isinstance(value, dict):
        return [*inside, *(key for key in value if isinstance(key, nn.Module)), *value.values()]
    if isinstance(value, list | tuple | set | frozenset):
        return [*inside, *value]
    return inside


def _weak_items(value: Any) -> list[Any]:
    if isinstance(value, weakref.WeakSet):
        return list(value)
    return [part for pair in list(value.items()) for part in pair]


def _cells(function: types.FunctionType) -> list[Any]:
    return [_contents(cell) for cell in function.__closure__ or ()]


def _contents(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a name that is not bound yet
        return None


class _Rebinder:
    """Replaces references to old modules by references to their clones, copying only what contains one."""

    def __init__(self, memo: dict[int, nn.Module], owned: set[int], classes: set[type]) -> None:
        self.memo = memo
        self.owned = owned
        self.classes = {(kind.__module__, kind.__qualname__) for kind in classes}
        self.containers: dict[int, Any] = {}
        self.without: set[int] = set()

    def __call__(self, value: Any, depth: int = 0) -> Any:
        if is_proxy(value):
            target = behind(value)
            fresh = self(target) if isinstance(target, nn.Module) else target
            return value if fresh is target else weakref.proxy(fresh)
        if isinstance(value, nn.Module):
            return self.memo.get(id(value), value)
        if depth >= MAX_DEPTH:
            return value
        if isinstance(value, types.MethodType):
            target = self(value.__self__, depth + 1)
            return value if target is value.__self__ else types.MethodType(value.__func__, target)
        if isinstance(value, functools.partial):
            return self._partial(value, depth)
        if isinstance(value, list | dict | set):
            return self._mutable(value, depth)
        if isinstance(value, tuple):
            items = [self(item, depth + 1) for item in value]
            if all(new is old for new, old in zip(items, value, strict=True)):
                return value
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        if isinstance(value, weakref.WeakMethod):
            method = value()
            fresh = self(method, depth + 1)
            return value if fresh is method else weakref.WeakMethod(fresh)
        if isinstance(value, weakref.ref) and isinstance(value(), nn.Module):
            return weakref.ref(self(value()))
        if isinstance(value, _WEAK_CONTAINERS):
            return self._weak(value, depth)
        if isinstance(value, types.FunctionType):
            return self._function(value, depth)
        if is_users_object(value):
            return self._object(value, depth)
        return self._wrapped_hook(value)

    def hooks(self, table: Any) -> Any:
        """A new table of hooks. A closure among them keeps what it closes over: that is where its user looks. One
        that a method of the host's made is the host's own: its forward looks for what the hook has left.
        """
        fresh = copy.copy(table)
        for key, hook in table.items():
            if isinstance(hook, types.MethodType | functools.partial) and not is_users_object(
                getattr(hook, "__self__", None)
            ):
                fresh[key] = self(hook)
            elif self._is_hosts(hook):
                fresh[key] = self._over_host(hook)
            else:
                fresh[key] = self._wrapped_hook(hook)
        return fresh

    def _is_hosts(self, hook: object) -> bool:
        """Whether a method of one of the modules made that closure, over the host or what the host holds."""
        if not isinstance(hook, types.FunctionType) or not any(map(self._of_host, _cells(hook))):
            return False
        made_in = hook.__qualname__.rpartition(".<locals>")[0]
        return (hook.__module__, made_in.rpartition(".")[0]) in self.classes

    def _of_host(self, value: object) -> bool:
        value = behind(value) if is_proxy(value) else value
        return id(value) in (self.memo if isinstance(value, nn.Module) else self.owned)

    def _over_host(self, hook: types.FunctionType) -> types.FunctionType:
        """A hook that closes over parts of the host: over those of the clone."""
        cells = tuple(
            types.CellType(self(_contents(cell))) if self._of_host(_contents(cell)) else cell
            for cell in hook.__closure__ or ()
        )
        fresh = types.FunctionType(hook.__code__, hook.__globals__, hook.__name__, hook.__defaults__, cells)
        fresh.__kwdefaults__, fresh.__qualname__, fresh.__module__, fresh.__doc__ = (
            hook.__kwdefaults__,
            hook.__qualname__,
            hook.__module__,
            hook.__doc__,
        )
        vars(fresh).update(vars(hook))
        return fresh

    def _partial(self, value: functools.partial[Any], depth: int) -> Any:
        func, args, keywords = (self(part, depth + 1) for part in (value.func, value.args, value.keywords))
        if func is value.func and args is value.args and not self._holds_module(value.keywords):
            return value
        fresh = functools.partial(func, *args, **keywords)
        # functools.update_wrapper leaves the wrapped forward's name and signature here.
        fresh.__dict__.update({name: self(item, depth + 1) for name, item in vars(value).items()})
        return fresh

    def _mutable(self, value: Any, depth: int) -> Any:
        """Lists, dicts and sets are always copied: appending to the clone's must not show in the host's."""
        if id(value) in self.containers:
            return self.containers[id(value)]
        fresh = shallow(value)
        if fresh is value:
            return value
        self.containers[id(value)] = fresh
        if isinstance(value, list):
            for index, item in enumerate(value):
                fresh[index] = self(item, depth + 1)
        elif isinstance(value, dict):
            if any(isinstance(key, nn.Module) for key in value):
                fresh.clear()
            for key, item in value.items():
                fresh[self(key, depth + 1) if isinstance(key, nn.Module) else key] = self(item, depth + 1)
        elif any(isinstance(item, nn.Module) for item in value):
            fresh.clear()
            fresh.update(self(item, depth + 1) for item in value)
        return fresh

    def _weak(self, value: Any, depth: int) -> Any:
        if id(value) in self.containers or not self._holds_module(value):
            return self.containers.get(id(value), value)
        fresh = self.containers[id(value)] = type(value)()
        if isinstance(value, weakref.WeakSet):
            fresh.update(self(item, depth + 1) for item in value)
        else:
            fresh.update({self(key, depth + 1): self(item, depth + 1) for key, item in value.items()})
        return fresh

    def _function(self, value: types.FunctionType, depth: int) -> Any:
        """A function with modules in its closure or defaults, such as `lambda x: self.fc(x)`."""
        if not (value.__closure__ or value.__defaults__ or value.__kwdefaults__):
            return value
        if id(value) in self.containers:
            return self.containers[id(value)]
        if not self._holds_module(value):
            return value
        cells = tuple(self._cell(cell) for cell in value.__closure__ or ())
        fresh = types.FunctionType(value.__code__, value.__globals__, value.__name__, None, cells)
        self.containers[id(value)] = fresh
        for cell, old in zip(cells, value.__closure__ or (), strict=True):
            if cell is not old:
                cell.cell_contents = self(_contents(old), depth + 1)
        fresh.__defaults__ = self(value.__defaults__, depth + 1)
        fresh.__kwdefaults__ = self(value.__kwdefaults__, depth + 1)
        fresh.__qualname__, fresh.__module__, fresh.__doc__ = (
            value.__qualname__,
            value.__module__,
            value.__doc__,
        )
        fresh.__annotations__ = value.__annotations__
        vars(fresh).update({name: self(item, depth + 1) for name, item in vars(value).items()})
        return fresh

    def _cell(self, cell: types.CellType) -> types.CellType:
        """A new empty cell where modules are in it; any other stays shared, so that `nonlocal` counts on."""
        if id(cell) not in self.containers:
            self.containers[id(cell)] = types.CellType() if self._holds_module(_contents(cell)) else cell
        found: types.CellType = self.containers[id(cell)]
        return found

    def _object(self, value: Any, depth: int) -> Any:
        if id(value) in self.containers:
            return self.containers[id(value)]
        if not self._holds_module(value):
            return self._wrapped_hook(value)
        fresh = shallow(value)
        self.containers[id(value)] = fresh
        if fresh is not value:
            rebound = {name: self(item, depth + 1) for name, item in held_by(value).items()}
            if not give(fresh, rebound):
                self.containers[id(value)] = value
        return self.containers[id(value)]

    def _holds_module(self, value: object) -> bool:
        if id(value) in self.without:
            return False
        if any(id(module) in self.memo for module in _modules_in(value, set())):
            return True
        if is_users_object(value):
            self.without.add(id(value))
        return False

    def _wrapped_hook(self, value: Any) -> Any:
        """torch wraps `with_module=True` hooks in an object that keeps the module weakly; make another."""
        if type(value).__name__ != "_WrappedHook" or not hasattr(value, "hook"):
            return value
        module = value.module() if getattr(value, "with_module", False) else None
        target = None if module is None else self.memo.get(id(module), module)
        own = value.hook
        if self._is_hosts(own):
            own = self._over_host(own)
        return type(value)(self(own) if isinstance(own, types.MethodType) else own, target)


def _fill(clone: nn.Module, module: nn.Module, rebind: _Rebinder, attributes: Mapping[str, Any]) -> None:
    state: dict[str, Any] = {}
    for name, value in attributes.items():
        if name in ("_parameters", "_buffers"):
            state[name] = copy.copy(value)
        elif name == "_modules":
            state[name] = _copy_children(value, rebind)
        elif name.endswith("_hooks") and isinstance(value, dict):
            state[name] = rebind.hooks(value)
        else:
            state[name] = rebind(value)
    # object.__setattr__ would go through a module's own slots and properties; the dict itself does not.
    vars(clone).update(state)
    for slot in slot_names(type(module)):
        if hasattr(module, slot):
            object.__setattr__(clone, slot, rebind(getattr(module, slot)))


def _copy_children(children: Any, rebind: _Rebinder) -> Any:
    fresh = copy.copy(children)
    for name, child in children.items():
        fresh[name] = None if child is None else rebind(child)
    return fresh


def _own_tensors(root: nn.Module) -> None:
    """Give every parameter, buffer and plain tensor of the tree a copy, one for each distinct tensor.

    Plain ones are found in attributes and slots, containers, partials and objects; not in closures.
    """
    copies: dict[int, Any] = {}
    modules = [module for module in every_module(root) if not isinstance(module, torch.jit.ScriptModule)]
    for module in modules:
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is not None:
                    if id(tensor) not in copies:
                        copies[id(tensor)] = copy.deepcopy(tensor)
                    table[name] = copies[id(tensor)]
    # Plain lists of the module's own parameters, such as an LSTM's `_flat_weights`, follow by their ids.
    for module in modules:
        for name, value in vars(module).items():
            if name not in _OWN_DICTS and not name.endswith("_hooks"):
                vars(module)[name] = private_copy(value, copies, leaves=True)
        for slot in slot_names(type(module)):
            if hasattr(module, slot):
                value = private_copy(getattr(module, slot), copies, leaves=True)
                object.__setattr__(module, slot, value)


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
