"""Every kernel that a plan needs, to be compiled ahead of time or counted."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import torch

from morphc.kernels import active, devices, gradient, lifecycle, telemetry, training, tuning
from morphc.kernels.compile import Job
from morphc.kernels.spec import KernelSpec


def needed(specs: Iterable[KernelSpec], rows: int, target: str) -> list[Job]:
    """The kernels of `specs`, those of telemetry on the same sites, and those of every model, each once.

    rows: of an activation; they decide the tiles where none were tuned. target: `cuda:90`, `hip:gfx942`. A spec
    that has no kernels, and runs in torch, needs none.
    """
    specs = list(specs)
    jobs = [active.list_job(target), lifecycle.lifecycle_job(False), lifecycle.report_job()]
    for spec in specs:
        jobs += _of_bank(spec, rows, target)
    for watched in dict.fromkeys(map(_watched, specs)):
        jobs += _of_telemetry(watched, rows, target)
    found: dict[object, Job] = {}
    for job in jobs:
        key = (job.source.key, job.function, *map(str, (job.signature, job.constants, job.options)))
        found.setdefault(key, dataclasses.replace(job, target=target))
    return list(found.values())


def _of_bank(spec: KernelSpec, rows: int, target: str) -> list[Job]:
    """A bank's kernels of the spec's kind."""
    if active.refuses(spec) or gradient.refuses(spec):
        return []
    if spec.kind == "forward":
        config = tuning.choose(spec, rows, devices.parse(target))
        return [active.forward_job(spec, config, stash=True, target=target)]
    if spec.kind == "backward":
        config = tuning.lookup(spec, rows) or gradient.default(spec, rows)
        return [
            gradient.backward_job(spec, config, target=target),
            gradient.reduce_job(spec, config, target=target),
        ]
    if spec.kind == "train":
        config = tuning.lookup(spec, rows) or training.default(spec, rows)
        return [
            training.train_job(spec, config, target=target),
            *(training.adamw_job(spec, config, sums=sums, target=target) for sums in (False, True)),
        ]
    return []


def _watched(spec: KernelSpec) -> KernelSpec:
    """The telemetry of the site that a bank belongs to."""
    dtype = getattr(torch, spec.dtype)
    return telemetry.spec_of(spec.features, spec.seeds, dtype, spec.layout, spec.epilogue)


def _of_telemetry(spec: KernelSpec, rows: int, target: str) -> list[Job]:
    if telemetry.refuses(spec):
        return []
    processors = tuning.processors(devices.parse(target))
    config = tuning.lookup(spec, rows) or telemetry.choose(spec, rows, processors)
    return [
        telemetry.job(spec, config, target=target),
        telemetry.merge_job(spec, target=target),
        telemetry.shift_job(spec, target=target),
    ]
