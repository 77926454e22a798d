"""What this process found in the cache, what it didn't and why, and what it compiled."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec


class Miss(msgspec.Struct, frozen=True):
    """A kernel that had to be compiled. kernel: its name and function; reasons: why none in the cache would do."""

    kernel: str
    target: str
    reasons: tuple[str, ...]


class Count(msgspec.Struct):
    """compiled: how often Triton's compiler was asked for a kernel, here or in a worker. saved: seconds of a processor
    that the hits took to compile when they were; spent: those of the misses."""

    hits: int = 0
    misses: list[Miss] = []
    compiled: int = 0
    saved: float = 0.0
    spent: float = 0.0

    @property
    def kernels(self) -> int:
        """Hits and misses."""
        return self.hits + len(self.misses)

    def __str__(self) -> str:
        """`12 kernels: 9 hits (saved 14.2 s), 3 misses (took 4.1 s)`."""
        said = f"{self.kernels} kernel{'s' * (self.kernels != 1)}: {self.hits} hit{'s' * (self.hits != 1)}"
        said += f" (saved {self.saved:.1f} s)" if self.hits else ""
        missed = len(self.misses)
        said += f", {missed} miss{'es' * (missed != 1)}"
        return said + (f" (took {self.spent:.1f} s)" if self.compiled else "")


_lock = threading.Lock()
_all = Count()
_watched: list[Count] = [_all]


def total() -> Count:
    """Since this process began."""
    return _all


@contextmanager
def watch() -> Iterator[Count]:
    """What is counted in here, by all threads."""
    count = Count()
    with _lock:
        _watched.append(count)
    try:
        yield count
    finally:
        with _lock:
            _watched[:] = [one for one in _watched if one is not count]


def hit(saved: float) -> None:
    """A kernel was in the cache."""
    with _lock:
        for count in _watched:
            count.hits += 1
            count.saved += saved


def miss(found: Miss, spent: float) -> None:
    """A kernel wasn't, and was compiled."""
    with _lock:
        for count in _watched:
            count.misses.append(found)
            count.spent += spent


def compiling() -> None:
    """Triton's compiler is asked for a kernel."""
    with _lock:
        for count in _watched:
            count.compiled += 1
