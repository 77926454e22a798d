"""Inspect a Llama-7B-sized config on the meta device: seconds and memory, in a process of its own.

    python benchmarks/llama_inspect.py              prints a table, writes benchmarks/results/llama_inspect.json

Also: what `import morphc` adds to `import torch`, and how long `morphc --help` takes (the fastest of 9 processes
each, taken in turn).
"""

from __future__ import annotations

import json
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results" / "llama_inspect.json"
RUNS = 9


def inspect_llama() -> dict[str, float | int]:
    """Build and inspect the model; figures of this process."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from morphc.compiler import inspect

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig())
        ids = torch.zeros(1, 2048, dtype=torch.long)
    started = time.perf_counter()
    report = inspect(model, (ids,))
    seconds = time.perf_counter() - started
    executed = [site for site in report.plan.sites if site.executed]
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": round(seconds, 3),
        "peak_GiB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3),
        "sites": len(report.plan.sites),
        "sites_executed": len(executed),
        "seeds": sum(site.seeds for site in report.plan.sites),
        "kernels": len(report.plan.specs),
    }


def process_seconds(*commands: tuple[str, ...]) -> list[float]:
    """Fastest wall-clock seconds of each command, run in turn, after one round that warms the disk cache."""
    times: list[list[float]] = [[] for _ in commands]
    for _ in range(RUNS + 1):
        for command, found in zip(commands, times, strict=True):
            started = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            found.append(time.perf_counter() - started)
    return [min(found[1:]) for found in times]


def main() -> None:
    if sys.argv[1:] == ["--worker"]:
        print(json.dumps(inspect_llama()))
        return
    worker = subprocess.run(
        [sys.executable, __file__, "--worker"], check=True, stdout=subprocess.PIPE, text=True
    )
    result = json.loads(worker.stdout.splitlines()[-1])
    bare, both, touched, help_text = process_seconds(
        (sys.executable, "-c", "import torch"),
        (sys.executable, "-c", "import torch, morphc"),
        (sys.executable, "-c", "import torch, morphc; morphc.compile"),
        (sys.executable, "-m", "morphc", "--help"),
    )
    result |= {
        "import_torch_s": round(bare, 3),
        "import_morphc_adds_s": round(both - bare, 3),
        "first_use_of_compile_adds_s": round(touched - both, 3),
        "help_s": round(help_text, 3),
    }
    import torch

    result["environment"] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": platform.machine(),
    }
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")
    for name, value in result.items():
        print(f"{name:30} {value}")


if __name__ == "__main__":
    main()
