"""`morphc cache` and `morphc.cache()`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
from cache_helpers import ROOT, SPEC, fake_entry, forget, source
from test_bundles import table

import morphc
from morphc.caching import Cache
from morphc.cli import main
from morphc.errors import CacheError
from morphc.kernels import active, telemetry
from morphc.kernels.cache import inventory, manifest, place, store, tables
from morphc.kernels.codegen import publish
from morphc.kernels.spec import KernelSpec


class Ran(NamedTuple):
    """How a call of `morphc` ended."""

    status: int
    out: str
    err: str


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    def run(*arguments: object) -> Ran:
        capsys.readouterr()
        status = main([str(argument) for argument in arguments])
        return Ran(status, *capsys.readouterr())

    return run


@pytest.fixture
def root(fresh_cache: Path) -> Path:
    """A cache of three kernels, of which the first is tuned."""
    where = fresh_cache / "v1"
    keys = [manifest.read(fake_entry(where, more))[0].key for more in (1, 2, 30)]
    tables.save(where, table(keys[0]))
    fake_entry(where, 2, b"another", "hip:gfx942")
    return where


def key(root: Path, at: int) -> str:
    return inventory.entries(root)[at].key


class TestLs:
    def test_a_line_says_what_there_is(self, cli: Callable[..., Ran], root: Path) -> None:
        ran = cli("cache", "ls")
        head, first, second, third, last = ran.out.splitlines()
        assert head.split() == ["key", "name", "layers", "arch", "best", "roof", "reg/sp", "size", "used"]
        shown = ["forward_own_h11_s3_k2_r5_fp32", "fc1", "90", "12.5us", "80%", "10/0"]
        assert first.split()[1:7] == shown
        assert second.split()[1:5] == ["forward_own_h12_s3_k2_r5_fp32", "fc1", "2", "gpus"]
        assert third.startswith(key(root, 2)[:8])
        assert last.startswith("3 kernels, 4 compiled forms, ")
        assert ran.status == 0

    def test_it_fits_a_hundred_columns(self, cli: Callable[..., Ran], fresh_cache: Path) -> None:
        where = fresh_cache / "v1"
        long = msgspec.structs.replace(
            SPEC, blueprint="bottleneck", blend="multiply", features=131072, seeds=65536, slots=6553,
            rank=256, dtype="bfloat16", layout="channels_first", epilogue="hardswish",
        )  # fmt: skip
        made = source(1, msgspec.structs.replace(long, blueprint="own"))
        files = {"kernel.py": made.text.encode(), "spec.json": b"{}"}
        layers = tuple(f"encoder.layers.{n}.attention.self.output.dense" for n in range(200))
        entry = store.put_kernel(where, long.name, made.made_from, files, manifest.Provenance(layers)).folder
        for target in ("cuda:80", "cuda:90", "cuda:100", "hip:gfx942"):
            form = {"function": "forward", "target": target, "triton": "3.6.0"}
            details = {"registers": 255, "spills": 12345, "size": 1}
            store.put_binary(entry, form, {"kernel.cubin": b"x" * 3_000_000}, details)
        told = manifest.read(entry)[0].key
        tables.save(where, table(told, us=123456.7))
        os.utime(entry / "manifest.json", (0, 0))
        (fake_entry(where, 5) / "provenance.json").write_text("{" * 500)
        lines = cli("cache", "ls").out.splitlines()
        assert len(lines) == 4
        assert max(map(len, lines[:-1])) <= 100
        assert "damaged: provenance.json" in lines[2] or "damaged: provenance.json" in lines[1]

    def test_what_moves_the_cursor_is_not_printed(self, cli: Callable[..., Ran], root: Path) -> None:
        entry = inventory.entries(root)[0]
        told = manifest.Provenance(("a\x1b[31m\nb",), ("x.py:1\x1b]0;t\x07",))
        (Path(entry.folder) / manifest.PROVENANCE).write_bytes(manifest.sealed(told))
        shown = cli("cache", "show", entry.key, "--no-source").out
        assert "a?[31m?b" in shown
        assert "x.py:1?]0;t?" in shown
        listed = cli("cache", "ls").out
        assert len(listed.splitlines()) == 5
        assert "\x1b" not in shown + listed

    def test_json_has_all_of_it(self, cli: Callable[..., Ran], root: Path) -> None:
        found: list[dict[str, Any]] = json.loads(cli("cache", "ls", "--json").out)
        assert [one["name"] for one in found] == [f"forward_own_h{n}_s3_k2_r5_fp32" for n in (11, 12, 40)]
        assert found[0]["tuned"]
        assert found[0]["roofline"] == pytest.approx(0.8)
        assert found[1]["archs"] == ["cuda-90", "hip-gfx942"]
        assert msgspec.convert(found, list[inventory.Entry]) == morphc.cache().entries()

    def test_an_empty_cache(self, cli: Callable[..., Ran], fresh_cache: Path) -> None:
        assert cli("cache", "ls") == (0, f"no kernels in {fresh_cache / 'v1'}\n", "")
        assert cli("cache", "ls", "--json").out == "[]\n"
        assert not fresh_cache.exists()

    def test_neither_torch_nor_triton_is_imported(self, root: Path) -> None:
        code = """
        import sys
        from morphc.cli import main
        for words in (["ls"], ["show", "forward_own_h11"], ["verify"], ["export", sys.argv[1]], ["import", sys.argv[1]],
                      ["prune", "--dry-run"], ["ls", "--json"]):
            assert main(["cache", *words]) == 0, words
        heavy = {"torch", "triton", "sympy", "networkx", "numpy", "jinja2"} & set(sys.modules)
        assert not heavy, heavy
        """
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code), str(root.parent / "x.tar")],
            capture_output=True,
            text=True,
            cwd=ROOT,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")

    @pytest.mark.parametrize("count", [300])
    def test_many_entries(self, cli: Callable[..., Ran], fresh_cache: Path, count: int) -> None:
        for more in range(count):
            fake_entry(fresh_cache / "v1", more)
        lines = cli("cache", "ls").out.splitlines()
        assert len(lines) == count + 2
        assert cli("cache", "verify").out == f"{2 * count} checked, all whole\n"


class TestShow:
    def test_all_of_an_entry(self, cli: Callable[..., Ran], root: Path) -> None:
        ran = cli("cache", "show", key(root, 0)[:6])
        assert ran.status == 0
        for said in (
            "  features     11",
            "  blueprint    own",
            "cuda:90      3.6.0       10      0",
            "tuned on NVIDIA H200 (cuda:90)",
            "4096 rows: 12.5us, 80% of the memory roofline; triton 3.6.0; CUDA-graph replay",
            "spills 12 values a thread",
            "best",
            "@triton.jit",
        ):
            assert said in ran.out, said
        lines = [line for line in ran.out.splitlines() if "  folder " not in line]
        assert max(map(len, lines)) <= 110
        assert "@triton.jit" not in cli("cache", "show", key(root, 0)[:6], "--no-source").out

    def test_json(self, cli: Callable[..., Ran], root: Path) -> None:
        found = json.loads(cli("cache", "show", "forward_own_h11_s3_k2_r5_fp32", "--json").out)
        (answer,) = found["tables"][0]["answers"]
        assert [trial["us"] for trial in answer["trials"]] == [12.5, None]
        assert answer["trials"][1]["problem"] == "spills 12 values a thread"
        assert answer["method"] == tables.GRAPH_REPLAY
        assert found["source"] == source(1, msgspec.structs.replace(SPEC, features=11)).text

    def test_an_unknown_key_names_what_is_near(self, cli: Callable[..., Ran], root: Path) -> None:
        ran = cli("cache", "show", "forward_own_h13_s3_k2_r5_fp32")
        assert ran.status == 2
        assert "no entry 'forward_own_h13_s3_k2_r5_fp32' among the 3" in ran.err
        assert "Near are: forward_own_h1" in ran.err

    def test_a_beginning_of_several_lists_them(self, cli: Callable[..., Ran], root: Path) -> None:
        ran = cli("cache", "show", "forward_own_h1")
        assert ran.status == 2
        assert "stands for 2 entries; give more of one:" in ran.err
        assert ran.err.count("\n  forward_own_h1") == 2

    def test_a_damaged_entry_is_not_shown(self, cli: Callable[..., Ran], root: Path) -> None:
        (Path(inventory.entries(root)[0].folder) / "kernel.py").write_text("print('hello')")
        ran = cli("cache", "show", "forward_own_h11")
        assert ran.status == 2
        assert "can't be shown: kernel.py has 14 B" in ran.err


class TestWhyMiss:
    SITE = KernelSpec(
        kind="forward", features=4096, seeds=1024, chunk=4, slots=64, rank=16, blueprint="bottleneck",
        blend="residual", epilogue=None, layout="last", dtype="bfloat16",
    )  # fmt: skip

    def test_the_fields_that_differ(self, cli: Callable[..., Ran], fresh_cache: Path) -> None:
        publish(active.source(self.SITE))
        publish(telemetry.source(telemetry.spec_of(64, 8, __import__("torch").float32)))
        wanted = msgspec.structs.replace(self.SITE, rank=32, slots=128)
        ran = cli("cache", "why-miss", wanted.name)
        assert ran.status == 1
        lines = [line.split() for line in ran.out.splitlines()]
        assert lines[1][0] == "nearest:"
        assert lines[1][1].startswith(f"{self.SITE.name}-")
        assert lines[3:] == [["spec.rank", "16", "->", "32"], ["spec.slots", "64", "->", "128"]]

    def test_a_kernel_that_is_there(self, cli: Callable[..., Ran], fresh_cache: Path) -> None:
        made = active.source(self.SITE)
        publish(made)
        for word in (self.SITE.name, made.key, msgspec.json.encode(self.SITE).decode()):
            ran = cli("cache", "why-miss", word)
            assert ran.status == 0
            assert f"{self.SITE.name} ({made.key[:12]}) is in the cache" in ran.out
            assert "compiled for nothing yet" in ran.out

    def test_another_version_of_the_template(
        self, cli: Callable[..., Ran], fresh_cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made = active.source(self.SITE)
        old = {**made.made_from, "template_sha": "0" * 64}
        files = {"kernel.py": b"old", "spec.json": b"{}"}
        store.put_kernel(place.root(), made.name, old, files, manifest.Provenance())
        found = morphc.cache().why_miss(self.SITE)
        assert not found.found
        assert [one.field for one in found.differences] == ["template_sha"]

    def test_another_triton_is_noted(self, root: Path) -> None:
        made = active.source(self.SITE)
        entry = publish(made).parent
        form = {"function": "forward", "target": "cuda:90", "triton": "3.1.0"}
        folder = store.put_binary(entry, form, {"kernel.cubin": b"x"}, {})
        found = morphc.cache().why_miss(self.SITE)
        assert found.found
        assert "compiled by triton 3.1.0, here is" in found.notes[0]
        (folder / "kernel.cubin").unlink()
        assert "is damaged: kernel.cubin is missing" in morphc.cache().why_miss(self.SITE).notes[0]

    def test_a_damaged_one_is_found_by_its_name(self, cli: Callable[..., Ran], fresh_cache: Path) -> None:
        entry = publish(active.source(self.SITE)).parent
        (entry / "manifest.json").write_text("")
        ran = cli("cache", "why-miss", self.SITE.name)
        assert ran.status == 1
        assert "it is damaged: manifest.json is damaged" in ran.out

    def test_a_cache_that_is_a_file(self, cli: Callable[..., Ran], fresh_cache: Path) -> None:
        fresh_cache.write_text("")
        ran = cli("cache", "why-miss", self.SITE.name)
        assert (ran.status, ran.out) == (2, "")
        assert "can't be read: Not a directory" in ran.err

    def test_an_empty_cache(self, cli: Callable[..., Ran], fresh_cache: Path) -> None:
        ran = cli("cache", "why-miss", self.SITE.name)
        assert ran.status == 1
        assert "the cache is empty" in ran.out
        assert json.loads(cli("cache", "why-miss", self.SITE.name, "--json").out)["nearest"] is None

    def test_a_kernel_that_follows_from_more_than_its_name(
        self, cli: Callable[..., Ran], fresh_cache: Path
    ) -> None:
        ran = cli("cache", "why-miss", "tap_lowrank_h256_s1_k1_r16_fp32")
        assert ran.status == 2
        assert "follows from its layer's input as well" in ran.err
        assert "--require-cached" in ran.err

    @pytest.mark.parametrize("word", ["nonsense!", '{"kind": 3}', "{"])
    def test_what_is_no_kernel(self, cli: Callable[..., Ran], fresh_cache: Path, word: str) -> None:
        ran = cli("cache", "why-miss", word)
        assert ran.status == 2
        assert "no entry 'nonsense!'" in ran.err or "this is no spec of a kernel" in ran.err


class TestVerify:
    def test_the_list_of_what_is_damaged(self, cli: Callable[..., Ran], root: Path) -> None:
        assert cli("cache", "verify") == (0, "8 checked, all whole\n", "")
        entry = Path(inventory.entries(root)[0].folder)
        (entry / "kernel.py").write_text("")
        (tuned,) = root.glob("tune/*/*.json")
        tuned.write_bytes(tuned.read_bytes().replace(b"12.5", b"11.5"))
        ran = cli("cache", "verify")
        assert ran.status == 1
        assert f"kernels/{entry.name}: kernel.py has 0 B" in ran.out
        assert f"tune/{tuned.parent.name}/{tuned.name}: {tuned.name} is not what was put there" in ran.out
        assert "2 of 7 are damaged" in ran.out
        told = json.loads(cli("cache", "verify", "--json").out)
        assert len(told["problems"]) == 2
        assert not (root / "quarantine").exists()


class TestPrune:
    def test_it_shows_and_asks(
        self, cli: Callable[..., Ran], root: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        forget()
        ran = cli("cache", "prune", "--larger-than", "0B")
        assert ran.status == 2
        assert "there is nobody to ask: give --yes or --dry-run" in ran.err
        assert len(inventory.names(root)) == 3
        monkeypatch.setattr(sys, "stdin", Terminal("n\n"))
        ran = cli("cache", "prune", "--larger-than", "0B")
        assert "nothing was removed" in ran.out
        assert len(inventory.names(root)) == 3
        monkeypatch.setattr(sys, "stdin", Terminal("y\n"))
        ran = cli("cache", "prune", "--larger-than", "0B")
        assert "removed 3, " in ran.out
        assert inventory.names(root) == []

    def test_by_age(self, cli: Callable[..., Ran], root: Path) -> None:
        forget()
        old = Path(inventory.entries(root)[1].folder)
        for path in old.rglob("manifest.json"):
            os.utime(path, (time.time() - 40 * 86400,) * 2)
        ran = cli("cache", "prune", "--older-than", "30d", "--yes")
        assert f"kernels/{old.name}  (last used 40 d ago)" in ran.out
        assert old.name not in inventory.names(root)
        assert len(inventory.names(root)) == 2

    def test_by_size_what_was_used_longest_ago_goes_first(self, root: Path) -> None:
        forget()
        found = inventory.entries(root)
        for age, entry in zip((1, 3, 2), found, strict=True):
            for path in Path(entry.folder).rglob("manifest.json"):
                os.utime(path, (time.time() - age * 86400,) * 2)
        done = Cache(root).prune(larger_than=found[0].size)
        assert [Path(one.path).name for one in done.removed] == [Path(found[at].folder).name for at in (1, 2)]

    @pytest.mark.parametrize("word", ["hip:gfx942", "gfx942", "hip-gfx942"])
    def test_by_architecture(self, cli: Callable[..., Ran], root: Path, word: str) -> None:
        forget()
        assert cli("cache", "prune", "--arch", word, "-y").status == 0
        assert [entry.archs for entry in inventory.entries(root)] == [("cuda-90",)] * 3
        assert Cache(root).verify() == []

    def test_what_is_no_architecture(self, cli: Callable[..., Ran], root: Path, tmp_path: Path) -> None:
        for command in (("prune",), ("export", tmp_path / "x.tar")):
            ran = cli("cache", *command, "--arch", "h100")
            assert ran.status == 2
            assert "'h100' is no architecture: write it as cuda:90 or hip:gfx942" in ran.err

    def test_by_version(self, root: Path) -> None:
        forget()
        assert len(Cache(root).prune(version="3.6.0", dry_run=True).stayed) == 4
        assert Cache(root).prune(version="3.5.0").removed == ()
        assert len(Cache(root).prune(version=morphc.__version__).removed) == 3

    def test_what_is_damaged_and_in_quarantine_goes_too(self, root: Path) -> None:
        forget()
        (Path(inventory.entries(root)[0].folder) / "manifest.json").write_text("")
        (root / "quarantine" / "old").mkdir(parents=True)
        (root / "quarantine" / "old" / "kernel.py").write_text("x")
        (root / "kernels" / ".half").mkdir()
        os.utime(root / "kernels" / ".half", (1, 1))
        reasons = [one.reason.partition(":")[0] for one in Cache(root).prune().removed]
        assert reasons == ["in quarantine", "was never finished", "damaged"]
        assert len(inventory.names(root)) == 2

    def test_json(self, cli: Callable[..., Ran], root: Path) -> None:
        forget()
        told = json.loads(cli("cache", "prune", "--larger-than", "0B", "--dry-run", "--json").out)
        assert len(told["chosen"]) == 3
        assert told["removed"] == []

    @pytest.mark.parametrize(
        "option", [("--older-than", "soon"), ("--larger-than", "much"), ("--older-than", "-1d")]
    )
    def test_what_is_no_age_or_size(
        self, cli: Callable[..., Ran], root: Path, option: tuple[str, str]
    ) -> None:
        ran = cli("cache", "prune", *option)
        assert ran.status == 2
        assert "write it as" in ran.err


class Terminal:
    """Somebody who answers."""

    def __init__(self, answer: str) -> None:
        self.answer = answer

    def isatty(self) -> bool:
        return True

    def readline(self, *size: int) -> str:
        return self.answer


class TestCarrying:
    def test_export_and_import(
        self, cli: Callable[..., Ran], root: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = root.parent / "kernels.tar.gz"
        ran = cli("cache", "export", path, "forward_own_h11", "--arch", "cuda:90")
        assert ran.status == 0
        assert "1 kernels, 1 compiled forms, 1 tuning tables" in ran.out
        monkeypatch.setenv("MORPHC_CACHE_DIR", str(root.parent / "new"))
        ran = cli("cache", "import", path)
        assert ran == (0, "1 kernels: 1 compiled forms are new, 1 tuning tables\n", "")
        assert json.loads(cli("cache", "import", path, "--json").out)["known"] == 1
        assert [entry.tuned for entry in morphc.cache().entries()] == [True]

    def test_what_is_no_bundle(self, cli: Callable[..., Ran], tmp_path: Path) -> None:
        (tmp_path / "x.tar").write_bytes(b"x" * 2048)
        ran = cli("cache", "import", tmp_path / "x.tar")
        assert ran.status == 2
        assert "was not imported: it is no tar file" in ran.err


class TestTables:
    def test_answers_are_added_and_replaced(self, root: Path) -> None:
        told = key(root, 0)
        tables.save(root, table(told, rows=64))
        tables.save(root, table(told, rows=4096, us=11.0))
        (found,) = tables.of_kernel(root, told)
        assert [(one.rows, one.us) for one in found.answers] == [(64, 12.5), (4096, 11.0)]

    def test_a_damaged_table_is_moved_aside_and_begun_anew(self, root: Path) -> None:
        told = key(root, 0)
        (path,) = root.glob("tune/*/*.json")
        path.write_text("[]")
        with pytest.warns(UserWarning, match=r"is damaged.*moved to .*quarantine, and begun anew"):
            tables.save(root, table(told, rows=64))
        assert [one.rows for one in tables.of_kernel(root, told)[0].answers] == [64]


def test_an_entry_that_is_read_while_it_goes_is_no_error(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = inventory.names(root)
    monkeypatch.setattr(inventory, "names", lambda root: [*names, "gone-0123456789ab"])
    assert inventory.verify(root)[1] == []


def test_the_cache_of_another_folder(root: Path, tmp_path: Path) -> None:
    assert len(morphc.cache(root).entries()) == 3
    assert repr(morphc.cache(tmp_path / "none")).endswith("none', 0 entries)")
    with pytest.raises(CacheError, match="nothing to export"):
        morphc.cache(tmp_path / "none").export(tmp_path / "x.tar")
