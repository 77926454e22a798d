"""A shallow clone of a module tree: new module objects, the same Parameter and buffer tensors.

A deepcopy with a memo for the parameters breaks on locks, on generators and on legacy weight_norm; here only
module objects are new, and whatever pointed at an old module from inside the tree points at its clone:

1. children, ties between them included (one clone for each module object);
2. modules, and bound methods of modules, kept in plain attributes: in lists, tuples, dicts (keys too), sets,
   partials, weak references, proxies and containers, closures and default arguments, and in objects of the user's own
   classes (in their `__dict__` or `__slots__`), which are copied when a module is in them;
3. hooks: the dicts are new (a hook put on the clone is not on the host). The host's own (`hooks.py`) are over the clone
   and what it holds, its lists and dicts among them; all others keep what they close over: that is where their user
   looks. Handles of hooks remove those of the clone.

TorchScript modules can't be cloned (their state lives in C++) and are shared as they are. What is found in none
of these ways (a module in a global table, in a class attribute, in an object of C) stays the host's: `verify` says so.
"""

from __future__ import annotations

import copy
import functools
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar, cast

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from morphc.passes.hooks import (
    OWN_TABLES,
    Belongings,
    Refitted,
    cells_of,
    contents,
    describe_as,
    is_table,
    is_wrapped,
    referred,
)
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


def clone_tree(
    root: M,
    *,
    copy_tensors: bool = False,
    attributes: Callable[[nn.Module], Mapping[str, Any]] = vars,
    read: Callable[[Any], Any] | None = None,
) -> M:
    """Clone `root` and every module below it.

    copy_tensors: give the clone tensors of its own (ties kept) instead of sharing the host's. attributes: what
    each clone is filled with, `vars` of the module unless told otherwise. read: what a value that is found in there, or
    in what it holds, stands for.
    """
    memo: dict[int, nn.Module] = {}
    originals = list(_all_modules(root, attributes))
    for module in originals:
        if isinstance(module, torch.jit.ScriptModule):
            memo[id(module)] = _copied_script(module) if copy_tensors else module
            continue
        memo[id(module)] = object.__new__(type(module))
    rebind = _Rebinder(memo, Belongings(originals, attributes), _hooks_of(originals, attributes), read)
    for module in originals:
        clone = memo[id(module)]
        if clone is not module and not isinstance(module, torch.jit.ScriptModule):
            _fill(clone, module, rebind, attributes(module))
    result = cast(M, memo[id(root)])
    if copy_tensors:
        _own_tensors(result)
    return result


def _copied_script(module: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
    """A copy whose parameters are leaves: a plain deepcopy's are differentiable clones of the host's, whose gradients
    end up there."""
    with torch.no_grad():
        copied: torch.jit.ScriptModule = copy.deepcopy(module)
    for own, given in zip(copied.parameters(), module.parameters(), strict=True):
        own.requires_grad_(given.requires_grad)
    return copied


def _hooks_of(
    modules: list[nn.Module], attributes: Callable[[nn.Module], Mapping[str, Any]]
) -> Iterator[Any]:
    for module in modules:
        if not isinstance(module, torch.jit.ScriptModule):
            for name, value in attributes(module).items():
                if is_table(name, value):
                    yield from value.values()


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
            if is_table(name, value):
                stack.extend(hook.__self__ for hook in value.values() if _is_method_of_module(hook))
            elif name not in OWN_TABLES:
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
        return [*cells_of(value), *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
    if isinstance(value, _WEAK_CONTAINERS):
        return _weak_items(value)
    inside = list(held_by(value).values()) if is_users_object(value) else []
    if isinstance(value, dict):
        return [*inside, *(key for key in value if isinstance(key, nn.Module)), *value.values()]
    if isinstance(value, list | tuple | set | frozenset | deque):
        return [*inside, *value]
    return inside


def _weak_items(value: Any) -> list[Any]:
    if isinstance(value, weakref.WeakSet):
        return list(value)
    return [part for pair in list(value.items()) for part in pair]


class _Rebinder:
    """Replaces references to old modules by references to their clones, copying only what contains one."""

    def __init__(
        self,
        memo: dict[int, nn.Module],
        own: Belongings,
        hooks: Iterator[Any],
        read: Callable[[Any], Any] | None = None,
    ) -> None:
        self.memo = memo
        self.read = read
        self.own = own
        self.containers: dict[int, Any] = {}
        self.without: set[int] = set()
        self.in_hook = False
        # Objects that a hook is, is a method of, or is over keep for the forward what the hook has seen.
        self.moving: set[int] = set()
        for hook in hooks:
            if own.has_hook(hook):
                found = [value for value in referred(hook) if is_users_object(value)]
                self.moving.update({id(value) for value in found} & own.objects)
                self.moving.update(id(value) for value in found if self._is_hook_over_own(value))

    def __call__(self, value: Any, depth: int = 0) -> Any:
        if self.read is not None:
            value = self.read(value)
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
        if isinstance(value, list | dict | set | deque):
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
        if isinstance(value, RemovableHandle):
            return self._handle(value)
        if is_users_object(value):
            return self._object(value, depth)
        return self._wrapped_hook(value)

    def hooks(self, table: Any) -> Any:
        """A new table of hooks, those of the host's own over the clone."""
        if id(table) in self.containers:
            return self.containers[id(table)]
        fresh = self.containers[id(table)] = copy.copy(table)
        for key, hook in table.items():
            fresh[key] = self._wrapped_hook(hook) if is_wrapped(hook) else self._hook(hook)
        return fresh

    def _hook(self, hook: Any) -> Any:
        if not self.own.has_hook(hook):
            return hook
        self.in_hook = True
        try:
            return self(hook)
        finally:
            self.in_hook = False

    def _handle(self, handle: RemovableHandle) -> RemovableHandle:
        table = handle.hooks_dict_ref()
        if table is None or id(table) not in self.own.tables:
            return handle
        fresh = object.__new__(RemovableHandle)
        fresh.id, fresh.hooks_dict_ref = handle.id, weakref.ref(self.hooks(table))
        others = [ref() for ref in handle.extra_dict_ref]
        fresh.extra_dict_ref = tuple(weakref.ref(self(other)) for other in others if other is not None)
        return fresh

    def _partial(self, value: functools.partial[Any], depth: int) -> Any:
        func, args = (self(part, depth + 1) for part in (value.func, value.args))
        keywords = {name: self(item, depth + 1) for name, item in value.keywords.items()}
        same = all(keywords[name] is item for name, item in value.keywords.items())
        if func is value.func and args is value.args and same:
            return value
        fresh = functools.partial(func, *args, **keywords)
        # functools.update_wrapper leaves the wrapped forward's name and signature here.
        fresh.__dict__.update({name: self(item, depth + 1) for name, item in vars(value).items()})
        return fresh

    def _mutable(self, value: Any, depth: int) -> Any:
        """Lists, dicts and sets are always copied: appending to the clone's must not show in the host's. Those that
        only a hook knows are its user's."""
        if id(value) in self.containers:
            return self.containers[id(value)]
        if self.in_hook and id(value) not in self.own.containers and not self._holds_own(value):
            return value
        fresh = shallow(value)
        if fresh is value:
            return value
        self.containers[id(value)] = fresh
        if isinstance(value, list | deque):
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
        """A function with modules or containers of the host's in its closure or defaults, such as
        `lambda x: self.fc(x)`."""
        if not (value.__closure__ or value.__defaults__ or value.__kwdefaults__):
            return value
        if id(value) in self.containers:
            return self.containers[id(value)]
        if not self._holds_own(value):
            return value
        cells = tuple(self._cell(cell) for cell in value.__closure__ or ())
        fresh = types.FunctionType(value.__code__, value.__globals__, value.__name__, None, cells)
        self.containers[id(value)] = fresh
        for cell, old in zip(cells, value.__closure__ or (), strict=True):
            if cell is not old:
                cell.cell_contents = self(contents(old), depth + 1)
        fresh.__defaults__ = self(value.__defaults__, depth + 1)
        named = value.__kwdefaults__ or {}
        fresh.__kwdefaults__ = {name: self(item, depth + 1) for name, item in named.items()} or None
        describe_as(fresh, value)
        vars(fresh).update({name: self(item, depth + 1) for name, item in vars(value).items()})
        return fresh

    def _cell(self, cell: types.CellType) -> types.CellType:
        """A new empty cell where modules are in it; any other stays shared, so that `nonlocal` counts on."""
        if id(cell) not in self.containers:
            self.containers[id(cell)] = types.CellType() if self._holds_own(contents(cell)) else cell
        found: types.CellType = self.containers[id(cell)]
        return found

    def _object(self, value: Any, depth: int) -> Any:
        if id(value) in self.containers:
            return self.containers[id(value)]
        if id(value) not in self.moving and not self._holds_module(value):
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

    def _holds_own(self, value: object) -> bool:
        """A module, a container that is an attribute of one, or an object that is copied, in a function's closure."""
        for item in referred(value):
            if id(item) in self.own.containers or id(item) in self.moving:
                return True
        return self._holds_module(value)

    def _is_hook_over_own(self, value: object) -> bool:
        return any(id(item) in self.own.containers for item in held_by(value).values())

    def _wrapped_hook(self, value: Any) -> Any:
        """torch wraps `with_module=True` hooks in an object that keeps the module weakly; make another."""
        if not is_wrapped(value):
            return value
        module = value.module() if getattr(value, "with_module", False) else None
        target = None if module is None else self.memo.get(id(module), module)
        return type(value)(self._hook(value.hook), target)


def _fill(clone: nn.Module, module: nn.Module, rebind: _Rebinder, attributes: Mapping[str, Any]) -> None:
    state: dict[str, Any] = {}
    for name, value in attributes.items():
        if name in ("_parameters", "_buffers"):
            state[name] = copy.copy(value)
        elif name == "_modules":
            state[name] = _copy_children(value, rebind)
        elif is_table(name, value):
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

    Plain ones are found in attributes and slots, containers, partials and objects, and in closures that are hooks of
    the host's own.
    """
    copies: dict[int, Any] = {}
    modules = [module for module in every_module(root) if not isinstance(module, torch.jit.ScriptModule)]
    own = Belongings(modules)
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
            if name not in OWN_TABLES and not name.endswith("_hooks"):
                vars(module)[name] = private_copy(value, copies, leaves=True)
        for slot in slot_names(type(module)):
            if hasattr(module, slot):
                value = private_copy(getattr(module, slot), copies, leaves=True)
                object.__setattr__(module, slot, value)
    refit = Refitted(functools.partial(private_copy, memo=copies, leaves=True))
    for module in modules:
        for table in [value for name, value in vars(module).items() if is_table(name, value)]:
            table.update({key: refit(hook) for key, hook in table.items() if own.has_hook(hook)})
        functions = [(n, f) for n, f in vars(module).items() if isinstance(f, types.FunctionType)]
        vars(module).update({name: refit(function) for name, function in functions if own.has_hook(function)})


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
