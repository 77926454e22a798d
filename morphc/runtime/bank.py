"""Slot banks: the parameters that the active seeds of one site borrow, one bank a blueprint."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._utils import _unflatten_dense_tensors

from morphc.errors import SeedError
from morphc.kernels.blueprints.base import Blueprint, Geometry, get
from morphc.kernels.reference.adamw import adamw_rows
from morphc.kernels.reference.blends import blend_shapes
from morphc.runtime.active import jit_traced
from morphc.runtime.meta import started
from morphc.runtime.sharded import left_whole

FREE = -1


@left_whole
class Moments(nn.Module):
    """Optimizer state of a bank: buffers `exp_avg_<param>`, `exp_avg_sq_<param>` and `step` [K]."""

    step: Tensor

    def __init__(self, params: Mapping[str, Tensor]) -> None:
        super().__init__()
        first = next(iter(params.values()))
        for name, param in params.items():
            self.register_buffer(f"exp_avg_{name}", torch.zeros_like(param))
            self.register_buffer(f"exp_avg_sq_{name}", torch.zeros_like(param))
        self.register_buffer("step", torch.zeros(first.shape[0], dtype=torch.int64, device=first.device))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Moments:
        super()._apply(_precise(fn), recurse)  # type: ignore[no-untyped-call]
        return self

    def reset_parameters(self) -> None:
        """Nothing: what leaves meta is zero by itself."""


def _precise(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`fn` for the tensors of a bank: never below float32, and zero where they leave the meta device."""

    def apply(tensor: Tensor) -> Tensor:
        moved = started(fn, tensor)
        if not tensor.is_floating_point() or moved.dtype in (torch.float32, torch.float64):
            return moved
        return (moved if tensor.is_meta else tensor).to(moved.device, torch.float32)

    return apply


class SlotParameter(nn.Parameter):
    """A Parameter that never requires gradients: `model.requires_grad_()` and a loop that unfreezes every parameter
    of a model reach it, and mean the host's.
    """

    def __new__(cls, data: Tensor, requires_grad: bool = False) -> SlotParameter:
        made: SlotParameter = super().__new__(cls, data, requires_grad=False)
        return made

    @property
    def requires_grad(self) -> bool:
        """False, whatever it is set to."""
        return False

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        pass

    def requires_grad_(self, requires_grad: bool = True) -> SlotParameter:
        """Changes nothing."""
        return self


@left_whole
class SlotBank(nn.Module):
    """K slots of one blueprint. `owner` [K] is the site's seed that holds each slot, -1 where free.

    The Parameters don't require gradients and can't be made to, so no optimizer, clipping or DDP of the user's sees
    them. The forward reads them through *leaves*: aliases that do require gradients, and whose `.grad` is the bank's
    own gradient buffer. Plain autograd fills it, in eager and in compiled graphs, and also where the host
    itself is frozen. Kernels give the gradients of all parameters as one tensor; for them there is `flat`, a leaf
    [floats of all parameters] without values of its own, whose `.grad` counts as well.
    """

    owner: Tensor
    opt: Moments
    flat: Tensor

    def __init__(
        self,
        blueprint: str,
        geometry: Geometry,
        blend: str,
        slots: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
        frozen: tuple[str, ...] = (),
    ) -> None:
        super().__init__()
        self.blueprint = blueprint
        self.frozen = frozen
        self.geometry = geometry
        self.blend = blend
        self.slots = slots
        kind = get(blueprint)
        shapes = kind.shapes(geometry) | blend_shapes(blend, geometry.chunk)
        self.names = tuple(shapes)
        for name, shape in shapes.items():
            if name in ("opt", "owner"):
                raise SeedError(
                    f"blueprint {blueprint!r} names a parameter {name!r}, which the bank uses itself"
                )
            value = torch.zeros(slots, *shape, dtype=dtype, device=device)
            self.register_parameter(name, SlotParameter(value))
        self.register_buffer("owner", torch.full((slots,), FREE, dtype=torch.int64, device=device))
        self.opt = Moments({name: self.get_parameter(name) for name in self.names})
        self._leaves: dict[str, Tensor] = {}
        self._bound: dict[str, nn.Parameter] = {}
        self._kept: tuple[Tensor, tuple[Tensor, ...]] | None = None
        self._bind({})
        self.register_load_state_dict_post_hook(_rebind)  # type: ignore[no-untyped-call]

    def __repr__(self) -> str:
        geometry = self.geometry
        return (
            f"SlotBank({self.blueprint!r}, slots={self.slots}, chunk={geometry.chunk}, rank={geometry.rank}, "
            f"blend={self.blend!r})"
        )

    @property
    def kind(self) -> Blueprint:
        """The blueprint itself."""
        return get(self.blueprint)

    @property
    def spatial(self) -> bool:
        """Whether chunks are handed over as [K, N, C, *spatial]."""
        return self.kind.is_spatial(self.geometry)

    def leaves(self) -> dict[str, Tensor]:
        """Each parameter as the forward reads it: the alias that requires gradients.

        A parameter that `torch.func.functional_call` put in place of the bank's own is used itself, and so is the
        bank's own in a `torch.jit.trace` or an export, which know no other tensors than parameters and buffers.
        """
        self.__dict__["_loose"] = True
        found = {}
        own = not (jit_traced() or torch.compiler._is_exporting_flag)
        for name in self.names:
            param = self._parameters[name]
            assert param is not None
            found[name] = self._leaves[name] if own and param is self._bound[name] else param
        return found

    def grads(self) -> dict[str, Tensor | None]:
        """The gradient buffers [K, ...]; None where no backward has reached the bank yet."""
        self._settle()
        return {name: leaf.grad for name, leaf in self._leaves.items()}

    @torch.no_grad()
    def _settle(self) -> None:
        """Move what kernels have given into the buffers of the parameters."""
        found = self.flat.grad
        if self._kept is not None:
            self._stay(*self._kept)
        elif found is not None:
            self.flat.grad = None
            self.__dict__["_loose"] = True
            for leaf, part in zip(self._leaves.values(), self.sections(found), strict=True):
                leaf.grad = part if leaf.grad is None else leaf.grad.add_(part)

    def _stay(self, kept: Tensor, parts: tuple[Tensor, ...]) -> None:
        """Where autograd has added out of place, its sum goes to where the buffers are to stay."""
        if self.flat.grad is not kept:
            if self.flat.grad is not None:
                kept.copy_(self.flat.grad)
            self.flat.grad = kept
        for leaf, part in zip(self._leaves.values(), parts, strict=True):
            if leaf.grad is not part:
                if leaf.grad is not None:
                    part.copy_(leaf.grad)
                leaf.grad = part

    def flat_grad(self) -> Tensor | None:
        """The gradients of all parameters one behind the other, where that is how they lie; see `sections`."""
        if self._kept is not None:
            self._settle()
            return self._kept[0]
        loose = self._loose and any(leaf.grad is not None for leaf in self._leaves.values())
        return None if loose else self.flat.grad

    def sections(self, flat: Tensor) -> tuple[Tensor, ...]:
        """`flat` [floats of all parameters] as views, one a parameter."""
        views: tuple[Tensor, ...] = _unflatten_dense_tensors(flat, tuple(self._leaves.values()))  # type: ignore[no-untyped-call]
        return views

    def zero_grads(self) -> None:
        """Forget all gradients of the bank."""
        if self._kept is not None:
            self._settle()
            self._kept[0].zero_()
            return
        self.flat.grad = None
        if self._loose:
            for leaf in self._leaves.values():
                leaf.grad = None
            self.__dict__["_loose"] = False

    @torch.no_grad()
    def give_grads(self, rows: Tensor, grads: Mapping[str, Tensor]) -> None:
        """Put gradients [k, ...] of the slots `rows` [k] into the buffers."""
        self._settle()
        self.__dict__["_loose"] = True
        for name, grad in grads.items():
            leaf = self._leaves[name]
            if leaf.grad is None:
                leaf.grad = torch.zeros_like(leaf)
            leaf.grad.index_copy_(0, rows, grad.to(leaf))

    @property
    def keeps_grads(self) -> bool:
        """Whether the gradient buffers stay where they are, as a captured CUDA graph needs them to."""
        return self._kept is not None

    @torch.no_grad()
    def keep_grads(self) -> None:
        """Let the gradient buffers stay where they are from now on."""
        self._settle()
        kept = torch.zeros(self.flat.shape, dtype=self.flat.dtype, device=self.flat.device)
        self._kept = kept, self.sections(kept)
        self._settle()

    @torch.no_grad()
    def take(self, slot: int, seed: int, draw: int) -> None:
        """Give `slot` to `seed` with fresh parameters, drawn from a generator seeded with `draw`."""
        generator = torch.Generator().manual_seed(draw)
        fresh = self.kind.init(self.geometry, 1, generator)
        for name in self.names:
            param = self.get_parameter(name)
            value = fresh.get(name)
            if value is None:
                param[slot].zero_()
            else:
                param[slot].copy_(value[0])
        self._clear(slot)
        self.owner[slot] = seed

    @torch.no_grad()
    def forget_moments(self, slot: int) -> None:
        """Let a slot's AdamW begin anew."""
        self._clear(slot)

    @torch.no_grad()
    def free(self, slot: int) -> None:
        """Take `slot` back; nothing of its last owner stays in it."""
        for name in self.names:
            self.get_parameter(name)[slot].zero_()
        self._clear(slot)
        self.owner[slot] = FREE

    def _clear(self, slot: int) -> None:
        self._settle()
        for name, leaf in self._leaves.items():
            self.opt.get_buffer(f"exp_avg_{name}")[slot].zero_()
            self.opt.get_buffer(f"exp_avg_sq_{name}")[slot].zero_()
            if leaf.grad is not None:
                leaf.grad[slot].zero_()
        self.opt.step[slot] = 0

    @torch.no_grad()
    def clean_grads(self, scale: Tensor | None = None, unscaled: Tensor | None = None) -> Tensor:
        """Divide the gradients by `scale`, but those of slots where `unscaled` [K]; [K], where all were finite.

        Cleared are those of slots where one isn't finite, and those of `frozen` parameters: from zero, AdamW leaves
        them zero.
        """
        finite = torch.ones(self.slots, dtype=torch.bool, device=self.owner.device)
        grads = [grad for grad in self.grads().values() if grad is not None]
        for grad in grads:
            if scale is not None:
                by = scale.to(grad.device)
                if unscaled is not None:
                    by = torch.where(unscaled, 1.0, by).view(-1, *(1,) * (grad.dim() - 1))
                grad.div_(by)
            finite &= grad.flatten(1).isfinite().all(1)
        for name in self.frozen:
            own = self._leaves[name].grad
            if own is not None:
                own.zero_()
        for grad in grads:
            grad.copy_(torch.where(finite.view(-1, *(1,) * (grad.dim() - 1)), grad, 0))
        return finite

    @torch.no_grad()
    def step(self, rows: Tensor, **options: Any) -> None:
        """One AdamW step of the slots where `rows` [K] is true; the gradients are cleared."""
        grads = self.grads()
        if all(grad is None for grad in grads.values()):
            return
        self.opt.step += rows
        for name, grad in grads.items():
            param = self.get_parameter(name)
            adamw_rows(
                param,
                torch.zeros_like(param) if grad is None else grad,
                self.opt.get_buffer(f"exp_avg_{name}"),
                self.opt.get_buffer(f"exp_avg_sq_{name}"),
                self.opt.step,
                rows,
                **options,
            )
        self.zero_grads()

    @torch.no_grad()
    def enlarge(self, slots: int) -> None:
        """Grow to `slots` slots; what the slots hold is kept, the new ones are free."""
        extra = slots - self.slots
        if extra <= 0:
            return

        def grown(tensor: Tensor, fill: int = 0) -> Tensor:
            return torch.cat([tensor, tensor.new_full((extra, *tensor.shape[1:]), fill)])

        grads = {name: None if grad is None else grown(grad) for name, grad in self.grads().items()}
        for name in self.names:
            self._parameters[name] = SlotParameter(grown(self.get_parameter(name)))
        for name, buffer in self.opt._buffers.items():
            assert buffer is not None
            self.opt._buffers[name] = grown(buffer)
        self.owner = grown(self.owner, FREE)
        self.slots = slots
        self._bind(grads)

    def _bind(self, grads: Mapping[str, Tensor | None]) -> None:
        self._kept = None
        # Whether a leaf other than `flat` may have a gradient: to ask each takes longer than a launch.
        self._loose = True
        size = 0
        for name in self.names:
            param = self.get_parameter(name)
            if not isinstance(param, SlotParameter):  # moved, unpickled or assigned
                param = self._parameters[name] = SlotParameter(param.data)
            leaf = param.detach().requires_grad_()
            leaf.grad = grads.get(name)
            self._leaves[name] = leaf
            self._bound[name] = param
            size += leaf.numel()
        # One number, as often as there are floats.
        self.flat = leaf.new_zeros(1).expand(size).requires_grad_()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SlotBank:
        was_on_meta, precise = self.owner.is_meta, _precise(fn)
        grads = {name: None if grad is None else precise(grad) for name, grad in self.grads().items()}
        super()._apply(precise, recurse)  # type: ignore[no-untyped-call]
        if was_on_meta and not self.owner.is_meta:
            self.owner.fill_(FREE)
        self._bind(grads)
        return self

    @property
    def on_meta(self) -> bool:
        """Whether any of its tensors has no values yet."""
        return any(tensor.is_meta for tensor in (*self.parameters(), *self.buffers()))

    def reset_parameters(self) -> None:
        """Nothing: a bank that leaves meta has free slots by itself. See `SeedState.reset_parameters`."""

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles don't keep two tensors on one storage, so the aliases are made again on arrival.
        state = self.__dict__.copy()
        state["_leaves"] = self.grads()
        del state["_bound"], state["flat"]
        state["_kept"] = None
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        grads = state["_leaves"]
        super().__setstate__({**state, "_leaves": {}, "_bound": {}})  # type: ignore[no-untyped-call]
        self._bind(grads)


def _rebind(bank: nn.Module, incompatible: Any) -> None:
    # load_state_dict(assign=True) replaces the Parameters, and the aliases would still read the old ones.
    assert isinstance(bank, SlotBank)
    bank._bind(bank.grads())


def draw_of(path: str, blueprint: str, seed: int, transition: int, candidate: int = 0) -> int:
    """Seed for one germination's draw: the same run draws the same numbers, also when resumed."""
    text = f"{path}/{blueprint}/{seed}/{transition}"
    return zlib.crc32((f"{text}/{candidate}" if candidate else text).encode())
