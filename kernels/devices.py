"""What the cost model knows of a device: how fast it moves bytes, computes, and starts a kernel.

Figures are what a good kernel reaches, not what the data sheet prints. The H200 was measured (medians of
CUDA-graph replays, buffers rotated past L2): one read of a bf16 4096x4096 takes 10.1 us and of a 16384x4096
32.1 us, a copy 17.4 and 65.0 us, a 4096^3 matmul 173 us. One line fits the four: 4.3 TB/s and 1.8 us a launch
(so one read of 33.5 MB looks like 3.3 TB/s only because the launch is in it). That is 90 % of the sheet's
bandwidth and 80 % of its dense bf16 flop/s; the other GPUs take the same shares of their own sheets.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from functools import cache
from typing import Literal

import msgspec

from morphc.errors import ConfigError, UnknownNameError


class Device(msgspec.Struct, frozen=True):
    """One device.

    bandwidth: bytes/s from memory, reads and writes together; cache_bandwidth: the same while the activation
    is at most twice `l2_bytes`. fp64 .. bf16: flop/s of a matmul of that dtype (fp32 without tf32). vector:
    flop/s of float32 arithmetic outside of matmuls. launch_us: device time of a kernel beyond its bytes and
    flops. op_us: host time to issue one op. call_us: Python time to pass through one site that has nothing to
    do. measured: taken on this machine in this process, so it differs from run to run.
    """

    name: str
    kind: Literal["cuda", "hip", "cpu"]
    arch: str
    bandwidth: float
    cache_bandwidth: float
    fp64: float
    fp32: float
    fp16: float
    bf16: float
    vector: float
    l2_bytes: int
    launch_us: float
    op_us: float
    call_us: float
    measured: bool = False

    @property
    def asynchronous(self) -> bool:
        """The host runs ahead of the device, so their times overlap."""
        return self.kind != "cpu"

    def peak(self, dtype: str) -> float:
        """Matmul flop/s of `dtype`; anything but a float dtype counts as float32."""
        short = {"float64": self.fp64, "float16": self.fp16, "bfloat16": self.bf16}
        return short.get(dtype.removeprefix("torch."), self.fp32)


def _sheet(
    name: str, arch: str, terabytes: float, fp64: float, fp32: float, half: float, l2_mib: int
) -> Device:
    """A GPU from its data sheet: TB/s, dense (not sparse) Tflop/s, MiB of L2."""
    return Device(
        name=name,
        kind="hip" if arch.startswith("hip") else "cuda",
        arch=arch,
        bandwidth=0.9 * terabytes * 1e12,
        cache_bandwidth=0.9 * terabytes * 1e12,
        fp64=0.8 * fp64 * 1e12,
        fp32=0.9 * fp32 * 1e12,
        fp16=0.8 * half * 1e12,
        bf16=0.8 * half * 1e12,
        vector=0.9 * fp32 * 1e12,
        l2_bytes=l2_mib << 20,
        launch_us=1.8,
        op_us=6.5,
        call_us=2.0,
    )


# Sources. NVIDIA H200, H100 (SXM5), L4 and A100 80GB (SXM4) Tensor Core GPU data sheets, halving figures
# given "with sparsity"; B200: DGX B200 data sheet divided by 8; RTX 4090: NVIDIA Ada GPU Architecture
# whitepaper, appendix A (bf16 with float32 accumulation); MI300X: AMD Instinct MI300X data sheet (L2 is 4 MiB
# in each of 8 XCDs, its 256 MiB Infinity Cache not counted). Launch and op times: measured on the H200.
H200 = _sheet("H200", "cuda:90", 4.8, 67.0, 67.0, 989.4, 50)
H100 = _sheet("H100", "cuda:90", 3.35, 67.0, 67.0, 989.4, 50)
A100 = _sheet("A100", "cuda:80", 2.039, 19.5, 19.5, 312.0, 40)
L4 = _sheet("L4", "cuda:89", 0.3, 0.47, 30.3, 121.0, 48)
RTX4090 = _sheet("RTX 4090", "cuda:89", 1.008, 1.29, 82.6, 165.2, 72)
B200 = _sheet("B200", "cuda:100", 8.0, 40.0, 75.0, 2250.0, 126)
MI300X = _sheet("MI300X", "hip:gfx942", 5.3, 163.4, 163.4, 1307.4, 32)

# One thread of a server core with AVX-512 (Xeon, 2.6 GHz, 2 MiB L2), measured with torch 2.13; an op is what
# a small Linear's forward takes. Plans made for a CPU are made with these constants: a measured device would
# choose other seeds from run to run.
CPU = Device(
    name="cpu",
    kind="cpu",
    arch="cpu",
    bandwidth=28e9,
    cache_bandwidth=100e9,
    fp64=90e9,
    fp32=185e9,
    fp16=180e9,
    bf16=1300e9,
    vector=30e9,
    l2_bytes=2 << 20,
    launch_us=0.0,
    op_us=6.0,
    call_us=2.0,
)

DEVICES: dict[str, Device] = {d.name: d for d in (H200, H100, A100, L4, RTX4090, B200, MI300X, CPU)}

# Where one architecture has several cards, the one with the fewest bytes/s per flop/s stands for it: there a
# pass over the activation costs most beside a matmul, so an overhead is rather over- than underestimated.
_BY_ARCH = {d.arch: d for d in (H100, A100, L4, B200, MI300X)}


def parse(text: str) -> Device:
    """The device of a name (`h200`), an architecture (`cuda:90`, `hip:gfx942`), `cpu`, `cuda` or `cuda:0`.

    A number below 30 is a device's index, as torch counts them, and is asked of torch; above it is a
    capability. Raises UnknownNameError for anything else.
    """
    key = _plain(text)
    for name, device in DEVICES.items():
        if _plain(name) == key:
            return device
    if text in _BY_ARCH:
        return _BY_ARCH[text]
    match = re.fullmatch(r"cuda(?::(\d+))?", text)
    if match and int(match[1] or 0) < 30:
        return _gpu(int(match[1] or 0))
    raise UnknownNameError("device", text, [*DEVICES, *_BY_ARCH, "cuda"])


def detect() -> Device:
    """This machine's first GPU, or its CPU as measured (about 30 ms, once per process and thread count)."""
    import torch

    return _gpu(0) if torch.cuda.is_available() else measure_cpu()


def nominal(device: Device) -> Device:
    """`device`, or for a measured CPU the fixed one, on which equal questions have equal answers."""
    return CPU if device.measured else device


def measure_cpu() -> Device:
    """This CPU, with torch's current number of threads. Draws no random numbers.

    Inside a FakeTensorMode nothing can be timed; there the answer is `CPU`.
    """
    import torch

    if type(torch.empty(1, device="cpu")) is not torch.Tensor:
        return CPU
    return _measured_cpu(torch.get_num_threads())


@cache
def _measured_cpu(threads: int) -> Device:
    import torch

    def triad(elements: int) -> float:
        a, b, out = (torch.ones(elements, dtype=torch.float32, device="cpu") for _ in range(3))
        return 3 * 4 * elements / _best(lambda: torch.add(a, b, alpha=2.0, out=out))

    def matmul(dtype: torch.dtype, n: int = 192) -> float:
        a, out = (torch.ones(n, n, dtype=dtype, device="cpu") for _ in range(2))
        return 2 * n**3 / _best(lambda: torch.mm(a, a, out=out))

    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        small = torch.ones(8, dtype=torch.float32, device="cpu")
        op_ratio = _best(lambda: small + small, inner=200) * 1e6 / 0.8
        return msgspec.structs.replace(
            CPU,
            name=f"cpu ({threads} thread{'s' * (threads > 1)})",
            bandwidth=triad(1 << 20),
            cache_bandwidth=triad(1 << 16),
            fp64=matmul(torch.float64),
            fp32=matmul(torch.float32),
            fp16=matmul(torch.float16),
            bf16=matmul(torch.bfloat16),
            vector=CPU.vector * threads,
            op_us=CPU.op_us * op_ratio,  # the nominal machine adds two small tensors in 0.8 us
            call_us=CPU.call_us * op_ratio,
            measured=True,
        )


def _best(run: Callable[[], object], inner: int = 1) -> float:
    """Seconds of the fastest of at least 4 runs and 4 ms: a busy machine's slow runs must not be all there
    are.

    The first run, which warms the caches, is not counted.
    """
    run()
    fastest, began, runs = float("inf"), time.perf_counter(), 0
    while runs < 4 or time.perf_counter() - began < 4e-3:
        runs += 1
        start = time.perf_counter()
        for _ in range(inner):
            run()
        fastest = min(fastest, (time.perf_counter() - start) / inner)
    return max(fastest, 1e-9)


def _gpu(index: int) -> Device:
    import torch

    if index >= torch.cuda.device_count():
        raise ConfigError(
            f"device cuda:{index} is not on this machine, which has {torch.cuda.device_count()}; "
            'name an architecture ("cuda:90") to ask about one that is not here'
        )
    properties = torch.cuda.get_device_properties(index)
    target = getattr(properties, "gcnArchName", "").split(":")[0] if torch.version.hip else ""
    arch = f"hip:{target}" if target else f"cuda:{properties.major}{properties.minor}"
    known = [d for d in DEVICES.values() if d.kind != "cpu" and _plain(d.name) in _plain(properties.name)]
    if known:
        return known[0]
    like = _BY_ARCH.get(arch, A100)
    return msgspec.structs.replace(like, name=f"{properties.name} (taken as {like.name})", arch=arch)


def _plain(text: str) -> str:
    return re.sub(r"[^a-z0-9:]", "", text.lower())
