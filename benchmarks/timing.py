"""How the kernels' benchmarks measure: replays of CUDA graphs, the variants taking turns, medians.

A graph holds enough calls of one variant to run for some hundred microseconds, each call on the next of
several buffers that together are larger than the L2 cache. All variants are replayed once a round, in turns,
since clocks drift; a variant's figure is the median of its rounds. Without a GPU every variant is called once
and no time is given, which serves to try the code.
"""

from __future__ import annotations

import gc
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from workers import ContextLost, device_alive

L2_BYTES = 60 << 20
ROTATED_BYTES = 150 << 20
ROUNDS = 15
GRAPH_US = 500.0
SLOWEST_GRAPH_US = 20_000.0
VARIANT_US = 60_000.0
"""Device time for one variant over all rounds; a slow one takes part in fewer of them, but in three."""


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call: the median of the rounds, and the ends of their middle half. each: of every round."""

    us: float
    low: float
    high: float
    rounds: int
    calls: int
    each: tuple[float, ...] = ()


NO_TIME = Timing(math.nan, math.nan, math.nan, 0, 1)


@dataclass(frozen=True)
class Variant:
    """`call(i)` is the i-th call of a replay. `calls`: how many the rotation wants in a graph at least."""

    name: str
    call: Callable[[int], object]
    calls: int = 8


@dataclass
class _Ready:
    graph: Any
    calls: int
    every: int
    times: list[float]


def buffers_for(size: int) -> int:
    """How many buffers of `size` bytes to rotate over: more than twice the L2 cache, and two at least."""
    return max(2, -(-ROTATED_BYTES // max(size, 1)))


def measure(
    variants: Sequence[Variant],
    device: torch.device,
    *,
    rounds: int = ROUNDS,
    begin: Callable[[str], None] = lambda name: None,
) -> dict[str, Timing | str]:
    """The timing of every variant, or what it failed with. `begin` is told each name before its first call.

    Raises ContextLost when a variant took the device with it.
    """
    results: dict[str, Timing | str] = {}
    ready: dict[str, _Ready] = {}
    pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
    for variant in variants:
        begin(variant.name)
        try:
            if device.type == "cuda":
                ready[variant.name] = _prepare(variant, pool, rounds)
            else:
                variant.call(0)
                results[variant.name] = NO_TIME
        except Exception as error:
            if not device_alive():
                raise ContextLost(f"{variant.name}: {first_line(error)}") from error
            results[variant.name] = f"{type(error).__name__}: {first_line(error)}"
    if ready:
        begin("replays")
        _take_turns(ready, rounds)
    for name, entry in ready.items():
        results[name] = _timing(entry)
    return results


def first_line(error: BaseException) -> str:
    """The message of an error, on one line of moderate length."""
    return " ".join(str(error).split())[:300]


def rough_us(call: Callable[[int], object], calls: int = 3) -> float:
    """Device time of one call, roughly; the device sleeps first, so that the host is ahead of it."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    torch.cuda._sleep(3_000_000)
    start.record()
    for index in range(calls):
        call(index)
    end.record()
    torch.cuda.synchronize()
    return 1e3 * start.elapsed_time(end) / calls


def _prepare(variant: Variant, pool: Any, rounds: int) -> _Ready:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        variant.call(0)
        variant.call(1)
        torch.cuda.synchronize()
        each = max(rough_us(variant.call), 0.5)
        wanted = max(math.ceil(GRAPH_US / each), variant.calls)
        calls = max(1, min(wanted, int(SLOWEST_GRAPH_US / each)))
        graph = capture(lambda: [variant.call(index) for index in range(calls)], pool)
        graph.replay()
        torch.cuda.synchronize()
    turns = min(rounds, max(3, int(VARIANT_US / (calls * each))))
    return _Ready(graph, calls, -(-rounds // turns), [])


def capture(work: Callable[[], object], pool: Any = None) -> Any:
    """`work` as a graph, on the current stream (which is not the default one).

    Not `torch.cuda.graph`: that collects garbage and empties the allocator's cache each time, a tenth of a
    second for each of hundreds of variants.
    """
    graph = torch.cuda.CUDAGraph()
    graph.capture_begin(*(() if pool is None else (pool,)))
    try:
        work()
    except BaseException:
        with suppress(RuntimeError):
            graph.capture_end()
        raise
    graph.capture_end()
    return graph


def _take_turns(ready: dict[str, _Ready], rounds: int) -> None:
    names = list(ready)
    for turn in range(rounds):
        order = names[turn % len(names) :] + names[: turn % len(names)]
        order = order[::-1] if turn % 2 else order
        events = []
        torch.cuda._sleep(3_000_000)
        for name in order:
            if turn % ready[name].every:
                continue
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            ready[name].graph.replay()
            end.record()
            events.append((name, start, end))
        torch.cuda.synchronize()
        for name, start, end in events:
            ready[name].times.append(1e3 * start.elapsed_time(end) / ready[name].calls)


def _timing(entry: _Ready) -> Timing:
    times = sorted(entry.times)
    quarter = len(times) // 4
    return Timing(
        us=statistics.median(times),
        low=times[quarter],
        high=times[-1 - quarter],
        rounds=len(times),
        calls=entry.calls,
        each=tuple(entry.times),
    )


def latency(
    call: Callable[[Any], object],
    device: torch.device,
    prepare: Callable[[int], Any] = lambda index: None,
    *,
    samples: int = 2000,
    warm: int = 200,
) -> dict[str, float]:
    """Microseconds until `call` returns (issue) and until the device is done (sync): medians and P99.

    call: gets what `prepare` made for it, outside of the time, as what it returns is dropped outside of it.
    Garbage of before is frozen; the collector stays on, as it is for users.
    """
    on_device = device.type == "cuda"
    issue, done = [], []
    gc.collect()
    gc.freeze()
    for index in range(warm + samples):
        given = prepare(index)
        if on_device:
            torch.cuda.synchronize()
        start = time.perf_counter_ns()
        kept = call(given)
        middle = time.perf_counter_ns()
        if on_device:
            torch.cuda.synchronize()
        end = time.perf_counter_ns()
        del kept, given
        if index >= warm:
            issue.append((middle - start) / 1e3)
            done.append((end - start) / 1e3)
    gc.unfreeze()
    return {
        "issue_p50": percentile(issue, 50),
        "issue_p99": percentile(issue, 99),
        "sync_p50": percentile(done, 50),
        "sync_p99": percentile(done, 99),
        "samples": samples,
    }


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that `percent` % of them do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)]


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures hold for."""
    import triton

    found: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cores": os.cpu_count(),
        "interpreter": device.type != "cuda",
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "device": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "cuda": torch.version.cuda,
        }
    return found


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all: a run that is stopped while writing leaves what was there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(json.dumps(rounded(value), indent=1) + "\n")
    beside.replace(path)


def rounded(value: Any) -> Any:
    """The same with floats to five digits, and None for what JSON cannot say."""
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item) for item in value]
    return value
