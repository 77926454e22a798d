"""`morphc compile --target` fills a bundle; `--require-cached` starts from it, or says what is missing."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

import morphc
from morphc.cli import kernels, main
from morphc.kernels import backend

MODEL = """
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1 = nn.Linear(16, 32)
            self.fc2 = nn.Linear(32, 32)

        def forward(self, x):
            return self.fc2(torch.relu(self.fc1(x)))

    model = Net()
    example_inputs = (torch.randn(3, 16),)
"""


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
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.py"
    path.write_text(textwrap.dedent(MODEL))
    return path


def test_a_bundle_is_filled_and_used(
    cli: Callable[..., Ran], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = ("compile", model, "--seeds", 4, "--blueprint", "affine", "--no-verify")
    targets = ("--target", "cuda:90", "--target", "hip:gfx942")
    out = tmp_path / "out"
    ran = cli(*compiled, *targets, "-o", out)
    assert ran.status == 0
    assert "kernels for cuda:90: " in ran.out
    assert "kernels for hip:gfx942: " in ran.out
    assert ": nothing like it was ever kept here" in ran.out
    told = json.loads((out / "kernels.json").read_text())
    assert [one["target"] for one in told] == ["cuda:90", "hip:gfx942"]
    first = told
    for one in told:
        assert one["compiled"] == len(one["misses"]) == len(one["kernels"]) > 8
        assert all(kernel["registers"] > 0 and kernel["size"] > 0 for kernel in one["kernels"])
    wanted = {("fc1",), ("fc2",), ("fc1", "fc2"), ()}
    assert {tuple(kernel["layers"]) for one in told for kernel in one["kernels"]} <= wanted

    assert all(str(tmp_path) not in path.read_text() for path in (tmp_path / "cache").rglob("*.json"))
    assert "model.py:12" in "".join(
        path.read_text() for path in (tmp_path / "cache").rglob("provenance.json")
    )

    ran = cli(*compiled, *targets, "--json")
    told = json.loads(ran.out)["kernels"]
    assert [(one["misses"], one["compiled"]) for one in told] == [([], 0), ([], 0)]
    assert [one["saved"] for one in told] == pytest.approx([one["spent"] for one in first])
    assert " hits (saved " in ran.err

    monkeypatch.setenv("MORPHC_CACHE_DIR", str(tmp_path / "other"))
    ran = cli(*compiled, *targets, "--require-cached")
    assert ran.status == 1
    assert "are not in the cache" in ran.out
    assert "nothing like it was ever kept here" in ran.out
    assert not any(entry.binaries for entry in morphc.cache().entries())
    assert cli("cache", "import", out / "kernels.tar.gz").status == 0
    ran = cli(*compiled, *targets, "--require-cached")
    assert ran.status == 0
    assert ran.out.count("are in the cache; nothing will be compiled") == 2

    ran = cli(
        "compile",
        model,
        "--seeds",
        8,
        "--blueprint",
        "affine",
        "--no-verify",
        "--target",
        "cuda:90",
        "--require-cached",
    )
    assert ran.status == 1
    assert "spec.seeds: 4 -> 8" in ran.out
    assert "nothing like it" not in ran.out
    ran = cli(*compiled, "--target", "cuda:80", "--require-cached", "--json")
    assert ran.status == 1
    (told,) = json.loads(ran.out)["kernels"]
    assert len(told["missing"]) == told["kernels"]
    assert "target: cuda:90 -> cuda:80" in str(told["missing"])


def test_an_unsupported_target_is_told_before_anything_is_run(
    cli: Callable[..., Ran], tmp_path: Path
) -> None:
    ran = cli("compile", tmp_path / "none.py", "--target", "cuda:75")
    assert ran.status == 2
    assert "unknown target 'cuda:75'." in ran.err
    assert "Known: cuda:100, cuda:80, cuda:89, cuda:90, hip:gfx942." in ran.err


def test_without_a_gpu_the_target_has_to_be_named(
    cli: Callable[..., Ran], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "unavailable", lambda device: "torch sees no CUDA device")
    ran = cli("compile", model, "--require-cached", "--no-verify")
    assert ran.status == 2
    assert "there is no GPU here to look kernels up for (torch sees no CUDA device)" in ran.err
    assert "--target cuda:90" in ran.err


def test_without_triton_that_is_said(
    cli: Callable[..., Ran], model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(
        backend, "triton_problem", lambda: "triton is not installed: pip install triton (Linux only)"
    )
    ran = cli("compile", model, "--target", "cuda:90", "--no-verify", "-o", tmp_path / "out")
    assert ran.status == 1
    assert "pip install triton" in ran.err
    assert not (tmp_path / "out").exists()


def test_a_kernel_that_does_not_compile_is_named(
    cli: Callable[..., Ran], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that takes too long, for instance: the others are kept, and the exit status says that one is missing."""
    from morphc import ahead
    from morphc.kernels.compile import Failure, compile_all

    def slow(jobs: list[object], **options: object) -> list[object]:
        found: list[object] = list(compile_all(jobs, **options))  # type: ignore[arg-type]
        return [Failure("time", "took more than 120 s to compile"), *found[1:]]

    monkeypatch.setattr(ahead, "compile_all", slow)
    ran = cli("compile", model, "--seeds", 4, "--blueprint", "affine", "--target", "cuda:80", "--no-verify")
    assert ran.status == 1
    assert "took more than 120 s to compile" in ran.out


def test_a_compile_on_a_gpu_says_what_the_cache_has(
    cli: Callable[..., Ran], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model lies on the CPU and is taken for one that doesn't."""
    monkeypatch.setattr(kernels, "unavailable", lambda device: "")
    monkeypatch.setattr(kernels, "target_of_this_machine", lambda: "cuda:90")
    compiled = ("compile", model, "--seeds", 4, "--blueprint", "affine", "--no-verify")
    assert "kernels for" not in cli(*compiled).out
    monkeypatch.setattr(kernels, "on_gpu", lambda module: True)
    ran = cli(*compiled)
    assert ran.status == 0
    assert ": 0 hits, " in ran.out
    assert "misses; the misses are compiled when they are first launched" in ran.out
    (told,) = json.loads(cli(*compiled, "--json").out)["kernels"]
    assert told["target"] == "cuda:90"
    assert told["hits"] == 0
    assert len(told["misses"]) > 8
    assert not any(entry.binaries for entry in morphc.cache().entries())
