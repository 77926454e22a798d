"""Which entries living processes use: those are not pruned.

A process holds a lock on a file of its own for as long as it lives, and writes the entries that it uses, one a line,
into a second file beside. Who prunes tries the lock: if it is free its holder is gone.
"""

from __future__ import annotations

import atexit
import os
import threading
import uuid
from contextlib import suppress
from pathlib import Path

import filelock

from morphc.kernels.cache import place


class Lease:
    """This process's. A cache that can't be written has none, and can't be pruned either."""

    def __init__(self, root: Path) -> None:
        folder = root / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        stem = f"use-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self.told = folder / f"{stem}.txt"
        self.lock = filelock.FileLock(folder / f"{stem}.lock")
        self.lock.acquire(timeout=0)
        self.entries: set[str] = set()

    def end(self) -> None:
        """Use nothing any more, and leave nothing behind."""
        for path in (self.told, Path(self.lock.lock_file)):
            with suppress(OSError):
                path.unlink()
        self.lock.release()

    def add(self, entry: str) -> None:
        """Say that `entry`, a folder's name, is in use from here on."""
        if entry not in self.entries:
            # One write of one line, at the end of the file: nobody else writes to it.
            with self.told.open("a", encoding="utf-8") as file:
                file.write(f"{entry}\n")
            self.entries.add(entry)


_lock = threading.Lock()
_leases: dict[Path, Lease | None] = {}


def hold(root: Path, entry: str) -> None:
    """Keep `entry` from being pruned until this process ends; does nothing where that can't be said."""
    with _lock:
        if root not in _leases:
            try:
                _leases[root] = Lease(root)
            except (OSError, filelock.Timeout, NotImplementedError):
                _leases[root] = None
        lease = _leases[root]
        if lease is not None:
            with suppress(OSError):
                lease.add(entry)


@atexit.register
def release() -> None:
    """Give all leases back."""
    with _lock:
        for lease in _leases.values():
            if lease is not None:
                lease.end()
        _leases.clear()


def _forget() -> None:
    """A forked child holds its parent's locks along with it, and needs leases of its own."""
    global _lock
    _lock = threading.Lock()
    _leases.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def in_use(root: Path) -> set[str]:
    """Names of the entries that living processes use, this one's too. What dead ones left behind is removed."""
    found: set[str] = set()
    for lock in sorted((root / "locks").glob("use-*.lock")):
        told = lock.with_suffix(".txt")
        if _alive(root, lock):
            with suppress(OSError, UnicodeDecodeError, place.DamagedError):
                found.update(place.read(told).decode().splitlines())
        else:
            for path in (told, lock):
                with suppress(OSError):
                    path.unlink()
    return found


def _alive(root: Path, path: Path) -> bool:
    own = _leases.get(root)
    if own is not None and Path(own.lock.lock_file) == path:
        return True
    probe = filelock.FileLock(path)
    try:
        probe.acquire(timeout=0)
    except (filelock.Timeout, OSError, NotImplementedError):
        # What can't be asked may be in use.
        return True
    probe.release()
    return False
