"""A site on generated kernels: which ones it needs for an activation, and the autograd around them."""

from __future__ import annotations

from collections.abc import Callable
from operator import is_
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from morphc.errors import SeedError
from morphc.kernels import backend, gradient
from morphc.kernels.active import stash_shape
from morphc.kernels.launch import Resident
from morphc.kernels.layout import View, is_dense, view_of, walkable
from morphc.kernels.site import BankKernels, Like, ListedBank, TapBankKernels, bank_kernels, spec_of
from morphc.kernels.site_spec import SiteSpec
from morphc.lifecycle import BLENDS, TRAINS
from morphc.runtime import compact, ownership
from morphc.runtime.active import jit_traced
from morphc.runtime.bank import SlotBank
from morphc.runtime.lasting import lasting

if TYPE_CHECKING:
    from morphc.runtime.site import SeedSite
    from morphc.runtime.stepping import Held

_transforming = torch._C._functorch.peek_interpreter_stack


class Listed:
    """The active seeds of one bank on one device, and what the list was made from.

    The states' version counters tell when it is out of date: every in-place change counts, by whomever.
    """

    __slots__ = ("active", "made_from", "versions")

    def __init__(self, active: Tensor) -> None:
        self.active = active
        self.made_from: tuple[Tensor | None, ...] = ()
        self.versions: tuple[int, ...] = ()

    def holds(self, site: SeedSite, bank: SlotBank) -> bool:
        """Whether no state has changed since."""
        made, state = self.made_from, site.state._buffers
        owner, lifecycle, alpha = bank._buffers["owner"], state["lifecycle"], state["alpha"]
        if not made or owner is not made[0] or lifecycle is not made[1] or alpha is not made[2]:
            return False
        return self.versions == (owner._version, lifecycle._version, alpha._version)  # type: ignore[union-attr]


class Engine:
    """What one site keeps between calls. Nothing in it is copied, pickled or saved: it is made again when needed."""

    __slots__ = ("groups", "held", "kernels", "lists", "ready", "warm")

    def __init__(self) -> None:
        self.ready: dict[torch.Size, Ready] = {}
        self.kernels: dict[tuple[object, ...], BankKernels | TapBankKernels | None] = {}
        self.lists: dict[tuple[str, torch.device], Listed] = {}
        self.groups: dict[str, compact.Groups] = {}
        self.held: dict[str, Held] = {}
        # Modes and activations that a compiled graph has run with.
        self.warm: set[tuple[object, ...]] = set()

    def __reduce__(self) -> tuple[type[Engine], tuple[()]]:
        return Engine, ()

    def __deepcopy__(self, memo: object) -> Engine:
        return Engine()

    def remember(self, shape: torch.Size, ready: Ready) -> None:
        """What a further activation of that shape can take."""
        if len(self.ready) >= MOST_READY:
            self.ready.clear()
        self.ready[shape] = ready

    def bank(
        self, site: SeedSite, name: str, bank: SlotBank, y: Tensor, view: View
    ) -> BankKernels | TapBankKernels | None:
        """The kernels of that bank for activations like `y`; None where torch does it."""
        if bank.flat.dtype is not torch.float32:
            return None
        key = (name, bank.slots, y.dtype, y.device, view.walk)
        if key not in self.kernels:
            spec = spec_of(
                bank.blueprint,
                bank.geometry,
                bank.blend,
                features=site.features,
                seeds=site.seeds,
                slots=bank.slots,
                dtype=y.dtype,
                walk=view.walk,
            )
            self.kernels[key] = bank_kernels(spec, bank.geometry, y.device)
        return self.kernels[key]

    def listed(
        self, site: SeedSite, name: str, bank: SlotBank, kernels: ListedBank, device: torch.device
    ) -> Tensor:
        """The bank's list of active seeds, made anew if a state has changed since."""
        found = self.lists.get((name, device))
        if found is None or found.active.shape != kernels.list_shape:
            found = self.lists[name, device] = Listed(lasting(kernels.new_list, device))
        # A captured graph makes the list at every replay: nobody asks here then whether a state has changed.
        if not found.holds(site, bank) or (
            device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        ):
            rows = slice(site.offset, site.offset + site.seeds)
            owner, lifecycle, alpha = bank.owner, site.state.lifecycle[rows], site.state.alpha[rows]
            if lifecycle.device != device:
                lifecycle = lifecycle.to(device, non_blocking=True)
                alpha = alpha.to(device, non_blocking=True)
            kernels.make_list(owner, lifecycle, alpha, found.active, BLENDS, site.isolated_states, TRAINS)
            # A backward that still waits for the list as it was must not read this one in its place.
            torch.autograd.graph.increment_version(found.active)
            state = site.state._buffers
            found.made_from = sources = bank._buffers["owner"], state["lifecycle"], state["alpha"]
            found.versions = tuple([tensor._version for tensor in sources])  # type: ignore[union-attr]
        return found.active


MOST_READY = 8
"""Shapes for which a site remembers what to launch: those of training, of evaluation, of a last batch."""


class Ready:
    """A bank, ready for activations of one shape: what a further call has to ask is whether that still holds."""

    __slots__ = (
        "backend",
        "backward",
        "bank",
        "cuda",
        "device",
        "dtype",
        "flat",
        "floats",
        "follows",
        "forward",
        "kernels",
        "leaves",
        "like",
        "listed",
        "name",
        "params",
        "room",
        "strides",
    )

    def __init__(
        self, site: SeedSite, name: str, bank: SlotBank, y: Tensor, walk: View, kernels: BankKernels
    ) -> None:
        self.backend, self.name, self.bank, self.kernels = site.backend, name, bank, kernels
        self.dtype, self.device, self.strides = y.dtype, y.device, y.stride()
        self.cuda = y.device.type == "cuda"
        self.follows = self.cuda and gradient.follows_early(y.device)
        self.forward = kernels.forward_of(walk).bound(walk)
        self.like = Like(tuple(y.shape), y.stride(), site.feature_axis)
        self.room = stash_shape(kernels.spec, walk)
        # A leaf is an alias of what its parameter was when the bank's leaves were made, wherever that goes.
        self.params, self.leaves = tuple(bank._parameters.values()), Resident(bank.leaves().values())
        self.flat = None if _replaced(bank) else bank.flat
        self.floats = kernels.floats
        in_place = self.flat is not None and is_dense(y)
        self.backward = kernels.backward_of(walk).bound(walk, self.leaves) if in_place else None
        self.listed = site.engine.lists[name, y.device]

    def holds(self, site: SeedSite, y: Tensor) -> bool:
        """Whether `y`, of the shape that this was made for, and the bank are as they were."""
        banks = site._modules["slots"]._modules  # type: ignore[union-attr]
        bank = self.bank
        return (
            y.dtype is self.dtype
            and y.stride() == self.strides
            and y.device == self.device
            and len(banks) == 1
            and banks.get(self.name) is bank
            and bank.flat is self.flat  # all leaves are made anew, or none
            and all(map(is_, bank._parameters.values(), self.params))
            and _transforming() is None
            and not jit_traced()
            and site.backend == self.backend
        )

    def join(self, site: SeedSite, y: Tensor, isolated_only: bool, owned: bool, early: bool) -> Tensor:
        """The value with the seeds joined. `y`: what this was made for, or anything that it `holds` for."""
        graded = torch.is_grad_enabled()
        if isolated_only and not graded:
            return y
        listed = self.listed
        if not listed.holds(site, self.bank) or (self.cuda and torch.cuda.is_current_stream_capturing()):
            site.engine.listed(site, self.name, self.bank, self.kernels, self.device)
            listed, early = site.engine.lists[self.name, self.device], False
            self.listed = listed
        if not owned or (graded and _is_written_leaf(y)):
            # It keeps its strides: what has gaps was copied before.
            y, early = y.clone(memory_format=torch.preserve_format), False
        early = early and self.follows
        if not graded:
            self.forward(y, listed.active, self.leaves, None, early)
            return y
        asked = self.leaves if self.flat is None else (self.flat,)
        return _apply_join(y, self, listed.active, isolated_only, early, *asked)


class Join(torch.autograd.Function):
    """A bank's seeds joined to the site's value, in place, with the gradients of the slots.

    asked: who gets these, the bank's flat leaf, or every parameter where somebody's own stand in their place. A value
    that only trains seeds in isolation comes back as it was. It is marked as written to all the same, so that what
    comes next may work on it in place.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        ready: Ready,
        active: Tensor,
        isolated_only: bool,
        early: bool,
        *asked: Tensor,
    ) -> Tensor:
        stash = y.new_empty(ready.room)
        ready.forward(y, active, ready.leaves, stash, early)
        ctx.save_for_backward(active, stash)
        ctx.ready, ctx.isolated_only = ready, isolated_only
        # Of the first for all: who gives a slot away, takes it back or steps it writes to every parameter.
        ctx.version = ready.leaves[0]._version
        return _written(ctx, y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            refused: tuple[Tensor | None, ...] = _differentiate_once(ctx, grad)
            return refused
        active, stash = ctx.saved_tensors
        ready: Ready = ctx.ready
        if ctx.version != ready.leaves[0]._version:
            raise SeedError(
                f"parameters of {ready.bank} have changed between a forward and its backward; step after the backward"
            )
        owned = ownership.nobody_else_has(grad)
        if owned and ready.backward is not None and not ctx.isolated_only and grad.stride() == ready.strides:
            found = active.new_empty(ready.floats, dtype=torch.float32)
            ready.backward(grad, active, stash, found)
            return grad, None, None, None, None, found
        passed, found = ready.kernels.backward(
            grad, ready.like, active, ready.leaves, stash, ctx.isolated_only, owned
        )
        given = (found,) if ready.flat is not None else ready.bank.sections(found)
        return passed, None, None, None, None, *given


@once_differentiable
def _differentiate_once(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return Join.backward(ctx, grad)


# What `Function.apply` calls once it has looked for transforms of functorch among the arguments: there are none.
_apply_join: Callable[..., Tensor] = super(torch.autograd.Function, Join).apply


class TapJoin(torch.autograd.Function):
    """The same for a bank that reads an input: `tap` [rows, T], in y's dtype.

    Where no seed blends, all work waits for the backward: the value is what it was.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        tap: Tensor,
        kernels: TapBankKernels,
        view: View,
        active: Tensor,
        isolated_only: bool,
        axis: int,
        *params: Tensor,
    ) -> Tensor:
        z = stash = None
        if not isolated_only:
            z = y.new_empty(kernels.z_shape(view.rows))
            stash = y.new_empty(kernels.stash_shape(view.rows))
            kernels.forward(y, view, active, params, tap, z, stash)
        ctx.save_for_backward(active, tap, z, stash, *params)
        ctx.kernels = kernels
        ctx.like = Like(tuple(y.shape), y.stride(), axis)
        return _written(ctx, y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        active, tap, z, stash, *params = ctx.saved_tensors
        kernels: TapBankKernels = ctx.kernels
        passed, d_tap, slot_grads = kernels.backward(
            grad, ctx.like, active, params, tap, z, stash, ctx.needs_input_grad[1]
        )
        return passed, d_tap, None, None, None, None, None, *slot_grads


def view(site: SeedSite, y: Tensor) -> View | None:
    """How the kernels walk `y`, or None where torch does the work."""
    if y.dtype not in backend.KERNEL_DTYPES or backend.chosen(site.backend, y.device) != "triton":
        return None
    if type(y) not in (Tensor, torch.nn.Parameter) or _transforming() is not None or jit_traced():
        return None
    return view_of(y, site.feature_axis)


def _own(site: SeedSite, y: Tensor) -> tuple[Tensor, View]:
    """A copy of `y`, which may have other strides, and how it is walked."""
    copied = y.clone(memory_format=torch.preserve_format)
    walk = view_of(copied, site.feature_axis)
    assert walk is not None
    return copied, walk


def _rows(tap: Tensor, bank: SlotBank, y: Tensor) -> Tensor | None:
    """`tap` as the kernels read it, [rows, T] in y's dtype; None where it isn't what they were made for."""
    features = bank.geometry.tap_features
    if type(tap) not in (Tensor, torch.nn.Parameter) or tap.layout != torch.strided or tap.is_nested:
        return None
    if tap.device != y.device or not tap.is_floating_point() or tap.dim() == 0 or tap.shape[-1] != features:
        return None
    return walkable(tap.to(y.dtype).reshape(-1, features))


def join(
    site: SeedSite,
    name: str,
    bank: SlotBank,
    y: Tensor,
    tap: Tensor | None,
    *,
    isolated_only: bool,
    owned: bool,
) -> Tensor | None:
    """`y` with the bank's seeds joined; None where torch has to do it. owned: `y` may be written in place."""
    if torch.compiler.is_compiling():
        return None  # an exported graph holds what torch has, and needs no morphc
    walk = view(site, y)
    kernels = site.engine.bank(site, name, bank, y, walk) if walk is not None else None
    if walk is None or kernels is None:
        return None
    read = None if tap is None else _rows(tap, bank, y)
    if tap is not None and (read is None or read.shape[0] != walk.rows):
        return None
    active = site.engine.listed(site, name, bank, kernels, y.device)
    must_copy = not owned or (torch.is_grad_enabled() and _is_written_leaf(y))
    if isinstance(kernels, BankKernels):
        lasting = len(site.slots._modules) == 1 and is_dense(y) and not _replaced(bank)
        if must_copy and not is_dense(y):
            y, walk = _own(site, y)
            owned = True
        ready = Ready(site, name, bank, y, walk, kernels)
        if lasting:
            site.engine.remember(y.shape, ready)
        return ready.join(site, y, isolated_only, owned, early=False)
    assert read is not None
    params = tuple(bank.leaves().values())
    if must_copy:
        y, walk = _own(site, y)
    if not torch.is_grad_enabled():
        kernels.forward(y, walk, active, params, read)
        return y
    if isolated_only:
        read = read.detach()
    joined = TapJoin.apply(  # type: ignore[no-untyped-call]
        y, read, kernels, walk, active, isolated_only, site.feature_axis, *params
    )
    assert isinstance(joined, Tensor)
    return joined


def _is_written_leaf(y: Tensor) -> bool:
    """Whether autograd forbids writing to `y`, whatever it is a view of."""
    return y.is_leaf and y.requires_grad


def _written(ctx: Any, y: Tensor) -> Tensor:
    """What a function returns that has written to its input.

    A Linear's value is a view of a product's, and autograd would copy gradients around to keep track of who sees
    what. But the layer has just made both, nobody else has them, and the product's backward reads neither: so the same
    memory goes on as a tensor of its own.
    """
    if not y._is_view():
        ctx.mark_dirty(y)
        return y
    torch.autograd.graph.increment_version(y)
    return y.detach()


def _replaced(bank: SlotBank) -> bool:
    """Whether somebody's tensors stand in the place of the bank's own, as in `torch.func.functional_call`."""
    return not all(map(is_, bank._parameters.values(), bank._bound.values()))


def spec_of_bank(site: SeedSite, bank: SlotBank) -> SiteSpec:
    """What decides which kernels the bank runs."""
    return SiteSpec(
        bank.blueprint,
        bank.blend,
        bank.geometry,
        site.features,
        site.seeds,
        bank.slots,
        site.feature_axis,
        BLENDS,
        site.isolated_states,
        TRAINS,
    )
