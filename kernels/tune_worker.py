"""Times candidates of kernels in a process of its own: one that breaks the device's context ends no run.

A line of JSON on stdin asks for one kernel: `{"spec", "rows", "device", "configs"}`. Lines of JSON on stdout answer:
`{"begin": i}` before candidate i runs for the first time, `{"failed": i, "why": text}`, `{"times": [[i, us], ..]}` of
all that run, then again of the fastest, and `{"end": true}`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import torch

from morphc.kernels import autotune, tuning
from morphc.kernels.spec import KernelSpec, TuneConfig


def answer(question: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The lines for one kernel. Raises what ends the process: a device that answers no more."""
    spec = msgspec.convert(question["spec"], KernelSpec)
    configs = msgspec.convert(question["configs"], list[TuneConfig])
    device = torch.device(question["device"])
    start = autotune.KINDS[spec.kind].start
    try:
        bench = autotune.make_bench(spec, question["rows"], device)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        yield from ({"failed": at, "why": "CUDA out of memory"} for at in range(len(configs)))
        yield {"end": True}
        return
    runs: dict[int, Callable[[int], None]] = {}
    for at, config in enumerate(configs):
        yield {"begin": at}
        try:
            run = start(bench, config)
            run(0)
            torch.cuda.synchronize(device)
            runs[at] = run
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            yield {"failed": at, "why": "CUDA out of memory"}
        except Exception as error:
            torch.cuda.synchronize(device)  # raises where the device is gone
            yield {"failed": at, "why": str(error).strip().splitlines()[0][:300]}
    with torch.cuda.device(device):
        times = _timed(runs, tuning.SHORT)
        yield {"times": list(times.items())}
        fast = {at: runs[at] for at, us in times.items() if us <= tuning.FINAL * min(times.values())}
        if len(fast) > 1:
            yield {"times": list(_timed(fast, tuning.LONG).items())}
    yield {"end": True}


def _timed(runs: dict[int, Callable[[int], None]], rounds: int) -> dict[int, float]:
    return dict(zip(runs, tuning.graph_times(list(runs.values()), rounds), strict=True))


def main() -> None:
    """Answer until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        for told in answer(json.loads(line)):
            answers.write(json.dumps(told) + "\n")
            answers.flush()


if __name__ == "__main__":
    main()
