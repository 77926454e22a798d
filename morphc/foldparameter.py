"""Merging into the parameter of a functional layer, such as `F.linear(x, self.weight, self.bias)`.

Which axis of the parameter runs over the outputs, and what the call's bias is, stands in the owner's forward; it is
read from its symbolic trace:

1. `F.linear(x, W, b)`, convolutions: the first axis.
2. `x @ W`, `torch.addmm(b, x, W)` and their like: the last axis; `W @ x`: the last but one.
3. Any of these with `W.t()`, `W.T` or `W.transpose(0, 1)`: the other one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import fx, nn
from torch.nn import functional as F

from morphc.foldmath import FLOATS, Merge, exact, replace_parameter

_FIRST_AXIS: Final = (F.linear, torch.conv1d, torch.conv2d, torch.conv3d, F.conv1d, F.conv2d, F.conv3d)
_PRODUCTS: Final = ("matmul", "mm", "bmm", "__matmul__")
_SUMS: Final = ("addmm", "baddbmm")


class ParameterHome(NamedTuple):
    """`axis` of the parameter `name` over output features, and the name of the call's bias."""

    name: str
    axis: int
    bias: str | None


def parameter_home(owner: nn.Module, name: str, feature_axis: int) -> ParameterHome | str:
    """Where the functional layer `owner.name` keeps its outputs, or why that can't be told."""
    parameter = owner._parameters.get(name)
    if type(parameter) is not nn.Parameter or parameter.dtype not in FLOATS or parameter.is_meta:
        return f"{name!r} is no plain floating-point parameter of its module"
    if isinstance(owner, nn.MultiheadAttention):
        # Its forward hands the weights to one fused call; the packed ones are [3 * embed_dim, embed_dim].
        if name == "in_proj_weight":
            return ParameterHome(name, 0, "in_proj_bias" if owner.in_proj_bias is not None else None)
        if owner.in_proj_bias is None:
            return ParameterHome(name, 0, None)
        return "its bias is packed with those of the other projections"
    try:
        graph = _Own().trace(owner)
    except Exception as error:  # whatever the user's forward raises when it meets a proxy
        return f"the forward of {type(owner).__name__} can't be traced ({type(error).__name__}: {error})"
    node, flipped = _use(graph, name)
    if isinstance(node, str):
        return node
    weight, transposed = flipped
    found = _axis(node, weight)
    if found is None:
        return f"the call {node.target} isn't one whose weights are known"
    axis, bias = found
    if transposed:
        if parameter.dim() != 2:
            return f"{name!r} is transposed and has {parameter.dim()} axes"
        axis = -1 - axis % 2 if axis < 0 else 1 - axis
    bias_name = _bias_name(bias, owner)
    if bias is not None and bias_name is None:
        return "the call's bias is no parameter of the same module"
    return ParameterHome(name, axis % parameter.dim(), bias_name)


class _Own(fx.Tracer):
    """Traces a module's own forward; its children stay calls."""

    def is_leaf_module(self, module: nn.Module, path: str) -> bool:
        return True


def _use(graph: fx.Graph, name: str) -> tuple[Any, Any]:
    """(the one call that takes the parameter, (the operand, whether it is transposed)), or (why not, None)."""
    reads = [node for node in graph.nodes if node.op == "get_attr" and node.target == name]
    users = [(node, user) for node in reads for user in node.users]
    if len(users) != 1:
        return f"{name!r} is used {len(users)} times in the forward of its module", None
    operand, user = users[0]
    transposed = _is_transpose(user)
    if transposed:
        if len(user.users) != 1:
            return f"{name!r} is used {len(user.users)} times in the forward of its module", None
        operand, user = user, next(iter(user.users))
    return user, (operand, transposed)


def _is_transpose(node: fx.Node) -> bool:
    if node.op == "call_method" and node.target in ("t", "transpose"):
        return node.target == "t" or sorted(a % 2 for a in node.args[1:] if isinstance(a, int)) == [0, 1]
    if node.op == "call_function" and node.target in (torch.t, torch.transpose):
        return node.target is torch.t or sorted(a % 2 for a in node.args[1:] if isinstance(a, int)) == [0, 1]
    return node.op == "call_function" and node.target is getattr and node.args[1] in ("T", "mT")


def _axis(node: fx.Node, weight: fx.Node) -> tuple[int, Any] | None:
    """(axis of the weight over output features, the bias argument)."""
    if node.op == "call_function" and node.target in _FIRST_AXIS:
        bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
        given = node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")
        return (0, bias) if given is weight else None
    called = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    if node.kwargs or len(node.args) < 2:
        return None
    if called in _PRODUCTS:
        return (-1 if node.args[1] is weight else -2), None
    if called in _SUMS and len(node.args) == 3:
        return (-1 if node.args[2] is weight else -2), node.args[0]
    return None


def _bias_name(bias: Any, owner: nn.Module) -> str | None:
    if not isinstance(bias, fx.Node) or bias.op != "get_attr" or len(bias.users) != 1:
        return None
    return str(bias.target) if type(owner._parameters.get(str(bias.target))) is nn.Parameter else None


@torch.no_grad()
def apply_to_parameter(owner: nn.Module, home: ParameterHome, merges: Sequence[Merge]) -> None:
    """Scale the parameter's outputs, scale and shift the bias."""
    for name, axis in ((home.name, home.axis), (home.bias, -1)):
        parameter = owner._parameters.get(name) if name is not None else None
        if parameter is None or name is None:
            continue
        fresh = parameter.detach().clone()
        for merge in merges:
            part = fresh.narrow(axis, merge.start, merge.stop - merge.start)
            new = exact(part).movedim(axis, -1) * merge.scale
            if name == home.bias:
                new = new + merge.shift
            part.copy_(new.movedim(-1, axis))
        replace_parameter(owner, name, fresh)
