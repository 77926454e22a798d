"""Runs of the compiler's own on somebody's model: silent, and leaving nothing behind."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from morphc.passes.clone import every_module
from morphc.passes.isolation import kept_random_state, private_copy

_LIBRARIES = {"torch", "transformers", "accelerate", "peft", "diffusers", "lightning"}


def cuda_devices(root: nn.Module) -> list[int]:
    """Indices of the CUDA devices that hold parameters of `root`."""
    found = {p.device.index for p in root.parameters() if p.device.type == "cuda"}
    return sorted(index for index in found if index is not None)


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


def strip_user_hooks(root: nn.Module) -> None:
    """Remove the user's own hooks: they must not see the runs that a compiler makes."""
    for module in root.modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            hooks = vars(module).get(name)
            if hooks:
                for key in [k for k, hook in hooks.items() if not is_library_hook(hook)]:
                    del hooks[key]


def is_library_hook(hook: Any) -> bool:
    """Hooks by which a library makes its modules work, such as weight_norm's or transformers' output recorder."""
    hook = getattr(hook, "hook", hook)
    origins = (getattr(hook, "__module__", None) or "", type(hook).__module__)
    return any(origin.split(".")[0] in _LIBRARIES for origin in origins)


def own_state(root: nn.Module) -> None:
    """Give the tree copies of its buffers and of what its attributes hold, so that a forward may change them."""
    memo: dict[int, Any] = {}
    modules = [module for module in every_module(root) if not isinstance(module, torch.jit.ScriptModule)]
    for module in modules:
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device.type != "meta":
                if id(buffer) not in memo:
                    memo[id(buffer)] = buffer.clone()
                module._buffers[name] = memo[id(buffer)]
    for module in modules:
        for name, value in vars(module).items():
            if name not in ("_parameters", "_buffers", "_modules") and not name.endswith("_hooks"):
                vars(module)[name] = private_copy(value, memo)


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
