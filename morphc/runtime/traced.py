"""A site in a compiled graph: one op, whatever the mode of the site.

`morphc::site` is what stands in the graph that dynamo makes. AOTAutograd finds in it a copy of the value, and
`morphc::join` that works on the copy in place; in the backward likewise `morphc::join_backward`. The copies vanish
where nobody else reads the value, which is the rule. The ops find the site by its cell (`morphc.runtime.cells`) and do
what eager mode does: measure if it is due, join if the mode asks for it, else return at once. So a graph holds in every
mode, and nothing of this process is in it: besides tensors there is `SeedSite.key`, a hash of the site's plan.

What the backward needs goes with it in `kept`, a tensor of one byte over a storage of any size, for a graph's shapes
are fixed and a dormant site is to keep nothing. Case 1: one byte, nothing is to be done. Case 2: an even number of
bytes, the value as it came; the join is done again and differentiated. Case 3: an odd number, what the forward kernel
put aside for the backward kernel. Gradients of slots go to the bank's leaves, as in eager mode.

`morphc::mark` does nothing. It reads the value, so that AOTAutograd's partitioner knows that the value lies in memory,
where it may as well be kept. It takes the results of other people's ops for something that is fused into what follows,
and keeps that instead: of a language model's logits their logarithms, beside which the logits lie once more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from morphc.errors import SeedError
from morphc.kernels.active import stash_shape
from morphc.kernels.layout import view_of
from morphc.kernels.site import BankKernels, Like
from morphc.lifecycle import Mode
from morphc.runtime import isolation
from morphc.runtime.cells import capturing, site_of
from morphc.runtime.lasting import in_graph, lasting
from morphc.runtime.telemetry import accumulate, accumulate_gradient

if TYPE_CHECKING:
    from morphc.runtime.site import SeedSite

_library = torch.library.Library("morphc", "FRAGMENT")  # type: ignore[no-untyped-call]
SCHEMAS: Final = (
    "site(Tensor y, Tensor? layer, Tensor? block, Tensor anchor, Tensor cell, str key, bool measure) -> Tensor",
    "join(Tensor(a!) y, Tensor? layer, Tensor? block, Tensor cell, str key, bool measure, bool save) -> Tensor",
    "mark(Tensor y) -> Tensor",
    "join_backward(Tensor(a!) grad, Tensor kept, Tensor mark, Tensor? layer, Tensor? block, Tensor cell, str key, "
    "SymInt[] strides, bool wants_layer, bool wants_block) -> (Tensor, Tensor, Tensor)",
)
for _schema in SCHEMAS:
    _library.define(_schema)  # type: ignore[no-untyped-call]


class _Site(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        layer: Tensor | None,
        block: Tensor | None,
        anchor: Tensor,
        cell: Tensor,
        key: str,
        measure: bool,
    ) -> Tensor:
        out = y.clone(memory_format=torch.preserve_format)
        kept = torch.ops.morphc.join(out, layer, block, cell, key, measure, True)
        ctx.save_for_backward(kept, torch.ops.morphc.mark(out), layer, block, cell)
        ctx.key, ctx.strides = key, out.stride()
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept, mark, layer, block, cell = ctx.saved_tensors
        wants_y, wants_layer, wants_block, _ = ctx.needs_input_grad[:4]
        passed = grad.clone(memory_format=torch.preserve_format)
        token, d_layer, d_block = torch.ops.morphc.join_backward(
            passed, kept, mark, layer, block, cell, ctx.key, ctx.strides, wants_layer, wants_block
        )
        return (
            passed,
            d_layer if wants_layer else None,
            d_block if wants_block else None,
            # Only where nobody asks for `passed` must the op be kept alive by a gradient of its own.
            None if wants_y else token.nan_to_num().clamp(0.0, 0.0),
            None,
            None,
            None,
        )


def _site(
    y: Tensor,
    layer: Tensor | None,
    block: Tensor | None,
    anchor: Tensor,
    cell: Tensor,
    key: str,
    measure: bool,
) -> Tensor:
    if torch.is_grad_enabled():
        joined: Tensor = _Site.apply(y, layer, block, anchor, cell, key, measure)  # type: ignore[no-untyped-call]
        return joined
    out = y.clone(memory_format=torch.preserve_format)
    torch.ops.morphc.join(out, layer, block, cell, key, measure, False)
    return out


def _byte(like: Tensor) -> Tensor:
    return like.new_empty(1, dtype=torch.uint8)


def _first_byte(storage: torch.UntypedStorage, like: Tensor) -> Tensor:
    return like.new_empty(0, dtype=torch.uint8).set_(storage, 0, (1,), (1,))


def _join(
    y: Tensor, layer: Tensor | None, block: Tensor | None, cell: Tensor, key: str, measure: bool, save: bool
) -> Tensor:
    site, mode = site_of(cell)
    with in_graph():
        # Nobody counts the replays of a CUDA graph, so every one of them measures.
        measured = measure and (accumulate(site, y) if capturing(y.device) else site.watch(y))
        if mode is Mode.DORMANT:
            looks = measured and save and site.gradient_telemetry
            return _first_byte(y.clone().untyped_storage(), y) if looks else _byte(y)
        if site.mode is not mode:
            raise SeedError(
                f"site {site.path!r} is {site.mode.name} and its graph got the cell of {mode.name}"
            )
        _warm_up(site, mode, y, layer, block)
        if not save or not y.numel():
            with torch.no_grad():
                _into(y, _eager(site, y, layer, block))
            return _byte(y)
        _keep_grads(site)
        stash = _on_kernels(site, y, mode)
        if stash is not None:
            return stash
        before = y.clone(memory_format=torch.preserve_format)
        with torch.no_grad():
            _into(y, _eager(site, y, layer, block))
        return _first_byte(before.untyped_storage(), y)


def _eager(site: SeedSite, y: Tensor, layer: Tensor | None, block: Tensor | None) -> Tensor:
    site.block_input = block
    return site.join(y, layer, owned=True)


def _into(y: Tensor, joined: Tensor) -> None:
    if joined is not y:
        y.copy_(joined)


def _warm_up(site: SeedSite, mode: Mode, y: Tensor, layer: Tensor | None, block: Tensor | None) -> None:
    """Have what a mode launches loaded before it is captured: torch warms a graph up once, in the mode of that time."""
    key = (mode, y.shape, y.dtype)
    if key in site.engine.warm:
        return
    if capturing(y.device):
        shapes = [None if t is None else (t.shape, t.stride(), t.dtype) for t in (y, layer, block)]

        def run() -> None:
            value, grad, *taps = (
                None if t is None else torch.empty_strided(t[0], t[1], dtype=t[2], device=y.device).zero_()
                for t in (shapes[0], *shapes)
            )
            assert value is not None
            assert grad is not None
            fitting, site.fitting = site.fitting, None  # it is to see no step that isn't one
            try:
                for _ in range(2):  # what the first makes ready, the second takes
                    stash = _on_kernels(site, value, mode)
                    if stash is not None:
                        _kernels_backward(site, grad, stash.untyped_storage(), list(y.stride()), mode)
                    _again(site, grad, value, taps[0], taps[1], mode, False, False)
            finally:
                site.fitting = fitting

        lasting(run, y.device)
    site.engine.warm.add(key)


def _keep_grads(site: SeedSite) -> None:
    """A CUDA graph adds gradients of slots where they were when it was captured."""
    for _, bank in site.slots.items():
        if not bank.keeps_grads and bank.owner.is_cuda:
            lasting(bank.keep_grads, bank.owner.device)


def _on_kernels(site: SeedSite, y: Tensor, mode: Mode) -> Tensor | None:
    """Case 3: the join by the forward kernel that eager mode has made ready, and what it put aside; or None."""
    ready = site.engine.ready.get(y.shape)
    if ready is None or site.gradient_telemetry or not ready.holds(site, y):
        return None
    if mode is Mode.TRAINING and not isolation.straight(site):
        return None
    if site.fitting is not None and site.training and not site.fitting.skipped():
        return None
    listed = site.engine.listed(site, ready.name, ready.bank, ready.kernels, ready.device)
    size = math.prod(ready.room) * y.element_size()
    storage = y.new_empty(size + 1, dtype=torch.uint8).untyped_storage()
    ready.forward(y, listed, ready.leaves, _laid(y, storage, ready.room), False)
    return _first_byte(storage, y)


def _laid(
    like: Tensor, storage: torch.UntypedStorage, shape: Sequence[int], strides: Sequence[int] | None = None
) -> Tensor:
    if strides is None:
        strides = [math.prod(shape[at + 1 :]) for at in range(len(shape))]
    laid: Tensor = like.new_empty(0).set_(storage, 0, tuple(shape), tuple(strides))
    return laid


def _join_backward(
    grad: Tensor,
    kept: Tensor,
    mark: Tensor,
    layer: Tensor | None,
    block: Tensor | None,
    cell: Tensor,
    key: str,
    strides: list[int],
    wants_layer: bool,
    wants_block: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """A token of any value, and the gradients of the taps; empty where they aren't wanted."""
    storage = kept.untyped_storage()
    size = storage.nbytes()
    taps: tuple[Tensor | None, Tensor | None] = None, None
    if size > 1:
        site, mode = site_of(cell)
        y = None if size % 2 else _laid(grad, storage, grad.shape, strides)
        if y is None:
            _kernels_backward(site, grad, storage, strides, mode)
        else:
            if site.gradient_telemetry:
                accumulate_gradient(site, y, grad)
            if mode is not Mode.DORMANT:
                taps = _again(site, grad, y, layer, block, mode, wants_layer, wants_block)
    d_layer, d_block = taps
    return (
        grad.new_empty(1, dtype=torch.float32),
        _grad_of(layer, d_layer, wants_layer, grad),
        _grad_of(block, d_block, wants_block, grad),
    )


def _grad_of(tap: Tensor | None, found: Tensor | None, wanted: bool, like: Tensor) -> Tensor:
    if tap is None or not wanted:
        return like.new_empty(0)
    return torch.zeros_like(tap) if found is None else torch.empty_like(tap).copy_(found)


def _kernels_backward(
    site: SeedSite, grad: Tensor, storage: torch.UntypedStorage, strides: list[int], mode: Mode
) -> None:
    ((name, bank),) = site.slots.items()
    walk = view_of(
        torch.empty_strided(grad.shape, strides, dtype=grad.dtype, device="meta"), site.feature_axis
    )
    assert walk is not None
    kernels = site.engine.bank(site, name, bank, grad, walk)
    assert isinstance(kernels, BankKernels)
    listed = site.engine.listed(site, name, bank, kernels, grad.device)
    like = Like(tuple(grad.shape), tuple(strides), site.feature_axis)
    stash = _laid(grad, storage, stash_shape(kernels.spec, walk))
    params, isolated_only, flat = tuple(bank.leaves().values()), mode is Mode.TRAINING, bank.flat
    with torch.no_grad():
        passed, found = kernels.backward(
            grad, like, listed, params, stash, isolated_only, owned=True, into=flat.grad
        )
        _into(grad, passed)
        flat.grad = found


def _again(
    site: SeedSite,
    grad: Tensor,
    y: Tensor,
    layer: Tensor | None,
    block: Tensor | None,
    mode: Mode,
    wants_layer: bool,
    wants_block: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Case 2: the join done again, now with gradients; those of the taps."""
    now, site.mode = site.mode, mode
    try:
        with in_graph(), torch.enable_grad():
            y = y.detach().requires_grad_()
            layer = None if layer is None else layer.detach().requires_grad_(wants_layer)
            block = None if block is None else block.detach().requires_grad_(wants_block)
            # A layer's own value: no leaf, and in nobody else's hands.
            joined = _eager(site, y.clone(memory_format=torch.preserve_format), layer, block)
            torch.autograd.backward(joined, grad.clone(memory_format=torch.preserve_format))
    finally:
        site.mode = now
    assert y.grad is not None
    grad.copy_(y.grad)
    return None if layer is None else layer.grad, None if block is None else block.grad


def _mark(y: Tensor) -> Tensor:
    return _byte(y)


def _join_fake(
    y: Tensor, layer: Tensor | None, block: Tensor | None, cell: Tensor, key: str, measure: bool, save: bool
) -> Tensor:
    return _byte(y)


def _join_backward_fake(
    grad: Tensor,
    kept: Tensor,
    mark: Tensor,
    layer: Tensor | None,
    block: Tensor | None,
    cell: Tensor,
    key: str,
    strides: list[int],
    wants_layer: bool,
    wants_block: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        grad.new_empty(1, dtype=torch.float32),
        grad.new_empty(0) if layer is None or not wants_layer else torch.empty_like(layer),
        grad.new_empty(0) if block is None or not wants_block else torch.empty_like(block),
    )


_library.impl("site", _site, "CompositeImplicitAutograd")  # type: ignore[no-untyped-call]
for _name, _run, _fake in (
    ("join", _join, _join_fake),
    ("mark", _mark, _mark),
    ("join_backward", _join_backward, _join_backward_fake),
):
    _library.impl(_name, _run, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"morphc::{_name}", _fake, lib=_library)


def through(site: SeedSite, y: Tensor, layer: Tensor | None, training: bool) -> Tensor:
    """What a traced forward does at a site. layer: the layer's input."""
    measure = training and bool(site.telemetry_every)
    if not (measure or site.slots._modules) or not y.is_floating_point():
        return y
    taps = site.taps
    block, site.block_input = site.block_input, None
    joined: Tensor = torch.ops.morphc.site(
        y,
        layer if "layer" in taps else None,
        block if "block" in taps else None,
        site.anchor,
        site.cell,
        site.key,
        measure,
    )
    return joined
