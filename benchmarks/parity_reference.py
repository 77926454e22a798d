"""The site in float64, for the active seeds alone and a few of them at a time, so that it fits beside any shape."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from morphc.kernels.blueprints import get
from morphc.kernels.blueprints.base import Geometry
from morphc.kernels.reference.activations import activation
from morphc.kernels.reference.blends import blend
from morphc.kernels.reference.chunks import chunk_max, chunk_starts, chunk_sums, chunk_widths, spread

GROUP_VALUES = 1 << 24
"""Of the widest tensor of one group, in float64: 128 MiB."""


class Active(NamedTuple):
    """The listed seeds [A]: seed and slot int64, alpha float64, and what each does."""

    seed: Tensor
    slot: Tensor
    alpha: Tensor
    blends: Tensor
    isolated: Tensor
    trains: Tensor


class Group(NamedTuple):
    """Some of the listed seeds [G]: their chunks x [G, rows, C] in float64, zero in the padding.

    columns [G, C] features of each, inside [G, C] which of them are no padding.
    """

    part: slice
    columns: Tensor
    inside: Tensor
    x: Tensor

    @property
    def spoilt_rows(self) -> Tensor:
        """[G, rows, 1]: where a value is not finite."""
        return ~self.x.isfinite().all(2, keepdim=True)

    def spoilt_slots(self, like: Tensor) -> Tensor:
        """The same of each slot, to broadcast to [G, ...]."""
        return self.spoilt_rows.any(1).view(-1, *(1,) * (like.dim() - 1))


@dataclass
class Error:
    """|value - reference| / |reference| by norms, over what is finite in the reference; what leaked, what went.

    leaked: not finite where the reference is, outside of what is `spoilt`: the row of a chunk, or the slot, that has
    a value in it which is not finite may end so altogether. hidden: finite where the reference is not.
    """

    difference: float = 0.0
    size: float = 0.0
    leaked: int = 0
    hidden: int = 0
    values: int = 0

    def add(self, value: Tensor, reference: Tensor, spoilt: Tensor | None = None) -> None:
        """Take in one more piece; both of any shape, the same, and `spoilt` of one that broadcasts to it."""
        value, reference = value.to(torch.float64), reference.to(torch.float64)
        known = reference.isfinite()
        good = value.isfinite()
        leaked = known & ~good
        self.leaked += int((leaked if spoilt is None else leaked & ~spoilt).sum())
        self.hidden += int((~known & good).sum())
        both = known & good
        self.difference += float(torch.where(both, value - reference, 0).square().sum())
        self.size += float(torch.where(both, reference, 0).square().sum())
        self.values += value.numel()

    @property
    def relative(self) -> float:
        """0 where there was nothing to compare or both are zero."""
        if self.difference == 0:
            return 0.0
        return math.sqrt(self.difference / self.size) if self.size else math.inf


@dataclass
class Errors:
    """By name: `forward`, `dx`, `grad in_weight`, ..."""

    found: dict[str, Error] = field(default_factory=dict)

    def add(self, name: str, value: Tensor, reference: Tensor, spoilt: Tensor | None = None) -> None:
        """See `Error.add`."""
        self.found.setdefault(name, Error()).add(value, reference, spoilt)


def groups(rows: Tensor, seeds: int, rank: int, active: Active, tap: int = 0) -> Iterator[Group]:
    """rows: [rows, F], the activation as it was. tap: features of what is read beside it."""
    count, features = rows.shape
    chunk = -(-features // seeds)
    together = max(1, GROUP_VALUES // max(1, count * max(chunk, rank), tap * rank))
    column = torch.arange(chunk, device=rows.device)
    for first in range(0, len(active.seed), together):
        part = slice(first, first + together)
        seed = active.seed[part]
        inside = column < chunk_widths(seed, features, seeds).unsqueeze(1)
        columns = torch.where(inside, chunk_starts(seed, features, seeds).unsqueeze(1) + column, 0)
        yield Group(part, columns, inside, gathered(rows, columns, inside))


def gathered(rows: Tensor, columns: Tensor, inside: Tensor) -> Tensor:
    """[G, rows, C] float64 of rows [rows, F]; zero in the padding."""
    picked = rows[:, columns.reshape(-1)].view(rows.shape[0], *columns.shape).transpose(0, 1)
    return torch.where(inside.unsqueeze(1), picked.to(torch.float64), 0)


class Result(NamedTuple):
    """y, dx: [G, rows, C]; grads: of each parameter [G, ...], zero for seeds that do not train; d_tap [rows, T]."""

    y: Tensor
    dx: Tensor
    grads: dict[str, Tensor]
    d_tap: Tensor | None = None


def site(
    group: Group,
    active: Active,
    params: Mapping[str, Tensor],
    blueprint: str,
    blend_name: str,
    geometry: Geometry,
    dy: Tensor | None = None,
    tap: Tensor | None = None,
) -> Result:
    """params: [K, ...] of the bank. dy: [G, rows, C], zero in the padding; None for the forward alone. tap: [rows, T]
    float64, None where the blueprint reads its chunk.
    """
    part, graded = group.part, dy is not None
    slots = active.slot[part]
    wide = {name: value[slots].to(torch.float64).requires_grad_(graded) for name, value in params.items()}
    x = group.x.clone().requires_grad_(graded)
    read = x if tap is None else tap.clone().requires_grad_(graded)
    blends = active.blends[part].view(-1, 1, 1)
    s = get(blueprint).apply(read, wide, geometry)
    # Selected before as well: a zero gradient times an Inf would come back as NaN, in the padding too.
    seen = blends & group.inside.unsqueeze(1)
    live = torch.where(seen, x, 0), torch.where(seen, s, 0)
    y = torch.where(blends, blend(blend_name, *live, active.alpha[part], wide), x)
    if dy is None:
        return Result(y, y, {})
    # Through s alone for the isolated ones, whose input is detached.
    heard = torch.where(group.inside.unsqueeze(1), torch.where(blends, y, s), 0)
    named = list(wide.items())
    grads = torch.autograd.grad(
        heard, [x, *(p for _, p in named)], dy, allow_unused=True, retain_graph=tap is not None
    )
    d_tap = None
    if tap is not None:
        only = torch.where(group.inside.unsqueeze(1) & blends, y, 0)
        (d_tap,) = torch.autograd.grad(only, [read], dy, allow_unused=True)
    trains = active.trains[part]
    found = {}
    for (name, param), grad in zip(named, grads[1:], strict=True):
        grad = torch.zeros_like(param) if grad is None else grad
        found[name] = torch.where(trains.view(-1, *(1,) * (grad.dim() - 1)), grad, 0)
    dx = torch.zeros_like(x) if grads[0] is None else grads[0]
    return Result(y.detach(), torch.where(blends, dx, dy), found, d_tap)


def reconstruction(
    group: Group, active: Active, params: Mapping[str, Tensor], blueprint: str, geometry: Geometry
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss [G], the mean of (s - x)^2 over rows and columns of each seed, and its gradients [G, ...]."""
    slots = active.slot[group.part]
    wide = {name: value[slots].to(torch.float64).requires_grad_() for name, value in params.items()}
    s = get(blueprint).apply(group.x, wide, geometry)
    off = torch.where(group.inside.unsqueeze(1), s - group.x, 0)
    count = group.inside.sum(1) * group.x.shape[1]
    loss = off.square().sum((1, 2)) / count
    named = list(wide.items())
    grads = torch.autograd.grad(loss.sum(), [p for _, p in named], allow_unused=True)
    zero = {name: torch.zeros_like(param) for name, param in named}
    found = {name: zero[name] if g is None else g for (name, _), g in zip(named, grads, strict=True)}
    return loss.detach(), found


def telemetry(
    rows: Tensor, seeds: int, shift: Tensor, epilogue: str | None, near_zero: float
) -> dict[str, Tensor]:
    """Sums [S] of rows [rows, F] around `shift` [S] float64, in float64, by slices of rows.

    zeros: of act(x) as it is stored, see `dead_values`; ties: how many of them may be judged either way.
    """
    features = rows.shape[1]
    device = rows.device
    names = ("total", "squares", "row_squares", "zeros", "ties", "peak", "nonfinite")
    sums = {name: torch.zeros(seeds, dtype=torch.float64, device=device) for name in names}
    around = spread(shift, features)
    step = max(1, GROUP_VALUES // features)
    for first in range(0, rows.shape[0], step):
        x = rows[first : first + step].to(torch.float64)
        finite = x.isfinite()
        off = torch.where(finite, x - around, 0)
        dead, tied = dead_values(rows[first : first + step], epilogue, near_zero)
        sums["total"] += chunk_sums(off.sum(0), seeds)
        sums["squares"] += chunk_sums(off.square().sum(0), seeds)
        sums["row_squares"] += chunk_sums(off, seeds).square().sum(0)
        sums["zeros"] += chunk_sums((finite & dead).sum(0).to(torch.float64), seeds)
        sums["ties"] += chunk_sums((finite & tied).sum(0).to(torch.float64), seeds)
        sums["nonfinite"] += chunk_sums((~finite).sum(0).to(torch.float64), seeds)
        largest = torch.where(finite, x, 0).abs().amax(0)
        sums["peak"] = torch.maximum(sums["peak"], chunk_max(largest, seeds))
    return sums


def dead_values(x: Tensor, epilogue: str | None, near_zero: float) -> tuple[Tensor, Tensor]:
    """Where |act(x)| <= near_zero, act(x) rounded to x's type; and where that is a tie, so that nobody knows.

    Of 16-bit values there are few enough to ask torch's function on the CPU for all: no ties. Of float32 a value is a
    tie if act is off by more than it differs from near_zero, and an end of the dead lies within 3 %: gelu(v) is
    v / 2 times a multiple of 2^-24 about there, and an erf that differs in the last bit (a device's does) ends up at
    another one. Functions that round nothing have none.
    """
    act = activation(epilogue or "identity")
    if x.dtype != torch.float32:
        every = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(x.dtype)
        table = act(every.float()).to(x.dtype).float().abs() <= near_zero
        dead = table.to(x.device)[x.contiguous().view(torch.int16).long() + (1 << 15)]
        return dead, torch.zeros_like(dead)
    dead = act(x).abs() <= near_zero
    if epilogue in (None, "relu"):
        return dead, torch.zeros_like(dead)
    off = (act(x.double()).abs() - near_zero).abs() <= 2.0**-22 * x.abs()
    around = [act(x * (1 + apart)).abs() <= near_zero for apart in (-0.03, 0.03)]
    return dead, off & (around[0] != around[1])


def adamw(
    param: Tensor,
    grad: Tensor,
    first: Tensor,
    second: Tensor,
    step: Tensor,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
) -> tuple[Tensor, Tensor, Tensor]:
    """One step in float64 of rows [G, ...]: new values of param, first and second moment. step [G] counts it."""
    beta1, beta2 = betas
    steps = step.to(torch.float64).view(-1, *(1,) * (param.dim() - 1))
    first = beta1 * first + (1 - beta1) * grad
    second = beta2 * second + (1 - beta2) * grad.square()
    denominator = (second / (1 - beta2**steps)).sqrt() + eps
    param = param * (1 - lr * weight_decay) - lr * (first / (1 - beta1**steps)) / denominator
    return param, first, second
