"""Propagate shapes: the nodes of a rewritten graph learn the shape and dtype of their values from the recorded run.

1. A placeholder has them from the call of the region.
2. A child module has those of its recorded output.
3. A torch call has those of the recorded call of the same name, in order.

Nothing is run for it: the first call of an op on a meta or fake tensor imports for seconds. A node whose value the
run didn't show (a branch of train mode, a child that the example never reached) stays without.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from morphc.passes.manager import register_pass
from morphc.passes.program import Program
from morphc.passes.recorder import function_name


@register_pass
@dataclass(frozen=True)
class PropagateShapes:
    """Fill `node.meta["shape"]` and `node.meta["dtype"]`."""

    name: ClassVar[str] = "propagate-shapes"

    def apply(self, program: Program) -> None:
        if program.recording is None:
            return
        for path, region in program.regions.items():
            recorded = program.recording.regions.get(path)
            if region.level == "rewritten" and recorded is not None:
                for graph in region.graphs.values():
                    _copy(recorded.graph, graph)


def _copy(recorded: fx.Graph, graph: fx.Graph) -> None:
    waiting = [node for node in recorded.nodes if "shape" in node.meta]
    for node in graph.nodes:
        key = _key(node)
        match = next((i for i, other in enumerate(waiting) if _key(other) == key), None)
        if key and match is not None:
            node.meta["shape"] = waiting[match].meta["shape"]
            node.meta["dtype"] = waiting[match].meta["dtype"]
            del waiting[: match + 1]


def _key(node: fx.Node) -> str:
    """What a call is named alike in both graphs: `+` is operator.add in one and Tensor.add in the other."""
    if node.op in ("placeholder", "call_module"):
        return f"{node.op} {node.target}"
    if node.op == "call_method":
        return str(node.target).strip("_")
    if node.op == "call_function":
        name = str(node.meta.get("function") or function_name(node.target))
        return name.removesuffix(".default").rsplit(".", 1)[-1].strip("_")
    return ""
