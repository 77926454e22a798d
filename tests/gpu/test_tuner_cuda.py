"""Tuning on the GPU: a process of its own times what this one compiled."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import morphc
from morphc.kernels import timer, tuning
from morphc.kernels.spec import KernelSpec, TuneConfig

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA device, and this machine has none"
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MORPHC_CACHE_DIR", str(tmp_path))
    tuning.forget()


def test_a_model_is_tuned_once_and_later_compiles_use_it() -> None:
    host = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256)).cuda()
    x = torch.randn(512, 256, device="cuda")
    config = morphc.Config(seeds_per_layer=64)
    model = morphc.compile(host, x, config=config)
    found = morphc.tune(model)
    assert found.outcomes
    for one in found.outcomes:
        assert one.us is not None, one.problem
        assert 0 < one.us <= (one.guess_us or one.us)
        assert one.timed >= 1
    again = morphc.tune(model)
    assert not any(one.timed for one in again.outcomes)
    assert again.configs == found.configs
    tuning.forget()
    later = morphc.compile(host, x, config=config)
    assert tuning.known() == found.configs
    assert set(morphc.report(later).plan.tuned) <= set(found.configs)
    torch.testing.assert_close(later(x), host(x), rtol=0, atol=0)


def test_a_candidate_that_breaks_the_device_ends_nothing() -> None:
    """Eight warps over 64 rows of float32 read memory that isn't theirs, on capability 9.0."""
    spec = KernelSpec(
        kind="forward", features=4096, seeds=64, chunk=64, slots=7, rank=16, blueprint="bottleneck",
        blend="residual", epilogue=None, layout="last", dtype="float32",
    )  # fmt: skip
    configs = [TuneConfig(64, 64, warps, 3, group=1, programs=2) for warps in (4, 8, 2)]
    timing = timer.ProcessTimer(torch.device("cuda:0"))
    events = list(timing.time(spec, 4096, configs))
    timing.close()
    times = {at: us for event in events for at, us in event.times.items()}
    failed = {event.at for event in events if event.kind == "failed"}
    assert {0, 2} <= set(times)
    assert failed <= {1}
    assert torch.ones(3, device="cuda").sum().item() == 3
