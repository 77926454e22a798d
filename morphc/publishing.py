"""Directories that appear whole under their name, whatever becomes of the process that writes them.

What is written lies in a sibling directory and takes the name by a rename. Where the name was taken, the old one steps
aside first; a process that is killed between the two renames leaves `.<name>.<host>-<pid>-<id>.old`, which
`recover` puts back. What else killed processes leave is removed by the next one that writes.
"""

from __future__ import annotations

import os
import platform
import shutil
import time
import uuid
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

PATIENCE: Final = 5.0
"""Seconds to wait for a process that may still be between its two renames."""


@contextmanager
def sibling(target: Path) -> Iterator[Path]:
    """A new directory beside `target`, gone again unless it was renamed."""
    recover(target)
    for left in _siblings(target, "*"):
        if _is_dead(left):
            shutil.rmtree(left, ignore_errors=True)
    fresh = target.with_name(f".{target.name}.{_host()}-{os.getpid()}-{uuid.uuid4().hex[:12]}.part")
    fresh.mkdir()
    try:
        yield fresh
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def publish(fresh: Path, target: Path) -> None:
    """Rename `fresh` to `target`, in the place of what is there."""
    if not target.exists():
        fresh.rename(target)
        return
    # No portable call swaps two directories: the old one steps aside, and back if the new one can't take its place.
    aside = fresh.with_suffix(".old")
    target.rename(aside)
    try:
        fresh.rename(target)
    except BaseException:
        aside.rename(target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def recover(target: Path) -> None:
    """If a process was killed while it replaced `target`, put back what was there."""
    deadline = time.monotonic() + PATIENCE
    while not os.path.lexists(target):
        left = _siblings(target, ".old")
        if not left:
            return
        if _is_dead(left[-1]) or time.monotonic() > deadline:
            try:
                left[-1].rename(target)
            except FileNotFoundError:
                continue  # another process was faster
            except OSError:
                return  # where nothing can be renamed, there is nothing under the name, and the caller says so
        time.sleep(0.01)


def sync(path: Path) -> None:
    """Wait until a file is on the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _host() -> str:
    return f"{zlib.crc32(platform.node().encode()):08x}"


def _siblings(target: Path, kind: str) -> list[Path]:
    """What processes have laid beside `target`, the latest last. kind: `.part`, `.old`, or `*` for both."""
    prefix, ends = f".{target.name}.", (".part", ".old") if kind == "*" else (kind,)
    try:
        found = [path for path in target.parent.iterdir() if path.name.startswith(prefix)]
        return sorted(
            (path for path in found if path.suffix in ends and len(path.name[len(prefix) :].split("-")) == 3),
            key=lambda path: path.stat().st_mtime_ns,
        )
    except OSError:
        return []


def _is_dead(path: Path) -> bool:
    """Whether the process that laid it there was one of this machine and is no more."""
    host, pid, _ = path.name.rsplit(".", 2)[-2].split("-")
    if host != _host() or not pid.isdigit():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False
