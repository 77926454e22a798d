"""Prepared launches: everything that can be decided before a call is, so that a call costs a few microseconds.

    add = prepare(source, "add", {"x_ptr": "*fp32", "n": "i32"}, {"BLOCK": 1024}, aligned=("x_ptr",), device=x.device)
    add((cdiv(n, 1024), 1, 1), x, n)

Issuing one costs the host 3 to 6 us on CUDA (`kernel[grid]`: 25 and more), less when pointers are handed over as
ints (`tensor.data_ptr()`), which also saves the driver's look-up of each.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from morphc.errors import KernelError, ResourceError, UnsupportedKernelError
from morphc.kernels import backend, binaries, codegen, triton_api, tuning
from morphc.kernels.cache import counters, store
from morphc.kernels.codegen import Source
from morphc.kernels.compile import Job, triton_options
from morphc.kernels.compile_worker import build, explain, files_of, measure

Grid = tuple[int, int, int]

TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "i1",
}
INTERPRETED_PROCESSORS = 4


def triton_type(dtype: torch.dtype) -> str:
    """`bf16` for torch.bfloat16. Raises UnsupportedKernelError for what no kernel reads."""
    if dtype not in TYPES:
        raise UnsupportedKernelError(
            f'no kernel reads {dtype}: use float32, bfloat16 or float16, or backend="torch"'
        )
    return TYPES[dtype]


def pointer(tensor: torch.Tensor) -> str:
    """`*bf16`: the signature's word for `tensor`."""
    return f"*{triton_type(tensor.dtype)}"


def collected_target(device: torch.device) -> str:
    """The target that jobs are collected for, where `device` is `meta`, which then stands for it; else empty."""
    collected = _collected.get()
    return collected[1] if collected is not None and device.type == "meta" else ""


def multiprocessors(device: torch.device) -> int:
    """How many programs of a persistent grid run at once; a handful in the interpreter."""
    if target := collected_target(device):
        return tuning.processors_of(target)
    if device.type != "cuda":
        return INTERPRETED_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


class Prepared:
    """A kernel that is ready to start on one device; made by `prepare`.

    registers, spills (32-bit values a thread), shared (bytes): what it uses; zeros in the interpreter.
    """

    __slots__ = ("device", "kernel", "launch", "name", "registers", "shared", "spills")

    def __init__(
        self, name: str, device: torch.device, launch: triton_api.Launch, kernel: Any = None, spills: int = 0
    ) -> None:
        self.name = name
        self.device = device
        self.launch = launch
        # Held on to: newer Tritons unload a binary when its kernel object goes.
        self.kernel = kernel
        self.registers: int = getattr(kernel, "n_regs", 0)
        self.spills = spills
        self.shared: int = kernel.metadata.shared if kernel is not None else 0

    def __call__(self, grid: Grid, *args: Any) -> None:
        """Start it on the current stream. Arguments: tensors, ints and floats, in the signature's order; on CUDA
        a pointer may be an int. `launch` is the same without this method's own fraction of a microsecond."""
        self.launch(grid, *args)

    def __repr__(self) -> str:
        return f"Prepared({self.name}, {self.device})"


_prepared: dict[tuple[object, ...], Prepared] = {}
_lock = threading.RLock()


def prepare(
    source: Source,
    function: str,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    *,
    aligned: Sequence[str] = (),
    num_warps: int = 4,
    num_stages: int = 3,
    maxnreg: int | None = None,
    pdl: bool = False,
    device: torch.device | str,
) -> Prepared:
    """Compile `function` of `source` for `device`, once, and load it there.

    signature: argument -> Triton type (`*bf16`, `i32`, `fp32`), in the function's order, without the constexprs;
    constants: the constexprs. aligned: pointers and ints that are divisible by 16 at every call (the caller
    checks). pdl: start while the kernel before still runs (capability 9 on; the kernel must wait by itself).

    Raises UnsupportedKernelError (device), TritonError (missing, too old, at odds with the driver), KernelError
    (doesn't compile), ResourceError (more shared memory than the device has).
    """
    device = _indexed(torch.device(device))
    collected = _collected.get()
    if collected is not None:
        options = {"num_warps": num_warps, "num_stages": num_stages, "maxnreg": maxnreg, "pdl": pdl}
        jobs, target, unfit = collected
        job = Job(source, function, dict(signature), dict(constants), tuple(aligned), options, target)
        jobs.append(job)
        made = Prepared(source.name, device, _nothing)
        made.spills = int(job.identity in unfit)
        return made
    key = (
        source.key, function, tuple(signature.items()), tuple(sorted(constants.items())), tuple(aligned),
        num_warps, num_stages, maxnreg, pdl, device,
    )  # fmt: skip
    with _lock:
        found = _prepared.get(key)
        if found is None:
            if reason := backend.unavailable(device):
                raise UnsupportedKernelError(f"{source.name} on {device}: {reason}")
            if triton_api.interprets() != (device.type == "cpu"):
                raise UnsupportedKernelError(
                    f"{source.name} on {device}: TRITON_INTERPRET changed after triton was imported, which reads it "
                    "once; set it before Python starts"
                )
            options = {"num_warps": num_warps, "num_stages": num_stages, "maxnreg": maxnreg, "pdl": pdl}
            job = Job(source, function, signature, constants, tuple(aligned), options)
            if device.type == "cpu":
                found = Prepared(source.name, device, _interpreted(_load(job), dict(constants)))
            else:
                found = _on_gpu(job, device)
            _prepared[key] = found
    return found


_Collected = tuple[list[Job], str, Collection[tuple[str, ...]]]
_collected: ContextVar[_Collected | None] = ContextVar("jobs that are collected", default=None)


def _nothing(grid: Grid, *args: Any) -> None:
    """A launch that was only collected."""


@contextmanager
def collecting(target: str, unfit: Collection[tuple[str, ...]] = ()) -> Iterator[list[Job]]:
    """What is prepared in here is neither compiled nor run: it ends in a list of jobs for `target`.

    On the device `meta`, kernels are prepared as they would be on a device of that target. So whoever prepares what
    its arguments ask for can be asked what that is, by calling it. It may keep what it got, which does nothing: it is
    to be thrown away. unfit: `identity` of jobs that are known to spill there; whoever prepares one is told so.
    """
    jobs: list[Job] = []
    token = _collected.set((jobs, target, unfit))
    try:
        yield jobs
    finally:
        _collected.reset(token)


def prepare_job(job: Job, device: torch.device | str, *, aligned: bool = True, pdl: bool = False) -> Prepared:
    """`prepare` for a Job; without `aligned` for arguments that are not what the job promises."""
    return prepare(
        job.source,
        job.function,
        job.signature,
        job.constants,
        aligned=job.aligned if aligned else (),
        pdl=pdl,
        device=device,
        **job.options,
    )


class Resident(tuple[Tensor, ...]):
    """Tensors that stay where they are: their addresses are looked up once."""

    pointers: list[int]

    def __new__(cls, tensors: Iterable[Tensor]) -> Resident:
        made = super().__new__(cls, tensors)
        made.pointers = [tensor.data_ptr() for tensor in made]
        return made


def pointers_of(tensors: Sequence[Tensor]) -> list[int]:
    """Their addresses."""
    if type(tensors) is Resident:
        return tensors.pointers
    return [tensor.data_ptr() for tensor in tensors]


def aligned(tensors: Iterable[Tensor], *numbers: int) -> bool:
    """Whether all addresses and numbers are divisible by 16."""
    together = 0
    for tensor in tensors:
        together |= tensor.data_ptr()
    for number in numbers:
        together |= number
    return together % 16 == 0


def _indexed(device: torch.device) -> torch.device:
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device() if torch.cuda.is_available() else 0)
    return torch.device("cpu") if device.type == "cpu" else device


def _check(
    source: Source,
    function: Any,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    aligned: Sequence[str],
) -> None:
    """The arguments that were named are those of the function; a wrong order would pass wrong pointers."""
    names = list(function.arg_names)
    given = [name for name in names if name in signature]
    if list(signature) != given or set(names) != {*signature, *constants} or set(signature) & set(constants):
        raise KernelError(
            f"{source.name}: {function.__name__}({', '.join(names)}) was prepared with the arguments "
            f"({', '.join(signature)}) and constants ({', '.join(constants)})"
        )
    unknown = [name for name in aligned if name not in signature]
    if unknown:
        raise KernelError(f"{source.name}: {function.__name__} has no argument {unknown[0]!r} to be aligned")


_interpreter = threading.RLock()


def _interpreted(function: Any, constants: dict[str, Any]) -> triton_api.Launch:
    import numpy

    triton_api.mend_interpreter()

    def launch(grid: Grid, *args: Any) -> None:
        # The interpreter keeps its program ids in globals, and numpy warns of every Inf that a kernel is there for.
        with _interpreter, numpy.errstate(all="ignore"):
            function[grid](*args, **constants)

    return launch


def _load(job: Job) -> Any:
    """The generated function, whose arguments are those of the job."""
    loaded = codegen.load(job.source, job.function)
    _check(job.source, loaded, job.signature, job.constants, job.aligned)
    return loaded


def _on_gpu(job: Job, device: torch.device) -> Prepared:
    with torch.cuda.device(device):
        target = triton_api.triton().runtime.driver.active.get_current_target()
        named = f"{target.backend}:{target.arch}"
        options = triton_options(job.options, named)
        want = binaries.wanted(
            job.source, job.function, job.signature, job.constants, job.aligned, options, named
        )
        recalled = _recalled(job, want)
        if recalled is None:
            with store.alone(want.root, want.key) as keeping:
                # Whoever held the lock before may have put it there.
                recalled = _recalled(job, want)
                if recalled is None:
                    kernel, launch, spills = _compiled(job, want, options, target, device, keeping)
        if recalled is not None:
            kernel, spills = recalled
            launch = _launcher(kernel, job, options, device)
    if torch.cuda.device_count() > 1:
        launch = _on_its_device(launch, device.index)
    return Prepared(job.source.name, device, launch, kernel, spills)


def _recalled(job: Job, want: binaries.Wanted) -> tuple[Any, int] | None:
    """The kernel as it was compiled before, and what it spills; None where it wasn't."""
    found = want.find()
    if found is None:
        return None
    told = found.manifest
    try:
        kernel = triton_api.assemble(
            found.folder, told.files, job.function, told.details["arguments"], job.signature, job.constants
        )
    except OSError:
        return None  # pruned a moment ago
    binaries.count_hit(found)
    return kernel, int(told.details["spills"])


def _compiled(
    job: Job,
    want: binaries.Wanted,
    options: dict[str, Any],
    target: Any,
    device: torch.device,
    keeping: bool,
) -> tuple[Any, triton_api.Launch, int]:
    """Compile the kernel, load it, and then put it into the cache: one that isn't loaded is not worth keeping. The last
    is what it spills."""
    want.refuse_to_compile()
    loaded, reasons = _load(job), want.why()
    started = time.perf_counter()
    counters.compiling()
    try:
        kernel = build(loaded, dict(job.signature), dict(job.constants), tuple(job.aligned), options, target)
    except Exception as error:
        said, places = explain(error)
        place = codegen.places(job.source, places)
        raise KernelError(f"{job.source.name} doesn't compile for {device}{place}: {said}") from error
    seconds = time.perf_counter() - started
    binaries.count_miss(want, reasons, seconds)
    launch = _launcher(kernel, job, options, device)
    # What the driver calls spilled is the stack, which calls of functions need as well.
    measured = measure(kernel)
    if keeping:
        told = {**measured, "arguments": list(loaded.arg_names), "seconds": seconds}
        want.keep(files_of(kernel), told)
    return kernel, launch, int(measured["spills"])


def _launcher(kernel: Any, job: Job, options: dict[str, Any], device: torch.device) -> triton_api.Launch:
    try:
        return triton_api.launcher(
            kernel, lambda: _load(job), job.signature, job.constants, options, device.index
        )
    except ResourceError as error:
        raise ResourceError(f"{job.source.name} {error}; use smaller tiles or fewer stages") from error


def _on_its_device(launch: triton_api.Launch, index: int) -> triton_api.Launch:
    """A function handle and a stream belong to one device, which is to be the current one."""
    current = torch._C._cuda_getDevice

    def launch_there(grid: Grid, *args: Any) -> None:
        if current() == index:
            launch(grid, *args)
            return
        with torch.cuda.device(index):
            launch(grid, *args)

    return launch_there
