"""The zoo: many real hosts, each compiled by morphc and compared with itself bit for bit.

    python benchmarks/zoo.py                       all hosts, table, benchmarks/results/zoo.json
    python benchmarks/zoo.py --only 'gpt*' --only llama
    python benchmarks/zoo.py --family vision --json /tmp/vision.json
    python benchmarks/zoo.py --plain               no morphc: each host against a second copy of itself
    python benchmarks/zoo.py --list

Of each host is checked (see `zoo_models/checks.py`): it compiles, with verification off and on; outputs, all
gradients, buffers, the RNG and what the user's hooks saw are the host's bit for bit, in train and eval mode,
for the example, another batch size and another length; compile left the host as it was; names, flags and
state-dict keys; copies, pickles, `generate`, `save_pretrained`, the fast path. Layers that ran are counted
without morphc (`zoo_models/candidates.py`), and each that got no site is listed with morphc's reason.

Exit status: 0 when every host passes, 1 when one fails, 2 for bad arguments or a missing morphc.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import queue
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, TextIO

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "zoo.json"


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", action="append", metavar="PATTERN", help="names (fnmatch); repeatable")
    parser.add_argument("--family", action="append", metavar="PATTERN", help="families (fnmatch); repeatable")
    parser.add_argument(
        "--json", type=Path, metavar="PATH", help="where to write; default for a full run only"
    )
    parser.add_argument("--failures", type=Path, metavar="PATH", help="also write the failures as Markdown")
    parser.add_argument(
        "--timeout", type=float, default=120.0, metavar="S", help="seconds per host (default 120)"
    )
    parser.add_argument(
        "--plain", action="store_true", help="without morphc: are the hosts themselves in order?"
    )
    parser.add_argument("--list", action="store_true", help="names, families and notes")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def serve(plain: bool) -> None:
    """Worker: names on stdin, one JSON line each on stdout; whatever hosts print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import warnings

    import torch
    import zoo_models
    from zoo_models import checks, hf, warm

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    hf.transformers()
    began = time.perf_counter()
    if not plain:
        warm.up()
    print(json.dumps({"warm_up_s": round(time.perf_counter() - began, 3)}), file=answers, flush=True)
    for line in sys.stdin:
        result = checks.check(zoo_models.ENTRIES[line.strip()], plain)
        print(json.dumps(result), file=answers, flush=True)


class Worker:
    """A child process that checks hosts one by one, and can be ended when one hangs."""

    def __init__(self, plain: bool) -> None:
        command = [sys.executable, str(HERE / "zoo.py"), "--worker", *(["--plain"] if plain else [])]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.answers: queue.Queue[str] = queue.Queue()
        self.errors: list[str] = []
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self.readers = [
            threading.Thread(target=self.read, args=(self.process.stdout, self.answers.put), daemon=True),
            threading.Thread(target=self.read, args=(self.process.stderr, self.errors.append), daemon=True),
        ]
        for reader in self.readers:
            reader.start()
        self.warm_up_s = self.answer(300.0).get("warm_up_s", 0.0)

    def read(self, stream: TextIO, take: Any) -> None:
        """Hand on lines; an empty one at the end."""
        for line in stream:
            take(line)
        take("")

    def answer(self, timeout: float) -> dict[str, Any]:
        """The next answer; raises TimeoutError, or RuntimeError with the child's last words."""
        try:
            line = self.answers.get(timeout=timeout)
        except queue.Empty:
            self.end()
            raise TimeoutError(f"no answer within {timeout:g} s") from None
        if not line:
            self.end()
            last = "".join(self.errors)[-1500:]
            raise RuntimeError(f"the process died with status {self.process.returncode}\n{last}")
        return json.loads(line)

    def ask(self, name: str, timeout: float) -> dict[str, Any]:
        """Check one host."""
        assert self.process.stdin is not None
        self.process.stdin.write(name + "\n")
        self.process.stdin.flush()
        return self.answer(timeout)

    def end(self) -> None:
        """Kill the child."""
        self.process.kill()
        self.process.wait()
        for reader in self.readers:
            reader.join(5.0)


def run_all(names: list[str], families: dict[str, str], args: argparse.Namespace) -> tuple[list[Any], float]:
    """Check the named hosts, starting a fresh worker after a crash or a time-out."""
    results, worker, warm_up = [], None, 0.0
    for number, name in enumerate(names, 1):
        began = time.perf_counter()
        try:
            if worker is None:
                worker = Worker(args.plain)
                warm_up = warm_up or worker.warm_up_s
                began = time.perf_counter()
            result = worker.ask(name, args.timeout)
        except (TimeoutError, RuntimeError, OSError) as error:
            worker = None
            failure = {"check": "process", "message": str(error), "traceback": ""}
            result = {
                "name": name,
                "family": families[name],
                "ok": False,
                "failures": [failure],
                "seconds": round(time.perf_counter() - began, 3),
            }
        results.append(result)
        verdict = "ok" if result["ok"] else f"FAILED ({', '.join(f['check'] for f in result['failures'])})"
        print(
            f"[{number}/{len(names)}] {name}: {verdict}, {result['seconds']:.1f} s",
            file=sys.stderr,
            flush=True,
        )
    if worker is not None:
        worker.end()
    return results, warm_up


def main() -> int:
    """Run, print, write."""
    args = parse()
    sys.path.insert(0, str(HERE))
    if args.worker:
        serve(args.plain)
        return 0
    import zoo_models
    from zoo_models import compiler, summary

    names = [
        entry.name
        for entry in zoo_models.ENTRIES.values()
        if any(fnmatch.fnmatch(entry.name, pattern) for pattern in args.only or ["*"])
        and any(fnmatch.fnmatch(entry.family, pattern) for pattern in args.family or ["*"])
    ]
    if not names:
        print(f"no host matches --only {args.only} --family {args.family}; try --list", file=sys.stderr)
        return 2
    if args.list:
        for name in names:
            entry = zoo_models.ENTRIES[name]
            print(f"{name:28} {entry.family:20} {entry.note}")
        return 0
    morphc_version = "-"
    if not args.plain:
        try:
            morphc_version = compiler.load().__version__
        except (ImportError, AttributeError) as error:
            print(f"morphc can't be imported: {error}; --plain checks the hosts alone", file=sys.stderr)
            return 2
    families = {entry.name: entry.family for entry in zoo_models.ENTRIES.values()}
    results, warm_up = run_all(names, families, args)
    document = summary.document(results, warm_up, args.plain, morphc_version)
    print(summary.table(document))
    full = not (args.only or args.family or args.plain)
    target = args.json or (RESULTS if full else None)
    if target is not None:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(summary.as_json(document))
        print(f"written to {target}", file=sys.stderr)
    if args.failures is not None:
        args.failures.write_text(summary.markdown(document))
    return 0 if all(result["ok"] for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
