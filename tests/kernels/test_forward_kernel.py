"""The forward over active seeds, against the torch backend in float64."""

from __future__ import annotations

import math
import re

import msgspec
import numpy as np
import pytest
import torch
from active_helpers import BOUND, Bank, bank, error, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st

from morphc.errors import UnsupportedKernelError
from morphc.kernels import active
from morphc.kernels.compile import Resources, compile_all
from morphc.kernels.launch import multiprocessors
from morphc.kernels.layout import View
from morphc.kernels.reference.chunks import bounds
from morphc.kernels.spec import TuneConfig
from morphc.kernels.templating import next_pow2
from morphc.lifecycle import Lifecycle

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BLENDS = ["residual", "lerp", "multiply", "gate"]


def tiles(group: int = 1, rows: int = 16, programs: int = 1) -> TuneConfig:
    return TuneConfig(rows, 0, 4, 1, group=group, programs=programs)


def untouched(made: Bank, x: torch.Tensor, before: torch.Tensor) -> bool:
    """Whether every chunk that no blending seed has is as it was, to the bit."""
    written = {made.seed_at(position) for position in range(made.blending)}
    return all(
        same_bits(x.movedim(made.axis, 0)[start:stop], before.movedim(made.axis, 0)[start:stop])
        for seed, (start, stop) in enumerate(bounds(made.spec.features, made.spec.seeds))
        if seed not in written
    )


@pytest.fixture(params=["persistent", "once"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both forms of the kernel, whatever the number of rows."""
    monkeypatch.setattr(active, "ONCE", 1 << 20 if request.param == "once" else 0)
    return str(request.param)


@settings(max_examples=20)
@given(
    features=st.integers(1, 90),
    share=st.floats(0, 1),
    slots=st.floats(0.1, 1),
    rank=st.sampled_from([1, 3, 8, 16, 20]),
    rows=st.integers(1, 40),
    group=st.sampled_from([1, 2, 4, 8]),
    height=st.sampled_from([16, 32]),
    programs=st.integers(1, 3),
    dtype=st.sampled_from(DTYPES),
    blend=st.sampled_from(BLENDS),
    blueprint=st.sampled_from(["bottleneck", "bottleneck", "affine"]),
    layout=st.sampled_from(["last", "channels_first"]),
    samples=st.integers(1, 3),
    stash=st.booleans(),
    once=st.booleans(),
    draw=st.integers(0, 999),
)
def test_outputs_agree_with_float64_and_the_rest_is_untouched(
    device: torch.device,
    features: int,
    share: float,
    slots: float,
    rank: int,
    rows: int,
    group: int,
    height: int,
    programs: int,
    dtype: torch.dtype,
    blend: str,
    blueprint: str,
    layout: str,
    samples: int,
    stash: bool,
    once: bool,
    draw: int,
) -> None:
    seeds = max(1, min(features, round(share * features)))
    if next_pow2(-(-features // seeds)) > 64:
        group = 1
    made = bank(
        features, seeds, device=device, rank=rank, slots=max(1, round(slots * seeds)), blueprint=blueprint,
        blend=blend, layout=layout, dtype=dtype, draw=draw,
    )  # fmt: skip
    shape = (rows, features) if layout == "last" else (samples, features, rows)
    before = torch.randn(shape, generator=torch.Generator().manual_seed(draw)).to(device, dtype)
    x = before.clone()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(active, "ONCE", 1 << 20 if once else 0)
        made.run(x, tiles(group, height, programs), stash=stash)
    assert error(x, made.reference(before)) <= BOUND[dtype]
    assert untouched(made, x, before)


@pytest.mark.parametrize("features", [130, 256])
@pytest.mark.parametrize("blend", BLENDS)
@pytest.mark.parametrize("layout", ["last", "channels_first"])
def test_a_wide_chunk_is_taken_in_pieces(
    device: torch.device, form: str, features: int, blend: str, layout: str
) -> None:
    made = bank(features, 1, device=device, blend=blend, layout=layout, states="GRAFTING")
    before = torch.randn(17, features) if layout == "last" else torch.randn(2, features, 9)
    x = before.clone().to(device)
    saved = made.run(x, tiles(), stash=True)
    assert "PIECES" in active.source(made.spec).text
    assert error(x, made.reference(before)) <= 1e-5
    kept = before.unsqueeze(0) if layout == "last" else before.movedim(1, 0).reshape(1, features, 18)
    assert saved is not None
    assert torch.equal(saved.cpu(), kept)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 1])
def test_no_rows_and_one_row(device: torch.device, rows: int, dtype: torch.dtype) -> None:
    made = bank(30, 7, device=device, dtype=dtype, states="GRAFTING")
    before = torch.randn(rows, 30).to(device, dtype)
    x = before.clone()
    made.run(x, tiles(4), view=View("last", rows, 30, 1))
    assert error(x, made.reference(before)) <= BOUND[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_with_a_gap_between_them(device: torch.device, dtype: torch.dtype) -> None:
    made = bank(24, 6, device=device, dtype=dtype, states="FOSSILIZED")
    whole = torch.randn(19, 31).to(device, dtype)
    before = whole.clone()
    x = whole[:, 3:27]
    made.run(x, tiles(2))
    assert error(x, made.reference(before[:, 3:27])) <= BOUND[dtype]
    assert same_bits(whole[:, :3], before[:, :3])
    assert same_bits(whole[:, 27:], before[:, 27:])


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("layout", ["last", "channels_first"])
def test_the_stash_has_the_original_chunks_of_all_that_are_listed(
    device: torch.device, form: str, layout: str, group: int
) -> None:
    made = bank(45, 13, device=device, layout=layout, draw=3)
    assert 0 < made.blending < made.listed < made.spec.slots
    x = torch.randn(21, 45) if layout == "last" else torch.randn(3, 45, 7)
    x = x.to(device)
    rows = x.clone().movedim(made.axis, -1).reshape(21, 45)
    saved = made.run(x, tiles(group, programs=2), stash=True)
    assert saved is not None
    if layout == "channels_first":
        saved = saved.transpose(1, 2)
    for position in range(made.spec.slots):
        chunk = rows[:, made.chunk(position)] if position < made.listed else rows[:, :0]
        width = chunk.shape[1]
        assert torch.equal(saved[position, :, :width], chunk)
        assert bool((saved[position, :, width:] == -77).all())


def test_isolated_seeds_alone_leave_the_activation_as_it_is(device: torch.device) -> None:
    made = bank(20, 5, device=device, dtype=torch.bfloat16, states="TRAINING")
    before = torch.randn(18, 20).to(device, torch.bfloat16)
    before[3, 4], before[5, 9] = torch.inf, torch.nan
    x = before.clone()
    saved = made.run(x, tiles(4), stash=True)
    assert same_bits(x, before)
    assert saved is not None
    assert same_bits(saved.movedim(0, 1).reshape(18, 20), before)


@pytest.mark.parametrize("states", ["DORMANT", "CULLED"])
def test_nothing_active_writes_nothing(device: torch.device, states: str) -> None:
    made = bank(20, 5, device=device, states=states)
    before = torch.randn(9, 20).to(device)
    x = before.clone()
    saved = made.run(x, tiles(4), stash=True)
    assert same_bits(x, before)
    assert saved is not None
    assert bool((saved == -77).all())


def test_alpha_zero_is_left_out_and_not_multiplied(device: torch.device) -> None:
    made = bank(12, 3, device=device, states="GRAFTING")
    made.alpha[1] = 0.0
    made.relist()
    x = torch.full((4, 12), torch.inf, device=device)
    made.run(x, tiles(4))
    assert bool((x[:, 4:8] == torch.inf).all())
    assert not bool(x[:, :4].isfinite().any())


def agrees_where_finite(got: torch.Tensor, want: torch.Tensor, bound: float) -> bool:
    """Not finite in the same places, and close in the others."""
    got = got.cpu().double()
    same = torch.equal(got.isfinite(), want.isfinite())
    rest = want.isfinite() & got.isfinite()
    return same and error(got[rest], want[rest]) <= bound


@pytest.mark.parametrize("blueprint", ["bottleneck", "affine"])
@pytest.mark.parametrize("blend", ["residual", "gate"])
@pytest.mark.parametrize("group", [1, 8])
@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_what_is_not_finite_stays_in_its_row_and_chunk(
    device: torch.device, form: str, blueprint: str, blend: str, group: int, value: float
) -> None:
    made = bank(24, 8, device=device, blueprint=blueprint, blend=blend, states="EVALUATING", rank=16)
    before = torch.randn(50, 24)
    before[20, 4] = before[49, 23] = value
    x = before.clone().to(device)
    made.run(x, tiles(group))
    assert agrees_where_finite(x, made.reference(before), 1e-5)
    bad = ~x.cpu().isfinite()
    assert not bool(bad[:, :3].any())
    assert int(bad.sum()) <= 6


@pytest.mark.parametrize("group", [1, 8])
@pytest.mark.parametrize("name", ["in_weight", "in_bias", "out_weight", "out_bias"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_stay_in_their_slot(
    device: torch.device, form: str, group: int, name: str, value: float
) -> None:
    made = bank(32, 8, device=device, states="EVALUATING")
    weights = made.params[active.params_of(made.spec).index(name)]
    weights[made.slot_at(3)] = value
    before = torch.randn(33, 32)
    x = before.clone().to(device)
    made.run(x, tiles(group))
    want = made.reference(before)
    others = [column for column in range(32) if column // 4 != made.seed_at(3)]
    assert error(x[:, others], want[:, others]) <= 1e-5
    assert not bool(x[:, made.chunk(3)].isfinite().all(1).any())


def test_a_broken_block_does_not_disturb_the_blocks_and_groups_around_it(
    device: torch.device, form: str
) -> None:
    made = bank(40, 20, device=device, states="EVALUATING")
    before = torch.randn(100, 40)
    before[70, 33] = math.nan
    x = before.clone().to(device)
    # One program has all groups, so that it goes on after the broken block with the others.
    saved = made.run(x, TuneConfig(16, 0, 4, 1, group=8, programs=1), stash=True)
    assert agrees_where_finite(x, made.reference(before), 1e-5)
    assert int((~x.cpu().isfinite()).sum()) == 2
    assert saved is not None
    kept = saved.cpu().movedim(0, 1).reshape(100, 40)
    assert torch.equal(kept.nan_to_num(9.0), before.nan_to_num(9.0))


@pytest.mark.parametrize("stash", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", [3, 5 / 8])
def test_what_a_program_does_again_is_what_comes_after_a_broken_block_and_no_more(
    device: torch.device, dtype: torch.dtype, stash: bool, share: float
) -> None:
    """Every program has several groups or, of fewer groups, several ranges of rows; some are only saved."""
    groups = int(share * 2 * multiprocessors(device))
    rows = 48 if share > 1 else 288
    made = bank(4 * groups, 2 * groups, device=device, dtype=dtype, states="EVALUATING")
    made.lifecycle[::5] = Lifecycle.TRAINING
    made.relist()
    before = torch.randn(rows, 4 * groups).to(dtype)
    for at in range(7):
        chunk = made.chunk(at * (made.blending - 1) // 6)
        before[(97 * at + 40) % rows, chunk.start] = math.nan
    x = before.clone().to(device)
    saved = made.run(x, TuneConfig(16, 0, 4, 2, group=2, programs=2), stash=stash)
    assert (saved is not None) == stash
    assert agrees_where_finite(x, made.reference(before), 1e-5 if dtype == torch.float32 else 5e-3)


@pytest.mark.parametrize("group", [1, 8])
def test_two_runs_agree_to_the_bit(device: torch.device, group: int) -> None:
    made = bank(50, 11, device=device, dtype=torch.bfloat16, states="FINE_TUNING", rank=16)
    start = torch.randn(40, 50).to(device, torch.bfloat16)
    first, second, third = start.clone(), start.clone(), start.clone()
    made.run(first, tiles(group))
    made.run(second, tiles(group))
    made.run(third, tiles(group, programs=3))
    assert same_bits(first, second)
    assert same_bits(first, third)


class TestRefusals:
    def test_limits_are_named(self) -> None:
        spec = bank(600, 2, device=torch.device("cpu")).spec
        with pytest.raises(UnsupportedKernelError, match="300 features are wider than the 256"):
            active.source(spec)

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            ({"blueprint": "lowrank"}, "reads the layer's input"),
            ({"blueprint": "depthwise"}, "position's neighbours"),
            ({"rank": 200}, "rank 200 is above the 128"),
            ({"dtype": "float64"}, "no kernel reads float64"),
            ({}, ""),
        ],
    )
    def test_reasons(self, change: dict[str, object], reason: str) -> None:
        spec = msgspec.structs.replace(bank(64, 8, device=torch.device("cpu")).spec, **change)
        told = active.refuses(spec)
        assert reason in told
        assert bool(told) == bool(reason)


class TestPackedGelu:
    """The float16 GELU is PTX, which no interpreter runs: its instructions are, here, one by one."""

    @staticmethod
    def program() -> list[tuple[str, list[str]]]:
        spec = bank(8, 2, device=torch.device("cpu"), dtype=torch.bfloat16).spec
        text = re.search(r'"""\{(.*?)\}"""', active.source(spec).text, re.DOTALL)
        assert text is not None
        lines = [line.split("//")[0].strip(" ;") for line in text[1].splitlines()]
        return [(line.split()[0], re.split(r",\s*", line.split(None, 1)[1])) for line in lines if line]

    def run(self, u: np.ndarray) -> np.ndarray:
        held: dict[str, np.ndarray] = {"$1": u}

        def read(name: str) -> np.ndarray:
            if name.startswith("0x"):
                low, high = int(name, 16) & 0xFFFF, int(name, 16) >> 16
                assert low == high
                return np.full_like(u, np.uint16(low).view(np.float16))
            return held[name]

        with np.errstate(all="ignore"):
            for operation, (target, *names) in self.program():
                wide = [read(name).astype(np.float64) for name in names if operation != ".reg"]
                if operation == "mov.b32":
                    held[target] = read(names[0])
                elif operation == "mul.rn.f16x2":
                    held[target] = (wide[0] * wide[1]).astype(np.float16)
                elif operation == "fma.rn.f16x2":
                    held[target] = (wide[0] * wide[1] + wide[2]).astype(np.float16)
                elif operation == "fma.rn.sat.f16x2":
                    total = wide[0] * wide[1] + wide[2]
                    held[target] = np.where(np.isnan(total), 0, total.clip(0, 1)).astype(np.float16)
                else:
                    assert operation == ".reg", operation
        return held["$0"]

    @pytest.mark.parametrize("deviation", [0.01, 0.1, 0.5, 1.0, 2.0, 5.0])
    def test_error_is_far_below_that_of_a_bfloat16(self, deviation: float) -> None:
        h = np.random.default_rng(0).normal(size=20000) * deviation
        got = 2 * self.run((h / 2).astype(np.float16)).astype(np.float64)
        want = torch.nn.functional.gelu(torch.from_numpy(h), approximate="tanh").numpy()
        assert np.linalg.norm(got - want) / np.linalg.norm(want) <= 9e-4

    def test_every_finite_value_has_a_finite_result_and_the_tails_are_exact(self) -> None:
        u = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
        u = u[np.isfinite(u)]
        got = self.run(u)
        assert np.isfinite(got).all()
        assert np.array_equal(got[u > 2], u[u > 2])
        assert not got[u < -2].any()

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_what_is_not_finite_shows(self, value: float) -> None:
        assert not np.isfinite(self.run(np.array([value], dtype=np.float16))).any()


@pytest.mark.parametrize(
    ("features", "seeds", "blueprint", "layout", "tile", "variant"),
    [
        (4096, 64, "bottleneck", "last", (64, 1, 4), {}),
        (4096, 1024, "bottleneck", "last", (64, 4, 4), {"once": True, "stash": True, "early": True}),
        (4096, 16, "bottleneck", "channels_first", (32, 1, 8), {"stash": True, "early": True}),
        (300, 70, "affine", "last", (32, 4, 2), {"once": True, "early": True}),
    ],
)
def test_variants_compile_for_an_h200_without_spills(
    features: int,
    seeds: int,
    blueprint: str,
    layout: str,
    tile: tuple[int, int, int],
    variant: dict[str, bool],
) -> None:
    spec = bank(
        features, seeds, device=torch.device("cpu"), rank=16, blueprint=blueprint, layout=layout,
        dtype=torch.bfloat16,
    ).spec  # fmt: skip
    rows, group, warps = tile
    config = TuneConfig(rows, 0, warps, 2, group=group)
    (found,) = compile_all([active.forward_job(spec, config, **variant)])  # type: ignore[arg-type]
    assert isinstance(found, Resources), found
    assert not found.problem
