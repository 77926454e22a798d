"""One site's seeds and slots as the runtime has them, made up at random, and the kernels that serve them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from parity_reference import Active
from torch import Tensor

from morphc.kernels.active import params_of
from morphc.kernels.blueprints import get
from morphc.kernels.blueprints.base import Geometry
from morphc.kernels.reference.blends import blend_shapes
from morphc.kernels.spec import KernelSpec
from morphc.lifecycle import Lifecycle

BLENDING = (
    Lifecycle.GRAFTING,
    Lifecycle.STABILIZATION,
    Lifecycle.EVALUATING,
    Lifecycle.FINE_TUNING,
    Lifecycle.FOSSILIZED,
)
TRAINED = (Lifecycle.GRAFTING, Lifecycle.FINE_TUNING, Lifecycle.TRAINING)
IDLE = (Lifecycle.DORMANT, Lifecycle.CULLED, Lifecycle.CANCELLED, Lifecycle.ROLLED_BACK)


@dataclass
class Bank:
    """owner [K] int64, lifecycle [S] int32, alpha [S] float32, params: float32 [K, ...] by name.

    known: the same as the host knows it, in the order of the list: blending seeds, then isolated ones.
    """

    spec: KernelSpec
    geometry: Geometry
    owner: Tensor
    lifecycle: Tensor
    alpha: Tensor
    params: dict[str, Tensor]
    known: Active

    @property
    def values(self) -> tuple[Tensor, ...]:
        """The parameters in the bank's order."""
        return tuple(self.params[name] for name in params_of(self.spec))


def bank(
    *,
    features: int,
    seeds: int,
    rank: int,
    slots: int,
    blending: int,
    isolated: int,
    dtype: torch.dtype,
    device: torch.device,
    blueprint: str = "bottleneck",
    blend: str = "residual",
    walk: str = "last",
    all_train: bool = False,
    alpha: float | None = None,
    draw: int = 0,
    tap: int = 0,
    activation: str = "gelu",
    gated: bool = False,
) -> Bank:
    """`blending` and `isolated` seeds at random places, their slots in random order; further slots are free.

    all_train: every blending seed trains, instead of those in two of the five states that blend. alpha: of all
    that blend; None for values between 0.05 and 1. tap: features of what the blueprint reads; 0: its own chunk.
    """
    g = torch.Generator().manual_seed(draw)
    chunk = -(-features // seeds)
    held = blending + isolated
    places = torch.randperm(seeds, generator=g)
    first = places[:blending].sort().values
    second = places[blending:held].sort().values
    seed = torch.cat((first, second))
    slot = torch.randperm(slots, generator=g)[:held]
    states = BLENDING if not all_train else (Lifecycle.GRAFTING, Lifecycle.FINE_TUNING)
    lifecycle = _some(IDLE, seeds, g)
    lifecycle[first] = _some(states, blending, g)
    lifecycle[second] = int(Lifecycle.TRAINING)
    strengths = torch.rand(seeds, generator=g) * 0.95 + 0.05 if alpha is None else torch.full((seeds,), alpha)
    owner = torch.full((slots,), -1, dtype=torch.int64)
    owner[slot] = seed
    blends = torch.arange(held) < blending
    trains = torch.isin(lifecycle[seed], torch.tensor([int(state) for state in TRAINED], dtype=torch.int32))
    known = Active(seed, slot, strengths[seed].double(), blends, ~blends, trains)
    geometry = Geometry(
        features, chunk, rank, tap_features=tap or features, activation=activation, gated=gated
    )
    shapes = get(blueprint).shapes(geometry) | blend_shapes(blend, chunk)
    params = {
        name: (torch.randn(slots, *shape, generator=g) * _size(name, geometry)).to(device)
        for name, shape in shapes.items()
    }
    spec = KernelSpec(
        kind="forward",
        features=features,
        seeds=seeds,
        chunk=chunk,
        slots=slots,
        rank=rank,
        blueprint=blueprint,
        blend=blend,
        epilogue=None,
        layout="channels_first" if walk == "channels_first" else "last",
        dtype=str(dtype).removeprefix("torch."),
    )
    return Bank(
        spec,
        geometry,
        owner.to(device),
        lifecycle.to(device),
        strengths.to(device),
        params,
        Active(*(value.to(device) for value in known)),
    )


def _some(states: tuple[Lifecycle, ...], count: int, generator: torch.Generator) -> Tensor:
    numbers = torch.tensor([int(state) for state in states], dtype=torch.int32)
    return numbers[torch.randint(len(states), (count,), generator=generator)]


def _size(name: str, geometry: Geometry) -> float:
    """Standard deviation that keeps every value about 1."""
    if name in ("in_weight", "gate_in_weight"):
        return (
            geometry.chunk if geometry.tap_features == geometry.features else geometry.tap_features
        ) ** -0.5
    if name == "gate_weight":
        return geometry.chunk**-0.5
    if name == "out_weight":
        return geometry.rank**-0.5
    return 0.3
