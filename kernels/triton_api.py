"""Everything that depends on the version of Triton, in one place (3.6 to 3.9).

`launcher` gives the cheapest way to start a compiled kernel. Triton's own `kernel[grid](...)` binds and inspects
every argument at each call, 25 us of host time and more; its C launcher takes a few, and is the same function
underneath. How that one is called changed between 3.6 and 3.7. A Triton that calls it in yet another way still
runs, through `kernel[grid]`, and says so once.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from morphc.errors import KernelError, ResourceError, TritonError
from morphc.kernels import backend

NEWEST = (3, 9)
"""Newest Triton whose launcher is known."""

Launch = Callable[..., None]
"""`launch((x, y, z), *arguments)`: in the signature's order, pointers as tensors or as ints."""


@lru_cache(maxsize=1)
def triton() -> Any:
    """The module, imported on first use. Raises TritonError where it is missing or too old."""
    if problem := backend.triton_problem():
        raise TritonError(problem)
    find_a_cache()
    import triton as module

    return module


@lru_cache(maxsize=1)
def _temporary() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="morphc-triton-")


def find_a_cache() -> None:
    """Triton keeps its binaries in the user's home and fails where it can't; a temporary folder does too."""
    if os.environ.get("TRITON_CACHE_DIR"):
        return
    folder = Path(os.environ.get("TRITON_HOME") or os.path.expanduser("~"), ".triton", "cache")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return
        reason = "no permission to write"
    except OSError as error:
        reason = error.strerror or "no such folder"
    os.environ["TRITON_CACHE_DIR"] = _temporary().name
    warnings.warn(
        f"Triton's binaries are not kept: {folder}: {reason}; name another folder in TRITON_CACHE_DIR",
        stacklevel=3,
    )


@lru_cache(maxsize=1)
def interprets() -> bool:
    """Whether this process interprets kernels: Triton decides that for its own functions when it is imported."""
    return type(triton().language.sum).__name__ == "InterpretedFunction"


@lru_cache(maxsize=1)
def mend_interpreter() -> None:
    """Keep masks boolean: 3.9 makes an int32 block of a scalar comparison, which it then refuses as a mask."""
    import numpy

    triton()
    from triton.runtime import interpreter

    builder, handle, one_bit = (
        interpreter.interpreter_builder,
        interpreter.TensorHandle,
        triton().language.int1,
    )
    given = builder.create_splat

    def splat(kind: Any, value: Any) -> Any:
        if value.data.dtype != numpy.bool_:
            return given(kind, value)
        return handle(numpy.full(kind.shape, value.data), one_bit)

    builder.create_splat = splat


def assemble(
    folder: Path,
    files: Iterable[str],
    function: str,
    arguments: Sequence[str],
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
) -> Any:
    """A CompiledKernel of files that are whole, without compiling: the constructor that Triton's own cache ends in.

    It is given the source only to be asked for the arguments' names and types, so the generated file is not run.
    """
    compiler = triton().compiler
    named = SimpleNamespace(__name__=function, arg_names=list(arguments), launch_metadata=None)
    source = compiler.ASTSource(fn=named, signature=dict(signature), constexprs=dict(constants))
    return compiler.CompiledKernel(source, {name: str(folder / name) for name in files}, folder.name)


def launcher(
    kernel: Any,
    function: Callable[[], Any],
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    options: Mapping[str, Any],
    index: int,
) -> Launch:
    """The cheapest way to start `kernel` (a CompiledKernel) on the current stream of CUDA device `index`.

    function: gives the generated function, which only a Triton that is not known here needs.
    The kernel is loaded by this, on the current device, which is to be that one. Raises ResourceError and
    TritonError where that fails.
    """
    try:
        run = kernel.run
    except Exception as error:
        raise _load_error(error) from error
    start = getattr(run, "launch", None)
    version = tuple(int(part) for part in triton().__version__.split(".")[:2])
    if version > NEWEST or not callable(start):
        return _through_jit(function, signature, constants, options)
    # `torch.cuda.current_stream()` makes a Stream object, 1 us and more; this is what it asks underneath.
    stream = torch._C._cuda_getCurrentRawStream
    # Scratch memory is allocated per launch, which Triton's own Python launcher does; no kernel of ours asks for it.
    scratch = [getattr(run, f"{name}_scratch_size", 0) for name in ("global", "profile")]
    cuda = kernel.metadata.target.backend == "cuda"
    if not cuda or any(scratch) or getattr(run, "gsan_enabled", False):
        return _through_python(run, kernel, stream, index)
    if hasattr(run, "arg_annotations"):
        return _through_shared_c(run, kernel, stream, index)
    return _through_own_c(run, kernel, stream, index)


def _through_own_c(run: Any, kernel: Any, stream: Callable[[int], int], index: int) -> Launch:
    """3.6: one C extension per signature."""
    start, handle, packed = run.launch, kernel.function, kernel.packed_metadata
    together, early = run.launch_cooperative_grid, run.launch_pdl

    def launch(grid: tuple[int, int, int], *args: Any) -> None:
        start(*grid, stream(index), handle, together, early, None, None, packed, None, None, None, *args)

    return launch


def _through_shared_c(run: Any, kernel: Any, stream: Callable[[int], int], index: int) -> Launch:
    """3.7 to 3.9: one C function for all signatures, which is told the types."""
    start, handle, packed = run.launch, kernel.function, kernel.packed_metadata
    together, early = run.launch_cooperative_grid, run.launch_pdl
    kinds, types = run.arg_annotations, run.kernel_signature

    def launch(grid: tuple[int, int, int], *args: Any) -> None:
        s = stream(index)
        start(*grid, s, handle, together, early, packed, None, None, None, None, None, kinds, types, args)

    return launch


def _through_python(run: Any, kernel: Any, stream: Callable[[int], int], index: int) -> Launch:
    """Triton's launcher object, whose call is the same from 3.6 to 3.9 and on every backend."""
    handle, packed = kernel.function, kernel.packed_metadata

    def launch(grid: tuple[int, int, int], *args: Any) -> None:
        run(*grid, stream(index), handle, packed, None, None, None, *args)

    return launch


@lru_cache(maxsize=1)
def _warn_unknown() -> None:
    warnings.warn(
        f"triton {triton().__version__} starts kernels in a way that is not known here (those of 3.6 to "
        f"{NEWEST[0]}.{NEWEST[1]} are): each launch goes through kernel[grid] and costs some 25 us more",
        stacklevel=5,
    )


class _Pointer:
    """An address that `kernel[grid]` takes for a tensor."""

    __slots__ = ("address", "dtype")

    def __init__(self, address: int, dtype: str) -> None:
        self.address = address
        self.dtype = dtype

    def data_ptr(self) -> int:
        return self.address


def _through_jit(
    given: Callable[[], Any],
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    options: Mapping[str, Any],
) -> Launch:
    """Triton's public way, which reads the current stream itself."""
    _warn_unknown()
    types = list(signature.values())
    function = given()

    def launch(grid: tuple[int, int, int], *args: Any) -> None:
        passed = [
            _Pointer(arg, kind[1:]) if kind[0] == "*" and isinstance(arg, int) else arg
            for arg, kind in zip(args, types, strict=True)
        ]
        function[grid](*passed, **constants, **options)

    return launch


def _load_error(error: Exception) -> KernelError:
    from triton.runtime.errors import OutOfResources

    if isinstance(error, OutOfResources):
        unit = " B" if "memory" in error.name else ""
        return ResourceError(
            f"needs {error.required}{unit} of {error.name}; this device has {error.limit}{unit}"
        )
    told = " ".join(str(error).split())
    if "C compiler" in told or "Python.h" in told:
        return TritonError(f"Triton builds its launcher with a C compiler and Python's headers: {told}")
    # Missing in a torch that was built without CUDA.
    ask = getattr(torch._C, "_cuda_getDriverVersion", None)
    driver = ask() if ask is not None else 0
    newest = f" (made for CUDA {driver // 1000}.{driver % 1000 // 10} at most)" if driver else ""
    return TritonError(
        f"the driver{newest} doesn't load what triton {triton().__version__} built: {told}; update the driver, or "
        "install a Triton that is made for it"
    )
