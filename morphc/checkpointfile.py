"""A checkpoint on disk: a directory with `model.safetensors` and `morphc.json`.

It is published by a rename of a finished sibling directory, so there is never half a checkpoint under its name. Nothing
in it is code: no pickle is written or read.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from morphc.errors import CheckpointError
from morphc.passes.plan import SCHEMA_VERSION as PLAN_SCHEMA_VERSION
from morphc.passes.plan import Plan
from morphc.publishing import publish, recover, sibling, sync
from morphc.version import __version__

WEIGHTS: Final = "model.safetensors"
MANIFEST: Final = "morphc.json"
FORMAT: Final = "morphc checkpoint"
SCHEMA_VERSION: Final = 1


class Weights(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the weights file must be. `bytes` is its size."""

    file: str
    bytes: int
    sha256: str


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`morphc.json`. tied: name of a tensor -> the name that the same tensor is stored under. sha256: see `seal`; empty
    in files of before there was one.
    """

    format: Literal["morphc checkpoint"]
    schema_version: int
    morphc_version: str
    weights: Weights
    tied: dict[str, str]
    plan: Plan
    sha256: str = ""


class _Head(msgspec.Struct):
    """What is read before anything else: a newer schema must not fail on a field that this version doesn't know."""

    format: str = ""
    schema_version: int = 0
    morphc_version: str = ""
    plan: dict[str, Any] = {}


def write(directory: Path, tensors: Mapping[str, Tensor], tied: Mapping[str, str], plan: Plan) -> None:
    """Write a checkpoint, in place of one that is there. Raises CheckpointError; then nothing has changed."""
    target = Path(os.path.realpath(directory))
    recover(target)
    _check_replaceable(directory, target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with sibling(target) as fresh:
            weights = fresh / WEIGHTS
            save_file(dict(tensors), weights, metadata={"format": "pt"})
            manifest = Manifest(
                format="morphc checkpoint",
                schema_version=SCHEMA_VERSION,
                morphc_version=__version__,
                weights=Weights(WEIGHTS, weights.stat().st_size, sha256_of(weights)),
                tied=dict(tied),
                plan=plan,
            )
            manifest = msgspec.structs.replace(manifest, sha256=seal(msgspec.json.encode(manifest)))
            encoded = msgspec.json.format(msgspec.json.encode(manifest, order="sorted"), indent=1)
            (fresh / MANIFEST).write_bytes(encoded + b"\n")
            for path in (weights, fresh / MANIFEST):
                sync(path)
            publish(fresh, target)
    except OSError as error:
        raise CheckpointError(f"{directory} can't be written: {error}") from error
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{directory / WEIGHTS} can't be written: {error}") from error


def _check_replaceable(directory: Path, target: Path) -> None:
    if not os.path.lexists(target):
        return
    way_out = "give a new directory, or one that holds a morphc checkpoint and nothing else"
    if not target.is_dir():
        raise CheckpointError(f"{directory} is a file, not a directory; {way_out}")
    names = sorted(path.name for path in target.iterdir())
    others = [name for name in names if name not in (WEIGHTS, MANIFEST)]
    if others or (names and MANIFEST not in names) or (names and not _is_manifest(target / MANIFEST)):
        raise CheckpointError(
            f"{directory} holds something else than a morphc checkpoint ({', '.join((others or names)[:4])}) "
            f"and is not overwritten; {way_out}"
        )


def _is_manifest(path: Path) -> bool:
    try:
        return msgspec.json.decode(path.read_bytes(), type=_Head).format == FORMAT
    except (OSError, msgspec.MsgspecError):
        return False


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal(data: bytes) -> str:
    """sha256 of a manifest's JSON without its own `sha256`, however it is laid out."""
    fields = {**msgspec.json.decode(data), "sha256": ""}
    return hashlib.sha256(msgspec.json.encode(fields, order="sorted")).hexdigest()


def read_manifest(directory: Path) -> Manifest:
    """`morphc.json`, checked. Raises CheckpointError naming file, field and way out."""
    path = directory / MANIFEST
    recover(directory)
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is no directory; give the one that morphc.save wrote")
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; give a directory that morphc.save wrote") from None
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror or error}") from error
    try:
        head = msgspec.json.decode(data, type=_Head)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is truncated or damaged ({error}); save the model again") from error
    if head.format != FORMAT:
        raise CheckpointError(
            f"{path} has format={head.format!r}, not {FORMAT!r}; it is no morphc checkpoint"
        )
    versions = (
        ("schema_version", head.schema_version, SCHEMA_VERSION),
        ("plan.schema_version", head.plan.get("schema_version", PLAN_SCHEMA_VERSION), PLAN_SCHEMA_VERSION),
    )
    for field, found, known in versions:
        if found != known:
            newer = isinstance(found, int) and found > known
            writer = f"morphc {head.morphc_version}" if head.morphc_version else "the morphc that wrote it"
            raise CheckpointError(
                f"{path} has {field}={found}, this morphc ({__version__}) reads {known}; load it with {writer}"
                f"{' or a newer one' if newer else ''}. Without the seeds, the host's weights load from {WEIGHTS}: "
                "host.load_state_dict(safetensors.torch.load_file(...), strict=False)"
            )
    try:
        manifest = msgspec.json.decode(data, type=Manifest)
    except msgspec.MsgspecError as error:
        way_out = "the file was changed, save the model again"
        if head.morphc_version not in ("", __version__):
            way_out = (
                f"it was written by morphc {head.morphc_version}, this is {__version__}: load it with that"
            )
        raise CheckpointError(f"{path}: {error}; {way_out}") from error
    if manifest.sha256 and manifest.sha256 != seal(data):
        raise CheckpointError(f"{path} is damaged: its sha256 isn't that of its fields; copy it again")
    return manifest


def read_tensors(directory: Path, manifest: Manifest) -> dict[str, Tensor]:
    """All tensors, tied ones under each of their names. Raises CheckpointError before any is handed out."""
    weights = manifest.weights
    if Path(weights.file).name != weights.file:
        raise CheckpointError(
            f"{directory / MANIFEST} has weights.file={weights.file!r}, which is no plain file name"
        )
    path = directory / weights.file
    try:
        size = path.stat().st_size
        if size != weights.bytes:
            raise CheckpointError(
                f"{path} is {'truncated' if size < weights.bytes else 'longer than it was'}: {size} bytes, "
                f"weights.bytes in {MANIFEST} says {weights.bytes}; copy it again"
            )
        if sha256_of(path) != weights.sha256:
            raise CheckpointError(
                f"{path} is damaged: its sha256 isn't weights.sha256 of {MANIFEST}; copy it again"
            )
        tensors = _tensors(path)
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} is missing, and {MANIFEST} names it; copy the whole directory"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror or error}") from error
    for alias, name in manifest.tied.items():
        if name not in tensors:
            raise CheckpointError(
                f"{directory / MANIFEST}: tied[{alias!r}] is {name!r}, which {weights.file} has not"
            )
        if alias in tensors:
            raise CheckpointError(
                f"{directory / MANIFEST}: tied names {alias!r}, which {weights.file} has itself"
            )
        tensors[alias] = tensors[name]
    return tensors


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(f"{path} is no safetensors file ({error}); save the model again") from error


def storable(tensors: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(the tensors to store, alias -> stored name), from a state dict. Raises CheckpointError naming the key."""
    stored: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    views: dict[tuple[object, ...], str] = {}
    storages: set[tuple[torch.device, int]] = set()
    for name, value in tensors.items():
        tensor = _plain(name, value)
        storage = (tensor.device, tensor.untyped_storage().data_ptr())
        view = (*storage, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and view in views:
            tied[name] = views[view]
            continue
        if tensor.numel():
            views[view] = name
        # Another part of memory that is stored already: a copy, for the file's tensors don't overlap.
        stored[name] = tensor.contiguous() if storage not in storages else tensor.clone().contiguous()
        storages.add(storage)
    return stored, tied


def _plain(name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise CheckpointError(
            f"state-dict entry {name!r} is a {type(value).__name__}, and a checkpoint holds tensors only; "
            "let get_extra_state return a tensor"
        )
    tensor = value.detach()
    if tensor.is_meta:
        raise CheckpointError(f"{name!r} is on the meta device and has no values to save; load weights first")
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise CheckpointError(
            f"{name!r} is a {tensor.layout} {tensor.dtype} tensor, which safetensors can't hold"
        )
    if type(tensor) is not Tensor:
        raise CheckpointError(
            f"{name!r} is a {type(value).__name__}, which safetensors can't hold; gather it first, "
            "or save with morphc.integrations.dcp"
        )
    return tensor.resolve_conj().resolve_neg()
