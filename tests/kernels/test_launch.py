"""Prepared launches: in the interpreter, and how each version of Triton is called."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kernel_helpers import SIGNATURE, TEMPLATE, blueprint

from morphc.errors import KernelError, ResourceError, TritonError, UnsupportedKernelError
from morphc.kernels import backend, codegen, launch, triton_api
from morphc.kernels.codegen import Source


@pytest.fixture
def source() -> Source:
    with blueprint(TEMPLATE) as spec:
        return codegen.render("blueprint:own", spec, more=1)


BLOCK = {"BLOCK": 64}


class TestPrepared:
    def test_a_kernel_does_what_it_says(self, source: Source, device: torch.device) -> None:
        add = launch.prepare(source, "add", SIGNATURE, BLOCK, device=device)
        x = torch.arange(100.0, device=device)
        add((1, 1, 1), x, 100, 3.0)
        expected = torch.arange(100.0, device=device)
        expected[:64] = (expected[:64] * 0.5 + 1) * 3 + 10
        assert torch.equal(x, expected)
        add.launch((2, 1, 1), x, 100, 0.0)
        assert torch.equal(x, torch.full_like(x, 10.0))

    def test_no_programs_do_nothing(self, source: Source, device: torch.device) -> None:
        x = torch.arange(4.0, device=device)
        launch.prepare(source, "add", SIGNATURE, BLOCK, device=device)((0, 1, 1), x, 4, 3.0)
        assert x.tolist() == [0, 1, 2, 3]

    def test_the_same_launch_is_prepared_once(self, source: Source, device: torch.device) -> None:
        first, again, other = (
            launch.prepare(source, "add", SIGNATURE, {"BLOCK": block}, device=device)
            for block in (64, 64, 32)
        )
        assert first is again
        assert first is not other
        assert repr(first) == f"Prepared({source.name}, {first.device})"

    def test_threads_do_not_mix_their_programs(self, source: Source, device: torch.device) -> None:
        add = launch.prepare(source, "add", SIGNATURE, {"BLOCK": 16}, device=device)
        values = [torch.arange(256.0, device=device) for _ in range(4)]
        threads = [threading.Thread(target=add, args=((16, 1, 1), x, 256, 2.0)) for x in values]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for x in values:
            assert torch.equal(x, torch.arange(256.0, device=device) + 12)

    def test_non_finite_values_are_no_warnings(self, source: Source, device: torch.device) -> None:
        x = torch.tensor([float("inf"), float("nan"), 3e38], device=device)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            launch.prepare(source, "add", SIGNATURE, BLOCK, device=device)((1, 1, 1), x, 3, 4.0)
        assert x[0] == float("inf")
        assert x[1].isnan()


class TestArgumentsAreChecked:
    @pytest.mark.parametrize(
        ("signature", "constants"),
        [
            ({"n": "i32", "x_ptr": "*fp32", "scale": "fp32"}, BLOCK),
            ({"x_ptr": "*fp32", "n": "i32"}, BLOCK),
            (SIGNATURE, {}),
            (SIGNATURE, BLOCK | {"MORE": 1}),
            (SIGNATURE, BLOCK | {"n": 1}),
        ],
        ids=["order", "missing", "no constant", "unknown constant", "both"],
    )
    def test_names_and_their_order(
        self, source: Source, device: torch.device, signature: dict[str, str], constants: dict[str, int]
    ) -> None:
        with pytest.raises(
            KernelError, match=r"add\(x_ptr, n, scale, BLOCK\) was prepared with the arguments"
        ):
            launch.prepare(source, "add", signature, constants, device=device)

    def test_aligned_arguments_exist(self, source: Source, device: torch.device) -> None:
        with pytest.raises(KernelError, match="no argument 'y_ptr' to be aligned"):
            launch.prepare(source, "add", SIGNATURE, BLOCK, aligned=("y_ptr",), device=device)

    def test_dtypes_that_no_kernel_reads(self) -> None:
        assert launch.pointer(torch.zeros(1, dtype=torch.bfloat16)) == "*bf16"
        with pytest.raises(
            UnsupportedKernelError, match=r'no kernel reads torch\.complex64.*backend="torch"'
        ):
            launch.triton_type(torch.complex64)


class TestMachinesThatCanNot:
    def test_a_device_without_kernels(self, source: Source) -> None:
        with pytest.raises(UnsupportedKernelError, match=f"{source.name} on meta: there are no kernels for"):
            launch.prepare(source, "add", SIGNATURE, BLOCK, device="meta")

    @pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
    def test_no_cuda_device(self, source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("TRITON_INTERPRET")
        with pytest.raises(
            UnsupportedKernelError, match="on cuda:0: torch sees no CUDA device: check the driver"
        ):
            launch.prepare(source, "add", SIGNATURE, BLOCK, device="cuda")

    def test_triton_that_is_missing_or_old(self, source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
        def answer(problem: str) -> None:
            monkeypatch.setattr(backend, "triton_problem", lambda: problem)
            triton_api.triton.cache_clear()

        answer(
            "triton 3.1.0 is older than 3.6, the oldest that the kernels are made for: pip install -U triton"
        )
        with pytest.raises(TritonError, match=r"triton 3\.1\.0 is older than 3\.6.*pip install -U"):
            triton_api.triton()
        monkeypatch.undo()
        triton_api.triton.cache_clear()

    def test_a_home_that_can_not_be_written(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("TRITON_HOME", str(tmp_path / "file"))
        monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
        with pytest.warns(
            UserWarning, match="Triton's binaries are not kept: .*/file/.triton/cache: Not a directory"
        ):
            triton_api.find_a_cache()
        assert Path(os.environ["TRITON_CACHE_DIR"]).is_dir()
        triton_api.find_a_cache()
        monkeypatch.delenv("TRITON_CACHE_DIR")

    def test_the_variable_set_too_late(self) -> None:
        """Triton was imported without it, and would call functions that can't be interpreted."""
        program = (
            "import os, torch, triton.language\n"
            "os.environ['TRITON_INTERPRET'] = '1'\n"
            "from kernel_helpers import *\n"
            "from morphc.kernels import codegen, launch\n"
            "with blueprint(TEMPLATE) as spec:\n"
            "    source = codegen.render('blueprint:own', spec, more=1)\n"
            "launch.prepare(source, 'add', SIGNATURE, {'BLOCK': 64}, device='cpu')\n"
        )
        env = {"PYTHONPATH": str(__file__.rpartition("/")[0]), "PATH": ""}
        done = subprocess.run(
            [sys.executable, "-c", program], env=env, capture_output=True, text=True, check=False
        )
        assert "TRITON_INTERPRET changed after triton was imported" in done.stderr.splitlines()[-1]


class Recorder:
    """Stands for a C launcher."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __call__(self, *args: Any) -> None:
        self.calls.append(args)


def compiled(run: Any, kind: str = "cuda") -> Any:
    """Stands for a CompiledKernel that is loaded."""
    target = SimpleNamespace(backend=kind, arch=90)
    return SimpleNamespace(
        run=run, function=77, packed_metadata=(4, 1, 0), metadata=SimpleNamespace(target=target, shared=0)
    )


class FakeLauncher(SimpleNamespace):
    launch_cooperative_grid = False
    launch_pdl = True
    global_scratch_size = 0
    profile_scratch_size = 0

    def __call__(self, *args: Any) -> None:
        self.python(*args)


@pytest.fixture
def on_stream_5(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 5 + index, raising=False)


def launcher_of(kernel: Any, function: Any = None, version: str = "3.6.0") -> Any:
    found = pytest.MonkeyPatch()
    found.setattr(triton_api.triton(), "__version__", version)
    try:
        return triton_api.launcher(kernel, lambda: function, SIGNATURE, BLOCK, {"num_warps": 4}, 0)
    finally:
        found.undo()


@pytest.mark.usefixtures("on_stream_5")
class TestCallShapes:
    """What Triton's launchers are given, against their sources: `triton/backends/nvidia/driver.py`."""

    def test_one_extension_per_signature(self) -> None:
        run = FakeLauncher(launch=Recorder())
        launcher_of(compiled(run))((2, 3, 4), 1000, 10, 0.5)
        # gridX .. Z, stream, function, cooperative, pdl, two scratch buffers, metadata, launch metadata, two hooks
        assert run.launch.calls == [
            (2, 3, 4, 5, 77, False, True, None, None, (4, 1, 0), None, None, None, 1000, 10, 0.5)
        ]

    @pytest.mark.parametrize("version", ["3.7.0", "3.8.0", "3.9.1"])
    def test_one_function_for_all_signatures(self, version: str) -> None:
        run = FakeLauncher(launch=Recorder(), arg_annotations=["kinds"], kernel_signature=b"types")
        launcher_of(compiled(run), version=version)((2, 3, 4), 1000, 10, 0.5)
        # gridX .. Z, stream, function, cooperative, pdl, metadata, launch metadata, two hooks, two scratch buffers,
        # annotations, signature, arguments
        assert run.launch.calls == [
            (
                2,
                3,
                4,
                5,
                77,
                False,
                True,
                (4, 1, 0),
                None,
                None,
                None,
                None,
                None,
                ["kinds"],
                b"types",
                (1000, 10, 0.5),
            )
        ]

    @pytest.mark.parametrize("what", ["scratch", "hip", "gsan"])
    def test_what_only_the_python_launcher_does_is_left_to_it(self, what: str) -> None:
        run = FakeLauncher(launch=Recorder(), python=Recorder(), gsan_enabled=what == "gsan")
        if what == "scratch":
            run.global_scratch_size = 128
        launcher_of(compiled(run, "hip" if what == "hip" else "cuda"))((2, 3, 4), 1000, 10, 0.5)
        assert run.python.calls == [(2, 3, 4, 5, 77, (4, 1, 0), None, None, None, 1000, 10, 0.5)]
        assert not run.launch.calls

    @pytest.mark.parametrize(("version", "attributes"), [("3.10.0", {"launch": Recorder()}), ("3.6.0", {})])
    def test_an_unknown_launcher_goes_through_the_public_call(
        self, version: str, attributes: dict[str, Any]
    ) -> None:
        triton_api._warn_unknown.cache_clear()
        calls: list[Any] = []

        class Function:
            def __getitem__(self, grid: tuple[int, ...]) -> Any:
                return lambda *args, **options: calls.append((grid, args, options))

        with pytest.warns(UserWarning, match=r"goes through kernel\[grid\]"):
            start = launcher_of(compiled(FakeLauncher(**attributes)), Function(), version)
        x = torch.zeros(1)
        start((2, 3, 4), x, 10, 0.5)
        start((2, 3, 4), 1024, 10, 0.5)
        assert calls[0] == ((2, 3, 4), (x, 10, 0.5), {"BLOCK": 64, "num_warps": 4})
        pointer = calls[1][1][0]
        assert (pointer.data_ptr(), pointer.dtype) == (1024, "fp32")


class TestKernelsThatDoNotLoad:
    """A kernel is loaded when it is prepared; what goes wrong there says what to do."""

    def failing(self, error: Exception) -> Any:
        class Kernel:
            @property
            def run(self) -> Any:
                raise error

        return Kernel()

    def test_too_much_shared_memory_names_the_limit(self) -> None:
        from triton.runtime.errors import OutOfResources

        kernel = self.failing(OutOfResources(300000, 232448, "shared memory"))
        with pytest.raises(ResourceError, match="needs 300000 B of shared memory; this device has 232448 B"):
            launcher_of(kernel)

    def test_a_driver_that_is_too_old(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 12020, raising=False)
        kernel = self.failing(RuntimeError("Triton Error [CUDA]: device kernel image is invalid"))
        with pytest.raises(
            TritonError, match=r"driver \(made for CUDA 12\.2 at most\).*image is invalid; update the"
        ):
            launcher_of(kernel)

    def test_no_c_compiler(self) -> None:
        kernel = self.failing(
            RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")
        )
        with pytest.raises(TritonError, match=r"builds its launcher with a C compiler.*CC environment"):
            launcher_of(kernel)
