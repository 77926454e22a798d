"""`lowrank` and `widen` on kernels against the torch backend in float64: the value and every gradient."""

from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from where import DEVICE

from morphc.errors import UnsupportedKernelError
from morphc.kernels import tap_join as kernels
from morphc.kernels.blueprints import ConvGeometry, Geometry, get
from morphc.kernels.compile import Resources, compile_all
from morphc.kernels.layout import view_of
from morphc.kernels.reference.activations import ACTIVATIONS
from morphc.kernels.reference.active_list import active_list
from morphc.kernels.reference.blends import blend_shapes
from morphc.kernels.spec import KernelSpec, TuneConfig
from morphc.kernels.tap import TapPlan, Tiles
from morphc.kernels.tap_join import TapSeeds
from morphc.lifecycle import BLENDS, ISOLATED, TRAINS, Lifecycle
from morphc.runtime import active

L = Lifecycle
BOUNDS = {"float32": 1e-5, "bfloat16": 5e-3, "float16": 1e-3}
SMALL = Tiles(32, 32, 32, warps=4)
PLAN = TapPlan(packed=True, project=SMALL, tap_gradient=SMALL, weight_gradient=SMALL)
MIXED = (L.GRAFTING, L.TRAINING, L.FOSSILIZED, L.FINE_TUNING, L.DORMANT)
GATED = "widen, gated"


def error(found, expected):
    """Relative, in norm."""
    usual = expected.norm().item()
    return (found.double().cpu() - expected).norm().item() / (usual or 1.0)


class Site:
    """A linear site of `features` in `seeds` chunks whose tap has `width` features, with random slots.

    kind: `lowrank`, `widen` or GATED. states: of the slots' owners. Values are rounded to `dtype`.
    """

    def __init__(
        self,
        kind="lowrank",
        blend="residual",
        *,
        features=24,
        seeds=6,
        rank=4,
        width=20,
        rows=40,
        states=MIXED,
        dtype="float32",
        pointwise="gelu",
        draw=0,
    ):
        self.dtype = getattr(torch, dtype)
        chunk = -(-features // seeds)
        states = states[:seeds]
        self.geometry = Geometry(
            features, chunk, rank, tap_features=width, activation=pointwise, gated=kind == GATED
        )
        self.blueprint = get(kind.partition(",")[0])
        self.spec = KernelSpec(
            kind="forward",
            features=features,
            seeds=seeds,
            chunk=chunk,
            slots=len(states),
            rank=rank,
            blueprint=self.blueprint.name,
            blend=blend,
            epilogue=None,
            layout="last",
            dtype=dtype,
        )
        generator = torch.Generator().manual_seed(draw)

        def normal(*shape):
            return torch.randn(*shape, generator=generator)

        self.y, self.dy = normal(rows, features).to(self.dtype), normal(rows, features).to(self.dtype)
        self.tap = normal(rows, width).to(self.dtype)
        shapes = self.blueprint.shapes(self.geometry) | blend_shapes(blend, chunk)
        scales = {"in_weight": width**-0.5, "gate_in_weight": width**-0.5, "out_weight": rank**-0.5}
        self.params = {
            name: normal(len(states), *shape) * scales.get(name, 0.5) for name, shape in shapes.items()
        }
        self.owner = torch.randperm(seeds, generator=generator)[: len(states)]
        self.lifecycle = torch.zeros(seeds, dtype=torch.int32)
        self.lifecycle[self.owner] = torch.tensor(states, dtype=torch.int32)
        self.alpha = torch.rand(seeds, generator=generator)
        self.listing = active_list(self.owner, self.lifecycle, self.alpha, BLENDS, ISOLATED, TRAINS)

    def reference(self):
        """y, dx, the tap's gradient and those of the parameters, by the torch backend in float64."""
        y = self.y.double().requires_grad_()
        tap = self.tap.double().requires_grad_()
        params = {name: value.double().requires_grad_() for name, value in self.params.items()}
        slots = active.describe(self.owner, self.lifecycle, self.alpha.double(), self.spec.features)
        out = active.through_bank(
            y, y, tap, params, slots, self.blueprint, self.geometry, self.spec.blend, -1
        )
        out.backward(self.dy.double())
        grads = {
            name: torch.zeros_like(value) if value.grad is None else value.grad
            for name, value in params.items()
        }
        taps = torch.zeros_like(tap) if tap.grad is None else tap.grad
        return out.detach(), y.grad, taps, grads

    def kernels(self, group=2, packed=True):
        config = TuneConfig(16, 0, 4, 2, group=group, programs=1)
        plan = TapPlan(packed, PLAN.project, PLAN.tap_gradient, PLAN.weight_gradient)
        return TapSeeds(
            self.spec, self.geometry, DEVICE, plan=plan, config=config, back=config, precision="ieee"
        )

    def run(self, group=2, packed=True):
        """The same from the kernels."""
        made = self.kernels(group, packed)
        tap, dy, out = self.tap.to(DEVICE), self.dy.to(DEVICE), self.y.clone().to(DEVICE)
        listing = self.listing.to(DEVICE)
        params = {name: value.to(DEVICE) for name, value in self.params.items()}
        view = view_of(out, -1)
        stash = None
        if made.stashes:
            stash = torch.full((self.spec.slots, len(self.y), self.spec.chunk), torch.nan, dtype=self.dtype)
            stash = stash.to(DEVICE)
        z, kept = made.project(tap, listing, params)
        made.join(out, view, listing, params, z, stash)
        dx = dy if self.spec.blend == "residual" else dy.clone()
        dz, grads = made.backward(dy, view, listing, params, z, stash, dx)
        grads |= made.weight_gradients(tap, dz, listing, params)
        return out, dx, made.tap_gradient(dz, listing, params, kept), grads

    def columns(self, slot):
        """The columns of a slot's chunk."""
        chunks = torch.arange(self.spec.features).tensor_split(self.spec.seeds)
        return chunks[int(self.owner[slot])]


def assert_close(site, found, expected, bound):
    names = ("y", "dx", "tap")
    for name, mine, theirs in zip(names, found, expected, strict=False):
        # Of the tap's gradient a few values are added up here, which may cancel.
        assert error(mine, theirs) <= (2 * bound if name == "tap" else bound), name
    assert set(found[3]) == set(expected[3])
    for name, theirs in expected[3].items():
        # One number a slot, in which most of what is added up cancels.
        assert error(found[3][name], theirs) <= bound * (8 if name == "gate_bias" else 1), name
        still = [slot for slot in range(site.spec.slots) if not theirs[slot].any()]
        assert not found[3][name][still].any(), name


@settings(max_examples=10, phases=(Phase.explicit, Phase.generate))
@given(
    kind=st.sampled_from(("lowrank", "widen", GATED)),
    blend=st.sampled_from(("residual", "lerp", "multiply", "gate")),
    cut=st.sampled_from(((24, 6), (23, 7), (40, 2), (9, 9))),
    rank=st.sampled_from((1, 3, 8, 16)),
    rows=st.sampled_from((1, 16, 45)),
    group=st.sampled_from((1, 2, 4)),
    dtype=st.sampled_from(tuple(BOUNDS)),
    packed=st.booleans(),
    draw=st.integers(0, 1 << 20),
)
def test_kernels_equal_the_torch_backend(kind, blend, cut, rank, rows, group, dtype, packed, draw):
    features, seeds = cut
    site = Site(
        kind, blend, features=features, seeds=seeds, rank=rank, rows=rows, dtype=dtype, draw=draw, width=33
    )
    # A single row's rounding errors have nothing to average over.
    bound = BOUNDS[dtype] * (2 if rows == 1 else 1)
    assert_close(site, site.run(group, packed), site.reference(), bound)


@pytest.mark.parametrize("kind", ["lowrank", "widen", GATED])
@pytest.mark.parametrize("blend", ["residual", "lerp", "multiply", "gate"])
def test_every_blend_of_every_blueprint(kind, blend):
    site = Site(kind, blend)
    assert_close(site, site.run(), site.reference(), 1e-5)


@pytest.mark.parametrize("pointwise", ACTIVATIONS)
def test_every_function_of_a_block_near_zero_and_far_from_it(pointwise):
    values = [-200.0, -60.0, -25.0, -8.0, -6.5, -3.5, -2.5, -1.5, -0.7, -0.3, -0.01]
    values += [-value for value in values] + [0.0]
    site = Site(
        "widen", pointwise=pointwise, rank=1, width=1, rows=23, states=(L.GRAFTING,), features=4, seeds=1
    )
    site.tap = torch.tensor(values)[:, None]
    site.params["in_weight"].fill_(1.0)
    site.params["in_bias"].zero_()
    found, expected = site.run(), site.reference()
    for mine, theirs in zip(found[:3], expected[:3], strict=True):
        assert torch.allclose(mine.double().cpu(), theirs, rtol=1e-5, atol=1e-5)


def test_a_wide_chunk_goes_through_in_pieces():
    for blend in ("lerp", "gate"):
        site = Site(GATED, blend, features=201, seeds=2, states=(L.GRAFTING, L.TRAINING), rows=20)
        assert_close(site, site.run(group=1), site.reference(), 1e-5)


def test_columns_that_no_seed_blends_into_stay_bit_for_bit():
    site = Site("widen", "lerp", dtype="bfloat16")
    out, dx, _, _ = site.run()
    blends = [slot for slot, state in enumerate(MIXED) if BLENDS >> state & 1]
    changed = torch.cat([site.columns(slot) for slot in blends])
    kept = [column for column in range(24) if column not in changed.tolist()]
    assert torch.equal(out.cpu()[:, kept].view(torch.int16), site.y[:, kept].view(torch.int16))
    assert torch.equal(dx.cpu()[:, kept].view(torch.int16), site.dy[:, kept].view(torch.int16))
    assert not torch.equal(out.cpu()[:, changed], site.y[:, changed])


@pytest.mark.parametrize(
    ("kind", "blend", "bad"),
    [("lowrank", "residual", torch.inf), ("lowrank", "multiply", torch.nan), (GATED, "gate", torch.inf)],
)
def test_what_is_not_finite_stays_in_its_seed(kind, blend, bad):
    """An Inf in dy or in a weight of one slot, which shares its tiles with others."""
    site = Site(kind, blend, states=(L.GRAFTING, L.FINE_TUNING, L.GRAFTING))
    site.lifecycle[site.owner] = torch.tensor([L.GRAFTING, L.FINE_TUNING, L.GRAFTING], dtype=torch.int32)
    calm = site.run(group=4)
    site.dy[3, site.columns(0)[0]] = bad
    site.params["out_weight"][0].view(-1)[0] = bad
    out, dx, _, grads = site.run(group=4)
    others = torch.cat([site.columns(1), site.columns(2)])
    assert torch.equal(out[:, others], calm[0][:, others])
    assert torch.equal(dx[:, others], calm[1][:, others])
    for name, gradient in grads.items():
        assert gradient[1:].isfinite().all(), name
        torch.testing.assert_close(gradient[1:], calm[3][name][1:])
    assert not out[:, site.columns(0)].isfinite().all()


def test_nothing_active_changes_nothing():
    site = Site("widen", "multiply", states=(L.DORMANT, L.GERMINATED))
    out, dx, taps, grads = site.run()
    assert torch.equal(out.cpu(), site.y)
    assert torch.equal(dx.cpu(), site.dy)
    assert not taps.any()
    assert not any(gradient.any() for gradient in grads.values())


def test_no_rows_give_zero_gradients():
    site = Site("widen")
    made = site.kernels()
    none = torch.zeros(0, 20, device=DEVICE)
    params = {name: value.to(DEVICE) for name, value in site.params.items()}
    z = torch.zeros(1, 5, 0, 4, device=DEVICE)
    view = view_of(site.y, -1)._replace(rows=0)
    dz, grads = made.backward(none, view, site.listing.to(DEVICE), params, z)
    grads |= made.weight_gradients(none, dz, site.listing.to(DEVICE), params)
    assert set(grads) == {"in_weight", "in_bias", "out_weight"}
    assert not any(gradient.any() for gradient in grads.values())


def test_two_backwards_agree_bitwise():
    site = Site(GATED, "gate", rows=70)
    first, second = site.run(), site.run()
    for mine, again in zip((*first[:3], *first[3].values()), (*second[:3], *second[3].values()), strict=True):
        assert torch.equal(mine, again)


def test_what_has_no_kernel_is_refused_with_the_reason():
    site = Site("lowrank")
    behind = Geometry(
        24, 4, 4, tap_features=20, spatial=2, layer_conv=ConvGeometry((3, 3), (1, 1), (1, 1), (1, 1))
    )
    with pytest.raises(UnsupportedKernelError, match="behind a convolution"):
        TapSeeds(site.spec, behind, DEVICE)


def test_kernels_compile_without_spills():
    jobs = []
    for dtype, kind, blend, chunk in (
        ("bfloat16", "lowrank", "residual", 4),
        ("bfloat16", GATED, "gate", 64),
        ("float32", "widen", "lerp", 16),
    ):
        site = Site(kind, blend, features=16 * chunk, seeds=16, rank=16, rows=1, dtype=dtype)
        shape = kernels.shape_of(site.spec, site.geometry)
        jobs.append(kernels.join_job(site.spec, shape, kernels.config_of(site.spec)))
        jobs += kernels.backward_jobs(site.spec, shape, kernels.backward_config_of(site.spec, shape))
    for job, result in zip(jobs, compile_all(jobs, processes=1), strict=True):
        assert isinstance(result, Resources), (job.function, result)
        assert not result.problem, (job.function, job.source.name, job.constants)


def test_weights_that_no_program_holds_are_refused() -> None:
    """Where they are not, the largest kernels fit into the shared memory of an H200."""
    jobs = []
    for dtype, kind, blend, chunk, rank in (
        ("float32", "lowrank", "residual", 128, 128),
        ("float32", "lowrank", "gate", 128, 64),
        ("bfloat16", GATED, "gate", 256, 128),
    ):
        site = Site(
            kind, blend, features=2 * chunk, seeds=2, rank=rank, rows=1, dtype=dtype, states=(L.GRAFTING,)
        )
        assert not kernels.refuses(site.spec, site.geometry)
        shape = kernels.shape_of(site.spec, site.geometry)
        jobs.append(kernels.join_job(site.spec, shape, kernels.config_of(site.spec)))
        jobs.append(kernels.backward_jobs(site.spec, shape, kernels.backward_config_of(site.spec, shape))[0])
        assert kernels.refuses(site.spec, site.geometry, shared=100_000)
    for job, result in zip(jobs, compile_all(jobs, processes=1), strict=True):
        assert isinstance(result, Resources), (job.function, result)
        assert result.shared <= kernels.shared_bytes(job.source.spec), (job.function, job.source.name)
    for blend, chunk, rank in (("residual", 256, 128), ("gate", 128, 128)):
        site = Site("lowrank", blend, features=2 * chunk, seeds=2, rank=rank, rows=1, states=(L.GRAFTING,))
        assert "more than a program holds" in kernels.refuses(site.spec, site.geometry)
