"""Times the torch backend on this CPU and fits the cost model's constants to it.

Run it as `python benchmarks/calibrate_cost.py`; it prints the fit and what the model
says.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import torch

from morphc.kernels import blueprints, cost, devices
from morphc.kernels.cost_site import SiteShape, active, telemetry
from morphc.kernels.reference.telemetry import measure
from morphc.lifecycle import Lifecycle
from morphc.runtime.active import describe, through_bank

SIZES = ((8, 64), (128, 512), (1024, 256), (1024, 1024), (128, 2048), (4096, 1024), (4096, 4096))
CHUNKS = (1, 2, 4, 8, 16, 64, 256)


def best_us(run: Callable[[], object]) -> float:
    """Microseconds of the fastest of seven runs."""
    run()
    times = []
    for _ in range(7):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times) * 1e6


def active_call(rows: int, features: int, seeds: int, slots: int, rank: int = 16) -> Callable[[], object]:
    """The forward of one bottleneck bank whose slots are all in use, without gradients."""
    shape = SiteShape(features=features, seeds=seeds, slots=slots, rank=rank)
    bottleneck = blueprints.get("bottleneck")
    params = bottleneck.init(shape.geometry, slots, torch.Generator().manual_seed(0))
    owner = torch.arange(slots)
    states = torch.full((seeds,), int(Lifecycle.FOSSILIZED), dtype=torch.int32)
    held = describe(owner, states, torch.ones(seeds), features)
    y = torch.randn(rows, features)
    return lambda: through_bank(y, y, None, params, held, bottleneck, shape.geometry, "residual", -1)


def fit(design: list[tuple[float, ...]], times: list[float]) -> list[float]:
    """Coefficients with the least squared relative error."""
    weights = 1.0 / np.array(times)
    solved = np.linalg.lstsq(np.array(design) * weights[:, None], np.ones(len(times)), rcond=None)[0]
    return [float(value) for value in solved]


def calibrate_telemetry() -> None:
    """One sample of telemetry."""
    design, times = [], []
    for rows, features in SIZES:
        x = torch.randn(rows, features)
        for chunk in (chunk for chunk in CHUNKS if chunk <= features):
            seeds = features // chunk
            taken = best_us(lambda x=x, seeds=seeds: measure(x, seeds))
            design.append((1.0, rows * features, rows * seeds * (chunk > 1)))
            times.append(taken)
            due = telemetry(SiteShape(features=features, seeds=seeds), rows, "torch")
            said = cost.roofline(due, devices.CPU, "float32", 0.0).total_us(devices.CPU)
            print(
                f"telemetry {rows:5d} x {features:5d} chunk {chunk:4d}: {taken:9.1f} us, model {said:9.1f} us"
            )
    show(("element", "row and chunk"), fit(design, times))


def calibrate_active() -> None:
    """The forward of active seeds."""
    design, times = [], []
    with torch.no_grad():
        for rows, features in SIZES[:-1]:
            for chunk in (chunk for chunk in CHUNKS[1:] if chunk < features):
                seeds = features // chunk
                for slots in sorted({-(-seeds // 10), -(-seeds // 2)}):
                    taken = best_us(active_call(rows, features, seeds, slots))
                    shape = SiteShape(features=features, seeds=seeds, slots=slots)
                    work = active(shape, rows, "torch", Fraction(1))
                    footprint = 4.0 * rows * features
                    said = cost.roofline(work, devices.CPU, "float32", footprint).total_us(devices.CPU)
                    design.append((1.0, rows * slots * chunk, rows * slots * 16, rows * features))
                    times.append(taken)
                    print(
                        f"active {rows:5d} x {features:5d} chunk {chunk:4d} slots {slots:4d}: "
                        f"{taken:10.1f} us, model {said:10.1f} us"
                    )
    show(("active element", "hidden unit", "element of the site"), fit(design, times))


def show(names: tuple[str, ...], found: list[float]) -> None:
    """Coefficients as the constants are stated."""
    print(f"fixed {found[0]:.1f} us = {found[0] / devices.CPU.op_us:.0f} ops")
    for name, value in zip(names, found[1:], strict=True):
        passes = value * devices.CPU.cache_bandwidth / 4e6
        print(f"{name}: {value * 1e3:.3f} ns = {passes:.1f} passes of float32 in cache")


if __name__ == "__main__":
    torch.set_num_threads(1)
    calibrate_telemetry()
    calibrate_active()
