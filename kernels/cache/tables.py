"""Tables of tuning: what became of every candidate of a kernel on a device, in `tune/<hash12>/<device>.json`.

The hash is the entry's, so a changed template starts anew; a device has one file, with an answer for each bucket of
rows, Triton version and way of timing. Candidates keep their times, so that a further one is timed alone.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from morphc.kernels.cache import place
from morphc.kernels.cache.place import DamagedError
from morphc.kernels.spec import TuneConfig

GRAPH_REPLAY: Final = "CUDA-graph replay, rotated buffers, in turns"
"""The way of timing of `tuning.graph_times`."""

_MOST = 16 << 20


class Trial(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What became of one candidate. us: of one call, None where it wasn't timed; problem: why not, if so.

    same_as: position of the candidate with the same binary, whose time it has.
    """

    config: TuneConfig
    us: float | None = None
    problem: str = ""
    same_as: int | None = None
    registers: int = 0
    shared: int = 0


class Answer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """For a bucket of rows. us: of the best; memory_us: what its bytes alone would take; created: of the epoch.

    complete: False where it was interrupted, and goes on the next time.
    """

    rows: int
    triton: str
    method: str
    config: TuneConfig
    us: float
    memory_us: float
    trials: tuple[Trial, ...]
    created: float
    complete: bool = True

    @property
    def roofline(self) -> float:
        """Share of the memory's speed that the best reaches, 0 to 1."""
        return self.memory_us / self.us if self.us else 0.0


class Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of one kernel on one device. kernel: its name; key: of its entry; capability: `cuda:90`."""

    schema: int
    key: str
    kernel: str
    device: str
    capability: str
    answers: tuple[Answer, ...]
    check: str = ""


def _check(table: Table) -> str:
    return place.digest(place.canonical(msgspec.structs.replace(table, check="")))


def encode(table: Table) -> bytes:
    """The file of a table."""
    made = msgspec.structs.replace(table, check=_check(table))
    return msgspec.json.format(msgspec.json.encode(made), indent=1)


def decode(data: bytes, name: str) -> Table:
    """Raises DamagedError."""
    try:
        found = msgspec.json.decode(data, type=Table)
    except place.UNREADABLE as error:
        raise DamagedError(f"{name} is damaged: {error}") from error
    if found.schema != place.SCHEMA:
        raise DamagedError(f"{name} has the schema {found.schema}; this morphc reads {place.SCHEMA}")
    if _check(found) != found.check:
        raise DamagedError(f"{name} is not what was put there: its checksum doesn't fit")
    return found


def folder(root: Path, key: str) -> Path:
    """Where the tables of a kernel are."""
    return root / "tune" / key[:12]


def read(path: Path) -> Table:
    """Raises FileNotFoundError, DamagedError or another OSError."""
    return decode(place.read(path, _MOST), path.name)


def of_kernel(root: Path, key: str, damaged: Callable[[Path, str], None] | None = None) -> list[Table]:
    """A kernel's tables, by device; those that aren't whole are told to `damaged` and left out."""
    where = folder(root, key)
    try:
        names = sorted(name for name in os.listdir(where) if not place.staged(name))
    except OSError:
        return []
    found = []
    for name in names:
        try:
            table = read(where / name)
            if table.key[:12] != key[:12]:
                raise DamagedError(f"{name} belongs to {table.key[:12]}, not here")
            found.append(table)
        except FileNotFoundError:
            continue
        except (DamagedError, OSError) as error:
            if damaged is not None:
                damaged(where / name, str(error))
    return found


def file_name(device: str, capability: str) -> str:
    """`nvidia-h200-cuda-90.json`."""
    plain = re.sub(r"[^a-z0-9]+", "-", f"{device} {capability}".lower()).strip("-")
    return f"{plain[:100]}.json"


def save(root: Path, table: Table) -> Path:
    """Add a table's answers to those that are kept. Raises OSError. Of two that do so at once, one may be lost."""
    path = folder(root, table.key) / file_name(table.device, table.capability)
    before: tuple[Answer, ...] = ()
    try:
        before = read(path).answers
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
    except DamagedError as damage:
        aside = root / "quarantine"
        aside.mkdir(parents=True, exist_ok=True)
        path.rename(aside / f"tune+{table.key[:12]}+{path.name}")
        place.warn_once("damaged", path, f"{damage}; moved to {aside}, and begun anew")
    merged = {(one.rows, one.triton, one.method): one for one in (*before, *table.answers)}
    answers = tuple(merged[key] for key in sorted(merged))
    place.replace(path, encode(msgspec.structs.replace(table, answers=answers)))
    return path
