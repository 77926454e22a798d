"""Sites with seeds in every state, and the gradients that plain torch finds for them in float64."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from morphc.kernels.blueprints.base import Geometry, get
from morphc.kernels.layout import View, view_of
from morphc.kernels.reference.active_list import BLENDING, HEADER, LISTED, active_list
from morphc.kernels.reference.blends import blend_shapes
from morphc.kernels.reference.chunks import bounds, widest
from morphc.kernels.spec import KernelSpec
from morphc.lifecycle import BLENDS, ISOLATED, TRAINS, Lifecycle
from morphc.runtime.active import describe, through_bank

L = Lifecycle
STATES = (L.GRAFTING, L.FINE_TUNING, L.FOSSILIZED, L.TRAINING, L.DORMANT)
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 5e-3}


@dataclasses.dataclass
class Case:
    """A site with one bank: its activation and the gradient of what it became, and the states of its seeds."""

    spec: KernelSpec
    y: Tensor
    dy: Tensor
    axis: int
    owner: Tensor
    lifecycle: Tensor
    alpha: Tensor
    params: dict[str, Tensor]

    @property
    def geometry(self) -> Geometry:
        spec = self.spec
        return Geometry(spec.features, spec.chunk, spec.rank, tap_features=spec.features)

    @property
    def active(self) -> Tensor:
        return active_list(self.owner, self.lifecycle, self.alpha, BLENDS, ISOLATED, TRAINS)

    @property
    def view(self) -> View:
        return view(self.y, self.axis)

    @property
    def slots(self):
        return describe(self.owner, self.lifecycle, self.alpha, self.spec.features)

    def listed(self) -> list[int]:
        """Seeds in the order of the list."""
        active = self.active
        start = HEADER + self.spec.slots
        return active[start : start + int(active[LISTED])].tolist()

    def blending(self) -> list[int]:
        """Seeds that blend."""
        return self.listed()[: int(self.active[BLENDING])]

    def stash(self) -> Tensor:
        """The chunks of the listed seeds as the forward saves them; NaN where it writes nothing."""
        spec = self.spec
        y = self.y.movedim(self.axis, -1).reshape(-1, spec.features)
        saved = torch.full((spec.slots, y.shape[0], spec.chunk), torch.nan, dtype=y.dtype, device=y.device)
        for place, seed in enumerate(self.listed()):
            start, stop = bounds(spec.features, spec.seeds)[seed]
            saved[place, :, : stop - start] = y[:, start:stop]
        return saved.transpose(1, 2).contiguous() if spec.layout == "channels_first" else saved


def view(y: Tensor, axis: int) -> View:
    if not y.numel():
        return View("last", 0, y.shape[axis], 1)
    found = view_of(y, axis)
    assert found is not None
    return found


def case(
    features: int,
    seeds: int,
    slots: int,
    rank: int,
    *,
    rows: int = 70,
    shape: tuple[int, ...] | None = None,
    blueprint: str = "bottleneck",
    blend: str = "residual",
    dtype: torch.dtype = torch.float32,
    states: tuple[Lifecycle, ...] = STATES,
    gap: int = 0,
    order: str = "random",
    seed: int = 0,
    device: torch.device | None = None,
) -> Case:
    """Seeds in random states of `states`, held by slots in a random order, or in theirs. shape: the activation's with
    the features on axis 1, instead of [rows, features] with `gap` elements between rows."""
    g = torch.Generator().manual_seed(seed)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return torch.randn(size, generator=g) * scale

    chunk = widest(features, seeds)
    holders = torch.randperm(seeds, generator=g)[:slots]
    if order == "sorted":
        holders = holders.sort().values
    owner = torch.full((slots,), -1)
    owner[torch.randperm(slots, generator=g)[: len(holders)]] = holders
    choice = torch.randint(len(states), (seeds,), generator=g)
    lifecycle = torch.tensor([int(state) for state in states], dtype=torch.int32)[choice]
    alpha = torch.rand(seeds, generator=g) * (torch.rand(seeds, generator=g) > 0.1)
    spec = KernelSpec(
        kind="backward",
        features=features,
        seeds=seeds,
        chunk=chunk,
        slots=slots,
        rank=rank,
        blueprint=blueprint,
        blend=blend,
        epilogue=None,
        layout="last" if shape is None or math.prod(shape[2:]) == 1 else "channels_first",
        dtype=str(dtype).removeprefix("torch."),
    )
    geometry = Geometry(features, chunk, rank, tap_features=features)
    sizes = get(blueprint).shapes(geometry) | blend_shapes(blend, chunk)
    params = {name: normal(slots, *size, scale=0.5) for name, size in sizes.items()}
    if shape is None:
        y, dy = (normal(rows, features + gap).to(dtype)[:, :features] for _ in range(2))
        axis = -1
    else:
        y, dy = (normal(*shape).to(dtype) for _ in range(2))
        axis = 1
    made = Case(spec, y, dy, axis, owner, lifecycle, alpha, params)
    if device is not None and device.type != "cpu":
        made = on(made, device)
    return made


def on(made: Case, device: torch.device) -> Case:
    """The same case there; gaps between rows are kept."""

    def moved(tensor: Tensor) -> Tensor:
        there = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
        return there.copy_(tensor)

    return dataclasses.replace(
        made,
        y=moved(made.y),
        dy=moved(made.dy),
        owner=made.owner.to(device),
        lifecycle=made.lifecycle.to(device),
        alpha=made.alpha.to(device),
        params={name: param.to(device) for name, param in made.params.items()},
    )


def reference(made: Case) -> tuple[Tensor, dict[str, Tensor]]:
    """Gradients of the activation and of the bank's parameters, in float64."""
    y = made.y.detach().double().requires_grad_()
    leaves = {name: param.double().requires_grad_() for name, param in made.params.items()}
    out = through_bank(
        y,
        y,
        None,
        leaves,
        made.slots,
        get(made.spec.blueprint),
        made.geometry,
        made.spec.blend,
        made.axis,
    )
    out.backward(made.dy.double())
    assert y.grad is not None
    grads = {
        name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in leaves.items()
    }
    return y.grad, grads


def distance(found: Tensor, expected: Tensor) -> float:
    """Relative to the norm of what is expected."""
    error = (found.double() - expected.double()).norm()
    return float(error / expected.double().norm().clamp(min=1e-30)) if float(error) else 0.0
