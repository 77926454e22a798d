"""Bundles carry entries; what isn't one through and through is refused whole."""

from __future__ import annotations

import gzip
import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from cache_helpers import compiled_cache, contents, fake_entry, forget, job

from morphc.caching import Cache
from morphc.errors import BundleError, CacheError
from morphc.kernels.cache import bundle, counters, manifest, place, tables
from morphc.kernels.cache.bundle import Index
from morphc.kernels.cache.manifest import FileSum
from morphc.kernels.cache.tables import Answer, Table, Trial
from morphc.kernels.spec import TuneConfig

NOISE = bytes(range(256)) * 16
CONFIG = TuneConfig(64, 64, 4, 2)


def table(key: str, rows: int = 4096, us: float = 12.5) -> Table:
    trials = (Trial(CONFIG, us), Trial(TuneConfig(128, 64, 8, 2), None, "spills 12 values a thread"))
    answer = Answer(rows, "3.6.0", tables.GRAPH_REPLAY, CONFIG, us, 10.0, trials, 1e9)
    return Table(place.SCHEMA, key, "forward", "NVIDIA H200", "cuda:90", (answer,))


def files_of(path: Path) -> dict[str, bytes]:
    """What a bundle holds, its index first."""
    with tarfile.open(path) as archive:
        found = {}
        for member in archive:
            file = archive.extractfile(member)
            assert file is not None
            found[member.name] = file.read()
        return found


def indexed(files: dict[str, bytes], schema: int = place.SCHEMA) -> dict[str, bytes]:
    """These files, with an index that fits."""
    plain = {name: data for name, data in files.items() if name != bundle.INDEX}
    sums = {name: FileSum(place.digest(data), len(data)) for name, data in plain.items()}
    index = Index(schema, "0.1.0", sums)
    index = msgspec.structs.replace(index, check=bundle._check(index))
    return {bundle.INDEX: msgspec.json.encode(index), **plain}


def packed(files: dict[str, bytes], change: Callable[[tarfile.TarInfo], None] | None = None) -> bytes:
    """A tar of these files; `change` may do anything to a header."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in files.items():
            told = tarfile.TarInfo(name)
            told.size = len(data)
            if change is not None:
                change(told)
            archive.addfile(told, io.BytesIO(data) if told.isreg() else None)
    return out.getvalue()


@pytest.fixture
def files(tmp_path: Path) -> dict[str, bytes]:
    """Of a sound bundle of one entry."""
    root = tmp_path / "other" / "v1"
    entry = fake_entry(root, 1)
    tables.save(root, table(manifest.read(entry)[0].key))
    Cache(root).export(tmp_path / "sound.tar")
    return files_of(tmp_path / "sound.tar")


class TestSound:
    @pytest.mark.parametrize("name", ["kernels.tar", "kernels.tar.gz", "kernels.tgz"])
    def test_what_was_exported_is_there_after_an_import(
        self, filled: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        index = Cache(filled).export(tmp_path / name)
        assert all(not path.startswith(("/", ".")) for path in index.files)
        monkeypatch.setenv("MORPHC_CACHE_DIR", str(tmp_path / "new"))
        done = Cache().import_(tmp_path / name)
        assert (done.entries, done.added, done.known) == (1, 1, 0)
        forget()
        with counters.watch() as count:
            compiled_cache([job()])
        assert (count.hits, count.compiled) == (1, 0)
        again = Cache().import_(tmp_path / name)
        assert (again.entries, again.added, again.known) == (1, 0, 1)
        assert Cache().verify() == []

    def test_what_is_new_is_added_to_an_entry(self, tmp_path: Path) -> None:
        here, there = tmp_path / "a" / "v1", tmp_path / "b" / "v1"
        fake_entry(here, 1)
        fake_entry(there, 1, b"for another", "cuda:80")
        tables.save(here, table(manifest.read(Path(Cache(here).entries()[0].folder))[0].key, rows=16))
        tables.save(there, table(manifest.read(Path(Cache(there).entries()[0].folder))[0].key, rows=32))
        Cache(there).export(tmp_path / "x.tar.gz")
        done = Cache(here).import_(tmp_path / "x.tar.gz")
        assert (done.entries, done.added, done.known, done.tables) == (1, 1, 0, 1)
        (entry,) = Cache(here).entries()
        assert entry.archs == ("cuda-80", "cuda-90")
        (merged,) = Cache(here).show(entry.key).tables
        assert [answer.rows for answer in merged.answers] == [16, 32]

    def test_one_architecture_alone(self, tmp_path: Path) -> None:
        root = tmp_path / "a" / "v1"
        fake_entry(root, 1)
        fake_entry(root, 1, b"for another", "cuda:80")
        index = Cache(root).export(tmp_path / "x.tar", arch="cuda:80")
        assert {name.split("/")[3] for name in index.files if "/bin/" in name} == {"cuda-80"}
        with pytest.raises(CacheError, match="holds no entry for hip:gfx942"):
            Cache(root).export(tmp_path / "y.tar", arch="hip:gfx942")
        assert not (tmp_path / "y.tar").exists()

    def test_equal_contents_make_equal_bundles(self, filled: Path, tmp_path: Path) -> None:
        for name in ("1.tar.gz", "2.tar.gz"):
            Cache(filled).export(tmp_path / name)
        assert (tmp_path / "1.tar.gz").read_bytes() == (tmp_path / "2.tar.gz").read_bytes()

    def test_a_damaged_entry_is_made_new_by_an_import(self, tmp_path: Path, files: dict[str, bytes]) -> None:
        root = tmp_path / "here" / "v1"
        entry = fake_entry(root, 1)
        (entry / "kernel.py").write_text("")
        (tmp_path / "x.tar").write_bytes(packed(files))
        with pytest.warns(UserWarning, match="not what was put there"):
            Cache(root).import_(tmp_path / "x.tar")
        assert Cache(root).verify() == []

    def test_a_damaged_entry_is_not_exported(self, tmp_path: Path) -> None:
        root = tmp_path / "here" / "v1"
        (fake_entry(root, 1) / "kernel.py").write_text("")
        with pytest.raises(CacheError, match=r"can't be exported: kernel\.py has 0 B"):
            Cache(root).export(tmp_path / "x.tar")
        assert not list(tmp_path.glob("*x.tar*"))


def _renamed(files: dict[str, bytes], name: str) -> dict[str, bytes]:
    first = next(iter(path for path in files if path.endswith("kernel.py")))
    return {name if path == first else path: data for path, data in files.items()}


class TestHostile:
    """Each is refused by a BundleError that says why, and neither the cache nor anything beside it changes."""

    def refuse(self, tmp_path: Path, data: bytes, why: str) -> None:
        root = tmp_path / "inner" / "cache" / "v1"
        fake_entry(root, 7)
        (tmp_path / "hostile.tar").write_bytes(data)
        before = contents(tmp_path)
        with pytest.raises(BundleError, match=why) as raised:
            Cache(root).import_(tmp_path / "hostile.tar")
        assert "was not imported" in str(raised.value)
        assert contents(tmp_path) == before
        assert not [path for path in tmp_path.rglob("*") if path.is_symlink()]
        assert sorted(path.name for path in root.iterdir()) == ["kernels", "locks"]

    @pytest.mark.parametrize(
        "name",
        [
            "../evil.py",
            "kernels/../../evil.py",
            "/tmp/evil.py",
            "kernels/x/../../../evil.py",
            "kernels/..",
            "kernels\\x\\kernel.py",
            "C:/evil.py",
            "locks/x.lock",
            "kernels/x/.hidden.py",
            "kernels/x/bin/cuda-90/add/run.sh",
            "kernels/x/kernel.py\n",
        ],
    )
    def test_a_path_that_leads_elsewhere(self, tmp_path: Path, files: dict[str, bytes], name: str) -> None:
        self.refuse(tmp_path, packed(indexed(_renamed(files, name))), "lists .* which is no file of a cache")

    @pytest.mark.parametrize(
        ("kind", "what"),
        [
            (tarfile.SYMTYPE, "a link"),
            (tarfile.LNKTYPE, "a link"),
            (tarfile.CHRTYPE, "no plain file"),
            (tarfile.FIFOTYPE, "no plain file"),
            (tarfile.DIRTYPE, "no plain file"),
            (tarfile.GNUTYPE_LONGNAME, "no plain file"),
            (tarfile.XHDTYPE, "no plain file"),
            (tarfile.GNUTYPE_SPARSE, "no plain file"),
        ],
    )
    def test_what_is_no_file(self, tmp_path: Path, files: dict[str, bytes], kind: bytes, what: str) -> None:
        def change(told: tarfile.TarInfo) -> None:
            if told.name.endswith("kernel.cubin"):
                told.type, told.linkname = kind, "/etc/passwd"

        self.refuse(tmp_path, packed(files, change), what)

    def test_a_wrong_checksum(self, tmp_path: Path, files: dict[str, bytes]) -> None:
        name = next(name for name in files if name.endswith(".cubin"))
        self.refuse(tmp_path, packed(files | {name: b"BINARY"}), r"checksum of .*kernel\.cubin doesn't fit")

    def test_an_entry_that_is_not_whole_though_the_index_fits(
        self, tmp_path: Path, files: dict[str, bytes]
    ) -> None:
        name = next(name for name in files if name.endswith(".cubin"))
        self.refuse(
            tmp_path, packed(indexed(files | {name: b"BINARY"})), "kernel.cubin is not what was put there"
        )

    def test_a_table_that_is_not_whole_though_the_index_fits(
        self, tmp_path: Path, files: dict[str, bytes]
    ) -> None:
        name = next(name for name in files if name.startswith("tune/"))
        changed = files[name].replace(b"12.5", b" 1.5")
        self.refuse(tmp_path, packed(indexed(files | {name: changed})), "checksum doesn't fit")

    def test_a_form_of_another_kernel(self, tmp_path: Path, files: dict[str, bytes]) -> None:
        root = tmp_path / "third" / "v1"
        fake_entry(root, 2, b"of another kernel")
        Cache(root).export(tmp_path / "third.tar")
        own = next(name for name in files if name.endswith("kernel.py")).split("/")[1]
        moved = {
            name.replace(name.split("/")[1], own): data
            for name, data in files_of(tmp_path / "third.tar").items()
            if "/bin/" in name
        }
        self.refuse(tmp_path, packed(indexed(files | moved)), "is not of this kernel")

    def test_a_newer_schema(self, tmp_path: Path, files: dict[str, bytes]) -> None:
        self.refuse(
            tmp_path, packed(indexed(files, schema=2)), "schema is 2, this morphc .* reads 1; a newer"
        )

    def test_a_newer_schema_with_fields_that_nobody_knows(self, tmp_path: Path) -> None:
        self.refuse(tmp_path, packed({bundle.INDEX: b'{"schema": 3, "what": {}}'}), "schema is 3")

    def test_an_index_that_was_changed(self, tmp_path: Path, files: dict[str, bytes]) -> None:
        changed = files[bundle.INDEX].replace(b'"morphc":"0.1.0"', b'"morphc":"0.1.1"')
        self.refuse(tmp_path, packed(files | {bundle.INDEX: changed}), "its own checksum doesn't fit")

    def test_a_bomb_that_says_how_large_it_is(self, tmp_path: Path, files: dict[str, bytes]) -> None:
        index = Index(1, "0.1.0", {f"kernels/{n}/kernel.py": FileSum("0" * 64, 60 << 20) for n in range(40)})
        index = msgspec.structs.replace(index, check=bundle._check(index))
        self.refuse(tmp_path, packed({bundle.INDEX: msgspec.json.encode(index)}), "in all and .* each may be")

    def test_a_bomb_that_says_it_is_small(self, tmp_path: Path, files: dict[str, bytes]) -> None:
        head = packed(files)[: -2 * 512].rstrip(b"\0")
        head += b"\0" * (-len(head) % 512)
        told = tarfile.TarInfo("kernels/bomb-000000000000/kernel.py")
        told.size = 4 << 30
        out = io.BytesIO()
        with gzip.GzipFile(fileobj=out, mode="wb", compresslevel=9) as file:
            file.write(head + told.tobuf(tarfile.USTAR_FORMAT))
            for _ in range(64):
                file.write(b"\0" * (1 << 20))
        self.refuse(tmp_path, out.getvalue(), "it doesn't list or holds twice")

    def test_a_bomb_behind_a_listed_name(self, tmp_path: Path, files: dict[str, bytes]) -> None:
        def change(told: tarfile.TarInfo) -> None:
            if told.name.endswith(".cubin"):
                told.size = 3 << 30

        out = io.BytesIO()
        for name, data in files.items():
            told = tarfile.TarInfo(name)
            told.size = len(data)
            change(told)
            out.write(told.tobuf(tarfile.USTAR_FORMAT) + data + b"\0" * (-len(data) % 512))
        self.refuse(tmp_path, gzip.compress(out.getvalue()), "has 3221225472 B, 6 B are listed")

    def test_an_index_that_is_a_bomb(self, tmp_path: Path) -> None:
        told = tarfile.TarInfo(bundle.INDEX)
        told.size = 8 << 30
        self.refuse(tmp_path, gzip.compress(told.tobuf(tarfile.GNU_FORMAT)), "no bundle of morphc")

    def test_a_file_that_is_not_listed(self, tmp_path: Path, files: dict[str, bytes]) -> None:
        self.refuse(tmp_path, packed(files | {"kernels/x/kernel.py": b""}), "doesn't list or holds twice")

    def test_a_file_that_is_missing(self, tmp_path: Path, files: dict[str, bytes]) -> None:
        name = next(name for name in files if name.endswith(".cubin"))
        self.refuse(
            tmp_path,
            packed({path: data for path, data in files.items() if path != name}),
            r"kernel\.cubin is missing",
        )

    def test_a_file_twice(self, tmp_path: Path, files: dict[str, bytes]) -> None:
        name = next(name for name in files if name.endswith(".cubin"))
        data = packed(files)[: -2 * 512].rstrip(b"\0")
        data += b"\0" * (-len(data) % 512) + packed({name: files[name]})
        self.refuse(tmp_path, data, "holds twice")

    def test_an_index_nested_too_deep(self, tmp_path: Path) -> None:
        self.refuse(tmp_path, packed({"bundle.json": b'{"zz":' + b"[" * 100_000}), "damaged: .*recursion")

    @pytest.mark.parametrize("kept", [0.3, 0.9])
    @pytest.mark.parametrize("pack", [gzip.compress, bytes])
    def test_one_that_was_cut_off(
        self, tmp_path: Path, files: dict[str, bytes], kept: float, pack: Callable[[bytes], bytes]
    ) -> None:
        data = packed(files).rstrip(b"\0")
        whole = pack(data)
        self.refuse(tmp_path, whole[: int(kept * len(whole))], "ends in the middle|damaged|is missing")

    @pytest.mark.parametrize("data", [b"", b"PK\x03\x04", NOISE, b"\x1f\x8b" + NOISE])
    def test_what_is_something_else(self, tmp_path: Path, data: bytes) -> None:
        self.refuse(tmp_path, data, "ends in the middle|no tar file|damaged")


def test_a_bundle_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="No such file"):
        Cache().import_(tmp_path / "nothing.tar")


def test_a_place_that_can_not_be_written(filled: Path, tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="can't be written"):
        Cache(filled).export(tmp_path / "no" / "folder.tar")


@pytest.mark.parametrize("path", ["", ".", "/"])
def test_a_name_that_is_no_file(filled: Path, path: str) -> None:
    with pytest.raises(CacheError, match=r"no name of a file; give one such as kernels\.tar\.gz"):
        Cache(filled).export(path)
