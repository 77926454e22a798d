"""The kernels of one bank of a site: everything that its forward and backward launch, chosen and ready."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from msgspec.structs import replace
from torch import Tensor

from morphc.kernels import active, gradient, training, tuning
from morphc.kernels.blueprints.base import Geometry
from morphc.kernels.layout import View, Walk, view_of
from morphc.kernels.reference.active_list import length
from morphc.kernels.spec import KernelSpec


class BankKernels:
    """Kernels of one bank for activations of one dtype and walk on one device.

    They are compiled when first launched. Safe to share between sites: equal layers share them.
    """

    def __init__(self, spec: KernelSpec, device: torch.device) -> None:
        self.spec = spec
        self.device = device
        self.list_shape = (length(spec.slots),)
        self._list = active.ActiveList(device)
        self._forward: dict[int, active.Forward] = {}
        self._backward: dict[int, gradient.Backward] = {}
        self._trainer: training.Trainer | None = None

    def new_list(self) -> Tensor:
        """A list of active seeds with nothing on it."""
        return self._list.new(self.spec.slots)

    def make_list(
        self,
        owner: Tensor,
        lifecycle: Tensor,
        alpha: Tensor,
        listed: Tensor,
        blends: int,
        isolated: int,
        trains: int,
    ) -> None:
        """Write the list into `listed`. owner: [K]; lifecycle, alpha: [S], the site's rows; then sets of states."""
        self._list(owner, lifecycle, alpha, listed, blends, isolated, trains)

    def new_stash(self, view: View) -> Tensor:
        """Room for the chunks that the forward overwrites, of every slot there is."""
        dtype = getattr(torch, self.spec.dtype)
        return torch.empty(active.stash_shape(self.spec, view), dtype=dtype, device=self.device)

    def forward(
        self, y: Tensor, view: View, listed: Tensor, params: Sequence[Tensor], stash: Tensor | None
    ) -> None:
        """Join the listed seeds to `y`, in place; their chunks as they were go to `stash`."""
        bucket = tuning.bucket(view.rows)
        kernel = self._forward.get(bucket)
        if kernel is None:
            spec = replace(self.spec, kind="forward")
            config = tuning.choose(spec, view.rows)
            kernel = self._forward[bucket] = active.Forward(spec, config, self.device, _precision())
        kernel(y, view, listed, params, stash)

    def backward(
        self,
        grad: Tensor,
        like: Like,
        listed: Tensor,
        params: Sequence[Tensor],
        stash: Tensor,
        isolated_only: bool,
    ) -> tuple[Tensor, list[Tensor]]:
        """Gradient of the site's input, and of every parameter [K, ...]; `grad` is never written.

        like: the forward's value, by its memory. isolated_only: no seed blends, so `grad` passes as it is.
        """
        dy, dy_view = like.walked(grad, self.spec.layout)
        bucket = tuning.bucket(dy_view.rows)
        kernel = self._backward.get(bucket)
        if kernel is None:
            spec = replace(self.spec, kind="backward")
            config = tuning.known([spec]).get(tuning.key(spec, dy_view.rows))
            config = config or gradient.default(spec, dy_view.rows)
            kernel = self._backward[bucket] = gradient.Backward(spec, config, self.device, _precision())
        size = self.spec.slots * gradient.gradient_size(self.spec)
        flat = torch.empty(size, dtype=torch.float32, device=self.device)
        if isolated_only:
            kernel(dy, dy_view, None, None, listed, params, stash, flat)
            dx = grad
        else:
            copied = not kernel.copies
            dx = dy.clone(memory_format=torch.preserve_format) if copied else torch.empty_like(dy)
            dx_view = view_of(dx, like.axis)
            assert dx_view is not None
            kernel(dy, dy_view, dx, dx_view, listed, params, stash, flat, copied=copied)
        return dx, list(gradient.sections(self.spec, flat).values())

    def step(
        self, listed: Tensor, bank: training.Bank, gradients: Sequence[Tensor], rates: training.Rates
    ) -> None:
        """One AdamW step of the slots that train."""
        if self._trainer is None:
            self._trainer = training.Trainer(replace(self.spec, kind="train"), None, self.device)
        self._trainer.step(listed, bank, gradients, rates)


class Like(NamedTuple):
    """The memory of a value: what a gradient is copied to where the kernels can't walk it as it lies."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    axis: int

    def walked(self, grad: Tensor, walk: str) -> tuple[Tensor, View]:
        """`grad`, or a copy of it, and how the kernels walk it."""
        view = view_of(grad, self.axis)
        if view is None or view.walk != walk:
            laid = torch.empty_strided(self.shape, self.strides, dtype=grad.dtype, device=grad.device)
            grad = laid.copy_(grad)
            view = view_of(grad, self.axis)
        assert view is not None
        return grad, view


def _precision() -> active.Precision:
    """Of float32 dots: what the user allows torch's own matrix products."""
    return "tf32" if torch.get_float32_matmul_precision() != "highest" else "tf32x3"


def spec_of(
    blueprint: str,
    geometry: Geometry,
    blend: str,
    *,
    features: int,
    seeds: int,
    slots: int,
    dtype: torch.dtype,
    walk: Walk,
) -> KernelSpec:
    """The spec of a bank's kernels."""
    return KernelSpec(
        kind="forward",
        features=features,
        seeds=seeds,
        chunk=geometry.chunk,
        slots=slots,
        rank=geometry.rank,
        blueprint=blueprint,
        blend=blend,
        epilogue=None,
        layout=walk,
        dtype=str(dtype).removeprefix("torch."),
    )


@lru_cache(maxsize=4096)
def bank_kernels(spec: KernelSpec, device: torch.device) -> BankKernels | None:
    """The kernels of a bank, or None where there are none and torch does it."""
    return None if active.refuses(spec) or gradient.refuses(spec) else BankKernels(spec, device)
