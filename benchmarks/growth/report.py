"""Tables and plots of the growth experiments, from their JSON alone.

python -m benchmarks.growth.report          # writes docs/results.md and docs/growth/*.png
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from benchmarks.growth.common import RESULTS, paired, summary

DOCS = Path(__file__).resolve().parents[2] / "docs"
Methods = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Experiment:
    """How one JSON is told. `score` heads the column; `higher` says which way is better; `ours` are the methods
    that the others are paired with, first come first; `axis` is the curve's x axis and its step. `unit`: the method
    whose multiply-adds are 1. `smooth`: points of a running mean in the plot."""

    name: str
    title: str
    text: str
    command: str
    score: str
    higher: bool
    ours: tuple[str, ...]
    axis: tuple[str, float]
    verdict: Callable[[Methods], list[str]]
    log: bool = False
    plotted: str = ""
    unit: str = ""
    smooth: int = 1


def mean(methods: Methods, name: str) -> float:
    """A method's mean, NaN when it was not run."""
    return float(np.mean(methods[name]["values"])) if name in methods else float("nan")


def table(experiment: Experiment, methods: Methods) -> list[str]:
    """One row per method of one setting: mean, spread, and the paired difference of each of ours."""
    ours = [name for name in experiment.ours if name in methods]
    costs = any("macs" in entry for entry in methods.values())
    head = ["method", f"{experiment.score}, mean ± sd", "runs", *(["multiply-adds"] if costs else [])]
    head += [f"{label(name)} − method (95 %), wins" for name in ours]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, entry in methods.items():
        cells = [f"**{label(name)}**" if name in ours else label(name), summary(entry["values"])]
        cells.append(str(len(entry["values"])))
        if costs:
            unit = next((methods[own]["macs"] for own in methods if label(own) == experiment.unit), 1.0)
            cells.append(f"{entry['macs'] / unit:.2f}" if "macs" in entry else "")
        for own in ours:
            cells.append(difference(methods[own], entry, experiment.higher) if own != name else "")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def label(name: str) -> str:
    """A method's name without its setting."""
    return name.removeprefix(setting_of(name) + ": ")


def setting_of(name: str) -> str:
    """`setting` of a method named `setting: method`; methods of different settings are not paired."""
    return name.split(": ")[0] if name.count(": ") and not name.startswith("morphc: ") else ""


def difference(own: dict[str, Any], other: dict[str, Any], higher: bool) -> str:
    found = paired(own["values"], other["values"], higher)
    return f"{found['mean']:+.4f} ± {found['half']:.4f}, {found['wins']} of {found['pairs']}"


def plot(experiment: Experiment, methods: Methods) -> Path:
    """Curves of all methods; those of a network that is only stopped earlier are another's."""
    figure = Figure(figsize=(9.6, 4.2), dpi=100)
    axes = figure.subplots()
    axes.set_prop_cycle(color=[colormaps["tab20"](shade) for shade in (*range(0, 20, 2), *range(1, 20, 2))])
    unit, step = experiment.axis
    for name, entry in methods.items():
        if not name.startswith(experiment.plotted) or ", stopped" in name:
            continue
        curve = np.asarray(entry["curve"], dtype=float)
        own = name in experiment.ours
        style = {"linewidth": 2.4, "zorder": 3} if own else {"linewidth": 1.1, "alpha": 0.85}
        curve = np.convolve(curve, np.ones(experiment.smooth) / experiment.smooth, mode="valid")
        steps = (np.arange(len(curve)) + experiment.smooth - 1) * step
        axes.plot(steps, curve, label=label(name), **style)
    axes.set_xlabel(unit + (f" (mean of {experiment.smooth} points)" if experiment.smooth > 1 else ""))
    axes.set_ylabel(experiment.score.removeprefix("final "))
    if experiment.log:
        axes.set_yscale("log")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=7.5, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.tight_layout()
    path = DOCS / "growth" / f"{experiment.name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def section(experiment: Experiment) -> list[str]:
    """One experiment's part of docs/results.md."""
    data = json.loads((RESULTS / f"{experiment.name}.json").read_text())
    methods: Methods = dict(sorted(data["methods"].items(), key=lambda item: "morphc" in item[0]))
    picture = plot(experiment, methods)
    fewer = sorted(name for name, entry in methods.items() if len(entry["values"]) < data["full_seeds"])
    lines = [f"## {experiment.title}", "", experiment.text, "", f"    {experiment.command}", ""]
    settings = list(dict.fromkeys(setting_of(name) for name in methods))
    for setting in settings:
        lines += [f"{setting}:", ""] if setting else []
        lines += [
            *table(experiment, {n: entry for n, entry in methods.items() if setting_of(n) == setting}),
            "",
        ]
    lines += [*[f"- {verdict}" for verdict in experiment.verdict(methods)]]
    if fewer:
        which = "all methods" if len(fewer) == len(methods) else ", ".join(fewer)
        lines.append(
            f"- Fewer seeds than the {data['full_seeds']} of the full run (the command above): {which}."
        )
    return [*lines, "", f"![{experiment.title}]({picture.relative_to(DOCS).as_posix()})", ""]


def main() -> None:
    from benchmarks.growth.told import EXPERIMENTS

    lines = [
        "# Does growing help?",
        "",
        "Each experiment is one command, on data that is generated or comes with a PyPI package",
        '(`pip install "morphc[experiments]"`). Baselines are written out in plain torch and share data, initial',
        "weights and batches with ours, seed by seed. Methods named `morphc: …` run through the public API.",
        "A difference is paired over seeds, with the 95 % t-interval of its mean; where ours doesn't win, the row",
        "says so. This page is written by `python -m benchmarks.growth.report`.",
        "",
    ]
    for experiment in EXPERIMENTS:
        if (RESULTS / f"{experiment.name}.json").exists():
            lines += section(experiment)
    (DOCS / "results.md").write_text("\n".join(lines).rstrip() + "\n")


if __name__ == "__main__":
    main()
