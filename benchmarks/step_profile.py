"""Where the time goes that seeds add to a training step: kernels by name, and what the host takes to issue them.

The hosts and variants of `step_cost.py`, eager. For each variant, in milliseconds: a step among others; how long the
device is busy in it; a step alone; the host's part of that, to issue forward, backward and optimizers; and the kernels
whose time differs most from the plain model's, with their launches a step.

    python benchmarks/step_profile.py [--hosts gpt2,llama,resnet] [--variants "1 % active,10 % active"]
                                      [--tiny] [--out FILE]

On a machine without a GPU there are no kernels to list, and a step's time is the host's.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parent))

from step_cost import STEPS, Contest, Variant, with_seeds
from timing import machine, write_json

MADE = {
    "dormant every 16": (0.0, 16),
    "dormant every step": (0.0, 1),
    "1 % active": (0.01, 16),
    "10 % active": (0.1, 16),
}
"""The share of seeds that are active, and how often telemetry is taken."""
LISTED = 12


def measure(contest: Contest, variant: Variant, steps: int) -> dict[str, Any]:
    """Milliseconds of a step and of issuing it."""
    for _ in range(STEPS if contest.device.type == "cuda" else 1):
        contest.step(variant)
    wait = torch.cuda.synchronize if contest.device.type == "cuda" else lambda: None
    # Steps one at a time, each on a device that has nothing left to do: so the host never waits for room in its queue.
    phases: dict[str, list[float]] = {"forward": [], "backward": [], "optimizers": [], "alone": []}
    for _ in range(steps):
        wait()
        marks = [time.perf_counter()]
        contest.step(variant, marks)
        wait()
        marks.append(time.perf_counter())
        for phase, begun, ended in zip(phases, (*marks[:3], marks[0]), marks[1:], strict=True):
            phases[phase].append((ended - begun) * 1e3)
    variant.seconds.clear()
    contest.turn(variant, steps)
    return {
        "ms": variant.seconds[-1] * 1e3,
        **{phase: sorted(spent)[steps // 2] for phase, spent in phases.items()},
    }


def kernels(contest: Contest, variant: Variant, steps: int) -> dict[str, Any]:
    """What the device did, by the names of kernels: milliseconds and launches a step."""
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(steps):
            contest.step(variant)
        torch.cuda.synchronize()
    times: dict[str, float] = defaultdict(float)
    launches: dict[str, float] = defaultdict(float)
    for event in seen.events():
        if event.device_type == DeviceType.CUDA:
            times[event.name] += event.time_range.elapsed_us() / 1e3 / steps
            launches[event.name] += 1 / steps
    return {"busy": sum(times.values()), "kernels": {n: [times[n], launches[n]] for n in times}}


def told(name: str, found: dict[str, Any], plain: dict[str, Any]) -> str:
    """A variant for people, beside the plain model."""
    keys = ("ms", "busy", "alone", "forward", "backward", "optimizers")
    lines = [
        f"{name}: "
        + ", ".join(f"{k} {found[k]:.2f} ({found[k] - plain[k]:+.2f})" for k in keys if k in found)
    ]
    own, theirs = found.get("kernels", {}), plain.get("kernels", {})
    more = {n: (own.get(n, [0, 0])[0] - theirs.get(n, [0, 0])[0]) for n in {*own, *theirs}}
    for kernel in sorted(more, key=lambda n: -abs(more[n]))[:LISTED]:
        spent, count = own.get(kernel, [0, 0])
        lines.append(f"    {more[kernel]:+8.3f} ms  {spent:8.3f} ms in {count:7.1f} launches  {kernel[:90]}")
    return "\n".join(lines)


def main() -> None:
    """Runs what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--hosts", default="gpt2,llama,resnet")
    parser.add_argument("--variants", default=",".join(MADE), help="of: " + ", ".join(MADE))
    parser.add_argument("--tiny", action="store_true", help="small hosts, to try the script on a CPU")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    wanted = options.variants.split(",")
    if unknown := [name for name in wanted if name not in MADE]:
        parser.error(f"there is no variant {unknown[0]!r}: {', '.join(MADE)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results: dict[str, Any] = {"machine": machine(device), "tiny": options.tiny, "rows": {}}
    steps = 2 if options.tiny else STEPS
    measured = []
    for host in options.hosts.split(","):
        contest = Contest(host, "eager", options.tiny, device)
        rows = results["rows"][host] = {}
        for name in ("plain", *wanted):
            print(f"{host}: {name}", file=sys.stderr, flush=True)
            made = (
                contest.host if name == "plain" else with_seeds(contest.host, contest.x, *MADE[name], "auto")
            )
            variant = Variant(name, made, contest.host, False)
            rows[name] = measure(contest, variant, steps)
            measured.append((host, name, contest, variant))
            if options.out is not None:
                write_json(options.out, results)
    report = []
    for host, name, contest, variant in measured:
        rows = results["rows"][host]
        # Not before all is timed: the profiler stays where it has been, and every launch may take longer from then on.
        if device.type == "cuda":
            rows[name] |= kernels(contest, variant, steps)
        report.append(told(f"{host}, {name}", rows[name], rows["plain"]))
    if options.out is not None:
        write_json(options.out, results)
    print("\n".join(report))


if __name__ == "__main__":
    main()
