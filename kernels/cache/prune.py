"""Making room: by age, size, arch or version. What a living process uses stays."""

from __future__ import annotations

import os
import re
import shutil
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Final

import msgspec

from morphc.errors import CacheError
from morphc.kernels.cache import inventory, leases, manifest, place, store
from morphc.kernels.cache.place import DamagedError

BOUND: Final = 2 << 30
"""Bytes that the cache may have; beyond, what was used longest ago goes."""

STALE_SECONDS: Final = 3600.0
"""Folders that somebody began to fill so long ago will not be finished."""

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 7 * 86400.0}
_SIZES = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}


class Victim(msgspec.Struct, frozen=True):
    """What goes. path: relative to the cache; size: bytes; reason: for people."""

    path: str
    size: int
    reason: str


class Pruned(msgspec.Struct, frozen=True):
    """removed: what went; stayed: what was chosen and stays, since a living process uses it."""

    removed: tuple[Victim, ...]
    stayed: tuple[Victim, ...]


def seconds(text: str) -> float:
    """`30d`, `12h`, `2w`, `90m`, `10s`. Raises CacheError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw])", text.strip().lower())
    if match is None:
        raise CacheError(f"{text!r} is no age: write it as 30d, 12h or 2w")
    return float(match[1]) * _UNITS[match[2]]


def size(text: str) -> int:
    """Bytes of `500M`, `2G`, `1.5GiB`, `4096`. Raises CacheError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:I?B)?", text.strip().upper())
    if match is None:
        raise CacheError(f"{text!r} is no size: write it as 500M or 2G")
    return int(float(match[1]) * (1 << _SIZES[match[2]]))


def choose(
    root: Path,
    *,
    older_than: float | None = None,
    larger_than: int | None = None,
    arch: str | None = None,
    version: str | None = None,
    checked: bool = True,
) -> list[Victim]:
    """What would go. older_than: seconds since its last use. larger_than: bytes that may stay in all; without any
    of the others it is BOUND. arch: compiled forms for it (`cuda:80`). version: what that version of morphc wrote, and
    what that version of Triton compiled.

    What is damaged goes too, and so does what died half-written and what is in quarantine. checked: look at every
    checksum for that.
    """
    now = time.time()
    arch = None if arch is None else store.target_named(arch)
    if older_than is None and arch is None and version is None and larger_than is None:
        larger_than = BOUND
    victims = _leftovers(root, now)
    if checked:
        _, problems = inventory.verify(root)
        victims += [Victim(one.path, _size(root / one.path), f"damaged: {one.problem}") for one in problems]
    gone = {victim.path for victim in victims}
    left: list[inventory.Entry] = []
    for entry in inventory.entries(root):
        path = f"kernels/{os.path.basename(entry.folder)}"
        if path in gone:
            continue
        # A clock that went back leaves times in the future: those are no age.
        age = max(0.0, now - entry.used)
        if older_than is not None and age > older_than:
            victims.append(Victim(path, entry.size, f"last used {told_age(age)} ago"))
        elif version is not None and entry.morphc == version:
            victims.append(Victim(path, entry.size, f"written by morphc {version}"))
        else:
            forms = [one for one in _binaries(root, entry, arch, version) if one.path not in gone]
            victims += forms
            left.append(msgspec.structs.replace(entry, size=entry.size - sum(one.size for one in forms)))
    total = sum(entry.size for entry in left)
    if larger_than is not None:
        for entry in sorted(left, key=lambda one: one.used):
            if total <= larger_than:
                break
            total -= entry.size
            victims.append(
                Victim(
                    f"kernels/{os.path.basename(entry.folder)}",
                    entry.size,
                    f"beyond {told_size(larger_than)}, used longest ago",
                )
            )
    return victims


def _binaries(root: Path, entry: inventory.Entry, arch: str | None, version: str | None) -> list[Victim]:
    if arch is None and version is None:
        return []
    found = []
    wanted = None if arch is None else store.arch_folder(arch)
    for path, target in inventory.binary_folders(entry.folder):
        try:
            told, _ = manifest.read(path)
        except (OSError, DamagedError):
            continue
        triton = told.made_from.get("triton")
        reason = (
            f"for {arch}" if target == wanted else f"compiled by triton {triton}" if triton == version else ""
        )
        if reason:
            held = sum(file.size for file in told.files.values())
            found.append(Victim(str(Path(path).relative_to(root)), held, reason))
    return found


def _leftovers(root: Path, now: float) -> list[Victim]:
    found = []
    for folder, reason in ((root / "quarantine", "in quarantine"), (root, ""), (store.kernels(root), "")):
        try:
            names = sorted(os.listdir(folder))
        except OSError:
            continue
        for name in names:
            path = folder / name
            if reason or (place.staged(name) and _old(path, now)):
                found.append(Victim(str(path.relative_to(root)), _size(path), reason or "was never finished"))
    return found


def _old(path: Path, now: float) -> bool:
    try:
        return abs(now - os.lstat(path).st_mtime) > STALE_SECONDS
    except OSError:
        return False


def _size(path: Path) -> int:
    if not place.is_folder(path):
        with suppress(OSError):
            return os.lstat(path).st_size
        return 0
    return sum(_size(path / name) for name in os.listdir(path))


def remove(root: Path, victims: list[Victim]) -> Pruned:
    """Remove them, but for entries that are in use. Raises CacheError where the cache can't be written."""
    removed: list[Victim] = []
    stayed: list[Victim] = []
    used = leases.in_use(root)
    for victim in victims:
        parts = Path(victim.path).parts
        entry = parts[1] if parts[0] == "kernels" else ""
        if entry in used:
            stayed.append(victim)
            continue
        try:
            gone = _remove(root, root / victim.path, entry)
        except OSError as error:
            raise CacheError(f"{root / victim.path} can't be removed: {error.strerror}") from error
        (removed if gone else stayed).append(victim)
    return Pruned(tuple(removed), tuple(stayed))


def _remove(root: Path, path: Path, entry: str) -> bool:
    """Out of sight first, so that nobody finds half of it."""
    aside = path.with_name(f".{uuid.uuid4().hex}")
    try:
        path.rename(aside)
    except FileNotFoundError:
        return True
    # Somebody may have begun to use it between the question and the rename.
    if entry and entry in leases.in_use(root) and not os.path.lexists(path):
        aside.rename(path)
        return False
    if place.is_folder(aside):
        shutil.rmtree(aside)
    else:
        aside.unlink()
    return True


def keep_bound(root: Path, bound: int = BOUND) -> Pruned | None:
    """Make room if it is a day since that was last asked; None where it isn't, or nothing can be done."""
    mark = root / "pruned"
    now = time.time()
    with suppress(OSError):
        if abs(now - mark.stat().st_mtime) < 86400.0:
            return None
    try:
        mark.touch()
        os.utime(mark)
        return remove(root, choose(root, larger_than=bound, checked=False))
    except (OSError, CacheError):
        return None


def told_age(age: float) -> str:
    """`3 d`, `5 h`, `12 min`, `40 s`."""
    for unit, name in ((86400.0, "d"), (3600.0, "h"), (60.0, "min")):
        if age >= unit:
            return f"{age / unit:.0f} {name}"
    return f"{age:.0f} s"


def told_size(number: int) -> str:
    """`1.2 MiB`."""
    value = float(number)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"
