"""The cache under load: many entries, many processes, many kills. Needs Triton and no GPU.

    python benchmarks/cache.py                    # all of it, some ten minutes; benchmarks/results/cache.json
    python benchmarks/cache.py --kills 20 --entries 1000

What is right is asserted; what is fast is only measured.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import nn

import morphc
from morphc.ahead import compile_kernels
from morphc.caching import Cache
from morphc.kernels import active, binaries, codegen
from morphc.kernels.cache import leases, manifest, place, store
from morphc.kernels.spec import KernelSpec

RESULTS = Path(__file__).parent / "results" / "cache.json"
MODEL = """
    import torch
    from torch import nn

    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32))
    example_inputs = (torch.randn(3, 16),)
"""
SPEC = KernelSpec(
    kind="forward", features=4096, seeds=1024, chunk=4, slots=64, rank=16, blueprint="bottleneck", blend="residual",
    epilogue=None, layout="last", dtype="bfloat16",
)  # fmt: skip


def many_entries(folder: Path, count: int) -> dict[str, float]:
    """Seconds of `morphc cache ls` and `verify` as processes, and milliseconds of a hit, among `count` entries."""
    os.environ["MORPHC_CACHE_DIR"] = str(folder)
    root, made = place.root(), active.source(SPEC)
    files = {"kernel.py": made.text.encode(), "spec.json": msgspec.json.encode(made.spec)}
    for number in range(count):
        spec = msgspec.to_builtins(msgspec.structs.replace(SPEC, slots=number + 1))
        told = manifest.Provenance((f"layers.{number}.fc1",))
        entry = store.put_kernel(
            root, f"forward_{number}", {**made.made_from, "spec": spec}, files, told
        ).folder
        form = {"function": "forward", "target": "cuda:90", "triton": "3.6.0", "kernel": str(number)}
        details = {
            "registers": 168,
            "spills": 0,
            "shared": 8192,
            "size": 50_000,
            "seconds": 1.0,
            "arguments": [],
        }
        store.put_binary(entry, form, {"kernel.cubin": os.urandom(2000), "kernel.json": b"{}"}, details)
    codegen.publish(made)
    want = binaries.wanted(made, "forward", {"x_ptr": "*bf16"}, {"ROWS": 64}, (), {"num_warps": 4}, "cuda:90")
    # As large as a kernel's binary is.
    described = {"seconds": 1.0, "arguments": []}
    want.keep({"kernel.cubin": os.urandom(60_000), "kernel.json": b"{}"}, described)

    def hit() -> None:
        codegen._published.clear()
        again = binaries.wanted(
            made, "forward", {"x_ptr": "*bf16"}, {"ROWS": 64}, (), {"num_warps": 4}, "cuda:90"
        )
        assert again.find() is not None

    listed = [_seconds(lambda: _morphc("cache", "ls")) for _ in range(5)]
    before = os.times()
    _morphc("cache", "ls")
    after = os.times()
    processor = after.children_user + after.children_system - before.children_user - before.children_system
    hits = [1e3 * _seconds(hit) for _ in range(50)]
    leases.release()
    return {
        "entries": len(Cache().entries()),
        "ls_seconds": round(min(listed), 3),
        "ls_processor_seconds": round(processor, 2),
        "verify_seconds": round(_seconds(lambda: _morphc("cache", "verify")), 3),
        "hit_ms": round(statistics.median(hits), 3),
    }


def _seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _morphc(*words: str) -> str:
    command = [sys.executable, "-m", "morphc", *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def many_processes(folder: Path, count: int) -> dict[str, Any]:
    """`count` times `morphc compile` of one model at once."""
    path = folder / "model.py"
    path.write_text(textwrap.dedent(MODEL))
    command = [
        sys.executable,
        "-m",
        "morphc",
        "compile",
        str(path),
        "--seeds",
        "4",
        "--no-verify",
        "--target",
        "cuda:90",
        "--json",
    ]
    env = {**os.environ, "MORPHC_CACHE_DIR": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    began = time.perf_counter()
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": env}
    processes = [subprocess.Popen(command, **pipes) for _ in range(count)]
    answers = [process.communicate() for process in processes]
    assert not any(process.returncode for process in processes), answers
    assert not any("warning" in errors for _, errors in answers), answers
    made = [json.loads(out)["kernels"][0] for out, _ in answers]
    total = len(made[0]["kernels"])
    assert all(one["kernels"] == made[0]["kernels"] for one in made)
    root = folder / "cache" / "v1"
    assert Cache(root).verify() == []
    assert not (root / "quarantine").exists()
    compiled = sum(one["compiled"] for one in made)
    assert compiled == total == sum(entry.binaries for entry in Cache(root).entries())
    return {
        "processes": count,
        "kernels": total,
        "compiles": compiled,
        "seconds": round(time.perf_counter() - began, 1),
    }


def many_kills(folder: Path, count: int) -> dict[str, Any]:
    """kill -9 of `count` compiles at random moments; after each every entry is whole, and one more compile succeeds."""
    host = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32))
    config = morphc.Config(seeds_per_layer=4, slots=2, blueprint="affine")
    model = morphc.compile(host, (torch.randn(3, 16),), config=config, verify=False)
    plan = morphc.report(model).plan
    # What Triton keeps by itself would leave little time to be killed in.
    os.environ["TRITON_ALWAYS_COMPILE"] = "1"
    os.environ["MORPHC_CACHE_DIR"] = str(folder / "first")
    whole = _seconds(lambda: _forked(lambda: compile_kernels(model, plan, "cuda:80")))
    chance, killed, damaged = random.Random(0), 0, 0
    for turn in range(count):
        # A new folder now and then: a cache that is full of hits is not killed at work.
        os.environ["MORPHC_CACHE_DIR"] = str(folder / f"{turn // 5}")
        killed += _forked(lambda: compile_kernels(model, plan, "cuda:80"), chance.uniform(0.0, whole))
        damaged += len(Cache().verify())
        if turn % 5 == 4:
            assert not _forked(lambda: compile_kernels(model, plan, "cuda:80"))
            assert Cache().verify() == []
            assert not (place.root() / "quarantine").exists()
    assert damaged == 0
    return {
        "compiles": count,
        "killed": killed,
        "damaged_entries": damaged,
        "seconds_of_one": round(whole, 1),
    }


def _forked(work: Callable[[], Any], seconds: float | None = None) -> bool:
    """Do it in a forked process; whether that was killed after so many seconds."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or status == 0, status
    return os.WIFSIGNALED(status)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--entries", type=int, default=10_000)
    parser.add_argument("--processes", type=int, default=16)
    parser.add_argument("--kills", type=int, default=200)
    given = parser.parse_args()
    torch.set_num_threads(1)
    # What is left out keeps its figures.
    found: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    found["machine"] = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
    for name, work, count in (
        ("many_entries", many_entries, given.entries),
        ("many_processes", many_processes, given.processes),
        ("many_kills", many_kills, given.kills),
    ):
        if count:
            with tempfile.TemporaryDirectory() as folder:
                found[name] = work(Path(folder), count)
            print(name, found[name], flush=True)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
