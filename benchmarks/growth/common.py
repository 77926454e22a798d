"""What the growth experiments share: seeds and options, the JSON of a run, paired statistics."""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

RESULTS = Path(__file__).resolve().parents[1] / "results" / "growth"


def options(description: str, seeds: int, first_seed: int = 0) -> argparse.ArgumentParser:
    """The options of every experiment; `seeds` is how many the full run has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--seeds", type=int, default=seeds, help=f"how many seeds (full run: {seeds})")
    parser.add_argument("--first-seed", type=int, default=first_seed)
    parser.add_argument("--only", help="methods whose name contains this; the others keep what the JSON has")
    parser.add_argument("--skip", help="leave out the methods whose name contains this")
    parser.add_argument(
        "--out", type=Path, default=None, help="JSON to write; the default is the repository's"
    )
    parser.set_defaults(full_seeds=seeds)
    return parser


class Results:
    """One experiment's JSON: settings, and per method one value per seed, with what else was counted.

    A method that an earlier run stored is kept until it is run again, so baselines and ours can be run apart;
    each keeps the command and the seeds of its own run.
    """

    def __init__(self, name: str, arguments: argparse.Namespace, **settings: Any) -> None:
        self.path: Path = arguments.out or RESULTS / f"{name}.json"
        self.arguments = arguments
        self.head = {"experiment": name, "settings": settings, "full_seeds": arguments.full_seeds}

    def add(self, method: str, values: Sequence[float], seconds: float, **more: Any) -> None:
        """Store `method`: one value per seed; `more` holds curves and counts."""
        first = self.arguments.first_seed
        # Read anew: baselines and ours may run at the same time.
        stored = json.loads(self.path.read_text())["methods"] if self.path.exists() else {}
        stored[method] = {
            "values": [round(float(value), 6) for value in values],
            "seeds": list(range(first, first + self.arguments.seeds)),
            "seconds": round(seconds, 1),
            "command": f"python -m benchmarks.growth.{Path(sys.argv[0]).stem}",
            "machine": f"{platform.machine()}, torch {torch.__version__}, CPU",
            **{key: rounded(value) for key, value in more.items()},
        }
        print(f"{method:44s} {summary(values)}  ({seconds:.0f} s)", flush=True)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps({**self.head, "methods": stored}) + "\n")

    def wanted(self, method: str) -> bool:
        """Whether --only and --skip leave `method` in."""
        only, skip = self.arguments.only, self.arguments.skip
        return (only is None or only in method) and (skip is None or skip not in method)


def rounded(value: Any) -> Any:
    """Tensors and floats as short JSON."""
    if isinstance(value, torch.Tensor | np.ndarray):
        value = value.tolist()
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, list | tuple):
        return [rounded(entry) for entry in value]
    return value


def summary(values: Sequence[float]) -> str:
    """Mean and standard deviation over the seeds."""
    array = np.asarray(values, dtype=float)
    spread = array.std(ddof=1) if len(array) > 1 else float("nan")
    return f"{array.mean():.4f} ± {spread:.4f}"


def paired(ours: Sequence[float], other: Sequence[float], higher: bool) -> dict[str, float]:
    """Paired difference ours - other over the seeds both have: mean, 95 % t-interval, wins and pairs."""
    from scipy import stats  # Not where the experiments run on a GPU: there only the means are printed.

    count = min(len(ours), len(other))
    difference = np.asarray(ours[:count], dtype=float) - np.asarray(other[:count], dtype=float)
    half = float("nan")
    if count > 1:
        half = float(stats.t.ppf(0.975, count - 1) * difference.std(ddof=1) / count**0.5)
    wins = int(((difference > 0) if higher else (difference < 0)).sum())
    return {"mean": float(difference.mean()), "half": half, "wins": wins, "pairs": count}


def timed(run: Callable[[], Any]) -> tuple[Any, float]:
    """The result of `run` and its seconds."""
    start = time.perf_counter()
    result = run()
    return result, time.perf_counter() - start


def single_thread() -> None:
    """Nets this small are slower on more threads."""
    torch.set_num_threads(1)
