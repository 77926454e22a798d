"""Bundles: entries and tables in one tar file, to be carried to another machine.

The first file is `bundle.json`: the schema, and every other file with its size and checksum. An import reads the
archive front to back, believes nothing of it, fills a folder of its own inside the cache, checks every entry there as
if it had been found in the cache, and only then renames them into their places.
"""

from __future__ import annotations

import gzip
import io
import os
import re
import shutil
import tarfile
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO, Any, Final

import msgspec

from morphc.errors import BundleError, CacheError
from morphc.kernels.cache import inventory, manifest, place, store, tables
from morphc.kernels.cache.manifest import FileSum
from morphc.kernels.cache.place import DamagedError
from morphc.version import __version__

INDEX: Final = "bundle.json"
MOST_BYTES: Final = 2 << 30
"""Of all files of a bundle, unpacked: as much as the cache may have."""

_MOST_INDEX: Final = 64 << 20
_BLOCK: Final = 512
_PART = r"[A-Za-z0-9_][A-Za-z0-9_.+-]*"
_ALLOWED: Final = re.compile(
    rf"kernels/{_PART}/{_PART}\.(?:py|json)"
    rf"|kernels/{_PART}/bin/{_PART}/{_PART}/{_PART}\.(?:json|cubin|hsaco)"
    rf"|tune/[0-9a-f]{{12}}/{_PART}\.json"
)


class Index(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The first file of a bundle. files: path -> size and checksum. check: of all the rest."""

    schema: int
    morphc: str
    files: dict[str, FileSum]
    check: str = ""


class Imported(msgspec.Struct, frozen=True):
    """What an import did. added, known: compiled forms that are new here, and that were here already."""

    entries: int
    added: int
    known: int
    tables: int


def _check(index: Index) -> str:
    return place.digest(place.canonical(msgspec.structs.replace(index, check="")))


def export(
    root: Path,
    path: Path,
    words: Collection[str] = (),
    arch: str | None = None,
) -> Index:
    """Write entries with their tables into a bundle; gzip'd where the name ends so.

    words: keys, names or their beginnings; none: all entries. arch: only forms compiled for it. Raises CacheError; a
    damaged entry is refused, with its name.
    """
    arch = None if arch is None else store.target_named(arch)
    if not path.name or path.is_dir():
        raise CacheError(f"{str(path)!r} is no name of a file; give one such as kernels.tar.gz")
    chosen = [inventory.resolve(root, word) for word in words] if words else inventory.names(root)
    index, data = pack(root, chosen, arch, zipped=path.suffix in (".gz", ".tgz"))
    fresh = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        fresh.write_bytes(data)
        fresh.replace(path)
    except OSError as error:
        fresh.unlink(missing_ok=True)
        raise CacheError(f"{path} can't be written: {error.strerror}") from error
    return index


def pack(
    root: Path,
    names: Collection[str],
    arch: str | None = None,
    only: Collection[str] | None = None,
    *,
    zipped: bool = True,
) -> tuple[Index, bytes]:
    """The bundle of the entries in these folders. only: keys of compiled forms that go in, and no others."""
    files = {name: data for each in dict.fromkeys(names) for name, data in _files(root, each, arch, only)}
    if not files:
        raise CacheError(f"nothing to export: {root} holds no entry{f' for {arch}' if arch else ''}")
    sums = {name: FileSum(place.digest(data), len(data)) for name, data in files.items()}
    index = Index(place.SCHEMA, __version__, sums)
    index = msgspec.structs.replace(index, check=_check(index))
    out = io.BytesIO()
    _pack(out, zipped, {INDEX: msgspec.json.encode(index), **files})
    return index, out.getvalue()


def _pack(file: IO[bytes], zipped: bool, files: dict[str, bytes]) -> None:
    # Without a name and a time in it, equal contents make equal bundles.
    out: Any = gzip.GzipFile("", "wb", 6, file, 0) if zipped else file
    with tarfile.open(fileobj=out, mode="w|", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in files.items():
            told = tarfile.TarInfo(name)
            told.size = len(data)
            try:
                archive.addfile(told, io.BytesIO(data))
            except ValueError as error:
                raise CacheError(f"{name} can't be put into a bundle: {error}") from error
    if zipped:
        out.close()


def _files(
    root: Path, name: str, arch: str | None, only: Collection[str] | None
) -> Iterator[tuple[str, bytes]]:
    folder = store.kernels(root) / name
    try:
        told = manifest.verify(folder, "kernel")
        found: list[tuple[str, bytes]] = []
        for where, target in inventory.binary_folders(str(folder)):
            if arch is None or target == store.arch_folder(arch):
                binary = manifest.verify(Path(where), "binary")
                if only is None or binary.key in only:
                    found += _folder(root, Path(where), [*binary.files, manifest.NAME])
        if arch is None or found:
            yield from _folder(root, folder, [*told.files, manifest.NAME, manifest.PROVENANCE])
            yield from found
            for table in tables.of_kernel(root, told.key):
                where_to = f"tune/{told.key[:12]}/{tables.file_name(table.device, table.capability)}"
                yield where_to, tables.encode(table)
    except (OSError, DamagedError) as error:
        raise CacheError(
            f"{name} can't be exported: {error}; morphc cache verify lists what is damaged, prune removes it"
        ) from error


def _folder(root: Path, folder: Path, names: list[str]) -> list[tuple[str, bytes]]:
    return [(str((folder / name).relative_to(root)), place.read(folder / name)) for name in names]


class _Limited:
    """A stream that ends in an error where it would give more than it may: what is packed small can unpack large."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.left = _MOST_INDEX + 3 * _BLOCK

    def read(self, size: int) -> bytes:
        """Exactly `size` bytes. Raises BundleError."""
        self.left -= size
        if self.left < 0:
            raise BundleError("it unpacks to more than it says")
        parts = []
        while size:
            part = self.stream.read(min(size, 1 << 20))
            if not part:
                raise BundleError("it ends in the middle, or is no bundle of morphc")
            parts.append(part)
            size -= len(part)
        return b"".join(parts)


def import_(root: Path, path: Path) -> Imported:
    """Put what a bundle holds into the cache.

    Raises BundleError for whatever isn't a bundle through and through; then nothing was imported. Raises CacheError
    where the file can't be read or the cache can't be written.
    """
    try:
        with path.open("rb") as file:
            zipped = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            stream: Any = gzip.GzipFile(fileobj=file) if zipped else file
            root.mkdir(parents=True, exist_ok=True)
            staging = place.stage(root)
            try:
                _unpack(_Limited(stream), staging)
                _verify(staging)
                return _move(root, staging)
            finally:
                shutil.rmtree(staging, ignore_errors=True)
    except BundleError as error:
        raise BundleError(f"{path} was not imported: {error}") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise BundleError(f"{path} was not imported: it is damaged ({error})") from error
    except OSError as error:
        raise CacheError(f"{path} can't be imported into {root}: {error.strerror or error}") from error


def _unpack(stream: _Limited, staging: Path) -> None:
    name, size = _next(stream) or ("", 0)
    if name != INDEX or size > _MOST_INDEX:
        raise BundleError(f"it is no bundle of morphc: its first file is not {INDEX}")
    index = _index(stream.read(size))
    stream.read(-size % _BLOCK)
    total = sum(told.size for told in index.files.values())
    if total > MOST_BYTES or any(not 0 <= told.size <= place.LARGEST for told in index.files.values()):
        raise BundleError(
            f"its files have {total} B, {MOST_BYTES} B in all and {place.LARGEST} B each may be"
        )
    for name in index.files:
        if _ALLOWED.fullmatch(name) is None:
            raise BundleError(f"it lists {name!r}, which is no file of a cache")
    # For each file its header and what fills its last block up; then the end.
    stream.left = total + 2 * _BLOCK * (len(index.files) + 1) + _BLOCK
    missing = dict(index.files)
    while (found := _next(stream)) is not None:
        name, size = found
        told = missing.pop(name, None)
        if told is None:
            raise BundleError(f"it holds {name!r}, which it doesn't list or holds twice")
        if size != told.size:
            raise BundleError(f"{name} has {size} B, {told.size} B are listed")
        data = stream.read(size)
        stream.read(-size % _BLOCK)
        if place.digest(data) != told.sha256:
            raise BundleError(f"the checksum of {name} doesn't fit")
        target = staging / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
    if missing:
        raise BundleError(f"{next(iter(missing))} is missing ({len(missing)} of {len(index.files)} files)")


def _next(stream: _Limited) -> tuple[str, int] | None:
    """Name and size of the next file; None at the end. tarfile itself would follow links and read long names."""
    block = stream.read(_BLOCK)
    if not block.strip(b"\0"):
        return None
    try:
        told = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
    except (tarfile.HeaderError, UnicodeDecodeError) as error:
        raise BundleError(f"it is no tar file, or damaged ({error})") from error
    if told.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
        what = "a link" if told.issym() or told.islnk() else "something that is no plain file"
        raise BundleError(f"{told.name!r} is {what}")
    if told.size < 0:
        raise BundleError(f"{told.name!r} has {told.size} B")
    return told.name, told.size


def _index(data: bytes) -> Index:
    try:
        schema = msgspec.json.decode(data, type=_Schema).schema
        if schema != place.SCHEMA:
            way = "a newer morphc reads it" if schema > place.SCHEMA else "export it again with this morphc"
            raise BundleError(
                f"its schema is {schema}, this morphc ({__version__}) reads {place.SCHEMA}; {way}"
            )
        index = msgspec.json.decode(data, type=Index)
    except place.UNREADABLE as error:
        raise BundleError(f"{INDEX} is damaged: {error}") from error
    if _check(index) != index.check:
        raise BundleError(f"{INDEX} is damaged: its own checksum doesn't fit")
    return index


class _Schema(msgspec.Struct):
    schema: int


def _verify(staging: Path) -> None:
    _, problems = inventory.verify(staging)
    if problems:
        raise BundleError(f"{problems[0].path}: {problems[0].problem}")
    for name in inventory.names(staging):
        for where, target in inventory.binary_folders(str(store.kernels(staging) / name)):
            told = manifest.read(where)[0].made_from
            key = manifest.read(store.kernels(staging) / name)[0].key
            if store.arch_folder(str(told.get("target"))) != target or told.get("kernel") != key:
                raise BundleError(f"{name}: {os.path.basename(where)} is not of this kernel and {target}")


def _renamed(fresh: Path, final: Path) -> bool:
    """Whether it is there now; False where somebody was faster."""
    try:
        fresh.rename(final)
    except OSError:
        if not place.is_folder(final):
            raise
        return False
    return True


def _move(root: Path, staging: Path) -> Imported:
    entries = added = known = kept = 0
    for name in inventory.names(staging):
        fresh, final = store.kernels(staging) / name, store.kernels(root) / name
        entries += 1
        count = len(inventory.binary_folders(str(fresh)))
        final.parent.mkdir(parents=True, exist_ok=True)
        # One that is here is asked whether it is whole, and makes room if it isn't.
        if store.find(final, "kernel", root) is None and _renamed(fresh, final):
            added += count
            continue
        store.add_provenance(final, manifest.provenance(fresh))
        for where, target in inventory.binary_folders(str(fresh)):
            binary = final / manifest.BINARIES / target / os.path.basename(where)
            binary.parent.mkdir(parents=True, exist_ok=True)
            if store.find(binary, "binary", root) is None and _renamed(Path(where), binary):
                added += 1
            else:
                known += 1
    tuned = staging / "tune"
    for key in sorted(os.listdir(tuned)) if tuned.exists() else ():
        for table in tables.of_kernel(staging, key):
            tables.save(root, table)
            kept += 1
    return Imported(entries, added, known, kept)
