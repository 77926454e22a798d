"""Propagate shapes: every node of a rewritten graph learns the shape and dtype of its value.

1. A placeholder has them from the recorded run.
2. A child module has those of its recorded output; it is not run again.
3. A torch call is run on meta tensors.

Recorded graphs have theirs already. A node whose value can't be had (a child that the example never reached)
stays without, and so does what follows from it.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx, nn

from morphc.passes.manager import register_pass
from morphc.passes.program import Program
from morphc.passes.recorder import Layer
from morphc.passes.recording import Recording


@register_pass
@dataclass(frozen=True)
class PropagateShapes:
    """Fill `node.meta["shape"]` and `node.meta["dtype"]`."""

    name: ClassVar[str] = "propagate-shapes"

    def apply(self, program: Program) -> None:
        if program.recording is None:
            return
        modules = dict(program.host.named_modules())
        with torch.no_grad(), warnings.catch_warnings(action="ignore"):
            for path, region in program.regions.items():
                if region.level == "rewritten":
                    for graph in region.graphs.values():
                        _Shapes(modules[path], path, program.recording).run(graph)


class _Unknown(Exception):
    pass


class _Shapes:
    def __init__(self, module: nn.Module, path: str, recording: Recording) -> None:
        self.module, self.path, self.layers = module, path, recording.layers
        self.values: dict[fx.Node, Any] = {}

    def run(self, graph: fx.Graph) -> None:
        for node in graph.nodes:
            try:
                value = self._value(node)
            except Exception:  # an op that meta tensors refuse leaves the shapes after it unknown, no more
                continue
            self.values[node] = value
            if isinstance(value, torch.Tensor):
                node.meta["shape"], node.meta["dtype"] = tuple(value.shape), value.dtype

    def _value(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return self._empty(node.meta.get("shape"), node.meta.get("dtype"))
        if node.op == "get_attr":
            found: Any = self.module
            for part in str(node.target).split("."):
                found = getattr(found, part)
            return torch.empty_like(found, device="meta") if isinstance(found, torch.Tensor) else found
        if node.op == "call_module":
            layer: Layer | None = self.layers.get(f"{self.path}.{node.target}".lstrip("."))
            if layer is None or layer.output_kind == "tuple":
                raise _Unknown
            return self._empty(layer.output_shape, layer.output_dtype)
        if node.op == "output":
            return None
        args = fx.node.map_arg(node.args, self._of)
        kwargs = fx.node.map_arg(node.kwargs, self._of)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)

    def _of(self, node: fx.Node) -> Any:
        if node not in self.values:
            raise _Unknown
        return self.values[node]

    def _empty(self, shape: tuple[int, ...] | None, dtype: torch.dtype | None) -> torch.Tensor:
        if shape is None or dtype is None:
            raise _Unknown
        return torch.empty(shape, dtype=dtype, device="meta")
