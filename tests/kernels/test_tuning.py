"""Candidates, the model's guess, and the choice by timing."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_helpers import SIGNATURE, TEMPLATE, blueprint
from test_cross_compile import WAITS, WIDE
from torch import nn

import morphc
from morphc import plantuned
from morphc.errors import KernelError, ResourceError, UnknownNameError
from morphc.kernels import active, codegen, devices, lanes, tuning
from morphc.kernels.codegen import Source
from morphc.kernels.compile import Job, compile_all
from morphc.kernels.spec import KernelSpec, TuneConfig
from morphc.kernels.tuning import Candidate, Run
from morphc.passes.plan import Plan


@pytest.fixture(autouse=True)
def nothing_known() -> None:
    tuning.forget()


def make_spec(
    kind: str = "forward", features: int = 4096, seeds: int = 1024, dtype: str = "bfloat16"
) -> KernelSpec:
    return KernelSpec(
        kind=kind,
        features=features,
        seeds=seeds,
        chunk=-(-features // seeds),
        slots=max(4, seeds // 10),
        rank=16,
        blueprint="bottleneck",
        blend="residual",
        epilogue=None,
        layout="last",
        dtype=dtype,
    )


class TestCandidates:
    @given(
        kind=st.sampled_from(["forward", "backward", "train"]),
        width=st.integers(1, 256),
        seeds=st.integers(1, 5000),
        rows=st.integers(0, 20_000),
        dtype=st.sampled_from(["bfloat16", "float32"]),
        device=st.sampled_from([devices.H200, devices.A100, devices.MI300X, devices.CPU]),
    )
    def test_every_spec_has_a_few_that_can_be_launched(
        self, kind: str, width: int, seeds: int, rows: int, dtype: str, device: devices.Device
    ) -> None:
        spec = make_spec(kind, width * seeds, seeds, dtype)
        found = tuning.candidates(spec, rows, device)
        assert 1 <= len(found) <= 2 * tuning.KEPT
        assert len(set(found)) == len(found)
        for config in found:
            for number in (config.block_rows, config.block_cols, config.num_warps, config.group):
                assert number > 0
                assert number & (number - 1) == 0
            assert config.num_warps <= 16
            assert config.block_cols == config.group * max(1, 1 << (width - 1).bit_length())
            if config.lanes:
                assert config.block_rows % lanes.side(config) == 0
            else:
                assert config.block_rows >= 16, "a dot takes no fewer"
            assert config.programs >= 1

    def test_small_chunks_share_a_dot_and_wide_ones_do_not(self) -> None:
        assert tuning.choose(make_spec(seeds=2048), 4096).group >= 4
        assert {config.group for config in tuning.candidates(make_spec(seeds=16), 4096)} == {1}

    def test_few_rows_get_low_tiles(self) -> None:
        assert {config.block_rows for config in tuning.candidates(make_spec(), 3) if not config.lanes} == {16}

    def test_every_value_of_a_parameter_is_tried(self) -> None:
        found = tuning.candidates(make_spec(), 4096)
        assert {config.num_warps for config in found if not config.lanes} == {2, 4, 8}
        assert {config.programs for config in found if not config.lanes} == {2, 4, 8}
        assert len({config.lanes for config in found}) > 1
        assert {config.num_stages for config in found} == {1, 2, 3}

    def test_other_kinds_have_no_model(self) -> None:
        with pytest.raises(
            UnknownNameError, match=r"unknown kind of kernel over active seeds .forwad.\. Did you mean"
        ):
            tuning.candidates(make_spec("forwad"), 1)

    def test_equal_questions_have_equal_answers(self) -> None:
        tuning.candidates.cache_clear()
        first = tuning.candidates(make_spec(), 4096)
        tuning.candidates.cache_clear()
        assert tuning.candidates(make_spec(), 4096) == first
        assert tuning.choose(make_spec(), 4096) == first[0]


class TestBuckets:
    @given(st.integers(1, 1 << 20))
    def test_a_bucket_is_the_next_power_of_two(self, rows: int) -> None:
        found = tuning.bucket(rows)
        assert found // 2 < rows <= found
        assert tuning.bucket(found) == found

    def test_row_counts_of_a_bucket_share_an_answer(self) -> None:
        spec = make_spec()
        assert tuning.key(spec, 3000) == tuning.key(spec, 4096)
        assert tuning.key(spec, 3000) != tuning.key(spec, 4097)
        assert tuning.choose(spec, 3000) == tuning.choose(spec, 4096)

    def test_a_plans_spec_and_the_one_that_runs_share_an_answer(self) -> None:
        spec = make_spec()
        planned = msgspec.structs.replace(spec, arch="cuda:90", epilogue="relu")
        assert tuning.key(planned, 64) == tuning.key(spec, 64)
        assert tuning.key(msgspec.structs.replace(spec, blend="gate"), 64) != tuning.key(spec, 64)

    def test_answers_of_a_plan_are_given(self) -> None:
        spec, other = make_spec(), make_spec(features=8192)
        config = TuneConfig(16, 16, 2, 1, group=4, programs=3)
        plan = Plan(specs=(spec,), tuned={tuning.key(spec, 100): config})
        tuning.adopt(Plan.from_json(plan.to_json()).tuned)
        assert tuning.lookup(spec, 129) is None
        assert tuning.choose(spec, 128) == tuning.lookup(spec, 65) == config
        assert tuning.choose(spec, 129) != config
        assert tuning.known([spec]) == plan.tuned
        assert tuning.known([other]) == {}

    def test_a_model_compiled_from_a_plan_runs_with_its_answers(self) -> None:
        host, example = nn.Linear(8, 8), (torch.randn(2, 8),)
        made = morphc.report(morphc.compile(host, example)).plan
        spec, config = next(spec for spec in made.specs if spec.kind == "forward"), TuneConfig(16, 16, 2, 1)
        tuning.adopt({tuning.key(spec, 100): config})
        plan = plantuned.with_tuned(made)
        tuning.forget()
        morphc.compile(host, example, plan=made)
        assert tuning.lookup(spec, 100) is None
        morphc.compile(host, example, plan=plan)
        assert tuning.lookup(spec, 100) == config

    def test_a_plan_made_before_the_later_parameters_is_read(self) -> None:
        old = b'{"block_rows":64,"block_cols":16,"num_warps":4,"num_stages":2}'
        assert msgspec.json.decode(old, type=TuneConfig) == TuneConfig(64, 16, 4, 2)


def make(text: str) -> Source:
    with blueprint(text) as spec:
        return codegen.render("blueprint:own", spec, more=1)


def candidate(
    text: str, block: int, warps: int = 4, stages: int = 1, maxnreg: int | None = None, programs: int = 0
) -> Candidate:
    """A kernel that runs nothing and knows its own number."""
    config = TuneConfig(1, block, warps, stages, maxnreg=maxnreg, programs=programs)
    options = {"num_warps": warps, "num_stages": stages} | ({"maxnreg": maxnreg} if maxnreg else {})
    job = Job(make(text), "add", SIGNATURE, {"BLOCK": block}, options=options)

    def start() -> Run:
        def run(call: int) -> None:
            raise AssertionError("nothing runs here")

        run.config = config  # type: ignore[attr-defined]
        return run

    return Candidate(config, (job,), start)


def clock(
    us: Callable[[TuneConfig], float],
) -> tuple[Callable[[Sequence[Run], int], list[float]], list[list[int]]]:
    """A time function with given answers, and what it was asked for: widths of the tiles, round by round."""
    asked: list[list[int]] = []

    def time(runs: Sequence[Run], rounds: int) -> list[float]:
        configs = [run.config for run in runs]  # type: ignore[attr-defined]
        asked.append([config.block_cols for config in configs])
        return [us(config) + (0.001 if rounds == tuning.SHORT else 0.0) for config in configs]

    return time, asked


class TestTune:
    def test_the_fastest_is_kept_with_every_time(self) -> None:
        spec = make_spec()
        offered = [candidate(TEMPLATE, block) for block in (64, 128, 256, 512)]
        time, asked = clock(lambda config: {64: 9.0, 128: 4.0, 256: 4.5, 512: 30.0}[config.block_cols])
        tuned = tuning.tune(spec, 4000, offered, time)
        assert tuned.config.block_cols == 128
        assert tuned.us == 4.0
        assert tuned.key == tuning.key(spec, 4096)
        assert [trial.us for trial in tuned.trials] == [9.001, 4.0, 4.5, 30.001]
        assert asked == [[64, 128, 256, 512], [128, 256]], "the slow ones are not timed at length"
        assert tuning.choose(spec, 3000) == tuned.config
        assert tuning.known([spec]) == {tuned.key: tuned.config}

    def test_equal_times_take_the_earlier_one(self) -> None:
        offered = [candidate(TEMPLATE, block) for block in (256, 64, 128)]
        time, _ = clock(lambda config: 2.0)
        assert tuning.tune(make_spec(), 64, offered, time).config.block_cols == 256

    def test_what_spills_or_does_not_fit_is_not_timed(self) -> None:
        offered = [
            candidate(WAITS, 8192, maxnreg=32),
            candidate(WIDE, 128, warps=8),
            candidate(TEMPLATE, 96),
            candidate(TEMPLATE, 64),
        ]
        time, asked = clock(lambda config: 1.0)
        tuned = tuning.tune(make_spec(), 64, offered, time)
        assert asked == [[64]]
        problems = [trial.problem for trial in tuned.trials]
        assert problems[0].startswith("spills ")
        assert problems[1] == "needs 262144 B of shared memory, cuda:90 has 232448 B"
        assert "power of 2" in problems[2]
        assert problems[3] == ""
        assert tuned.trials[3].registers > 0
        assert [trial.us for trial in tuned.trials[:3]] == [None] * 3

    def test_equal_binaries_are_timed_once(self) -> None:
        offered = [
            candidate(TEMPLATE, 64),
            candidate(TEMPLATE, 64, stages=3),
            candidate(TEMPLATE, 64, programs=2),
        ]
        time, asked = clock(lambda config: 3.0 - config.programs)
        tuned = tuning.tune(make_spec(), 64, offered, time)
        assert asked[0] == [64, 64], "another grid of the same binary is another candidate"
        assert [trial.same_as for trial in tuned.trials] == [None, 0, None]
        assert tuned.trials[1].us == tuned.trials[0].us == 3.001
        assert tuned.config.programs == 2

    def test_a_spec_that_no_tile_fits_names_the_limit(self) -> None:
        time, _ = clock(lambda config: 1.0)
        with pytest.raises(
            ResourceError, match=r"fits no tile of 1: the smallest needs 262144 B.*cuda:90 has 232448 B"
        ):
            tuning.tune(make_spec(), 64, [candidate(WIDE, 128, warps=8)], time)

    def test_nothing_that_compiles_says_why(self) -> None:
        time, _ = clock(lambda config: 1.0)
        with pytest.raises(KernelError, match=r"none of 1 candidates can be used: .*power of 2"):
            tuning.tune(make_spec(), 64, [candidate(TEMPLATE, 96)], time)
        with pytest.raises(KernelError, match="no candidate to tune"):
            tuning.tune(make_spec(), 64, [], time)


def test_products_that_read_what_is_not_theirs_are_told_and_never_a_guess() -> None:
    """Float32 tiles of 64 rows with 8 warps end in an illegal memory access on an H200."""
    spec = make_spec(seeds=64, dtype="float32")
    bad = active.forward_job(spec, TuneConfig(64, 64, 8, 3, group=1, programs=2))
    good = active.forward_job(spec, TuneConfig(64, 64, 4, 3, group=1, programs=2))
    told, fine = compile_all([bad, good], processes=1)
    assert told.problem == "a product of 64x16 by 8 warps, which Triton makes read memory that isn't its own"
    assert not fine.problem
    for seeds in (16, 32, 37, 64):
        for config in tuning.candidates(make_spec(seeds=seeds, dtype="float32"), 4096):
            assert config.block_rows < 64 or config.block_rows >= 16 * config.num_warps
