"""What isn't what was put there is moved aside with one warning, made again, and never run."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from cache_helpers import compiled_cache, fake_entry, forget, job, source

from morphc.caching import Cache
from morphc.errors import MorphcWarning
from morphc.kernels import codegen
from morphc.kernels.cache import counters, inventory, manifest, place, store
from morphc.kernels.cache.place import DamagedError

FILES = ("kernel.py", "spec.json", "provenance.json", "manifest.json")
BINARY_FILES = ("kernel.cubin", "kernel.json", "manifest.json")


def truncate(path: Path, aside: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Path, aside: Path) -> None:
    data = bytearray(path.read_bytes())
    # Also where a JSON file stays a JSON file.
    at = next((at for at, byte in enumerate(data) if chr(byte) in "abcde"), len(data) // 2)
    data[at] ^= 1
    path.write_bytes(data)


def empty(path: Path, aside: Path) -> None:
    path.write_bytes(b"")


def remove(path: Path, aside: Path) -> None:
    path.unlink()


def link(path: Path, aside: Path) -> None:
    path.rename(aside / "moved")
    path.symlink_to(aside / "moved")


def add_code(path: Path, aside: Path) -> None:
    with path.open("ab") as file:
        file.write(f"\nopen({str(aside / 'it-was-run')!r}, 'w').close()\n".encode())


def make_pipe(path: Path, aside: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def nest(path: Path, aside: Path) -> None:
    """Deeper than what reads JSON goes."""
    path.write_bytes(b'{"schema":1,"made_from":{"a":' + b"[" * 100_000)


WAYS = (truncate, flip, empty, remove, link, add_code, make_pipe, nest)
Damage = Callable[[Path, Path], None]


def entry_of(root: Path) -> Path:
    (entry,) = (path for path in (root / "kernels").iterdir() if not place.staged(path.name))
    return entry


def binary_of(root: Path) -> Path:
    (folder,) = entry_of(root).glob("bin/*/*")
    return folder


def check_it_heals(root: Path, aside: Path) -> None:
    """One warning, one folder in quarantine, one compile; then all is whole, and nothing was run."""
    forget()
    with pytest.warns(MorphcWarning) as warned, counters.watch() as count:
        compiled_cache([job()])
    assert [str(one.message) for one in warned if "is not what was put there" in str(one.message)] == [
        str(warned[0].message)
    ]
    assert len(warned) == 1
    assert count.compiled == len(count.misses) == 1
    assert len(list((root / "quarantine").iterdir())) == 1
    assert Cache(root).verify() == []
    assert not (aside / "it-was-run").exists()
    forget()
    with warnings.catch_warnings(), counters.watch() as count:
        warnings.simplefilter("error")
        compiled_cache([job()])
    assert (count.hits, count.compiled) == (1, 0)


@pytest.mark.parametrize("damage", WAYS)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_of_an_entry(filled: Path, tmp_path: Path, name: str, damage: Damage) -> None:
    damage(entry_of(filled) / name, tmp_path)
    (problem,) = Cache(filled).verify()
    assert name in problem.problem or damage is link
    check_it_heals(filled, tmp_path)


@pytest.mark.parametrize("damage", WAYS)
@pytest.mark.parametrize("name", BINARY_FILES)
def test_a_damaged_file_of_a_compiled_form(filled: Path, tmp_path: Path, name: str, damage: Damage) -> None:
    damage(binary_of(filled) / name, tmp_path)
    assert len(Cache(filled).verify()) == 1
    check_it_heals(filled, tmp_path)


@pytest.mark.parametrize("name", ["sitecustomize.py", "kernel.pyc", "__pycache__"])
def test_a_file_that_nobody_put_there(filled: Path, tmp_path: Path, name: str) -> None:
    (entry_of(filled) / name).write_text("raise SystemExit")
    assert [one.problem for one in Cache(filled).verify()] == [f"holds {name}, which nobody put there"]
    check_it_heals(filled, tmp_path)


@pytest.mark.parametrize("depth", [0, 1, 2, 3])
def test_a_folder_that_is_a_link(filled: Path, tmp_path: Path, depth: int) -> None:
    """The entry, its `bin`, an architecture, a compiled form."""
    binary = binary_of(filled)
    folder = [binary.parents[2], binary.parents[1], binary.parents[0], binary][depth]
    shutil.move(folder, tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    assert Cache(filled).verify()
    before = sorted(path.name for path in (tmp_path / "elsewhere").rglob("*"))
    check_it_heals(filled, tmp_path)
    assert sorted(path.name for path in (tmp_path / "elsewhere").rglob("*")) == before


def test_an_entry_that_changes_while_it_is_in_use_is_not_compiled(filled: Path, tmp_path: Path) -> None:
    forget()
    path = codegen.publish(source())
    add_code(path, tmp_path)
    with pytest.warns(MorphcWarning, match=r"kernel\.py has \d+ B"):
        compiled_cache([job(block=256)])
    assert not (tmp_path / "it-was-run").exists()


def test_a_forged_file_whose_manifest_fits_is_not_run(filled: Path, tmp_path: Path) -> None:
    entry = entry_of(filled)
    told = manifest.read(entry)[0]
    add_code(entry / "kernel.py", tmp_path)
    files = {name: (entry / name).read_bytes() for name in told.files}
    assert manifest.write(entry, "kernel", told.made_from, files, told.details).key == told.key
    assert Cache(filled).verify() == []
    forget()
    with pytest.warns(MorphcWarning, match=r"kernel\.py is not what this morphc writes"):
        compiled_cache([job(block=256)])
    assert not (tmp_path / "it-was-run").exists()


def test_a_manifest_of_another_kernel_is_refused(fresh_cache: Path) -> None:
    root = fresh_cache / "v1"
    first, second = fake_entry(root, 1), fake_entry(root, 2)
    shutil.rmtree(first)
    shutil.copytree(second, first)
    with pytest.raises(DamagedError, match="belongs to"):
        manifest.verify(first, "kernel")


def test_another_schema_is_left_alone_and_not_read(fresh_cache: Path) -> None:
    root = fresh_cache / "v1"
    entry = fake_entry(root, 1)
    told = (entry / "manifest.json").read_text()
    (entry / "manifest.json").write_text(told.replace('"schema": 1', '"schema": 2', 1))
    with pytest.raises(DamagedError, match="has the schema 2; this morphc reads 1"):
        manifest.verify(entry, "kernel")


def test_a_list_says_which_entry_is_damaged(fresh_cache: Path) -> None:
    root = fresh_cache / "v1"
    fake_entry(root, 1)
    (fake_entry(root, 2) / "manifest.json").write_text("{")
    assert [bool(entry.damaged) for entry in inventory.entries(root)] == [False, True]


def test_a_hit_reads_what_was_compiled(filled: Path) -> None:
    with counters.watch() as count:
        (made,) = compiled_cache([job()])
    assert (count.hits, count.misses, count.compiled) == (1, [], 0)
    assert count.saved == made.seconds
    assert made.size == (binary_of(filled) / "kernel.cubin").stat().st_size
    assert made.registers > 0


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        (job(block=256), "constants.BLOCK: 128 -> 256"),
        (job(target="cuda:80"), "target: cuda:90 -> cuda:80"),
        (job(more=2), "holes.more: 1 -> 2"),
    ],
)
def test_a_miss_says_why(filled: Path, changed: object, reason: str) -> None:
    with counters.watch() as count:
        compiled_cache([changed])  # type: ignore[list-item]
    (miss,) = count.misses
    assert miss.reasons == (reason,)
    assert miss.kernel == "forward_own_h10_s3_k2_r5_fp32.add"


def test_the_first_miss_has_nothing_to_compare_with(fresh_cache: Path) -> None:
    with counters.watch() as count:
        compiled_cache([job()])
    assert count.misses[0].reasons == ("nothing like it was ever kept here",)
    assert str(count).startswith("1 kernel: 0 hits, 1 miss (took ")


def test_entries_have_no_absolute_paths(filled: Path) -> None:
    for path in entry_of(filled).rglob("*.json"):
        assert str(filled) not in path.read_text()


def test_two_versions_live_side_by_side(fresh_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled_cache([job()])
    monkeypatch.setattr(codegen, "codegen_digest", lambda: "f" * 64)
    with counters.watch() as count:
        compiled_cache([job()])
    assert count.misses[0].reasons[0].startswith("codegen_sha: ")
    monkeypatch.undo()
    monkeypatch.setenv("MORPHC_CACHE_DIR", str(fresh_cache))
    root = fresh_cache / "v1"
    assert len(inventory.names(root)) == 2
    assert not (root / "quarantine").exists()
    forget()
    with counters.watch() as count:
        compiled_cache([job()])
    assert count.hits == 1
    assert Cache(root).verify() == []


def test_a_clock_that_went_back_makes_nothing_old(filled: Path) -> None:
    told = entry_of(filled) / "manifest.json"
    os.utime(told, (4e9, 4e9))
    forget()
    with warnings.catch_warnings(), counters.watch() as count:
        warnings.simplefilter("error")
        compiled_cache([job()])
    assert count.hits == 1
    assert abs(told.stat().st_mtime - binary_of(filled).stat().st_mtime) < 4e8
    os.utime(told, (4e9, 4e9))
    forget()
    assert Cache(filled).victims(older_than="1d") == []
    store.touch(told)
    assert told.stat().st_mtime < 4e9


def test_an_entry_that_is_replaced_while_it_is_read_is_no_damage(
    filled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verify, calls = manifest.verify, iter([True])

    def replaced(folder: Path, kind: str) -> manifest.Manifest:
        if next(calls, False):
            raise DamagedError("kernel.py is missing")
        return verify(folder, kind)

    forget()
    monkeypatch.setattr(manifest, "verify", replaced)
    with warnings.catch_warnings(), counters.watch() as count:
        warnings.simplefilter("error")
        compiled_cache([job()])
    assert (count.hits, count.compiled) == (1, 0)
    assert not (filled / "quarantine").exists()
