"""What tuning costs and brings on a GPU: a cold start, a warm one, and guesses against quick and full runs.

    PYTHONPATH=. python benchmarks/tuning.py [--only start,grid] [--shapes c64,...] [--seconds 300] [--out DIR]

start   GPT-2 small in three processes that share one cache: `morphc.tune` quick with an empty cache; a training step
        that may compile nothing (MORPHC_REQUIRE_CACHED=1), with the seconds its kernels took to be ready and how often
        Triton's compiler was asked; and the same with an empty cache, to compare.
grid    the shapes of the kernels' benchmark: every candidate of every kernel timed once (a full run). A quick run times
        the first eight of them, and without tuning the first is used: what each comes to against the best of all.

Writes `tuning.json`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import torch
from figures import CASES
from timing import machine, write_json

from morphc.kernels import telemetry, training, tuner
from morphc.kernels.cache import tables
from morphc.kernels.spec import KernelSpec
from morphc.kernels.tuner import Task

HERE = Path(__file__).resolve().parent
KINDS = ("telemetry", "forward", "backward", "train")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

START = """
import json, sys, time
import torch
from transformers import GPT2Config, GPT2LMHeadModel
import morphc
from morphc import Lifecycle
from morphc.kernels import launch
from morphc.kernels.cache import counters

mode = sys.argv[1]
torch.manual_seed(0)
host = GPT2LMHeadModel(GPT2Config()).cuda()
ids = torch.randint(1, 50000, (4, 512), device="cuda")
began = time.perf_counter()
model = morphc.compile(host, (ids,), config=morphc.Config(seeds_per_layer=1024, telemetry_every=1), verify=False)
compiled = time.perf_counter()
told = {"compile_s": compiled - began}
if mode == "tune":
    def progress(text, done, total):
        print(f"{time.perf_counter() - compiled:6.1f} s {done}/{total} {text}", file=sys.stderr)
    found = morphc.tune(model, "quick", progress=progress)
    told |= {"tune_s": time.perf_counter() - compiled, "kernels": len(found.outcomes)}
    told["failed"] = [one.kernel for one in found.outcomes if one.us is None]
for site in morphc.seeds(model).sites.values():
    site.assign([1, 5], Lifecycle.FINE_TUNING)
# Preparing a kernel: its file, its binary, and loading it.
spent, real = [0.0], launch.prepare
depth = [0]
def timed(*args, **options):
    depth[0] += 1
    before = time.perf_counter()
    try:
        return real(*args, **options)
    finally:
        depth[0] -= 1
        if not depth[0]:
            spent[0] += time.perf_counter() - before
launch.prepare = timed
for name in list(sys.modules):
    module = sys.modules[name]
    if name.startswith("morphc.") and getattr(module, "prepare", None) is real:
        module.prepare = timed
with counters.watch() as count:
    before = time.perf_counter()
    steps = []
    for _ in range(3):
        start = time.perf_counter()
        model(ids, labels=ids).loss.backward()
        morphc.seeds(model).step_optimizer(lr=1e-4)
        morphc.seeds(model).telemetry()
        torch.cuda.synchronize()
        steps.append(time.perf_counter() - start)
told |= {"first_step_s": steps[0], "later_step_s": steps[-1], "prepare_s": spent[0], "triton_compiles": count.compiled,
         "hits": count.hits, "misses": len(count.misses)}
print("told " + json.dumps(told))
"""


def start(seconds: float) -> Iterator[tuple[str, dict[str, Any]]]:
    """Cold with tuning, warm, and cold without, as each is done."""
    with tempfile.TemporaryDirectory() as cache, tempfile.TemporaryDirectory() as empty:
        yield "cold, quick tuning", _process("tune", cache, seconds)
        yield "warm, nothing may be compiled", _process("run", cache, seconds, MORPHC_REQUIRE_CACHED="1")
        yield "warm", _process("run", cache, seconds)
        yield "cold, no tuning", _process("run", empty, seconds)


def _process(mode: str, cache: str, seconds: float, **variables: str) -> dict[str, Any]:
    # Triton's own cache would hide what ours does.
    env = os.environ | {"MORPHC_CACHE_DIR": cache, "TRITON_CACHE_DIR": f"{cache}/triton"} | variables
    began = time.perf_counter()
    try:
        ran = subprocess.run(
            [sys.executable, "-c", START, mode],
            stdout=subprocess.PIPE,
            text=True,
            env=env,
            cwd=HERE.parent,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"took more than {seconds:.0f} s"}
    told = [line for line in ran.stdout.splitlines() if line.startswith("told ")]
    if not told:
        return {"failed": f"status {ran.returncode}, see its stderr above"}
    return json.loads(told[-1][5:]) | {"process_s": time.perf_counter() - began}


def grid(options: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """Of each shape, one record a kernel: the guess's time, the quick run's and the full run's."""
    end = time.monotonic() + options.seconds
    kinds = options.kinds.split(",")
    for dtype, name in itertools.product(options.dtypes.split(","), options.shapes.split(",")):
        if time.monotonic() > end:
            print(f"no time left for {name} {dtype}", file=sys.stderr)
            continue
        tasks = [_task(kind, name, DTYPES[dtype]) for kind in kinds]
        tasks = [task for task in tasks if task.spec.kind != "train" or not training.refuses(task.spec)]
        outcomes = tuner.tune(tasks, torch.device("cuda"), "full", progress=_progress)
        yield [{"case": name, "dtype": dtype, "kernel": one.kernel, **_record(one)} for one in outcomes]


def _task(kind: str, name: str, dtype: torch.dtype) -> Task:
    case = CASES[name]
    if kind == "telemetry":
        return Task(telemetry.spec_of(case.features, case.seeds, dtype), case.rows)
    spec = KernelSpec(
        kind=kind, features=case.features, seeds=case.seeds, chunk=case.chunk, slots=max(4, case.seeds // 10),
        rank=case.rank, blueprint="bottleneck", blend="residual", epilogue=None, layout="last",
        dtype=str(dtype).removeprefix("torch."),
    )  # fmt: skip
    return Task(spec, case.rows)


def _record(one: tuner.Outcome) -> dict[str, Any]:
    if one.us is None:
        return {"failed": one.problem}
    answer = next(
        answer
        for table in _tables(one.kernel)
        for answer in table.answers
        if answer.rows == one.rows and answer.method == tables.GRAPH_REPLAY
    )
    # In the order that they were proposed.
    times = [trial.us for trial in answer.trials]
    quick = [us for us in times[: tuner.QUICK] if us is not None]
    return {
        "rows": one.rows,
        "full_us": one.us,
        "quick_us": min(quick) if quick else None,
        "guess_us": one.guess_us,
        "candidates": len(times),
        "left_out": sum(us is None for us in times),
        "memory_share": one.roofline,
        "trials": [
            {"config": msgspec.to_builtins(trial.config), "us": trial.us, "problem": trial.problem}
            for trial in answer.trials
        ],
    }


def _tables(kernel: str) -> list[tables.Table]:
    import morphc

    return list(morphc.cache().show(kernel).tables)


def _progress(text: str, done: int, total: int) -> None:
    if ": candidate 0 of" in text or not (done % 40 or "candidate" in text):
        print(f"{text[:100]} {done}/{total}", file=sys.stderr)


def summary(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians and worst of the ratios to the full run's best."""
    found = {}
    for what in ("quick", "guess"):
        ratios = [r[f"{what}_us"] / r["full_us"] for r in records if r.get(f"{what}_us")]
        if ratios:
            found[what] = {"median": statistics.median(ratios), "worst": max(ratios), "kernels": len(ratios)}
    return found


def main() -> int:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="start,grid")
    parser.add_argument("--shapes", default=",".join(CASES))
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--dtypes", default="bf16", help=", ".join(DTYPES))
    parser.add_argument(
        "--seconds", type=float, default=300.0, help="begin no shape of the grid after that many"
    )
    parser.add_argument(
        "--limit", type=float, default=120.0, help="seconds that a process of `start` may take"
    )
    parser.add_argument("--out", type=Path, default=HERE / "results")
    options = parser.parse_args()
    told: dict[str, Any] = {"machine": machine(torch.device("cuda"))}
    if "start" in options.only:
        told["start"] = {}
        for name, one in start(options.limit):
            told["start"][name] = one
            write_json(options.out / "tuning.json", told)
            print(f"{name}: {_line(one)}", flush=True)
    if "grid" in options.only:
        records = []
        for found in grid(options):
            records += found
            told |= {"summary": summary(records), "kernels": records}
            write_json(options.out / "tuning.json", told)
        for record in records:
            print(_line(record))
        print(told.get("summary"))
    return 0


def _line(record: dict[str, Any]) -> str:
    return " ".join(
        f"{key}={value if not isinstance(value, float) else f'{value:.3g}'}"
        for key, value in record.items()
        if key != "trials"
    )


if __name__ == "__main__":
    sys.exit(main())
