"""The backward of a bank's seeds against autograd through the torch backend in float64."""

from __future__ import annotations

import msgspec
import pytest
import torch
from gradient_helpers import BOUNDS, Case, L, case, distance, reference, view
from hypothesis import given, settings
from hypothesis import strategies as st

from morphc.errors import UnsupportedKernelError
from morphc.kernels import gradient
from morphc.kernels.compile import Resources, compile_all
from morphc.kernels.gradient import Backward, gradient_size, sections
from morphc.kernels.reference.chunks import bounds
from morphc.kernels.spec import KernelSpec, TuneConfig

BLENDS = ("residual", "lerp", "multiply", "gate")


def tuned(rows: int = 16, group: int = 1, programs: int = 2, warps: int = 4, splits: int = 0) -> TuneConfig:
    return TuneConfig(rows, 0, warps, 2, group=group, programs=programs, splits=splits)


def run(
    made: Case,
    config: TuneConfig | None = None,
    *,
    copied: bool = True,
    add: torch.Tensor | None = None,
    params: dict[str, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """dx and the gradient of every parameter; what the kernel is to write is NaN before."""
    spec, device = made.spec, made.y.device
    backward = Backward(spec, config, device, "ieee" if device.type == "cpu" else "tf32x3")
    dx = made.dy.clone() if copied else torch.full_like(made.dy, torch.nan)
    flat = torch.full((spec.slots * gradient_size(spec),), torch.nan, device=device) if add is None else add
    backward(
        made.dy,
        view(made.dy, made.axis),
        dx,
        view(dx, made.axis),
        made.active,
        list((params or made.params).values()),
        made.stash(),
        flat,
        copied=copied,
        add=add is not None,
    )
    return dx, sections(spec, flat)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


def blending_columns(made: Case) -> torch.Tensor:
    """[F] bool."""
    columns = torch.zeros(made.spec.features, dtype=torch.bool)
    for seed in made.blending():
        columns[slice(*bounds(made.spec.features, made.spec.seeds)[seed])] = True
    return columns


def check(made: Case, config: TuneConfig | None = None, **options: bool) -> None:
    """Every gradient, and that nothing else moved."""
    bound = BOUNDS[made.y.dtype]
    found_dx, found = run(made, config, **options)
    expected_dx, expected = reference(made)
    assert distance(found_dx, expected_dx) <= bound
    for name, grad in expected.items():
        assert distance(found[name], grad) <= bound, name
        assert not found[name][~made.slots.trains].any(), name
    free = ~blending_columns(made).to(found_dx.device)
    untouched = found_dx.movedim(made.axis, -1)[..., free], made.dy.movedim(made.axis, -1)[..., free]
    assert torch.equal(*map(bits, untouched))


@st.composite
def cases(draw: st.DrawFn) -> tuple[Case, TuneConfig]:
    seeds = draw(st.integers(1, 12))
    features = seeds * draw(st.integers(1, 6)) + draw(st.integers(0, seeds - 1))
    slots = draw(st.integers(1, min(seeds, 6)))
    spatial = draw(st.booleans())
    made = case(
        features,
        seeds,
        slots,
        draw(st.integers(1, 18)),
        rows=draw(st.sampled_from([1, 2, 15, 16, 33])),
        shape=(2, features, 3, draw(st.integers(1, 6))) if spatial else None,
        blueprint=draw(st.sampled_from(["bottleneck", "bottleneck", "affine"])),
        blend=draw(st.sampled_from(BLENDS)),
        gap=draw(st.sampled_from([0, 3])),
        seed=draw(st.integers(0, 99)),
    )
    config = tuned(
        group=draw(st.sampled_from([1, 2, 4])),
        programs=draw(st.sampled_from([1, 3])),
        splits=draw(st.integers(0, 2)),
    )
    return made, config


@given(cases())
@settings(max_examples=10)
def test_every_gradient_is_that_of_the_torch_backend(given_case: tuple[Case, TuneConfig]) -> None:
    check(*given_case)


@pytest.mark.parametrize("blend", BLENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_gradients_are_within_their_bound(dtype: torch.dtype, blend: str) -> None:
    check(case(24, 6, 6, 5, rows=40, blend=blend, dtype=dtype), tuned(group=4))


@pytest.mark.parametrize("chunk", [1, 2])
def test_a_run_of_small_chunks_is_read_as_a_whole(chunk: int) -> None:
    seeds = 48 // chunk
    made = case(48, seeds, seeds, 3, rows=20, dtype=torch.bfloat16, states=(L.FINE_TUNING,), order="sorted")
    config = tuned(group=16 // chunk)
    assert gradient.tile_of(made.spec, config).dense
    check(made, config)
    some = case(48, seeds, seeds - 5, 3, rows=20, dtype=torch.bfloat16, order="sorted")
    check(some, config)


def test_hidden_units_that_do_not_fit_are_walked_some_at_a_time() -> None:
    config = tuned(warps=1)
    for blend in ("residual", "multiply"):
        made = case(128, 2, 2, 20, rows=16, blend=blend, states=(L.FINE_TUNING, L.TRAINING))
        assert gradient.tile_of(made.spec, config).units == 16
        check(made, config)


@pytest.mark.parametrize("blend", BLENDS)
@pytest.mark.parametrize("units", [0, 16])
def test_a_wide_chunk_can_be_cut_into_pieces(blend: str, units: int) -> None:
    # Other seeds leave a gate almost shut, and of its gradient no digits.
    made = case(77, 2, 2, 20, rows=21, blend=blend, states=(L.FINE_TUNING, L.TRAINING), seed=1)
    config = msgspec.structs.replace(tuned(warps=8), pieces=4, units=units)
    tile = gradient.tile_of(made.spec, config)
    assert (tile.pieces, tile.units) == (4, units or 32)
    check(made, config)


def test_pieces_of_16_bits_are_within_their_bound() -> None:
    made = case(77, 2, 2, 20, rows=21, blend="gate", dtype=torch.bfloat16, seed=1)
    check(made, msgspec.structs.replace(tuned(), pieces=4))


def test_offsets_beyond_31_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradient, "is_wide", lambda *_: True)
    check(case(20, 5, 5, 3, rows=40), tuned(group=2))


@pytest.mark.parametrize("splits", [1, 2, 5])
def test_rows_are_cut_into_no_more_parts_than_asked_for(splits: int) -> None:
    made = case(12, 3, 3, 2, rows=100, states=(L.FINE_TUNING,))
    check(made, tuned(programs=4, splits=splits))


@pytest.mark.parametrize("blueprint", ["bottleneck", "affine"])
def test_many_parts_of_few_groups_are_added_up_in_deeper_blocks(blueprint: str) -> None:
    made = case(6, 1, 1, 2, rows=16 * 131 - 5, blueprint=blueprint, states=(L.FINE_TUNING,))
    backward = Backward(made.spec, tuned(programs=140, splits=131), made.y.device, "ieee")
    check(made, tuned(programs=140, splits=131))
    dx = made.dy.clone()
    flat = torch.zeros(made.spec.slots * gradient_size(made.spec))
    walked = view(dx, -1)
    backward(made.dy, walked, dx, walked, made.active, list(made.params.values()), made.stash(), flat)
    assert [key[-1] for key in backward.reducers] == [True]


def test_the_copy_of_the_gradient_can_be_made_on_the_way() -> None:
    made = case(64, 8, 6, 3, rows=37)
    assert gradient.copies(made.spec)
    made.dy[3, :] = torch.tensor([0.0, -0.0, 1e-40, 2.0] * 16)
    check(made, tuned(), copied=False)
    dormant = case(64, 8, 6, 3, rows=37, states=(L.DORMANT,))
    check(dormant, tuned(), copied=False)


def test_what_no_seed_blends_into_keeps_its_bits() -> None:
    made = case(20, 10, 6, 3, rows=20)
    free = ~blending_columns(made)
    odd = torch.tensor([torch.nan, -0.0, torch.inf, -torch.inf, 1e-42])
    made.dy[:5, free] = odd.unsqueeze(1).expand(5, int(free.sum()))
    # Isolated seeds take their gradient from those columns: theirs is not what this is about.
    dx, _ = run(made, tuned(group=4))
    assert torch.equal(bits(dx[:, free]), bits(made.dy[:, free]))


def test_without_rows_gradients_are_zero() -> None:
    _, grads = run(case(12, 3, 3, 2, rows=0))
    assert not any(grad.any() for grad in grads.values())


def test_nothing_is_done_where_no_seed_is_active() -> None:
    made = case(12, 3, 3, 2, rows=9, states=(L.DORMANT, L.GERMINATED, L.CULLED))
    dx, grads = run(made)
    assert torch.equal(dx, made.dy)
    assert not any(grad.any() for grad in grads.values())


def test_gradients_can_be_added_to_what_is_there() -> None:
    made = case(12, 3, 3, 2, rows=20)
    _, once = run(made)
    flat = torch.full((made.spec.slots * gradient_size(made.spec),), 0.5)
    _, added = run(made, add=flat)
    for name, grad in once.items():
        expected = grad + 0.5
        assert torch.equal(added[name], expected), name


def test_a_site_whose_seeds_only_learn_apart_needs_no_gradient_of_its_own() -> None:
    made = case(24, 6, 5, 3, rows=33, states=(L.TRAINING, L.DORMANT))
    backward = Backward(made.spec, tuned(group=4), made.y.device, "ieee")
    flat = torch.full((made.spec.slots * gradient_size(made.spec),), torch.nan)
    dy = made.dy.clone()
    walked = view(dy, -1)
    backward(dy, walked, None, None, made.active, list(made.params.values()), made.stash(), flat)
    assert torch.equal(dy, made.dy)
    _, expected = reference(made)
    for name, grad in sections(made.spec, flat).items():
        assert distance(grad, expected[name]) <= 1e-5


def test_a_site_whose_seeds_are_frozen_needs_no_gradients_of_slots() -> None:
    made = case(24, 6, 5, 3, rows=33, states=(L.FOSSILIZED, L.STABILIZATION))
    backward = Backward(made.spec, tuned(group=4), made.y.device, "ieee")
    dx = made.dy.clone()
    walked = view(dx, -1)
    backward(made.dy, walked, dx, walked, made.active, list(made.params.values()), made.stash(), None)
    assert distance(dx, reference(made)[0]) <= 1e-5


def test_two_runs_agree_bit_for_bit() -> None:
    made = case(24, 6, 6, 3, rows=50, dtype=torch.bfloat16)
    first_dx, first = run(made, tuned(group=4))
    second_dx, second = run(made, tuned(group=4))
    assert torch.equal(bits(first_dx), bits(second_dx))
    assert all(torch.equal(bits(first[name]), bits(second[name])) for name in first)


@pytest.mark.parametrize(
    ("where", "value", "states"),
    [
        ("x", torch.inf, (L.FINE_TUNING, L.TRAINING)),
        ("dy", torch.nan, (L.FINE_TUNING, L.TRAINING)),
        ("in_weight", torch.nan, (L.FINE_TUNING,)),
        ("out_weight", torch.inf, (L.FINE_TUNING,)),
        ("in_bias", -torch.inf, (L.FINE_TUNING, L.TRAINING)),
        ("x", torch.nan, (L.FOSSILIZED,)),
        ("out_weight", torch.inf, (L.FOSSILIZED, L.TRAINING)),
    ],
)
def test_what_is_not_finite_stays_in_its_chunk(where: str, value: float, states: tuple[L, ...]) -> None:
    made = case(20, 5, 5, 3, rows=36)
    # Blends, and, with the first of two states, the last one apart: in a group that holds both.
    made.lifecycle[:] = torch.tensor([*[states[0]] * 4, states[-1]])
    made.alpha.fill_(0.7)
    clean_dx, clean = reference(made)
    place = 1
    seed, slot = made.blending()[place], int(made.active[4 + place])
    columns = slice(*bounds(20, 5)[seed])
    if where == "x":
        made.y[21, columns.start] = value
    elif where == "dy":
        made.dy[21, columns.start] = value
    else:
        made.params[where][slot].view(-1)[0] = value
    dx, grads = run(made, tuned(group=4))
    own = torch.zeros(20, dtype=torch.bool)
    own[columns] = True
    assert distance(dx[:, ~own], clean_dx[:, ~own]) <= 1e-5
    others = torch.arange(made.spec.slots) != slot
    for name, grad in grads.items():
        assert distance(grad[others], clean[name][others]) <= 1e-5, name
    rows = torch.arange(36) != 21
    if where in ("x", "dy"):
        assert not dx[21, columns].isfinite().all()
        assert distance(dx[rows][:, columns], clean_dx[rows][:, columns]) <= 1e-5
    else:
        assert not dx[:, columns].isfinite().any(1).any()
    trains = bool(made.slots.trains[slot])
    assert all(grad[slot].isfinite().all() for grad in grads.values()) != trains


def test_gate_and_affine_keep_a_chunk_apart_too() -> None:
    for blueprint, blend in (("affine", "gate"), ("bottleneck", "gate"), ("bottleneck", "multiply")):
        made = case(20, 5, 5, 3, rows=20, states=(L.FINE_TUNING,), blueprint=blueprint, blend=blend)
        made.alpha.fill_(0.7)
        clean_dx, clean = reference(made)
        seed, slot = made.blending()[2], int(made.active[4 + 2])
        columns = slice(*bounds(20, 5)[seed])
        made.y[7, columns] = torch.nan
        dx, grads = run(made, tuned(group=4))
        own = torch.zeros(20, dtype=torch.bool)
        own[columns] = True
        assert distance(dx[:, ~own], clean_dx[:, ~own]) <= 1e-5
        others = torch.arange(made.spec.slots) != slot
        assert all(distance(grads[name][others], clean[name][others]) <= 1e-5 for name in grads)


def test_what_has_no_kernel_says_why() -> None:
    spec = case(24, 6, 5, 3).spec
    for changed, word in (
        ({"blueprint": "lowrank"}, "lowrank"),
        ({"dtype": "float64"}, "float64"),
        ({"features": 512, "seeds": 1, "chunk": 512}, "512"),
        ({"rank": 300}, "300"),
    ):
        refused = msgspec.structs.replace(spec, **changed)
        assert word in gradient.refuses(refused)
        with pytest.raises(UnsupportedKernelError, match=word):
            gradient.source(refused, True)


def h200(features: int, seeds: int) -> KernelSpec:
    spec = case(24, 6, 5, 3).spec
    return msgspec.structs.replace(
        spec,
        features=features,
        seeds=seeds,
        chunk=features // seeds,
        slots=max(4, seeds // 10),
        rank=16,
        dtype="bfloat16",
    )


def test_defaults_compile_for_an_h200_without_spills() -> None:
    jobs = []
    for spec in (h200(4096, 64), h200(4096, 1024)):
        config = gradient.default(spec, 4096)
        jobs += [gradient.backward_job(spec, config), gradient.reduce_job(spec, config)]
    for found in compile_all(jobs, processes=1):
        assert isinstance(found, Resources), found
        assert not found.problem


@pytest.mark.parametrize(
    ("chunk", "rank", "blend", "dtype", "named"),
    [
        (192, 16, "gate", "float32", "blend 'gate' with rank 16 over chunks of 192 features in float32"),
        (192, 32, "gate", "bfloat16", "blend 'gate' with rank 32 over chunks of 192 features in bfloat16"),
        (256, 32, "multiply", "float32", "use more seeds, for chunks of 128 at most"),
        (192, 16, "gate", "bfloat16", ""),
        (128, 32, "gate", "float32", ""),
        (256, 16, "multiply", "float32", ""),
        (256, 32, "lerp", "float32", ""),
    ],
)
def test_chunks_too_wide_for_a_thread_s_registers_are_refused(
    chunk: int, rank: int, blend: str, dtype: str, named: str
) -> None:
    spec = case(24, 6, 5, 3).spec
    spec = msgspec.structs.replace(
        spec, features=2 * chunk, seeds=2, chunk=chunk, rank=rank, blend=blend, dtype=dtype
    )
    reason = gradient.refuses(spec)
    assert named in reason
    assert bool(named) == bool(reason)
