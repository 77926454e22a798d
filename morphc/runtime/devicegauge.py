"""Telemetry of a site on generated kernels: one launch a sample, and the sums handed to the state now and then."""

from __future__ import annotations

import weakref
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from morphc.kernels import telemetry
from morphc.kernels.layout import View, Walk, thinned, view_of
from morphc.kernels.telemetry import Telemetry
from morphc.runtime.lasting import lasting

if TYPE_CHECKING:
    from morphc.runtime.site import SeedSite


@lru_cache(maxsize=4096)
def kernels_for(
    features: int,
    seeds: int,
    dtype: torch.dtype,
    walk: Walk,
    epilogue: str | None,
    near_zero: float,
    device: torch.device,
) -> Telemetry | None:
    """What measures such activations; None where there is no kernel."""
    spec = telemetry.spec_of(features, seeds, dtype, walk, epilogue)
    return None if telemetry.refuses(spec, near_zero) else Telemetry(spec, near_zero, device)


class DeviceGauge:
    """A place in a state on a device, and the sums that are on their way there.

    It answers to the same calls as `Gauge`: `read` gives the activation if it is laid out as the one before, else
    None; `add` measures it; `settle` hands the sums on.
    """

    __slots__ = (
        "__weakref__",
        "axis",
        "cells",
        "counts",
        "epilogue",
        "given",
        "kernels",
        "offset",
        "sums",
        "view",
        "window",
    )

    def __init__(self, site: SeedSite, sums: Tensor, counts: Tensor) -> None:
        self.sums, self.counts = sums, counts
        self.epilogue, self.axis, self.offset = site.epilogue, site.feature_axis, site.offset
        self.given: tuple[object, ...] = ()
        self.kernels: Telemetry | None = None
        self.cells: telemetry.Cells | None = None
        self.view: View | None = None
        self.window = -1

    def read(self, y: Tensor) -> Tensor | None:
        """`y`, if it is laid out as the activation before."""
        return y if (y.shape, y.dtype, y.device, y.stride()) == self.given else None

    def prepare(self, site: SeedSite, y: Tensor) -> Tensor | None:
        """`y`, after which activations like it can be read at once; None where torch has to measure it."""
        view = view_of(y, self.axis)
        if view is None:
            return None
        kernels = kernels_for(
            site.features, site.seeds, y.dtype, view.walk, site.epilogue, site.near_zero, y.device
        )
        if kernels is None:
            return None
        view = thinned(view, site.features, site.telemetry_values)
        self.settle()
        if kernels is not self.kernels or self.cells is None:
            self.kernels = kernels
            self.cells = lasting(lambda: kernels.new_cells(view), y.device)
            self.window = -1
        self.view = view
        self.given = (y.shape, y.dtype, y.device, y.stride())
        return y

    def add(self, y: Tensor, window: int) -> None:
        """Measure `y`. `window` changes whenever the state's sums are set."""
        kernels, cells, view = self.kernels, self.cells, self.view
        assert kernels is not None
        assert cells is not None
        assert view is not None
        if self.window != window:
            cells.clear()
            kernels.shift(y, view, self.sums, self.counts, self.offset)
            self.window = window
        # Nobody counts the samples of a captured graph, so each of its replays hands its own on.
        captured = y.is_cuda and torch.cuda.is_current_stream_capturing()
        kernels(y, view, cells, self.sums, self.counts, self.offset, merged=captured)

    def settle(self) -> None:
        """Hand what was measured to the state."""
        if self.kernels is not None and self.cells is not None and self.cells.pending:
            self.kernels.merge(self.cells, self.sums, self.counts, self.offset)


class Settling(Protocol):
    """A gauge of either kind."""

    def settle(self) -> None:
        """Hand what was measured to the state."""


class Pending:
    """The gauges of one state whose sums may not be in it yet. Never copied or pickled: a copy begins with none."""

    __slots__ = ("gauges",)

    def __init__(self) -> None:
        self.gauges: weakref.WeakSet[Settling] = weakref.WeakSet()

    def __reduce__(self) -> tuple[type[Pending], tuple[()]]:
        return Pending, ()

    def __deepcopy__(self, memo: object) -> Pending:
        return Pending()

    def settle(self) -> None:
        """Bring the state up to date."""
        for gauge in tuple(self.gauges):  # another thread may add one
            gauge.settle()
