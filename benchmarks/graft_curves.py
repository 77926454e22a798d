"""Alpha over a graft, for every strategy and curve, from the code itself: draws docs/grafts.svg and prints its table.

    python benchmarks/graft_curves.py

One seed a strategy goes through the same made-up trouble, on the real tick.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

import morphc
from morphc import Config, Lifecycle
from morphc.kernels.reference.lifecycle import CURVES
from morphc.runtime import ticking
from morphc.runtime.grafts import STRATEGIES, Signs

TICKS = 70
TROUBLE = {
    "loss +5 %": (4, 9),
    "drift 0.2": (8, 13),
    "gradient 0.05": (13, 18),
    "rising loss": (18, 23),
    "stability 0.6": (22, 27),
}
"""[first, last) tick of each disturbance; outside of them all is well."""
COLUMNS = (10, 20, 30, 40, 50, 60)


def signs_at(tick: int, alpha: float) -> Signs:
    """What the strategies see at a tick."""

    def during(name: str) -> bool:
        first, last = TROUBLE[name]
        return first <= tick < last

    return Signs(
        loss=1.05 if during("loss +5 %") else 0.99,
        trend=0.01 if during("rising loss") else -0.01,
        drift=0.2 if during("drift 0.2") else 0.02,
        gradient=(0.05 if during("gradient 0.05") else 0.5) * alpha,
        stability=0.6 if during("stability 0.6") else 0.95,
    )


def grafts(choices: list[tuple[str, str]]) -> list[list[float]]:
    """Alpha after 0, 1, ... TICKS ticks of one seed for each (strategy, curve)."""
    count = len(choices)
    config = Config(
        seeds_per_layer=count,
        slots=count,
        blueprint="affine",
        minimum_ticks=(0, TICKS + 1, 0, 0, 0),
        backend="torch",
    )
    model = morphc.compile(
        nn.Sequential(nn.Linear(2, count)), (torch.zeros(1, 2),), config=config, verify=False
    )
    seeds = morphc.seeds(model)
    site = seeds["0"]
    for place, (strategy, curve) in enumerate(choices):
        site.germinate([place], graft=strategy, curve=curve)
    everyone = list(range(count))
    site.advance(everyone, to=Lifecycle.TRAINING)
    site.advance(
        everyone, to=Lifecycle.GRAFTING, metrics={"isolated_improvement": 1.0, "finite_gradients": 1.0}
    )
    found = [site.alpha.tolist()]
    for tick in range(TICKS):
        alphas = site.alpha.tolist()
        ticking.pause(seeds._store, {row: signs_at(tick, alphas[row]) for row in everyone})
        seeds.tick()
        found.append(site.alpha.tolist())
    return [[alphas[place] for alphas in found] for place in everyone]


def table() -> str:
    """Alpha at some ticks, in Markdown."""
    choices = [(name, "linear") for name in STRATEGIES] + [("fixed_ramp", curve) for curve in CURVES[1:]]
    lines = [
        "| strategy | curve | " + " | ".join(f"tick {tick}" for tick in COLUMNS) + " |",
        "|---" * 8 + "|",
    ]
    for (name, curve), alphas in zip(choices, grafts(choices), strict=True):
        cells = " | ".join(f"{alphas[tick]:.3f}" for tick in COLUMNS)
        lines.append(f"| `{name}` | {curve} | {cells} |")
    return "\n".join(lines)


def draw(path: Path) -> None:
    """The figure: each strategy with a linear ramp, and the three curves undisturbed."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "morphc", "font.size": 8, "svg.fonttype": "none"})
    from matplotlib import pyplot

    names = list(STRATEGIES)
    curves = grafts([(name, "linear") for name in names])
    forms = grafts([("fixed_ramp", curve) for curve in CURVES])
    figure, axes = pyplot.subplots(2, 4, figsize=(11, 4.6), sharex=True, sharey=True, layout="constrained")
    shades = dict(zip(TROUBLE, ("#d95f02", "#7570b3", "#1b9e77", "#e7298a", "#a6761d"), strict=True))
    for axis, name, alphas in zip(axes.flat, names, curves, strict=False):
        for trouble, (first, last) in TROUBLE.items():
            axis.axvspan(first, last, color=shades[trouble], alpha=0.13, lw=0, label=trouble)
        axis.plot(alphas, color="black", lw=1.4)
        axis.set_title(name)
    last = axes.flat[-1]
    for curve, alphas in zip(CURVES, forms, strict=True):
        last.plot(alphas, lw=1.4, label=curve)
    last.set_title("curves (fixed_ramp)")
    last.legend(frameon=False, loc="lower right")
    for axis in axes[:, 0]:
        axis.set_ylabel("alpha")
    for axis in axes[1]:
        axis.set_xlabel("ticks since the graft began")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def main() -> None:
    draw(Path(__file__).parent.parent / "docs" / "grafts.svg")
    print(table())


if __name__ == "__main__":
    main()
