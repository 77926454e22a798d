"""Small chunks without matrix products, against the torch backend in float64."""

from __future__ import annotations

import pytest
import torch
from active_helpers import BOUND, bank, error, same_bits
from gradient_helpers import L, case
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from test_backward_kernel import check, run
from test_forward_kernel import DTYPES, untouched

from morphc.kernels import active, gradient, lanes
from morphc.kernels.compile import compile_all
from morphc.kernels.spec import TuneConfig

SHARED = ((1, 32), (1, 8), (2, 16), (4, 8), (8, 2), (2, 1))
"""Threads that share a chunk's row, and chunks of a tile."""


def by_lane(shared: tuple[int, int], tiles: int = 1, programs: int = 2, warps: int = 1) -> TuneConfig:
    threads, group = shared
    config = TuneConfig(0, 0, warps, 1, group=group, programs=programs, lanes=threads)
    return replace(config, block_rows=tiles * lanes.side(config))


@pytest.fixture(params=["persistent", "once"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both forms of the forward, whatever the number of rows."""
    monkeypatch.setattr(active, "ONCE", 1 << 20 if request.param == "once" else 0)
    return str(request.param)


@settings(max_examples=8)
@given(
    seeds=st.integers(1, 20),
    chunk=st.integers(1, 8),
    short=st.integers(0, 7),
    share=st.floats(0.1, 1),
    rank=st.sampled_from([1, 2, 3, 8, 16, 20]),
    rows=st.integers(1, 20),
    shared=st.sampled_from(SHARED),
    tiles=st.sampled_from([1, 2]),
    programs=st.integers(1, 3),
    warps=st.sampled_from([1, 2]),
    dtype=st.sampled_from(DTYPES),
    blend=st.sampled_from(["residual", "lerp", "multiply", "gate"]),
    samples=st.integers(0, 3),
    stash=st.booleans(),
    once=st.booleans(),
    draw=st.integers(0, 999),
)
def test_outputs_agree_with_float64_and_the_rest_is_untouched(
    device: torch.device,
    seeds: int,
    chunk: int,
    short: int,
    share: float,
    rank: int,
    rows: int,
    shared: tuple[int, int],
    tiles: int,
    programs: int,
    warps: int,
    dtype: torch.dtype,
    blend: str,
    samples: int,
    stash: bool,
    once: bool,
    draw: int,
) -> None:
    features = max(seeds, seeds * chunk - min(short, seeds - 1))
    made = bank(
        features,
        seeds,
        device=device,
        rank=rank,
        slots=max(1, int(seeds * share)),
        blend=blend,
        layout="channels_first" if samples else "last",
        dtype=dtype,
        draw=draw,
    )
    generator = torch.Generator().manual_seed(draw)
    shape = (samples, features, rows) if samples else (rows, features)
    before = torch.randn(shape, generator=generator).to(dtype).to(device)
    x = before.clone()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(active, "ONCE", 1 << 20 if once else 0)
        saved = made.run(x, by_lane(shared, tiles, programs, warps), stash=stash)
    assert error(x, made.reference(before)) <= BOUND[dtype]
    assert untouched(made, x, before)
    if saved is not None:
        for position in range(made.listed):
            chunk_of = before.movedim(made.axis, -1).reshape(-1, features)[:, made.chunk(position)]
            kept = saved[position].T if samples else saved[position]
            assert same_bits(kept[:, : chunk_of.shape[1]], chunk_of)


def test_what_is_not_finite_stays_in_its_chunk(device: torch.device, form: str) -> None:
    made = bank(24, 12, device=device, rank=4, states="FINE_TUNING")
    before = torch.randn(40, 24, generator=torch.Generator().manual_seed(1)).to(device)
    clean = made.reference(before)
    before[17, 5] = torch.inf
    x = before.clone()
    made.run(x, by_lane((2, 8)))
    there = torch.zeros(40, 24, dtype=torch.bool)
    there[17, 4:6] = True
    assert not x.cpu()[there].isfinite().any()
    assert error(x.cpu()[~there], clean[~there]) <= 1e-5


@st.composite
def sites(draw: st.DrawFn):
    seeds = draw(st.integers(1, 9))
    features = seeds * draw(st.integers(1, 7)) + draw(st.integers(0, seeds - 1))
    made = case(
        features,
        seeds,
        draw(st.integers(1, seeds)),
        draw(st.sampled_from([1, 2, 3, 8, 16, 18])),
        rows=draw(st.sampled_from([1, 2, 7, 19])),
        shape=(2, features, 3, draw(st.integers(1, 6))) if draw(st.booleans()) else None,
        blend=draw(st.sampled_from(["residual", "lerp"])),
        dtype=draw(st.sampled_from(DTYPES)),
        gap=draw(st.sampled_from([0, 3])),
        seed=draw(st.integers(0, 99)),
    )
    shared, tiles = draw(st.sampled_from(SHARED)), draw(st.sampled_from([1, 2]))
    return made, by_lane(shared, tiles, draw(st.sampled_from([1, 3])), draw(st.sampled_from([1, 2])))


@given(sites())
@settings(max_examples=6)
def test_every_gradient_is_that_of_the_torch_backend(given_site) -> None:
    check(*given_site)


def test_the_copy_of_the_gradient_can_be_made_on_the_way() -> None:
    made = case(48, 6, 3, 4, rows=37, states=(L.FINE_TUNING, L.TRAINING, L.DORMANT))
    assert gradient.copies(made.spec)
    check(made, by_lane((4, 2)), copied=False)


def test_two_runs_agree_bit_for_bit() -> None:
    made = case(24, 12, 12, 5, rows=50)
    first, second = (run(made, by_lane((2, 4), programs=3)) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(first[1][name], second[1][name]) for name in first[1])


@pytest.mark.parametrize("target", ["cuda:80", "cuda:90", "hip:gfx942"])
def test_what_is_used_without_tuning_compiles_without_spills(target: str) -> None:
    jobs = []
    for features, seeds, dtype, blend, shape in (
        (96, 96, torch.bfloat16, "gate", None),
        (96, 96, torch.float32, "residual", None),
        (96, 96, torch.bfloat16, "residual", (1, 96, 8, 8)),
        (200, 96, torch.bfloat16, "lerp", None),
    ):
        spec = case(features, seeds, 9, 16, blend=blend, dtype=dtype, shape=shape).spec
        forward = replace(spec, kind="forward")
        if (config := lanes.usual(forward, 4096)) is not None:
            jobs.append(active.forward_job(forward, config, stash=True, target=target))
        if (config := lanes.usual(spec, 4096)) is not None:
            jobs.append(gradient.backward_job(spec, config, target=target))
    assert len(jobs) == 6
    found = compile_all(jobs, time_limit=120)
    assert [one.problem for one in found] == [""] * len(jobs)
