"""Questions asked of the data flow: epilogues, blocks, residual streams, bottlenecks, dominators.

The recorded flow has one node for each torch call. Here every watched layer is collapsed into one node (whatever
its forward does inside), and so is every activation module, so that patterns are short:

    epilogue         Layer -> act                             the act is the layer's sole consumer
    linear block     Linear -> act -> Linear
    gated block      Linear -> act -> mul <- Linear, mul -> Linear, both Linears reading the same value
    conv block       Conv -> [BatchNorm] -> act -> Conv
    residual branch  Layer ... -> add, whose other operand is upstream of the Layer

Dropout and Identity between the members of a pattern are looked through (in eval mode they are nothing).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import networkx as nx

from morphc.passes.plan import Block

ACTIVATION_MODULES = {
    "ReLU": "relu",
    "GELU": "gelu",
    "SiLU": "silu",
    "Tanh": "tanh",
    "Sigmoid": "sigmoid",
    "ReLU6": "relu6",
    "LeakyReLU": "leaky_relu",
    "ELU": "elu",
    "Hardswish": "hardswish",
    "Mish": "mish",
    "Softplus": "softplus",
    "GELUActivation": "gelu",
    "NewGELUActivation": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "GELUTanh": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
    "SiLUActivation": "silu",
    "QuickGELUActivation": "quick_gelu",
    "ReLUSquaredActivation": "relu_squared",
}
_ACTIVATION_CALLS = {
    "relu": "relu",
    "relu_": "relu",
    "gelu": "gelu",
    "silu": "silu",
    "silu_": "silu",
    "tanh": "tanh",
    "sigmoid": "sigmoid",
    "relu6": "relu6",
    "leaky_relu": "leaky_relu",
    "elu": "elu",
    "hardswish": "hardswish",
    "mish": "mish",
}
# Activations that a site can apply itself.
EPILOGUES = ("relu", "gelu", "gelu_tanh", "silu")
_LOOKED_THROUGH = {
    "Dropout",
    "Identity",
    "Dropout1d",
    "Dropout2d",
    "AlphaDropout",
    "StochasticDepth",
    "DropPath",
}
_ADDS = {"add", "__add__", "__iadd__", "__radd__", "add_"}
_MULS = {"mul", "__mul__", "__imul__", "__rmul__", "mul_"}
_BATCH_NORMS = {"BatchNorm1d", "BatchNorm2d", "BatchNorm3d"}


@dataclass(frozen=True)
class Role:
    """Where a layer stands in the model."""

    residual_branch: bool = False
    bottleneck: bool = False
    dominates: int = 0


@dataclass
class Flow:
    """The collapsed graph. Nodes are ints; attributes `kind, label, path, cls, act, source, out, input_widths`."""

    graph: nx.DiGraph
    node_of: dict[str, int] = field(default_factory=dict)

    def epilogue(self, path: str) -> str | None:
        """Name of the activation that is the layer's sole consumer, if a site can apply it."""
        node = self.node_of.get(path)
        consumer = self._sole_consumer(node, look_through=False) if node is not None else None
        act = self.graph.nodes[consumer].get("act") if consumer is not None else None
        return act if act in EPILOGUES else None

    def block(
        self, path: str, kinds: dict[str, str], features: dict[str, int], calls: dict[str, int]
    ) -> Block | None:
        """The block whose output layer is `path`. `kinds`, `features`, `calls`: of each watched layer."""
        node = self.node_of.get(path)
        if node is None:
            return None
        feeding = self._producer(node)
        if feeding is None:
            return None
        gate, norm, first = None, None, feeding
        if self._is(feeding, _MULS):
            sides = [self._through(p) for p in self.graph.predecessors(feeding)]
            if len(sides) != 2:
                return None
            acts = [s for s in sides if self.graph.nodes[s].get("act")]
            plain = [s for s in sides if self.graph.nodes[s].get("path") in kinds]
            if len(acts) != 1 or len(plain) != 1:
                return None
            first, gate = acts[0], plain[0]
        act = self.graph.nodes[first].get("act")
        if not act:
            return None
        start = self._producer(first)
        if start is not None and self.graph.nodes[start].get("cls") in _BATCH_NORMS:
            norm, start = start, self._producer(start)
        if start is None or self.graph.nodes[start].get("path") not in kinds:
            return None
        members = [start, *([gate] if gate is not None else [])]
        paths = tuple(str(self.graph.nodes[m]["path"]) for m in members)
        involved = (*paths, path)
        if len({kinds[p] for p in involved}) != 1 or kinds[path] not in ("linear", "conv"):
            return None
        obstacle = self._obstacle(members, [first, feeding, *([norm] if norm is not None else [])])
        obstacle = obstacle or next(
            (f"{p!r} is called {calls[p]} times" for p in involved if calls[p] > 1), ""
        )
        if gate is not None and set(self.graph.predecessors(start)) != set(self.graph.predecessors(gate)):
            obstacle = obstacle or "the two branches of the gate read different values"
        shape = "gated" if gate is not None else "conv" if kinds[path] == "conv" else "linear"
        return Block(
            paths, path, act, shape, features[paths[0]],  # type: ignore[arg-type]
            self.graph.nodes[norm]["path"] if norm is not None else None, obstacle,
        )  # fmt: skip

    def roles(self, paths: Iterable[str]) -> dict[str, Role]:
        """Residual branches, bottlenecks (narrower than what comes and what follows), dominated nodes."""
        acyclic = nx.is_directed_acyclic_graph(self.graph)
        dominated = self._dominated() if acyclic else {}
        found = {}
        for path in paths:
            node = self.node_of.get(path)
            if node is None:
                continue
            found[path] = Role(
                self._is_residual_branch(node) if acyclic else False,
                self._is_bottleneck(node),
                dominated.get(node, 0),
            )
        return found

    def _is_residual_branch(self, node: int) -> bool:
        """The layer's value meets, at an add, a value from upstream of the layer: the residual stream."""
        consumer = self._sole_consumer(node, look_through=True)
        if consumer is None or not self._is(consumer, _ADDS):
            return False
        upstream = nx.ancestors(self.graph, node)
        return any(p in upstream for p in self.graph.predecessors(consumer) if p != node)

    def _is_bottleneck(self, node: int) -> bool:
        out, into = self.graph.nodes[node].get("out", 0), self.graph.nodes[node].get("into", 0)
        after = [self.graph.nodes[n].get("out", 0) for n in nx.descendants_at_distance(self.graph, node, 2)]
        return bool(out and into > out and any(width > out for width in after))

    def _dominated(self) -> dict[int, int]:
        """How many nodes can only be reached through each node: the size of its dominator subtree."""
        root = -1
        graph = self.graph.copy()
        graph.add_edges_from((root, n) for n in self.graph if self.graph.in_degree(n) == 0)
        if root not in graph:
            return {}
        parents = nx.immediate_dominators(graph, root)
        size = dict.fromkeys(graph, 0)
        for node in reversed(list(nx.topological_sort(graph))):
            parent = parents.get(node)
            if parent is not None and parent != node:
                size[parent] += size[node] + 1
        return size

    def _obstacle(self, members: list[int], between: list[int]) -> str:
        for node in [*members, *between]:
            count = sum(1 for _ in self.graph.successors(node))
            if count > 1:
                return f"the output of {self.graph.nodes[node]['label']!r} has a second consumer"
        return ""

    def _is(self, node: int, calls: set[str]) -> bool:
        data = self.graph.nodes[node]
        return data["kind"] == "function" and data["label"].rsplit(".", 1)[-1] in calls

    def _sole_consumer(self, node: int, look_through: bool) -> int | None:
        following = list(self.graph.successors(node))
        while look_through and len(following) == 1 and self._transparent(following[0]):
            following = list(self.graph.successors(following[0]))
        return following[0] if len(following) == 1 else None

    def _producer(self, node: int) -> int | None:
        before = list(self.graph.predecessors(node))
        return self._through(before[0]) if len(before) == 1 else None

    def _through(self, node: int) -> int:
        """`node`, or what stands before the dropouts that end in it."""
        while self._transparent(node):
            before = list(self.graph.predecessors(node))
            if len(before) != 1 or self.graph.out_degree(before[0]) != 1:
                break
            node = before[0]
        return node

    def _transparent(self, node: int) -> bool:
        data = self.graph.nodes[node]
        return data.get("cls") in _LOOKED_THROUGH or data["label"].endswith("functional.dropout")


def collapse(
    recorded: nx.DiGraph,
    layers: set[str],
    activations: dict[str, str],
    functional: dict[int, str] | None = None,
) -> Flow:
    """Collapse the recorded flow.

    layers: paths of watched layers. activations: path -> name, for activation modules that are regions.
    functional: node of the recorded flow -> name of the functional layer that it is.
    """
    flow = Flow(nx.DiGraph())
    group_of: dict[int, int] = {}
    for number, data in recorded.nodes(data=True):
        inside = next((p for p in data["regions"] if p in layers or p in activations), None)
        own = data["name"] if data["kind"] == "module" else (functional or {}).get(number)
        path = inside if inside is not None else own
        key = flow.node_of.get(path) if path is not None else None
        if key is None:
            key = number
            if path is not None:
                flow.node_of[path] = key
            flow.graph.add_node(key, **_describe(data, path, activations))
        group_of[number] = key
        shape = data.get("shape") or ()
        if shape:
            flow.graph.nodes[key]["out"] = int(shape[-1])
    for source, target in recorded.edges:
        a, b = group_of[source], group_of[target]
        if a != b:
            flow.graph.add_edge(a, b)
    for node in flow.graph:
        widths = [flow.graph.nodes[p].get("out", 0) for p in flow.graph.predecessors(node)]
        flow.graph.nodes[node]["into"] = max(widths, default=0)
    return flow


def _describe(data: dict[str, Any], path: str | None, activations: dict[str, str]) -> dict[str, Any]:
    cls = data.get("module_class", "")
    act = activations.get(path) if path is not None else None
    if act is None and data["kind"] in ("module", "foreign_module"):
        act = ACTIVATION_MODULES.get(cls)
    if act is None and data["kind"] == "function":
        act = _ACTIVATION_CALLS.get(data["name"].rsplit(".", 1)[-1])
        act = None if any(data.get("weights", ())) else act
    if act == "gelu" and data.get("variant") == "tanh":
        act = "gelu_tanh"
    return {
        "kind": data["kind"],
        "label": path if path is not None else data["name"],
        "path": path,
        "cls": cls,
        "act": act,
        "source": data.get("source", ""),
        "out": 0,
    }
