"""When a site measures, and where the sums go."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from morphc.kernels.reference.chunks import chunk_sums, chunk_widths
from morphc.kernels.reference.telemetry import Sums, as_rows, measure
from morphc.kernels.reference.telemetry_cpu import cut_of, measure_host
from morphc.runtime.state import GRAD_SAMPLES, GRAD_SQUARES, SALIENCY, center_host, merge, merge_host

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


def accumulate(site: SeedSite, y: Tensor) -> None:
    """Measure `y`, which is detached, and add it to the site's rows of the state."""
    state, pulse = site.state, site.pulse
    x = y if y.dim() == 2 and site.feature_axis == -1 else as_rows(y, site.feature_axis)
    if x.device.type != "cpu" or not state.sums.is_cpu:
        _add_any(x, state.sums, state.counts, site.offset, site.seeds, site.epilogue, site.near_zero)
        return
    if pulse.bound is not state.sums:
        rows = slice(site.offset, site.offset + site.seeds)
        pulse.views = state.sums.numpy()[:, rows], state.counts.numpy()[:, rows]
        pulse.bound, pulse.center = state.sums, None
    kept, counts = pulse.views
    cut = cut_of(site.features, site.seeds)
    center = pulse.center
    other_width = center is not None and (center.dtype == torch.float64) != (x.dtype == torch.float64)
    if center is None or other_width or pulse.window != state.window:
        center = pulse.center = center_host(kept, counts, x, cut)
        pulse.window = state.window
    found = measure_host(x, center, cut, site.epilogue, site.near_zero)
    if found is None:
        _add_any(x, state.sums, state.counts, site.offset, site.seeds, site.epilogue, site.near_zero)
        pulse.center = None
        return
    merge_host(kept, counts, found, x.shape[0])


def _add_any(
    x: Tensor, sums: Tensor, counts: Tensor, offset: int, seeds: int, epilogue: str | None, near_zero: float
) -> None:
    measured = measure(x, seeds, epilogue, near_zero)
    if x.device != sums.device:
        moved: Any = [v.to(sums.device) if isinstance(v, Tensor) else v for v in measured]
        measured = Sums(*moved)
    rows = slice(offset, offset + seeds)
    widths = chunk_widths(torch.arange(seeds, device=sums.device), x.shape[1], seeds)
    merge(sums[:, rows], counts[:, rows], widths, measured)


@torch.no_grad()
def accumulate_gradient(site: SeedSite, y: Tensor, grad: Tensor) -> None:
    """Add sum of g^2 and sum of |x g| of one sampled step."""
    state = site.state
    _add_gradient(y, grad, state.sums, state.counts, site.offset, site.seeds, site.feature_axis)


def exporting() -> bool:
    """Whether `torch.export` traces. `torch.compiler.is_exporting()` itself is traced as true in torch 2.11, export or
    not; the flag behind it is read as what it is.
    """
    return torch.compiler._is_exporting_flag


def due_in_graph(site: SeedSite, y: Tensor) -> None:
    """The compiled form: one opaque op that counts by itself, so that no Python counter is guarded on."""
    if exporting() or not y.is_floating_point() or y.shape[site.feature_axis] != site.features:
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
    x = as_rows(y, axis)
    rows = slice(offset, offset + seeds)
    if x.is_cpu and sums.is_cpu:
        cut = cut_of(x.shape[1], seeds)
        kept, numbers = sums.numpy()[:, rows], counts.numpy()[:, rows]
        found = measure_host(x, center_host(kept, numbers, x, cut), cut, epilogue or None, near_zero)
        if found is not None:
            merge_host(kept, numbers, found, x.shape[0])
            return
    _add_any(x, sums, counts, offset, seeds, epilogue or None, near_zero)


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
