"""One tick of the lifecycle and the health report: the kernels against plain torch, and both against the table."""

from __future__ import annotations

import copy
import dataclasses
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from where import DEVICE

from morphc.errors import SeedError
from morphc.kernels import lifecycle as kernels
from morphc.kernels.compile import Resources, compile_all
from morphc.kernels.reference import lifecycle as reference
from morphc.kernels.reference.health import HEALTH, NONFINITE, PEAK, ROW_SQUARES, ROWS, SQUARES, ZEROS
from morphc.kernels.reference.health import health as reference_health
from morphc.kernels.reference.lifecycle import CURVES, HISTORY, PAUSED, Refusal, graft_code
from morphc.lifecycle import MINIMUM_TICKS, TABLE, Lifecycle
from morphc.runtime.state import SeedState

L = Lifecycle
ARRAYS = (
    "lifecycle",
    "slot",
    "ticks_in_state",
    "graft",
    "parent_state",
    "error_count",
    "embargo",
    "alpha",
    "score",
    "history",
    "transitions",
    "tick",
)
BACKENDS = ("kernel", "torch")


def policy(**numbers):
    return reference.policy(DEVICE, **numbers)


def tick(backend, arrays, told, request=None, ticker=None):
    """One tick on a backend; what was refused, or None."""
    if backend == "torch":
        return reference.advance(arrays, told, request)
    return (ticker or kernels.Ticker(told)).advance(arrays, request)


def at_random(seeds, generator, device=DEVICE):
    """Seeds in any state, as full of numbers as can be."""

    def ints(low, high):
        return torch.randint(low, high, (seeds,), generator=generator, dtype=torch.int32)

    arrays = SeedState([1] * seeds, device)
    arrays.lifecycle.copy_(ints(0, len(L)))
    arrays.slot.copy_(ints(-1, 5))
    arrays.ticks_in_state.copy_(ints(0, 120))
    arrays.parent_state.copy_(ints(0, len(L)))
    arrays.error_count.copy_(ints(0, 4))
    arrays.embargo.copy_(ints(0, 3))
    arrays.transitions.copy_(ints(0, 25))
    arrays.history.copy_(torch.randint(0, 99, arrays.history.shape, generator=generator, dtype=torch.int32))
    pauses = ints(0, 60) << reference.PAUSE_SHIFT
    curves = ints(0, 4) << reference.CURVE_SHIFT  # one more than there are
    arrays.graft.copy_(torch.where(ints(0, 4) == 0, -1, pauses | curves | ints(0, 2) * PAUSED | ints(0, 16)))
    arrays.alpha.copy_(torch.rand(seeds, generator=generator))
    arrays.score.copy_(torch.rand(seeds, generator=generator))
    arrays.tick.fill_(int(torch.randint(0, 1 << 20, (), generator=generator)))
    return arrays


def one(state, **values):
    """A single seed."""
    arrays = SeedState([4], DEVICE)
    arrays.lifecycle.fill_(int(state))
    for name, value in values.items():
        getattr(arrays, name).fill_(value)
    return arrays


def ask(*states):
    return torch.tensor([int(state) for state in states], dtype=torch.int32, device=DEVICE)


def assert_same(mine, theirs):
    for name in ARRAYS:
        assert torch.equal(getattr(mine, name), getattr(theirs, name)), name


@given(
    seeds=st.sampled_from((1, 2, 15, 1023, 1024, 1025, 3000)),
    draw=st.integers(0, 1 << 30),
    requested=st.booleans(),
    duration=st.sampled_from((1, 7, 30)),
    embargo=st.integers(0, 4),
)
def test_kernel_equals_reference_over_random_states(seeds, draw, requested, duration, embargo):
    generator = torch.Generator().manual_seed(draw)
    mine = at_random(seeds, generator)
    theirs = copy.deepcopy(mine)
    told = policy(duration=duration, embargo=embargo)
    ticker = kernels.Ticker(told)
    for _ in range(3):
        request = None
        if requested:
            request = torch.randint(-2, len(L) + 2, (seeds,), generator=generator, dtype=torch.int32)
            request = request.to(DEVICE)
        refused = tick("kernel", mine, told, request, ticker)
        expected = tick("torch", theirs, told, request)
        assert_same(mine, theirs)
        if requested:
            assert refused.dtype == torch.int8
            assert torch.equal(refused, expected)
        else:
            assert refused is None
            assert expected is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_pair_of_states_follows_the_table(backend):
    pairs = [(source, target) for source in L for target in L]
    arrays = SeedState([1] * len(pairs), DEVICE)
    arrays.lifecycle.copy_(ask(*(source for source, _ in pairs)))
    arrays.ticks_in_state.fill_(1000)
    arrays.embargo.copy_(torch.tensor([3 if source is L.CULLED else 0 for source, _ in pairs]))
    arrays.slot.fill_(2)
    arrays.alpha.fill_(0.25)
    refused = tick(backend, arrays, policy(), ask(*(target for _, target in pairs)))

    for row, (source, target) in enumerate(pairs):
        legal = target in TABLE[source].leaves_to
        held = source is L.CULLED and legal
        expected = Refusal.EMBARGO if held else Refusal.NONE if legal else Refusal.ILLEGAL
        assert refused[row] == expected, (source, target)
        lapses = source is L.CANCELLED
        moves = (legal and not held) or lapses
        now = (target if legal else L.DORMANT) if moves else source
        assert arrays.lifecycle[row] == now
        assert arrays.transitions[row] == moves
        if not moves:
            assert arrays.ticks_in_state[row] == 1001
            assert arrays.slot[row] == 2
            assert (arrays.history[row] == -1).all()
            continue
        assert arrays.ticks_in_state[row] == 0
        assert arrays.parent_state[row] == source
        assert arrays.history[row, 0].tolist() == [1, source, now]
        assert (arrays.history[row, 1:] == -1).all()
        assert arrays.slot[row] == (2 if TABLE[now].holds_slot else -1)
        if now is L.GRAFTING:
            assert arrays.alpha[row] == 0.25
        else:
            assert arrays.alpha[row] == (1.0 if TABLE[now].forward == "blend" else 0.0)
        assert arrays.error_count[row] == (now is L.ROLLED_BACK)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("state", MINIMUM_TICKS, ids=lambda state: state.name)
def test_a_move_waits_for_the_minimum_ticks_and_a_rollback_does_not(backend, state):
    told = policy()
    forward = next(target for target in TABLE[state].leaves_to if target is not L.ROLLED_BACK)
    arrays = one(state)
    for _ in range(MINIMUM_TICKS[state] - 1):
        assert tick(backend, arrays, told, ask(forward)).tolist() == [Refusal.EARLY]
        assert arrays.lifecycle.item() == state
    assert tick(backend, arrays, told, ask(forward)).tolist() == [Refusal.NONE]
    assert arrays.lifecycle.item() == forward

    early = one(state)
    assert tick(backend, early, told, ask(L.ROLLED_BACK)).tolist() == [Refusal.NONE]
    assert early.lifecycle.item() == L.ROLLED_BACK


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_minimum_ticks_are_the_policys(backend):
    arrays = one(L.TRAINING)
    assert (
        tick(backend, arrays, policy(minimum_ticks={L.TRAINING: 2}), ask(L.GRAFTING)).item() == Refusal.EARLY
    )
    assert (
        tick(backend, arrays, policy(minimum_ticks={L.TRAINING: 2}), ask(L.GRAFTING)).item() == Refusal.NONE
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("curve", CURVES)
def test_alpha_follows_its_curve_and_ends_at_one(backend, curve):
    told = policy(duration=30)
    arrays = one(L.GRAFTING, graft=graft_code(curve))
    seen = [0.0]
    for _ in range(40):
        tick(backend, arrays, told)
        seen.append(arrays.alpha.item())
    assert all(low < high for low, high in pairwise(seen[:31]))
    assert seen[30:] == [1.0] * 11
    assert seen[15] == pytest.approx(0.5)
    assert seen[10] == pytest.approx({"linear": 1 / 3, "cosine": 0.25, "sigmoid": 0.15424}[curve], abs=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_pause_keeps_alpha_and_the_ramp_goes_on_where_it_stood(backend):
    told = policy(duration=10)
    arrays = one(L.GRAFTING, graft=graft_code())
    for _ in range(4):
        tick(backend, arrays, told)
    assert arrays.alpha.item() == pytest.approx(0.4)
    arrays.graft |= PAUSED
    for _ in range(3):
        tick(backend, arrays, told)
        assert arrays.alpha.item() == pytest.approx(0.4)
    arrays.graft &= ~PAUSED
    tick(backend, arrays, told)
    assert arrays.alpha.item() == pytest.approx(0.5)
    assert arrays.ticks_in_state.item() == 8


@pytest.mark.parametrize("backend", BACKENDS)
def test_alpha_never_falls_along_a_ramp(backend):
    told = policy(duration=10)
    arrays = one(L.GRAFTING, graft=-1, alpha=0.75)
    seen = []
    for _ in range(12):
        tick(backend, arrays, told)
        seen.append(arrays.alpha.item())
    assert seen[:7] == [0.75] * 7
    assert seen == sorted(seen)
    assert seen[-1] == 1.0


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_new_graft_forgets_the_pauses_of_the_last_one(backend):
    code = graft_code("cosine", strategy=5)
    arrays = one(L.TRAINING, ticks_in_state=200, graft=code | PAUSED | 7 << reference.PAUSE_SHIFT)
    tick(backend, arrays, policy(), ask(L.GRAFTING))
    assert arrays.lifecycle.item() == L.GRAFTING
    assert arrays.graft.item() == code


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_culled_seed_is_dormant_again_when_its_embargo_is_over(backend):
    told = policy(embargo=3)
    arrays = one(L.EVALUATING, ticks_in_state=50, alpha=1.0, slot=1)
    tick(backend, arrays, told, ask(L.CULLED))
    states = []
    for _ in range(4):
        states.append((L(arrays.lifecycle.item()), arrays.embargo.item()))
        tick(backend, arrays, told)
    assert states == [(L.CULLED, 3), (L.CULLED, 2), (L.CULLED, 1), (L.DORMANT, 0)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_embargo_outlives_a_reset_and_bars_germination(backend):
    told = policy(embargo=3)
    arrays = one(L.TRAINING)
    tick(backend, arrays, told, ask(L.ROLLED_BACK))
    assert tick(backend, arrays, told, ask(L.DORMANT)).item() == Refusal.NONE
    assert tick(backend, arrays, told, ask(L.GERMINATED)).item() == Refusal.EMBARGO
    assert tick(backend, arrays, told, ask(L.GERMINATED)).item() == Refusal.NONE
    assert arrays.error_count.item() == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_longer_embargo_stays(backend):
    arrays = one(L.TRAINING, embargo=9)
    tick(backend, arrays, policy(embargo=3), ask(L.ROLLED_BACK))
    assert arrays.embargo.item() == 8


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_history_is_a_ring_of_the_last_ten_moves(backend):
    told = policy(minimum_ticks={})
    arrays = one(L.DORMANT)
    way = (L.GERMINATED, L.TRAINING, L.GRAFTING, L.ROLLED_BACK, L.DORMANT)
    moves = []
    for number, target in enumerate(way * 3, start=1):
        moves.append([number, arrays.lifecycle.item(), target])
        assert tick(backend, arrays, told, ask(target)).item() == Refusal.NONE
    ring = arrays.history[0].tolist()
    count = arrays.transitions.item()
    assert count == 15
    assert [ring[number % HISTORY] for number in range(count - HISTORY, count)] == moves[-HISTORY:]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tick_advances_the_clock_once_whatever_the_seeds(backend):
    told = policy()
    for seeds in (0, 1, 5000):
        arrays = SeedState([1] * seeds, DEVICE)
        arrays.tick.fill_((1 << 40) + 5)
        ticker = kernels.Ticker(told)
        tick(backend, arrays, told, ticker=ticker)
        tick(backend, arrays, told, ticker=ticker)
        assert arrays.tick.item() == (1 << 40) + 7


def test_arrays_off_the_16_byte_grid_are_advanced_all_the_same():
    mine = at_random(100, torch.Generator().manual_seed(3))
    theirs = copy.deepcopy(mine)
    shifted = torch.empty(101, dtype=torch.int32, device=DEVICE)[1:]
    mine.lifecycle = shifted.copy_(mine.lifecycle)
    assert mine.lifecycle.data_ptr() % 16 != 0
    kernels.Ticker(policy()).advance(mine)
    reference.advance(theirs, policy())
    assert_same(mine, theirs)


@pytest.mark.parametrize(
    "request_",
    [
        torch.zeros(4, dtype=torch.int32, device=DEVICE),
        torch.zeros(5, dtype=torch.int64, device=DEVICE),
        torch.zeros(10, dtype=torch.int32, device=DEVICE)[::2],
    ],
    ids=["shape", "dtype", "stride"],
)
def test_a_request_that_does_not_fit_is_refused_before_anything_changes(request_):
    arrays = SeedState([1] * 5, DEVICE)
    with pytest.raises(SeedError, match="contiguous int32 tensor of 5 states"):
        kernels.Ticker(policy()).advance(arrays, request_)
    assert arrays.tick.item() == 0


def test_a_million_seeds_advance_in_the_reference():
    generator = torch.Generator().manual_seed(1)
    arrays = at_random(1 << 20, generator, torch.device("cpu"))
    before = arrays.lifecycle.clone()
    request = torch.randint(-1, len(L), before.shape, generator=generator, dtype=torch.int32)
    refused = reference.advance(arrays, reference.policy(), request)
    moved = arrays.lifecycle != before
    done = (refused == Refusal.NONE) & (request >= 0)
    assert torch.equal(arrays.lifecycle[done], request[done])
    assert (before[moved & ~done] >= L.CULLED).all()
    assert moved.any()
    assert (arrays.alpha[moved & ~reference.among(arrays.lifecycle, reference.BLENDS)] == 0).all()


def sums_at_random(seeds, generator):
    """Sums, counts and widths such as a window leaves them, those of nothing measured and of one feature too."""
    widths = torch.randint(1, 9, (seeds,), generator=generator, dtype=torch.int32)
    rows = torch.randint(0, 50, (seeds,), generator=generator) * torch.randint(
        0, 2, (seeds,), generator=generator
    )
    sums = torch.randn(8, seeds, generator=generator, dtype=torch.float64)
    for row in (SQUARES, ROW_SQUARES, ZEROS, PEAK, 6, 7):
        sums[row].abs_()
    sums[SQUARES] *= torch.randint(0, 2, (seeds,), generator=generator)
    counts = torch.zeros(3, seeds, dtype=torch.int64)
    counts[ROWS] = rows
    share = torch.randint(0, 4, (seeds,), generator=generator)
    counts[NONFINITE] = torch.where(share == 0, rows * widths, share - 1)
    counts[2] = torch.randint(0, 3, (seeds,), generator=generator)
    return sums, counts, widths


@given(seeds=st.sampled_from((1, 7, 255, 256, 257, 1000)), draw=st.integers(0, 1 << 30))
def test_report_equals_reference(seeds, draw):
    sums, counts, widths = sums_at_random(seeds, torch.Generator().manual_seed(draw))
    found = kernels.report(sums.to(DEVICE), counts.to(DEVICE), widths.to(DEVICE)).cpu()
    expected = reference_health(sums, counts, widths)
    assert found.shape == (len(HEALTH), seeds)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12, equal_nan=True)


def test_report_of_measured_values_is_what_they_are():
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sums = torch.zeros(8, 2, dtype=torch.float64)
    counts = torch.zeros(3, 2, dtype=torch.int64)
    counts[ROWS] = 40
    for seed, chunk in enumerate(x.split(3, 1)):
        sums[1, seed] = chunk.sum()
        sums[SQUARES, seed] = chunk.square().sum()
        sums[ROW_SQUARES, seed] = chunk.sum(1).square().sum()
        sums[PEAK, seed] = chunk.abs().max()
    widths = torch.tensor([3, 3], dtype=torch.int32, device=DEVICE)
    found = kernels.report(sums.to(DEVICE), counts.to(DEVICE), widths).cpu()
    found = dict(zip(HEALTH, found, strict=True))
    for seed, chunk in enumerate(x.split(3, 1)):
        variance = chunk.var(correction=0)
        centered = chunk - chunk.mean()
        pairs = [(centered[:, i] * centered[:, j]).mean() for i in range(3) for j in range(3) if i != j]
        assert found["mean"][seed] == pytest.approx(chunk.mean().item())
        assert found["variance"][seed] == pytest.approx(variance.item())
        assert found["correlation"][seed] == pytest.approx((sum(pairs) / 6 / variance).item())
        assert found["peak"][seed] == chunk.abs().max()


def test_report_of_no_seeds_is_empty():
    none = torch.zeros(0, dtype=torch.int32, device=DEVICE)
    found = kernels.report(
        none.new_zeros(8, 0, dtype=torch.float64), none.new_zeros(3, 0, dtype=torch.int64), none
    )
    assert found.shape == (len(HEALTH), 0)


@pytest.mark.parametrize("target", ["cuda:80", "cuda:90", "cuda:100", "hip:gfx942"])
def test_kernels_compile_without_spills(target):
    jobs = (kernels.lifecycle_job(False), kernels.lifecycle_job(True), kernels.report_job())
    for found in compile_all([dataclasses.replace(job, target=target) for job in jobs], processes=1):
        assert isinstance(found, Resources), found
        assert not found.problem
