"""Forward of a site that is not dormant: all slots of a bank at once, in differentiable torch operations.

Nothing is read back from the device, nothing loops over seeds, and every choice between values is a select
and never a product with zero, so that an Inf or NaN in one chunk, slot or padding column stays where it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from morphc.errors import SeedError
from morphc.kernels.blueprints.base import Blueprint, Geometry
from morphc.kernels.reference.blends import blend
from morphc.kernels.reference.chunks import chunk_starts, chunk_widths, split
from morphc.kernels.reference.lifecycle import among
from morphc.lifecycle import BLENDS, ISOLATED, TRAINS


class Slots(NamedTuple):
    """What the forward has to know of K slots, on the device.

    columns [K, C]: feature that each column of the padded chunk stands for (0 in padding). inside [K, C]: no
    padding, and the slot is held. alpha [K]. blends, isolated, trains [K]: what the owner's state asks for;
    `blends` only where alpha > 0.
    """

    columns: Tensor
    inside: Tensor
    alpha: Tensor
    blends: Tensor
    isolated: Tensor
    trains: Tensor


def describe(
    owner: Tensor, lifecycle: Tensor, alpha: Tensor, features: int, seeds: int = 0, isolated: int = ISOLATED
) -> Slots:
    """owner: [K] seed of the site or -1; lifecycle, alpha: [S], the site's rows.

    isolated: the set of states whose slots get the task's gradient apart from the host.
    seeds: S, where `lifecycle.shape` is no number: `torch.jit.trace` makes a tensor of it.
    """
    seeds = seeds or lifecycle.shape[0]
    held = owner >= 0
    seed = owner.clamp(min=0)
    state = lifecycle[seed]
    strength = alpha[seed]
    column = torch.arange(-(-features // seeds), device=owner.device)
    inside = held.unsqueeze(1) & (column < chunk_widths(seed, features, seeds).unsqueeze(1))
    columns = torch.where(inside, chunk_starts(seed, features, seeds).unsqueeze(1) + column, 0)
    blends = held & among(state, BLENDS) & (strength > 0)
    return Slots(
        columns=columns,
        inside=inside,
        alpha=torch.where(blends, strength, 0),
        blends=blends,
        isolated=held & among(state, isolated),
        trains=held & among(state, TRAINS),
    )


def take(y: Tensor, slots: Slots, axis: int, spatial: bool) -> Tensor:
    """The chunks of all slots: [K, rows, C], or [K, N, C, *spatial]; zeros in padding and free slots."""
    count, width = slots.columns.shape
    picked = y.index_select(axis, slots.columns.view(-1))
    if spatial:
        chunks = split(picked, axis % y.dim(), count, width).movedim(axis % y.dim(), 0)
        if axis % y.dim() == 0:
            chunks = chunks.unsqueeze(1)
        inside = slots.inside.view(count, 1, width, *(1,) * (chunks.dim() - 3))
    else:
        chunks = picked.movedim(axis, -1).reshape(-1, count, width).transpose(0, 1)
        inside = slots.inside.unsqueeze(1)
    return torch.where(inside, chunks, 0)


def put(y: Tensor, chunks: Tensor, slots: Slots, axis: int, spatial: bool) -> Tensor:
    """`y` with the columns of the blending slots taken from `chunks`; all else is y's own value."""
    count, width = slots.columns.shape
    features = y.shape[axis]
    if spatial:
        if axis % y.dim() == 0:
            chunks = chunks.squeeze(1)
        flat = chunks.movedim(0, axis % y.dim()).flatten(axis % y.dim(), axis % y.dim() + 1)
    else:
        lead = y.movedim(axis, -1).shape[:-1]
        flat = chunks.transpose(0, 1).reshape(*lead, count * width).movedim(-1, axis)
    live = slots.inside & slots.blends.unsqueeze(1)
    # Padding goes to a column of its own behind the last feature: two writers of one index have no order.
    target = torch.where(live, slots.columns, features).view(-1)
    source = torch.zeros(features + 1, dtype=torch.int64, device=y.device)
    source = source.scatter(0, target, torch.arange(count * width, device=y.device))[:features]
    changed = torch.zeros(features + 1, dtype=torch.bool, device=y.device)
    # Not True: torch.jit.trace records no scatter of a bool.
    changed = changed.scatter(0, target, 1)[:features]
    shape = [1] * y.dim()
    shape[axis] = features
    mixed = torch.where(changed.view(shape), flat.index_select(axis, source), y)
    return like(mixed, y)


def like(value: Tensor, y: Tensor) -> Tensor:
    """`value` in the memory format of `y`: what comes next may care (`view`, channels-last convolutions)."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(y.dim())
    if last is not None and y.stride(1) == 1 and y.is_contiguous(memory_format=last):
        return value.contiguous(memory_format=last)
    return value.contiguous() if y.is_contiguous() else value


def per_slot(mask: Tensor, like_tensor: Tensor) -> Tensor:
    """A [K] mask that broadcasts against [K, ...]."""
    return mask.view(-1, *(1,) * (like_tensor.dim() - 1))


def jit_traced() -> bool:
    """Whether `torch.jit.trace` is at work."""
    return torch._C._get_tracing_state() is not None


def takes_hooks() -> bool:
    """Whether gradients can be looked at by a hook: they are wanted, and no transform of functorch is at work."""
    return slots_learn() and torch._C._functorch.peek_interpreter_stack() is None


def recomputed() -> bool:
    """Whether a forward that already ran with gradients is computed again, for its backward.

    `checkpoint(use_reentrant=False)` does that, and catches what is saved on the way with hooks. The other form runs
    its forward without gradients first, so there the second one is the only one that learns.
    """
    return (
        torch._C._current_graph_task_id() != -1
        and torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    )


def slots_learn() -> bool:
    """Whether gradients of slots are wanted. Not in a `torch.jit.trace`: it can't hold a Function of Python, and is
    checked against another one without gradients.
    """
    return torch.is_grad_enabled() and not jit_traced()


class StraightThrough(torch.autograd.Function):
    """y + (s - s.detach()) for the isolated slots, without the sum: the value is y's, bit for bit.

    The gradient goes to y as it is, and its columns to s.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        y: Tensor,
        s: Tensor,
        columns: Tensor,
        inside: Tensor,
        alpha: Tensor,
        blends: Tensor,
        isolated: Tensor,
        trains: Tensor,
        axis: int,
        spatial: bool,
    ) -> Tensor:
        # A copy: what comes next may work in place, which autograd forbids on an input handed back as it is.
        return y.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[2:8])
        ctx.axis, ctx.spatial = inputs[8:]
        ctx.dtype = inputs[1].dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        slots = Slots(*ctx.saved_tensors)
        s_grad = None
        if ctx.needs_input_grad[1]:
            chunks = take(grad, slots, ctx.axis, ctx.spatial).to(ctx.dtype)
            s_grad = torch.where(per_slot(slots.isolated, chunks), chunks, 0)
        return grad, s_grad, None, None, None, None, None, None, None, None


def through_bank(
    y: Tensor,
    source: Tensor,
    tap: Tensor | None,
    params: Mapping[str, Tensor],
    slots: Slots,
    blueprint: Blueprint,
    geometry: Geometry,
    blend_name: str,
    axis: int,
    *,
    isolated_only: bool = False,
) -> Tensor:
    """One bank's share of the site: `y` with its slots joined.

    y: what other banks made of the site's value so far; source: that value itself. tap: the layer's or the
    block's input, None for a chunk tap. isolated_only: no seed of the site blends, and the value is only
    handed through.
    """
    spatial = blueprint.is_spatial(geometry)
    compute = torch.float64 if source.dtype == torch.float64 else torch.float32
    with torch.autocast(source.device.type, enabled=False):
        trained = {
            name: torch.where(per_slot(slots.trains, value), value, value.detach()).to(compute)
            for name, value in params.items()
        }
        if isolated_only:
            source = source.detach()
        x = take(source, slots, axis, spatial).to(compute)
        if tap is None:
            s = _from_chunk(x, trained, slots, blueprint, geometry)
        else:
            tap = arrange(tap.to(compute), blueprint, geometry)
            s = _from_tap(tap, trained, slots, blueprint, geometry, isolated_only)
        if not isolated_only:
            live = per_slot(slots.blends, x)
            joined = blend(blend_name, torch.where(live, x, 0), torch.where(live, s, 0), slots.alpha, trained)
            joined = torch.where(live, joined, x)
            y = put(y, joined.to(y.dtype), slots, axis, spatial)
        if slots_learn() and s.requires_grad:
            applied = StraightThrough.apply(y, s, *slots, axis, spatial)  # type: ignore[no-untyped-call]
            assert isinstance(applied, Tensor)
            y = applied
    return y


def _from_chunk(
    x: Tensor, params: Mapping[str, Tensor], slots: Slots, blueprint: Blueprint, geometry: Geometry
) -> Tensor:
    inner = torch.where(per_slot(slots.isolated, x), x.detach(), x)
    # Selected before as well as after: a slot that isn't used must not turn 0 * Inf into NaN in the backward.
    inner = torch.where(per_slot(slots.blends | slots.isolated, x), inner, 0)
    return blueprint.apply(inner, params, geometry)


def _from_tap(
    tap: Tensor,
    params: Mapping[str, Tensor],
    slots: Slots,
    blueprint: Blueprint,
    geometry: Geometry,
    isolated_only: bool,
) -> Tensor:
    """All slots share the tap: where it has a gradient, isolated ones get a detached one."""
    if jit_traced():
        return blueprint.apply(tap, params, geometry)
    if isolated_only or not (torch.is_grad_enabled() and tap.requires_grad):
        return blueprint.apply(tap.detach(), params, geometry)
    blending = {name: torch.where(per_slot(slots.blends, p), p, 0) for name, p in params.items()}
    apart = {name: torch.where(per_slot(slots.isolated, p), p, 0) for name, p in params.items()}
    s = blueprint.apply(tap, blending, geometry)
    return torch.where(per_slot(slots.isolated, s), blueprint.apply(tap.detach(), apart, geometry), s)


def arrange(tap: Tensor, blueprint: Blueprint, geometry: Geometry) -> Tensor:
    """A layer's or a block's input as its blueprint reads it."""
    if not geometry.spatial:
        if tap.shape[-1] != geometry.tap_features:
            raise SeedError(
                f"blueprint {blueprint.name!r} reads {geometry.tap_features} features, its tap now has "
                f"{tap.shape[-1]}"
            )
        return tap.reshape(-1, geometry.tap_features)
    return tap.unsqueeze(0) if tap.dim() == geometry.spatial + 1 else tap
