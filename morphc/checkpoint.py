"""`morphc.save` and `morphc.load`: a grown model in a directory, and back, bit for bit."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import msgspec
import torch
from msgspec.structs import replace
from torch import Tensor, nn

from morphc.checkpointfile import MANIFEST, WEIGHTS, Manifest, read_manifest, read_tensors, storable, write
from morphc.compiler import compile_program
from morphc.errors import CheckpointError, ConfigError, PassError, PlanError
from morphc.passes.plan import Plan
from morphc.plancheck import config_of
from morphc.reporting import Report
from morphc.runtime.store import CHILD, SeedStore, root_of, store_of
from morphc.version import __version__

M = TypeVar("M", bound=nn.Module)


def save(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Write `model`, its seeds, slots and their optimizer moments to `directory`.

    The directory appears complete or not at all; a morphc checkpoint there is replaced, anything else refused.
    It holds `model.safetensors` (the state dict; tied tensors once) and `morphc.json` (the plan, versions, names of
    tied tensors, checksum). Raises NotMorphedError and CheckpointError.
    """
    store = store_of(model)
    store.leave_meta()
    plan = _plan(store)
    tensors, tied = storable(root_of(model).state_dict())
    write(Path(directory), tensors, tied, plan)


def load(host: M, directory: str | os.PathLike[str]) -> M:
    """The model that was saved in `directory`, built on `host`: a plain model of the same class and shapes.

    The result has tensors of its own; `host` stays as it is. Where the host is on the meta device the result is on the
    CPU. Everything is checked before anything is built: raises CheckpointError with the file, the field and a way out,
    and UnsupportedHostError for a host that can't be compiled.
    """
    path = Path(directory)
    manifest = read_manifest(path)
    tensors = read_tensors(path, manifest)
    _check_host(host, manifest, tensors, path)
    try:
        config = config_of(manifest.plan)
        compiled = compile_program(host, config=config, plan=manifest.plan, verify=False, share=False)
    except (PlanError, ConfigError, PassError) as error:
        raise CheckpointError(f"{path / MANIFEST}: {error}") from error
    model = compiled.model
    _check_keys(model.state_dict(keep_vars=True), tensors, path / WEIGHTS)
    _fill(model, tensors, path)
    return cast(M, model)


def _plan(store: SeedStore) -> Plan:
    """The plan, with the slots and the configuration that the model has by now."""
    report = getattr(store, "report", None)
    if not isinstance(report, Report):
        raise CheckpointError("this model wasn't made by morphc.compile and carries no plan to save")
    plan = report.plan
    sites = []
    for site in plan.sites:
        banks = store.sites[site.path].slots.items() if site.path in store.sites else []
        slots = max((bank.slots for _, bank in banks), default=site.slots)
        sites.append(replace(site, slots=slots))
    return replace(
        plan, sites=tuple(sites), config=msgspec.to_builtins(store.config), morphc_version=__version__
    )


def _is_ours(key: str) -> bool:
    return CHILD in key.split(".")


def _check_host(host: nn.Module, manifest: Manifest, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Before compiling: a plan names a model by its digest only, a checkpoint can say which layer differs."""
    if not isinstance(host, nn.Module):
        raise CheckpointError(f"morphc.load takes an nn.Module to build on, not {type(host).__name__}")
    expected, given = manifest.plan.model_class, type(host).__qualname__
    if expected != given:
        raise CheckpointError(
            f"{path / MANIFEST} is of a {expected!r} (plan.model_class), the host is a {given!r}"
        )
    stored = {key: value for key, value in tensors.items() if not _is_ours(key)}
    present = {key: value for key, value in host.state_dict(keep_vars=True).items() if not _is_ours(key)}
    _compare(present, stored, path / WEIGHTS, "host")


def _check_keys(target: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path) -> None:
    _compare(target, tensors, path, "model")
    sources: dict[int, tuple[str, Tensor]] = {}
    for key, value in target.items():
        name, first = sources.setdefault(id(value), (key, tensors[key]))
        if first is not tensors[key] and not _same_bits(first, tensors[key]):
            raise CheckpointError(
                f"{path} has different values for {name!r} and {key!r}, which this model ties"
            )


def _compare(target: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path, noun: str) -> None:
    """Raises CheckpointError naming what differs: a shape or type first, for it explains more than a name."""
    for key, value in target.items():
        stored = tensors.get(key)
        if stored is None or not isinstance(value, Tensor):
            continue
        if stored.shape != value.shape:
            raise CheckpointError(
                f"{path}: {key!r} has shape {list(stored.shape)}, in this {noun} it is {list(value.shape)}; "
                "build the host with the widths it was saved with"
            )
        if stored.dtype != value.dtype:
            raise CheckpointError(
                f"{path}: {key!r} is {stored.dtype}, in this {noun} it is {value.dtype}; cast the {noun} before loading"
            )
    missing, extra = sorted(target.keys() - tensors.keys()), sorted(tensors.keys() - target.keys())
    if missing:
        raise CheckpointError(
            f"{path} lacks {_some(missing)} of this {noun}; it is of another model, or was changed"
        )
    if extra:
        raise CheckpointError(
            f"{path} has {_some(extra)} that this {noun} has not; it is of another model, or was changed"
        )


def _some(names: list[str]) -> str:
    shown = ", ".join(map(repr, names[:3]))
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))


def _fill(model: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    target = model.state_dict(keep_vars=True)
    if not any(isinstance(value, Tensor) and value.is_meta for value in target.values()):
        model.load_state_dict(dict(tensors), strict=True)
        return
    _check_meta_buffers(model, target, path)
    fresh: dict[int, Tensor] = {}
    for key, value in target.items():
        if id(value) not in fresh:
            own = tensors[key].clone()
            is_parameter = isinstance(value, nn.Parameter)
            fresh[id(value)] = nn.Parameter(own, requires_grad=value.requires_grad) if is_parameter else own
    model.load_state_dict({key: fresh[id(value)] for key, value in target.items()}, strict=True, assign=True)


def _check_meta_buffers(model: nn.Module, saved: Mapping[str, Any], path: Path) -> None:
    for name, buffer in model.named_buffers():
        if buffer.is_meta and name not in saved and not _is_ours(name):
            raise CheckpointError(
                f"buffer {name!r} is on the meta device and not persistent, so {path} has no values for it; "
                "build the host on a real device"
            )
