"""`morphc doctor`: what is on this machine, what will be used, and what is missing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from pathlib import Path

import msgspec

from morphc.kernels.cache import place
from morphc.version import __version__

EXTRAS = {
    "transformers": "examples/gpt2.py and examples/vit.py: pip install 'morphc[hf]'",
    "scipy": "confidence intervals of benchmarks: pip install 'morphc[bench]'",
    "plotly": "plots in reports: pip install 'morphc[report]'",
    "redis": "the message bus: pip install 'morphc[bus]'",
    "prometheus-client": "metrics: pip install 'morphc[metrics]'",
}


class Device(msgspec.Struct, frozen=True):
    """One place to compute on; `memory` in bytes, 0 where it isn't known."""

    name: str
    kind: str
    memory: int
    detail: str = ""


class Examination(msgspec.Struct, frozen=True):
    """Everything that doctor says. `versions` are None for what is not installed; `blueprints`: what computes each
    where kernels run."""

    versions: dict[str, str | None]
    platform: str
    devices: list[Device]
    backend: str
    backend_reason: str
    cache: str
    cache_writable: bool
    missing: list[str]
    blueprints: dict[str, str] = {}


def run(json: bool) -> int:
    """Print the examination; always 0, since a machine without a GPU is not an error."""
    found = examine()
    print(msgspec.json.encode(found).decode() if json else as_text(found))
    return 0


def examine() -> Examination:
    """Look at this machine. Nothing is written."""
    versions: dict[str, str | None] = {"morphc": __version__, "python": platform.python_version()}
    for package in ("torch", "triton", "numpy", *EXTRAS):
        versions[package] = _version(package)
    missing = [f"{name}: for {use}" for name, use in EXTRAS.items() if versions[name] is None]
    devices = [Device("cpu", platform.machine(), _memory(), f"{os.cpu_count()} cores")]
    backend, reason = "none", "torch is not installed: pip install torch"
    blueprints: dict[str, str] = {}
    if versions["torch"] is not None:
        try:
            devices += _cuda_devices()
        except (ImportError, OSError, RuntimeError) as error:
            reason = f"torch can't be used: {error}"
        else:
            backend, reason = _backend()
            blueprints = _blueprints()
    else:
        missing.insert(0, reason)
    if versions["triton"] is None:
        missing.append("triton: for the triton backend (Linux only): pip install triton")
    elif not any(shutil.which(name) for name in ("cc", "gcc", "clang")):
        missing.append("a C compiler: triton builds its launcher with it: apt-get install gcc")
    cache = place.root()
    writable = _writable(cache)
    if not writable:
        missing.append(f"a writable cache: {cache} is not; set MORPHC_CACHE_DIR")
    return Examination(
        versions, platform.platform(), devices, backend, reason, str(cache), writable, missing, blueprints
    )


def as_text(found: Examination) -> str:
    """The examination as aligned lines."""
    lines = [f"{name:18} {version or 'not installed'}" for name, version in found.versions.items()]
    lines.append(f"{'platform':18} {found.platform}")
    for device in found.devices:
        memory = f", {device.memory / 2**30:.1f} GiB" if device.memory else ""
        detail = f", {device.detail}" if device.detail else ""
        lines.append(f"{'device':18} {device.name}: {device.kind}{memory}{detail}")
    lines.append(f"{'backend':18} {found.backend} ({found.backend_reason})")
    lines += [f"{'blueprint':18} {name}: {text}" for name, text in found.blueprints.items()]
    lines.append(f"{'cache':18} {found.cache}{'' if found.cache_writable else ' (not writable)'}")
    lines += [f"{'missing':18} {text}" for text in found.missing] or [f"{'missing':18} nothing"]
    return "\n".join(lines)


def _backend() -> tuple[str, str]:
    import torch

    from morphc.kernels.backend import chosen, why

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return chosen("auto", device), why("auto", device)


def _blueprints() -> dict[str, str]:
    from morphc.kernels.blueprints import names
    from morphc.kernels.site import coverage

    return {name: coverage(name) for name in names()}


def _cuda_devices() -> list[Device]:
    import torch

    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"capability {properties.major}.{properties.minor}"
        devices.append(Device(f"cuda:{index}", properties.name, properties.total_memory, capability))
    return devices


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _memory() -> int:
    if sys.platform == "win32" or "SC_PHYS_PAGES" not in os.sysconf_names:
        return 0
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _writable(folder: Path) -> bool:
    """Whether the folder, or the nearest one above it that exists, takes new files."""
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    return place.is_dir() and os.access(place, os.W_OK | os.X_OK)
