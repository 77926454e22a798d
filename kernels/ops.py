"""The registered ops: a small fixed set, whatever the number of kernels.

`morphc::active_list`, `morphc::site_forward` and `morphc::site_backward` are what a traced graph holds in place of a
site's kernels; where a blueprint reads an input, `tap_forward` and `tap_backward` (`morphc.kernels.tap_ops`). Which
kernels they run is an argument, the text of a `SiteSpec`: two graphs that differ in a kernel differ in that text, so
whoever keeps compiled graphs by what is in them keeps the right ones. Eager code doesn't come through here: it calls
the same kernels with less in between (`morphc.runtime.engine`).

No op writes to what it is given, and none returns it. Under autocast they take values as they come: a site's value
has the type that its layer gave it, and the banks are float32 always.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import msgspec
import torch
from torch import Tensor

from morphc.errors import UnsupportedKernelError
from morphc.kernels.blueprints.base import Geometry, get
from morphc.kernels.layout import View, view_of
from morphc.kernels.reference.active_list import length
from morphc.kernels.site import BankKernels, Like, TapBankKernels, bank_kernels, refusal, spec_of
from morphc.kernels.spec import KernelSpec


class SiteSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything that decides which kernels a bank of a site runs, besides the tensors given.

    axis: the feature axis, counted from the end. blends, isolated, trains: sets of states, bit n for state n.
    """

    blueprint: str
    blend: str
    geometry: Geometry
    features: int
    seeds: int
    slots: int
    axis: int
    blends: int
    isolated: int
    trains: int

    def text(self) -> str:
        """What the ops take."""
        return msgspec.json.encode(self, order="sorted").decode()

    def refusal(self, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> str:
        """Why there are no kernels for it, an empty string if there are. What float32 has, all types have
        that kernels read.
        """
        reason = refusal(spec_in(self.text(), dtype, "last"), self.geometry, device)
        if not reason and self.axis != -1 and get(self.blueprint).tap != "chunk":
            return (
                f"blueprint {self.blueprint!r} reads rows of features, and these lie along axis {self.axis}"
            )
        return reason


@lru_cache(maxsize=4096)
def site_in(text: str) -> SiteSpec:
    """What `SiteSpec.text` gave."""
    return msgspec.json.decode(text, type=SiteSpec)


@lru_cache(maxsize=4096)
def spec_in(text: str, dtype: torch.dtype, walk: Any) -> KernelSpec:
    """The spec of its kernels for such activations."""
    site = site_in(text)
    return spec_of(
        site.blueprint,
        site.geometry,
        site.blend,
        features=site.features,
        seeds=site.seeds,
        slots=site.slots,
        dtype=dtype,
        walk=walk,
    )


def kernels_of(text: str, like: Tensor, walk: Any) -> BankKernels | TapBankKernels:
    """The kernels for activations like `like`. Raises UnsupportedKernelError."""
    spec, geometry = spec_in(text, like.dtype, walk), site_in(text).geometry
    found = bank_kernels(spec, geometry, like.device)
    if found is None:
        raise UnsupportedKernelError(f"{spec.name} on {like.device}: {refusal(spec, geometry, like.device)}")
    return found


def _kernels(text: str, like: Tensor, walk: Any) -> BankKernels:
    found = kernels_of(text, like, walk)
    assert isinstance(found, BankKernels)
    return found


def _view(y: Tensor, axis: int) -> View:
    view = view_of(y, axis)
    if view is None:
        raise UnsupportedKernelError(
            f"no kernel walks a value of shape {tuple(y.shape)}, strides {y.stride()}"
        )
    return view


_library = torch.library.Library("morphc", "FRAGMENT")  # type: ignore[no-untyped-call]
for _schema in (
    "active_list(Tensor owner, Tensor lifecycle, Tensor alpha, str spec) -> Tensor",
    "site_forward(Tensor y, Tensor active, Tensor[] params, str spec, bool save, bool isolated_only) "
    "-> (Tensor, Tensor)",
    "site_backward(Tensor grad, Tensor active, Tensor stash, Tensor[] params, str spec, bool isolated_only, "
    "SymInt[] shape, SymInt[] strides) -> Tensor[]",
):
    _library.define(_schema)  # type: ignore[no-untyped-call]


def _active_list(owner: Tensor, lifecycle: Tensor, alpha: Tensor, spec: str) -> Tensor:
    site = site_in(spec)
    kernels = kernels_of(spec, alpha, "last")
    listed = kernels.new_list()
    kernels.make_list(
        owner, lifecycle.contiguous(), alpha.contiguous(), listed, site.blends, site.isolated, site.trains
    )
    return listed


def _active_list_fake(owner: Tensor, lifecycle: Tensor, alpha: Tensor, spec: str) -> Tensor:
    return owner.new_empty(length(site_in(spec).slots), dtype=torch.int32)


def _site_forward(
    y: Tensor, active: Tensor, params: list[Tensor], spec: str, save: bool, isolated_only: bool
) -> tuple[Tensor, Tensor]:
    out = y.clone(memory_format=torch.preserve_format)
    if not y.numel():
        return out, y.new_empty(0)
    axis = site_in(spec).axis
    view = view_of(out, axis)
    if view is None:  # a transposed value, say: worked on in a plain copy, whose result comes back as it lay
        plain, saved = _site_forward(out.contiguous(), active, params, spec, save, isolated_only)
        return out.copy_(plain), saved
    kernels = _kernels(spec, y, view.walk)
    # Zeros, since nothing is written for slots that aren't listed: equal calls give equal results, all of them.
    stash = kernels.new_stash(view).view(-1).zero_() if save else None
    if save or not isolated_only:
        kernels.forward(out, view, active, params, stash)
    return out, y.new_empty(0) if stash is None else stash


def _site_forward_fake(
    y: Tensor, active: Tensor, params: list[Tensor], spec: str, save: bool, isolated_only: bool
) -> tuple[Tensor, Tensor]:
    site = site_in(spec)
    saved = y.numel() // site.features * site.slots * site.geometry.chunk if save else 0
    return torch.empty_like(y, memory_format=torch.preserve_format), y.new_empty(saved)


def _site_backward(
    grad: Tensor,
    active: Tensor,
    stash: Tensor,
    params: list[Tensor],
    spec: str,
    isolated_only: bool,
    shape: list[int],
    strides: list[int],
) -> list[Tensor]:
    site = site_in(spec)
    if not grad.numel():
        return [grad.clone(), *(torch.zeros_like(param) for param in params)]
    laid = torch.empty_strided(shape, strides, dtype=grad.dtype, device="meta")
    if view_of(laid, site.axis) is None:
        laid = laid.contiguous()
    like = Like(tuple(shape), laid.stride(), site.axis)
    walk = _view(laid, site.axis).walk
    passed, slot_grads = _kernels(spec, grad, walk).backward(grad, like, active, params, stash, isolated_only)
    # The gradient itself may have passed, and the others are views of one buffer: an op's results share nothing.
    same = torch.empty_like(grad, memory_format=torch.preserve_format).copy_(passed)
    return [same, *(found.clone() for found in slot_grads)]


def _site_backward_fake(
    grad: Tensor,
    active: Tensor,
    stash: Tensor,
    params: list[Tensor],
    spec: str,
    isolated_only: bool,
    shape: list[int],
    strides: list[int],
) -> list[Tensor]:
    return [
        torch.empty_like(grad, memory_format=torch.preserve_format),
        *(torch.empty_like(param) for param in params),
    ]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, active, params, ctx.spec, _, ctx.isolated_only = inputs
    ctx.shape, ctx.strides = list(output[0].shape), list(output[0].stride())
    ctx.save_for_backward(active, output[1], *params)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Any, ...]:
    active, stash, *params = ctx.saved_tensors
    passed, *slot_grads = torch.ops.morphc.site_backward(
        grad, active, stash, params, ctx.spec, ctx.isolated_only, ctx.shape, ctx.strides
    )
    return passed, None, slot_grads, None, None, None


def _mapped(
    info: Any,
    in_dims: tuple[Any, ...],
    y: Tensor,
    active: Tensor,
    params: list[Tensor],
    spec: str,
    save: bool,
    isolated_only: bool,
) -> tuple[Any, Any]:
    """torch.vmap: a batch more of rows. The feature axis counts from the end, so the batch goes to the front."""
    if any(dim is not None for dim in (in_dims[1], *in_dims[2])):
        raise UnsupportedKernelError(
            "vmap over the seeds or slots of a site is not supported: map over the model's inputs only"
        )
    batched = y.movedim(in_dims[0], 0).contiguous()
    out, stash = torch.ops.morphc.site_forward(batched, active, params, spec, save, isolated_only)
    return (out, stash), (0, None)


for _name, _run, _fake in (
    ("active_list", _active_list, _active_list_fake),
    ("site_forward", _site_forward, _site_forward_fake),
    ("site_backward", _site_backward, _site_backward_fake),
):
    _library.impl(_name, _run, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"morphc::{_name}", _fake, lib=_library)
torch.library.register_autograd("morphc::site_forward", _differentiate, setup_context=_save, lib=_library)
torch.library.register_vmap("morphc::site_forward", _mapped, lib=_library)
