"""What the passes hand from one to the next."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from morphc.config import Config
from morphc.passes.flow import Flow
from morphc.passes.plan import Level, Plan
from morphc.passes.recording import Recording


@dataclass
class CapturedRegion:
    """One module's own forward as graphs. `graphs` has `train` and `eval` when rewritten, `recorded` when
    matched, nothing when as written. `runs` says that the graph takes the place of the forward; `pristine` is
    the hash of the graphs as captured, by which a change made by a pass is noticed."""

    path: str
    module_class: str
    level: Level
    reason: str
    source: str
    graphs: dict[str, fx.Graph] = field(default_factory=dict)
    given: tuple[str, ...] = ()
    runs: bool = False
    pristine: str = ""


@dataclass
class Program:
    """A model on its way through the passes. Only `lower` and `verify` touch `model`; `host` is never changed."""

    host: nn.Module
    args: tuple[Any, ...] | None
    kwargs: dict[str, Any]
    config: Config
    follow: Plan | None = None
    share: bool = True
    recording: Recording | None = None
    regions: dict[str, CapturedRegion] = field(default_factory=dict)
    flow: Flow | None = None
    plan: Plan = field(default_factory=Plan)
    model: nn.Module | None = None
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    verification: list[str] = field(default_factory=list)
    demoted: dict[str, str] = field(default_factory=dict)
    unwatched: dict[str, str] = field(default_factory=dict)
    hidden_root: bool = False
    unverified: bool = False
    progress: Callable[[str, int, int], None] | None = None

    def warn(self, text: str) -> None:
        """Something that was asked for has no effect: said once, however often a pass runs."""
        if text not in self.warnings:
            self.warnings.append(text)

    def graphs(self) -> list[tuple[str, fx.Graph]]:
        """Every graph with a name: `region [train]`."""
        return [
            (f"{path or '<root>'} [{mode}]", graph)
            for path, region in self.regions.items()
            for mode, graph in region.graphs.items()
        ]

    def text(self) -> str:
        """Graphs and plan as text: what a diff between passes is taken of."""
        parts = [f"# {name}\n{graph_text(graph)}" for name, graph in self.graphs()]
        parts += [f"site {site!r}" for site in self.plan.sites]
        parts += [f"miss {miss!r}" for miss in self.plan.misses]
        parts += [f"region {r.path!r} {r.level} runs={r.runs}" for r in self.regions.values()]
        return "\n".join(parts) + "\n"

    def structure(self) -> str:
        """Hash of `text`."""
        return hashlib.sha256(self.text().encode()).hexdigest()


def graph_text(graph: fx.Graph, *, annotations: bool = True) -> str:
    """One line a node. Addresses of objects are left out, so that equal graphs give equal texts.

    annotations: also what passes noted on a node without changing what it computes.
    """
    lines = []
    for node in graph.nodes:
        target = node._pretty_print_target(node.target) if node.op == "call_function" else str(node.target)
        extra = f" epilogue={node.meta['epilogue']}" if annotations and "epilogue" in node.meta else ""
        lines.append(f"  {node.name} = {node.op} {target} {node.args} {node.kwargs}{extra}")
    return re.sub(r" at 0x[0-9a-f]+", "", "\n".join(lines))


def graphs_hash(graphs: dict[str, fx.Graph]) -> str:
    """Hash of what a region's graphs compute."""
    text = "\n".join(
        f"{mode}\n{graph_text(graph, annotations=False)}" for mode, graph in sorted(graphs.items())
    )
    return hashlib.sha256(text.encode()).hexdigest()
