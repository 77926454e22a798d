"""Times the torch backend's telemetry on this CPU and fits the cost model's constants to it.

Run it as `python -m tests.cost.calibrate` from the repository's root; it prints the fit and what the model
says.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch

from morphc.kernels import cost, devices
from morphc.kernels.cost_site import SiteShape, telemetry
from morphc.kernels.reference.telemetry import measure

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


def main() -> None:
    torch.set_num_threads(1)
    rows_of_fit, times = [], []
    for rows, features in SIZES:
        x = torch.randn(rows, features)
        for chunk in CHUNKS:
            if chunk > features:
                continue
            seeds = features // chunk
            taken = best_us(lambda x=x, seeds=seeds: measure(x, seeds))
            rows_of_fit.append((1.0, rows * features, rows * seeds * (chunk > 1)))
            times.append(taken)
            due = telemetry(SiteShape(features=features, seeds=seeds), rows, "torch")
            said = cost.roofline(due, devices.CPU, "float32", 0.0).total_us(devices.CPU)
            print(f"{rows:5d} x {features:5d} chunk {chunk:4d}: {taken:10.1f} us, model {said:10.1f} us")
    weights = 1.0 / np.array(times)
    design = np.array(rows_of_fit) * weights[:, None]
    fixed, element, chunk_us = np.linalg.lstsq(design, np.ones(len(times)), rcond=None)[0]
    bandwidth = devices.CPU.cache_bandwidth / 1e6
    print(f"fixed {fixed:.1f} us = {fixed / devices.CPU.op_us:.0f} ops")
    print(f"an element {element * 1e3:.3f} ns = {element * bandwidth / 4:.1f} passes of float32 in cache")
    print(f"a row and chunk {chunk_us * 1e3:.3f} ns = {chunk_us * bandwidth / 4:.1f} passes")


if __name__ == "__main__":
    main()
