"""Every kernel against the torch reference in float64: random specs at full size, each in all its kernels.

    PYTHONPATH=. python benchmarks/kernel_parity.py [--specs 208] [--workers 14] [--out DIR] [--resume]
    PYTHONPATH=. python benchmarks/kernel_parity.py --only 17 --workers 0      one spec, in this process
    TRITON_INTERPRET=1 PYTHONPATH=. python benchmarks/kernel_parity.py --dry-run

Of each spec is checked: telemetry over two samples; the forward's output, with a stash and, of every second spec,
without; the gradients of the activation and of every parameter; AdamW from these; a reconstruction step (losses,
and what AdamW makes of its gradients). Norms of the differences over norms of the reference stay within 1e-5 for
float32 (tf32 off), 5e-3 for bfloat16 and float16, 1e-6 for telemetry, whose counts are exact but for ties (see
`parity_reference.dead_values`). Bit for bit the same: everything that no
blending seed owns, gaps between rows included; `grad_output`; and all that a second run gives. Where values are
not finite, they are so in the same chunk, slot and row as in the reference, and nowhere else.

Specs are drawn from their number and the seed alone, so `--only` repeats one. `kernel_parity.json` is written as
results come; `--resume` goes on from it. Exit status 1 where a spec fails.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import msgspec
import torch
import workers
from parity_check import Check
from parity_spec import Spec, draw
from parity_tap import TapCheck
from timing import device_alive, first_line, machine, write_json

HERE = Path(__file__).resolve().parent
BOUNDS = {"float32": 1e-5, "bfloat16": 5e-3, "float16": 5e-3}
TELEMETRY_BOUND = 1e-6
SPEC_SECONDS = 150.0


def check(job: tuple[int, int, str], emit: workers.Emit) -> None:
    """Emits one result: the spec, its errors, its problems."""
    number, seed, device = job
    spec = draw(number, seed, tiny=device == "cpu")
    torch.set_float32_matmul_precision("highest")
    start = time.monotonic()
    done = (TapCheck if spec.tap else Check)(spec, torch.device(device))
    for phase in done.phases():
        try:
            phase()
        except Exception as error:
            if not device_alive():
                raise workers.ContextLost(f"{spec.title}: {first_line(error)}") from error
            where = traceback.extract_tb(error.__traceback__)[-1]
            done.problems.append(f"{type(error).__name__}: {first_line(error)} ({where.name}:{where.lineno})")
    errors = {}
    for name, error in done.errors.found.items():
        errors[name] = error.relative
        bound = TELEMETRY_BOUND if name.startswith("telemetry") else BOUNDS[spec.dtype]
        # `not <=` takes a NaN for what it is.
        done.expect(error.relative <= bound, f"{name}: error {error.relative:.2e} above {bound:.0e}")
        done.expect(not error.leaked, f"{name}: {error.leaked} values not finite that are in the reference")
        done.expect(not error.hidden, f"{name}: {error.hidden} values finite that are not in the reference")
    emit(
        {
            "number": number,
            "title": spec.title,
            "spec": msgspec.to_builtins(spec),
            "errors": errors,
            "problems": done.problems,
            "skipped": done.skipped,
            "seconds": time.monotonic() - start,
        }
    )
    if device == "cuda":
        del done
        torch.cuda.empty_cache()


class Report:
    """Results as they come, on the way to `kernel_parity.json`."""

    def __init__(self, path: Path, seed: int, kept: list[dict[str, Any]]) -> None:
        self.path = path
        self.seed = seed
        self.results = {result["number"]: result for result in kept}
        self.about: dict[str, Any] = {}
        self.written = 0.0

    def take(self, job: tuple[int, int, str], result: dict[str, Any]) -> None:
        """Of one spec."""
        self.results[job[0]] = result

    def end(self, outcome: workers.Outcome) -> None:
        """A spec that gave no result has failed."""
        number, seed, device = outcome.job
        if outcome.problem:
            spec = draw(number, seed, tiny=device == "cpu")
            told = outcome.problem.strip().splitlines()
            self.results[number] = {
                "number": number,
                "title": spec.title,
                "spec": msgspec.to_builtins(spec),
                "errors": {},
                "problems": [told[-1][:500]],
                "told": told[-12:],
                "seconds": outcome.seconds,
            }
        if time.monotonic() - self.written > 5:
            self.write()

    def write(self) -> None:
        """The whole file anew."""
        self.written = time.monotonic()
        results = [self.results[number] for number in sorted(self.results)]
        summary = {
            "specs": len(results),
            "failed": sum(bool(result["problems"]) for result in results),
            "bounds": BOUNDS | {"telemetry": TELEMETRY_BOUND},
            "worst": {f"{dtype} {name}": worst for (dtype, name), (worst, _) in self.worst().items()},
        }
        write_json(self.path, {**self.about, "seed": self.seed, "summary": summary, "results": results})

    def worst(self) -> dict[tuple[str, str], tuple[float, str]]:
        """By dtype and what was compared: the largest error, and whose it is."""
        found: dict[tuple[str, str], tuple[float, str]] = {}
        for result in self.results.values():
            for name, error in result["errors"].items():
                key = (result["spec"]["dtype"], name)
                error = float("inf") if error is None else error
                if error >= found.get(key, (-1.0, ""))[0]:
                    found[key] = (error, result["title"])
        return dict(sorted(found.items()))

    def table(self) -> str:
        """The worst of everything, and what failed."""
        lines = [f"{'':10s}{'':24s}{'worst error':>12s}"]
        for (dtype, name), (error, title) in self.worst().items():
            lines.append(f"{dtype:10s}{name:24s}{error:12.2e}  {title}")
        failed = [result for result in self.results.values() if result["problems"]]
        lines.append(f"\n{len(self.results)} specs, {len(failed)} failed")
        for result in failed[:25]:
            lines.append(f"  {result['title']}: {'; '.join(result['problems'])[:260]}")
        return "\n".join(lines)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--specs", type=int, default=208, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, action="append", metavar="NUMBER", help="repeatable")
    parser.add_argument("--workers", type=int, default=14, metavar="N", help="processes; 0: in this one")
    parser.add_argument("--seconds", type=float, default=540.0, help="begin no spec after that many")
    parser.add_argument("--resume", action="store_true", help="keep what has passed in an earlier run")
    parser.add_argument(
        "--dry-run", action="store_true", help="tiny specs on the CPU, in Triton's interpreter"
    )
    parser.add_argument("--out", type=Path, default=HERE / "results", metavar="DIR")
    return parser.parse_args()


def main() -> int:
    """Run, write, print."""
    options = parse()
    device = "cpu" if options.dry_run else "cuda"
    path = options.out / "kernel_parity.json"
    kept: list[dict[str, Any]] = []
    if options.resume and path.exists():
        earlier = json.loads(path.read_text())
        kept = [r for r in earlier["results"] if not r["problems"] and earlier["seed"] == options.seed]
    start = time.monotonic()
    report = Report(path, options.seed, kept)
    numbers = options.only or [n for n in range(options.specs) if n not in report.results]
    # The longest first, so that none is left alone at the end.
    numbers.sort(key=lambda n: -_size(draw(n, options.seed, tiny=device == "cpu")))
    workers.run(
        check,
        [(number, options.seed, device) for number in numbers],
        workers=0 if options.dry_run else options.workers,
        limit_s=SPEC_SECONDS,
        emitted=report.take,
        ended=report.end,
        until=start + options.seconds,
    )
    report.about = {"machine": machine(torch.device(device)), "seconds": time.monotonic() - start}
    report.write()
    print(report.table())
    left = len(numbers) - sum(number in report.results for number in numbers)
    print(f"{time.monotonic() - start:.0f} s, {left} not begun: {path}")
    return 1 if left or any(result["problems"] for result in report.results.values()) else 0


def _size(spec: Spec) -> int:
    return spec.rows * (spec.features + (spec.blending + spec.isolated) * (spec.rank + spec.chunk))


if __name__ == "__main__":
    sys.exit(main())
