"""A small kernel of its own template, and what tests do with its entry in the cache."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import msgspec

from morphc.kernels import codegen
from morphc.kernels.blueprints import Affine, base
from morphc.kernels.cache import leases, place, store
from morphc.kernels.codegen import Source
from morphc.kernels.compile import Job, Resources, compile_all
from morphc.kernels.spec import KernelSpec

ROOT = Path(__file__).resolve().parents[2]
SIGNATURE = {"x_ptr": "*fp32", "n": "i32", "scale": "fp32"}
TEMPLATE = """\
FEATURES = tl.constexpr({{ spec.features }})


@triton.jit
def add(x_ptr, n, scale, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n)
    tl.store(x_ptr + i, x * scale + FEATURES + {{ more }}, mask=i < n)
"""
SPEC = KernelSpec(
    kind="forward",
    features=10,
    seeds=3,
    chunk=4,
    slots=2,
    rank=5,
    blueprint="own",
    blend="residual",
    epilogue=None,
    layout="last",
    dtype="float32",
)


def source(more: int = 1, spec: KernelSpec = SPEC) -> Source:
    """The kernel's file; another one for another `more`."""
    kind = type("Own", (Affine,), {"name": "own", "template": TEMPLATE, "__module__": __name__})
    base.register(kind())
    try:
        return codegen.render("blueprint:own", spec, more=more)
    finally:
        del base._REGISTRY["own"]


def job(more: int = 1, target: str = "cuda:90", block: int = 128) -> Job:
    """The kernel, to be compiled."""
    return Job(source(more), "add", SIGNATURE, {"BLOCK": block}, ("x_ptr",), {"num_warps": 4}, target)


def compiled_cache(jobs: Sequence[Job]) -> list[Resources]:
    """Compile into the cache, or find there."""
    found = compile_all(jobs, processes=1, keep=True)
    made = [one for one in found if isinstance(one, Resources)]
    assert len(made) == len(found), found
    return made


def fake_entry(root: Path, more: int, binary: bytes = b"binary", target: str = "cuda:90") -> Path:
    """An entry with one compiled form of these bytes, which nobody can run."""
    made = source(more, msgspec.structs.replace(SPEC, features=10 + more))
    files = {"kernel.py": made.text.encode(), "spec.json": msgspec.json.encode(made.spec)}
    entry = store.put_kernel(root, made.name, made.made_from, files, store.Provenance(("fc1",))).folder
    form = {"function": "add", "target": target, "triton": "3.6.0", "kernel": made.key, "options": {}}
    details = {
        "registers": 10,
        "spills": 0,
        "shared": 0,
        "size": len(binary),
        "seconds": 1.5,
        "arguments": [],
    }
    store.put_binary(entry, form, {"kernel.cubin": binary, "kernel.json": b"{}"}, details)
    return entry


def start(code: str, *arguments: str, **env: str) -> subprocess.Popen[str]:
    """A Python process of its own, with these helpers to import."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{Path(__file__).parent}:{ROOT}", "OMP_NUM_THREADS": "1", **env},
    )


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below, by its path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def forget() -> None:
    """As if the process had just begun."""
    codegen._published.clear()
    place._warned.clear()
    leases.release()
