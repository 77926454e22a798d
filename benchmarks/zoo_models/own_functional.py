"""Own models: functional layers with own parameters, activations from tables, output types."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .registry import features, ids, zoo

FUNCTIONAL = "functional"
OUTPUTS = "outputs"
WIDE = features(32)


def parameter(*shape: int) -> nn.Parameter:
    """Small normal weights."""
    return nn.Parameter(torch.randn(*shape) * 0.1)


@zoo("functional_linear", FUNCTIONAL, WIDE)
class FunctionalLayers(nn.Module):
    """F.linear with own parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.b1 = parameter(64, 32), parameter(64)
        self.w2 = parameter(16, 64)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.gelu(F.linear(x, self.w1, self.b1)), self.w2)


@zoo("matmul_forms", FUNCTIONAL, features(-1, 32), length=6, other_length=4)
class MatmulForms(nn.Module):
    """torch.matmul, @, einsum, addmm and bmm, each with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = parameter(32, 64), parameter(64, 32), parameter(32, 64)
        self.d, self.bias, self.e = parameter(64, 64), parameter(64), parameter(4, 64, 32)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(torch.matmul(x, self.a))
        x = torch.relu(x @ self.b)
        x = torch.einsum("bld,de->ble", x, self.c)
        x = torch.addmm(self.bias, x.flatten(0, 1), self.d).view_as(x)
        return torch.bmm(x.mean(0).expand(4, -1, -1), self.e)


@zoo("matmul_transposed", FUNCTIONAL, WIDE)
class MatmulTransposed(nn.Module):
    """Views of parameters as operands: w.t(), slices of a packed weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = parameter(64, 32)
        self.packed = parameter(2 * 64, 64)

    def forward(self, x: Tensor) -> Tensor:
        h = x @ self.weight.t()
        gate, up = F.linear(h, self.packed[:64]), F.linear(h, self.packed[64:])
        return F.silu(gate) * up


@zoo("functional_conv", FUNCTIONAL, features(3, -1, -1), length=10, other_length=8)
class FunctionalConv(nn.Module):
    """F.conv2d and F.conv_transpose2d with own parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel, self.bias = parameter(64, 3, 3, 3), parameter(64)
        self.up = parameter(64, 8, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv_transpose2d(
            F.relu(F.conv2d(x, self.kernel, self.bias, padding=1), inplace=True), self.up, stride=2
        )


@zoo(
    "functional_tied_head",
    FUNCTIONAL,
    lambda batch, length: ((ids(batch, length),), {}),
    length=8,
    other_length=5,
)
class FunctionalTiedHead(nn.Module):
    """The language head is F.linear(h, embedding.weight)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(96, 64)
        self.body = nn.Linear(64, 64)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.linear(F.gelu(self.body(self.embedding(tokens))), self.embedding.weight)


@zoo("childs_weight", FUNCTIONAL, WIDE)
class ChildsWeight(nn.Module):
    """Uses a child's weight without calling the child, once, and calls it, once."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(32, 64)
        self.bypassed = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.used(x), self.bypassed.weight, self.bypassed.bias)


class Dense(nn.Module):
    """A Linear of one's own: kernel stored [in, out]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.kernel, self.bias = parameter(inputs, outputs), parameter(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.kernel + self.bias


class ScaledLinear(nn.Linear):
    """A subclass of nn.Linear with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input * 0.5, self.weight, self.bias) * 2


@zoo("own_linear_classes", FUNCTIONAL, WIDE)
def own_linear_classes() -> nn.Module:
    """Look-alikes of Linear."""
    return nn.Sequential(Dense(32, 64), nn.ReLU(inplace=True), ScaledLinear(64, 64), nn.GELU(), Dense(64, 8))


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": nn.GELU(),
    "silu": nn.SiLU(),
    "square": lambda x: x * x,
    "tanh": torch.tanh,
}


@zoo("activation_table", FUNCTIONAL, WIDE)
class ActivationTable(nn.Module):
    """Activations looked up in a global table, as ACT2FN is: modules that are no children."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in ACTIVATIONS)
        self.out = nn.Linear(32, 64)

    def forward(self, x: Tensor) -> Tensor:
        for layer, name in zip(self.layers, ACTIVATIONS, strict=True):
            x = ACTIVATIONS[name](layer(x))
        return self.out(x)


@zoo("glu_norm_mix", FUNCTIONAL, WIDE)
class GluNormMix(nn.Module):
    """GLU, F.layer_norm and F.batch_norm with own parameters, F.dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(32, 128)
        self.scale, self.shift = nn.Parameter(torch.ones(64)), nn.Parameter(torch.zeros(64))
        self.register_buffer("mean", torch.zeros(64))
        self.register_buffer("var", torch.ones(64))
        self.down = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        h = F.glu(self.up(x))
        h = F.batch_norm(h, self.mean, self.var, self.scale, self.shift, self.training)
        h = F.dropout(F.layer_norm(h, (64,), self.scale, self.shift), 0.2, self.training)
        return self.down(h)


@dataclass
class Report:
    """A dataclass output."""

    logits: Tensor
    hidden: list[Tensor]
    name: str = "report"


class Pair(NamedTuple):
    """A named tuple output."""

    mean: Tensor
    scale: Tensor


class _Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(32, 64)
        self.second = nn.Linear(64, 64)


@zoo("output_dict", OUTPUTS, WIDE)
class OutputDict(_Body):
    """Nested dicts and tuples, a None, a string, an empty list."""

    def forward(self, x: Tensor) -> dict[str, Any]:
        h = self.first(x)
        return OrderedDict(y=self.second(h), more={"h": (h, [h.relu()])}, nothing=None, name="n", empty=[])


@zoo("output_dataclass", OUTPUTS, WIDE)
class OutputDataclass(_Body):
    """A dataclass."""

    def forward(self, x: Tensor) -> Report:
        h = self.first(x)
        return Report(self.second(h), [h, h.tanh()])


@zoo("output_namedtuple", OUTPUTS, WIDE)
class OutputNamedTuple(_Body):
    """A named tuple."""

    def forward(self, x: Tensor) -> Pair:
        h = self.first(x).relu_()
        return Pair(self.second(h), F.softplus(self.second(h)))


@zoo("output_is_input", OUTPUTS, WIDE)
class OutputIsInput(_Body):
    """Gives back its own input, and one tensor twice."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = self.second(self.first(x))
        return x, y, y


@zoo("output_not_finite", OUTPUTS, WIDE)
class OutputNotFinite(_Body):
    """NaN, Inf and -0.0 in the activations."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.first(x).clone()
        h[:, 0], h[:, 1], h[:, 2] = float("nan"), float("inf"), -0.0
        return h, self.second(h * torch.ones(64).masked_fill(torch.arange(64) < 2, 0.0))


@zoo("output_int_and_complex", OUTPUTS, WIDE)
class OutputIntAndComplex(_Body):
    """Integer, boolean and complex tensors, a Python float."""

    def forward(self, x: Tensor) -> tuple[Any, ...]:
        y = self.second(self.first(x))
        return y.argmax(-1), y > 0, torch.fft.rfft(y), float(y.detach().mean())
