"""Isolated training and row-wise AdamW against plain torch in float64."""

from __future__ import annotations

import msgspec
import pytest
import torch
from gradient_helpers import BOUNDS, Case, L, case, distance
from hypothesis import given, settings
from hypothesis import strategies as st

from morphc.errors import UnsupportedKernelError
from morphc.kernels import gradient, training
from morphc.kernels.blueprints.base import get
from morphc.kernels.compile import Resources, compile_all
from morphc.kernels.reference.adamw import adamw_rows
from morphc.kernels.reference.train import reconstruct
from morphc.kernels.spec import TuneConfig
from morphc.kernels.training import Bank, Rates, Trainer, addresses, bank_of
from morphc.runtime.active import take
from morphc.runtime.bank import SlotBank

RATES = Rates(lr=0.01, betas=(0.8, 0.99), eps=1e-6, weight_decay=0.1)
ISOLATED = (L.TRAINING, L.TRAINING, L.FINE_TUNING, L.DORMANT)


def tuned(rows: int = 16, group: int = 1, programs: int = 2, warps: int = 4) -> TuneConfig:
    return TuneConfig(rows, 0, warps, 2, group=group, programs=programs)


def trainer(made: Case, config: TuneConfig | None) -> Trainer:
    device = made.y.device
    return Trainer(made.spec, config, device, "ieee" if device.type == "cpu" else "tf32x3")


def bank(made: Case, seed: int = 0) -> Bank:
    """Parameters with moments as after a few steps."""
    g = torch.Generator().manual_seed(seed)
    device = made.y.device
    params = [param.clone() for param in made.params.values()]
    means = [0.1 * torch.randn(param.shape, generator=g).to(device) for param in params]
    squares = [torch.rand(param.shape, generator=g).to(device) for param in params]
    step = torch.randint(0, 5, (made.spec.slots,), generator=g).to(device)
    return Bank(params, means, squares, step)


def flat_of(grads: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([grad.flatten() for grad in grads])


def wide(held: Bank) -> Bank:
    """In float64."""
    return Bank(*([tensor.double() for tensor in part] for part in held[:3]), held.step.clone())


def follow(held: Bank, grads: list[torch.Tensor], rows: torch.Tensor, rates: Rates = RATES) -> None:
    """One reference step."""
    held.step.add_(rows)
    for param, grad, mean, square in zip(held.params, grads, held.means, held.squares, strict=True):
        adamw_rows(param, grad, mean, square, held.step, rows, **rates._asdict())


def assert_close(found: Bank, expected: Bank, bound: float) -> None:
    assert torch.equal(found.step, expected.step)
    for ours, theirs in zip(found[:3], expected[:3], strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert distance(one, other) <= bound


def check(made: Case, config: TuneConfig | None = None, live: bool = True) -> None:
    """Loss, parameters, moments and steps after one step of isolated training; nothing else moves."""
    held, expected = bank(made), wide(bank(made))
    untouched = bank(made)
    spec, slots = made.spec, made.slots
    loss = torch.full((spec.slots,), -1.0, device=made.y.device)
    source = made.y if live else made.stash()
    trainer(made, config).reconstruct(source, made.view, made.active, held, loss, RATES, live=live)
    x = take(made.y.double(), slots, made.axis, False)
    wanted, grads = reconstruct(
        x,
        slots.inside,
        dict(zip(made.params, expected.params, strict=True)),
        get(spec.blueprint),
        made.geometry,
    )
    follow(expected, list(grads.values()), slots.isolated)
    bound = BOUNDS[made.y.dtype]
    assert_close(held, expected, bound)
    apart = ~slots.isolated
    for part, before in zip(held[:3], untouched[:3], strict=True):
        for one, other in zip(part, before, strict=True):
            assert torch.equal(one[apart], other[apart])
    for slot in range(spec.slots):
        if slots.isolated[slot]:
            assert abs(loss[slot] - wanted[slot]) <= bound * wanted[slot]
    assert (loss[~slots.isolated] == -1).all()


@st.composite
def cases(draw: st.DrawFn) -> tuple[Case, TuneConfig, bool]:
    seeds = draw(st.integers(1, 9))
    features = seeds * draw(st.integers(1, 6)) + draw(st.integers(0, seeds - 1))
    made = case(
        features,
        seeds,
        draw(st.integers(1, min(seeds, 6))),
        draw(st.integers(1, 18)),
        rows=draw(st.sampled_from([1, 15, 16, 33])),
        shape=(2, features, 3, draw(st.integers(1, 6))) if draw(st.booleans()) else None,
        blueprint=draw(st.sampled_from(["bottleneck", "bottleneck", "affine"])),
        blend=draw(st.sampled_from(["residual", "lerp", "gate"])),
        states=ISOLATED,
        gap=draw(st.sampled_from([0, 3])),
        seed=draw(st.integers(0, 99)),
    )
    config = tuned(group=draw(st.sampled_from([1, 2, 4])), programs=draw(st.sampled_from([1, 3])))
    return made, config, draw(st.booleans())


@given(cases())
@settings(max_examples=10)
def test_a_step_of_isolated_training_is_the_reference_s(given_case: tuple[Case, TuneConfig, bool]) -> None:
    check(*given_case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_activations_train_within_their_bound(dtype: torch.dtype) -> None:
    check(case(24, 6, 6, 5, rows=40, dtype=dtype, states=ISOLATED), tuned(group=4))


def test_hidden_units_that_do_not_fit_are_walked_some_at_a_time() -> None:
    check(case(128, 2, 2, 20, rows=16, states=(L.TRAINING,)), tuned(warps=1))


@pytest.mark.parametrize("units", [0, 16])
def test_a_wide_chunk_can_be_cut_into_pieces(units: int) -> None:
    config = msgspec.structs.replace(tuned(warps=8), pieces=4, units=units)
    made = case(77, 2, 2, 20, rows=21, states=ISOLATED)
    assert gradient.tile_of(made.spec, config).pieces == 4
    check(made, config)


def test_reconstruction_is_learned() -> None:
    made = case(12, 3, 3, 4, rows=32, states=(L.TRAINING,), blueprint="affine")
    made.params["scale"].zero_()
    made.params["shift"].zero_()
    held = bank(made)._replace(step=torch.zeros(3, dtype=torch.int64))
    for part in (held.means, held.squares):
        for moment in part:
            moment.zero_()
    kernel, loss, losses = trainer(made, tuned()), torch.zeros(3), []
    for _ in range(12):
        kernel.reconstruct(made.y, made.view, made.active, held, loss, Rates(lr=0.1, weight_decay=0.0))
        losses.append(float(loss.mean()))
    assert losses[-1] < 0.1 * losses[0]
    assert held.step.tolist() == [12, 12, 12]


def test_what_is_not_finite_stays_in_its_slot() -> None:
    made = case(20, 5, 5, 3, rows=36, states=(L.TRAINING,))
    clean, held = bank(made), bank(made)
    losses = torch.zeros(2, 5)
    kernel = trainer(made, tuned(group=4))
    kernel.reconstruct(made.y, made.view, made.active, clean, losses[0], RATES)
    slot, seed = int(made.active[4 + 1]), int(made.active[4 + 5 + 1])
    made.y[9, 4 * seed] = torch.inf
    kernel.reconstruct(made.y, made.view, made.active, held, losses[1], RATES)
    others = torch.arange(5) != slot
    for ours, theirs in zip(held.params, clean.params, strict=True):
        assert distance(ours[others], theirs[others]) <= 1e-5
    assert distance(losses[1, others], losses[0, others]) <= 1e-5
    assert not losses[1, slot].isfinite()
    before = bank(made)
    for ours, was in zip(held[:3], before[:3], strict=True):
        assert all(torch.equal(one[slot], other[slot]) for one, other in zip(ours, was, strict=True))
    assert held.step[slot] == before.step[slot]
    assert (held.step[others] == before.step[others] + 1).all()


def test_two_runs_agree_bit_for_bit() -> None:
    made = case(24, 6, 6, 3, rows=50, dtype=torch.bfloat16, states=ISOLATED)
    results = []
    for _ in range(2):
        held, loss = bank(made), torch.zeros(6)
        trainer(made, tuned(group=4)).reconstruct(made.y, made.view, made.active, held, loss, RATES)
        results.append([*held.params, *held.means, *held.squares, loss])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("blend", ["residual", "gate"])
def test_adamw_from_a_bank_s_own_gradients(blend: str) -> None:
    made = case(22, 5, 5, 6, blend=blend, states=(L.TRAINING, L.GRAFTING, L.FINE_TUNING, L.FOSSILIZED))
    made.alpha[:2] = 0  # a seed whose ramp begins is not listed, and trains
    held, expected = bank(made), wide(bank(made))
    g = torch.Generator().manual_seed(7)
    grads = [torch.randn(param.shape, generator=g) for param in held.params]
    rows = made.slots.trains
    before = [param.clone() for param in held.params]
    kernel = trainer(made, tuned())
    for _ in range(3):
        kernel.step(made.active, held, flat_of(grads), RATES)
        follow(expected, [grad.double() for grad in grads], rows)
    assert_close(held, expected, 1e-5)
    assert any(
        not torch.equal(one[rows], other[rows]) for one, other in zip(held.params, before, strict=True)
    )
    assert all(torch.equal(one[~rows], other[~rows]) for one, other in zip(held.params, before, strict=True))


@pytest.mark.parametrize("scale", [None, 1024.0, 3.0])
def test_a_slot_with_a_gradient_that_is_not_finite_sits_the_step_out(scale: float | None) -> None:
    made = case(24, 6, 6, 3, states=(L.TRAINING, L.GRAFTING, L.FINE_TUNING))
    held, expected, before = bank(made), wide(bank(made)), bank(made)
    g = torch.Generator().manual_seed(7)
    grads = [torch.randn(param.shape, generator=g) for param in held.params]
    bad = [torch.inf, -torch.inf, torch.nan]
    for slot, value in enumerate(bad):
        grads[slot % len(grads)][slot].view(-1)[-1] = value
    rows = made.slots.trains & (torch.arange(6) >= len(bad))
    given = None if scale is None else torch.tensor(scale)
    trainer(made, tuned()).step(made.active, held, flat_of(grads), RATES, given)
    follow(expected, [grad.double() / (scale or 1.0) for grad in grads], rows)
    assert_close(held, expected, 1e-5)
    for ours, theirs in zip(held[:3], before[:3], strict=True):
        assert all(torch.equal(one[~rows], other[~rows]) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("scale", [None, 1024.0])
def test_many_banks_step_in_one_launch_as_each_does_alone(scale: float | None) -> None:
    made = case(22, 5, 5, 6, states=(L.TRAINING, L.GRAFTING, L.FINE_TUNING, L.FOSSILIZED))
    kernel, g = trainer(made, tuned()), torch.Generator().manual_seed(7)
    given = None if scale is None else torch.tensor(scale)
    together, alone = ([bank(made) for _ in range(3)] for _ in range(2))
    active, flats = made.active, []
    for number, other in enumerate(alone):
        flats.append(torch.randn(sum(param.numel() for param in other.params), generator=g))
        if number == 1:
            flats[1][0] = torch.nan
        kernel.step(active, other, flats[number], RATES, given)
    banks = [addresses(active, one) for one in together]
    for _ in range(2):  # the second finds the addresses on the device
        kernel.step_all(banks, flats, RATES, given)
    for number, other in enumerate(alone):
        kernel.step(active, other, flats[number], RATES, given)
    for one, other in zip(together, alone, strict=True):
        for ours, theirs in zip(one[:3], other[:3], strict=True):
            assert all(map(torch.equal, ours, theirs))
        assert torch.equal(one.step, other.step)
    assert not torch.equal(together[0].params[0], bank(made).params[0])


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.0), (0.5, 0.9999)])
def test_adamw_keeps_its_digits_at_the_first_and_at_late_steps(betas: tuple[float, float]) -> None:
    made = case(12, 3, 3, 2, states=(L.FINE_TUNING,))
    held, expected = bank(made), wide(bank(made))
    for each in (held, expected):
        each.step[:] = torch.tensor([0, 1, 10**6])
    grads = [torch.full_like(param, 1e-3) for param in held.params]
    rates = Rates(1.0, betas, 1e-8, 0.0)
    trainer(made, tuned()).step(made.active, held, flat_of(grads), rates)
    follow(expected, [grad.double() for grad in grads], made.slots.trains, rates)
    moved = [
        one.double() - param.double() for one, param in zip(held.params, made.params.values(), strict=True)
    ]
    wanted = [one - param.double() for one, param in zip(expected.params, made.params.values(), strict=True)]
    assert all(distance(one, other) <= 1e-5 for one, other in zip(moved, wanted, strict=True))
    assert_close(held, expected, 1e-6)


def test_the_tensors_of_a_slot_bank() -> None:
    made = case(12, 3, 3, 2, states=(L.FINE_TUNING,))
    slots = SlotBank("bottleneck", made.geometry, "residual", 3)
    held = bank_of(slots, slots.names)
    grads = [torch.ones_like(param) for param in held.params]
    trainer(made, tuned()).step(made.active, held, flat_of(grads), RATES)
    assert slots.opt.step.tolist() == [1, 1, 1]
    assert all(param.ne(0).all() for param in slots.parameters())


def test_without_rows_nothing_is_learned() -> None:
    made = case(12, 3, 3, 2, rows=0, states=(L.TRAINING,))
    held, before = bank(made), bank(made)
    trainer(made, tuned()).reconstruct(made.y, made.view, made.active, held, torch.zeros(3), RATES)
    assert torch.equal(held.step, before.step)


def test_kernels_compile_for_an_h200_without_spills() -> None:
    spec = case(4096, 1024, 102, 16, rows=1, dtype=torch.bfloat16, states=(L.TRAINING,)).spec
    config = training.default(spec, 4096)
    jobs = [
        training.train_job(spec, config),
        training.adamw_job(spec, config),
        *(
            training.step_job(spec, together=together, scaled=scaled)
            for together in (False, True)
            for scaled in (False, True)
        ),
    ]
    for found in compile_all(jobs, processes=1):
        assert isinstance(found, Resources), found
        assert not found.problem
    assert gradient.tile_of(spec, config).units_first


def test_isolated_training_of_wide_float32_chunks_is_refused_and_their_steps_are_not() -> None:
    spec = case(384, 2, 2, 32, rows=1).spec
    config = training.default(spec, 64)
    with pytest.raises(UnsupportedKernelError, match="training over chunks of 192 features in float32"):
        training.train_job(spec, config)
    assert training.step_job(spec).function == "step"
    assert not training.refuses(msgspec.structs.replace(spec, dtype="bfloat16"))
    assert not training.refuses(msgspec.structs.replace(spec, features=256, chunk=128))
