"""Manifests: what a folder of the cache holds, file by file, and what it was made from.

A manifest has a checksum of itself, so that a flipped bit anywhere is found. Checksums tell damage and accidents; who
can write to the cache as its user can also write a manifest that fits.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal

import msgspec

from morphc.kernels.cache import place
from morphc.kernels.cache.place import DamagedError

NAME: Final = "manifest.json"
PROVENANCE: Final = "provenance.json"
BINARIES: Final = "bin"
_MOST = 1 << 20


class FileSum(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """sha256 (hex) and size (bytes) of a file."""

    sha256: str
    size: int


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """kind: `kernel` for an entry, `binary` for one of its compiled forms. key: of `made_from`.

    details: what is told of it and decides nothing: times, resources, versions. check: of all the rest.
    """

    schema: int
    kind: Literal["kernel", "binary"]
    key: str
    made_from: dict[str, Any]
    files: dict[str, FileSum]
    details: dict[str, Any]
    check: str = ""


class Provenance(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Who a kernel is for: the paths of its layers, and the user's lines that made them."""

    layers: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    template: str = ""
    check: str = ""


def write(
    folder: Path,
    kind: Literal["kernel", "binary"],
    made_from: Mapping[str, Any],
    files: Mapping[str, bytes],
    details: Mapping[str, Any],
) -> Manifest:
    """Write the files and their manifest into a folder that nobody reads yet."""
    sums = {}
    for name, data in files.items():
        (folder / name).write_bytes(data)
        sums[name] = FileSum(place.digest(data), len(data))
    plain = msgspec.json.decode(place.canonical(dict(made_from)))
    told = msgspec.json.decode(place.canonical(dict(details)))
    made = Manifest(place.SCHEMA, kind, place.key_of(plain), plain, sums, told)
    made = msgspec.structs.replace(made, check=_check(made))
    (folder / NAME).write_bytes(msgspec.json.format(msgspec.json.encode(made), indent=2))
    return made


def _check(made: Manifest | Provenance) -> str:
    return place.digest(place.canonical(msgspec.structs.replace(made, check="")))


def read(folder: Path | str) -> tuple[Manifest, float]:
    """A folder's manifest, itself checked, and when it was last used (seconds of the epoch).

    Raises FileNotFoundError where there is no such folder, DamagedError for anything else that isn't whole.
    """
    try:
        data, used = place.read_with_time(f"{folder}/{NAME}", _MOST)
    except (FileNotFoundError, NotADirectoryError) as error:
        if not os.path.lexists(folder):
            raise FileNotFoundError(folder) from error
        raise DamagedError(f"{NAME} is missing") from error
    try:
        found = _decoder.decode(data)
    except place.UNREADABLE as error:
        raise DamagedError(f"{NAME} is damaged: {error}") from error
    if found.schema != place.SCHEMA:
        raise DamagedError(f"{NAME} has the schema {found.schema}; this morphc reads {place.SCHEMA}")
    if _check(found) != found.check:
        raise DamagedError(f"{NAME} is damaged: its own checksum doesn't fit")
    return found, used


_decoder = msgspec.json.Decoder(Manifest)
_provenance_decoder = msgspec.json.Decoder(Provenance)


class Glance(msgspec.Struct):
    """As much of a manifest as a list of many shows."""

    schema: int
    key: str
    files: dict[str, FileSum]
    details: dict[str, Any]


def glance(folder: str) -> tuple[Glance, float]:
    """A manifest read without looking at its checksum, and when it was last used. Raises like `read`."""
    try:
        data, used = place.read_with_time(f"{folder}/{NAME}", _MOST)
        return _glance_decoder.decode(data), used
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DamagedError(f"{NAME} is missing") from error
    except place.UNREADABLE as error:
        raise DamagedError(f"{NAME} is damaged: {error}") from error


class _Layers(msgspec.Struct):
    layers: tuple[str, ...]


def layers(folder: str) -> tuple[str, ...]:
    """The layers of an entry, read without looking at the checksum. Raises DamagedError."""
    try:
        return _layers_decoder.decode(place.read(f"{folder}/{PROVENANCE}", _MOST)).layers
    except FileNotFoundError as error:
        raise DamagedError(f"{PROVENANCE} is missing") from error
    except place.UNREADABLE as error:
        raise DamagedError(f"{PROVENANCE} is damaged: {error}") from error


_glance_decoder = msgspec.json.Decoder(Glance)
_layers_decoder = msgspec.json.Decoder(_Layers)


def verify(folder: Path, kind: str) -> Manifest:
    """A folder whose every file is what was put there. Raises like `read`."""
    # A name that leads elsewhere would be read through.
    if not stat.S_ISDIR(os.lstat(folder).st_mode):
        raise DamagedError(f"{folder.name} is no folder")
    found, _ = read(folder)
    if found.kind != kind or place.key_of(found.made_from) != found.key:
        raise DamagedError(f"{NAME} is of another {kind}")
    if not place.staged(folder.name) and not folder.name.endswith(f"-{found.key[:12]}"):
        raise DamagedError(f"{NAME} belongs to {found.key[:12]}, not here")
    for name, told in found.files.items():
        _verify_file(folder, name, told)
    known = {NAME, *found.files}
    if kind == "kernel":
        known |= {PROVENANCE, BINARIES}
        provenance(folder)
    for name in os.listdir(folder):
        if name not in known and not place.staged(name):
            raise DamagedError(f"holds {name}, which nobody put there")
    return found


def _verify_file(folder: Path, name: str, told: FileSum) -> None:
    if "/" in name or "\\" in name or name in ("", ".", ".."):
        raise DamagedError(f"{NAME} names a file {name!r}")
    try:
        data = place.read(folder / name)
    except FileNotFoundError as error:
        raise DamagedError(f"{name} is missing") from error
    if len(data) != told.size:
        raise DamagedError(f"{name} has {len(data)} B, {told.size} B were put there")
    if place.digest(data) != told.sha256:
        raise DamagedError(f"{name} is not what was put there: its checksum doesn't fit")


def provenance(folder: Path | str) -> Provenance:
    """Who an entry is for. Raises DamagedError."""
    try:
        found = _provenance_decoder.decode(place.read(f"{folder}/{PROVENANCE}", _MOST))
    except FileNotFoundError as error:
        raise DamagedError(f"{PROVENANCE} is missing") from error
    except place.UNREADABLE as error:
        raise DamagedError(f"{PROVENANCE} is damaged: {error}") from error
    if _check(found) != found.check:
        raise DamagedError(f"{PROVENANCE} is not what was put there: its checksum doesn't fit")
    return found


def sealed(told: Provenance) -> bytes:
    """The file of `told`."""
    made = msgspec.structs.replace(told, check="")
    made = msgspec.structs.replace(made, check=_check(made))
    return msgspec.json.format(msgspec.json.encode(made), indent=2)
