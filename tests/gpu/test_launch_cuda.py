"""Prepared launches on the GPU, which calls Triton's C launcher directly."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "kernels"))

from kernel_helpers import SIGNATURE, TEMPLATE, blueprint

from morphc.errors import KernelError, ResourceError
from morphc.kernels import codegen, launch, tuning
from morphc.kernels.codegen import Source
from morphc.kernels.compile import Job, Resources, compile_all
from morphc.kernels.launch import Prepared
from morphc.kernels.spec import TuneConfig

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA device, and this machine has none"
)

N = 1 << 16
GRID = (N // 256, 1, 1)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MORPHC_CACHE_DIR", str(tmp_path))


def make(text: str = TEMPLATE) -> Source:
    with blueprint(text) as spec:
        return codegen.render("blueprint:own", spec, more=1)


def prepared(index: int = 0, **options: object) -> Prepared:
    options = {"aligned": ("x_ptr",)} | options
    return launch.prepare(make(), "add", SIGNATURE, {"BLOCK": 256}, device=f"cuda:{index}", **options)  # type: ignore[arg-type]


def numbers(index: int = 0) -> torch.Tensor:
    return torch.arange(float(N), device=f"cuda:{index}")


def expected(index: int = 0) -> torch.Tensor:
    return (numbers(index) * 0.5 + 1) * 3 + 10


def test_tensors_and_addresses_are_taken() -> None:
    add = prepared()
    x, y = numbers(), numbers()
    add(GRID, x, N, 3.0)
    add.launch(GRID, y.data_ptr(), N, 3.0)
    assert torch.equal(x, expected())
    assert torch.equal(y, expected())
    assert add.registers > 0
    assert (add.spills, add.shared) == (0, 0)


def test_a_launch_goes_to_the_current_stream() -> None:
    add, x = prepared(), numbers()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        add(GRID, x, N, 3.0)
    assert not side.query(), "it waits behind what the stream was given before"
    side.synchronize()
    assert torch.equal(x, expected())


def test_a_launch_is_captured_in_a_graph() -> None:
    add, x = prepared(), numbers()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        add(GRID, x, N, 3.0)
    assert torch.equal(x, numbers())
    graph.replay()
    assert torch.equal(x, expected())


def test_programmatic_launch_gives_the_same() -> None:
    add, x = prepared(pdl=True), numbers()
    add(GRID, x, N, 3.0)
    assert torch.equal(x, expected())


def test_threads_launch_side_by_side() -> None:
    add = prepared()
    values = [numbers() for _ in range(8)]

    def work(x: torch.Tensor) -> None:
        for _ in range(50):
            add(GRID, x, N, 0.0)
        add(GRID, x, N, 3.0)

    threads = [threading.Thread(target=work, args=(x,)) for x in values]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for x in values:
        assert torch.equal(x, torch.full_like(x, (10 * 0.5 + 1) * 3 + 10))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_each_device_has_its_own_kernel_whichever_is_current() -> None:
    first, second = prepared(0), prepared(1)
    assert first is not second
    with torch.cuda.device(0):
        x = numbers(1)
        second(GRID, x, N, 3.0)
    with torch.cuda.device(1):
        y = numbers(0)
        first(GRID, y, N, 3.0)
    assert torch.equal(x, expected(1))
    assert torch.equal(y, expected(0))


def test_an_error_of_the_compiler_names_the_template_line() -> None:
    with blueprint(TEMPLATE.replace("{{ more }}", "{{ more }} + tl.zeros([3], tl.float32)")) as spec:
        source = codegen.render("blueprint:own", spec, more=1)
        with pytest.raises(
            KernelError, match=r"doesn't compile for cuda:0 \(<template of blueprint 'own'>:4\)"
        ):
            launch.prepare(source, "add", SIGNATURE, {"BLOCK": 256}, device="cuda")


def test_shared_memory_over_the_device_names_the_limit() -> None:
    text = """\
@triton.jit
def add(x_ptr, n, scale, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    square = tl.load(x_ptr + i[:, None] * 512 + tl.arange(0, 512)[None, :]).to(tl.float16)
    tl.store(x_ptr + i, tl.sum(tl.dot(square, tl.trans(square)), 1) * scale, mask=i < n)
"""
    with pytest.raises(
        ResourceError, match=r"needs \d+ B of shared memory; this device has \d+ B; use smaller"
    ):
        launch.prepare(make(text), "add", SIGNATURE, {"BLOCK": 128}, device="cuda", num_warps=8)


def test_resources_are_those_that_cross_compiling_told() -> None:
    major, minor = torch.cuda.get_device_capability()
    options = {"num_warps": 4, "num_stages": 3}
    job = Job(make(), "add", SIGNATURE, {"BLOCK": 256}, ("x_ptr",), options, f"cuda:{major}{minor}")
    (found,) = compile_all([job])
    assert isinstance(found, Resources)
    here = launch.prepare_job(job, "cuda")
    assert (found.registers, found.spills, found.shared) == (here.registers, here.spills, here.shared)


def test_tuning_times_candidates_on_the_device() -> None:
    major, minor = torch.cuda.get_device_capability()
    buffers = [numbers() for _ in range(3)]
    source = make()

    def offer(block: int) -> tuning.Candidate:
        job = Job(
            source, "add", SIGNATURE, {"BLOCK": block}, ("x_ptr",), {"num_warps": 4}, f"cuda:{major}{minor}"
        )

        def start() -> tuning.Run:
            add = launch.prepare_job(job, "cuda")
            return lambda call: add.launch((N // block, 1, 1), buffers[call % 3], N, 0.0)

        return tuning.Candidate(TuneConfig(1, block, 4, 1), (job,), start)

    with blueprint(TEMPLATE) as spec:
        tuned = tuning.tune(spec, N, [offer(block) for block in (128, 256, 1024)], tuning.graph_times)
    times = [trial.us for trial in tuned.trials]
    assert all(us is not None and us > 0 for us in times)
    assert tuned.us in times
    assert torch.equal(buffers[0], torch.full_like(buffers[0], 10.0)), "every candidate was run"
