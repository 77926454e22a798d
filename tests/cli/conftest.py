"""Fixtures of the command line's tests: a model file to write, and a way to run `morphc` on it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

from morphc.cli import main

ROOT = Path(__file__).resolve().parents[2]

MLP = """
    import torch
    from torch import nn

    class MLP(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1 = nn.Linear(16, 32)
            self.fc2 = nn.Linear(32, 4)

        def forward(self, x):
            return self.fc2(torch.relu(self.fc1(x)))

    model = MLP()
    example_inputs = (torch.randn(3, 16),)
"""


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


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write a model file: `write(source, "name.py")`."""

    def make(source: str = MLP, name: str = "model.py") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(source), encoding="utf-8")
        return path

    return make


def start_morphc(*arguments: object, env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    """`morphc` as a process of its own, for signals and for looking at what it imports."""
    return subprocess.Popen(
        [sys.executable, "-m", "morphc", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
    )
