"""Why something isn't in the cache: the nearest thing that is, and the fields in which it differs."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

from morphc.kernels.cache import manifest, place, store
from morphc.kernels.cache.manifest import Manifest
from morphc.kernels.cache.place import DamagedError

NEVER: Final = "nothing like it was ever kept here"
_FEW: Final = 8


class Difference(msgspec.Struct, frozen=True):
    """One field; None where one side hasn't got it. have: in the cache; want: asked for."""

    field: str
    have: Any
    want: Any

    def __str__(self) -> str:
        return f"{self.field}: {_short(self.have)} -> {_short(self.want)}"


def _short(value: Any) -> str:
    if value is None:
        return "none"
    text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
    # A digest says nothing beyond its beginning.
    if len(text) == 64 and all(letter in "0123456789abcdef" for letter in text):
        return text[:12]
    return text if len(text) <= 60 else f"{text[:57]}..."


def differences(have: Mapping[str, Any], want: Mapping[str, Any]) -> tuple[Difference, ...]:
    """Every field that isn't equal, fields of fields as `spec.rank`."""
    old, new = dict(_flat(have)), dict(_flat(want))
    return tuple(
        Difference(name, old.get(name), new.get(name))
        for name in dict.fromkeys((*new, *old))
        if old.get(name) != new.get(name)
    )


def _flat(value: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for name, each in value.items():
        if isinstance(each, Mapping) and each:
            yield from _flat(each, f"{above}{name}.")
        else:
            yield f"{above}{name}", each


def nearest(
    found: Iterator[Manifest], want: Mapping[str, Any]
) -> tuple[Manifest, tuple[Difference, ...]] | None:
    """The one with the fewest differences, of equals the first."""
    wanted = msgspec.json.decode(place.canonical(dict(want)))
    best: tuple[Manifest, tuple[Difference, ...]] | None = None
    for one in found:
        told = differences(one.made_from, wanted)
        if best is None or len(told) < len(best[1]):
            best = one, told
    return best


def manifests_in(folder: Path, prefix: str = "") -> Iterator[Manifest]:
    """Of every folder in `folder` that has a readable one and a name that begins so."""
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return
    for name in names:
        if name.startswith(prefix) and not place.staged(name):
            try:
                yield manifest.read(folder / name)[0]
            except (OSError, DamagedError):
                continue


def of_binary(root: Path, entry: Path, want: Mapping[str, Any]) -> tuple[str, ...]:
    """Why a compiled form isn't there, one line a reason."""
    compiled = (
        each
        for arch in _folders(entry / manifest.BINARIES)
        for each in manifests_in(arch)
        if each.made_from.get("function") == want["function"]
    )
    if found := nearest(compiled, want):
        return tuple(map(str, found[1])) or ("it was damaged",)
    try:
        own, _ = manifest.read(entry)
    except (OSError, DamagedError):
        return (NEVER,)
    name = entry.name.removesuffix(f"-{own.key[:12]}")
    others = (each for each in manifests_in(store.kernels(root), f"{name}-") if each.key != own.key)
    found = nearest(others, own.made_from) or nearest(_compiled_like(root, entry.name), own.made_from)
    return tuple(map(str, found[1])) if found else (NEVER,)


def _compiled_like(root: Path, name: str) -> Iterator[Manifest]:
    """A few compiled kernels whose names begin as `name` does, by how long they do, at least with kind and blueprint.

    Only these are read: a cache has thousands.
    """
    kernels = store.kernels(root)
    try:
        names = os.listdir(kernels)
    except OSError:
        return
    least = len(name.partition("_h")[0]) + 2
    shared = {one: _shared(one, name) for one in names if one != name}
    alike = [one for one, length in shared.items() if length >= least]
    alike.sort(key=lambda one: (-shared[one], one))
    for one in alike[:_FEW]:
        if _folders(kernels / one / manifest.BINARIES):
            with contextlib.suppress(OSError, DamagedError):
                yield manifest.read(kernels / one)[0]


def _shared(one: str, other: str) -> int:
    """How many letters both begin with."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _folders(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if place.is_folder(path))
    except OSError:
        return []
