"""Finding and publishing: entries (a generated kernel) and in them binaries (one compiled form of it).

Whatever isn't whole is moved to `quarantine/` with one warning and counts as not there. Nothing here decides what to
do where the cache can't be written: that raises OSError.
"""

from __future__ import annotations

import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, NamedTuple

import filelock
import msgspec

from morphc.errors import CacheError
from morphc.kernels.cache import leases, manifest, place
from morphc.kernels.cache.manifest import Manifest, Provenance
from morphc.kernels.cache.place import DamagedError
from morphc.version import __version__

LOCK_SECONDS: Final = 150.0
"""How long somebody else's compile is waited for: a little more than one may take."""

USED_SECONDS: Final = 3600.0
"""An entry's time of last use is as exact as this."""


class Found(NamedTuple):
    """A whole folder of the cache."""

    folder: Path
    manifest: Manifest


def kernels(root: Path) -> Path:
    """Where entries are."""
    return root / "kernels"


def entry_name(name: str, key: str) -> str:
    """Folder of an entry: the kernel's name, and the beginning of its key."""
    short = re.sub(r"[^A-Za-z0-9_.-]", "_", name)[:120].lstrip(".")
    return f"{short}-{key[:12]}"


def arch_folder(target: str) -> str:
    """`cuda-90` for `cuda:90`: a colon is no part of a file's name everywhere."""
    return re.sub(r"[^A-Za-z0-9_.-]", "-", target)


def target_named(text: str) -> str:
    """The target that a user means: `cuda:90`, or `90` and `cuda-90` as listings and folders have it.

    Raises CacheError for what names none. One that this version doesn't know is fine: its kernels may be here.
    """
    if found := re.fullmatch(r"(?:cuda[:-])?(\d+)", text):
        return f"cuda:{found[1]}"
    if found := re.fullmatch(r"(?:hip[:-])?(gfx\w+)", text):
        return f"hip:{found[1]}"
    raise CacheError(f"{text!r} is no architecture: write it as cuda:90 or hip:gfx942")


def find(folder: Path, kind: str, root: Path) -> Found | None:
    """A whole entry or binary; None where there is none, or none any more. It is in use from here on."""
    entry = folder if kind == "kernel" else folder.parents[2]
    leases.hold(root, entry.name)
    try:
        found = Found(folder, _verified_twice(folder, kind))
    except FileNotFoundError:
        return None
    except DamagedError as damage:
        quarantine(folder, root, str(damage))
        return None
    touch(folder / manifest.NAME)
    return found


def _verified_twice(folder: Path, kind: str) -> Manifest:
    """Between two files that are read, somebody may have moved the folder away and put a whole one in its place."""
    try:
        return manifest.verify(folder, kind)
    except DamagedError:
        return manifest.verify(folder, kind)


def touch(path: Path) -> None:
    """Note that it was used, once an hour at most; a clock that went back makes no entry old."""
    now = time.time()
    with suppress(OSError):
        used = os.stat(path).st_mtime
        if not now - USED_SECONDS < used <= now + USED_SECONDS:
            os.utime(path)


def quarantine(folder: Path, root: Path, reason: str) -> None:
    """Move a folder out of the way, with one warning. Raises OSError where that can't be."""
    name = str(folder.relative_to(kernels(root))).replace(os.sep, "/")
    aside = root / "quarantine" / f"{name.replace('/', '+')[:200]}-{uuid.uuid4().hex[:8]}"
    try:
        aside.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(aside)
    except FileNotFoundError:
        return  # somebody else has moved it
    except OSError as error:
        place.warn_once(
            "damaged",
            folder,
            f"cache entry {name} is not what was put there ({reason}), and can't be moved away "
            f"({error.strerror}); it is not used",
        )
        raise
    place.warn_once(
        "damaged",
        aside,
        f"cache entry {name} is not what was put there ({reason}); moved to {aside}, and made again",
    )


def put_kernel(
    root: Path,
    name: str,
    made_from: Mapping[str, Any],
    files: Mapping[str, bytes],
    told: Provenance,
) -> Found:
    """The entry of that kernel, published if it wasn't there. Its files are the ones given, or it isn't whole."""
    folder = kernels(root) / entry_name(name, place.key_of(made_from))
    found = find(folder, "kernel", root)
    if found is not None:
        wrong = [
            file for file, data in files.items() if found.manifest.files[file].sha256 != place.digest(data)
        ]
        if not wrong:
            return found
        quarantine(folder, root, f"{wrong[0]} is not what this morphc writes")
    fresh = place.stage(folder.parent)
    try:
        details = {"name": name, "created": time.time(), "morphc": __version__}
        made = manifest.write(fresh, "kernel", made_from, files, details)
        (fresh / manifest.PROVENANCE).write_bytes(manifest.sealed(told))
    except BaseException:
        _remove(fresh)
        raise
    leases.hold(root, folder.name)
    if place.publish(fresh, folder):
        return Found(folder, made)
    return Found(folder, manifest.verify(folder, "kernel"))


def binary_folder(entry: Path, made_from: Mapping[str, Any]) -> Path:
    """Where a compiled form is, or would be."""
    name = entry_name(str(made_from["function"]), place.key_of(made_from))
    return entry / manifest.BINARIES / arch_folder(str(made_from["target"])) / name


def find_binary(root: Path, entry: Path, made_from: Mapping[str, Any]) -> Found | None:
    """A whole binary of an entry; None where it has to be compiled."""
    folder = binary_folder(entry, made_from)
    for above in (folder.parent, folder.parent.parent):
        if os.path.lexists(above) and not place.is_folder(above):
            quarantine(above, root, f"{above.name} is no folder")
            return None
    return find(folder, "binary", root)


def put_binary(
    entry: Path, made_from: Mapping[str, Any], files: Mapping[str, bytes], details: Mapping[str, Any]
) -> Path:
    """Publish what was compiled; somebody else's of the same key is as good. Raises OSError."""
    folder = binary_folder(entry, made_from)
    fresh = place.stage(folder.parent)
    try:
        manifest.write(
            fresh, "binary", made_from, files, {"created": time.time(), "morphc": __version__} | dict(details)
        )
    except BaseException:
        _remove(fresh)
        raise
    place.publish(fresh, folder)
    return folder


def add_provenance(entry: Path, told: Provenance) -> None:
    """Add to the layers and lines that a kernel is for. Of two processes that do so at once, one may be lost."""
    # It is for people to read: a cache that can't be written does without.
    with suppress(OSError, DamagedError):
        before = manifest.provenance(entry)
        after = Provenance(
            tuple(dict.fromkeys((*before.layers, *told.layers))),
            tuple(dict.fromkeys((*before.sources, *told.sources))),
            told.template,
        )
        if after != msgspec.structs.replace(before, check=""):
            place.replace(entry / manifest.PROVENANCE, manifest.sealed(after))


@contextmanager
def alone(root: Path, key: str, seconds: float | None = None) -> Iterator[bool]:
    """Compile a kernel once where many want it. False where the lock can't be had: go on without keeping anything."""
    held: filelock.BaseFileLock | None = None
    try:
        folder = root / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        held = filelock.FileLock(
            folder / f"{key[:24]}.lock", timeout=LOCK_SECONDS if seconds is None else seconds
        )
        held.acquire()
    except (OSError, filelock.Timeout, NotImplementedError) as error:
        held = None
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "somebody else holds it"
        place.warn_once(
            "lock",
            root,
            f"a lock in {root / 'locks'} can't be had ({reason}): kernels are compiled, and not kept",
        )
    try:
        yield held is not None
    finally:
        if held is not None:
            # Who waits for it goes on with a file that has no name: at worst a kernel is compiled twice.
            with suppress(OSError):
                os.unlink(held.lock_file)
            held.release()


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
