"""Telemetry's kernels against sums in float64, and its test for dead values against the activations themselves."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from where import DEVICE

from morphc.errors import UnsupportedKernelError
from morphc.kernels import telemetry as kernels
from morphc.kernels.compile import Resources, compile_all
from morphc.kernels.dead import dead_expression, dead_ptx, dead_values
from morphc.kernels.layout import View, thinned, view_of
from morphc.kernels.reference.activations import ACTIVATIONS, activation
from morphc.kernels.reference.chunks import bounds
from morphc.kernels.reference.health import NONFINITE, PEAK, ROW_SQUARES, ROWS, SHIFT, SQUARES, SUM, ZEROS
from morphc.kernels.reference.telemetry import as_rows
from morphc.kernels.spec import TuneConfig
from morphc.kernels.telemetry_plan import ADDS, plan, regions, tiling

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BEFORE = 2
"""Seeds of another site, that stand before those that are measured; as many stand behind."""

SMALL = TuneConfig(block_rows=8, block_cols=16, num_warps=1, num_stages=1, splits=2)
"""A tile that a small activation has several of; the interpreter takes its time."""

ROWS_OF = {"total": SUM, "row_squares": ROW_SQUARES, "squares": SQUARES, "zeros": ZEROS, "peak": PEAK}


@dataclass
class Site:
    """Kernels, their cells, and a state with neighbours on both sides."""

    seeds: int
    kernel: kernels.Telemetry
    sums: Tensor = field(init=False)
    counts: Tensor = field(init=False)
    cells: kernels.Cells | None = None

    def __post_init__(self) -> None:
        seeds = self.seeds + 2 * BEFORE
        self.sums = torch.zeros(8, seeds, dtype=torch.float64, device=DEVICE)
        self.counts = torch.zeros(3, seeds, dtype=torch.int64, device=DEVICE)

    def sample(self, x: Tensor, axis: int = -1, exact: bool = False, **options) -> View:
        view = view_of(x, axis)
        assert view is not None
        if self.cells is None:
            self.cells = self.kernel.new_cells(view, exact=exact)
        self.kernel(x, view, self.cells, self.sums, self.counts, BEFORE, **options)
        return view

    def merge(self) -> None:
        assert self.cells is not None
        self.kernel.merge(self.cells, self.sums, self.counts, BEFORE)

    def shift(self, x: Tensor, axis: int = -1) -> None:
        self.kernel.shift(x, view_of(x, axis), self.sums, self.counts, BEFORE)

    @property
    def own(self) -> slice:
        return slice(BEFORE, BEFORE + self.seeds)

    def found(self) -> dict[str, Tensor]:
        sums = {name: self.sums[row, self.own].cpu() for name, row in ROWS_OF.items()}
        return sums | {
            "rows": self.counts[ROWS, self.own].cpu(),
            "lost": self.counts[NONFINITE, self.own].cpu(),
        }


def site(
    features: int,
    seeds: int,
    dtype: torch.dtype = torch.float32,
    layout: str = "last",
    epilogue: str | None = None,
    near_zero: float = 0.0,
    config: TuneConfig = SMALL,
) -> Site:
    spec = kernels.spec_of(features, seeds, dtype, layout, epilogue)
    return Site(seeds, kernels.Telemetry(spec, near_zero, DEVICE, config))


def expected(
    samples: list[Tensor], seeds: int, shift: Tensor, epilogue: str | None = None, near_zero: float = 0.0
) -> dict[str, Tensor]:
    """In float64, of samples [rows, F] around `shift` [S]."""
    found = {name: torch.zeros(seeds, dtype=torch.float64) for name in (*ROWS_OF, "rows", "lost", "size")}
    for sample in samples:
        x = sample.cpu().float()
        after = activation(epilogue or "identity")(x).to(sample.dtype).float()
        for seed, (start, stop) in enumerate(bounds(x.shape[1], seeds)):
            chunk = x[:, start:stop].double()
            finite = chunk.isfinite()
            d = torch.where(finite, chunk - shift[seed], 0)
            found["total"][seed] += d.sum()
            found["size"][seed] += d.abs().sum()
            found["squares"][seed] += d.square().sum()
            found["row_squares"][seed] += d.sum(1).square().sum()
            found["peak"][seed] = max(found["peak"][seed], torch.where(finite, chunk, 0).abs().max())
            found["zeros"][seed] += (finite & (after[:, start:stop].abs() <= near_zero)).sum()
            found["lost"][seed] += (~finite).sum()
        found["rows"] += len(x)
    return found


def check(measured: Site, samples: list[Tensor], epilogue: str | None = None, near_zero: float = 0.0) -> None:
    """Relative errors of at most 1e-6 as norms over the seeds, of the total against what cancels in it; counts as
    they are; neighbours in the state are left alone."""
    want = expected(samples, measured.seeds, measured.sums[SHIFT, measured.own].cpu(), epilogue, near_zero)
    found = measured.found()
    for name in ("zeros", "peak", "rows", "lost"):
        assert torch.equal(found[name].double(), want[name]), name
    for name, scale in (("total", "size"), ("squares", "squares"), ("row_squares", "row_squares")):
        error = (found[name] - want[name]).norm()
        assert error <= 1e-6 * want[scale].norm(), (name, error, want[scale].norm())
    others = [*range(BEFORE), *range(measured.seeds + BEFORE, measured.seeds + 2 * BEFORE)]
    assert not measured.sums[:, others].any()
    assert not measured.counts[:, others].any()


def values(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal values of which a tenth is zero."""
    x = torch.randn(shape) * (torch.rand(shape) > 0.1)
    return x.to(dtype).to(DEVICE)


def spoil(x: Tensor, share: float = 0.03) -> Tensor:
    """With values that are not finite."""
    kind = torch.randint(3, x.shape).to(x.device)
    bad = torch.tensor([math.inf, -math.inf, math.nan], dtype=x.dtype, device=x.device)[kind]
    return torch.where(torch.rand(x.shape).to(x.device) < share, bad, x)


class TestSums:
    @given(data=st.data())
    @settings(max_examples=10)
    def test_are_those_of_float64(self, data: st.DataObject) -> None:
        draw = data.draw
        features = draw(st.integers(1, 32), "features")
        seeds = draw(st.integers(1, features), "seeds")
        dtype = draw(st.sampled_from(DTYPES), "dtype")
        epilogue = draw(st.sampled_from((None, None, "relu", "gelu", "silu")), "epilogue")
        near_zero = draw(st.sampled_from((0.0, 0.25)), "near_zero")
        torch.manual_seed(draw(st.integers(0, 1 << 16), "seed"))
        if draw(st.booleans(), "channels first"):
            layout, axis = "channels_first", 1
            shape = (draw(st.integers(1, 3)), features, draw(st.sampled_from((1, 3, 8, 20))))
        else:
            layout, axis = "last", -1
            shape = (draw(st.integers(1, 24)), features)
        samples = [values(*shape, dtype=dtype) for _ in range(2)]
        if draw(st.booleans(), "non-finite"):
            samples[0] = spoil(samples[0])
        if view_of(samples[0], axis).walk == "last":
            layout = "last"
        measured = site(features, seeds, dtype, layout, epilogue, near_zero)
        for sample in samples:
            measured.sample(sample, axis)
        measured.merge()
        check(measured, [as_rows(sample, axis) for sample in samples], epilogue, near_zero)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize(
        ("rows", "features", "seeds"),
        [
            pytest.param(1, 12, 4, id="one row"),
            pytest.param(19, 16, 16, id="chunks of one"),
            pytest.param(9, 48, 1, id="one chunk"),
            pytest.param(9, 64, 1, id="one chunk, flat"),
            pytest.param(13, 103, 10, id="nothing divides"),
            pytest.param(7, 40, 16, id="chunks of three and two"),
            pytest.param(5, 24, 20, id="chunks of two and one"),
            pytest.param(6, 160, 3, id="chunks of several parts"),
            pytest.param(33, 32, 8, id="flat, rows left over"),
            pytest.param(37, 24, 12, id="pairs, rows left over"),
            pytest.param(9, 18, 9, id="pairs, vectors of two"),
            pytest.param(20, 23, 11, id="pairs behind a chunk of three"),
        ],
    )
    def test_of_shapes_at_the_edge(self, rows: int, features: int, seeds: int, dtype: torch.dtype) -> None:
        measured = site(features, seeds, dtype)
        samples = [values(rows, features, dtype=dtype)]
        measured.sample(samples[0])
        measured.merge()
        check(measured, samples)

    def test_of_no_rows_are_none(self) -> None:
        measured = site(8, 2)
        measured.kernel(
            torch.zeros(0, 8),
            View("last", 0, 8, 1),
            kernels.Cells(2, 1, DEVICE, False),
            measured.sums,
            measured.counts,
        )
        assert not measured.counts.any()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("begin", [0, 1, 16])
    def test_of_rows_with_gaps_between(self, begin: int, dtype: torch.dtype) -> None:
        wide = values(11, 64, dtype=dtype)
        x = wide[:, begin : begin + 24]
        measured = site(24, 5, dtype)
        assert measured.sample(x).stride == 64
        measured.merge()
        check(measured, [x])

    def test_of_tiles_of_every_size(self) -> None:
        x = values(40, 48)
        for config in (
            TuneConfig(64, 64, 4, 1, splits=1),
            TuneConfig(16, 8, 1, 1, splits=5),
            TuneConfig(2, 32, 2, 1, splits=10),
        ):
            for seeds in (12, 7):
                measured = site(48, seeds, config=config)
                measured.sample(x)
                measured.merge()
                check(measured, [x])

    def test_agree_bit_for_bit(self) -> None:
        x = spoil(values(20, 24, dtype=torch.bfloat16))
        found = []
        for _ in range(2):
            measured = site(24, 7, torch.bfloat16)
            measured.sample(x)
            measured.merge()
            found.append((measured.sums, measured.counts))
        assert torch.equal(found[0][0], found[1][0])
        assert torch.equal(found[0][1], found[1][1])

    def test_of_one_chunk_take_no_harm_from_another(self) -> None:
        x = values(20, 42)
        spoilt = x.clone()
        spoilt[3, 8] = math.inf
        spoilt[4, 9] = math.nan
        found = []
        for sample in (x, spoilt):
            measured = site(42, 6)
            measured.sample(sample)
            measured.merge()
            found.append(measured.found())
        others = [0, 2, 3, 4, 5]
        for name in ROWS_OF:
            torch.testing.assert_close(found[0][name][others], found[1][name][others], rtol=1e-6, atol=1e-6)
        assert found[1]["lost"].tolist() == [0, 2, 0, 0, 0, 0]

    @pytest.mark.parametrize(
        ("shape", "seeds"),
        [
            pytest.param((8192, 16), 8, id="rows"),
            pytest.param((1, 512, 31), 1, id="positions"),
        ],
    )
    def test_of_long_runs_keep_their_digits(self, shape: tuple[int, ...], seeds: int) -> None:
        """Squares of values with few digits are rounded the same way again and again."""
        x = (0.5 * torch.randn(shape) - 2).to(torch.bfloat16).to(DEVICE)
        layout, axis = ("last", -1) if len(shape) == 2 else ("channels_first", 1)
        config = TuneConfig(8, 16, 1, 1, splits=1)
        measured = site(shape[1], seeds, torch.bfloat16, layout, config=config)
        measured.sample(x, axis)
        measured.merge()
        check(measured, [as_rows(x, axis)])

    def test_that_overflow_are_infinite_and_no_others(self) -> None:
        x = values(8, 16)
        x[2, 5] = 1e30
        measured = site(16, 4)
        measured.sample(x)
        measured.merge()
        found = measured.found()
        assert found["squares"].isfinite().tolist() == [True, False, True, True]
        assert found["lost"].tolist() == [0, 0, 0, 0]
        assert found["peak"][1] == torch.tensor(1e30).double()


class TestShift:
    def test_keeps_the_variance_of_values_far_from_zero(self) -> None:
        x = 1000 + 0.01 * torch.randn(64, 24).to(DEVICE)
        for seeds in (6, 5):
            measured = site(24, seeds)
            measured.shift(x)
            measured.sample(x)
            measured.merge()
            check(measured, [x])
            shift = measured.sums[SHIFT, measured.own].cpu()
            assert ((shift - 1000).abs() < 0.01).all()
            assert torch.equal(shift, shift.float().double())
            variance = measured.found()["squares"] / 64 / (24 / seeds)
            assert ((variance - 1e-4).abs() < 5e-5).all()

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_is_subtracted_from_pairs(self, dtype: torch.dtype) -> None:
        x = (300 + 8 * torch.randn(40, 24)).to(dtype).to(DEVICE)
        x[:, ::2] += 24
        measured = site(24, 12, dtype)
        measured.shift(x)
        assert measured.sums[SHIFT, measured.own].all()
        samples = [x, spoil(x)]
        for sample in samples:
            measured.sample(sample)
        measured.merge()
        check(measured, samples)

    def test_is_zero_where_that_is_near(self) -> None:
        x = values(64, 24) + 2.0
        measured = site(24, 6)
        measured.shift(x)
        assert not measured.sums.any()

    def test_is_found_per_chunk_from_finite_values(self) -> None:
        x = values(3, 12, 30)
        x[:, 4:8] = 500.0 + x[:, 4:8]
        x[0, 5, 2] = math.nan
        measured = site(12, 3, layout="channels_first")
        measured.shift(x, 1)
        shift = measured.sums[SHIFT, measured.own].cpu()
        assert (shift[0], shift[2]) == (0, 0)
        assert abs(shift[1] - 500) < 1
        measured.sample(x, 1)
        measured.merge()
        check(measured, [as_rows(x, 1)])

    def test_stays_once_something_was_measured(self) -> None:
        x = 1000 + torch.randn(16, 8).to(DEVICE)
        measured = site(8, 2)
        measured.sample(x)
        measured.merge()
        measured.shift(x)
        assert not measured.sums[SHIFT].any()


class TestCells:
    @pytest.mark.parametrize("exact", [False, True])
    def test_add_up_until_they_are_merged(self, exact: bool) -> None:
        samples = [values(10, 12) for _ in range(3)]
        measured = site(12, 5)
        measured.sample(samples[0], exact=exact)
        measured.sample(samples[1])
        assert not measured.sums.any()
        measured.merge()
        check(measured, samples[:2])
        measured.merge()
        check(measured, samples[:2])
        measured.sample(samples[2], merged=True)
        check(measured, samples)

    def test_are_merged_every_few_samples(self) -> None:
        measured = site(4, 1)
        x = values(2, 4)
        for _ in range(kernels.MERGE_EVERY + 1):
            measured.sample(x)
        assert measured.counts[ROWS, BEFORE] == 2 * kernels.MERGE_EVERY
        assert measured.cells is not None
        assert measured.cells.pending == 1

    def test_that_were_cleared_hold_nothing(self) -> None:
        measured = site(8, 2)
        measured.sample(values(6, 8))
        assert measured.cells is not None
        measured.cells.clear()
        measured.merge()
        assert not measured.sums.any()
        assert not measured.counts.any()

    def test_grow_where_an_activation_needs_more(self) -> None:
        samples = [values(8, 12), values(30, 12)]
        measured = site(12, 3)
        measured.cells = kernels.Cells(3, 1, DEVICE, False)
        measured.sample(samples[0])
        before = measured.cells.part
        measured.cells.enlarge(2)
        assert measured.cells.part.data_ptr() != before.data_ptr()
        measured.sample(samples[1])
        measured.merge()
        check(measured, samples)

    def test_count_exactly(self) -> None:
        """However many rows, no float32 count of a cell can lose one in a sample, nor a 16-bit count of a thread."""
        for features, seeds in ((4096, 1), (4096, 4096), (4096, 100)):
            spec = kernels.spec_of(features, seeds, torch.bfloat16)
            config = TuneConfig(64, 64, 4, 1, splits=1)
            view = View("last", 1 << 26, features, 1)
            planned = plan(spec, config, view, 16)
            assert planned.samples >= 1
            assert planned.span * spec.chunk * planned.samples <= 1 << 24
            assert planned.span * planned.splits >= view.rows
            for region in regions(features, seeds):
                tiled = tiling(spec, region, config, 16)
                assert planned.span // tiled.block_rows * tiled.parts <= ADDS


class TestClock:
    def test_lets_each_nth_launch_measure(self) -> None:
        samples = [values(12, 16) for _ in range(5)]
        measured = site(16, 4)
        view = view_of(samples[0], -1)
        clock = measured.kernel.new_clock(view)
        for sample in samples:
            measured.sample(sample, clock=clock, every=2)
        measured.merge()
        check(measured, samples[::2])


class TestThinned:
    @given(
        st.integers(1, 400), st.integers(1, 60), st.integers(1, 50), st.integers(0, 9), st.integers(0, 5000)
    )
    def test_rows_are_those_of_the_activation_and_no_more_than_asked_for(
        self, samples: int, features: int, inner: int, gap: int, values: int
    ) -> None:
        for view in (
            View("last", samples, features + gap, 1),
            View("channels_first", samples * inner, features * inner, inner),
        ):
            found, total = thinned(view, features, values), view.rows * features
            step, beside = divmod(found.stride, view.stride)
            assert beside == 0
            assert step % 2 == 1
            assert found.inner == view.inner
            assert found.rows == len(range(0, samples, step)) * view.inner
            if not values or total <= values:
                assert found == view
            elif step < samples - 1:
                assert found.rows * features < values + features * view.inner

    def test_strides_stay_within_what_kernels_multiply(self) -> None:
        found = thinned(View("last", 1 << 20, 1 << 16, 1), 1 << 16, 1 << 23)
        assert found.stride < 1 << 22
        assert thinned(View("last", 4, 1 << 23, 1), 8, 8) == View("last", 4, 1 << 23, 1)
        assert thinned(View("channels_first", 1 << 20, 1 << 29, 1 << 19), 1 << 10, 1).stride < 1 << 30


class TestWritten:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("epilogue", kernels.WRITTEN)
    def test_activation_is_as_good_as_torch(self, epilogue: str, dtype: torch.dtype) -> None:
        x = (3 * torch.randn(24, 30)).to(dtype).to(DEVICE)
        y = torch.empty_like(x)
        measured = site(30, 4, dtype, epilogue=epilogue)
        measured.sample(x, y=y)
        measured.merge()
        check(measured, [x], epilogue)
        exact = activation(epilogue)(x.double())
        error, allowed = (y.double() - exact).norm(), (activation(epilogue)(x).double() - exact).norm()
        if dtype == torch.float32:
            # The device's own special functions are good to two units in the last place.
            allowed += 2**-22 * exact.norm()
        elif DEVICE.type == "cpu" and dtype == torch.bfloat16:
            allowed += 2**-7 * exact.norm()  # the interpreter cuts bfloat16 off
        assert error <= 1.001 * allowed

    @pytest.mark.parametrize("epilogue", kernels.WRITTEN)
    def test_activation_of_non_finite_values_is_that_of_torch(self, epilogue: str) -> None:
        x = torch.tensor([[math.inf, -math.inf, math.nan, 0.0, -1e30, 1e30, 80.0, -80.0]], device=DEVICE)
        for dtype in (torch.float32, torch.bfloat16):
            y = torch.empty(1, 8, dtype=dtype, device=DEVICE)
            site(8, 2, dtype, epilogue=epilogue).sample(x.to(dtype), y=y)
            want = activation(epilogue)(x.to(dtype))
            want[0, 0] = math.inf  # torch's vectorized gelu knows no erf of infinity on some CPUs
            torch.testing.assert_close(y, want, equal_nan=True)

    def test_by_launches_that_do_not_measure_as_well(self) -> None:
        for features, seeds in ((16, 4), (18, 4)):
            measured = site(features, seeds, epilogue="relu")
            x = values(37, features)
            clock = measured.kernel.new_clock(view_of(x, -1))
            for _ in range(2):
                y = torch.full_like(x, math.nan)
                measured.sample(x, y=y, clock=clock, every=2)
                assert torch.equal(y, x.relu())
            measured.merge()
            check(measured, [x], "relu")

    def test_for_features_that_are_not_last(self) -> None:
        measured = site(9, 4, torch.float16, "channels_first", "silu")
        x = values(2, 9, 20, dtype=torch.float16)
        clock = measured.kernel.new_clock(view_of(x, 1))
        for _ in range(2):
            y = torch.full_like(x, math.nan)
            measured.sample(x, 1, y=y, clock=clock, every=2)
            torch.testing.assert_close(y, torch.nn.functional.silu(x))
        measured.merge()
        check(measured, [as_rows(x, 1)], "silu")

    def test_over_the_activation_itself_is_refused(self) -> None:
        x = values(2, 8)
        with pytest.raises(UnsupportedKernelError, match="can't be written over x"):
            site(8, 2, epilogue="relu").sample(x, y=x)

    def test_of_another_function_is_refused(self) -> None:
        with pytest.raises(UnsupportedKernelError, match="tanh is not written along; relu, gelu"):
            site(8, 2, epilogue="tanh").sample(values(2, 8), y=values(2, 8))


def every_value(dtype: torch.dtype) -> Tensor:
    """All finite values of a 16-bit type, as float32."""
    found = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype).float()
    return found[found.isfinite()]


def in_ptx(lines: list[str], x: Tensor, dtype: torch.dtype) -> Tensor:
    """What `dead_ptx` says of x, one value a register; knows the instructions that it uses."""
    registers: dict[str, Tensor] = {"$1": x.to(dtype)}

    def bits(text: str) -> Tensor:
        number = int(text, 0) & 0xFFFF
        return torch.tensor(number - (number >> 15 << 16), dtype=torch.int16).view(dtype)

    compare = {"eq": torch.eq, "le": torch.le, "ge": torch.ge}
    for line in lines:
        name, *operands = line.rstrip(";").replace(",", "").split()
        kind, *rest = name.split(".")
        into, *given = operands
        if kind == "mov":
            registers[into] = bits(given[0])
        elif kind == "abs":
            registers[into] = registers[given[0]].abs()
        elif kind == "set":
            registers[into] = compare[rest[0]](registers[given[0]], registers[given[1]])
        else:
            combine = {"and": torch.logical_and, "or": torch.logical_or}[kind]
            registers[into] = combine(registers[given[0]], registers[given[1]])
    return registers["$0"].expand(x.shape)


class TestDead:
    @pytest.mark.parametrize("near_zero", [0.0, 1e-3, 0.3])
    @pytest.mark.parametrize("epilogue", [None, *kernels.WRITTEN, "mish", "logsigmoid", "elu"])
    def test_values_are_those_of_torch(self, epilogue: str | None, near_zero: float) -> None:
        """Of all that there are, as they are stored."""

        class tl:  # what the expression calls
            abs = torch.abs

        for dtype in (torch.bfloat16, torch.float16):
            v = every_value(dtype)
            want = activation(epilogue or "identity")(v).to(dtype).float().abs() <= near_zero
            name = str(dtype).removeprefix("torch.")
            dead = dead_values(epilogue, near_zero, name)
            assert torch.equal(eval(dead_expression(dead), {"v": v, "tl": tl}), want)
            assert torch.equal(in_ptx(dead_ptx(dead, name), v, dtype).bool(), want)

    @pytest.mark.parametrize("near_zero", [0.0, 0.01])
    @pytest.mark.parametrize("epilogue", [None, "relu", "gelu", "gelu_tanh", "silu"])
    def test_values_of_float32_are_those_of_torch(self, epilogue: str | None, near_zero: float) -> None:
        """But for a few beside an end, where |act(v)| is off by more than it differs from near_zero."""

        class tl:
            abs = torch.abs

        dead = dead_values(epilogue, near_zero, "float32")
        ends = torch.tensor([end for interval in dead for end in interval if math.isfinite(end)])
        around = [torch.nextafter(ends, torch.tensor(side)) for side in (-math.inf, math.inf)]
        v = torch.cat(
            (ends, *around, torch.tensor([0.0, -0.0, 1e-30, -200.0, 200.0]), 3 * torch.randn(20000))
        )
        v = v[: len(v) // 64 * 64]  # whole vectors, since torch takes another function for what is left over
        want = activation(epilogue or "identity")(v).abs() <= near_zero
        wrong = eval(dead_expression(dead), {"v": v, "tl": tl}) != want
        exact = activation(epilogue or "identity")(v.double()).abs()
        tied = (exact - near_zero).abs() <= 2**-22 * v.abs()
        beside = ((v[:, None] - ends) / ends.clamp(max=-1e-9)).abs().amin(1) < 0.003
        assert not (wrong & ~(tied & beside)).any()
        assert wrong.sum() <= 20
        if epilogue in (None, "relu"):
            assert not wrong.any()

    @pytest.mark.parametrize("epilogue", ["silu", "gelu", "mish", "relu_squared"])
    def test_values_are_rounded_as_they_are_stored(self, epilogue: str) -> None:
        def dead(value: float, dtype: str) -> bool:
            return any(low <= value <= high for low, high in dead_values(epilogue, 0.0, dtype))

        small = {"silu": -21.0, "gelu": -(2.0**-24), "mish": -21.0, "relu_squared": 1e-4}[epilogue]
        stored = activation(epilogue)(torch.tensor(small)).half()
        assert stored == 0
        assert dead(small, "float16")
        assert not dead(small, "bfloat16")

    def test_counts_of_two_in_a_register_come_apart(self) -> None:
        """The identity behind `_count_two`: masks are subtracted as one number, borrows and all."""
        low, high = torch.randint(0, 65536, (2, 1000), dtype=torch.int64)
        kept = (-65535 * (low + 65536 * high)) & 0xFFFFFFFF
        told = (kept * 65537) & 0xFFFFFFFF
        assert torch.equal(told & 0xFFFF, low)
        assert torch.equal(told >> 16, high)

    def test_of_every_activation_have_a_simple_test(self) -> None:
        for epilogue in ACTIVATIONS:
            assert kernels.refuses(kernels.spec_of(64, 8, torch.bfloat16, epilogue=epilogue)) == ""


class TestRefusals:
    def test_name_what_is_wrong(self) -> None:
        assert "float64" in kernels.refuses(kernels.spec_of(64, 8, torch.float64))
        assert "8192 features" in kernels.refuses(kernels.spec_of(8192, 1, torch.float32))
        with pytest.raises(UnsupportedKernelError, match="no kernel reads float64"):
            site(8, 2, torch.float64)


class TestCompiled:
    """For GPUs that this machine doesn't have."""

    def test_nothing_spills_and_everything_compiles(self) -> None:
        jobs = []
        for rows, features, seeds, dtype, epilogue, layout, variant, target in (
            (4096, 4096, 64, torch.bfloat16, "gelu", "last", kernels.Variant(write=True), "cuda:90"),
            (8192, 8192, 4096, torch.bfloat16, None, "last", kernels.Variant(clocked=True), "cuda:90"),
            (4096, 4096, 4096, torch.bfloat16, None, "last", kernels.Variant(), "cuda:90"),
            (4096, 4096, 100, torch.bfloat16, None, "last", kernels.Variant(), "cuda:90"),
            (4096, 4096, 1024, torch.float32, None, "last", kernels.Variant(dense=False), "cuda:90"),
            (4096, 256, 64, torch.float16, None, "channels_first", kernels.Variant(dense=False), "cuda:90"),
            (128, 2048, 1024, torch.bfloat16, None, "last", kernels.Variant(), "cuda:80"),
            (128, 2048, 1024, torch.bfloat16, None, "last", kernels.Variant(), "cuda:100"),
            (128, 2048, 1024, torch.float32, None, "last", kernels.Variant(), "hip:gfx942"),
        ):
            spec = kernels.spec_of(features, seeds, dtype, layout, epilogue)
            jobs.append(kernels.job(spec, kernels.choose(spec, rows), variant, target=target))
        jobs += [kernels.merge_job(spec), kernels.merge_job(spec, 32, exact=True), kernels.shift_job(spec)]
        for job, result in zip(jobs, compile_all(jobs), strict=True):
            assert isinstance(result, Resources), (job.source.name, job.target, result.problem)
            assert not result.problem, (job.source.name, job.target, result.problem)
