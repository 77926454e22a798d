"""The small plain module: what is left of slots that don't merge into weights, as torch's own `fx.GraphModule`.

It becomes a child `grown` of the layer and a forward hook on it, so the layer keeps its class, its attributes and its
state-dict keys, whatever it returns and whether its weight is shared, quantized or computed. The hook runs before the
user's own hooks, which so see what they saw.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, fx, nn

from morphc.errors import FoldError
from morphc.kernels.blueprints.base import Geometry, get

Span = tuple[int, int]
_WRAPPED = "is_wrapped"  # fx's own mark of a function that was given to `torch.fx.wrap`


class Grown(NamedTuple):
    """The blending slots of one bank.

    spans: features [start, stop) of each slot. alpha: [K] float32. params: [K, ...], the slots' own.
    """

    path: str
    blueprint: str
    blend: str
    seeds: tuple[int, ...]
    spans: tuple[Span, ...]
    alpha: Tensor
    params: dict[str, Tensor]
    geometry: Geometry
    feature_axis: int


class _Bank(nn.Module):
    """The computation of one bank's slots, written so that symbolic tracing needs no value."""

    columns: Tensor
    targets: Tensor
    kept: Tensor
    inside: Tensor
    alpha: Tensor

    def __init__(self, grown: Grown, device: torch.device) -> None:
        super().__init__()
        self.grown = grown
        self.kind = get(grown.blueprint)
        self.spatial = self.kind.is_spatial(grown.geometry)
        width = max(stop - start for start, stop in grown.spans)
        self.shape = (len(grown.spans), grown.geometry.chunk)
        self.padded = any(stop - start != grown.geometry.chunk for start, stop in grown.spans)
        assert width <= grown.geometry.chunk
        trailing = (1,) * (1 + grown.geometry.spatial if self.spatial else 1)
        inside = torch.zeros(self.shape, dtype=torch.bool)
        columns = torch.zeros(self.shape, dtype=torch.int64)
        for slot, (start, stop) in enumerate(grown.spans):
            columns[slot, : stop - start] = torch.arange(start, stop)
            inside[slot, : stop - start] = True
        flat = inside.view(-1)
        ones = (1,) * grown.geometry.spatial if self.spatial else ()
        self.register_buffer("columns", columns.view(-1).to(device))
        self.register_buffer("targets", columns.view(-1)[flat].to(device))
        self.register_buffer("kept", flat.nonzero().view(-1).to(device))
        self.register_buffer("inside", inside.view(self.shape[0], 1, self.shape[1], *ones).to(device))
        self.register_buffer("alpha", grown.alpha.to(device).view(-1, 1, *trailing))
        for name, value in grown.params.items():
            self.register_parameter(name, nn.Parameter(value.detach().clone()))

    def forward(self, joined: Any, y: Any, tap: Any) -> Any:
        """`joined`, in place, with the slots' columns replaced, computed from the layer's own value `y`."""
        geometry = self.grown.geometry
        axis = self.grown.feature_axis
        if self.spatial and axis >= 0:
            axis = -1 - geometry.spatial
        params = {name: getattr(self, name) for name in self.grown.params}
        like = next(iter(params.values()))
        if self.spatial:
            picked = y.index_select(axis, self.columns)
            # [N, ...] also for an input without a batch axis.
            chunks = picked.reshape((-1,) + picked.shape[axis:]).unflatten(axis, self.shape)  # noqa: RUF005
            chunks = chunks.movedim(axis - 1, 0)
        else:
            picked = y.movedim(axis, -1).index_select(-1, self.columns)
            chunks = picked.reshape(-1, *self.shape).transpose(0, 1)
        x = chunks.type_as(like)
        if self.padded:
            x = torch.where(self.inside, x, 0.0)
        sizes = (2, *(5,) * geometry.spatial) if self.spatial else (3,)
        know(x, self._example(self.shape[0], sizes[0], self.shape[1], *sizes[1:]), fixed=(0, 2))
        s = self.kind.apply(x if tap is None else self._tap(tap, like), params, geometry)
        mixed = self._blend(x, s, params)
        if self.spatial:
            values = mixed.movedim(0, axis - 1).flatten(axis - 1, axis).reshape(picked.shape)
            at = axis
        else:
            values = mixed.transpose(0, 1).reshape(picked.shape)
            at = -1
        if self.padded:
            values = values.index_select(at, self.kept)
        return joined.index_copy_(axis, self.targets, values.movedim(at, axis).type_as(y))

    def _tap(self, tap: Any, like: Any) -> Any:
        geometry = self.grown.geometry
        if geometry.spatial:
            tap = tap.reshape((-1,) + tap.shape[-1 - geometry.spatial :])  # noqa: RUF005
        else:
            tap = tap.reshape(-1, geometry.tap_features)
        example = self._example(2, geometry.tap_features, *(5,) * geometry.spatial)
        return know(tap.type_as(like), example, fixed=(1,))

    def _example(self, *sizes: int) -> Tensor:
        return torch.empty(sizes, dtype=next(iter(self.grown.params.values())).dtype, device="meta")

    def _blend(self, x: Any, s: Any, params: dict[str, Any]) -> Any:
        """`kernels.reference.blends.blend`, with the number of axes known beforehand."""
        a, blend = self.alpha, self.grown.blend
        if blend == "residual":
            return x + a * s
        if blend == "lerp":
            return (1 - a) * x + a * s
        if blend == "multiply":
            return x * (1 + a * torch.tanh(s))
        assert blend == "gate"
        count, ones = self.shape[0], (1,) * (self.grown.geometry.spatial if self.spatial else 0)
        weight = params["gate_weight"].view(count, 1, -1, *ones)
        bias = params["gate_bias"].view(count, 1, 1, *ones)
        return x + a * torch.sigmoid((x * weight).sum(2, keepdim=True) + bias) * s


class _Recipe(nn.Module):
    """The forward hook of a layer. Traced once; nothing of this class stays."""

    def __init__(
        self, grown: Sequence[Grown], output_index: int | None, layer: nn.Module, device: torch.device
    ) -> None:
        super().__init__()
        self.output_index = output_index
        self.argument = _first_argument(layer)
        self.packs = isinstance(layer, nn.RNNBase)  # fed a packed sequence or a tensor, it returns the like
        self.overridden = not type(layer).forward.__module__.startswith("torch.")
        for each in grown:
            self.add_module(each.blueprint, _Bank(each, device))

    def forward(self, module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        index = self.output_index
        # A subclass may return its value without the tuple: a tensor or a packed sequence, and both have `data`.
        alone: Any = _call(hasattr, output, "data") if self.overridden and index is not None else None
        parts: Any = output if alone is None else _either(alone, (output,), output)
        result = output if index is None else parts[index]
        y = _unpacked(result) if self.packs else result
        joined = y.clone()  # in the memory format of y
        for bank in self.children():
            assert isinstance(bank, _Bank)
            tap = None
            if bank.kind.tap == "layer":
                # The first argument, given by position or by name.
                tap = (args + (kwargs.get(self.argument),))[0]  # noqa: RUF005
                tap = _unpacked(tap) if self.packs else tap
            joined = bank(joined, y, tap)
        if self.packs:
            joined = _packed_like(result, joined)
        if index is None:
            return joined
        rest = parts[:index] + (joined,) + parts[index + 1 :]  # noqa: RUF005
        return rest if alone is None else _either(alone, joined, rest)


def _unpacked(value: Any) -> Any:
    """The data of a packed sequence, [rows, features]; a tensor as it is."""
    return _either(_call(hasattr, value, "batch_sizes"), value.data, value)


def _packed_like(value: Any, data: Any) -> Any:
    """`data` in a packed sequence like `value`, or `data` itself where `value` is a tensor."""
    packed = _call(hasattr, value, "batch_sizes")
    rest = [
        _call(getattr, value, name, None) for name in ("batch_sizes", "sorted_indices", "unsorted_indices")
    ]
    make = _either(packed, _call(getattr, value, "_make", None), data.type_as)
    return make(_either(packed, (data, *rest), data))


def _either(condition: fx.Proxy, yes: Any, no: Any) -> Any:
    """A graph can't branch: it has both, and picks."""
    return _call(operator.itemgetter, condition)((no, yes))


def _call(function: Callable[..., Any], proxy: fx.Proxy, *args: Any) -> Any:
    """A node for the call of a function that a proxy doesn't record by itself."""
    result = proxy.tracer.create_proxy("call_function", function, (proxy, *args), {})
    # It must be recorded again when the module is unpickled, which traces its code anew.
    result.node.meta[_WRAPPED] = True
    return result


class _Ranked(fx.Proxy):
    """A proxy that knows its number of axes, and those sizes that never change; the others are proxies."""

    @property
    def shape(self) -> Any:
        example = self.node.meta.get("example")
        if not isinstance(example, Tensor):
            return super().__getattr__("shape")
        fixed, sizes = self.node.meta.get("fixed", {}), cast(Any, super().__getattr__("shape"))
        return tuple(fixed[axis] if axis in fixed else sizes[axis] for axis in range(example.dim()))

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> Any:
        example = self.node.meta.get("example")
        return example.dim() if isinstance(example, Tensor) else super().__getattr__("dim")()

    ndim = property(dim)


class _Tracer(fx.Tracer):
    """Carries a meta tensor along with each value that a blueprint computes, for its number of axes."""

    proxy_buffer_attributes = True

    def __init__(self, recipe: nn.Module) -> None:
        super().__init__()
        self.tensors = {**dict(recipe.named_parameters()), **dict(recipe.named_buffers())}

    def is_leaf_module(self, module: nn.Module, path: str) -> bool:
        return False

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Ranked(node, self)

    def create_proxy(
        self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any
    ) -> fx.Proxy:
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **more)
        node = proxy.node
        if kind == "get_attr":
            know(proxy, self.tensors[target], fixed=None)
        elif kind in ("call_function", "call_method") and node.all_input_nodes:
            node.meta["example"] = _evaluated(node)
        return proxy


def know(proxy: Any, like: Tensor, fixed: Sequence[int] | None = ()) -> Any:
    """Tell the tracer what `proxy` looks like. fixed: axes whose size never changes, None for all of them."""
    if isinstance(proxy, fx.Proxy):
        proxy.node.meta["example"] = torch.empty(like.shape, dtype=like.dtype, device="meta")
        axes = range(like.dim()) if fixed is None else fixed
        proxy.node.meta["fixed"] = {axis: like.shape[axis] for axis in axes}
    return proxy


def _evaluated(node: fx.Node) -> Any:
    """What the node gives on the examples of its inputs; None where one has none, or the operation has no meta form."""
    if any(source.meta.get("example") is None for source in node.all_input_nodes):
        return None
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda source: source.meta["example"])
    try:
        with torch.no_grad():
            if node.op == "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
            return node.target(*args, **kwargs)  # type: ignore[operator]
    except (RuntimeError, NotImplementedError, TypeError):
        return None


def grown_module(
    layer: nn.Module, grown: Sequence[Grown], output_index: int | None, device: torch.device
) -> fx.GraphModule:
    """The module for the slots of one site. Raises FoldError for a blueprint that tracing can't follow."""
    recipe = _Recipe(grown, output_index, layer, device)
    try:
        graph = _Tracer(recipe).trace(recipe)
    except Exception as error:  # whatever a user's blueprint raises when it meets a proxy
        names = ", ".join(repr(each.blueprint) for each in grown)
        raise FoldError(
            f"{grown[0].path!r}: the forward of blueprint {names} can't be written as a torch.fx graph ({error}); "
            "let its apply() branch on geometry and parameter shapes only, not on values or shapes of x"
        ) from error
    # A pickled GraphModule names its tracer's class; this one's is morphc's.
    graph._tracer_cls = None
    for node in graph.nodes:
        node.meta = {_WRAPPED: True} if _WRAPPED in node.meta else {}
        node.type = None  # an annotation, kept as a string that no pickle can import
    graph.eliminate_dead_code()
    module = fx.GraphModule(recipe, graph, class_name="Grown")
    module.train(layer.training)
    return module


def _first_argument(layer: nn.Module) -> str:
    names = list(inspect.signature(type(layer).forward).parameters)
    return names[1] if len(names) > 1 else "input"


def install(layer: nn.Module, module: fx.GraphModule) -> str:
    """Hang `module` into `layer`; returns the child's name."""
    name, number = "grown", 1
    while hasattr(layer, name):
        number += 1
        name = f"grown_{number}"
    layer.add_module(name, module)
    handle = layer.register_forward_hook(module, prepend=True, with_kwargs=True)
    # Hooks are numbered by a counter of the process. Unpickling the handle moves the counter past its number; without,
    # the first hook that a user registers in a new process would take this one's place.
    vars(layer)[f"{name}_handle"] = handle
    return name
