"""Which axis of a layer's output holds its features, where the layer's type doesn't settle it.

torch's own forwards say where their features are. A forward of somebody else's (a subclass that permutes its output, a
norm over the channels of NCHW, a look-alike) is taken at its word only where its output agrees, and sizes that happen
to be equal agree with anything. So such a layer is run alone on inputs of twice the size, one axis after the other: an
axis of the output that grows with its input holds positions, not features.
"""

from __future__ import annotations

import warnings
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from morphc.passes.clone import clone_tree
from morphc.passes.isolation import KeptParameters
from morphc.passes.layers import Shape
from morphc.passes.quiet import own_state, quiet_log, quiet_state
from morphc.passes.recorder import PLAIN, Layer, Sketch


class Probe:
    """Runs layers on other sizes. Layers of one class with equal tensors, options and inputs are run once.

    real: on real tensors, for a model that was recorded on such; else on fake ones.
    """

    def __init__(self, real: bool) -> None:
        self.real = real
        self.known: dict[object, frozenset[int] | None] = {}

    def growing(self, module: nn.Module, layer: Layer) -> frozenset[int] | None:
        """The axes of the recorded output, counted from its end, that grow with some axis of the input.

        None where nothing is known: the layer takes what can't be made again, or refuses all other sizes.
        """
        if layer.example is None or layer.output_shape is None:
            return None
        leaves, _ = tree_flatten(layer.example)
        if any(leaf is ... for leaf in leaves):
            return None
        key = _key(module, leaves)
        if key is None or key not in self.known:
            found = self._growing(module, layer)
            if key is None:
                return found
            self.known[key] = found
        return self.known[key]

    def _growing(self, module: nn.Module, layer: Layer) -> frozenset[int] | None:
        assert layer.output_shape is not None
        clone = clone_tree(module)
        own_state(clone, everyones_hooks=False)
        kept = KeptParameters(*([clone] if self.real else []))
        rank, grown, ran = len(layer.output_shape), set(), False
        with ExitStack() as stack:
            stack.enter_context(quiet_state(clone, training=False))
            stack.enter_context(torch.no_grad())
            stack.enter_context(warnings.catch_warnings(action="ignore"))
            if not self.real:
                stack.enter_context(quiet_log("torch._subclasses.fake_tensor"))
                from torch._subclasses.fake_tensor import (
                    FakeTensorMode,
                )  # imports torch._dynamo: over a second

                stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            for example in _doubled(layer.example):
                shape = _shape(clone, example)
                if shape is not None and len(shape) == rank:
                    ran = True
                    grown |= {axis - rank for axis in range(rank) if shape[axis] != layer.output_shape[axis]}
        kept.restore()
        return frozenset(grown) if ran else None


_TURNS = ("linear", "norm", "embedding")
"""Kinds that can be watched at any axis. What grows at a convolution is made for the axes that its type has."""


def settled(
    shape: Shape, module: nn.Module, layer: Layer, probe: Probe, *, movable: bool
) -> tuple[Shape, str]:
    """`shape` with the axis at which the output of a forward of somebody's own has the features, or why none.

    movable: whether another axis than that of the layer's type can be watched there.
    """
    output = layer.output_shape
    alike = [a - len(output) for a, size in enumerate(output) if size == shape.features] if output else []
    if not output or not alike:
        return shape, ""
    growing = probe.growing(module, layer)
    fixed = [axis for axis in alike if growing is None or axis not in growing]
    promised = shape.feature_axis if shape.feature_axis < 0 else shape.feature_axis - len(output)
    if fixed == [promised] or (growing is None and promised not in alike):
        return shape, ""
    where = f"its output is {list(output)}"
    if not fixed:
        return shape, f"{where}, and each axis of {shape.features} grows with its input: none is its features"
    if len(fixed) > 1:
        named = " and ".join(str(axis + len(output)) for axis in fixed)
        return shape, (
            f"{where}: axes {named} both have {shape.features} features, and nothing tells which of them its own "
            "forward means; give an example of other sizes"
        )
    if not movable or shape.kind not in _TURNS:
        return shape, (
            f"{where}: its features are at axis {fixed[0]}, where those of a layer of kind {shape.kind!r} "
            f"are at {promised}"
        )
    return replace(shape, feature_axis=fixed[0]), ""


def _doubled(example: Any) -> list[Any]:
    """The example with one axis twice as long: in all tensors that have its size there, and in the first alone."""
    leaves, spec = tree_flatten(example)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Sketch)]
    made = []
    for axis, size in enumerate(tensors[0].shape if tensors else ()):
        alike = [t for t in tensors if len(t.shape) > axis and t.shape[axis] == size]
        for chosen in (alike, tensors[:1]) if len(alike) > 1 else (alike,):
            ids = {id(t) for t in chosen}
            longer = [_longer(leaf, axis) if id(leaf) in ids else leaf for leaf in leaves]
            made.append(tree_unflatten(longer, spec))
    return made


def _longer(sketch: Sketch, axis: int) -> Sketch:
    shape = tuple(2 * size if at == axis else size for at, size in enumerate(sketch.shape))
    return replace(sketch, shape=shape)


def _shape(module: nn.Module, example: Any) -> tuple[int, ...] | None:
    """Of what the module gives on zeros; None where it refuses."""
    args, kwargs = tree_map(
        lambda x: torch.zeros(x.shape, dtype=x.dtype, device=x.device) if isinstance(x, Sketch) else x,
        example,
    )
    try:
        result = module.forward(*args, **kwargs)
    except Exception:  # whatever the layer's own code raises: it doesn't take that size
        return None
    if isinstance(result, tuple | list) and result:
        result = result[0]
    return tuple(result.shape) if isinstance(result, torch.Tensor) else None


def _key(module: nn.Module, leaves: list[Any]) -> object | None:
    """Equal for layers that answer alike; None for one whose attributes don't tell."""
    if module._modules or "forward" in vars(module):
        return None
    options = []
    for name, value in vars(module).items():
        if name.startswith("_") or name == "training":
            continue
        parts = value if isinstance(value, tuple) else (value,)
        if not all(isinstance(part, PLAIN) for part in parts):
            return None
        options.append((name, repr(value)))
    tensors = [
        (name, None if tensor is None else (tuple(tensor.shape), tensor.dtype))
        for name, tensor in (*module._parameters.items(), *module._buffers.items())
    ]
    return type(module), tuple(options), tuple(tensors), tuple(map(repr, leaves))
