"""Forward of an active site on the CPU, where reading a state costs nothing: only the slots that do something.

`morphc.runtime.active` computes every slot of a bank and selects, since on a device nobody reads who is active. Here
the few that are get gathered, by whole chunks, so that a step costs what its active seeds cost. All of it is
differentiable as it stands, any number of times.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from morphc.kernels.reference.blends import blend
from morphc.lifecycle import BLENDS, TRAINS
from morphc.runtime.active import arrange, jit_traced, slots_learn
from morphc.runtime.lasting import lasting

if TYPE_CHECKING:
    from morphc.runtime.bank import SlotBank
    from morphc.runtime.site import SeedSite

_transforming = torch._C._functorch.peek_interpreter_stack


class Group(NamedTuple):
    """Slots of one bank that do the same.

    slots [k]: their numbers, None for all of the bank in order. seeds [k]: whose they are, None for all of the site in
    order. alpha [k]; whole: all are 1. trains: all do, none does (False), or [k].
    """

    slots: Tensor | None
    seeds: Tensor | None
    alpha: Tensor
    whole: bool
    trains: Tensor | bool


class Groups:
    """What of a bank blends and what is isolated, and what that was made from.

    training [t]: slots that are trained, None for all of the bank. waiting: a slot trains whose seed blends with alpha
    0. It gets a gradient of zeros, and its moments age.
    """

    __slots__ = ("blending", "isolated", "made_from", "training", "versions", "waiting")

    def __init__(self, site: SeedSite, bank: SlotBank) -> None:
        self.made_from = _sources(site, bank)
        self.versions = tuple([tensor._version for tensor in self.made_from])
        _, lifecycle, alpha = self.made_from
        owner = site.owner_of(bank)
        rows = slice(site.offset, site.offset + site.seeds)
        slots = (owner >= 0).nonzero().view(-1)
        seeds = owner[slots]
        states, strength = (1 << lifecycle[rows][seeds].long()), alpha[rows][seeds]
        trains = (states & TRAINS) != 0
        blending = (states & BLENDS) != 0
        blends = blending & (strength > 0)
        self.waiting = bool((blending & trains & ~blends).any())
        isolated = (states & site.isolated_states) != 0
        full = bank.slots, site.seeds
        self.training = None if len(slots) == bank.slots and bool(trains.all()) else slots[trains]
        self.blending = _group(blends, slots, seeds, strength, trains, full)
        self.isolated = _group(isolated, slots, seeds, strength, trains, full)

    def holds(self, site: SeedSite, bank: SlotBank) -> bool:
        """Whether nobody has changed a state since."""
        sources = _sources(site, bank)
        return all(map(_same, sources, self.made_from)) and self.versions == tuple(
            [tensor._version for tensor in sources]
        )


def _same(one: Tensor, other: Tensor) -> bool:
    return one is other


def _sources(site: SeedSite, bank: SlotBank) -> tuple[Tensor, Tensor, Tensor]:
    return bank.owner, site.state.lifecycle, site.state.alpha


def _group(
    chosen: Tensor, slots: Tensor, seeds: Tensor, alpha: Tensor, trains: Tensor, full: tuple[int, int]
) -> Group | None:
    slots, seeds, alpha, trains = slots[chosen], seeds[chosen], alpha[chosen], trains[chosen]
    if not len(slots):
        return None
    count, some = len(slots), bool(trains.any())
    return Group(
        slots=None if count == full[0] and bool((slots == torch.arange(count)).all()) else slots,
        seeds=None if count == full[1] and bool((seeds == torch.arange(count)).all()) else seeds,
        alpha=alpha.view(-1, 1, 1),
        whole=bool((alpha == 1).all()),
        trains=trains.view(-1, 1, 1) if some and not bool(trains.all()) else some,
    )


def in_host_memory(site: SeedSite, bank: SlotBank) -> bool:
    """Whether states can be read without waiting for a device."""
    return bank.owner.is_cpu and site.state.lifecycle.is_cpu


def groups_of(site: SeedSite, name: str, bank: SlotBank) -> Groups:
    """What the bank's slots do now. Only `in_host_memory`."""
    groups = site.engine.groups.get(name)
    if groups is None or not groups.holds(site, bank):
        groups = site.engine.groups[name] = lasting(lambda: Groups(site, bank), bank.owner.device)
    return groups


def _fits(site: SeedSite, bank: SlotBank, y: Tensor) -> bool:
    """Whether this module computes it: rows of equally wide chunks, all in host memory, outside of tracing."""
    geometry = bank.geometry
    return (
        y.is_cpu
        and in_host_memory(site, bank)
        and site.feature_axis in (-1, y.dim() - 1)
        and site.features == site.seeds * geometry.chunk
        and not geometry.spatial
        and y.numel() > 0
        and y.is_contiguous()
        and type(y) is Tensor
        and not torch.compiler.is_compiling()
        and not jit_traced()
        and _transforming() is None
        and not torch.is_autocast_enabled("cpu")
    )


def join(
    site: SeedSite, name: str, bank: SlotBank, y: Tensor, tap: Tensor | None, isolated_only: bool
) -> Tensor | None:
    """`y` with the bank's seeds joined; None where `active.through_bank` has to do it."""
    if not _fits(site, bank, y):
        return None
    groups = groups_of(site, name, bank)
    if groups.waiting and not isolated_only and slots_learn():
        return None
    compute = torch.float64 if y.dtype == torch.float64 else torch.float32
    if tap is not None:
        tap = arrange(tap.to(compute), bank.kind, bank.geometry)
    out = y
    if groups.blending is not None and not isolated_only:
        out = _blended(site, bank, y, tap, groups.blending, compute)
    if groups.isolated is not None and slots_learn():
        read = None if tap is None else tap.detach()
        s = _applied(site, bank, y.detach(), read, groups.isolated, compute)
        if s.requires_grad:
            through = StraightThrough.apply(out, s, groups.isolated.seeds, site.seeds)  # type: ignore[no-untyped-call]
            assert isinstance(through, Tensor)
            out = through
    return out


def _chunks(y: Tensor, seeds: int, chosen: Tensor | None) -> Tensor:
    """[rows, k, C]"""
    every = y.view(-1, seeds, y.shape[-1] // seeds)
    return every if chosen is None else every.index_select(1, chosen)


def _params(bank: SlotBank, group: Group, compute: torch.dtype) -> dict[str, Tensor]:
    found = {}
    for name, value in bank.leaves().items():
        if group.trains is False:
            value = value.detach()
        if group.slots is not None:
            value = value.index_select(0, group.slots)
        if isinstance(group.trains, Tensor):
            mask = group.trains.view(-1, *(1,) * (value.dim() - 1))
            value = torch.where(mask, value, value.detach())
        found[name] = value.to(compute)
    return found


def _applied(
    site: SeedSite, bank: SlotBank, y: Tensor, tap: Tensor | None, group: Group, compute: torch.dtype
) -> Tensor:
    """What the group's slots give, [k, rows, C]."""
    source = _chunks(y, site.seeds, group.seeds).to(compute).transpose(0, 1) if tap is None else tap
    return bank.kind.apply(source, _params(bank, group, compute), bank.geometry)


def _blended(
    site: SeedSite, bank: SlotBank, y: Tensor, tap: Tensor | None, group: Group, compute: torch.dtype
) -> Tensor:
    chunks = _chunks(y, site.seeds, group.seeds)
    x = chunks.to(compute)
    params = _params(bank, group, compute)
    s = bank.kind.apply(x.transpose(0, 1) if tap is None else tap, params, bank.geometry)
    every = y.view(-1, site.seeds, chunks.shape[-1])
    if bank.blend == "residual" and y.dtype == compute:
        added = (s if group.whole else group.alpha * s).transpose(0, 1)
        joined = every + added if group.seeds is None else every.index_add(1, group.seeds, added)
        return _shaped(joined, y)
    joined = blend(bank.blend, x.transpose(0, 1), s, group.alpha.view(-1), params).transpose(0, 1).to(y.dtype)
    if group.seeds is not None:
        return _shaped(every.index_copy(1, group.seeds, joined), y)
    return _shaped(joined.contiguous(), y)


def _shaped(joined: Tensor, y: Tensor) -> Tensor:
    """`joined`, which nobody else holds, in y's shape: not as a view, in which others would have to expect its base."""
    found: Tensor = torch.ops.aten._unsafe_view(joined, y.shape)
    return found


class StraightThrough(torch.autograd.Function):
    """y itself, whose gradient the chunks of `seeds` (None: all) hand to s [k, rows, C] as well."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, s: Tensor, seeds: Tensor | None, count: int) -> Tensor:
        ctx.seeds, ctx.count, ctx.dtype = seeds, count, s.dtype
        # A copy: what comes next may work in place, which autograd forbids on an input handed back as it is.
        return y.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        taken = None
        if ctx.needs_input_grad[1]:
            taken = _chunks(grad.contiguous(), ctx.count, ctx.seeds).to(ctx.dtype).transpose(0, 1)
        return grad, taken, None, None


@torch.no_grad()
def step(
    site: SeedSite,
    name: str,
    bank: SlotBank,
    finite: Tensor | None = None,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
) -> bool:
    """One AdamW step of the slots that train, and no gradients after it; False where `SlotBank.step` has to do it.

    That is outside of host memory, where a gradient isn't finite, and where slots have had different numbers of steps.
    finite [K]: the slots that `SlotBank.clean_grads` has found finite; None if it hasn't looked.
    """
    if not in_host_memory(site, bank) or bank.frozen or (finite is not None and not bool(finite.all())):
        return False
    grads = bank.grads()
    given = [grad for grad in grads.values() if grad is not None]
    if not given:
        return True
    rows = groups_of(site, name, bank).training
    if rows is not None and not len(rows):
        bank.zero_grads()
        return True
    steps = bank.opt.step if rows is None else bank.opt.step[rows]
    done = int(steps[0])
    # It may overflow where all is finite: then that step is made the other way. Looking at the largest entry instead
    # takes 25 times as long.
    norms = torch._foreach_norm(given)
    if not bool((steps == done).all()) or not bool(torch.stack(norms).isfinite().all()):
        return False
    params: list[Tensor] = [bank.get_parameter(key) for key in grads]
    first = [bank.opt.get_buffer(f"exp_avg_{key}") for key in grads]
    second = [bank.opt.get_buffer(f"exp_avg_sq_{key}") for key in grads]
    held = [torch.zeros_like(p) if g is None else g for p, g in zip(params, grads.values(), strict=True)]
    whole = (params, first, second)
    if rows is not None:
        params, first, second = _rows(params, rows), _rows(first, rows), _rows(second, rows)
        held = _rows(held, rows)
    beta1, beta2 = betas
    correction1, correction2 = 1 - beta1 ** (done + 1), 1 - beta2 ** (done + 1)
    torch._foreach_lerp_(first, held, 1 - beta1)
    torch._foreach_mul_(second, beta2)
    torch._foreach_addcmul_(second, held, held, 1 - beta2)
    below = torch._foreach_sqrt(second)
    torch._foreach_div_(below, correction2**0.5)
    torch._foreach_add_(below, eps)
    torch._foreach_mul_(params, 1 - lr * weight_decay)
    torch._foreach_addcdiv_(params, first, below, -lr / correction1)
    if rows is None:
        bank.opt.step += 1
    else:
        bank.opt.step[rows] += 1
        for kept, new in ((whole[0], params), (whole[1], first), (whole[2], second)):
            for tensor, value in zip(kept, new, strict=True):
                tensor.index_copy_(0, rows, value)
    bank.zero_grads()
    return True


def _rows(tensors: list[Tensor], rows: Tensor) -> list[Tensor]:
    return [tensor.index_select(0, rows) for tensor in tensors]
