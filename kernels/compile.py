"""Compiling kernels for any target, without a GPU, in processes of their own.

Worker processes, because Triton decides once in a process whether it interprets or compiles, because some tiles
keep ptxas busy for minutes and are given up on, and because LLVM ends the process on some errors.
"""

from __future__ import annotations

import atexit
import base64
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from morphc.errors import KernelError, ResourceError, TritonError, UnsupportedKernelError
from morphc.kernels import backend, binaries, codegen, triton_api
from morphc.kernels.cache import counters, store
from morphc.kernels.codegen import Source

TIME_LIMIT = 120.0
"""Seconds that one kernel may take to compile."""

START_LIMIT = 120.0

SHARED_LIMITS = {
    "cuda:80": 166912,
    "cuda:86": 101376,
    "cuda:87": 166912,
    "cuda:89": 101376,
    "cuda:90": 232448,
    "cuda:100": 232448,
    "cuda:103": 232448,
    "cuda:110": 232448,
    "cuda:120": 101376,
    "cuda:121": 101376,
    "hip:gfx90a": 65536,
    "hip:gfx942": 65536,
    "hip:gfx950": 163840,
}
"""Shared memory (LDS) that one program can have, in bytes: CUDA C++ Programming Guide, table of technical
specifications per compute capability; AMD CDNA instruction set guides."""


@dataclass(frozen=True, slots=True)
class Resources:
    """What one compiled kernel takes. registers, spills (32-bit values): per thread; shared, size: bytes.

    digest: equal for equal code that starts alike. seconds: of a processor, that it took to compile. overlaid: a
    product that can read what isn't its own, see `compile_worker.overlaid`. exchanged: masks can let through what
    isn't their own, see `compile_worker.exchanged`.
    """

    registers: int
    spills: int
    shared: int
    size: int
    target: str = ""
    digest: str = ""
    seconds: float = 0.0
    overlaid: str = ""
    exchanged: bool = False

    @property
    def excess(self) -> bool:
        """Whether it needs more shared memory than the target has."""
        return self.shared > SHARED_LIMITS.get(self.target, self.shared)

    @property
    def problem(self) -> str:
        """Why nobody wants to run it, or an empty string."""
        if self.excess:
            limit = SHARED_LIMITS[self.target]
            return f"needs {self.shared} B of shared memory, {self.target} has {limit} B"
        if self.overlaid:
            return f"a product of {self.overlaid}, which Triton makes read memory that isn't its own"
        if self.exchanged:
            return "masks that this version of Triton makes let through what isn't their own"
        return f"spills {self.spills} values a thread" if self.spills else ""


@dataclass(frozen=True, slots=True)
class Failure:
    """A kernel that didn't compile. reason: `time`, `crash` or `error`. place: ` (template:line)`, if known."""

    reason: str
    message: str
    place: str = ""

    @property
    def problem(self) -> str:
        """The message's last line, which says it, and the template's line."""
        return f"{self.message.strip().splitlines()[-1]}{self.place}"


@dataclass(frozen=True, slots=True)
class Job:
    """One kernel to compile. The fields are those of `launch.prepare`; options: num_warps, num_stages, maxnreg, pdl."""

    source: Source
    function: str
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    aligned: Sequence[str] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    target: str = "cuda:90"

    @property
    def identity(self) -> tuple[str, ...]:
        """Equal for jobs that compile to the same."""
        told = (
            self.function,
            self.signature,
            self.constants,
            self.options,
            sorted(self.aligned),
            self.target,
        )
        return self.source.key, *map(str, told)


def cross_compile(
    source: Source,
    function: str,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    options: Mapping[str, Any] | None = None,
    target: str = "cuda:90",
    *,
    aligned: Sequence[str] = (),
    time_limit: float = TIME_LIMIT,
) -> Resources:
    """Compile one kernel for `target` (`cuda:80`, `cuda:90`, `cuda:100`, `hip:gfx942`).

    options: num_warps, num_stages, maxnreg, pdl. Spills are told in the result. Raises ResourceError where it needs
    more shared memory than the target has, and KernelError where it doesn't compile.
    """
    job = Job(source, function, signature, constants, aligned, options or {}, target)
    (found,) = compile_all([job], processes=1, time_limit=time_limit)
    if isinstance(found, Failure):
        raise KernelError(f"{source.name} can't be compiled for {target}{found.place}: {found.message}")
    if found.excess:
        raise ResourceError(f"{source.name} {found.problem}; use smaller tiles or fewer stages")
    return found


def compile_all(
    jobs: Sequence[Job],
    *,
    processes: int | None = None,
    time_limit: float = TIME_LIMIT,
    keep: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> list[Resources | Failure]:
    """Compile many kernels in parallel; results in the order of `jobs`.

    keep: those that the cache has are not compiled, and the others are put there. progress(done, total) is called
    after each, in the calling thread. Ctrl-C ends the workers and is raised.
    """
    if problem := backend.triton_problem():
        raise TritonError(problem)
    triton_api.find_a_cache()
    for job in jobs:
        _check_target(job.target)
    forms = [wanted(job) for job in jobs] if keep else []
    # Asked for before any is there: each of this call's own would be nearer to the next than what was kept before.
    reasons = [form.why() if form.find() is None else () for form in forms]
    if not jobs:
        return []
    count = min(processes or len(os.sched_getaffinity(0)), len(jobs))
    done: dict[Future[dict[str, Any]], int] = {}
    executor = ThreadPoolExecutor(count, thread_name_prefix="morphc-compile")
    stopped = threading.Event()
    try:
        for at, job in enumerate(jobs):
            run = partial(_run, job, keep, time_limit, stopped)
            done[executor.submit(_kept, forms[at], reasons[at], run) if keep else executor.submit(run)] = at
        pending: set[Future[dict[str, Any]]] = set(done)
        while pending:
            finished, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
            if progress is not None:
                for left in range(len(finished) - 1, -1, -1):
                    progress(len(jobs) - len(pending) - left, len(jobs))
    except BaseException:
        stopped.set()
        executor.shutdown(wait=False, cancel_futures=True)
        _POOL.close()
        raise
    finally:
        executor.shutdown(wait=True)
    answers = {at: future.result() for future, at in done.items()}
    return [_result(answers[at], job) for at, job in enumerate(jobs)]


def triton_options(options: Mapping[str, Any], target: str) -> dict[str, Any]:
    """`options` of a Job in Triton's words, as far as the target has them. Raises KernelError for others."""
    unknown = sorted(set(options) - {"num_warps", "num_stages", "maxnreg", "pdl"})
    if unknown:
        # Triton would take no notice of it.
        raise KernelError(
            f"no compile option {unknown[0]!r}; there are num_warps, num_stages, maxnreg and pdl"
        )
    kind, _, arch = target.partition(":")
    # Said, because what Triton takes otherwise changes after 3.9.
    found: dict[str, Any] = {"enable_fp_fusion": True}
    found |= {name: options[name] for name in ("num_warps", "num_stages") if name in options}
    if kind == "cuda" and options.get("maxnreg") is not None:
        found["maxnreg"] = options["maxnreg"]
    if kind == "cuda" and options.get("pdl") and int(arch) >= 90:
        found["launch_pdl"] = True
    return found


def _check_target(target: str) -> None:
    kind, _, arch = target.partition(":")
    if kind not in ("cuda", "hip") or not arch or (kind == "cuda" and not arch.isdigit()):
        raise UnsupportedKernelError(
            f"no target {target!r}: use e.g. {', '.join(list(SHARED_LIMITS)[:5])}, hip:gfx942"
        )


def wanted(job: Job) -> binaries.Wanted:
    """The compiled form of a job, and where the cache has it or would have."""
    options = triton_options(job.options, job.target)
    return binaries.wanted(
        job.source, job.function, job.signature, job.constants, job.aligned, options, job.target
    )


def _kept(want: binaries.Wanted, reasons: Sequence[str], run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The answer of a worker, or what was kept of one."""
    if (found := want.find()) is None:
        with store.alone(want.root, want.key) as keeping:
            # Whoever held the lock before may have put it there.
            if (found := want.find()) is None:
                want.refuse_to_compile()
                answer = run()
                kept = answer.pop("kept", None)
                binaries.count_miss(want, reasons, answer.get("seconds", 0.0))
                if kept is not None and keeping:
                    files = {name: base64.b64decode(data) for name, data in kept["files"].items()}
                    want.keep(files, answer | {"arguments": kept["arguments"]})
                return answer
    binaries.count_hit(found)
    told = ("registers", "spills", "shared", "size", "digest", "seconds", "overlaid", "exchanged")
    # What an older version kept lacks what is looked at since.
    return {name: found.manifest.details[name] for name in told if name in found.manifest.details}


def _run(job: Job, keep: bool, time_limit: float, stopped: threading.Event) -> dict[str, Any]:
    return _POOL.run(_message(job, keep), time_limit, stopped)


def _message(job: Job, keep: bool) -> str:
    told = {
        "path": str(codegen.publish(job.source)),
        "module": codegen.module_name(job.source),
        "sha256": job.source.digest,
        "function": job.function,
        "signature": dict(job.signature),
        "constants": dict(job.constants),
        "aligned": list(job.aligned),
        "options": triton_options(job.options, job.target),
        "target": job.target,
        "keep": keep,
    }
    return json.dumps(told)


def _result(answer: dict[str, Any], job: Job) -> Resources | Failure:
    if "error" in answer:
        place = codegen.places(job.source, [(text, line) for text, line in answer.get("places", ())])
        return Failure(answer.get("reason", "error"), answer["error"], place)
    return Resources(target=job.target, **answer)


class _Worker:
    """One process and its pipes."""

    def __init__(self) -> None:
        env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        # Its own temporary folder, so that a ptxas that was killed leaves nothing behind.
        self.folder = tempfile.mkdtemp(prefix="morphc-compile-")
        env["TMPDIR"] = self.folder
        if not sys.executable:
            raise KernelError(
                "this Python doesn't know its own executable (sys.executable), so it can't start workers"
            )
        self.process = subprocess.Popen(
            # -P: the folder of the script holds modules with everyday names.
            [sys.executable, "-P", str(Path(__file__).with_name("compile_worker.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=env,
            # A group of its own: Ctrl-C is ours to handle, and ptxas dies with its worker.
            start_new_session=True,
        )
        self.buffer = b""
        ready = self.read(START_LIMIT)
        if "ready" not in ready:
            self.close()
            raise TritonError(f"a compile worker didn't start: {ready.get('error', ready)}")

    def run(self, message: str, limit: float) -> dict[str, Any]:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(message.encode() + b"\n")
            self.process.stdin.flush()
        except OSError:
            return {"error": "the compiler's process was gone", "reason": "crash"}
        return self.read(limit)

    def read(self, limit: float) -> dict[str, Any]:
        """One answer, or an error with the reason `time` or `crash`."""
        assert self.process.stdout is not None
        handle = self.process.stdout.fileno()
        end = time.monotonic() + limit
        while b"\n" not in self.buffer:
            left = end - time.monotonic()
            if left <= 0:
                return {"error": f"took more than {limit:.0f} s to compile", "reason": "time"}
            if select.select([handle], [], [], left)[0]:
                data = os.read(handle, 1 << 16)
                if not data:
                    code = self.process.wait()
                    return {"error": f"the compiler ended its process (status {code})", "reason": "crash"}
                self.buffer += data
        line, _, self.buffer = self.buffer.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def kill(self) -> None:
        """End the process and its ptxas, from any thread; whoever reads from it gets an end of file."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def close(self) -> None:
        self.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with suppress(OSError):
                if pipe is not None:
                    pipe.close()
        shutil.rmtree(self.folder, ignore_errors=True)


class _Pool:
    """Workers that wait for the next call: each took a second to start."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget all workers, as a forked child must: they are the parent's."""
        self._lock = threading.Lock()
        self._idle: list[_Worker] = []
        self._busy: set[_Worker] = set()

    def run(self, message: str, limit: float, stopped: threading.Event) -> dict[str, Any]:
        """A worker's answer. stopped: set before `close` by the one who no longer waits for it."""
        with self._lock:
            worker = self._idle.pop() if self._idle else None
        if worker is None:
            worker = _Worker()
        with self._lock:
            self._busy.add(worker)
            if stopped.is_set():  # while no worker was busy with it, so `close` saw none
                worker.kill()
        counters.compiling()
        answer = worker.run(message, limit)
        with self._lock:
            self._busy.discard(worker)
            kept = "reason" not in answer
            if kept:
                self._idle.append(worker)
        if not kept:
            worker.close()
        return answer

    def close(self) -> None:
        """End every worker. A busy one is killed here, and cleared away by the thread that waits for it."""
        with self._lock:
            idle, self._idle = self._idle, []
            for worker in self._busy:
                worker.kill()
        for worker in idle:
            worker.close()


_POOL = _Pool()
atexit.register(_POOL.close)
os.register_at_fork(after_in_child=_POOL.reset)
