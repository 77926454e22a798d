"""Inspect a Llama-7B-sized config on the meta device: seconds and memory, in a process of its own.

    python benchmarks/llama_inspect.py              prints a table, writes benchmarks/results/llama_inspect.json

Also: what `import morphc` adds to `import torch`, and how long `morphc --help` takes (medians of 7 processes).
"""

from __future__ import annotations

import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results" / "llama_inspect.json"
RUNS = 7


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


def process_seconds(*arguments: str) -> float:
    """Median wall-clock seconds of a command, after one run that warms the disk cache."""
    times = []
    for _ in range(RUNS + 1):
        started = time.perf_counter()
        subprocess.run(arguments, check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def main() -> None:
    if sys.argv[1:] == ["--worker"]:
        print(json.dumps(inspect_llama()))
        return
    worker = subprocess.run(
        [sys.executable, __file__, "--worker"], check=True, stdout=subprocess.PIPE, text=True
    )
    result = json.loads(worker.stdout.splitlines()[-1])
    bare = process_seconds(sys.executable, "-c", "import torch")
    both = process_seconds(sys.executable, "-c", "import torch, morphc")
    touched = process_seconds(sys.executable, "-c", "import torch, morphc; morphc.compile")
    help_text = process_seconds(sys.executable, "-m", "morphc", "--help")
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
