"""What the cache holds, for people and programs: `ls`, `show`, `verify`."""

from __future__ import annotations

import difflib
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from morphc.errors import CacheError
from morphc.kernels.cache import manifest, place, store, tables
from morphc.kernels.cache.manifest import Manifest
from morphc.kernels.cache.place import DamagedError
from morphc.kernels.cache.tables import Table


class Binary(msgspec.Struct, frozen=True):
    """A compiled form of a kernel. spills: 32-bit values a thread; shared, size: bytes; seconds: of its compile."""

    key: str
    function: str
    target: str
    triton: str
    registers: int
    spills: int
    shared: int
    size: int
    seconds: float
    made_from: dict[str, Any]


class Entry(msgspec.Struct, frozen=True):
    """A generated kernel and what is kept with it.

    registers, spills: the most of its compiled forms. size: bytes of all files. used: seconds of the epoch. best_us,
    roofline: of the best tuned bucket of rows; None where nothing was tuned. damaged: why it can't be read, if so.
    """

    key: str
    name: str
    layers: tuple[str, ...] = ()
    archs: tuple[str, ...] = ()
    binaries: int = 0
    tuned: bool = False
    best_us: float | None = None
    roofline: float | None = None
    registers: int = 0
    spills: int = 0
    size: int = 0
    used: float = 0.0
    morphc: str = ""
    folder: str = ""
    damaged: str = ""


class Shown(msgspec.Struct, frozen=True):
    """All of an entry. sources: the user's lines that its layers come from; source: the kernel's file."""

    entry: Entry
    made_from: dict[str, Any]
    sources: tuple[str, ...]
    source: str
    binaries: tuple[Binary, ...]
    tables: tuple[Table, ...]


class Problem(msgspec.Struct, frozen=True):
    """Something that is not what was put there. path: relative to the cache."""

    path: str
    problem: str


def names(root: Path) -> list[str]:
    """Folders of the entries, sorted."""
    try:
        with os.scandir(store.kernels(root)) as found:
            return sorted(each.name for each in found if not place.staged(each.name))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CacheError(f"the cache {root} can't be read: {error.strerror}") from error


def entries(root: Path) -> list[Entry]:
    """Every entry, by name. Nothing is checked: that is what `verify` does."""
    tuned = _tuned(root)
    return [_entry(root, name, tuned) for name in names(root)]


def _tuned(root: Path) -> set[str]:
    try:
        return set(os.listdir(root / "tune"))
    except OSError:
        return set()


def _entry(root: Path, name: str, tuned: set[str]) -> Entry:
    folder = f"{root}/kernels/{name}"
    try:
        told, used = manifest.glance(folder)
        layers = manifest.layers(folder)
    except (OSError, DamagedError) as error:
        stem, _, short = name.rpartition("-")
        return Entry(short, stem, folder=folder, damaged=str(error))
    size = sum(file.size for file in told.files.values())
    archs: dict[str, None] = {}
    registers = spills = count = 0
    damaged = ""
    for where, target in binary_folders(folder):
        try:
            binary, again = manifest.glance(where)
        except (OSError, DamagedError) as error:
            damaged = damaged or f"{os.path.basename(where)}: {error}"
            continue
        archs[target] = None
        count += 1
        used = max(used, again)
        size += sum(file.size for file in binary.files.values())
        registers = max(registers, int(binary.details.get("registers", 0)))
        spills = max(spills, int(binary.details.get("spills", 0)))
    answers = [
        answer
        for table in (tables.of_kernel(root, told.key) if told.key[:12] in tuned else ())
        for answer in table.answers
    ]
    best = max(answers, key=lambda one: one.roofline, default=None)
    return Entry(
        key=told.key,
        name=str(told.details.get("name", name)),
        layers=layers,
        archs=tuple(archs),
        binaries=count,
        tuned=bool(answers),
        best_us=best.us if best else None,
        roofline=best.roofline if best else None,
        registers=registers,
        spills=spills,
        size=size,
        used=used,
        morphc=str(told.details.get("morphc", "")),
        folder=folder,
        damaged=damaged,
    )


def binary_folders(folder: str) -> list[tuple[str, str]]:
    """(folder, arch) of every compiled form of an entry."""
    found: list[tuple[str, str]] = []
    above = f"{folder}/{manifest.BINARIES}"
    with suppress(OSError):
        for arch in sorted(os.listdir(above)):
            if not place.staged(arch):
                found += [
                    (f"{above}/{arch}/{name}", arch)
                    for name in sorted(os.listdir(f"{above}/{arch}"))
                    if not place.staged(name)
                ]
    return found


def resolve(root: Path, word: str) -> str:
    """The entry's folder that a key, a name, or the beginning of one stands for.

    Raises CacheError for none, with what is near, and for several, with all of them.
    """
    known = names(root)
    short = [name for name in known if len(word) >= 4 and name.rpartition("-")[2] == word[:12]]
    exact = [name for name in known if name == word or name.rpartition("-")[0] == word]
    begins = [name for name in known if name.startswith(word) or name.rpartition("-")[2].startswith(word)]
    for found in (short, exact, begins):
        if len(found) == 1:
            return found[0]
        if found:
            some = "\n  ".join(found[:20]) + (f"\n  and {len(found) - 20} more" if len(found) > 20 else "")
            raise CacheError(f"{word!r} stands for {len(found)} entries; give more of one:\n  {some}")
    near = difflib.get_close_matches(word, [*known, *(name.rpartition("-")[0] for name in known)], n=3)
    hint = f" Near are: {', '.join(near)}." if near else ""
    raise CacheError(
        f"no entry {word!r} among the {len(known)} in {store.kernels(root)}.{hint} morphc cache ls shows all."
    )


def show(root: Path, word: str) -> Shown:
    """An entry with its source, compiled forms and tables. Raises CacheError, also where it is damaged."""
    name = resolve(root, word)
    folder = store.kernels(root) / name
    try:
        told = manifest.verify(folder, "kernel")
        text = place.read(folder / "kernel.py").decode()
        binaries = tuple(
            _binary(manifest.verify(Path(path), "binary")) for path, _ in binary_folders(str(folder))
        )
        provenance = manifest.provenance(folder)
    except (OSError, DamagedError, UnicodeDecodeError) as error:
        raise CacheError(
            f"{name} can't be shown: {error}; morphc cache verify lists what is damaged"
        ) from error
    return Shown(
        _entry(root, name, _tuned(root)),
        told.made_from,
        provenance.sources,
        text,
        binaries,
        tuple(tables.of_kernel(root, told.key)),
    )


def _binary(told: Manifest) -> Binary:
    made, details = told.made_from, told.details
    return Binary(
        told.key,
        str(made["function"]),
        str(made["target"]),
        str(made["triton"]),
        int(details["registers"]),
        int(details["spills"]),
        int(details["shared"]),
        int(details["size"]),
        float(details["seconds"]),
        made,
    )


def verify(root: Path) -> tuple[int, list[Problem]]:
    """How many things were looked at, and those that aren't what was put there. Nothing is moved."""
    problems: list[Problem] = []
    count = 0

    def look(path: Path, kind: str) -> None:
        nonlocal count
        count += 1
        try:
            manifest.verify(path, kind)
        except FileNotFoundError:
            return  # pruned since
        except (OSError, DamagedError) as error:
            problems.append(Problem(str(path.relative_to(root)), str(error)))

    for name in names(root):
        folder = store.kernels(root) / name
        look(folder, "kernel")
        for arch, problem in _strange(folder):
            problems.append(Problem(str(arch.relative_to(root)), problem))
        for path, _ in binary_folders(str(folder)):
            look(Path(path), "binary")
    for key in sorted(_tuned(root)):
        if not place.staged(key):
            count += len(
                tables.of_kernel(
                    root, key, lambda path, why: problems.append(Problem(str(path.relative_to(root)), why))
                )
            )
    return count, problems


def _strange(folder: Path) -> list[tuple[Path, str]]:
    """What stands where folders of binaries should, and is none."""
    above = folder / manifest.BINARIES
    if not os.path.lexists(above):
        return []
    if not place.is_folder(above):
        return [(above, f"{above.name} is no folder")]
    return [
        (path, f"{path.name} is no folder")
        for path in sorted(above.iterdir())
        if not place.staged(path.name) and not place.is_folder(path)
    ]
