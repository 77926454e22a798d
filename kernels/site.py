"""The kernels of one bank of a site: everything that its forward and backward launch, chosen and ready."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from msgspec.structs import replace
from torch import Tensor

from morphc.kernels import active, gradient, ladder, tap_join, tap_step, training, tuning
from morphc.kernels.blueprints.base import ConvGeometry, Geometry, get
from morphc.kernels.compile import SHARED_LIMITS
from morphc.kernels.layout import View, Walk, is_dense, view_of
from morphc.kernels.reference.active_list import length
from morphc.kernels.spec import KernelSpec, TuneConfig
from morphc.kernels.tap import plan
from morphc.kernels.tap_join import TapSeeds


class ListedBank:
    """What all banks have: the list of active seeds."""

    def __init__(self, spec: KernelSpec, device: torch.device) -> None:
        self.spec = spec
        self.device = device
        self.list_shape = (length(spec.slots),)
        self._list = active.ActiveList(device)

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


class BankKernels(ListedBank):
    """Kernels of one bank whose blueprint reads its chunk, for activations of one dtype and walk on one device.

    They are compiled when first launched. Safe to share between sites: equal layers share them.
    """

    def __init__(self, spec: KernelSpec, device: torch.device) -> None:
        super().__init__(spec, device)
        self._forward: dict[int, active.Forward] = {}
        self._backward: dict[int, gradient.Backward] = {}
        self._trainers: dict[int, training.Trainer] = {}
        self.floats = spec.slots * gradient.gradient_size(spec)
        self._stepper: training.Trainer | None = None

    def new_stash(self, view: View) -> Tensor:
        """Room for the chunks that the forward overwrites, of every slot there is."""
        dtype = getattr(torch, self.spec.dtype)
        return torch.empty(active.stash_shape(self.spec, view), dtype=dtype, device=self.device)

    def forward(
        self, y: Tensor, view: View, listed: Tensor, params: Sequence[Tensor], stash: Tensor | None
    ) -> None:
        """Join the listed seeds to `y`, in place; their chunks as they were go to `stash`."""
        self.forward_of(view)(y, view, listed, params, stash)

    def forward_of(self, view: View) -> active.Forward:
        """What joins activations of about so many rows."""
        bucket = tuning.bucket(view.rows)
        kernel = self._forward.get(bucket)
        if kernel is None:
            spec = replace(self.spec, kind="forward")
            config = tuning.choose(spec, view.rows)
            behind = _behind(spec, view.rows, config)
            kernel = active.Forward(spec, config, self.device, _precision(), behind)
            self._forward[bucket] = kernel
        return kernel

    def backward_of(self, view: View) -> gradient.Backward:
        """What differentiates the join of activations of about so many rows."""
        bucket = tuning.bucket(view.rows)
        kernel = self._backward.get(bucket)
        if kernel is None:
            spec = replace(self.spec, kind="backward")
            config = tuning.lookup(spec, view.rows) or gradient.default(spec, view.rows)
            behind = _behind(spec, view.rows, config)
            kernel = gradient.Backward(spec, config, self.device, _precision(), behind)
            self._backward[bucket] = kernel
        return kernel

    def backward(
        self,
        grad: Tensor,
        like: Like,
        listed: Tensor,
        params: Sequence[Tensor],
        stash: Tensor,
        isolated_only: bool,
        owned: bool = False,
        into: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Gradient of the site's input, and of all parameters: [K * floats of a slot], one behind the other.

        like: the forward's value, by its memory. isolated_only: no seed blends, so `grad` passes as it is. owned:
        `grad` may be written, and becomes the result where its memory allows it; else it is only read. into: what
        gradients of parameters are added to and returned as.
        """
        dy, dy_view = like.walked(grad, self.spec.layout)
        kernel = self.backward_of(dy_view)
        add = into is not None
        flat = torch.empty(self.floats, dtype=torch.float32, device=self.device) if into is None else into
        if isolated_only:
            kernel(dy, dy_view, None, None, listed, params, stash, flat, add=add)
            dx = grad
        elif dy is not grad or (owned and is_dense(dy)):
            kernel(dy, dy_view, dy, dy_view, listed, params, stash, flat, add=add)
            dx = dy
        else:
            copied = not kernel.copies
            dx = dy.clone(memory_format=torch.preserve_format) if copied else torch.empty_like(dy)
            dx_view = view_of(dx, like.axis)
            assert dx_view is not None
            kernel(dy, dy_view, dx, dx_view, listed, params, stash, flat, copied=copied, add=add)
        return dx, flat

    def reconstruct(
        self,
        stash: Tensor,
        view: View,
        listed: Tensor,
        bank: training.Bank,
        loss: Tensor,
        rates: training.Rates,
    ) -> None:
        """One step of the isolated seeds towards giving back the chunks that the forward saved; loss: [K]."""
        bucket = tuning.bucket(view.rows)
        kernel = self._trainers.get(bucket)
        if kernel is None:
            spec = replace(self.spec, kind="train")
            config = tuning.lookup(spec, view.rows) or training.default(spec, view.rows)
            behind = _behind(spec, view.rows, config)
            kernel = training.Trainer(spec, config, self.device, _precision(), behind)
            self._trainers[bucket] = kernel
        kernel.reconstruct(stash, view, listed, bank, loss, rates, live=False)

    @property
    def stepper(self) -> training.Trainer:
        """What steps the slots that train."""
        if self._stepper is None:
            self._stepper = training.Trainer(replace(self.spec, kind="train"), None, self.device)
        return self._stepper


class TapBankKernels(ListedBank):
    """The same where the blueprint reads the layer's or the block's input, the tap: [rows, T] in y's dtype."""

    def __init__(self, spec: KernelSpec, geometry: Geometry, device: torch.device) -> None:
        super().__init__(spec, device)
        self.geometry = geometry
        self.shape = tap_join.shape_of(spec, geometry)
        self.names = tap_join.names_of(spec, geometry)
        self._seeds: dict[int, TapSeeds] = {}
        self._stepper: tap_step.TapStepper | None = None

    @property
    def stepper(self) -> tap_step.TapStepper:
        """What steps the slots that train."""
        if self._stepper is None:
            self._stepper = tap_step.TapStepper(self.spec, self.geometry, self.device)
        return self._stepper

    def seeds(self, rows: int) -> TapSeeds:
        """The kernels for about so many rows."""
        bucket = tuning.bucket(rows)
        found = self._seeds.get(bucket)
        if found is None:
            target = active.target_of(self.device)
            spec = replace(self.spec, kind="join")
            found = self._seeds[bucket] = TapSeeds(
                spec,
                self.geometry,
                self.device,
                plan=plan(spec, bucket, self.shape.parts, target),
                precision=_precision(),
            )
        return found

    def z_shape(self, rows: int) -> tuple[int, int, int, int]:
        """Of what the in-projections give."""
        return self.shape.parts, self.spec.slots, rows, self.spec.rank

    def stash_shape(self, rows: int) -> tuple[int, int, int]:
        """Of the chunks that the forward saves; nothing where the backward needs none."""
        saved = self.spec.blend not in tap_join.LINEAR_BLENDS
        return (self.spec.slots, rows, self.spec.chunk) if saved else (0, rows, self.spec.chunk)

    def forward(
        self,
        y: Tensor,
        view: View,
        listed: Tensor,
        params: Sequence[Tensor],
        tap: Tensor,
        z: Tensor | None = None,
        stash: Tensor | None = None,
    ) -> None:
        """Join the listed seeds to `y`, in place; z and stash, of the shapes above, are what the backward takes.

        Without z no backward will come, and isolated seeds have nothing to do.
        """
        seeds = self.seeds(view.rows)
        named = dict(zip(self.names, params, strict=True))
        made, _ = seeds.project(tap, listed, named, z=z, blending_only=z is None)
        seeds.join(y, view, listed, named, made, stash if stash is not None and len(stash) else None)

    def backward(
        self,
        grad: Tensor,
        like: Like,
        listed: Tensor,
        params: Sequence[Tensor],
        tap: Tensor,
        z: Tensor | None,
        stash: Tensor | None,
        wants_tap: bool,
    ) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        """Gradient of the site's input, of the tap if wanted, and of every parameter; `grad` is never written.

        like: the forward's value, by its memory. z: None where no seed blends, and no forward has run.
        """
        dy, view = like.walked(grad, self.spec.layout)
        seeds = self.seeds(view.rows)
        named = dict(zip(self.names, params, strict=True))
        passes = z is None or self.spec.blend == "residual"
        if z is None:
            z, _ = seeds.project(tap, listed, named)
            # No value of it is used, but its memory is read.
            stash = dy.new_empty(self.stash_shape(view.rows))
        dx = dy if passes else dy.clone(memory_format=torch.preserve_format)
        dx_view = view_of(dx, like.axis)
        assert dx_view is not None
        dz, grads = seeds.backward(dy, view, listed, named, z, stash, dx, dx_view)
        grads |= seeds.weight_gradients(tap, dz, listed, named)
        d_tap = seeds.tap_gradient(dz, listed, named, None) if wants_tap else None
        return grad if passes else dx, d_tap, [grads[name] for name in self.names]


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


def _behind(spec: KernelSpec, rows: int, config: TuneConfig) -> tuple[TuneConfig, ...]:
    """Configs to go on to where `config` spills: none where it was timed, which it then was with its spills."""
    return () if tuning.lookup(spec, rows) else ladder.rungs(spec, config)


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


def refusal(spec: KernelSpec, geometry: Geometry, device: torch.device | None = None) -> str:
    """Why torch computes such a bank on `device` (None: a GPU of today), or an empty string where kernels do."""
    if get(spec.blueprint).tap == "chunk":
        return active.refuses(spec) or gradient.refuses(spec)
    return tap_join.refuses(spec, geometry, _shared(device))


@lru_cache(maxsize=64)
def _shared(device: torch.device | None) -> int:
    """Bytes of shared memory that one program can have."""
    usual = SHARED_LIMITS["cuda:90"]
    if device is None or device.type != "cuda":
        return usual
    if torch.version.hip:
        name = torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
        return SHARED_LIMITS.get(f"hip:{name}", 1 << 16)
    major, minor = torch.cuda.get_device_capability(device)
    return SHARED_LIMITS.get(f"cuda:{major}{minor}", usual)


def coverage(blueprint: str) -> str:
    """What computes a blueprint where kernels run, for people."""
    kind = get(blueprint)
    linear = Geometry(64, 4, 4, tap_features=64 if kind.tap != "chunk" else 4)
    conv = replace(linear, spatial=2, layer_conv=_CONV, block_in=_CONV, block_out=_CONV)
    found = {}
    for where, geometry in (("linear layers", linear), ("convolutions", conv)):
        if not kind.refuses(geometry):
            spec = spec_of(
                blueprint,
                geometry,
                "residual",
                features=64,
                seeds=16,
                slots=4,
                dtype=torch.float32,
                walk="last",
            )
            found[where] = refusal(spec, geometry)
    reasons = set(found.values())
    if len(reasons) == 1:
        (reason,) = reasons
        return f"torch: {reason}" if reason else "kernels"
    return "; ".join(
        f"{where}: torch: {reason}" if reason else f"{where}: kernels" for where, reason in found.items()
    )


_CONV = ConvGeometry((3, 3), (1, 1), (1, 1), (1, 1))


@lru_cache(maxsize=4096)
def bank_kernels(
    spec: KernelSpec, geometry: Geometry, device: torch.device
) -> BankKernels | TapBankKernels | None:
    """The kernels of a bank, or None where there are none and torch does it."""
    if refusal(spec, geometry, device):
        return None
    if get(spec.blueprint).tap == "chunk":
        return BankKernels(spec, device)
    return TapBankKernels(spec, geometry, device)
