"""The candidates of a site's kernels, each compiled and run once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec
import pytest
import torch
from test_tuning import make_spec

from morphc.errors import UnsupportedKernelError
from morphc.kernels import active, autotune, launch, telemetry, tuning
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
def test_candidates_are_compiled_and_run(
    kind: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs, start = autotune.KINDS[kind]
    few = (lambda spec, rows, model: configs(spec, rows, model)[:2], start)
    if kind == "backward":  # whose first guess of this shape spills, and what spills is not timed
        some = [TuneConfig(height, 8, 2, 3, group=2, programs=2) for height in (16, 32)]
        few = (lambda spec, rows, model: some, start)
    monkeypatch.setattr(autotune, "KINDS", {kind: few})
    spec = small(kind)
    tuned = autotune.tune_site(spec, 30, device, time=turns)
    assert len(tuned.trials) == 2
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


def test_what_is_not_tuned_says_so(device: torch.device) -> None:
    with pytest.raises(UnsupportedKernelError, match="no kernel of kind 'report' is tuned; forward"):
        autotune.tune_site(make_spec("report"), 16, device)
