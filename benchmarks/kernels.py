"""What the generated kernels cost on a GPU, beside the memory's own limits and other ways to the same values.

    PYTHONPATH=. python benchmarks/kernels.py [--only site,backward,...] [--shapes c64,...] [--dtypes bf16,fp32]
                                              [--tune] [--seconds 280] [--out DIR]
    PYTHONPATH=. python benchmarks/kernels.py --table A.json B.json [--out DIR]      merge runs and print
    TRITON_INTERPRET=1 PYTHONPATH=. python benchmarks/kernels.py --dry-run           try the code on a CPU

Parts of a shape, timed together so that all its figures share the same minutes of the device's clocks:

    site       telemetry, its merge, the list of active seeds; active forward and the whole site (telemetry and
               active forward, in place) at 1, 10 and 100 % active, with and without a stash
    backward   gradients of all slots and, in place, of the site's input (b10%, b100%), as where nobody else has the
               gradient that came in; with a copy of that made on the way (bc10%, bc100%); 10 and 100 % active
    train      a reconstruction step of 10 % of the seeds with AdamW; AdamW alone
    rivals     eager, compiled, per_seed, linear, lora (see rivals.py)

and by themselves: `fused` (activation and telemetry in one pass against the activation alone), `flat` (dormant,
64 to 4096 seeds), `insitu` (telemetry every 16th step behind its Linear), `lifecycle` (a million seeds), `host`
(what a site costs Python). One read and one copy of the activation are in every job.

First every job's kernels are compiled, in many processes; then one process measures, and is replaced if a
kernel takes the device's context with it. Records are written to `kernels.json` as they come. See timing.py for
how time is taken, figures.py for goals and the form of the records.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import apart
import figures
import torch
import workers
from bench import Bench, Plan, Setting
from figures import CASES, TINY, Record
from timing import ROUNDS, device_alive, first_line, machine, measure, write_json
from tuned import tuned

HERE = Path(__file__).resolve().parent
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
OF_A_SHAPE = ("site", "backward", "train", "rivals")
JOB_SECONDS = 120.0
TUNING_SECONDS = 420.0
NOTHING_TO_COMPILE = ("copy", "eager", "linear", "lora", "16 linears")


@dataclass(frozen=True)
class Job:
    """One shape (or one of the parts by themselves) in one dtype. `avoid`: variants that broke it before.

    warm: call every variant once, so that all is compiled, and time nothing.
    """

    name: str
    dtype: str
    parts: tuple[str, ...]
    device: str
    rounds: int
    tune: bool = False
    precision: str = "tf32x3"
    warm: bool = False
    avoid: tuple[str, ...] = ()

    @property
    def tiny(self) -> bool:
        """Whether this only tries the code."""
        return self.device == "cpu"


def execute(job: Job, emit: workers.Emit) -> None:
    """All of one job: build its variants, time them in turns, emit a record for each.

    A part that can't be built and a variant that fails are records too.
    """
    torch.manual_seed(0)
    device = torch.device(job.device)
    if device.type == "cuda":
        # Of the job before: its graphs and buffers.
        gc.collect()
        torch.cuda.empty_cache()
    setting = Setting(DTYPES[job.dtype], device, job.tiny, job.warm, job.precision)
    if job.name in apart.PARTS:
        _run(job, lambda: apart.PARTS[job.name](setting), emit)
        return
    case = (TINY if job.tiny else CASES)[job.name]
    bench = Bench(case, setting)
    if job.tune and not job.warm:
        for found in tuned(bench, job.parts, job.avoid, lambda name: emit({"begin": name})):
            emit({"tuned": {"case": job.name, "dtype": job.dtype, **found}})

    def plan() -> Plan:
        found = Plan(bench.limits(), goals=figures.goals(case))
        for part in job.parts:
            emit({"begin": f"building {part}"})
            try:
                found.entries += getattr(bench, part)()
            except Exception as error:
                _survive(error)
                emit({"record": _failure(job, part, part, traceback.format_exc(limit=-3))})
        return found

    _run(job, plan, emit)
    if not job.warm and not bench.finite():
        emit({"record": _failure(job, "site", "values", "the activations or gradients did not stay finite")})


def _run(job: Job, plan: Callable[[], Plan], emit: workers.Emit) -> None:
    """Build, then call or time every variant that is not avoided, and emit what was found."""
    try:
        found = plan()
    except Exception as error:
        _survive(error)
        emit({"record": _failure(job, job.name, job.name, traceback.format_exc(limit=-3))})
        return
    entries = [entry for entry in found.entries if entry.variant.name not in job.avoid]
    if job.warm:
        for entry in entries:
            if entry.variant.name.startswith(NOTHING_TO_COMPILE):
                continue
            emit({"begin": entry.variant.name})
            try:
                entry.variant.call(0)
            except Exception as error:
                _survive(error)
        return
    variants = [entry.variant for entry in entries]
    device = torch.device(job.device)
    # A few promille of a Linear that draws all the power a device has: its clocks drift more than that from a round to
    # the next.
    rounds = job.rounds * (4 if job.name == "insitu" else 1)
    timings = measure(variants, device, rounds=rounds, begin=lambda name: emit({"begin": name}))
    records = []
    for entry in entries:
        timing = timings[entry.variant.name]
        record: Record = {
            "case": job.name,
            "dtype": job.dtype,
            "part": entry.part,
            "what": entry.variant.name,
        }
        if isinstance(timing, str):
            record["failed"] = timing
        else:
            record |= {"us": timing.us, "low": timing.low, "high": timing.high, "rounds": timing.rounds}
            record["moved"] = entry.moved
            record["each"] = timing.each
        records.append(record)
    best_of(records, "read")
    figures.judge(records, found.goals)
    for record in records:
        record.pop("each", None)
    for record in [*records, *_extra(job, found)]:
        emit({"record": record})


def _extra(job: Job, plan: Plan) -> list[Record]:
    """Figures that are no variant's time."""
    records = []
    if plan.extra is not None:
        try:
            records = plan.extra()
        except Exception as error:
            _survive(error)
            return [_failure(job, job.name, "extra", traceback.format_exc(limit=-3))]
    return [{"case": job.name, "dtype": job.dtype, "part": job.name, **record} for record in records]


def best_of(records: list[Record], name: str) -> None:
    """Keep the fastest of the records whose names begin like `name 4`, under `name`."""
    found = [r for r in records if r["what"].startswith(f"{name} ") and "us" in r]
    if not found:
        return
    best = min(found, key=lambda r: r["us"])
    best["config"], best["what"] = best["what"].removeprefix(f"{name} "), name
    for record in found:
        if record is not best:
            records.remove(record)


def _survive(error: BaseException) -> None:
    """Raise ContextLost where the device did not survive the error."""
    if not device_alive():
        raise workers.ContextLost(first_line(error)) from error


def _failure(job: Job, part: str, what: str, problem: str) -> Record:
    return {"case": job.name, "dtype": job.dtype, "part": part, "what": what, "failed": problem}


class Run:
    """The records of a run as they come, on the way to `kernels.json`."""

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self.path = path
        self.about = about
        self.records: list[Record] = []
        self.tuned: list[dict[str, Any]] = []
        self.last: dict[Job, str] = {}

    def take(self, job: Job, value: dict[str, Any]) -> None:
        """One value that a job emitted."""
        if "begin" in value:
            self.last[job] = value["begin"]
        elif "record" in value:
            self.records.append(value["record"])
        else:
            self.tuned.append(value["tuned"])

    def end(self, outcome: workers.Outcome) -> Job | None:
        """Write down what there is; a job that lost its process is tried again without what it was doing."""
        job: Job = outcome.job
        again = None
        if outcome.problem:
            doing = self.last.get(job, "")
            self.records.append(_failure(job, job.name, doing or "start", outcome.problem))
            parts = tuple(part for part in job.parts if doing != f"building {part}")
            if outcome.lost and doing and len(job.avoid) < 4:
                self.records = [r for r in self.records if r.get("failed") or not _of(r, job)]
                again = replace(job, parts=parts, avoid=(*job.avoid, doing))
        print(
            f"{job.name} {job.dtype} {'+'.join(job.parts)}: {outcome.seconds:.1f} s"
            + (f", {' '.join(outcome.problem.split())[-200:]}" if outcome.problem else ""),
            file=sys.stderr,
            flush=True,
        )
        self.write()
        return again

    def write(self) -> None:
        """The whole file anew."""
        write_json(self.path, {**self.about, "records": self.records, "tuned": self.tuned})


def _of(record: Record, job: Job) -> bool:
    return record["case"] == job.name and record["dtype"] == job.dtype


def compiled_first(jobs: Sequence[Job], processes: int, until: float) -> None:
    """Call every variant of every job once, in many processes: the compilers fill their caches on the disk."""
    split = [replace(job, parts=(part,), warm=True, tune=False) for job in jobs for part in job.parts]
    split.sort(key=lambda job: job.parts != ("rivals",))
    start = time.monotonic()
    outcomes = workers.run(execute, split, workers=processes, limit_s=JOB_SECONDS, until=until)
    broken = [outcome for outcome in outcomes if outcome.problem]
    print(
        f"compiled in {time.monotonic() - start:.0f} s, {len(broken)} of {len(split)} broke", file=sys.stderr
    )
    for outcome in broken[:5]:
        print(f"  {outcome.job.name} {outcome.job.parts}: {outcome.problem[-300:]}", file=sys.stderr)


def jobs_of(options: argparse.Namespace) -> list[Job]:
    """One for every shape and dtype, and one for every part by itself."""
    device = "cpu" if options.dry_run else "cuda"
    common = {"device": device, "rounds": options.rounds, "tune": options.tune}
    common["precision"] = "tf32" if options.tf32 else "tf32x3"
    cases = TINY if options.dry_run else CASES
    names = options.shapes.split(",") if options.shapes else list(cases)
    only = options.only.split(",") if options.only else [*OF_A_SHAPE, *apart.PARTS]
    parts = tuple(part for part in OF_A_SHAPE if part in only)
    dtypes = options.dtypes.split(",")
    unknown = (
        (set(names) - set(cases)) | (set(only) - {*OF_A_SHAPE, *apart.PARTS}) | (set(dtypes) - set(DTYPES))
    )
    if unknown:
        raise SystemExit(f"kernels.py: unknown: {', '.join(sorted(unknown))}")
    jobs = [Job(name, dtype, parts, **common) for dtype in dtypes for name in names] if parts else []
    for part in apart.PARTS:
        if part in only:
            for dtype in dtypes if part in apart.BY_DTYPE else dtypes[:1]:
                jobs.append(Job(part, dtype, (part,), **common))
    return jobs


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", metavar="PARTS", help="parts, with commas between; default all")
    parser.add_argument("--shapes", metavar="NAMES", help=f"of {', '.join(CASES)}")
    parser.add_argument("--dtypes", default="bf16,fp32", metavar="NAMES", help="bf16, fp16, fp32")
    parser.add_argument("--rounds", type=int, default=ROUNDS, metavar="N")
    parser.add_argument(
        "--tune", action="store_true", help="time the configs that are proposed for each kernel"
    )
    parser.add_argument("--tf32", action="store_true", help="float32 dots in tf32")
    parser.add_argument("--seconds", type=float, default=540.0, help="begin no job after that many")
    parser.add_argument(
        "--workers", type=int, default=14, metavar="N", help="processes that compile; 0: none"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="tiny shapes on the CPU, in this process, no times"
    )
    parser.add_argument(
        "--table", nargs="+", type=Path, metavar="JSON", help="merge earlier runs and print them"
    )
    parser.add_argument("--out", type=Path, default=HERE / "results", metavar="DIR")
    return parser.parse_args()


def main() -> int:
    """Run, write, print; 0 whatever the figures are, 1 where something failed."""
    options = parse()
    # Each process would otherwise start as many compilers as there are cores.
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    path = options.out / "kernels.json"
    if options.table:
        return _show(options.table, path)
    start = time.monotonic()
    until = start + options.seconds
    jobs = jobs_of(options)
    if options.workers and not options.dry_run:
        compiled_first(jobs, options.workers, until)
    device = torch.device("cpu" if options.dry_run else "cuda")
    run = Run(path, {"machine": machine(device), "command": " ".join(sys.argv[1:])})
    outcomes = workers.run(
        execute,
        jobs,
        workers=0 if options.dry_run else 1,
        limit_s=TUNING_SECONDS if options.tune else JOB_SECONDS,
        emitted=run.take,
        ended=run.end,
        until=until,
    )
    run.about["seconds"] = time.monotonic() - start
    run.write()
    print(figures.table(run.records))
    print(figures.tuning_table(run.tuned))
    done = {(outcome.job.name, outcome.job.dtype) for outcome in outcomes}
    left = [f"{job.name} {job.dtype}" for job in jobs if (job.name, job.dtype) not in done]
    if left:
        print(f"not begun for want of time: {', '.join(left)}")
    print(f"{len(run.records)} records in {time.monotonic() - start:.0f} s: {path}")
    return 1 if any(record.get("failed") for record in run.records) else 0


def _show(paths: list[Path], out: Path) -> int:
    runs = [json.loads(path.read_text()) for path in paths]
    records = figures.merged(*(run["records"] for run in runs))
    tuned = [entry for run in runs for entry in run.get("tuned", ())]
    write_json(out, {**runs[-1], "records": records, "tuned": tuned})
    print(figures.table(records))
    print(figures.tuning_table(tuned))
    return 0


if __name__ == "__main__":
    sys.exit(main())
