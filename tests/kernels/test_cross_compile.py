"""Compiling for GPUs that this machine doesn't have."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from kernel_helpers import SIGNATURE, TEMPLATE, blueprint

from morphc.errors import KernelError, ResourceError, TritonError, UnsupportedKernelError
from morphc.kernels import backend, codegen
from morphc.kernels import compile as compiling
from morphc.kernels.codegen import Source
from morphc.kernels.compile import Failure, Job, Resources, compile_all, cross_compile, triton_options

TARGETS = ("cuda:80", "cuda:90", "cuda:100", "hip:gfx942")

# Square dots of BLOCK rows: with 1024 of them ptxas is busy for minutes.
DOTS = """\
@triton.jit
def add(x_ptr, n, scale, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n)
    square = (x[:, None] + tl.zeros([BLOCK, 128], tl.float32)).to(tl.float16)
    x += tl.sum(tl.dot(square, tl.trans(square)), 1)
    tl.store(x_ptr + i, x * scale, mask=i < n)
"""

# Operands of BLOCK x 512, in shared memory both.
WIDE = DOTS.replace(
    "(x[:, None] + tl.zeros([BLOCK, 128], tl.float32))",
    "tl.load(x_ptr + i[:, None] * 512 + tl.arange(0, 512)[None, :])",
)

# BLOCK values wait in registers for the sum of all.
WAITS = """\
@triton.jit
def add(x_ptr, n, scale, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n)
    tl.store(x_ptr + i, x * tl.sum(x) * scale, mask=i < n)
"""


def make(text: str = TEMPLATE) -> Source:
    with blueprint(text) as spec:
        return codegen.render("blueprint:own", spec, more=1)


class TestOneKernel:
    @pytest.mark.parametrize("target", TARGETS)
    def test_its_resources_are_told(self, target: str) -> None:
        found = cross_compile(
            make(), "add", SIGNATURE, {"BLOCK": 512}, {"num_warps": 4}, target, aligned=("x_ptr",)
        )
        assert 0 < found.registers < 64
        assert (found.spills, found.shared, found.problem) == (0, 0, "")
        assert found.size > 1000

    def test_spills_are_told(self) -> None:
        options = {"num_warps": 4, "maxnreg": 32}
        found = cross_compile(make(WAITS), "add", SIGNATURE, {"BLOCK": 8192}, options, "cuda:90")
        assert found.registers <= 32
        assert found.spills > 0
        assert found.problem == f"spills {found.spills} values a thread"

    def test_what_ptxas_refuses_is_told_in_a_line(self) -> None:
        job = Job(make(DOTS), "add", SIGNATURE, {"BLOCK": 128}, options={"num_warps": 4, "maxnreg": 24})
        (found,) = compile_all([job])
        assert isinstance(found, Failure)
        assert found.problem.startswith("ptxas: (C7602) Insufficient registers (24)")

    def test_alignment_makes_wide_loads(self) -> None:
        loose, tight = (
            cross_compile(make(), "add", SIGNATURE, {"BLOCK": 512}, {"num_warps": 4}, aligned=aligned)
            for aligned in ((), ("x_ptr", "n"))
        )
        assert tight.size < loose.size
        assert tight.digest != loose.digest

    def test_an_error_names_the_template_line(self) -> None:
        with blueprint(TEMPLATE.replace("{{ more }}", "{{ more }} + tl.zeros([3], tl.float32)")) as spec:
            source = codegen.render("blueprint:own", spec, more=1)
            with pytest.raises(
                KernelError, match=r"for cuda:90 \(<template of blueprint 'own'>:4\)(.|\n)*power of 2"
            ):
                cross_compile(source, "add", SIGNATURE, {"BLOCK": 64})

    def test_shared_memory_over_the_limit_names_it(self) -> None:
        with pytest.raises(
            ResourceError, match=r"needs 262144 B of shared memory, cuda:90 has 232448 B; use smaller"
        ):
            cross_compile(make(WIDE), "add", SIGNATURE, {"BLOCK": 128}, {"num_warps": 8})

    @pytest.mark.parametrize("target", ["h200", "cuda", "cuda:sm_90", "metal:3"])
    def test_a_target_that_is_none(self, target: str) -> None:
        with pytest.raises(UnsupportedKernelError, match=f"no target '{target}': use e.g. cuda:80"):
            cross_compile(make(), "add", SIGNATURE, {"BLOCK": 64}, target=target)

    def test_options_go_to_the_targets_that_have_them(self) -> None:
        given = {"num_warps": 8, "num_stages": 2, "maxnreg": 64, "pdl": True}
        shared = {"num_warps": 8, "num_stages": 2, "enable_fp_fusion": True}
        assert triton_options(given, "cuda:90") == shared | {"maxnreg": 64, "launch_pdl": True}
        assert triton_options(given, "cuda:80") == shared | {"maxnreg": 64}
        assert triton_options(given, "hip:gfx942") == shared
        with pytest.raises(KernelError, match="no compile option 'warps'; there are num_warps"):
            cross_compile(make(), "add", SIGNATURE, {"BLOCK": 64}, {"warps": 8})

    def test_triton_that_is_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(backend, "triton_problem", lambda: "triton is not installed: pip install triton")
        with pytest.raises(TritonError, match="pip install triton"):
            cross_compile(make(), "add", SIGNATURE, {"BLOCK": 64})


def test_what_a_worker_compiled_is_not_compiled_again(tmp_path: Path) -> None:
    """Tuning compiles in workers, and launches from Triton's own cache."""
    program = (
        "from kernel_helpers import *\n"
        "from test_cross_compile import Job, compile_all, make, triton_options\n"
        "from morphc.kernels import codegen, compile_worker\n"
        "from triton import knobs\n"
        "job = Job(make(), 'add', SIGNATURE, {'BLOCK': 64}, ('x_ptr', 'n'), {'num_warps': 2, 'pdl': True})\n"
        "compile_all([job])\n"
        "knobs.compilation.listener = lambda **told: print('hit', told['cache_hit'])\n"
        "compile_worker.build(\n"
        "    codegen.load(job.source, 'add'), dict(job.signature), dict(job.constants), job.aligned,\n"
        "    triton_options(job.options, job.target), compile_worker.gpu_target(job.target),\n"
        ")\n"
    )
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "TRITON_CACHE_DIR": str(tmp_path)}
    del env["TRITON_INTERPRET"]
    done = subprocess.run(
        [sys.executable, "-c", program], env=env, capture_output=True, text=True, check=False
    )
    assert done.stdout == "hit True\n", done.stderr


class TestManyKernels:
    def test_results_come_in_order_and_progress_is_told(self) -> None:
        sizes = [64, 1024, 128, 512]
        jobs = [Job(make(), "add", SIGNATURE, {"BLOCK": size}) for size in [*sizes, 64]]
        told: list[tuple[int, int]] = []
        found = compile_all(jobs, progress=lambda done, total: told.append((done, total)))
        assert told == [(n, 5) for n in range(1, 6)]
        registers = [one.registers for one in found if isinstance(one, Resources)]
        assert registers == [registers[n] for n in (0, 1, 2, 3, 0)]
        assert max(registers) == registers[1]
        digests = [one.digest for one in found if isinstance(one, Resources)]
        assert digests[0] == digests[4]
        assert len(set(digests)) == 4

    def test_none_are_none(self) -> None:
        assert compile_all([]) == []

    def test_one_that_takes_too_long_is_given_up(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """And its ptxas with it; the others are compiled."""
        jobs = [
            Job(make(DOTS), "add", SIGNATURE, {"BLOCK": 1024}),
            Job(make(), "add", SIGNATURE, {"BLOCK": 64}),
        ]
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        compiling._POOL.close()
        slow, quick = compile_all(jobs, processes=1, time_limit=5.0)
        assert slow == Failure("time", "took more than 5 s to compile")
        assert isinstance(quick, Resources)
        assert len(list(tmp_path.iterdir())) == 1, "of the worker that was started after it"
        assert not list(tmp_path.glob("*/*.ptx"))
        compiling._POOL.close()
        assert not list(tmp_path.iterdir())

    def test_a_compiler_that_ends_its_process_is_one_failure(self) -> None:
        killer = (
            TEMPLATE + "\nimport os, signal\nif __name__ != 'x':\n    os.kill(os.getpid(), signal.SIGKILL)\n"
        )
        died, well = compile_all(
            [
                Job(make(killer), "add", SIGNATURE, {"BLOCK": 64}),
                Job(make(), "add", SIGNATURE, {"BLOCK": 64}),
            ],
            processes=1,
        )
        assert died == Failure("crash", "the compiler ended its process (status -9)")
        assert isinstance(well, Resources)

    def test_workers_end_with_a_parent_that_was_killed(self, tmp_path: Path) -> None:
        program = tmp_path / "program.py"
        program.write_text(
            "from kernel_helpers import *\n"
            "from test_cross_compile import DOTS, make\n"
            "from morphc.kernels import compile as compiling\n"
            "from morphc.kernels.compile import Job, compile_all\n"
            "compile_all([Job(make(), 'add', SIGNATURE, {'BLOCK': 64})])\n"
            "print(compiling._POOL._idle[0].process.pid, flush=True)\n"
            "compile_all([Job(make(DOTS), 'add', SIGNATURE, {'BLOCK': 1024})])\n"
        )
        env = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "TMPDIR": str(tmp_path)}
        with subprocess.Popen(
            [sys.executable, str(program)], env=env, stdout=subprocess.PIPE, text=True
        ) as parent:
            assert parent.stdout is not None
            worker = int(parent.stdout.readline())
            os.kill(worker, 0)
            parent.kill()
        for _ in range(300):
            if (
                not Path(f"/proc/{worker}").exists()
                or "(zombie)" in Path(f"/proc/{worker}/status").read_text()
            ):
                return
            time.sleep(0.1)
        os.kill(worker, signal.SIGKILL)
        pytest.fail("the worker went on")

    def test_an_interrupt_leaves_no_process_behind(self, tmp_path: Path) -> None:
        program = tmp_path / "program.py"
        program.write_text(
            "from kernel_helpers import *\n"
            "from test_cross_compile import DOTS, make\n"
            "from morphc.kernels.compile import Job, compile_all\n"
            "jobs = [Job(make(DOTS), 'add', SIGNATURE, {'BLOCK': 1024}) for _ in range(2)]\n"
            "jobs.append(Job(make(), 'add', SIGNATURE, {'BLOCK': 64}))\n"
            "compile_all(jobs[::-1], processes=2, progress=lambda done, total: print(done, flush=True))\n"
        )
        env = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "TMPDIR": str(tmp_path)}
        process = subprocess.Popen(
            [sys.executable, str(program)], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "1\n"
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=30)
        assert told.strip().endswith("KeyboardInterrupt")
        assert not list(tmp_path.glob("morphc-compile-*"))
