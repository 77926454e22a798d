"""When a site measures, and where the sums go."""

from __future__ import annotations

from ctypes import memmove
from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from morphc.kernels.backend import KERNEL_DTYPES, chosen
from morphc.kernels.layout import View, thinned, view_of
from morphc.kernels.reference.chunks import chunk_sums, chunk_widths
from morphc.kernels.reference.health import (
    GRAD_SAMPLES,
    GRAD_SQUARES,
    PEAK,
    ROWS,
    SALIENCY,
    SUM,
    ZEROS,
)
from morphc.kernels.reference.telemetry import Sums, as_rows, measure
from morphc.kernels.reference.telemetry_cpu import Array, Dead, aligned, meter_of
from morphc.runtime.devicegauge import DeviceGauge
from morphc.runtime.state import center_host, merge

if TYPE_CHECKING:
    from morphc.runtime.site import SeedSite

PLAIN = (Tensor, torch.nn.Parameter)
_tracing = torch._C._get_tracing_state
_transforming = torch._C._functorch.peek_interpreter_stack

HOST_TYPES = {torch.float32: np.float32, torch.float64: np.float64}
"""What numpy reads as it is."""

HALF_TYPES = (torch.bfloat16, torch.float16)

STAGED_ELEMENTS = 1 << 16
"""An activation of more is measured at once."""

LEAST_STAGED, MOST_STAGED = 16, 32
"""So many small activations are measured together, by their size."""

OFTEN = 4
"""A site that measures less often than every so many forwards puts nothing aside, and needs no memory for it."""


def measurable(y: Tensor, site: SeedSite) -> bool:
    """Plain floating values of the expected width, outside of tracing and of functorch's transforms."""
    if type(y) not in PLAIN or y.layout is not torch.strided or y.is_nested or y.is_meta:
        return False
    shape, axis = y.shape, site.feature_axis
    return (
        -len(shape) <= axis < len(shape)
        and shape[axis] == site.features
        and 0 not in shape
        and y.dtype.is_floating_point
        and _untransformed()
    )


def _untransformed() -> bool:
    return _tracing() is None and _transforming() is None


class Place(NamedTuple):
    """The rows of the state that an activation's chunks have, and how it is read."""

    offset: int
    seeds: int
    axis: int
    epilogue: str | None
    near_zero: float
    values: int

    def sampled(self, y: Tensor) -> Tensor:
        """The rows of `y` that a sample takes, [rows, F]: those that kernels take, on a device that has them."""
        y = y.detach()
        features = y.shape[self.axis]
        if not self.values or y.numel() <= self.values:
            return as_rows(y, self.axis)
        view = view_of(y, self.axis) or View("last", y.numel() // features, features, 1)
        step = thinned(view, features, self.values).stride // view.stride
        if view.walk == "channels_first":
            return as_rows(y.reshape(-1, features, view.inner)[::step], 1)
        return as_rows(y, self.axis)[::step]

    @property
    def rows(self) -> slice:
        """Of the state."""
        return slice(self.offset, self.offset + self.seeds)


class Gauge:
    """A place in a state in host memory, and what is on its way there.

    Inside a training step the code that measures is out of the caches, and a small activation costs less to copy
    than to measure. So where telemetry is taken often, small ones are put aside, one behind the other as `staged`
    [rows, F], and measured together: as soon as there are enough, when the state is read, or when one comes that
    is laid out otherwise. None is left out.
    """

    __slots__ = (
        "__weakref__",
        "address",
        "center",
        "centered",
        "dead",
        "epilogue",
        "filled",
        "given",
        "kept",
        "kind",
        "lock",
        "moments",
        "often",
        "peak",
        "place",
        "rows",
        "size",
        "slots",
        "staged",
        "state",
        "sums",
        "window",
    )

    def __init__(self, sums: Tensor, counts: Tensor, place: Place, often: bool = False) -> None:
        self.sums, self.state, self.often = sums, (sums, counts, place), often
        self.place, self.epilogue = place, place.epilogue
        self.kept = sums.numpy()[:, place.rows], counts.numpy()[:, place.rows]
        self.moments = self.kept[0][SUM : ZEROS + 1].reshape(2, 2, -1).transpose(1, 0, 2)  # as a meter's
        self.peak, self.rows = self.kept[0][PEAK], self.kept[1][ROWS]
        self.given: torch.Size | None = None
        self.window = self.centered = -1
        self.filled = self.slots = self.size = self.address = 0
        self.center: Array | None = None
        self.staged: Array | None = None
        self.lock = Lock()

    def read(self, y: Tensor) -> Tensor | None:
        """`y`, if it is laid out as the activation before."""
        try:
            same = y.shape == self.given and y.dtype is self.kind and y.is_cpu and y.is_contiguous()
        except RuntimeError:
            return None  # a layout without strides
        return y if same and not y.is_neg() else None

    def prepare(self, y: Tensor) -> Array:
        """The rows of `y` [rows, F], after which activations like it can be read."""
        rows = self.place.sampled(y)
        with self.lock:
            self._settle()
            as_it_is = y.dtype in HOST_TYPES
            last = self.place.axis % y.dim() == y.dim() - 1
            self.given, self.kind = y.shape if last and as_it_is else None, y.dtype
            stored = "" if as_it_is or y.dtype not in HALF_TYPES else str(y.dtype).removeprefix("torch.")
            self.dead = Dead(self.epilogue, self.place.near_zero, stored)
            self.size, self.staged, self.centered = y.nbytes, None, -1
            small = self.often and y.numel() <= STAGED_ELEMENTS and rows.numel() == y.numel()
            fitting = 4 * STAGED_ELEMENTS // y.numel()
            self.slots = min(MOST_STAGED, max(LEAST_STAGED, fitting)) if small else 0
        values: Array = (rows if as_it_is else rows.float()).numpy()
        return values

    def add(self, y: Tensor, window: int) -> None:
        """Measure `y` now or later. `window` changes whenever the state's sums are set."""
        if not self.slots:
            self.measure(self.place.sampled(y).numpy(), window)
            return
        with self.lock:
            if self.window != window:
                self.window, self.filled = window, 0
            if self.staged is None:
                rows = y.numel() // y.shape[-1]
                self.staged = aligned((self.slots * rows, y.shape[-1]), HOST_TYPES[y.dtype])
                self.address = self.staged.ctypes.data
            memmove(self.address + self.filled * self.size, y.data_ptr(), self.size)
            self.filled += 1
            if self.filled == self.slots:
                self._settle()

    def settle(self) -> None:
        """Hand what was put aside to the state."""
        with self.lock:
            self._settle()

    def _settle(self) -> None:
        filled, self.filled = self.filled, 0
        if filled and self.staged is not None:
            self.measure(self.staged[: filled * len(self.staged) // self.slots], self.window)

    def measure(self, values: Array, window: int) -> None:
        """values: [rows, F]."""
        place = self.place
        if self.centered != window:
            self.center = center_host(*self.kept, values, place.seeds)
            self.centered = window
        rows, features = values.shape
        meter = meter_of(rows, features, place.seeds, values.dtype, self.dead)
        if meter.measure(values, self.center):
            np.add(self.moments, meter.moments, self.moments)
            np.maximum(self.peak, meter.peak, out=self.peak)
            np.add(self.rows, len(values), self.rows)
        else:
            _add_any(torch.from_numpy(values), *self.state, self.kind)
            self.centered = -1


def accumulate(site: SeedSite, y: Tensor) -> bool:
    """Measure `y` and add it to the site's rows of the state, if it is `measurable`; whether it was."""
    state, gauge = site.state, site.pulse.gauge
    sums = state._buffers["sums"]
    assert sums is not None
    known = gauge is not None and gauge.sums is sums and gauge.epilogue == site.epilogue
    if gauge is not None and known and type(y) is Tensor and _untransformed():
        x: Any = gauge.read(y)
        if x is not None:
            gauge.add(x, state.window)
            return True
    if not measurable(y, site):
        return False
    if sums.is_meta:
        sums = leave_meta(site, y.device)
    if y.device == sums.device and y.dtype in KERNEL_DTYPES and chosen(site.backend, y.device) == "triton":
        on_kernels = (
            gauge if known and isinstance(gauge, DeviceGauge) else DeviceGauge(site, sums, state.counts)
        )
        value = on_kernels.prepare(site, y.detach())
        if value is not None:
            site.pulse.gauge = on_kernels
            state.pending.gauges.add(on_kernels)
            on_kernels.add(value, state.window)
            return True
    place = Place(
        site.offset, site.seeds, site.feature_axis, site.epilogue, site.near_zero, site.telemetry_values
    )
    if not (y.is_cpu and sums.is_cpu):
        _add_any(place.sampled(y), sums, state.counts, place)
        return True
    if not known or not isinstance(gauge, Gauge):
        if gauge is not None:
            gauge.settle()
        gauge = site.pulse.gauge = Gauge(sums, state.counts, place, often=site.pulse.every <= OFTEN)
        state.pending.gauges.add(gauge)
    gauge.measure(gauge.prepare(y), state.window)
    return True


def leave_meta(site: SeedSite, device: torch.device) -> Tensor:
    """The state's sums, after it has left the meta device: the model did so tensor by tensor, and told nobody."""
    if site.state.store is not None:
        site.state.store.leave_meta(device)
    return site.state.sums


def _add_any(
    x: Tensor, sums: Tensor, counts: Tensor, place: Place, stored: torch.dtype | None = None
) -> None:
    """x: [rows, F], anywhere. stored: see `measure`."""
    measured = measure(x, place.seeds, place.epilogue, place.near_zero, stored)
    if x.device != sums.device:
        moved: Any = [v.to(sums.device) if isinstance(v, Tensor) else v for v in measured]
        measured = Sums(*moved)
    widths = chunk_widths(torch.arange(place.seeds, device=sums.device), x.shape[1], place.seeds)
    merge(sums[:, place.rows], counts[:, place.rows], widths, measured)


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
