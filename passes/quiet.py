"""Runs of the compiler's own on somebody's model: silent, and leaving nothing behind."""

from __future__ import annotations

import functools
import logging
import random
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from morphc.passes.clone import every_module
from morphc.passes.hooks import OWN_TABLES, RUN_HOOKS, Belongings, Refitted, in_private, is_table
from morphc.passes.isolation import kept_random_state, private_copy

# Of Python's stack: a watched call of a module takes up to three times the frames that it takes alone.
_DEEPER = 4
_DEEPEST = 20_000


def cuda_devices(root: nn.Module) -> list[int]:
    """Indices of the CUDA devices that hold parameters of `root`."""
    found = {p.device.index for p in root.parameters() if p.device.type == "cuda"}
    return sorted(index for index in found if index is not None)


@contextmanager
def deeper_stack() -> Iterator[None]:
    """A higher recursion limit: what runs in its own frames has to run with the compiler's between them."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(max(before, min(before * _DEEPER, _DEEPEST)))
    try:
        yield
    finally:
        sys.setrecursionlimit(before)


@contextmanager
def quiet_state(root: nn.Module, *, training: bool | None) -> Iterator[None]:
    """Run with a given training flag, fused fast paths off, and RNG state put back."""
    flags = [(module, module.training) for module in root.modules()]
    fast = torch.backends.mha.get_fastpath_enabled()
    with torch.random.fork_rng(devices=cuda_devices(root)), kept_random_state():
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            if training is not None:
                for module, _ in flags:
                    module.training = training
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
            for module, flag in flags:
                module.training = flag


def own_state(root: nn.Module, *, everyones_hooks: bool = True) -> None:
    """Give the tree copies of its buffers and of what its attributes hold, so that a forward may change them; the
    host's own hooks write there too.

    everyones_hooks: keep those of the user's. They must not see the runs that a compiler makes, unless the host needs
    them.
    """
    modules = [module for module in every_module(root) if not isinstance(module, torch.jit.ScriptModule)]
    own = Belongings(modules)
    memo: dict[int, Any] = {}
    replaced = _private_states(modules, memo)
    tables = [(module, _private_hooks(vars(module), own, memo, everyones_hooks)) for module in modules]
    for module, fresh in (*replaced, *tables):
        for name, value in fresh.items():
            if is_table(name, value):
                table = vars(module)[name]  # handles to remove a hook point at this very one
                table.clear()
                table.update(value)
            else:
                vars(module)[name] = value


def _private_states(
    modules: Sequence[nn.Module], memo: dict[int, Any]
) -> list[tuple[nn.Module, dict[str, Any]]]:
    """Copies of each module's buffers and of what its attributes hold. memo: as for `private_copy`."""
    buffers = [{name: _own(buffer, memo) for name, buffer in module._buffers.items()} for module in modules]
    return [
        (module, {"_buffers": own, **_copied_attributes(vars(module), memo)})
        for module, own in zip(modules, buffers, strict=True)
    ]


def _copied_attributes(attributes: Mapping[str, Any], memo: dict[int, Any]) -> dict[str, Any]:
    return {
        name: private_copy(value, memo)
        for name, value in attributes.items()
        if name not in OWN_TABLES and not is_table(name, value)
    }


def _private_hooks(
    attributes: Mapping[str, Any], own: Belongings, memo: dict[int, Any], everyones: bool
) -> dict[str, Any]:
    """A module's hooks for a run of the compiler's own, and functions in its attributes: over the copies in `memo`."""
    refit = Refitted(functools.partial(private_copy, memo=memo))
    refit.done = memo  # a hook that several modules share, or a cell that several hooks do, stays one
    fresh: dict[str, Any] = {}
    for name, value in attributes.items():
        if name in RUN_HOOKS and value:
            fresh[name] = type(value)()
            fresh[name].update(in_private(value, own, refit, everyones))
        elif isinstance(value, types.FunctionType) and own.has_hook(value):
            fresh[name] = refit(value)
    return fresh


def _own(buffer: torch.Tensor | None, memo: dict[int, Any]) -> torch.Tensor | None:
    if buffer is None or buffer.device.type == "meta":
        return buffer
    if id(buffer) not in memo:
        memo[id(buffer)] = buffer.clone()
    copied: torch.Tensor = memo[id(buffer)]
    return copied


@contextmanager
def isolated(root: nn.Module, *, training: bool, keep_hooks: bool = False, seed: int = 0) -> Iterator[None]:
    """Run `root` so that nothing of it remembers: buffers, attributes, flags, hooks, and every RNG are put back.

    keep_hooks: let the user's own hooks see the run too.
    """
    before: list[tuple[nn.Module, dict[str, Any]]] = []
    script_flags: list[tuple[nn.Module, bool]] = []
    reached = {id(module) for module in root.modules()}
    modules = every_module(root)
    own = Belongings(modules)
    memo: dict[int, Any] = {}
    for module in modules:
        if isinstance(module, torch.jit.ScriptModule):
            script_flags.append((module, module.training))
            module.train(training)
            continue
        before.append((module, dict(vars(module))))
    tables = [
        (table, dict(table)) for _, held in before for name, table in held.items() if is_table(name, table)
    ]
    for module, fresh in _private_states([module for module, _ in before], memo):
        children = {name: vars(module)[name].copy() for name in ("_parameters", "_modules")}
        vars(module).update({**fresh, **children})
    for module, held in before:
        vars(module).update(_private_hooks(held, own, memo, keep_hooks))
        if id(module) in reached:
            vars(module)["training"] = training
    try:
        with torch.random.fork_rng(devices=cuda_devices(root)), kept_random_state():
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed)
            yield
    finally:
        for module, flag in script_flags:
            module.train(flag)
        for module, held in before:
            vars(module).clear()
            vars(module).update(held)
        for table, hooks in tables:
            # A forward may remove a hook by its handle, which knows this table and not the one of the run.
            if table != hooks:
                table.clear()
                table.update(hooks)


@contextmanager
def quiet_log(name: str) -> Iterator[None]:
    """An op without a fake form is no news here: the real run follows."""
    logger = logging.getLogger(name)
    before = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = before


@contextmanager
def no_torchscript() -> Iterator[None]:
    """TorchScript's fused CUDA kernels take the address of a fake tensor for one on the device, and the device is
    lost to the process: so with fake CUDA tensors a scripted call is an error, and the real run follows."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("TorchScript can't run on fake tensors of a CUDA device")

    classes: tuple[Any, ...] = (torch._C.ScriptFunction, torch._C.ScriptMethod)
    before = [cls.__call__ for cls in classes]
    try:
        for cls in classes:
            cls.__call__ = refuse
        yield
    finally:
        for cls, call in zip(classes, before, strict=True):
            cls.__call__ = call
