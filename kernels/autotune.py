"""Candidates of a site's kernels on a device, and what they are run on.

A tenth of the seeds is active, or all slots where there are fewer: the case that the kernels are tuned for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor

from morphc.kernels import active, gradient, ladder, launch, telemetry, training, tuning
from morphc.kernels.devices import Device
from morphc.kernels.layout import View
from morphc.kernels.reference.active_list import active_list
from morphc.kernels.spec import KernelSpec, TuneConfig
from morphc.kernels.templating import cdiv
from morphc.kernels.tuning import Candidate, Run

ROTATED_BYTES: Final = 240 << 20
"""Bytes of the buffers that calls take turns with: some L2 caches of the largest GPUs."""

MOST_BUFFERS: Final = 64

# States of the seeds that candidates are timed with; any numbers do.
ISOLATED, BLENDING = 2, 4


class Bench(NamedTuple):
    """What candidates of one spec are run on. buffers: activations, larger than the cache together."""

    spec: KernelSpec
    device: torch.device
    buffers: Sequence[Tensor]
    view: View
    listed: Tensor
    params: Sequence[Tensor]

    def buffer(self, call: int, behind: int = 0) -> Tensor:
        """The activation of a call; `behind` gives another one."""
        return self.buffers[(call + behind) % len(self.buffers)]


def make_bench(spec: KernelSpec, rows: int, device: torch.device) -> Bench:
    """Activations of `rows` rows and a bank whose seeds change nothing, so that calls without number leave finite
    values: for others kernels take detours.
    """
    dtype = getattr(torch, spec.dtype)
    size = max(1, rows * spec.features * dtype.itemsize)
    count = 2 if device.type in ("cpu", "meta") else max(2, min(MOST_BUFFERS, cdiv(ROTATED_BYTES, size)))
    generator = None if device.type == "meta" else torch.Generator(device=device).manual_seed(0)
    first = spec.layout == "channels_first"
    shape = (1, spec.features, rows) if first else (rows, spec.features)
    buffers = [torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(count)]
    view = (
        View("channels_first", rows, rows * spec.features, rows)
        if first
        else View("last", rows, spec.features, 1)
    )
    params = []
    if spec.blueprint:
        for name, sizes in gradient.shapes(spec).items():
            value = 0.01 if name.startswith("in_") else 0.0
            params.append(torch.full((spec.slots, *sizes), value, device=device))
    return Bench(spec, device, buffers, view, listing(spec, device), params)


def listing(spec: KernelSpec, device: torch.device) -> Tensor:
    """The list of a bank with a tenth of the seeds active, spread over the site; they blend, but for `train`."""
    count = max(1, min(spec.slots, cdiv(spec.seeds, 10)))
    owner = torch.full((max(1, spec.slots),), -1, dtype=torch.int64)
    owner[:count] = torch.arange(count) * spec.seeds // count
    state = ISOLATED if spec.kind == "train" else BLENDING
    lifecycle = torch.full((spec.seeds,), state, dtype=torch.int32)
    alpha = torch.full((spec.seeds,), 0.5)
    return active_list(owner, lifecycle, alpha, 1 << BLENDING, 1 << ISOLATED, 1 << state).to(device)


def _forward(bench: Bench, config: TuneConfig) -> Run:
    kernel = active.Forward(bench.spec, config, bench.device)
    return lambda call: kernel(bench.buffer(call), bench.view, bench.listed, bench.params)


def _backward(bench: Bench, config: TuneConfig) -> Run:
    spec, view = bench.spec, bench.view
    kernel = gradient.Backward(spec, config, bench.device)
    stash = torch.zeros(active.stash_shape(spec, view), dtype=bench.buffers[0].dtype, device=bench.device)
    flat = torch.empty(spec.slots * gradient.gradient_size(spec), device=bench.device)

    def run(call: int) -> None:
        dy, dx = bench.buffer(call), bench.buffer(call, 1)
        kernel(dy, view, dx, view, bench.listed, bench.params, stash, flat, copied=not kernel.copies)

    return run


def _train(bench: Bench, config: TuneConfig) -> Run:
    kernel = training.Trainer(bench.spec, config, bench.device)
    moments = [[torch.zeros_like(param) for param in bench.params] for _ in range(2)]
    step = torch.zeros(bench.spec.slots, dtype=torch.int64, device=bench.device)
    bank = training.Bank(bench.params, moments[0], moments[1], step)
    loss = torch.zeros(bench.spec.slots, device=bench.device)
    # Nothing is learned: what is timed last is what was timed first.
    rates = training.Rates(lr=0.0)
    return lambda call: kernel.reconstruct(bench.buffer(call), bench.view, bench.listed, bank, loss, rates)


def _telemetry(bench: Bench, config: TuneConfig) -> Run:
    kernel = telemetry.Telemetry(bench.spec, 0.0, bench.device, config)
    cells = kernel.new_cells(bench.view)
    sums = torch.zeros(8, bench.spec.seeds, dtype=torch.float64, device=bench.device)
    counts = torch.zeros(3, bench.spec.seeds, dtype=torch.int64, device=bench.device)
    return lambda call: kernel(bench.buffer(call), bench.view, cells, sums, counts)


def _with_default(
    default: Callable[[KernelSpec, int], TuneConfig],
) -> Callable[[KernelSpec, int, Device], Sequence[TuneConfig]]:
    def configs(spec: KernelSpec, rows: int, device: Device) -> Sequence[TuneConfig]:
        first = default(spec, rows)
        # Of wide chunks most tiles spill: what is gone on to without tuning is among the first there.
        behind = ladder.rungs(spec, first) if spec.chunk > 128 else ()
        return tuple(dict.fromkeys((first, *behind, *tuning.candidates(spec, rows, device))))

    return configs


def _telemetry_configs(spec: KernelSpec, rows: int, device: Device) -> Sequence[TuneConfig]:
    return telemetry.candidates(spec, rows, tuning.processors(device))


class Kind(NamedTuple):
    """configs: those worth timing for a bucket of rows, best guess first; start: how one is run."""

    configs: Callable[[KernelSpec, int, Device], Sequence[TuneConfig]]
    start: Callable[[Bench, TuneConfig], Run]


KINDS: Final[Mapping[str, Kind]] = {
    "forward": Kind(tuning.candidates, _forward),
    "backward": Kind(_with_default(gradient.default), _backward),
    "train": Kind(_with_default(training.default), _train),
    "telemetry": Kind(_telemetry_configs, _telemetry),
}


def offered(spec: KernelSpec, rows: int, configs: Sequence[TuneConfig], target: str) -> list[Candidate]:
    """The candidates with the kernels that each needs on `target` (`cuda:90`); nothing is compiled or run."""
    bench = make_bench(spec, rows, torch.device("meta"))
    start = KINDS[spec.kind].start
    found = []
    for config in configs:
        with launch.collecting(target) as jobs:
            start(bench, config)(0)
        found.append(Candidate(config, jobs, lambda config=config: start(bench, config)))  # type: ignore[misc]
    return found
