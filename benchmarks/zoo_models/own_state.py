"""Own models: tied weights, shared modules, mutated buffers, hooks, parametrizations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import spectral_norm as legacy_spectral_norm
from torch.nn.utils import weight_norm as legacy_weight_norm

from .registry import Inputs, features, floats, ids, zoo

STATE = "state"
HOOKS = "hooks"
WIDE = features(32)


@zoo("tied_weights", STATE, lambda batch, length: ((ids(batch, length),), {}), length=8, other_length=5)
class TiedWeights(nn.Module):
    """The head's weight is the embedding's."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(96, 64)
        self.body = nn.Linear(64, 64)
        self.head = nn.Linear(64, 96, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(self.embedding(tokens))))


@zoo("tied_linears", STATE, WIDE)
class TiedLinears(nn.Module):
    """Two Linear modules hold one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(32, 32)
        self.second = nn.Linear(32, 32)
        self.second.weight = self.first.weight
        self.out = nn.Linear(32, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.second(torch.relu(self.first(x))))


@zoo("called_twice", STATE, WIDE)
class CalledTwice(nn.Module):
    """One module at two names, called three times."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(32, 32)
        self.alias = self.shared
        self.block = nn.Sequential(self.shared, nn.ReLU(inplace=True))
        self.out = nn.Linear(32, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.block(torch.sin(self.alias(self.shared(x)))))


@zoo("batchnorm_mlp", STATE, WIDE)
class BatchNormMlp(nn.Module):
    """BatchNorm with and without running statistics, momentum None."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(32, 64), nn.BatchNorm1d(64), nn.ReLU(inplace=True),
            nn.Linear(64, 64), nn.BatchNorm1d(64, momentum=None), nn.ReLU(inplace=True),
            nn.Linear(64, 64, bias=False), nn.BatchNorm1d(64, track_running_stats=False),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


@zoo("ema_buffer", STATE, WIDE)
class EmaBuffer(nn.Module):
    """A moving average updated in the forward, once in place and once by assignment; an int counter."""

    mean: Tensor
    square: Tensor
    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 64)
        self.register_buffer("mean", torch.zeros(64))
        self.register_buffer("square", torch.ones(64))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        if self.training:
            self.mean.lerp_(y.detach().mean(0), 0.1)
            self.square = 0.9 * self.square + 0.1 * y.detach().pow(2).mean(0)
            self.calls += 1
        return (y - self.mean) / (self.square.sqrt() + 1e-3)


@zoo("kv_cache_buffer", STATE, features(-1, 32), length=6, other_length=3)
class CachedAttention(nn.Module):
    """Keys and values written into buffers of the module by slices."""

    keys: Tensor
    values: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(32, 96)
        self.out = nn.Linear(32, 64)
        self.register_buffer("keys", torch.zeros(4, 16, 32), persistent=False)
        self.register_buffer("values", torch.zeros(4, 16, 32), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, _ = x.shape
        query, key, value = self.qkv(x).chunk(3, dim=-1)
        self.keys[:rows, :length] = key.detach()
        self.values[:rows, :length] = value.detach()
        scores = (query @ self.keys[:rows, :length].mT / 32**0.5).softmax(-1)
        return self.out(scores @ self.values[:rows, :length] + value)


@zoo("quantizer_ema", STATE, WIDE)
class VectorQuantizer(nn.Module):
    """A codebook updated by scatter in train mode; straight-through output."""

    codebook: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(32, 16)
        self.decode = nn.Linear(16, 64)
        self.register_buffer("codebook", torch.randn(8, 16))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.encode(x)
        index = torch.cdist(z, self.codebook).argmin(-1)
        code = self.codebook[index]
        if self.training:
            self.codebook.index_add_(0, index, z.detach() - code, alpha=0.1)
        return self.decode(z + (code - z).detach()), index


class _Keeper(nn.Module):
    """Two layers, and a list that hooks put what they see into."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(32, 64)
        self.act = nn.ReLU()
        self.second = nn.Linear(64, 64)
        self.kept: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.act(self.first(x)))


@zoo("hooks_keep", HOOKS, WIDE)
def hooks_keep() -> nn.Module:
    """Forward hooks that keep inputs and outputs, on watched layers and on the root."""
    host = _Keeper()
    for module in (host, host.first, host.act, host.second):
        module.register_forward_hook(lambda _, args, output: host.kept.append((args[0], output)))
    return host


@zoo("hooks_keep_inplace", HOOKS, WIDE)
def hooks_keep_inplace() -> nn.Module:
    """A hook keeps the very tensor that ReLU(inplace=True) then overwrites."""
    host = _Keeper()
    host.act = nn.ReLU(inplace=True)
    host.first.register_forward_hook(lambda _, args, output: host.kept.append(output))
    return host


@zoo("hooks_replace", HOOKS, WIDE)
def hooks_replace() -> nn.Module:
    """A hook on a watched layer replaces its output; another then sees the replaced one."""
    host = _Keeper()
    host.first.register_forward_hook(lambda _, args, output: output * 0.5 + 1)
    host.first.register_forward_hook(lambda _, args, output: host.kept.append(output))
    host.second.register_forward_hook(lambda _, args, kwargs, output: output.clone(), with_kwargs=True)
    return host


@zoo("hooks_pre", HOOKS, WIDE)
def hooks_pre() -> nn.Module:
    """Forward pre-hooks change the input of a watched layer and of the root."""
    host = _Keeper()
    host.register_forward_pre_hook(lambda _, args: (args[0] * 2,))
    host.first.register_forward_pre_hook(lambda _, args, kwargs: ((args[0] + 1,), kwargs), with_kwargs=True)
    return host


@zoo("hooks_backward", HOOKS, WIDE)
def hooks_backward() -> nn.Module:
    """Full backward hooks keep and change gradients; a tensor hook on a parameter."""
    host = _Keeper()
    host.first.register_full_backward_hook(lambda _, gi, go: host.kept.append((gi, go)))
    host.second.register_full_backward_pre_hook(lambda _, go: (go[0] * 0.5,))
    host.first.weight.register_hook(lambda grad: grad * 2)
    return host


@zoo("hook_on_child_activation", HOOKS, WIDE)
def hook_on_child_activation() -> nn.Module:
    """The activation behind a site is watched by the user: it must not be fused away."""
    host = _Keeper()
    host.act.register_forward_hook(
        lambda _, args, output: host.kept.append((args[0].clone(), output.clone()))
    )
    return host


@zoo("parametrized", HOOKS, WIDE)
def parametrized() -> nn.Module:
    """Own parametrization, orthogonal, weight_norm and spectral_norm of torch.nn.utils.parametrizations."""

    host = nn.Sequential(
        nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, 8)
    )
    parametrize.register_parametrization(host[0], "weight", Symmetric())
    parametrizations.orthogonal(host[2])
    parametrizations.weight_norm(host[4])
    parametrizations.spectral_norm(host[5])
    return host


class Symmetric(nn.Module):
    """W -> (W + W^T) / 2."""

    def forward(self, weight: Tensor) -> Tensor:
        return (weight + weight.mT) / 2


@zoo("legacy_weight_norm", HOOKS, WIDE)
def weight_normed() -> nn.Module:
    """weight_norm by forward pre-hook: the weight is a plain attribute, recomputed in each forward."""
    return nn.Sequential(
        legacy_weight_norm(nn.Linear(32, 64)), nn.ReLU(inplace=True), legacy_weight_norm(nn.Linear(64, 8))
    )


@zoo("legacy_spectral_norm", HOOKS, features(3, -1, -1), length=8, other_length=6)
def spectral_normed() -> nn.Module:
    """spectral_norm by forward pre-hook; its power iteration moves buffers in train mode."""
    return nn.Sequential(
        legacy_spectral_norm(nn.Conv2d(3, 64, 3)),
        nn.LeakyReLU(0.1, inplace=True),
        legacy_spectral_norm(nn.Conv2d(64, 8, 3)),
    )


@zoo(
    "partly_eval",
    STATE,
    features(3, 8, 8),
    modes=("as_built",),
    note="BatchNorms in eval, the rest in train mode",
)
def partly_eval() -> nn.Module:
    """Mixed training flags."""
    host = nn.Sequential(
        nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU(inplace=True), nn.Dropout(0.3), nn.Conv2d(64, 8, 3)
    )
    host[1].eval()
    host[1].requires_grad_(False)
    return host


@zoo("frozen_backbone", STATE, WIDE)
def frozen_backbone() -> nn.Module:
    """Frozen body, trained head."""
    body = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64)).requires_grad_(False)
    return nn.Sequential(body, nn.Linear(64, 10))


@zoo("all_frozen", STATE, WIDE, input_grads=False)
def all_frozen() -> nn.Module:
    """No parameter asks for a gradient."""
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 10)).requires_grad_(False)


def _ids_and_state(batch: int, length: int) -> Inputs:
    return (floats(batch, length, 32), None), {}


@zoo("state_passing", STATE, _ids_and_state, length=5, other_length=3)
class StatePassing(nn.Module):
    """Builds its state as a dict in the forward, keyed by module, and returns it."""

    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.ModuleList([nn.Linear(32, 32), nn.Linear(32, 32)])
        self.out = nn.Linear(32, 64)

    def forward(self, x: Tensor, state: dict[str, Tensor] | None) -> tuple[Tensor, dict[str, Tensor]]:
        state = {} if state is None else dict(state)
        for index, cell in enumerate(self.cells):
            previous = state.get(f"cell{index}", torch.zeros_like(x[:, 0]))
            for step in x.unbind(1):
                previous = torch.tanh(cell(step) + previous)
            state[f"cell{index}"] = previous
        return self.out(state["cell0"] + state["cell1"]), state
