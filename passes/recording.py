"""One run of the model, watched: every torch call and every module call, as a graph per region and one flow.

The run happens on a throwaway clone: on real tensors where the model is small or values decide its control flow,
else under FakeTensorMode (no memory, no arithmetic). A TorchFunctionMode sees each torch call with the values that it
got, so `b, s, d = x.shape` and `if mask is not None` need no support: by then they are plain Python. What is
recorded has shapes and branches burnt in and is for reading, never for running.

Two views of the same run:
- `Region.graph`: an fx graph of one module's own forward, its children kept as `call_module`;
- `Recording.flow`: a networkx graph of all calls across regions (leaf layers and torch functions), an edge
  for each tensor that goes from one to the other.
"""

from __future__ import annotations

import inspect
import linecache
import logging
import operator
import os
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import networkx as nx
import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_leaves, tree_map

from morphc.passes.clone import clone_tree, every_module, names_by_id, parameter_names
from morphc.passes.isolation import kept_random_state, private_copy

# Reading a value out of a tensor: from here on, Python's control flow may depend on the data.
_VALUE_READS = frozenset(
    f"torch.Tensor.{name}"
    for name in ("__bool__", "__int__", "__float__", "__index__", "item", "tolist", "numpy", "__array__")
)
_SMALL_BYTES = 64 << 20
_LIBRARIES = {"torch", "transformers", "accelerate", "peft", "diffusers", "lightning"}
_TORCH_DIR = torch.__path__[0]
# This package's own frames: `morphc/passes` is reached under that name, whatever the checkout looks like.
_OWN_DIR = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep


@dataclass
class Call:
    """One call of a child module, as its parent made it."""

    path: str
    output_shapes: tuple[tuple[int, ...], ...]


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


@dataclass
class Layer:
    """What the recording knows of one executed module: shapes and where it was called from."""

    path: str
    calls: int = 0
    input_shape: tuple[int, ...] | None = None
    output_shape: tuple[int, ...] | None = None
    output_dtype: torch.dtype | None = None
    output_kind: str = ""
    region: str | None = None
    source: str = ""


@dataclass
class Recording:
    """All that was seen. `how` is "fake", "real" or "" when no run succeeded, with `error` saying why."""

    how: str
    regions: dict[str, Region]
    layers: dict[str, Layer]
    flow: nx.DiGraph
    error: str = ""
    error_source: str = ""
    fallback_reason: str = ""


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


class _Recorder(TorchFunctionMode):
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
        file, line = _user_frame()
        verb = name.rsplit(".", 1)[1]
        frame.region.data_dependent = f"control flow reads a tensor's value ({verb}) at {file}:{line}"

    def _add(self, func: Any, name: str, args: Any, kwargs: Any, result: Any) -> None:
        inputs = [leaf for leaf in tensor_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        file, line = _user_frame()
        number = self._flow_node("function", name, inputs, result, source=f"{file}:{line}")
        if any(self.flow.nodes[number]["weights"]):
            self.flow.nodes[number]["inside"] = self._called_past_call()
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
        node.meta["source"] = f"{file}:{line}"
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
        source = "{}:{}".format(*_user_frame()) if parent is not None else ""
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
            self._note_layer(path, parent, args, kwargs, result, source)
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
        self, path: str, parent: _Frame | None, args: Any, kwargs: Any, result: Any, source: str
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


def is_users(file: str) -> bool:
    """Whether a code object's file is neither torch's nor morphc's nor made at run time."""
    return not file.startswith((_TORCH_DIR, _OWN_DIR, "<"))


def _user_frame() -> tuple[str, int]:
    """file and line of the nearest caller outside of torch and of this module."""
    frame = sys._getframe(2)
    fallback = ("", 0)
    while frame is not None:
        file = frame.f_code.co_filename
        if frame.f_code is _attempt.__code__:
            break  # whoever called the compiler is not part of the model
        if is_users(file):
            return file, frame.f_lineno
        if (
            fallback[1] == 0
            and file.startswith(_TORCH_DIR)
            and "/nn/modules/" in file
            and "container" not in file
        ):
            fallback = (file, frame.f_lineno)
        if frame.f_back is None:
            break
        frame = frame.f_back
    return fallback


def definition(module: nn.Module) -> str:
    """file:line of the module's forward."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if code is not None else ""


def source_text(source: str) -> str:
    """The text of `file:line`, stripped; empty when it can't be read."""
    file, _, line = source.rpartition(":")
    return linecache.getline(file, int(line)).strip() if line.isdigit() and file else ""


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


@contextmanager
def _module_calls(recorder: _Recorder) -> Iterator[None]:
    """Send `nn.Module.__call__` through the recorder. fx patches the same attribute to see module calls."""
    original = nn.Module.__call__

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return recorder.call(module, types.MethodType(original, module), args, kwargs)

    nn.Module.__call__ = call  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.__call__ = original  # type: ignore[method-assign]


def cuda_devices(root: nn.Module) -> list[int]:
    """Indices of the CUDA devices that hold parameters of `root`."""
    found = {p.device.index for p in root.parameters() if p.device.type == "cuda"}
    return sorted(index for index in found if index is not None)


@contextmanager
def quiet_state(root: nn.Module, *, training: bool | None) -> Iterator[None]:
    """Run with a given training flag, fused fast paths off, and RNG state put back."""
    flags = [(module, module.training) for module in root.modules()]
    fast = torch.backends.mha.get_fastpath_enabled()
    with torch.random.fork_rng(devices=cuda_devices(root)), kept_random_state():
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            if training is not None:
                for module, _ in flags:
                    module.training = training
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
            for module, flag in flags:
                module.training = flag


def strip_user_hooks(root: nn.Module) -> None:
    """Remove the user's own hooks: they must not see the runs that a compiler makes."""
    for module in root.modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            hooks = vars(module).get(name)
            if hooks:
                for key in [k for k, hook in hooks.items() if not is_library_hook(hook)]:
                    del hooks[key]


def is_library_hook(hook: Any) -> bool:
    """Hooks by which a library makes its modules work, such as weight_norm's or transformers' output recorder."""
    hook = getattr(hook, "hook", hook)
    origins = (getattr(hook, "__module__", None) or "", type(hook).__module__)
    return any(origin.split(".")[0] in _LIBRARIES for origin in origins)


def own_state(root: nn.Module) -> None:
    """Give the tree copies of its buffers and of what its attributes hold, so that a forward may change them."""
    memo: dict[int, Any] = {}
    modules = [module for module in every_module(root) if not isinstance(module, torch.jit.ScriptModule)]
    for module in modules:
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device.type != "meta":
                if id(buffer) not in memo:
                    memo[id(buffer)] = buffer.clone()
                module._buffers[name] = memo[id(buffer)]
    for module in modules:
        for name, value in vars(module).items():
            if name not in ("_parameters", "_buffers", "_modules") and not name.endswith("_hooks"):
                vars(module)[name] = private_copy(value, memo)


def record(
    host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, allow_real: bool = True
) -> Recording:
    """Run `host` once on the example, watched. Nothing of the host changes; a failure is part of the answer."""
    if allow_real and _is_small(host, args, kwargs):
        found = _attempt(host, args, kwargs, fake=False, hooks=False)
        return _attempt(host, args, kwargs, fake=False, hooks=True) if found.error else found
    first = _attempt(host, args, kwargs, fake=True, hooks=False)
    if not first.error or not allow_real or _on_meta(host):
        return first
    second = _attempt(host, args, kwargs, fake=False, hooks=False)
    if second.error:
        second = _attempt(host, args, kwargs, fake=False, hooks=True)
    second.fallback_reason = first.error
    return second


def _is_small(host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a real run costs less than fake tensors, whose first use in a process imports for over a second."""
    leaves = [x for x in tensor_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    held = [*host.parameters(), *host.buffers(), *leaves]
    if any(tensor.device.type == "meta" for tensor in held):
        return False
    return sum(tensor.numel() * tensor.element_size() for tensor in held) <= _SMALL_BYTES


@contextmanager
def _quiet_log(name: str) -> Iterator[None]:
    """An op without a fake form is no news here: the real run follows."""
    logger = logging.getLogger(name)
    before = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = before


@contextmanager
def _no_torchscript() -> Iterator[None]:
    """TorchScript's fused CUDA kernels take the address of a fake tensor for one on the device, and the device is
    lost to the process: so with fake CUDA tensors a scripted call is an error, and the real run follows."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("TorchScript can't run on fake tensors of a CUDA device")

    classes: tuple[Any, ...] = (torch._C.ScriptFunction, torch._C.ScriptMethod)
    before = [cls.__call__ for cls in classes]
    try:
        for cls in classes:
            cls.__call__ = refuse
        yield
    finally:
        for cls, call in zip(classes, before, strict=True):
            cls.__call__ = call


def _on_meta(host: nn.Module) -> bool:
    return any(p.device.type == "meta" for p in host.parameters())


def _attempt(
    host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, fake: bool, hooks: bool
) -> Recording:
    clone = clone_tree(host)
    # Also under fake tensors: an in-place update of a real buffer of one number is carried out on it.
    own_state(clone)
    if not hooks:
        strip_user_hooks(clone)
    recorder = _Recorder(clone)
    error = source = ""
    with ExitStack() as stack:
        stack.enter_context(quiet_state(clone, training=False))
        stack.enter_context(torch.no_grad())
        # What the model warns of in this run is no news to whoever runs it.
        stack.enter_context(warnings.catch_warnings(action="ignore"))
        if fake:
            stack.enter_context(_quiet_log("torch._subclasses.fake_tensor"))
            if cuda_devices(host):
                stack.enter_context(_no_torchscript())
            from torch._subclasses.fake_tensor import FakeTensorMode  # imports torch._dynamo: over a second

            mode = FakeTensorMode(allow_non_fake_inputs=True)
            stack.enter_context(mode)
            own: Callable[[torch.Tensor], torch.Tensor] = mode.from_tensor
        else:
            own = torch.clone
        memo: dict[int, Any] = {}
        args, kwargs = tree_map(
            lambda x: own(x) if isinstance(x, torch.Tensor) else private_copy(x, memo), (args, kwargs)
        )
        stack.enter_context(recorder)
        stack.enter_context(_module_calls(recorder))
        try:
            clone(*args, **kwargs)
        except Exception as raised:  # whatever the model's own code raises: the caller decides what it means
            error, source = describe_error(raised)
    how = "" if error else ("fake" if fake else "real")
    return Recording(how, recorder.regions, recorder.layers, recorder.flow, error, source)


def describe_error(raised: BaseException) -> tuple[str, str]:
    """The first line of an error, and the file:line in the user's code where it came from."""
    where = ""
    trace = raised.__traceback__
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if is_users(file):
            where = f"{file}:{trace.tb_lineno}"
        trace = trace.tb_next
    text = str(raised).strip().split("\n")[0]
    return f"{type(raised).__name__}: {text}", where
