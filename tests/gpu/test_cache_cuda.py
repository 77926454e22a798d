"""The cache on the GPU: kernels that were compiled before, here or without a GPU, start without Triton's compiler."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent / "kernels"))

from kernel_helpers import SIGNATURE, TEMPLATE, blueprint

import morphc
from morphc.ahead import compile_kernels, missing, target_of_this_machine
from morphc.errors import CacheMissError
from morphc.kernels import binaries, codegen, launch
from morphc.kernels import site as bank_kernels
from morphc.kernels.cache import counters, leases, place
from morphc.kernels.codegen import Source
from morphc.kernels.compile import Job, compile_all
from morphc.kernels.launch import Prepared
from morphc.runtime import devicegauge

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA device, and this machine has none"
)

N = 1 << 12
GRID = (N // 256, 1, 1)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("MORPHC_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    begin_anew()
    yield
    begin_anew()


def begin_anew() -> None:
    """As if the process had just begun: nothing is prepared, nobody was warned."""
    launch._prepared.clear()
    codegen._published.clear()
    place._warned.clear()
    leases.release()
    bank_kernels.bank_kernels.cache_clear()
    devicegauge.kernels_for.cache_clear()


def source() -> Source:
    with blueprint(TEMPLATE) as spec:
        return codegen.render("blueprint:own", spec, more=1)


def prepared(**options: object) -> Prepared:
    given = {"aligned": ("x_ptr",), "device": "cuda"} | options
    return launch.prepare(source(), "add", SIGNATURE, {"BLOCK": 256}, **given)  # type: ignore[arg-type]


def check_it_runs(add: Prepared) -> None:
    x = torch.arange(N, dtype=torch.float32, device="cuda")
    expected = (x * 0.5 + 1) * 3.0 + 10
    add(GRID, x, N, 3.0)
    assert torch.equal(x, expected)


@pytest.mark.parametrize("pdl", [False, True])
def test_the_second_start_compiles_nothing(pdl: bool) -> None:
    with counters.watch() as count:
        first = prepared(pdl=pdl)
    assert (count.compiled, count.hits, len(count.misses)) == (1, 0, 1)
    begin_anew()
    with counters.watch() as count:
        second = prepared(pdl=pdl)
    assert (count.compiled, count.hits) == (0, 1)
    assert (first.registers, first.spills, first.shared) == (second.registers, second.spills, second.shared)
    for add in (first, second):
        if not pdl:
            check_it_runs(add)


def test_the_generated_file_is_not_run_for_a_hit(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared()
    begin_anew()
    monkeypatch.setattr(codegen, "load", None)
    check_it_runs(prepared())


def test_what_a_worker_compiled_is_what_this_process_would_compile() -> None:
    options = {"num_warps": 4, "num_stages": 3, "maxnreg": None, "pdl": False}
    job = Job(source(), "add", SIGNATURE, {"BLOCK": 256}, ("x_ptr",), options, target_of_this_machine())
    compile_all([job], processes=1, keep=True)
    with counters.watch() as count:
        check_it_runs(prepared())
    assert (count.compiled, count.hits) == (0, 1)


def test_a_damaged_binary_is_moved_aside_and_compiled_again() -> None:
    prepared()
    (cubin,) = place.root().rglob("*.cubin")
    data = bytearray(cubin.read_bytes())
    data[len(data) // 2] ^= 1
    cubin.write_bytes(bytes(data))
    begin_anew()
    with pytest.warns(UserWarning, match="is not what was put there"), counters.watch() as count:
        check_it_runs(prepared())
    assert count.compiled == 1
    begin_anew()
    with counters.watch() as count:
        check_it_runs(prepared())
    assert count.compiled == 0


def test_compiling_can_be_forbidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(binaries.REQUIRED, "1")
    with pytest.raises(
        CacheMissError, match=r"forward_own\S*\.add is not in the cache for cuda:\d+ \(nothing"
    ):
        prepared()
    monkeypatch.delenv(binaries.REQUIRED)
    prepared()
    begin_anew()
    monkeypatch.setenv(binaries.REQUIRED, "1")
    check_it_runs(prepared())


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(128, 512)
        self.fc2 = nn.Linear(512, 128)
        self.head = nn.Linear(128, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.fc2(torch.relu(self.fc1(x)))))


class Image(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv2(torch.relu(self.conv1(x))).mean((2, 3))


HOSTS = {"mlp": (MLP, (64, 128)), "image": (Image, (4, 3, 16, 16))}


def grow(model: nn.Module, x: torch.Tensor) -> None:
    """Everything that seeds do: measured, trained in isolation, blended, evaluated."""
    seeds = morphc.seeds(model)
    for state in (morphc.Lifecycle.TRAINING, morphc.Lifecycle.FINE_TUNING):
        for path in seeds.sites:
            seeds[path].assign([0, 1], morphc.Lifecycle.DORMANT)
            seeds[path].assign([0, 1], state)
        model.train()
        for _ in range(2):
            model(x).square().mean().backward()
            seeds.step_optimizer(lr=1e-3)
        model.eval()
        with torch.no_grad():
            model(x)
    seeds.telemetry()


@pytest.mark.parametrize("name", HOSTS)
@pytest.mark.parametrize("blueprint", ["bottleneck", "affine", "lowrank"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bundle_made_without_a_gpu_has_every_kernel_that_the_model_launches(
    name: str, blueprint: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, shape = HOSTS[name]
    if name == "image" and blueprint == "lowrank":
        pytest.skip("torch computes lowrank behind convolutions")
    torch.manual_seed(0)
    host = make().to(dtype)
    x = torch.randn(shape).to(dtype)
    config = morphc.Config(seeds_per_layer=8, slots=4, blueprint=blueprint, telemetry_every=1)
    target = target_of_this_machine()
    model = morphc.compile(host, (x,), config=config, verify=False)
    made = compile_kernels(model, morphc.report(model).plan, target)
    assert not [kernel.problem for kernel in made.kernels if kernel.failed]
    morphc.cache().export(tmp_path / "kernels.tar.gz", arch=target)

    monkeypatch.setenv("MORPHC_CACHE_DIR", str(tmp_path / "other"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "other triton"))
    begin_anew()
    morphc.cache().import_(tmp_path / "kernels.tar.gz")
    monkeypatch.setenv(binaries.REQUIRED, "1")
    on_gpu = morphc.compile(host.cuda(), (x.cuda(),), config=config, verify=False)
    total, lacking = missing(on_gpu, morphc.report(on_gpu).plan, target)
    assert (total, lacking) == (len(made.kernels), {})
    with counters.watch() as count:
        began = time.perf_counter()
        grow(on_gpu, x.cuda())
        torch.cuda.synchronize()
        seconds = time.perf_counter() - began
    assert count.compiled == 0
    assert count.hits > 0
    print(f"{name} {blueprint} {dtype}: {count} in {seconds:.3f} s")
