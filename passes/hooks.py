"""Hooks: whose they are, what they refer to, and the same hooks over copies.

A hook is the host's own, and part of what its forward computes, if it is

1. a method of one of its modules or of an object that they hold, or such an object itself;
2. over a container or a tensor that its modules hold (in a closure, a default, a bound argument, or an attribute of a
   callable object): whoever made it, the forward looks there;
3. made in the code of one of their classes;
4. a partial of these, or one that is given one of its modules.

All others are hooks of whoever uses the host, or of a library.
"""

from __future__ import annotations

import functools
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from morphc.passes.isolation import MAX_DEPTH, behind, held_by, is_proxy, is_users_object

OWN_TABLES = ("_parameters", "_buffers", "_modules")
RUN_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_LIBRARIES = {"torch", "transformers", "accelerate", "peft", "diffusers", "lightning"}


def is_library_hook(hook: Any) -> bool:
    """Hooks by which a library makes its modules work, such as weight_norm's or transformers' output recorder."""
    hook = unwrapped(hook)
    origins = (getattr(hook, "__module__", None) or "", type(hook).__module__)
    return any(origin.split(".")[0] in _LIBRARIES for origin in origins)


def is_wrapped(hook: Any) -> bool:
    """Whether torch has wrapped the hook, in an object that keeps its module weakly."""
    return type(hook).__name__ == "_WrappedHook" and hasattr(hook, "hook")


def unwrapped(hook: Any) -> Any:
    """The hook as it was registered."""
    return hook.hook if is_wrapped(hook) else hook


def is_table(name: str, value: object) -> bool:
    """Whether a module's attribute is one of its tables of hooks."""
    return name.endswith("_hooks") and isinstance(value, dict)


def cells_of(function: types.FunctionType) -> list[Any]:
    """What the function closes over; None for a name that is not bound yet."""
    return [contents(cell) for cell in function.__closure__ or ()]


def contents(cell: types.CellType) -> Any:
    """What is in the cell of a closure; None for a name that is not bound yet."""
    try:
        return cell.cell_contents
    except ValueError:
        return None


def referred(hook: Any) -> list[Any]:
    """The hook and what it was made over. Functions, methods, partials and tuples are looked through, and the
    attributes of the object that the hook is or is a method of; containers are not."""
    found: list[Any] = []
    seen: set[int] = set()
    stack = [(unwrapped(hook), True)]
    while stack:
        value, whole = stack.pop()
        value = behind(value) if is_proxy(value) else value
        if id(value) in seen:
            continue
        seen.add(id(value))
        found.append(value)
        if isinstance(value, types.MethodType):
            stack.append((value.__self__, whole))
        elif isinstance(value, functools.partial):
            stack.append((value.func, whole))
            stack += [(item, False) for item in (*value.args, *value.keywords.values())]
        elif isinstance(value, types.FunctionType):
            inside = (*cells_of(value), *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())
            stack += [(item, False) for item in inside]
        elif isinstance(value, tuple):
            stack += [(item, False) for item in value]
        elif whole and is_users_object(value):
            stack += [(item, False) for item in held_by(value).values()]
    return found


class Belongings:
    """What belongs to a tree of modules, by id: good as long as nothing of it is replaced."""

    def __init__(
        self, modules: Iterable[nn.Module], attributes: Callable[[nn.Module], Mapping[str, Any]] = vars
    ) -> None:
        self.modules: set[int] = set()
        self.containers: set[int] = set()
        self.tensors: set[int] = set()
        self.objects: set[int] = set()
        self.tables: set[int] = set()
        classes: set[type] = set()
        for module in modules:
            self.modules.add(id(module))
            classes.update(type(module).__mro__)
            if isinstance(module, torch.jit.ScriptModule):
                continue
            own = attributes(module)
            self.tensors.update(id(buffer) for buffer in own["_buffers"].values() if buffer is not None)
            for name, value in own.items():
                if is_table(name, value):
                    self.tables.add(id(value))
                elif name not in OWN_TABLES:
                    self._add(value, 0)
        self.classes = {(kind.__module__, kind.__qualname__) for kind in classes}

    def _add(self, value: object, depth: int) -> None:
        if is_proxy(value):
            return
        if isinstance(value, list | dict | set | tuple | deque):
            if depth > MAX_DEPTH or id(value) in self.containers:
                return
            if not isinstance(value, tuple):
                self.containers.add(id(value))
            for item in value.values() if isinstance(value, dict) else value:
                self._add(item, depth + 1)
        elif isinstance(value, torch.Tensor):
            if not isinstance(value, nn.Parameter):
                self.tensors.add(id(value))
        elif is_users_object(value):
            self.objects.add(id(value))

    def has_hook(self, hook: Any) -> bool:
        """Whether a hook is the tree's own."""
        hook = unwrapped(hook)
        if self._holds(hook) or (isinstance(hook, types.MethodType) and self._holds(hook.__self__)):
            return True
        found = referred(hook)
        if any(id(value) in self.containers or id(value) in self.tensors for value in found):
            return True
        if isinstance(hook, functools.partial) and any(id(value) in self.modules for value in found):
            return True
        return any(map(self._made, found))

    def is_made_outside(self, hook: Any) -> bool:
        """Whether a hook is over one of the modules, but made elsewhere: a clone's still writes to that module."""
        if is_library_hook(hook) or self.has_hook(hook):
            return False
        return any(id(value) in self.modules for value in referred(hook))

    def _holds(self, value: object) -> bool:
        return id(value) in self.modules or id(value) in self.objects

    def _made(self, value: object) -> bool:
        """Whether that function stands in the code of one of the modules' classes."""
        if not isinstance(value, types.FunctionType):
            return False
        parts = value.__qualname__.split(".")
        return any((value.__module__, ".".join(parts[:n])) in self.classes for n in range(1, len(parts)))


class Refitted:
    """The same callables over what `swap` gives for the things that they refer to.

    Every cell of a closure is a new one, so that what a hook counts in one stays where it was; callables refitted
    together share their cells as before.
    """

    def __init__(self, swap: Callable[[Any], Any]) -> None:
        self.swap = swap
        self.done: dict[int, Any] = {}

    def __call__(self, value: Any) -> Any:
        if id(value) in self.done:
            return self.done[id(value)]
        if is_wrapped(value):
            module = value.module() if getattr(value, "with_module", False) else None
            return type(value)(self(value.hook), module)
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, types.MethodType):
            target = self(value.__self__)
            return value if target is value.__self__ else types.MethodType(value.__func__, target)
        if type(value) is functools.partial:
            keywords = {name: self(item) for name, item in value.keywords.items()}
            fresh = functools.partial(self(value.func), *map(self, value.args), **keywords)
            vars(fresh).update(vars(value))
            return fresh
        return self.swap(value)

    def _function(self, value: types.FunctionType) -> types.FunctionType:
        if not (value.__closure__ or value.__defaults__ or value.__kwdefaults__):
            return value
        cells = value.__closure__ or ()
        known = [id(cell) in self.done for cell in cells]
        fresh_cells = tuple(self.done.setdefault(id(cell), types.CellType()) for cell in cells)
        fresh = types.FunctionType(value.__code__, value.__globals__, value.__name__, None, fresh_cells)
        self.done[id(value)] = fresh  # it may close over itself
        for cell, new, filled in zip(cells, fresh_cells, known, strict=True):
            if not filled and _is_bound(cell):
                new.cell_contents = self(cell.cell_contents)
        fresh.__defaults__ = tuple(map(self, value.__defaults__)) if value.__defaults__ else None
        fresh.__kwdefaults__ = {k: self(v) for k, v in (value.__kwdefaults__ or {}).items()} or None
        describe_as(fresh, value)
        vars(fresh).update(vars(value))
        return fresh


def _is_bound(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False


def describe_as(fresh: types.FunctionType, value: types.FunctionType) -> None:
    """Give a function made anew the name, home and annotations of the one that it was made from."""
    fresh.__qualname__, fresh.__module__, fresh.__doc__ = value.__qualname__, value.__module__, value.__doc__
    fresh.__annotations__ = value.__annotations__


def in_private(table: Any, own: Belongings, refit: Refitted, everyones: bool) -> Iterator[tuple[int, Any]]:
    """The hooks of a table that take part in a run of the compiler's own, as (key, hook): a library's as they are,
    the host's over copies, and with `everyones` those of its user too."""
    for key, hook in table.items():
        if is_library_hook(hook):
            yield key, hook
        elif own.has_hook(hook):
            yield key, refit(hook)
        elif everyones:
            yield key, hook
