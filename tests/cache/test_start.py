"""A start from the cache, as far as it goes without a GPU: up to the driver's call that loads the binary."""

from __future__ import annotations

from pathlib import Path

import pytest
from cache_helpers import SIGNATURE, compiled_cache, job, start

from morphc.kernels import codegen, triton_api
from morphc.kernels import compile as compiling


@pytest.mark.parametrize("target", ["cuda:80", "cuda:90", "cuda:100", "hip:gfx942"])
def test_a_kernel_is_put_together_without_compiling(
    fresh_cache: Path, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (made,) = compiled_cache([job(target=target)])
    found = compiling.wanted(job(target=target)).find()
    assert found is not None
    compiler = triton_api.triton().compiler
    monkeypatch.setattr(compiler, "compile", None)
    monkeypatch.setattr(compiler.ASTSource, "make_ir", None)
    monkeypatch.setattr(codegen, "load", None)
    arguments = found.manifest.details["arguments"]
    kernel = triton_api.assemble(
        found.folder, found.manifest.files, "add", arguments, SIGNATURE, {"BLOCK": 128}
    )
    (binary,) = found.folder.glob("kernel.[ch]*[no]")
    assert bytes(kernel.kernel) == binary.read_bytes()
    assert len(kernel.kernel) == made.size
    assert (kernel.name, kernel.metadata.num_warps, kernel.metadata.shared) == ("add", 4, made.shared)
    assert kernel.metadata.target.backend == target.partition(":")[0]
    # What a launcher asks of the source.
    assert kernel.src.constants == {(3,): 128}
    assert list(kernel.src.signature.items()) == list(SIGNATURE.items())
    assert kernel.src.fn.arg_names == ["x_ptr", "n", "scale", "BLOCK"]
    assert kernel.packed_metadata[0] == 4


PREPARES = """
import contextlib, os, sys, types
import torch
from cache_helpers import SIGNATURE, forget, job, source
from morphc.errors import CacheMissError
from morphc.kernels import backend, codegen, launch, triton_api
from morphc.kernels.cache import counters, place

driver = types.SimpleNamespace(get_current_target=lambda: launch_target)
torch.cuda.device = lambda device: contextlib.nullcontext()
torch.cuda.device_count = lambda: 1
backend.unavailable = lambda device: ""
from morphc.kernels.compile_worker import gpu_target
launch_target = gpu_target("cuda:90")
triton_api.triton().runtime.driver.set_active(driver)
loaded = []

def launcher(kernel, function, signature, constants, options, index):
    kernel.n_regs, kernel.n_spills = 11, 0
    loaded.append(bytes(kernel.kernel))
    return lambda grid, *args: None

triton_api.launcher = launcher

def prepare():
    launch._prepared.clear()
    forget()
    with counters.watch() as count:
        made = launch.prepare(source(), "add", SIGNATURE, {"BLOCK": 128}, aligned=("x_ptr",), device="cuda:0")
    return made, (count.hits, len(count.misses), count.compiled)

os.environ["MORPHC_REQUIRE_CACHED"] = "1"
try:
    prepare()
except CacheMissError as error:
    assert "own_h10_s3_k2_r5_fp32.add is not in the cache for cuda:90 (nothing" in str(error), error
else:
    raise AssertionError("it was compiled")
del os.environ["MORPHC_REQUIRE_CACHED"]
first, counted = prepare()
assert counted == (0, 1, 1), counted
os.environ["MORPHC_REQUIRE_CACHED"] = "1"
real, codegen.load = codegen.load, None
second, counted = prepare()
assert counted == (1, 0, 0), counted
assert loaded[0] == loaded[1]
assert second.registers == first.registers == 11
assert second.shared == first.shared
codegen.load = real
del os.environ["MORPHC_REQUIRE_CACHED"]
(cubin,) = place.root().rglob("*.cubin")
cubin.write_bytes(cubin.read_bytes()[:-1])
third, counted = prepare()
assert counted == (0, 1, 1), counted
assert loaded[2] == loaded[0]
(aside,) = (place.root() / "quarantine").iterdir()
print("done")
"""


def test_what_was_prepared_once_is_prepared_from_the_cache(fresh_cache: Path) -> None:
    """The driver is a stand-in, the compiler is Triton's own."""
    process = start(PREPARES, TRITON_INTERPRET="0", PYTHONWARNINGS="ignore")
    out, errors = process.communicate(timeout=120)
    assert (process.returncode, out) == (0, "done\n"), errors
