"""Fixtures of the command line's tests: a model file to write, and a way to run `morphc` on it."""

from __future__ import annotations

import signal
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from cli_helpers import MLP

from morphc.cli import main


class Ran(NamedTuple):
    """How a `morphc` call ended."""

    status: int
    out: str
    err: str


@pytest.fixture
def morphc(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Ran]]:
    """Run `morphc` in this process: `morphc("compile", path)`."""
    handler = signal.getsignal(signal.SIGTERM)

    def run(*arguments: object) -> Ran:
        capsys.readouterr()
        status = main([str(argument) for argument in arguments])
        return Ran(status, *capsys.readouterr())

    yield run
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture(autouse=True)
def own_dumps(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Dumps of failed passes go to a folder of the test's own."""
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("MORPHC_CACHE_DIR", str(cache))
    return cache / "dumps"


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write a model file: `write(source, "name.py")`."""

    def make(source: str = MLP, name: str = "model.py") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(source), encoding="utf-8")
        return path

    return make
