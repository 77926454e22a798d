"""Watches a run: a TorchFunctionMode that builds an fx graph for each region and one flow of all calls."""

from __future__ import annotations

import inspect
import operator
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import networkx as nx
import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_leaves, tree_map

from morphc.passes.clone import names_by_id, parameter_names
from morphc.passes.sources import definition, user_frame

# Reading a value out of a tensor: from here on, Python's control flow may depend on the data.
_VALUE_READS = frozenset(
    f"torch.Tensor.{name}"
    for name in ("__bool__", "__int__", "__float__", "__index__", "item", "tolist", "numpy", "__array__")
)


@dataclass
class Region:
    """One module's own forward, as recorded in its first call."""

    path: str
    module: nn.Module
    graph: fx.Graph
    parent: str | None
    source: str
    data_dependent: str = ""
    arguments: dict[str, bool] = field(default_factory=dict)
    calls: int = 0


@dataclass(frozen=True)
class Sketch:
    """What it takes to make a tensor like one that was an argument."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


@dataclass
class Layer:
    """What the recording knows of one executed module: shapes and where it was called from.

    `example`: (args, kwargs) of its first call where its forward isn't torch's own; a tensor is a `Sketch` there and
    an object that isn't plain data `...`.
    """

    path: str
    calls: int = 0
    input_shape: tuple[int, ...] | None = None
    output_shape: tuple[int, ...] | None = None
    output_dtype: torch.dtype | None = None
    output_kind: str = ""
    region: str | None = None
    source: str = ""
    example: Any = None


PLAIN = (bool, int, float, complex, str, type(None), torch.dtype, torch.device)


def _sketch(value: object) -> object:
    if isinstance(value, torch.Tensor):
        return Sketch(tuple(value.shape), value.dtype, value.device)
    return value if isinstance(value, PLAIN) else ...


def torchs_own(module: nn.Module) -> bool:
    """Whether what runs for the module is a forward of torch's, or compiled by it."""
    if isinstance(module, torch.jit.ScriptModule):
        return True
    origin = getattr(type(module).forward, "__module__", None) or ""
    return "forward" not in vars(module) and origin.startswith("torch.")


def is_leaf(module: nn.Module) -> bool:
    """torch's own layers without children are read as one operation."""
    if isinstance(module, torch.jit.ScriptModule):
        return True
    origin = type(module).__module__
    if not origin.startswith("torch."):
        return False
    return not module._modules or "quantized" in origin or "parametriz" in origin or _is_parametrized(module)


def _is_parametrized(module: nn.Module) -> bool:
    return isinstance(module._modules.get("parametrizations"), nn.ModuleDict)


@dataclass
class _Frame:
    region: Region
    node_of: dict[int, tuple[fx.Node, int | None]] = field(default_factory=dict)
    from_input: set[str] = field(default_factory=set)


class Recorder(TorchFunctionMode):
    """Builds the graphs while the model runs."""

    def __init__(self, root: nn.Module) -> None:
        super().__init__()
        self.root = root
        self.names = names_by_id(root)
        self.parameters = parameter_names(root)
        self.regions: dict[str, Region] = {}
        self.layers: dict[str, Layer] = {}
        self.flow: nx.DiGraph = nx.DiGraph()
        self.stack: list[_Frame | None] = []
        self.leaf_depth = 0
        self.producer: dict[int, int] = {}
        # ids are only good while the objects live: everything that was given a node is kept until the end.
        self.keep: list[object] = []
        self.reached_input: set[int] = set()
        self.derived: dict[int, str] = {}

    # -- torch calls -------------------------------------------------------------------------------------

    def __torch_function__(
        self, func: Any, types_: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.leaf_depth:
            return func(*args, **kwargs)
        name = function_name(func)
        if name in _VALUE_READS:
            self._note_value_read(name, args[0])
        result = func(*args, **kwargs)
        if name == "torch.Tensor.__setitem__":
            self._add(func, name, args, kwargs, args[0])
        elif any(isinstance(leaf, torch.Tensor) for leaf in tensor_leaves(result)):
            self._add(func, name, args, kwargs, result)
        return result

    def _note_value_read(self, name: str, tensor: object) -> None:
        frame = self.stack[-1] if self.stack else None
        if frame is None or frame.region.data_dependent or id(tensor) not in self.reached_input:
            return
        source = user_frame()
        verb = name.rsplit(".", 1)[1]
        frame.region.data_dependent = f"control flow reads a tensor's value ({verb}) at {source}"

    def _add(self, func: Any, name: str, args: Any, kwargs: Any, result: Any) -> None:
        inputs = [leaf for leaf in tensor_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        source = user_frame()
        number = self._flow_node("function", name, inputs, result, source=source)
        if any(self.flow.nodes[number]["weights"]):
            self.flow.nodes[number]["inside"] = self._called_past_call()
        if name.endswith(("einsum", "einsum.default")) and args and isinstance(args[0], str):
            self.flow.nodes[number]["equation"] = args[0]
        if "approximate" in kwargs:
            self.flow.nodes[number]["variant"] = kwargs["approximate"]
        frame = self.stack[-1] if self.stack else None
        if frame is None:
            return
        graph = frame.region.graph
        node = graph.create_node(
            "call_function",
            func if not isinstance(func, types.MethodWrapperType) else _readable(func, name),
            _as_args(self._argument(frame, args)),
            self._argument(frame, kwargs),
        )
        node.meta["source"] = source
        node.meta["flow"] = number
        node.meta["function"] = name
        self._bind(frame, node, result)

    def _called_past_call(self) -> str | None:
        """Path of the module whose forward is running without `__call__`: `child.forward(x)`."""
        current = self.stack[-1].region.module if self.stack and self.stack[-1] is not None else None
        frame = sys._getframe(2)
        while frame is not None:
            if frame.f_code.co_name == "forward":
                module = frame.f_locals.get("self")
                if module is current:
                    return None
                if id(module) in self.names:
                    return self.names[id(module)]
            if frame.f_back is None:
                break
            frame = frame.f_back
        return None

    # -- module calls ------------------------------------------------------------------------------------

    def call(self, module: nn.Module, run: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What `nn.Module.__call__` does while the recorder is on."""
        path = self.names.get(id(module))
        if self.leaf_depth:
            return run(*args, **kwargs)
        parent = self.stack[-1] if self.stack else None
        source = user_frame() if parent is not None else ""
        leaf = path is None or is_leaf(module)
        if leaf:
            self.leaf_depth += 1
            try:
                result = run(*args, **kwargs)
            finally:
                self.leaf_depth -= 1
        else:
            assert path is not None
            result = self._enter(path, module, parent, run, args, kwargs)
        shown = path if path is not None else type(module).__name__
        inputs = [leaf_ for leaf_ in tensor_leaves((args, kwargs)) if isinstance(leaf_, torch.Tensor)]
        if leaf:
            kind = "module" if path is not None else "foreign_module"
            number = self._flow_node(kind, shown, inputs, result, source=source)
            self.flow.nodes[number]["module_class"] = type(module).__name__
            self.flow.nodes[number]["variant"] = getattr(module, "approximate", None)
        if path is not None:
            self._note_layer(path, module, parent, args, kwargs, result, source)
        if parent is not None:
            target = _relative(shown, parent.region.path)
            node = parent.region.graph.create_node(
                "call_module", target, _as_args(self._argument(parent, args)), self._argument(parent, kwargs)
            )
            node.meta["source"] = source
            node.meta["path"] = shown
            node.meta["module_class"] = type(module).__name__
            self._bind(parent, node, result)
        return result

    def _enter(
        self, path: str, module: nn.Module, parent: _Frame | None, run: Any, args: Any, kwargs: Any
    ) -> Any:
        first = path not in self.regions
        region = Region(path, module, fx.Graph(), parent.region.path if parent else None, definition(module))
        frame = _Frame(region)
        for name, value in _named_arguments(module, args, kwargs):
            region.arguments[name] = value is not None
            for index, leaf in enumerate(x for x in tensor_leaves(value) if isinstance(x, torch.Tensor)):
                node = region.graph.placeholder(name if index == 0 else f"{name}_{index}")
                frame.node_of[id(leaf)] = (node, None)
                node.meta["shape"], node.meta["dtype"] = tuple(leaf.shape), leaf.dtype
                self.keep.append(leaf)
                if parent is None:
                    self._input(leaf, node.name)
        if first:
            self.regions[path] = region
        self.regions[path].calls += 1
        self.stack.append(frame)
        try:
            result = run(*args, **kwargs)
        finally:
            self.stack.pop()
            if region.data_dependent and not self.regions[path].data_dependent:
                self.regions[path].data_dependent = region.data_dependent
        region.graph.output(self._argument(frame, result))
        return result

    def _note_layer(
        self,
        path: str,
        module: nn.Module,
        parent: _Frame | None,
        args: Any,
        kwargs: Any,
        result: Any,
        source: str,
    ) -> None:
        layer = self.layers.setdefault(path, Layer(path))
        layer.calls += 1
        if layer.calls > 1:
            return
        layer.region = parent.region.path if parent else None
        layer.source = source
        first_in = next((x for x in tensor_leaves((args, kwargs)) if isinstance(x, torch.Tensor)), None)
        layer.input_shape = None if first_in is None else tuple(first_in.shape)
        layer.output_kind = type(result).__name__
        if not torchs_own(module):
            layer.example = tree_map(_sketch, (args, kwargs))
        watched = result
        if not isinstance(result, torch.Tensor) and isinstance(result, tuple | list) and result:
            watched = result[0]
        if isinstance(watched, torch.Tensor):
            layer.output_shape, layer.output_dtype = tuple(watched.shape), watched.dtype
            if watched is not result:
                layer.output_kind = "tuple"

    # -- values ------------------------------------------------------------------------------------------

    def _input(self, tensor: torch.Tensor, name: str) -> None:
        number = self.flow.number_of_nodes()
        self.flow.add_node(number, kind="input", name=name, regions=(), source="", shape=tuple(tensor.shape))
        self.producer[id(tensor)] = number
        self.reached_input.add(id(tensor))

    def _flow_node(self, kind: str, name: str, inputs: list[torch.Tensor], result: Any, source: str) -> int:
        number: int = self.flow.number_of_nodes()
        regions = tuple(frame.region.path for frame in self.stack if frame is not None)
        outputs = [leaf for leaf in tensor_leaves(result) if isinstance(leaf, torch.Tensor)]
        weights = tuple(self.parameters.get(id(t)) or self.derived.get(id(t)) for t in inputs)
        self.flow.add_node(
            number,
            kind=kind,
            name=name,
            regions=regions,
            source=source,
            weights=weights,
            input_shapes=tuple(tuple(tensor.shape) for tensor in inputs),
            shape=tuple(outputs[0].shape) if outputs else (),
            dtype=outputs[0].dtype if outputs else None,
        )
        touched = False
        for tensor in inputs:
            source_node = self.producer.get(id(tensor))
            if source_node is not None and source_node != number:
                self.flow.add_edge(source_node, number)
            touched = touched or id(tensor) in self.reached_input
        taken = name == "torch.Tensor.__getitem__" and bool(weights[:1]) and weights[0] is not None
        if weights and kind == "function" and (all(weights) or taken):
            # A view, cast or transpose of a parameter still is that parameter.
            self.derived.update({id(tensor): str(weights[0]) for tensor in outputs})
        for tensor in outputs:
            self.producer[id(tensor)] = number
            self.keep.append(tensor)
            if touched:
                self.reached_input.add(id(tensor))
        return number

    def _bind(self, frame: _Frame, node: fx.Node, result: Any) -> None:
        if isinstance(result, torch.Tensor):
            frame.node_of[id(result)] = (node, None)
            self.keep.append(result)
            node.meta["shape"], node.meta["dtype"] = tuple(result.shape), result.dtype
            return
        for index, leaf in enumerate(x for x in tensor_leaves(result) if isinstance(x, torch.Tensor)):
            frame.node_of[id(leaf)] = (node, index)
            self.keep.append(leaf)

    def _argument(self, frame: _Frame, value: Any) -> Any:
        """`value` with its tensors replaced by nodes of the frame's graph, foreign objects by their names."""

        def one(leaf: Any) -> Any:
            if isinstance(leaf, torch.Tensor):
                return self._node(frame, leaf)
            if leaf is None or isinstance(
                leaf, bool | int | float | str | complex | torch.dtype | torch.device
            ):
                return leaf
            if isinstance(leaf, slice) or leaf is Ellipsis:
                return leaf
            return f"<{type(leaf).__name__}>"

        if isinstance(value, slice):
            return slice(*(self._argument(frame, part) for part in (value.start, value.stop, value.step)))
        if isinstance(value, tuple | list) and type(value) in (tuple, list):
            return type(value)(self._argument(frame, item) for item in value)
        if type(value) is dict:
            return {str(key): self._argument(frame, item) for key, item in value.items()}
        # Named tuples, packed sequences and dataclasses can't all be made of nodes: their leaves stand for them.
        leaves = tensor_leaves(value)
        return one(value) if len(leaves) == 1 and leaves[0] is value else [one(leaf) for leaf in leaves]

    def _node(self, frame: _Frame, tensor: torch.Tensor) -> fx.Node:
        known = frame.node_of.get(id(tensor))
        graph = frame.region.graph
        if known is None:
            name = self.parameters.get(id(tensor))
            target = "_outside" if name is None else _relative(name, frame.region.path)
            node = graph.create_node("get_attr", target)
            node.meta["parameter"] = name
            frame.node_of[id(tensor)] = (node, None)
            self.keep.append(tensor)
            return node
        node, index = known
        if index is None:
            return node
        taken = graph.create_node("call_function", operator.getitem, (node, index))
        frame.node_of[id(tensor)] = (taken, None)
        return taken


def _readable(func: Any, name: str) -> Any:
    """Attribute getters arrive as anonymous method wrappers; give the graph a name it can print."""

    def getter(*args: Any) -> Any:
        return func(*args)

    getter.__name__ = getter.__qualname__ = name.split(".")[-2] if name.endswith("__get__") else name
    getter.__module__ = "torch"
    return getter


def function_name(func: Any) -> str:
    name: str | None = resolve_name(func)
    if name:
        return name
    owner = getattr(func, "__self__", None)
    if owner is not None and hasattr(owner, "__name__"):
        return f"torch.Tensor.{owner.__name__}.{func.__name__}"
    module = getattr(func, "__module__", None) or "torch"
    return f"{module}.{getattr(func, '__qualname__', getattr(func, '__name__', repr(func)))}"


def tensor_leaves(value: Any) -> list[Any]:
    """Leaves of containers; objects that torch doesn't know (dataclasses, caches) are looked into once."""
    leaves: list[Any] = []
    for leaf in tree_leaves(value):
        if _is_foreign(leaf):
            leaves.extend(tree_leaves(list(vars(leaf).values())))
        else:
            leaves.append(leaf)
    return leaves


def _is_foreign(value: Any) -> bool:
    if isinstance(value, torch.Tensor | nn.Module | type | types.FunctionType) or not hasattr(
        value, "__dict__"
    ):
        return False
    return hasattr(type(value), "__dataclass_fields__")


def _as_args(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else tuple(value)


def _relative(path: str, region: str) -> str:
    if region and path.startswith(region + "."):
        return path[len(region) + 1 :]
    return path if path else "_root"


def _named_arguments(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Iterator[tuple[str, Any]]:
    try:
        bound = inspect.signature(module.forward).bind(*args, **kwargs)
    except (TypeError, ValueError):
        yield from ((f"arg{index}", value) for index, value in enumerate(args))
        yield from kwargs.items()
        return
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            yield from value.items()
        else:
            yield name, value
