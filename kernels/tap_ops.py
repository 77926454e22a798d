"""`morphc::tap_forward` and `morphc::tap_backward`: the ops of `morphc.kernels.ops` for banks that read an input.

Their tap has the layer's or the block's input as rows of features, [rows, T], in y's dtype; y's features lie last.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from morphc.errors import UnsupportedKernelError
from morphc.kernels.layout import view_of
from morphc.kernels.ops import SiteSpec, kernels_of, site_in
from morphc.kernels.site import Like, TapBankKernels
from morphc.kernels.tap_join import LINEAR_BLENDS

_library = torch.library.Library("morphc", "FRAGMENT")  # type: ignore[no-untyped-call]
for _schema in (
    "tap_forward(Tensor y, Tensor tap, Tensor active, Tensor[] params, str spec, bool save, bool isolated_only) "
    "-> (Tensor, Tensor, Tensor)",
    "tap_backward(Tensor grad, Tensor tap, Tensor active, Tensor z, Tensor stash, Tensor[] params, str spec, "
    "bool isolated_only, bool wants_tap, SymInt[] shape, SymInt[] strides) -> Tensor[]",
):
    _library.define(_schema)  # type: ignore[no-untyped-call]


def walkable(tap: Tensor) -> Tensor:
    """`tap` [rows, T], or a copy whose features lie side by side."""
    return tap if tap.stride(1) == 1 or tap.shape[1] == 1 else tap.contiguous()


def _kernels(spec: str, like: Tensor) -> TapBankKernels:
    found = kernels_of(spec, like, "last")
    assert isinstance(found, TapBankKernels)
    return found


def _saved(y: Tensor, site: SiteSpec, save: bool, isolated_only: bool) -> tuple[Tensor, Tensor]:
    """z and stash, zeros: nothing is written for slots that aren't listed, and equal calls give equal results."""
    geometry, rows = site.geometry, y.numel() // site.features
    if not save or isolated_only:
        return y.new_empty(0), y.new_empty(0)
    z = y.new_zeros(2 if geometry.gated else 1, site.slots, rows, geometry.rank)
    kept = 0 if site.blend in LINEAR_BLENDS else site.slots
    return z, y.new_zeros(kept, rows, geometry.chunk)


def _forward(
    y: Tensor, tap: Tensor, active: Tensor, params: list[Tensor], spec: str, save: bool, isolated_only: bool
) -> tuple[Tensor, Tensor, Tensor]:
    site = site_in(spec)
    out = y.clone(memory_format=torch.preserve_format)
    z, stash = _saved(y, site, save, isolated_only)
    if isolated_only or not y.numel():
        return out, z, stash
    # A transposed value, say, is worked on in a plain copy, and comes back as it lay.
    worked = out if view_of(out, -1) is not None else out.contiguous()
    view = view_of(worked, -1)
    assert view is not None
    kernels = _kernels(spec, y)
    kernels.forward(worked, view, active, params, walkable(tap), z if save else None, stash)
    return out if worked is out else out.copy_(worked), z, stash


def _forward_fake(
    y: Tensor, tap: Tensor, active: Tensor, params: list[Tensor], spec: str, save: bool, isolated_only: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(y, memory_format=torch.preserve_format),
        *_saved(y, site_in(spec), save, isolated_only),
    )


def _backward(
    grad: Tensor,
    tap: Tensor,
    active: Tensor,
    z: Tensor,
    stash: Tensor,
    params: list[Tensor],
    spec: str,
    isolated_only: bool,
    wants_tap: bool,
    shape: list[int],
    strides: list[int],
) -> list[Tensor]:
    if not grad.numel():
        taps = [torch.zeros_like(tap, memory_format=torch.contiguous_format)] if wants_tap else []
        return [grad.clone(), *taps, *(torch.zeros_like(param) for param in params)]
    laid = torch.empty_strided(shape, strides, dtype=grad.dtype, device="meta")
    if view_of(laid, -1) is None:
        laid = laid.contiguous()
    like = Like(tuple(shape), laid.stride(), -1)
    passed, d_tap, grads = _kernels(spec, grad).backward(
        grad, like, active, params, walkable(tap), None if isolated_only else z, stash, wants_tap
    )
    # The gradient itself may have passed, and an op's results share nothing with what it is given.
    same = torch.empty_like(grad, memory_format=torch.preserve_format).copy_(passed)
    return [same, *([] if d_tap is None else [d_tap]), *grads]


def _backward_fake(
    grad: Tensor,
    tap: Tensor,
    active: Tensor,
    z: Tensor,
    stash: Tensor,
    params: list[Tensor],
    spec: str,
    isolated_only: bool,
    wants_tap: bool,
    shape: list[int],
    strides: list[int],
) -> list[Tensor]:
    return [
        torch.empty_like(grad, memory_format=torch.preserve_format),
        *([torch.empty_like(tap, memory_format=torch.contiguous_format)] if wants_tap else []),
        *(torch.empty_like(param) for param in params),
    ]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, tap, active, params, ctx.spec, _, ctx.isolated_only = inputs
    out, z, stash = output
    ctx.shape, ctx.strides = list(out.shape), list(out.stride())
    ctx.save_for_backward(tap, active, z, stash, *params)
    ctx.mark_non_differentiable(z, stash)


def _differentiate(ctx: Any, grad: Tensor, _: Tensor, __: Tensor) -> tuple[Any, ...]:
    tap, active, z, stash, *params = ctx.saved_tensors
    wants_tap = ctx.needs_input_grad[1] and not ctx.isolated_only
    passed, *found = torch.ops.morphc.tap_backward(
        grad, tap, active, z, stash, params, ctx.spec, ctx.isolated_only, wants_tap, ctx.shape, ctx.strides
    )
    d_tap = found.pop(0) if wants_tap else None
    return passed, d_tap, None, found, None, None, None


def _mapped(
    info: Any,
    in_dims: tuple[Any, ...],
    y: Tensor,
    tap: Tensor,
    active: Tensor,
    params: list[Tensor],
    spec: str,
    save: bool,
    isolated_only: bool,
) -> tuple[Any, Any]:
    """torch.vmap: a batch more of rows, in y as in the tap."""
    if any(dim is not None for dim in (in_dims[2], *in_dims[3])):
        raise UnsupportedKernelError(
            "vmap over the seeds or slots of a site is not supported: map over the model's inputs only"
        )

    def batched(value: Tensor, dim: int | None) -> Tensor:
        if dim is None:
            return value.unsqueeze(0).expand(info.batch_size, *value.shape)
        return value.movedim(dim, 0)

    ys, taps = batched(y, in_dims[0]).contiguous(), batched(tap, in_dims[1]).flatten(0, 1)
    found = torch.ops.morphc.tap_forward(ys, taps, active, params, spec, save, isolated_only)
    return found, (0, None, None)


for _name, _run, _fake in (
    ("tap_forward", _forward, _forward_fake),
    ("tap_backward", _backward, _backward_fake),
):
    _library.impl(_name, _run, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"morphc::{_name}", _fake, lib=_library)
torch.library.register_autograd("morphc::tap_forward", _differentiate, setup_context=_save, lib=_library)
torch.library.register_vmap("morphc::tap_forward", _mapped, lib=_library)
