"""Every kernel that a plan needs, compiled ahead of time or counted."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from morphc.kernels import active, devices, gradient, ladder, lifecycle, telemetry, training, tuning
from morphc.kernels.compile import TIME_LIMIT, Failure, Job, Resources, compile_all
from morphc.kernels.spec import KernelSpec, TuneConfig


@dataclass(frozen=True)
class Need:
    """Kernels that share a config: the first one of `configs` with which none of them has a problem."""

    configs: Sequence[TuneConfig | None]
    jobs: Callable[[TuneConfig | None], Sequence[Job]]


def compile_needed(
    specs: Iterable[KernelSpec], rows: int, target: str, time_limit: float = TIME_LIMIT
) -> list[tuple[Job, Resources | Failure]]:
    """Compile the kernels of `specs`, those of telemetry on the same sites, and those of every model, each once.

    rows: of an activation; they decide the tiles where none were tuned. target: `cuda:90`, `hip:gfx942`. Where a
    config spills, the next one is tried, as it is when the kernel is launched; where all do, the last one's are
    told. A spec that has no kernels, and runs in torch, needs none.
    """
    known: dict[object, tuple[Job, Resources | Failure]] = {}
    settled: dict[object, None] = {}
    left = [(need, 0) for need in needs(specs, rows, target)]
    while left:
        tried = [
            [dataclasses.replace(job, target=target) for job in need.jobs(need.configs[at])]
            for need, at in left
        ]
        fresh = {_key(job): job for jobs in tried for job in jobs if _key(job) not in known}
        found = compile_all(list(fresh.values()), time_limit=time_limit)
        known |= {key: (job, each) for (key, job), each in zip(fresh.items(), found, strict=True)}
        further = []
        for (need, at), jobs in zip(left, tried, strict=True):
            if any(known[_key(job)][1].problem for job in jobs) and at + 1 < len(need.configs):
                further.append((need, at + 1))
            else:
                settled |= dict.fromkeys(map(_key, jobs))
        left = further
    return [known[key] for key in settled]


def needs(specs: Iterable[KernelSpec], rows: int, target: str) -> list[Need]:
    """What `compile_needed` compiles."""
    specs = list(specs)
    common = [active.list_job(target), lifecycle.lifecycle_job(False), lifecycle.report_job()]
    found = [Need((None,), lambda config: common)]
    for spec in specs:
        found += _of_bank(spec, rows, target)
    for watched in dict.fromkeys(map(_watched, specs)):
        found += _of_telemetry(watched, rows, target)
    return found


def _key(job: Job) -> object:
    return job.source.key, job.function, *map(str, (job.signature, job.constants, job.options))


def _of_bank(spec: KernelSpec, rows: int, target: str) -> list[Need]:
    """A bank's kernels of the spec's kind."""
    if active.refuses(spec) or gradient.refuses(spec):
        return []

    def jobs(config: TuneConfig | None) -> list[Job]:
        assert config is not None
        if spec.kind == "forward":
            return [active.forward_job(spec, config, stash=True, target=target)]
        if spec.kind == "backward":
            return [
                gradient.backward_job(spec, config, target=target),
                gradient.reduce_job(spec, config, target=target),
            ]
        steps = [training.step_job(spec, together=together, target=target) for together in (False, True)]
        if training.refuses(spec):
            return steps
        return [
            training.train_job(spec, config, target=target),
            training.adamw_job(spec, config, target=target),
            *steps,
        ]

    timed = tuning.lookup(spec, rows)
    if timed is not None:
        return [Need((timed,), jobs)]
    if spec.kind == "forward":
        first = tuning.choose(spec, rows, devices.parse(target))
    elif spec.kind in ("backward", "train"):
        first = gradient.default(spec, rows)
    else:
        return []
    return [Need((first, *ladder.rungs(spec, first)), jobs)]


def _watched(spec: KernelSpec) -> KernelSpec:
    """The telemetry of the site that a bank belongs to."""
    dtype = getattr(torch, spec.dtype)
    return telemetry.spec_of(spec.features, spec.seeds, dtype, spec.layout, spec.epilogue)


def _of_telemetry(spec: KernelSpec, rows: int, target: str) -> list[Need]:
    if telemetry.refuses(spec):
        return []
    processors = tuning.processors(devices.parse(target))
    config = tuning.lookup(spec, rows) or telemetry.choose(spec, rows, processors)
    jobs = [
        telemetry.job(spec, config, target=target),
        telemetry.merge_job(spec, target=target),
        telemetry.shift_job(spec, target=target),
    ]
    return [Need((config,), lambda config: jobs)]
