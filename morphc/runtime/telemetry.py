"""When a site measures, and where the sums go."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from morphc.kernels.reference.chunks import chunk_sums
from morphc.kernels.reference.telemetry import as_rows, measure
from morphc.runtime.state import GRAD_SAMPLES, GRAD_SQUARES, SALIENCY, merge

if TYPE_CHECKING:
    from morphc.runtime.site import SeedSite

_library = torch.library.Library("morphc", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "watch(Tensor y, Tensor(a!) clock, Tensor(b!) sums, Tensor(c!) counts, int offset, int seeds, "
    "int axis, int every, str epilogue, float near_zero) -> ()"
)
_library.define(  # type: ignore[no-untyped-call]
    "watch_gradient(Tensor y, Tensor grad, Tensor(a!) sums, Tensor(b!) counts, int offset, "
    "int seeds, int axis) -> ()"
)


def measurable(y: Tensor, site: SeedSite) -> bool:
    """Plain floating values of the expected width, outside of tracing and of functorch's transforms."""
    return (
        type(y) in (Tensor, torch.nn.Parameter)
        and y.is_floating_point()
        and y.layout == torch.strided
        and not y.is_nested
        and not y.is_meta
        and y.dim() > 0
        and y.numel() > 0
        and -y.dim() <= site.feature_axis < y.dim()
        and y.shape[site.feature_axis] == site.features
        and torch._C._get_tracing_state() is None
        and torch._C._functorch.peek_interpreter_stack() is None
    )


@torch.no_grad()
def accumulate(site: SeedSite, y: Tensor) -> None:
    """Measure `y` and add it to the site's rows of the state."""
    sums = measure(as_rows(y, site.feature_axis), site.seeds, site.epilogue, site.near_zero)
    site.state.add(site.offset, sums)


@torch.no_grad()
def accumulate_gradient(site: SeedSite, y: Tensor, grad: Tensor) -> None:
    """Add sum of g^2 and sum of |x g| of one sampled step."""
    state = site.state
    _add_gradient(y, grad, state.sums, state.counts, site.offset, site.seeds, site.feature_axis)


def due_in_graph(site: SeedSite, y: Tensor) -> None:
    """The compiled form: one opaque op that counts by itself, so that no Python counter is guarded on."""
    if (
        torch.compiler.is_exporting()
        or not y.is_floating_point()
        or y.shape[site.feature_axis] != site.features
    ):
        return
    torch.ops.morphc.watch(
        y.detach(),
        site.clock,
        site.state.sums,
        site.state.counts,
        site.offset,
        site.seeds,
        site.feature_axis,
        site.telemetry_every,
        site.epilogue or "",
        site.near_zero,
    )


def _watch(
    y: Tensor,
    clock: Tensor,
    sums: Tensor,
    counts: Tensor,
    offset: int,
    seeds: int,
    axis: int,
    every: int,
    epilogue: str,
    near_zero: float,
) -> None:
    ticks = clock.numpy()  # on the CPU always: counting reads no device
    count = int(ticks[0])
    ticks[0] = count + 1
    if count % every or y.numel() == 0:
        return
    found = measure(as_rows(y, axis), seeds, epilogue or None, near_zero)
    merge(sums[:, offset : offset + seeds], counts[:, offset : offset + seeds], found)


def _add_gradient(
    y: Tensor, grad: Tensor, sums: Tensor, counts: Tensor, offset: int, seeds: int, axis: int
) -> None:
    wide = torch.float64 if y.dtype == torch.float64 else torch.float32
    g = as_rows(grad, axis).to(wide)
    x = as_rows(y, axis).to(wide)
    rows = slice(offset, offset + seeds)
    sums[GRAD_SQUARES, rows] += chunk_sums((g * g).sum(0), seeds)
    sums[SALIENCY, rows] += chunk_sums((x * g).abs_().sum(0), seeds)
    counts[GRAD_SAMPLES, rows] += 1


def _nothing(*args: object) -> None:
    """Fake implementation: the ops return nothing."""


_library.impl("watch", _watch, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
_library.impl("watch_gradient", _add_gradient, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("morphc::watch", _nothing, lib=_library)
torch.library.register_fake("morphc::watch_gradient", _nothing, lib=_library)
