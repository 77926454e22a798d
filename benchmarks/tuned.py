"""Times the configs that the kernels' host modules propose for one shape, as the benchmark uses them.

The best becomes what `tuning.choose` gives in this process, so the figures after it are those of tuned kernels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import msgspec
import torch
from bench import Bench, Site, Watched
from figures import FRACTIONS, percent
from timing import Variant, measure
from workers import device_alive

from morphc.errors import KernelError
from morphc.kernels import active, launch, telemetry, training, tuning
from morphc.kernels.spec import KernelSpec, TuneConfig
from morphc.kernels.tuning import Candidate, Run, TimeFunction


class Kernel(NamedTuple):
    """One kernel to tune. start: gives what runs it with a config; configs: the one used without tuning first."""

    name: str
    spec: KernelSpec
    configs: Sequence[TuneConfig]
    start: Callable[[TuneConfig], Run]


def tuned(
    bench: Bench, parts: Sequence[str], avoid: Sequence[str], begin: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    """One answer for each kernel of the parts, with all the times that led to it."""
    for kernel in _kernels(bench, parts):
        doing = f"tuning {kernel.name}"
        if doing in avoid:
            continue
        begin(doing)
        try:
            configs = kernel.configs[: 2 if bench.setting.tiny else None]
            offered = [_offer(kernel, config, _target(bench.device)) for config in configs]
            found = tuning.tune(kernel.spec, bench.case.rows, offered, _time(bench))
        except KernelError as error:
            if not device_alive():
                raise
            yield {"kernel": kernel.name, "failed": str(error)}
            continue
        yield {"kernel": kernel.name, **msgspec.to_builtins(found)}


def _offer(kernel: Kernel, config: TuneConfig, target: str) -> Candidate:
    with launch.collecting(target) as jobs:
        kernel.start(config)(0)
    return Candidate(config, jobs, lambda: kernel.start(config))


def _target(device: torch.device) -> str:
    if device.type != "cuda":
        return "cuda:90"
    major, minor = torch.cuda.get_device_capability(device)
    return f"cuda:{10 * major + minor}"


def _time(bench: Bench) -> TimeFunction:
    """Interleaved replays, as for all other figures; one that fails is infinitely slow."""

    def time(runs: Sequence[Run], rounds: int) -> list[float]:
        variants = [Variant(str(at), run, calls=bench.x.count) for at, run in enumerate(runs)]
        found = measure(variants, bench.device, rounds=rounds)
        timings = [found[str(at)] for at in range(len(runs))]
        without = 1.0 if bench.setting.tiny else math.inf
        return [without if isinstance(t, str) or math.isnan(t.us) else t.us for t in timings]

    return time


def _kernels(bench: Bench, parts: Sequence[str]) -> Iterator[Kernel]:
    rows = bench.case.rows
    if "site" in parts:
        spec = telemetry.spec_of(bench.case.features, bench.case.seeds, bench.setting.dtype)
        configs = telemetry.candidates(spec, tuning.bucket(rows))
        yield Kernel("telemetry", spec, configs, lambda config: _telemetry(bench, config))
    kinds = (
        ("site", "forward", FRACTIONS, _forward),
        ("backward", "backward", FRACTIONS[1:], _backward),
        ("train", "train", (0.1,), _train),
    )
    for part, kind, fractions, start in kinds:
        for fraction in fractions if part in parts else ():
            site = bench.site_at(fraction, isolated=kind == "train")
            spec = site.spec(kind)
            configs = list(dict.fromkeys((site.config(kind), *tuning.candidates(spec, rows))))

            def started(config: TuneConfig, site: Site = site, start: Any = start) -> Run:
                return start(bench, site, config)

            yield Kernel(f"{kind} {percent(fraction)}", spec, configs, started)


def _telemetry(bench: Bench, config: TuneConfig) -> Run:
    watched = Watched(bench.case, bench.setting, config=config)
    return lambda i: watched.only(bench.x[i])


def _forward(bench: Bench, site: Site, config: TuneConfig) -> Run:
    kernel = active.Forward(site.spec("forward"), config, bench.device, site.precision)
    return lambda i: kernel(bench.x[i], site.view, site.active, site.params)


def _backward(bench: Bench, site: Site, config: TuneConfig) -> Run:
    run = site.backward_with(config)
    stash = bench.stash(site)
    return lambda i: run(bench.dy[i], bench.y[i], stash[i])


def _train(bench: Bench, site: Site, config: TuneConfig) -> Run:
    trainer = training.Trainer(site.spec("train"), config, bench.device, site.precision)
    loss = torch.zeros(bench.case.seeds, device=bench.device)
    rates = training.Rates(1e-6)
    return lambda i: trainer.reconstruct(bench.x[i], site.view, site.active, site.trained, loss, rates)
