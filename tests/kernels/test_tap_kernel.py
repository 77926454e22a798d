"""In-projections over the active list: kernels against plain torch in float64."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from morphc.kernels import tap as kernels
from morphc.kernels.compile import Resources, compile_all
from morphc.kernels.reference import tap as reference
from morphc.kernels.spec import KernelSpec
from morphc.kernels.tap import TapKernels, TapPlan, Tiles

BLENDS, ISOLATED, TRAINS = 1, 2, 4
SMALL = Tiles(32, 32, 32, warps=4, group=2)
BOUNDS = {"float32": 1e-5, "bfloat16": 5e-3, "float16": 1e-3}
CPU = torch.device("cpu")


def spec_of(slots, rank, dtype="float32"):
    return KernelSpec(
        kind="tap",
        features=64,
        seeds=32,
        chunk=2,
        slots=slots,
        rank=rank,
        blueprint="lowrank",
        blend="residual",
        epilogue=None,
        layout="last",
        dtype=dtype,
    )


def kernels_of(spec, tap, *, packed=True, **options):
    plan = TapPlan(packed=packed, project=SMALL, tap_gradient=SMALL, weight_gradient=SMALL)
    return TapKernels(spec, tap, CPU, plan=plan, precision="ieee", **options)


def listing_of(slots, listed, flags):
    """An active list: `listed` slots with their `flags`, those that blend first; the rest behind them."""
    order = listed + [slot for slot in range(slots) if slot not in listed]
    shown = flags + [0] * (slots - len(flags))
    blending = sum(flag & BLENDS != 0 for flag in flags)
    header = [len(listed), blending, sum(flag & TRAINS != 0 for flag in flags), 0]
    return torch.tensor(header + order + order + shown + [0] * slots, dtype=torch.int32)


def error(found, expected, scale=0.0):
    """Relative, in norm; `scale` is what an element is expected to be, so that a single one near 0 is no error."""
    usual = max(expected.norm().item(), scale * expected.numel() ** 0.5)
    return (found.double() - expected).norm().item() / (usual or 1.0)


class Case:
    """Random operands, rounded to the type that the kernels get them in, and what float64 makes of them."""

    def __init__(self, slots, rank, tap, rows, listed, flags, dtype="float32", parts=1, draw=0):
        generator = torch.Generator().manual_seed(draw)

        def normal(*shape):
            return torch.randn(*shape, generator=generator)

        self.dtype = getattr(torch, dtype)
        self.spec = spec_of(slots, rank, dtype)
        self.x = normal(rows, tap).to(self.dtype)
        self.weights = [normal(slots, tap, rank) * tap**-0.5 for _ in range(parts)]
        self.biases = [normal(slots, rank) for _ in range(parts)]
        self.dz = normal(parts, len(listed), rows, rank).to(self.dtype)
        self.listed, self.flags = listed, flags
        self.listing = listing_of(slots, listed, flags)
        self.blending = sum(flag & BLENDS != 0 for flag in flags)

    def z(self, biased=True):
        chosen = torch.tensor(self.listed, dtype=torch.int64)
        biases = [bias.double() if biased else None for bias in self.biases]
        return torch.stack(
            [
                reference.project(self.x.double(), weight.double(), bias, chosen)
                for weight, bias in zip(self.weights, biases, strict=True)
            ]
        )

    def tap_gradient(self):
        chosen = torch.tensor(self.listed[: self.blending], dtype=torch.int64)
        return sum(
            reference.tap_gradient(dz[: self.blending].double(), weight.double(), chosen)
            for dz, weight in zip(self.dz, self.weights, strict=True)
        )

    def weight_gradients(self):
        places = [place for place, flag in enumerate(self.flags) if flag & TRAINS]
        chosen = torch.tensor([self.listed[place] for place in places], dtype=torch.int64)
        return [
            reference.weight_gradient(self.x.double(), dz[places].double(), chosen, self.spec.slots)
            for dz in self.dz
        ]


FLAGS = (
    [BLENDS | TRAINS, BLENDS, BLENDS | TRAINS, ISOLATED | TRAINS],
    [BLENDS, BLENDS],
    [ISOLATED | TRAINS] * 3,
    [],
)


@st.composite
def cases(draw):
    slots = draw(st.integers(1, 9))
    flags = draw(st.sampled_from(FLAGS))[:slots]
    listed = draw(st.permutations(range(slots)))[: len(flags)]
    return Case(
        slots=slots,
        rank=draw(st.sampled_from((1, 3, 4, 16, 40))),
        tap=draw(st.sampled_from((1, 24, 48, 70))),
        rows=draw(st.sampled_from((0, 1, 15, 40))),
        listed=list(listed),
        flags=list(flags),
        dtype=draw(st.sampled_from(tuple(BOUNDS))),
        parts=draw(st.sampled_from((1, 2))),
        draw=draw(st.integers(0, 1 << 20)),
    )


@settings(max_examples=16)
@given(case=cases(), packed=st.booleans(), biased=st.booleans())
def test_z_equals_reference(case, packed, biased):
    made = kernels_of(case.spec, case.x.shape[1], packed=packed, biased=biased, parts=len(case.weights))
    z, _ = made.project(
        case.x, case.listing, case.weights, case.biases if biased else (), positions=len(case.listed)
    )
    expected = case.z(biased)
    assert z.shape == expected.shape
    assert z.dtype == case.dtype
    assert error(z, expected, scale=1.0) <= BOUNDS[case.spec.dtype]


@settings(max_examples=16)
@given(case=cases(), packed=st.booleans())
def test_tap_gradient_equals_reference(case, packed):
    made = kernels_of(case.spec, case.x.shape[1], packed=packed, parts=len(case.weights))
    found = made.tap_gradient(case.dz, case.listing, case.weights, None)
    assert found.shape == case.x.shape
    products = len(case.weights) * case.blending * case.spec.rank
    usual = (products / case.x.shape[1]) ** 0.5
    expected = case.tap_gradient() + torch.zeros(case.x.shape)
    assert error(found, expected, usual) <= BOUNDS[case.spec.dtype]


@settings(max_examples=16)
@given(case=cases())
def test_weight_gradient_equals_reference(case):
    made = kernels_of(case.spec, case.x.shape[1], parts=len(case.weights))
    found = [torch.full_like(weight, torch.nan) for weight in case.weights]
    made.weight_gradient(case.x, case.dz, case.listing, found)
    for gradient, expected in zip(found, case.weight_gradients(), strict=True):
        assert error(gradient, expected) <= 1e-5
        assert torch.equal(gradient == 0, expected == 0) or not len(case.x)


def a_case(**changed):
    flags = [BLENDS | TRAINS, BLENDS, ISOLATED | TRAINS]
    given = {"slots": 5, "rank": 4, "tap": 24, "rows": 40, "listed": [3, 0, 4], "flags": flags}
    return Case(**(given | changed))


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "direct"])
def test_isolated_slots_are_left_out_on_demand(packed):
    case = a_case()
    made = kernels_of(case.spec, 24, packed=packed)
    z, _ = made.project(case.x, case.listing, case.weights, positions=2, blending_only=True)
    assert error(z, case.z(biased=False)[:, :2]) <= 1e-5


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "direct"])
def test_an_infinite_weight_stays_in_its_slot(packed):
    case = a_case()
    case.weights[0][0, 7] = torch.inf
    made = kernels_of(case.spec, 24, packed=packed)
    z, _ = made.project(case.x, case.listing, case.weights, positions=3)
    assert not z[0, 1].isfinite().all()
    assert z[0, [0, 2]].isfinite().all()


def test_gradients_of_isolated_slots_do_not_reach_the_tap():
    case = a_case()
    case.dz[0, 2] = torch.nan
    made = kernels_of(case.spec, 24)
    assert error(made.tap_gradient(case.dz, case.listing, case.weights, None), case.tap_gradient()) <= 1e-5


def test_a_bad_gradient_stays_in_its_slot():
    case = a_case()
    expected = case.weight_gradients()[0]
    case.dz[0, 0] = torch.nan
    found = torch.empty_like(case.weights[0])
    kernels_of(case.spec, 24).weight_gradient(case.x, case.dz, case.listing, [found])
    assert found[3].isnan().all()
    assert error(found[[0, 1, 2, 4]], expected[[0, 1, 2, 4]]) <= 1e-5


def test_rows_with_gaps_between_them():
    case = a_case()
    wide = torch.full((40, 40), torch.nan)
    wide[:, 3:27] = case.x
    case.x = wide[:, 3:27]
    made = kernels_of(case.spec, 24)
    z, packed = made.project(case.x, case.listing, case.weights, positions=3)
    assert error(z, case.z(biased=False)) <= 1e-5
    found = torch.empty_like(case.weights[0])
    made.weight_gradient(case.x, case.dz, case.listing, [found])
    assert error(found, case.weight_gradients()[0]) <= 1e-5
    again = made.tap_gradient(case.dz, case.listing, case.weights, packed)
    assert error(again, case.tap_gradient()) <= 1e-5


def test_row_ranges_are_summed_in_one_order():
    case = a_case(rows=300)
    first, second = torch.empty_like(case.weights[0]), torch.empty_like(case.weights[0])
    made = kernels_of(case.spec, 24)
    made.weight_gradient(case.x, case.dz, case.listing, [first])
    made.weight_gradient(case.x, case.dz, case.listing, [second])
    assert torch.equal(first, second)
    assert error(first, case.weight_gradients()[0]) <= 1e-5


def test_kernels_compile_without_spills():
    variants = itertools.product(("bfloat16", "float32"), (1, 2), (64, 4096))
    found = []
    for dtype, parts, rows in variants:
        spec = spec_of(102, 16, dtype)
        plan = kernels.plan(spec, rows, parts)
        found += kernels.jobs(spec, 4096, parts=parts, biased=parts == 2, plan=plan).values()
    jobs = [dataclasses.replace(job, target="cuda:90") for job in found]
    for job, result in zip(jobs, compile_all(jobs, processes=1), strict=True):
        assert isinstance(result, Resources), (job.function, result)
        assert not result.problem, (job.function, job.source.name)
