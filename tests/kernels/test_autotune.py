"""The candidates of a site's kernels, each compiled and run once."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial

import msgspec
import pytest
import torch
from test_tuning import make_spec

from morphc.kernels import active, autotune, devices, launch, telemetry, tuning
from morphc.kernels.spec import KernelSpec, Layout, TuneConfig
from morphc.kernels.tuning import Run


@pytest.fixture(autouse=True)
def nothing_known() -> Iterator[None]:
    tuning.forget()
    yield
    tuning.forget()


def turns(runs: Sequence[Run], rounds: int) -> list[float]:
    """Runs each once; the later, the faster."""
    for run in runs:
        run(0)
    return [float(len(runs) - at) for at in range(len(runs))]


def small(kind: str, layout: Layout = "last") -> KernelSpec:
    spec = make_spec(kind, features=64, seeds=16, dtype="float32")
    if kind == "telemetry":
        return telemetry.spec_of(64, 16, torch.float32, layout)
    return msgspec.structs.replace(spec, blueprint="affine", layout=layout)


@pytest.mark.parametrize("kind", list(autotune.KINDS))
def test_candidates_are_compiled_and_run(kind: str, device: torch.device) -> None:
    spec, (configs, start) = small(kind), autotune.KINDS[kind]
    some = configs(spec, 32, devices.H200)[:2]
    if kind == "backward":  # whose first guess of this shape spills, and what spills is not timed
        some = [TuneConfig(height, 8, 2, 3, group=2, programs=2) for height in (16, 32)]
    bench = autotune.make_bench(spec, 32, device)
    offered = [
        dataclasses.replace(candidate, start=partial(start, bench, candidate.config))
        for candidate in autotune.offered(spec, 32, some, "cuda:90")
    ]
    assert all(candidate.jobs for candidate in offered)
    tuned = tuning.tune(spec, 30, offered, turns)
    assert [trial.problem for trial in tuned.trials] == ["", ""]
    assert tuned.config == tuned.trials[1].config
    assert tuning.lookup(spec, 20) == tuned.config


@pytest.mark.parametrize("layout", ["last", "channels_first"])
def test_the_seeds_that_are_timed_change_nothing(device: torch.device, layout: str) -> None:
    bench = autotune.make_bench(make_spec(features=64, seeds=16, dtype="float32"), 32, device)
    before = bench.buffers[0].clone()
    assert bench.listed[:3].tolist() == [2, 2, 2], "a tenth of the seeds"
    active.Forward(bench.spec, tuning.choose(bench.spec, 32), device)(
        bench.buffers[0], bench.view, bench.listed, bench.params
    )
    assert torch.equal(bench.buffers[0], before)


def test_what_is_collected_is_not_run(device: torch.device) -> None:
    bench = autotune.make_bench(small("forward"), 32, device)
    bench.params[0].fill_(1.0)
    before = bench.buffers[0].clone()
    with launch.collecting("cuda:80") as jobs:
        active.Forward(bench.spec, tuning.choose(bench.spec, 32), device)(
            bench.buffers[0], bench.view, bench.listed, bench.params
        )
    assert [(job.function, job.target) for job in jobs] == [("forward_once", "cuda:80")]
    assert torch.equal(bench.buffers[0], before)
