"""A bank with seeds in drawn states, its site's activation, and what both make of them in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from morphc.kernels.active import ActiveList, Forward, params_of, stash_shape
from morphc.kernels.blueprints.base import Geometry, get
from morphc.kernels.layout import View, view_of
from morphc.kernels.reference.blends import blend_shapes
from morphc.kernels.reference.chunks import bounds
from morphc.kernels.spec import KernelSpec, TuneConfig
from morphc.lifecycle import BLENDS, ISOLATED, TRAINS, Lifecycle
from morphc.runtime.active import describe, through_bank

BOUND = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 5e-3}


@dataclass
class Bank:
    """owner [K]; lifecycle, alpha [S]; params [K, ...]; active: the list."""

    spec: KernelSpec
    owner: Tensor
    lifecycle: Tensor
    alpha: Tensor
    params: list[Tensor]
    active: Tensor

    @property
    def axis(self) -> int:
        return 1 if self.spec.layout == "channels_first" else -1

    @property
    def listed(self) -> int:
        return int(self.active[0])

    @property
    def blending(self) -> int:
        return int(self.active[1])

    def seed_at(self, position: int) -> int:
        return int(self.active[4 + self.spec.slots + position])

    def slot_at(self, position: int) -> int:
        return int(self.active[4 + position])

    def chunk(self, position: int) -> slice:
        """Features of the chunk at a position of the list."""
        return slice(*bounds(self.spec.features, self.spec.seeds)[self.seed_at(position)])

    def relist(self) -> None:
        ActiveList(self.active.device)(
            self.owner, self.lifecycle, self.alpha, self.active, BLENDS, ISOLATED, TRAINS
        )

    def reference(self, y: Tensor) -> Tensor:
        """The site's value in float64, on the CPU."""
        spec = self.spec
        geometry = Geometry(spec.features, spec.chunk, spec.rank, tap_features=spec.features)
        wide = y.cpu().double()
        slots = describe(self.owner.cpu(), self.lifecycle.cpu(), self.alpha.cpu(), spec.features)
        params = {
            name: value.cpu().double() for name, value in zip(params_of(spec), self.params, strict=True)
        }
        blueprint = get(spec.blueprint)
        with torch.no_grad():
            return through_bank(wide, wide, None, params, slots, blueprint, geometry, spec.blend, self.axis)

    def run(
        self, x: Tensor, config: TuneConfig, *, view: View | None = None, stash: bool = False
    ) -> Tensor | None:
        """The kernel, on `x` in place; the saved chunks, which begin as -77."""
        view = view or view_of(x, self.axis)
        assert view is not None
        saved = torch.full(stash_shape(self.spec, view), -77.0, dtype=x.dtype, device=x.device)
        forward = Forward(self.spec, config, x.device, "ieee")
        forward(x, view, self.active, self.params, saved if stash else None)
        return saved if stash else None


def bank(
    features: int,
    seeds: int,
    *,
    device: torch.device,
    rank: int = 4,
    slots: int = 0,
    blueprint: str = "bottleneck",
    blend: str = "residual",
    layout: str = "last",
    dtype: torch.dtype = torch.float32,
    states: str = "mixed",
    draw: int = 0,
) -> Bank:
    """states: `mixed`, or the name of the one that every seed is in (alpha 0.5)."""
    generator = torch.Generator().manual_seed(draw)
    slots = slots or seeds
    spec = KernelSpec(
        kind="forward",
        features=features,
        seeds=seeds,
        chunk=-(-features // seeds),
        slots=slots,
        rank=rank,
        blueprint=blueprint,
        blend=blend,
        epilogue=None,
        layout=layout,  # type: ignore[arg-type]
        dtype=str(dtype).removeprefix("torch."),
    )
    owner = torch.randperm(max(seeds, slots), generator=generator)[:slots]
    owner[owner >= seeds] = -1
    if states == "mixed":
        lifecycle = torch.randint(0, len(Lifecycle), (seeds,), generator=generator, dtype=torch.int32)
        alpha = torch.rand(seeds, generator=generator)
        alpha[torch.rand(seeds, generator=generator) < 0.2] = 0.0
    else:
        lifecycle = torch.full((seeds,), Lifecycle[states], dtype=torch.int32)
        alpha = torch.full((seeds,), 0.5)
    geometry = Geometry(features, spec.chunk, rank, tap_features=features)
    shapes = get(blueprint).shapes(geometry) | blend_shapes(blend, spec.chunk)
    params = [torch.randn(slots, *shape, generator=generator).to(device) for shape in shapes.values()]
    made = Bank(
        spec,
        owner.to(device),
        lifecycle.to(device),
        alpha.to(device),
        params,
        ActiveList(device).new(slots),
    )
    made.relist()
    return made


def error(got: Tensor, want: Tensor) -> float:
    """Norm of the difference, relative."""
    return float((got.cpu().double() - want).norm() / want.norm().clamp(min=1e-30))


def same_bits(a: Tensor, b: Tensor) -> bool:
    kind = torch.int32 if a.dtype == torch.float32 else torch.int16
    return torch.equal(a.contiguous().view(kind), b.contiguous().view(kind))
