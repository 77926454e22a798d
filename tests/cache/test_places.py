"""Caches that can't be written: a warning, and work goes on without."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cache_helpers import compiled_cache, forget, job, source

from morphc.caching import Cache
from morphc.cli import main
from morphc.errors import CacheError, KernelError, MorphcWarning
from morphc.kernels import codegen
from morphc.kernels import compile as compiling
from morphc.kernels.cache import counters, inventory, place, prune, store

UNWRITABLE = "kernels are not kept: .* can't be written"


def in_a_child(work: Callable[[], None], prepare: Callable[[], None]) -> str:
    """What `work` raised in a forked process that `prepare` changed, or nothing."""
    reader, writer = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        said = ""
        try:
            prepare()
            work()
        except BaseException as error:
            said = repr(error)
        finally:
            os.write(writer, said.encode())
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        said = file.read()
    os.waitpid(child, 0)
    return said


def warned_by(work: Callable[[], None]) -> list[str]:
    """What `work` warned of."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        work()
    return [str(one.message) for one in found]


def compiles_with_a_warning() -> None:
    def work() -> None:
        assert codegen.publish(source(9)).read_text() == source(9).text
        compiling.wanted(job(9)).keep({"kernel.cubin": b"x"}, {})

    (said,) = warned_by(work)
    assert re.match(UNWRITABLE, said), said


def become_nobody() -> None:
    """Permissions hold for everybody but root."""
    if os.geteuid() == 0:
        os.setgid(65534)
        os.setuid(65534)


@pytest.fixture
def open_to_all(tmp_path: Path) -> None:
    """Nobody may look into the folders above."""
    for folder in (tmp_path, *tmp_path.parents):
        if folder.owner() == tmp_path.owner() and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o055)


@pytest.mark.usefixtures("open_to_all")
def test_a_read_only_cache_serves_what_it_has(filled: Path) -> None:
    wanted = compiling.wanted(job())
    forget()
    for path in (filled, *filled.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)

    def work() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert wanted.find() is not None
            assert codegen.publish(source()).parent == wanted.entry
        compiles_with_a_warning()

    try:
        assert in_a_child(work, become_nobody) == ""
        assert not (filled / "quarantine").exists()
        assert len(inventory.names(filled)) == 1
    finally:
        for path in (filled, *filled.rglob("*")):
            if path.is_dir():
                path.chmod(0o755)


@pytest.mark.usefixtures("open_to_all")
def test_a_damaged_entry_of_a_read_only_cache_is_not_used(filled: Path) -> None:
    wanted = compiling.wanted(job())
    forget()
    (wanted.entry / "kernel.py").write_text("raise SystemExit")
    (cubin,) = wanted.entry.glob("bin/*/*/kernel.cubin")
    cubin.write_bytes(b"")
    for path in (filled, *filled.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)

    def use() -> None:
        assert wanted.find() is None
        path = codegen.publish(source())
        assert path.read_text() == source().text
        assert not path.is_relative_to(filled)

    def work() -> None:
        said = "\n".join(warned_by(use))
        assert "can't be moved away" in said
        assert "it is not used" in said

    try:
        assert in_a_child(work, become_nobody) == ""
    finally:
        for path in (filled, *filled.rglob("*")):
            if path.is_dir():
                path.chmod(0o755)


def test_a_home_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MORPHC_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    # Root could make any other folder.
    monkeypatch.setenv("HOME", "/dev/null/nobody")
    assert str(place.root()).startswith("/dev/null/nobody")
    compiles_with_a_warning()


@pytest.mark.parametrize("below", ["", "v1", "v1/kernels"])
def test_a_file_in_the_place_of_a_folder(fresh_cache: Path, below: str) -> None:
    path = fresh_cache / below if below else fresh_cache
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("")
    compiles_with_a_warning()
    assert path.read_text() == ""


def test_the_verbs_say_that_the_cache_is_a_file(
    fresh_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fresh_cache.write_text("")
    assert main(["cache", "ls"]) == 2
    assert "can't be read: Not a directory" in capsys.readouterr().err
    with pytest.raises(CacheError, match="Not a directory"):
        Cache().prune()
    assert main(["doctor", "--json"]) == 0
    assert '"cache_writable":false' in capsys.readouterr().out


@pytest.fixture
def small_disk(fresh_cache: Path) -> Iterator[Path]:
    """A disk of 64 kB for the cache."""
    fresh_cache.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(fresh_cache)]
    mounted = os.geteuid() == 0 and subprocess.run(command, capture_output=True, check=False).returncode == 0
    if not mounted:
        pytest.skip(
            "mounting a small tmpfs takes privileges that this process hasn't; files that may not grow are tested"
        )
    yield fresh_cache
    forget()  # a lease keeps a file open
    subprocess.run(["umount", str(fresh_cache)], check=True)


def test_a_full_disk(small_disk: Path) -> None:
    with (small_disk / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"x" * 1024)
    compiles_with_a_warning()
    assert sorted(path.name for path in small_disk.rglob("*") if path.is_file() and path.stat().st_size) == [
        "filler"
    ]
    (small_disk / "filler").unlink()
    forget()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert codegen.publish(source(9)).is_relative_to(small_disk)
    assert Cache().verify() == []


def test_no_file_may_grow() -> None:
    """Every disk is full, the temporary folder's too: that is said, and nothing half-written stays."""

    def prepare() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))

    def use() -> None:
        with pytest.raises(KernelError, match=r"neither to .* nor to a temporary folder"):
            codegen.publish(source(11))

    def work() -> None:
        (said,) = warned_by(use)
        assert re.match(UNWRITABLE, said), said
        assert inventory.names(place.root()) == []
        assert not list((place.root() / "kernels").glob(".*"))

    assert in_a_child(work, prepare) == ""


def test_a_disk_that_is_full_when_the_binary_comes(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was compiled is used all the same."""
    written = Path.write_bytes

    def full(self: Path, data: bytes) -> int:
        if self.suffix == ".cubin":
            raise OSError(28, "No space left on device")
        return written(self, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.warns(MorphcWarning, match="No space left on device") as warned:
        (made,) = compiled_cache([job(block=256)])
    assert made.size > 0
    assert len(warned) == 1
    assert not list(filled.rglob(".*"))
    assert Cache(filled).verify() == []


def test_the_bound_is_kept_by_itself_once_a_day(filled: Path) -> None:
    forget()
    (filled / "pruned").unlink()
    done = prune.keep_bound(filled, bound=1)
    assert done is not None
    assert len(done.removed) == 1
    assert inventory.names(filled) == []
    assert prune.keep_bound(filled, bound=1) is None


def test_a_hit_is_a_use(filled: Path) -> None:
    (told,) = (entry for entry in filled.glob("kernels/*/manifest.json"))
    os.utime(told, (1e9, 1e9))
    forget()
    with counters.watch() as count:
        compiled_cache([job()])
    assert count.hits == 1
    assert told.stat().st_mtime > 1.7e9
    before = told.stat().st_mtime_ns
    store.touch(told)
    assert told.stat().st_mtime_ns == before
