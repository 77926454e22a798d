"""`widen` becomes wider host layers, and says why where it can't."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from growth import BOUNDS, DTYPES, check, distance, grow, how, morph
from torch import nn

import morphc
from morphc.errors import FoldError

DOUBLE = torch.float64


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(6, 10)
        self.up = nn.Linear(6, 10, bias=False)
        self.down = nn.Linear(10, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("blend", ["residual", "lerp"])
def test_gated_block(dtype: torch.dtype, blend: str) -> None:
    torch.manual_seed(0)
    host, x = Gated().to(dtype), torch.randn(4, 6, dtype=dtype)
    model = morph(host, x, blueprint=("widen", "affine"), blend=blend)
    grow(model, "down", [1, 3], "widen", alpha=0.6)
    grow(model, "down", [0], "affine")
    folded = check(model, host, x, bound=BOUNDS[dtype])
    assert (folded.gate.out_features, folded.up.out_features, folded.down.in_features) == (16, 16, 16)
    assert folded.up.weight.shape == (16, 6)
    assert folded.up.bias.shape == (16,)  # the new units have one, the old ones get zeros
    assert set(how(model).values()) == {"wider layers", "own weights"}


@pytest.mark.parametrize("blend", ["residual", "lerp"])
def test_convolution_block_with_batch_norm(blend: str) -> None:
    torch.manual_seed(1)
    host = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3, stride=2)
    ).double()
    x = torch.randn(2, 3, 9, 9, dtype=DOUBLE)
    host.train()(x)
    host.eval()
    model = morph(host, x, blueprint=("widen", "lowrank"), blend=blend)
    grow(model, "3", [0, 2], "widen")
    grow(model, "0", [1], "lowrank")
    grow(model, "3", [1], "lowrank")
    before = {name: value.clone() for name, value in host.state_dict().items()}
    folded: Any = check(model, host, x)
    assert (folded[0].out_channels, folded[1].num_features, folded[3].in_channels) == (14, 14, 14)
    assert folded[1].running_var.shape == (14,)
    assert all(torch.equal(value, before[name]) for name, value in host.state_dict().items())
    folded.train()(x).sum().backward()


def test_several_blocks_through_a_shared_layer() -> None:
    torch.manual_seed(2)
    host = nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 8), nn.GELU(), nn.Linear(8, 4)).double()
    x = torch.randn(6, 5, dtype=DOUBLE)
    for order in (("2", "4"), ("4", "2")):
        model = morph(host, x, blueprint=("widen", "bottleneck", "affine"), blend="lerp")
        for path in order:
            grow(model, path, [1, 2], "widen")
        grow(model, "0", [3], "bottleneck")
        grow(model, "2", [0], "affine")
        folded: Any = check(model, host, x)
        assert [(layer.in_features, layer.out_features) for layer in folded[::2]] == [
            (5, 15),
            (15, 14),
            (14, 4),
        ]


def test_a_site_before_a_widened_layer_reads_its_old_columns() -> None:
    host = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 8)).double()
    x = torch.randn(3, 5, dtype=DOUBLE)
    model = morph(host, x, blueprint=("widen", "lowrank", "bottleneck"))
    grow(model, "0", [2], "bottleneck")
    grow(model, "2", [0], "lowrank")
    grow(model, "2", [3], "widen")
    check(model, host, x)


def test_dropout_between_is_looked_through_in_eval() -> None:
    host = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 4)).double()
    x = torch.randn(3, 5, dtype=DOUBLE)
    model = morph(host, x, blueprint="widen")
    grow(model, "3", [0], "widen")
    check(model, host, x)


def test_batch_norm_channels_are_not_exact_in_training() -> None:
    """What the docs say of train mode is so: new channels are normalised there."""
    torch.manual_seed(3)
    host = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4)).double()
    x = torch.randn(16, 5, dtype=DOUBLE)
    model = morph(host, x, blueprint="widen")
    grow(model, "3", [0], "widen")
    folded = check(model, host, x)
    assert distance(model.train()(x), folded.train()(x)) > 1e-3


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.c = nn.Linear(6, 6)
        self.c.weight = self.a.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(x) + self.b(torch.relu(self.a(x)))


def test_shared_weight_in_a_block_is_refused_with_the_reason() -> None:
    host, x = Shared().double(), torch.randn(3, 6, dtype=DOUBLE)
    model = morph(host, x, blueprint="widen")
    grow(model, "b", [0, 2], "widen")
    message = (
        r"seeds \[0, 2\] of 'b' \(widen\).*the weight of 'a' is shared with another layer; .*morphc\.save"
    )
    with pytest.raises(FoldError, match=message):
        morphc.fold(model)
    assert model.a.out_features == 6


@pytest.mark.parametrize("blend", ["multiply", "gate"])
def test_other_blends_are_refused(blend: str) -> None:
    host = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 4)).double()
    model = morph(host, torch.randn(3, 5, dtype=DOUBLE), blueprint="widen", blend=blend)
    grow(model, "2", [0], "widen")
    with pytest.raises(FoldError, match=f"blend '{blend}' is not linear"):
        morphc.fold(model)


def test_batch_norm_without_statistics_is_refused() -> None:
    norm = nn.BatchNorm1d(8, track_running_stats=False)
    host = nn.Sequential(nn.Linear(5, 8), norm, nn.ReLU(), nn.Linear(8, 4)).double()
    model = morph(host, torch.randn(3, 5, dtype=DOUBLE), blueprint="widen")
    grow(model, "3", [0], "widen")
    with pytest.raises(FoldError, match="'1' has no statistics of its own"):
        morphc.fold(model)


def test_llama_mlp() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(4)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=13
    )
    host = LlamaForCausalLM(config).double().eval()
    ids = torch.tensor([[1, 5, 7]])
    model = morph(host, ids, blueprint=("widen", "lowrank"))
    grow(model, "model.layers.0.mlp.down_proj", [0, 1], "widen")
    grow(model, "model.layers.0.self_attn.q_proj", [3], "lowrank")
    folded = check(model, host, ids)
    mlp = folded.model.layers[0].mlp
    assert (mlp.gate_proj.out_features, mlp.up_proj.out_features, mlp.down_proj.in_features) == (30, 30, 30)
    assert type(folded) is LlamaForCausalLM
    assert folded.generate(ids, max_new_tokens=2, do_sample=False).shape == (1, 5)
