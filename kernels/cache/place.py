"""Files of the cache: where they are, how they appear all at once, and how they are read without following links."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import uuid
import warnings
from pathlib import Path
from typing import Any, Final

import msgspec
import platformdirs

from morphc.errors import MorphcWarning

SCHEMA: Final = 1
"""Of every file that is written here. Another one is another version's, and left alone."""

LARGEST: Final = 64 << 20
"""Bytes of the largest file that is read: a kernel's binary has some tens of thousands."""

UNREADABLE: Final = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""What decoding JSON may raise; the last one where it is nested deeper than Python's stack."""

_STAGED = "."


class DamagedError(Exception):
    """What lies there is not what was put there; the message says in which way."""


def root() -> Path:
    """`$MORPHC_CACHE_DIR/v1`, or `morphc/v1` in the platform's cache folder."""
    given = os.environ.get("MORPHC_CACHE_DIR")
    base = given or platformdirs.user_cache_dir("morphc", appauthor=False)
    # Absolute, since a process may change its folder.
    return Path(os.path.abspath(base)) / "v1"


def canonical(value: Any) -> bytes:
    """JSON that is the same for equal values; what has no JSON is taken by its repr."""
    return msgspec.json.encode(value, order="sorted", enc_hook=repr)


def digest(data: bytes) -> str:
    """sha256, hex."""
    return hashlib.sha256(data).hexdigest()


def key_of(made_from: Any) -> str:
    """The key of something that is made from that, and from nothing else."""
    return digest(canonical(made_from))


def stage(parent: Path) -> Path:
    """A new folder in `parent` that nobody looks into, to be filled and then published."""
    fresh = parent / f"{_STAGED}{uuid.uuid4().hex}"
    fresh.mkdir(parents=True)
    return fresh


def staged(name: str) -> bool:
    """Whether that is the name of a folder or file that is still being written, or was when its process died."""
    return name.startswith(_STAGED)


def publish(fresh: Path, final: Path) -> bool:
    """Rename `fresh` to `final`. False where somebody was faster, whose folder stays; `fresh` is gone either way."""
    try:
        # Files first, the rename last: a reader in between would see a folder that isn't whole.
        fresh.rename(final)
    except OSError:
        shutil.rmtree(fresh, ignore_errors=True)
        if not is_folder(final):
            raise
        return False
    return True


def replace(path: Path, data: bytes) -> None:
    """Write one file so that readers see the old one or the new one."""
    fresh = path.with_name(f"{_STAGED}{uuid.uuid4().hex}")
    try:
        fresh.write_bytes(data)
        fresh.replace(path)
    except OSError:
        fresh.unlink(missing_ok=True)
        raise


def is_folder(path: Path) -> bool:
    """A folder, and no link to one."""
    try:
        return stat.S_ISDIR(os.lstat(path).st_mode)
    except OSError:
        return False


def read(path: Path | str, most: int = LARGEST) -> bytes:
    """The content of a plain file.

    Raises FileNotFoundError, DamagedError (a link, a device, more than `most` bytes) or another OSError.
    """
    return read_with_time(path, most)[0]


def read_with_time(path: Path | str, most: int = LARGEST) -> tuple[bytes, float]:
    """The same with the time of its last change, in seconds of the epoch."""
    # Without O_NONBLOCK a pipe in the file's place would be waited for.
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    flags |= getattr(os, "O_BINARY", 0)
    try:
        handle = os.open(path, flags)
    except FileNotFoundError:
        raise
    except OSError as error:
        if os.path.islink(path):
            raise DamagedError(f"{os.path.basename(path)} is a link") from error
        raise
    try:
        told = os.fstat(handle)
        if not stat.S_ISREG(told.st_mode):
            raise DamagedError(f"{os.path.basename(path)} is no plain file")
        if told.st_size > most:
            raise DamagedError(f"{os.path.basename(path)} has {told.st_size} B, {most} B at most are read")
        data = os.read(handle, told.st_size + 1)
        while len(data) < told.st_size and (more := os.read(handle, told.st_size - len(data))):
            data += more
        return data, told.st_mtime
    finally:
        os.close(handle)


_warned: set[tuple[str, str]] = set()


def warn_once(topic: str, subject: object, text: str) -> None:
    """One warning of each topic about each subject in a process."""
    if (topic, str(subject)) not in _warned:
        _warned.add((topic, str(subject)))
        warnings.warn(text, MorphcWarning, stacklevel=3)
