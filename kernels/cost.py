"""What a site costs beside its host layer, before anything has run.

    time = max(bytes / bandwidth, flops / peak) + launches

for the device, and ops times the host's time per op; on a GPU the two overlap, on a CPU they add up. A site's
overhead is measured against one training step of its layer (forward and backward), for telemetry samples
training forwards only.
"""

from __future__ import annotations

from fractions import Fraction
from functools import lru_cache

import msgspec

from morphc.kernels import cost_site
from morphc.kernels.blueprints import base
from morphc.kernels.cost_site import Backend, HostLayer, SiteShape
from morphc.kernels.cost_terms import Cost, Quantity, divides, dtype_bytes, rows_symbol
from morphc.kernels.devices import Device

__all__ = [
    "Backend",
    "Cost",
    "HostLayer",
    "Prediction",
    "SiteShape",
    "Time",
    "backend_for",
    "divides",
    "expressions",
    "overhead",
    "predict",
    "roofline",
    "rows_symbol",
    "slot_bytes",
]

TEN_PERCENT = Fraction(1, 10)


class Time(msgspec.Struct, frozen=True):
    """Microseconds that the device is busy, and that the host is busy issuing."""

    device_us: float = 0.0
    host_us: float = 0.0

    def __add__(self, other: Time) -> Time:
        return Time(self.device_us + other.device_us, self.host_us + other.host_us)

    def times(self, factor: float) -> Time:
        """This time `factor` times."""
        return Time(self.device_us * factor, self.host_us * factor)

    def total_us(self, device: Device) -> float:
        """What passes on the clock: the longer of the two where they overlap, else their sum."""
        if device.asynchronous:
            return max(self.device_us, self.host_us)
        return self.device_us + self.host_us


class Prediction(msgspec.Struct, frozen=True):
    """The cost of one site on one device, for so many rows. Times in us, each for one step.

    bytes_per_row: what one telemetry sample moves, by row. due_us: one sample. dormant_us: the dormant site,
    its samples spread over `telemetry_every` and its Python call included. active10_us: the same with one
    seed in ten active, forward. host_forward_us, host_us: the host layer's forward, and forward with
    backward. overhead, overhead_active10: what the site adds to `host_us`, as a fraction of it (0.02 is 2 %).
    """

    rows: int
    bytes_per_row: float
    due_us: float
    dormant_us: float
    active10_us: float
    host_forward_us: float
    host_us: float
    overhead: float
    overhead_active10: float

    def numbers(self) -> dict[str, float]:
        """As plain data, to four digits: more would only make equal plans differ."""
        return {name: float(f"{value:.4g}") for name, value in msgspec.structs.asdict(self).items()}


def backend_for(requested: str, device: Device) -> Backend:
    """The backend that `auto` means on `device`."""
    if requested == "auto":
        return "triton" if device.asynchronous else "torch"
    return "triton" if requested == "triton" else "torch"


def roofline(cost: Cost, device: Device, dtype: str, footprint: float = float("inf")) -> Time:
    """Time of `cost`, whose numbers are for a given number of rows.

    `footprint` is the size in bytes of what is passed over: up to twice the L2, repeated passes are served
    from there.
    """
    bandwidth = device.cache_bandwidth if footprint <= 2 * device.l2_bytes else device.bandwidth
    moving = float(cost.bytes) / bandwidth
    computing = float(cost.matmul) / device.peak(dtype) + float(cost.vector) / device.vector
    launches = float(cost.launches)
    return Time(max(moving, computing) * 1e6 + launches * device.launch_us, launches * device.op_us)


def overhead(shape: SiteShape, layer: HostLayer, device: Device, rows: int, backend: Backend) -> float:
    """What the dormant site adds to a training step of its host layer, as a fraction of it."""
    return predict(shape, layer, device, rows, backend, active=False).overhead


@lru_cache(maxsize=4096)
def predict(
    shape: SiteShape, layer: HostLayer, device: Device, rows: int, backend: Backend, active: bool = True
) -> Prediction:
    """The numbers for `rows`. Without `active` (or a slot) those of active seeds equal the dormant ones."""
    footprint = float(rows * shape.features * dtype_bytes(shape.dtype))
    sampled = shape.sampled(rows)
    sample = cost_site.dormant(shape, sampled, backend, due=True)
    due = roofline(sample, device, shape.dtype, 0.0 if backend == "torch" else footprint * sampled / rows)
    site = Time(0.0, device.call_us) + due.times(1 / shape.telemetry_every if shape.telemetry_every else 0.0)
    grown = site
    if active:
        work = cost_site.active(shape, rows, backend, TEN_PERCENT)
        grown = site + roofline(work, device, shape.dtype, footprint)
    forward = roofline(cost_site.host_forward(layer, rows), device, layer.dtype)
    step = roofline(cost_site.host_step(layer, rows), device, layer.dtype)
    step_us = step.total_us(device)
    return Prediction(
        rows=rows,
        bytes_per_row=float(sample.bytes) / sampled,
        due_us=due.total_us(device),
        dormant_us=site.total_us(device),
        active10_us=grown.total_us(device),
        host_forward_us=forward.total_us(device),
        host_us=step_us,
        overhead=(step + site).total_us(device) / step_us - 1,
        overhead_active10=(step + grown).total_us(device) / step_us - 1,
    )


def expressions(
    shape: SiteShape, layer: HostLayer, backend: Backend, fraction: Fraction = TEN_PERCENT
) -> dict[str, str]:
    """Bytes and flops in the symbol `rows`, as text that sympy reads back.

    `dormant_*` is one telemetry sample, `step_*` a training forward with `fraction` of the seeds active and
    the samples spread out, `host_*` the layer's forward.
    """
    rows = rows_symbol()
    costs = {
        "dormant": cost_site.dormant(shape, rows, backend, due=True),
        "step": cost_site.amortised(shape, rows, backend, fraction),
        "host": cost_site.host_forward(layer, rows),
    }
    return {
        f"{name}_{unit}": _text(getattr(cost, unit))
        for name, cost in costs.items()
        for unit in ("bytes", "flops")
    }


def slot_bytes(shape: SiteShape, blueprints: tuple[str, ...], *, training_state: bool = False) -> int:
    """Bytes of one slot of each of `blueprints`: float32 weights, like a host's own parameters.

    `training_state` adds what training them takes: gradient, two moments and a step.
    """
    bank = sum(cost_site.parameters_of(base.get(name), shape.geometry) for name in blueprints)
    return 16 * bank + 4 * len(blueprints) if training_state else 4 * bank


def _text(quantity: Quantity) -> str:
    import sympy

    return str(sympy.expand(quantity))
