"""What counts as a layer: torch's own by type, look-alikes and functional forms by what they compute."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from morphc.passes.recorder import Layer, Region
from morphc.passes.recording import Recording
from morphc.runtime.attention import PACKED, SEPARATE

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CHANNEL_NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm)
_INSTANCE_NORMS = {"InstanceNorm1d": -2, "InstanceNorm2d": -3, "InstanceNorm3d": -4}
_CELLS = (nn.LSTMCell, nn.GRUCell, nn.RNNCell)

# Torch calls whose result is one parameterised matmul or convolution of their input: name -> kind.
WEIGHTED_CALLS = {
    "torch.nn.functional.linear": "linear",
    "torch.addmm": "linear",
    "torch.Tensor.addmm": "linear",
    "torch.mm": "linear",
    "torch.Tensor.mm": "linear",
    "torch.matmul": "linear",
    "torch.Tensor.matmul": "linear",
    "torch.Tensor.__rmatmul__": "linear",
    "torch.bmm": "linear",
    "torch.Tensor.bmm": "linear",
    "torch.baddbmm": "linear",
    "torch.functional.einsum": "linear",
    "torch.functional.tensordot": "linear",
    "torch.nn.functional.conv1d": "conv",
    "torch.nn.functional.conv2d": "conv",
    "torch.nn.functional.conv3d": "conv",
    "torch.nn.functional.conv_transpose1d": "conv",
    "torch.nn.functional.conv_transpose2d": "conv",
    "torch.nn.functional.conv_transpose3d": "conv",
    "torch.conv1d": "conv",
    "torch.conv2d": "conv",
    "torch.conv3d": "conv",
    "torch.nn.functional.embedding": "embedding",
    "torch.nn.functional.layer_norm": "norm",
    "torch.nn.functional.rms_norm": "norm",
    "torch.nn.functional.batch_norm": "norm",
    "torch.nn.functional.group_norm": "norm",
    "torch._VariableFunctionsClass._grouped_mm": "linear",
    "torch.nn.functional.grouped_mm": "linear",
    "aten.linear.default": "linear",
    "aten.addmm.default": "linear",
    "aten.mm.default": "linear",
    "aten.matmul.default": "linear",
    "aten.bmm.default": "linear",
    "aten.einsum.default": "linear",
    "aten.conv1d.default": "conv",
    "aten.conv2d.default": "conv",
    "aten.conv3d.default": "conv",
    "aten.convolution.default": "conv",
    "aten.embedding.default": "embedding",
    "aten.layer_norm.default": "norm",
    "aten.rms_norm.default": "norm",
    "aten.group_norm.default": "norm",
}
# What may stand between the weighted call and the result of a look-alike.
_TRANSPARENT = {
    "view", "reshape", "to", "type_as", "float", "half", "bfloat16", "contiguous", "add", "__add__", "__iadd__",
    "__radd__", "squeeze", "unsqueeze", "unflatten", "flatten", "type", "add_", "size", "view_as", "reshape_as",
}  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """How a layer's output is watched."""

    kind: str
    features: int
    feature_axis: int
    output_index: int | None = None
    quantized: bool = False


def classify(module: nn.Module) -> Shape | None:
    """A layer known by its type, or None."""
    if isinstance(module, torch.jit.ScriptModule):
        return None
    if isinstance(module, nn.Linear):
        # Not `module.weight`: of a parametrized layer that is computed, and spectral norm's buffers move with it.
        own = module._parameters.get("weight")
        return Shape(
            "linear", module.out_features, -1, quantized=own is not None and not own.is_floating_point()
        )
    if isinstance(module, _CONVS):
        return Shape("conv", module.out_channels, -(len(module.kernel_size) + 1))
    if isinstance(module, nn.Bilinear):
        return Shape("linear", module.out_features, -1)
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return Shape("norm", int(module.normalized_shape[-1]), -1)
    if isinstance(module, _CHANNEL_NORMS):
        features: int = getattr(module, "num_features", 0) or getattr(module, "num_channels", 0)
        return Shape("norm", features, 1)
    if isinstance(module, nn.modules.instancenorm._InstanceNorm):
        # These also take an input without its batch.
        names = [cls.__name__.removeprefix("Lazy") for cls in type(module).__mro__]
        axis = next((_INSTANCE_NORMS[name] for name in names if name in _INSTANCE_NORMS), 1)
        return Shape("norm", module.num_features, axis)
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return Shape("embedding", module.embedding_dim, -1)
    if isinstance(module, nn.MultiheadAttention):
        return Shape("attention", module.embed_dim, -1, 0)
    if isinstance(module, nn.RNNBase):
        width = (module.proj_size or module.hidden_size) * (2 if module.bidirectional else 1)
        return Shape("rnn", width, -1, 0)
    if isinstance(module, _CELLS):
        return Shape("rnn", module.hidden_size, -1, 0 if isinstance(module, nn.LSTMCell) else None)
    if isinstance(module, torch.jit.ScriptModule):
        return None
    return _quantized(module) or _norm_by_name(module)


def _norm_by_name(module: nn.Module) -> Shape | None:
    """Home-made norms over the last axis, such as transformers' `LlamaRMSNorm`: one weight for each feature."""
    weight = module._parameters.get("weight")
    if module._modules or weight is None or weight.dim() != 1:
        return None
    named = type(module).__name__.endswith(("RMSNorm", "LayerNorm"))
    return Shape("norm", weight.numel(), -1) if named else None


def in_projections(attention: nn.MultiheadAttention) -> dict[str, Shape]:
    """The layers that an attention makes of its own parameters, by the parameter's name."""
    found = {}
    for name in (PACKED, *SEPARATE):
        weight = attention._parameters.get(name)
        if weight is not None:
            found[name] = Shape("linear", int(weight.shape[0]), -1, quantized=not weight.is_floating_point())
    return found


def computed_in_projections(attention: nn.MultiheadAttention) -> list[str]:
    """Those that are weights without being parameters: parametrized, or set before each call by a hook."""
    return [
        name
        for name in (PACKED, *SEPARATE)
        if isinstance(vars(attention).get(name), torch.Tensor) or parametrize.is_parametrized(attention, name)
    ]


def _quantized(module: nn.Module) -> Shape | None:
    """Quantized layers are matched by their attributes: the packages that bring them need not be installed."""
    name, origin = type(module).__name__, type(module).__module__
    if "quant" not in origin and "bitsandbytes" not in origin:
        return None
    if "Linear" in name and isinstance(getattr(module, "out_features", None), int):
        return Shape("linear", int(module.out_features), -1, quantized=True)  # type: ignore[arg-type]
    if "Conv" in name and isinstance(getattr(module, "out_channels", None), int):
        spatial = len(getattr(module, "kernel_size", (1, 1)))
        return Shape("conv", int(module.out_channels), -(spatial + 1), quantized=True)  # type: ignore[arg-type]
    return None


@dataclass(frozen=True)
class WeightedCall:
    """A torch call with a parameter as one operand.

    `inside` is the module whose forward was called past `__call__` and made this call, if there is one.
    """

    number: int
    name: str
    kind: str
    parameter: str
    feature_axis: int
    features: int
    source: str
    regions: tuple[str, ...]
    inside: str | None = None
    reason: str = ""


def weighted_calls(recording: Recording) -> list[WeightedCall]:
    """Every parameterised matmul, convolution, embedding and norm made by function in the recorded run."""
    found = []
    for number, data in recording.flow.nodes(data=True):
        kind = WEIGHTED_CALLS.get(data["name"]) if data["kind"] == "function" else None
        if kind is None:
            continue
        weights = data["weights"]
        named = [name for name in weights if name]
        if not named or all(weights):
            continue
        position = _weight_position(data["name"], weights)
        if position is None:
            continue
        shape = data["shape"]
        equation = data.get("equation")
        axis, reason = _feature_axis(data["name"], kind, position, data["input_shapes"], shape, equation)
        features = int(shape[axis]) if shape and -len(shape) <= axis < len(shape) else 0
        found.append(
            WeightedCall(
                number, data["name"], kind, str(weights[position]), axis, features, data["source"],
                data["regions"], data.get("inside"), reason,
            )
        )  # fmt: skip
    return found


def _weight_position(name: str, weights: tuple[str | None, ...]) -> int | None:
    """Which tensor operand is the weight; None where a parameter takes part only as a bias."""
    name = name.removesuffix(".default")
    if name.endswith(("addmm", "baddbmm")):
        candidates = [1, 2]
    elif name.endswith(("mm", "matmul", "__rmatmul__", "einsum", "tensordot")):
        candidates = list(range(len(weights)))
    else:
        candidates = [1]
    return next((i for i in reversed(candidates) if i < len(weights) and weights[i]), None)


def _feature_axis(
    name: str,
    kind: str,
    position: int,
    shapes: tuple[tuple[int, ...], ...],
    output: tuple[int, ...],
    equation: str | None,
) -> tuple[int, str]:
    """The axis, and why it is none that can be watched."""
    name = name.removesuffix(".default")
    if kind == "conv":
        return -(len(shapes[position]) - 1), ""
    if kind == "norm" and ("batch" in name or "group" in name):
        return 1 - len(output), ""
    if name.endswith("einsum"):
        return _einsum_axis(position, shapes, output, equation)
    if kind == "linear" and len(shapes[position]) == 1:
        return -1, "its weight is one vector, so that its output has no feature axis"
    if name.endswith("tensordot"):
        return _tensordot_axis(position, shapes, output)
    left = position == (1 if name.endswith(("addmm", "baddbmm")) else 0)
    if name.endswith(("mm", "matmul")) and left:
        return (-2, "") if len(output) > 1 else (-1, "")
    return -1, ""


def _einsum_axis(
    position: int, shapes: tuple[tuple[int, ...], ...], output: tuple[int, ...], equation: str | None
) -> tuple[int, str]:
    """The last axis, where its letter is the weight's alone."""
    last_only = -1, "the feature axis of this einsum isn't its last one"
    if (
        equation is None
    ):  # axes given as numbers: the last one counts where its width can only be the weight's
        others = [size for at, shape in enumerate(shapes) if at != position for size in shape]
        own = bool(output) and output[-1] in shapes[position] and output[-1] not in others
        return (-1, "") if own else last_only
    inputs, arrow, result = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if not arrow:
        letters = inputs.replace(",", "").replace(".", "")
        result = "".join(sorted(letter for letter in set(letters) if letters.count(letter) == 1))
    last = result[-1:]
    elsewhere = any(last in term for at, term in enumerate(terms) if at != position)
    return last_only if last in ("", ".") or last not in terms[position] or elsewhere else (-1, "")


def _tensordot_axis(
    position: int, shapes: tuple[tuple[int, ...], ...], output: tuple[int, ...]
) -> tuple[int, str]:
    """The result has the left operand's free axes, then the right one's: the last is the weight's if it is its."""
    contracted = (len(shapes[0]) + len(shapes[1]) - len(output)) // 2
    free = len(shapes[1]) - contracted
    if output and (free > 0) is (position == 1):
        return -1, ""
    return -1, "the feature axis of this tensordot isn't its last one"


def look_alike(region: Region, layer: Layer | None, calls: list[WeightedCall]) -> Shape | None:
    """A module whose forward is one weighted call: transformers' `Conv1D`, home-made linears and norms.

    `calls` are the weighted calls made directly in this region.
    """
    if len(calls) != 1 or calls[0].reason or layer is None or layer.output_shape is None:
        return None
    graph = region.graph
    if any(node.op == "call_module" for node in graph.nodes):
        return None
    node = next((n for n in graph.nodes if n.meta.get("flow") == calls[0].number), None)
    output = next(n for n in graph.nodes if n.op == "output")
    while node is not None and output not in node.users:
        node = next(iter(node.users)) if len(node.users) == 1 else None
        if node is not None and str(node.meta.get("function", "")).rsplit(".", 1)[-1] not in _TRANSPARENT:
            return None
    if node is None or calls[0].features != layer.output_shape[calls[0].feature_axis]:
        return None
    index = 0 if layer.output_kind == "tuple" else None
    return Shape(calls[0].kind, calls[0].features, calls[0].feature_axis, index)


def attention_output(module: nn.Module, layer: Layer | None) -> Shape | None:
    """A home-made attention block by its name, whose first output is one vector of features a position."""
    if layer is None or layer.output_shape is None or not module._modules:
        return None
    if not type(module).__name__.endswith(("Attention", "SelfAttention", "CrossAttention")):
        return None
    index = 0 if layer.output_kind == "tuple" else None
    return Shape("attention", int(layer.output_shape[-1]), -1, index)


def check_output(shape: Shape, layer: Layer) -> str:
    """Why the recorded output can't carry a site of this shape, or an empty string."""
    output = layer.output_shape
    if output is None:
        return f"its output is a {layer.output_kind}, not a tensor"
    if layer.output_dtype is not None and not layer.output_dtype.is_floating_point:
        return f"its output is {layer.output_dtype}, not floating point"
    if not -len(output) <= shape.feature_axis < len(output):
        return f"its output has {len(output)} axes, none of them the feature axis"
    if output[shape.feature_axis] != shape.features:
        return f"its output is {list(output)} where axis {shape.feature_axis} was expected to be {shape.features}"
    return ""


def tap_width(module: nn.Module) -> int:
    """Width of the layer's input: what a `layer` tap reads."""
    for name in ("in_features", "in_channels", "input_size"):
        value: Any = getattr(module, name, None)
        if isinstance(value, int):
            return value
    return 0


def rows_of(shape: Shape, output: tuple[int, ...] | None) -> int:
    """Positions of the recorded output: the product of all axes but the feature axis."""
    if not output or not -len(output) <= shape.feature_axis < len(output):
        return 0
    return math.prod(output) // output[shape.feature_axis] if output[shape.feature_axis] else 0


def positions_of(shape: Shape, output: tuple[int, ...] | None) -> int:
    """Positions of one sample of the recorded output: the product of the axes behind the feature axis."""
    if not output or not -len(output) <= shape.feature_axis < len(output):
        return 1
    return math.prod(output[shape.feature_axis % len(output) + 1 :])


def dtype_name(dtype: torch.dtype | None) -> str:
    """`float32` for torch.float32."""
    return str(dtype).removeprefix("torch.") if dtype is not None else "float32"
