"""Merging into a host layer's own weights, in float64 on the CPU, rounded once to the layer's type.

With y = W x + b the layer's output, k = 1 for `residual` and 1 - a for `lerp`, and a slot's result s:

    affine   s = p y + q          W' = (k + a p) W               b' = (k + a p) b + a q
    lowrank  s = x W_in W_out     W' = k W + a (W_in W_out)^T    b' = k b
    widen    s = act(u V + c) U   the block's first layer gets the rows V^T and biases c, its last the columns a U^T

Only the rows of the seed's own chunk are written; every other number stays the very bits it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

FLOATS: Final = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

_CONVS: Final = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED: Final = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CHANNEL_NORMS: Final = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.modules.instancenorm._InstanceNorm)
_KNOWN: Final = (
    nn.Linear,
    *_CONVS,
    *_TRANSPOSED,
    *_CHANNEL_NORMS,
    nn.SyncBatchNorm,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.Embedding,
)
_OUT_NAMES: Final = ("out_features", "out_channels", "nf", "num_features")
_IN_NAMES: Final = ("in_features", "in_channels", "nx")


class Home(NamedTuple):
    """Where a layer keeps what belongs to one output feature.

    out, into: axes of `weight` over output and input features; `into` is None where the layer has no matrix (norms,
    embeddings). gains_bias: a layer without a bias can be given one. shift_in_weight: an added constant goes into the
    weight itself (embeddings).
    """

    out: int
    into: int | None = None
    gains_bias: bool = False
    shift_in_weight: bool = False


def home_of(layer: nn.Module) -> Home | str:
    """Where `layer` keeps its weights, or why they can't be merged into."""
    if "forward" in vars(layer):
        return "its forward was replaced on the instance"
    if is_transposed_linear(layer):
        home: Home | str = Home(out=1, into=0)
    else:
        home = _home_of_type(layer)
    if isinstance(home, str):
        return home
    weight = layer._parameters.get("weight")
    if weight is None:
        computed = getattr(layer, "weight", None) is not None
        return (
            "its weight is computed on each call (weight_norm or another parametrization)"
            if computed
            else ("it has no weight of its own")
        )
    if type(weight) is not nn.Parameter or weight.dtype not in FLOATS:
        return f"its weight is quantized ({weight.dtype})"
    if weight.is_meta:
        return "its weight is on the meta device"
    if "bias" not in layer._parameters and getattr(layer, "bias", None) is not None:
        return "its bias is computed on each call"
    return home


def is_transposed_linear(layer: nn.Module) -> bool:
    """transformers' `Conv1D`: y = x W + b with W [in, out]."""
    kind = type(layer)
    return kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.")


def _home_of_type(layer: nn.Module) -> Home | str:
    kind: Any = type(layer)
    # A subclass may compute something else with the same weights.
    runs = {vars(known)["forward"] for known in kind.__mro__ if known.__module__.startswith("torch.nn.modules")
            and "forward" in vars(known)}  # fmt: skip
    if not isinstance(layer, _KNOWN) or kind.forward not in runs:
        return f"{kind.__name__} is no layer whose weights are known"
    if isinstance(layer, nn.Linear):
        return Home(0, 1, gains_bias=True)
    if isinstance(layer, _CONVS):
        if kind._conv_forward not in [vars(known)["_conv_forward"] for known in _CONVS]:
            return f"{kind.__name__} convolves in its own way"
        return Home(0, 1 if layer.groups == 1 else None, gains_bias=True)
    if isinstance(layer, _TRANSPOSED):
        return (
            Home(1, None, gains_bias=True)
            if layer.groups == 1
            else "it is a transposed convolution in groups"
        )
    if isinstance(layer, nn.Embedding):
        return (
            Home(1, shift_in_weight=True) if layer.max_norm is None else "max_norm rescales it on each call"
        )
    if isinstance(layer, nn.LayerNorm | nn.RMSNorm):
        return Home(-1, gains_bias=isinstance(layer, nn.LayerNorm) and len(layer.normalized_shape) == 1)
    return Home(0)


class Merge(NamedTuple):
    """What one slot adds to the features `[start, stop)` of a layer: y' = scale y + shift (+ delta x).

    scale, shift: [C] float64. delta: [C, in, *kernel] float64 or None.
    """

    start: int
    stop: int
    scale: Tensor
    shift: Tensor
    delta: Tensor | None = None


def affine(span: tuple[int, int], alpha: Tensor, keep: Tensor, scale: Tensor, shift: Tensor) -> Merge:
    """alpha, keep: scalars a and k. scale, shift: [C]."""
    width = span[1] - span[0]
    return Merge(*span, keep + alpha * exact(scale)[:width], alpha * exact(shift)[:width])


def lowrank(span: tuple[int, int], alpha: Tensor, keep: Tensor, into: Tensor, out: Tensor) -> Merge:
    """into: [in, R], or [R, in, *kernel] behind a convolution. out: [R, C]."""
    width = span[1] - span[0]
    first = exact(into) if into.dim() > 2 else exact(into).T
    delta = torch.tensordot(alpha * exact(out)[:, :width].T, first, dims=1)
    return Merge(*span, keep.expand(width), torch.zeros(width, dtype=torch.float64), delta)


def scaled(span: tuple[int, int], keep: Tensor) -> Merge:
    """Only y' = k y: what `lerp` leaves of the old rows."""
    width = span[1] - span[0]
    return Merge(*span, keep.expand(width), torch.zeros(width, dtype=torch.float64))


def exact(value: Tensor) -> Tensor:
    """`value` in float64 on the CPU."""
    return value.detach().to("cpu", torch.float64)


def needs_bias(layer: nn.Module, home: Home, merge: Merge) -> bool:
    """Whether a constant is added that no parameter of the layer can take as it is."""
    return not home.shift_in_weight and layer._parameters.get("bias") is None and bool(merge.shift.any())


@torch.no_grad()
def apply_merges(layer: nn.Module, home: Home, merges: Sequence[Merge]) -> None:
    """Replace `layer`'s parameters by merged ones; the old tensors are left alone."""
    weight = layer._parameters["weight"]
    assert weight is not None
    fresh = weight.detach().clone()
    for merge in merges:
        rows = fresh.narrow(home.out, merge.start, merge.stop - merge.start)
        old = exact(rows).movedim(home.out, 0)
        new = old * _sided(merge.scale, old)
        if merge.delta is not None:
            # [C, in, *kernel], as `old` is where its other axis runs over the inputs.
            new = new + merge.delta
        if home.shift_in_weight:
            new = new + _sided(merge.shift, old)
        rows.copy_(new.movedim(0, home.out))
    replace_parameter(layer, "weight", fresh)
    if home.shift_in_weight:
        return
    if any(needs_bias(layer, home, merge) for merge in merges):
        set_bias(layer, home)
    bias = layer._parameters.get("bias")
    if bias is None:
        return
    fresh = bias.detach().clone()
    for merge in merges:
        part = fresh.narrow(-1 if home.out == -1 else 0, merge.start, merge.stop - merge.start)
        part.copy_(exact(part) * merge.scale + merge.shift)
    replace_parameter(layer, "bias", fresh)


def _sided(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *(1,) * (like.dim() - 1))


def set_bias(layer: nn.Module, home: Home) -> None:
    """Give a layer without a bias one of zeros."""
    weight = layer._parameters["weight"]
    assert weight is not None
    zeros = torch.zeros(weight.shape[home.out], dtype=weight.dtype, device=weight.device)
    layer._parameters["bias"] = nn.Parameter(zeros, requires_grad=weight.requires_grad)


def replace_parameter(layer: nn.Module, name: str, value: Tensor) -> None:
    """A new Parameter in the old one's place, with its flags and tags."""
    old = layer._parameters[name]
    assert old is not None
    fresh = nn.Parameter(
        value.contiguous() if old.is_contiguous() else value, requires_grad=old.requires_grad
    )
    vars(fresh).update(vars(old))
    layer._parameters[name] = fresh


@torch.no_grad()
def add_outputs(layer: nn.Module, home: Home, rows: Tensor, bias: Tensor) -> None:
    """New output features. rows: [n, in, *kernel]; bias: [n]; both float64.

    Where the layer has got new inputs meanwhile, the new features don't read them.
    """
    weight = layer._parameters["weight"]
    assert weight is not None
    assert home.into is not None
    missing = weight.shape[home.into] - rows.shape[1]
    if missing:
        rows = torch.cat((rows, rows.new_zeros(rows.shape[0], missing, *rows.shape[2:])), 1)
    rows = rows.movedim((0, 1), (home.out, home.into))
    if layer._parameters.get("bias") is None and bool(bias.any()):
        set_bias(layer, home)
    replace_parameter(layer, "weight", torch.cat((weight.detach(), rows.to(weight)), home.out))
    old = layer._parameters.get("bias")
    if old is not None:
        replace_parameter(layer, "bias", torch.cat((old.detach(), bias.to(old))))
    _count(layer, _OUT_NAMES, bias.shape[0])


@torch.no_grad()
def add_inputs(layer: nn.Module, home: Home, columns: Tensor) -> None:
    """New input features. columns: [out, n, *kernel] float64; features of the layer beyond `out` don't read them."""
    weight = layer._parameters["weight"]
    assert weight is not None
    assert home.into is not None
    missing = weight.shape[home.out] - columns.shape[0]
    if missing:
        columns = torch.cat((columns, columns.new_zeros(missing, *columns.shape[1:])))
    count = columns.shape[1]
    columns = columns.movedim((0, 1), (home.out, home.into))
    replace_parameter(layer, "weight", torch.cat((weight.detach(), columns.to(weight)), home.into))
    _count(layer, _IN_NAMES, count)


@torch.no_grad()
def add_channels(norm: nn.Module, count: int) -> None:
    """New channels of a BatchNorm that pass their value on in eval mode: mean 0, variance 1 - eps, weight 1, bias 0."""
    assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
    for name, fill in (("running_mean", 0.0), ("running_var", 1.0 - norm.eps)):
        buffer = norm._buffers[name]
        assert buffer is not None
        norm._buffers[name] = torch.cat((buffer, buffer.new_full((count,), fill)))
    for name, fill in (("weight", 1.0), ("bias", 0.0)):
        old = norm._parameters.get(name)
        if old is not None:
            replace_parameter(norm, name, torch.cat((old.detach(), old.new_full((count,), fill))))
    norm.num_features += count


def _count(layer: nn.Module, names: tuple[str, ...], more: int) -> None:
    for name in names:
        value = vars(layer).get(name)
        if isinstance(value, int):
            setattr(layer, name, value + more)
