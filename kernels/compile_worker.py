"""A process that compiles kernels: jobs as lines of JSON on stdin, results as lines of JSON on stdout.

Run as a file, not as a module of the package: all it imports is triton (torch would cost every worker seconds and
hundreds of MB), and it isn't started by `multiprocessing`, which would run the user's main script again.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import types
from typing import Any


def build(
    function: Any,
    signature: dict[str, str],
    constants: dict[str, Any],
    aligned: tuple[str, ...],
    options: dict[str, Any],
    target: Any,
) -> Any:
    """A `CompiledKernel`. The signature is without the constexprs: a launcher then doesn't ask for them."""
    import triton

    place = {name: (index,) for index, name in enumerate(function.arg_names)}
    attrs = {place[name]: [["tt.divisibility", 16]] for name in aligned}
    source = triton.compiler.ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attrs)
    return triton.compile(source, target=target, options=options)


def gpu_target(name: str) -> Any:
    """`cuda:90` or `hip:gfx942` as Triton's compiler takes it."""
    from triton.backends.compiler import GPUTarget

    kind, _, arch = name.partition(":")
    return GPUTarget(kind, int(arch) if kind == "cuda" else arch, 32 if kind == "cuda" else 64)


def measure(kernel: Any, log: str = "") -> dict[str, Any]:
    """What a compiled kernel uses: registers and spilled 32-bit values a thread, bytes of shared memory, size.

    log: what ptxas said of it, if it was just run.
    """
    import triton

    cuda = kernel.metadata.target.backend == "cuda"
    registers, spills = _cuda(kernel, log) if cuda else _hip(kernel.asm["amdgcn"])
    return {
        "registers": registers,
        "spills": spills,
        "shared": kernel.metadata.shared,
        "size": len(kernel.kernel),
        "digest": digest_of(kernel),
        "overlaid": overlaid(kernel.asm.get("ttgir", "")),
        "exchanged": exchanged(kernel.asm.get("ptx", ""), triton.__version__),
    }


def overlaid(ttgir: str) -> str:
    """A matrix product that several groups of warps do over the same rows with its left side in registers, as
    `64x16 by 8 warps`; an empty string where there is none.

    Triton lays warps along the rows, 16 each, and begins again where a tile has no more of them. On an H200 some such
    float32 products then read memory that isn't theirs: a forward of 64 rows with 8 warps ends in an illegal access.
    """
    layouts = re.findall(
        r"(#mma\d*) = #ttg\.nvidia_mma<\{versionMajor = 3,.*?warpsPerCTA = \[(\d+), (\d+)\]", ttgir
    )
    warps = {name: (int(down), int(across)) for name, down, across in layouts}
    products = re.findall(r"warp_group_dot .*?: tensor<.*?-> tensor<(\d+)x(\d+)x\w+, (#mma\d*)>", ttgir)
    for rows, columns, name in products:
        down, across = warps.get(name, (1, 1))
        if 16 * down > int(rows):
            return f"{rows}x{columns} by {down * across} warps"
    return ""


def exchanged(ptx: str, version: str) -> bool:
    """Whether bytes, as which masks are moved from layout to layout within a warp, are taken in another order.

    Triton before 3.8 puts them in order before the shuffle, and once more, by the selectors of `prmt`, after it: what a
    mask lets through is then somebody else's. Halves of a register, as which 16-bit numbers move, come out right.
    """
    if tuple(map(int, version.split(".")[:2])) >= (3, 8):
        return False
    by_lane = set(re.findall(r"prmt\.b32 [^;]*, (%r\d+);", ptx))
    chosen = re.findall(r"selp\.b32\s+(%r\d+), (\d+), (\d+), %p\d+;", ptx)
    halves = {0x5410, 0x7632, 0x1054, 0x3276}
    return any(name in by_lane and not halves >= {int(one), int(other)} for name, one, other in chosen)


def digest_of(kernel: Any) -> str:
    """Equal for equal code that starts alike."""
    launched = f"{kernel.metadata.num_warps} {kernel.metadata.shared}\n"
    text = kernel.asm.get("ptx" if kernel.metadata.target.backend == "cuda" else "amdgcn")
    # Triton can be told to keep the binary alone.
    code = kernel.kernel if text is None else _without_places(text).encode()
    return hashlib.sha256(launched.encode() + code).hexdigest()


def _without_places(assembly: str) -> str:
    """The code alone: the source's path and lines are in it too, and another cache folder has other paths."""
    code = re.split(r"^\s*\.section\s+\.debug", assembly, maxsplit=1, flags=re.MULTILINE)[0]
    return re.sub(r"^\s*(\.loc|\.file|//|;).*\n", "", code, flags=re.MULTILINE)


def _cuda(kernel: Any, log: str) -> tuple[int, int]:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.kernel)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(rf"Function {re.escape(kernel.metadata.name)}:\s*REG:(\d+) STACK:(\d+)", told)
    if found is None:
        raise RuntimeError(f"cuobjdump says nothing of {kernel.metadata.name}: {told}")
    # A stack is there for what is spilled, and for calls of functions that aren't inlined; only ptxas tells them apart.
    if not int(found[2]):
        return int(found[1]), 0
    spilled = re.findall(r"(\d+) bytes spill stores", log or _ptxas_log(kernel))
    return int(found[1]), sum(map(int, spilled)) // 4


def _ptxas_log(kernel: Any) -> str:
    """What ptxas says of a kernel that Triton had in its cache, and of the functions that it calls."""
    # Which of its two ptxas Triton takes for an architecture changed with its versions.
    from triton.backends.nvidia.compiler import get_ptxas

    arch = kernel.metadata.target.arch
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.ptx")
        with open(path, "w", encoding="utf-8") as file:
            file.write(kernel.asm["ptx"])
        name = f"sm_{arch}{'a' if arch >= 90 else ''}"
        command = [
            get_ptxas(arch).path,
            "-v",
            f"--gpu-name={name}",
            path,
            "-o",
            os.path.join(folder, "kernel.cubin"),
        ]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def _hip(assembly: str) -> tuple[int, int]:
    def number(key: str) -> int:
        found = re.search(rf"\.{key}:\s*(\d+)", assembly)
        return int(found[1]) if found else 0

    return number("vgpr_count"), number("vgpr_spill_count") + number("sgpr_spill_count")


def explain(error: BaseException) -> tuple[str, list[tuple[str, int]]]:
    """What a compiler's error says with its causes, and the places: (text of a function, line in it), inner last."""
    said: list[str] = []
    places: list[tuple[str, int]] = []
    current: BaseException | None = error
    while current is not None:
        text, line = getattr(current, "src", None), getattr(getattr(current, "node", None), "lineno", 0)
        if isinstance(text, str) and line:
            places.append((text, line))
        told = str(current).rstrip() or repr(current)
        if refused := re.findall(
            r"^ptxas(?:-\w+)? (?:fatal|error)\s*:(?! Ptx assembly aborted)\s*(.*)", told, re.MULTILINE
        ):
            told = f"ptxas: {'; '.join(refused)}"
        if told not in said:
            said.append(told)
        current = current.__cause__
    return "\n".join(said), places


def _load(path: str, name: str, sha256: str) -> Any:
    """The generated file as a module. It is run only if it is the file that was meant."""
    with open(path, "rb") as file:
        text = file.read()
    if hashlib.sha256(text).hexdigest() != sha256:
        raise RuntimeError(f"{path} was changed since it was written")
    module = types.ModuleType(name)
    module.__file__ = path
    sys.modules[name] = module
    try:
        exec(compile(text, path, "exec", dont_inherit=True), vars(module))
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _run(job: dict[str, Any]) -> dict[str, Any]:
    module = sys.modules.get(job["module"]) or _load(job["path"], job["module"], job["sha256"])
    started = _processor_seconds()
    with contextlib.redirect_stdout(io.StringIO()) as log:
        kernel = build(
            getattr(module, job["function"]),
            job["signature"],
            job["constants"],
            tuple(job["aligned"]),
            job["options"],
            gpu_target(job["target"]),
        )
    answer = measure(kernel, log.getvalue()) | {"seconds": _processor_seconds() - started}
    if job.get("keep"):
        files = {name: base64.b64encode(data).decode() for name, data in files_of(kernel).items()}
        answer["kept"] = {"files": files, "arguments": list(getattr(module, job["function"]).arg_names)}
    return answer


def files_of(kernel: Any) -> dict[str, bytes]:
    """What Triton needs to load the kernel again: its own description of it, and the binary."""
    described = next(path for name, path in kernel.metadata_group.items() if name.endswith(".json"))
    with open(described, "rb") as file:
        description = file.read()
    kind = "cubin" if kernel.metadata.target.backend == "cuda" else "hsaco"
    return {"kernel.json": description, f"kernel.{kind}": bytes(kernel.kernel)}


def _processor_seconds() -> float:
    """Of this process and those it waited for, ptxas above all: a busy machine makes them no more."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _end_with(parent: int) -> None:
    """End this process and its ptxas, which may have minutes to go, once nobody is there to read the answer."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os.killpg(0, signal.SIGKILL)


def main() -> None:
    """Answer jobs until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    # Triton prints what ptxas refuses, which would stand between the answers.
    os.dup2(2, 1)
    # It also prints what ptxas says, if asked to; that is where spills are told.
    os.environ["TRITON_DUMP_PTXAS_LOG"] = "1"
    sys.dont_write_bytecode = True
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    import triton

    answers.write(json.dumps({"ready": triton.__version__}) + "\n")
    answers.flush()
    for line in sys.stdin:
        job = json.loads(line)
        try:
            answer = _run(job)
        except Exception as error:
            said, places = explain(error)
            answer = {"error": said, "places": places}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
