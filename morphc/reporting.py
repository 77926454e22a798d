"""`morphc.report(model)`: what compile decided about every layer, as data, a table and JSON."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

import msgspec

from morphc.config import Config
from morphc.passes import chunking
from morphc.passes.plan import Level, Plan, Site

SCHEMA_VERSION = 1
LEVELS: tuple[Level, ...] = ("rewritten", "matched", "as_written")


class PassRecord(Protocol):
    """What one pass did; `diff` is a unified diff of the graphs."""

    @property
    def name(self) -> str: ...
    @property
    def seconds(self) -> float: ...
    @property
    def modified(self) -> bool: ...
    @property
    def created(self) -> int: ...
    @property
    def erased(self) -> int: ...
    @property
    def diff(self) -> str: ...


class ModuleRow(NamedTuple):
    """One module of the host, in the order of `named_modules()`; `parameters` counts its own alone."""

    path: str
    module_class: str
    parameters: int
    kind: str = ""


class Cost(NamedTuple):
    """Predicted cost of a dormant site per training step, telemetry's share included.

    us: of the site; layer_us: of the host layer, forward and backward; share: the first over the second, NaN where
    that is unknown.
    """

    us: float
    layer_us: float
    share: float


class Totals(msgspec.Struct, frozen=True):
    """Sums over the model. `us` and `share` are None where the cost model had nothing to go by."""

    modules: int
    parameters: int
    sites: int
    seeds: int
    slots: int
    levels: dict[str, int]
    candidates_missed: int
    us: float | None
    share: float | None


@dataclass(frozen=True, slots=True)
class Report:
    """The account of one compilation; `str()` is a table.

    plan: sites, misses and regions.
    passes: one record a pass, in the order they ran.
    warnings: what was asked for and has no effect, as lines.
    verification: what was compared and how it went, as lines.
    graphs: region path to its transformed graph as readable Python.
    tree: a `ModuleRow` for every module.
    measured: site path to measured us per forward, where it was measured.
    backends: site path to blueprint to (`triton` or `torch`, why it isn't triton); empty where nothing was compiled.
    """

    plan: Plan
    passes: tuple[PassRecord, ...] = ()
    verification: tuple[str, ...] = ()
    seconds: float = 0.0
    graphs: Mapping[str, str] = field(default_factory=dict)
    tree: tuple[tuple[str, str, int, str], ...] = ()
    measured: Mapping[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    backends: Mapping[str, Mapping[str, tuple[str, str]]] = field(default_factory=dict)

    def __str__(self) -> str:
        # rich is only needed to print, and `import morphc` has to stay quick.
        from morphc.reporttable import as_text

        return as_text(self)

    def to_json(self) -> bytes:
        """Everything but the graphs' sources and the diffs, which are text for people; costs as expressions too."""
        return msgspec.json.encode(
            {
                "schema_version": SCHEMA_VERSION,
                "totals": self.totals,
                "plan": self.plan,
                "expressions": {site.path: self.expressions(site.path) for site in self.plan.sites},
                "passes": [
                    {
                        "name": record.name,
                        "seconds": record.seconds,
                        "modified": record.modified,
                        "created": record.created,
                        "erased": record.erased,
                    }
                    for record in self.passes
                ],
                "warnings": self.warnings,
                "verification": self.verification,
                "seconds": self.seconds,
                "graphs": list(self.graphs),
                "tree": [ModuleRow(*row)._asdict() for row in self.tree],
                "measured_us": dict(self.measured),
                "backends": {
                    path: {name: {"backend": each[0], "reason": each[1]} for name, each in found.items()}
                    for path, found in self.backends.items()
                },
            },
            order="sorted",
        )

    def expressions(self, path: str) -> dict[str, str]:
        """Bytes and flops of the site at `path` in the symbol `rows`, as text that sympy reads back.

        `dormant_*`: one telemetry sample; `step_*`: a training forward with one seed in ten active, samples
        spread out; `host_*`: the host layer's forward. Raises KeyError for a path without a site.
        """
        site = next((site for site in self.plan.sites if site.path == path), None)
        if site is None:
            raise KeyError(f"no site at {path!r}")
        return chunking.expressions(site, msgspec.convert(self.plan.config, Config))

    @property
    def totals(self) -> Totals:
        """Sums over all sites and regions."""
        plan = self.plan
        costs = [(site, cost) for site in plan.sites if (cost := cost_of(site)) is not None]
        us = sum(cost.us * site.calls for site, cost in costs)
        layer_us = sum(cost.layer_us * site.calls for site, cost in costs)
        return Totals(
            modules=len(self.tree),
            parameters=sum(row[2] for row in self.tree),
            sites=len(plan.sites),
            seeds=sum(site.seeds for site in plan.sites),
            slots=sum(site.slots for site in plan.sites),
            levels={level: sum(region.level == level for region in plan.regions) for level in LEVELS},
            candidates_missed=sum(miss.candidate for miss in plan.misses),
            us=us if costs else None,
            share=us / layer_us if layer_us > 0 else None,
        )


def cost_of(site: Site) -> Cost | None:
    """The predicted cost of one site, None when nothing was predicted for it."""
    predicted = site.predicted
    if "us" not in predicted:
        return None
    us, layer_us = predicted["us"], predicted.get("layer_us", 0.0)
    return Cost(us, layer_us, us / layer_us if layer_us > 0 else float("nan"))


def label_of(paths: Sequence[str]) -> str:
    """One label for paths that differ in numbers only; a single path is its own, the root is `(root)`."""
    return numberless(paths[0]) if len(paths) > 1 else paths[0] or "(root)"


def numberless(path: str) -> str:
    """The path with every numeric component replaced: `h.11.mlp` is `h.*.mlp`."""
    return ".".join("*" if part.isdigit() else part for part in path.split("."))


def shorten(text: str) -> str:
    """The text with the paths in it as short as they stay findable.

    Files of packages are named from the package on, those below the current folder from there.
    """
    return re.sub(r"\S*[/\\](?:site|dist)-packages[/\\]", "", text).replace(f"{Path.cwd()}{os.sep}", "")


def si(value: float, digits: int = 1) -> str:
    """`124.4 M`; exact below a thousand."""
    for factor, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.{digits}f} {unit}"
    return f"{value:g}"


def us_text(us: float) -> str:
    """A time with the unit that reads best."""
    if us >= 1e6:
        return f"{us / 1e6:.2f} s"
    if us >= 1e3:
        return f"{us / 1e3:.2f} ms"
    return f"{us:.1f} us" if us >= 10 else f"{us:.2f} us"


def percent(share: float) -> str:
    """A share as a percentage; `?` when it is not known."""
    if share != share:
        return "?"
    return f"{share:.0%}" if share >= 0.1 else f"{share:.1%}" if share >= 0.001 or share == 0 else "<0.1%"
