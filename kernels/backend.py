"""Which backend runs where: generated Triton kernels, or plain torch operations."""

from __future__ import annotations

import os
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version

import torch

from morphc.errors import ConfigError

OLDEST_TRITON = (3, 6)
OLDEST_CAPABILITY = (8, 0)
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What the kernels read; float64 activations stay with torch."""


def interpreted() -> bool:
    """Whether Triton's interpreter is on, which runs kernels on tensors in host memory."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


@lru_cache(maxsize=1)
def triton_problem() -> str:
    """Why the installed Triton can't be used, or an empty string."""
    try:
        found = version("triton")
    except PackageNotFoundError:
        return "triton is not installed: pip install triton (Linux only)"
    numbers = tuple(int(part) for part in found.split(".")[:2])
    if numbers < OLDEST_TRITON:
        return f"triton {found} is older than 3.6, the oldest that the kernels are made for: pip install -U triton"
    return ""


def unavailable(device: torch.device) -> str:
    """Why kernels can't run on `device`, or an empty string. Touches no device that isn't there."""
    return _unavailable(device.type, device.index, interpreted())


@lru_cache(maxsize=64)
def _unavailable(kind: str, index: int | None, interpreter: bool) -> str:
    problem = triton_problem()
    if problem:
        return problem
    if kind == "cpu":
        return (
            "" if interpreter else "kernels run on a CPU in Triton's interpreter only: set TRITON_INTERPRET=1"
        )
    if kind != "cuda":
        return f"there are no kernels for devices of type {kind!r}"
    if interpreter:
        return "TRITON_INTERPRET=1 runs kernels on tensors in host memory: unset it to use the GPU"
    if not torch.cuda.is_available():
        return (
            "torch sees no CUDA device: check the driver with nvidia-smi, and that torch was built for CUDA"
        )
    if torch.version.hip:
        return ""
    found = torch.cuda.get_device_capability(index)
    if found < OLDEST_CAPABILITY:
        return (
            f"compute capability {found[0]}.{found[1]} is below 8.0, the lowest that the kernels are made for"
        )
    return ""


def chosen(backend: str, device: torch.device) -> str:
    """`triton` or `torch`: what the option `backend` means on `device`.

    Raises ConfigError where `triton` was asked for and can't be had.
    """
    if backend == "torch":
        return "torch"
    reason = unavailable(device)
    if reason and backend == "triton":
        raise ConfigError(f'backend="triton" on {device}: {reason}; or use "auto", which then takes torch')
    return "torch" if reason else "triton"


def why(backend: str, device: torch.device) -> str:
    """Why `chosen` says what it says, for people."""
    if backend == "torch":
        return 'backend="torch" was asked for'
    reason = unavailable(device)
    return reason or ("Triton's interpreter" if device.type == "cpu" else "generated kernels")
