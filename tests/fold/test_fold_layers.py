"""Each kind of layer folds to the same outputs, in the form that the design's table names."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from growth import BOUNDS, DTYPES, check, grow, how, morph
from torch import nn
from torch.nn import functional as F

import morphc
from morphc import Lifecycle
from morphc.errors import FoldError, NotMorphedError


def mlp(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 22), nn.GELU(), nn.Linear(22, 10, bias=False)).to(dtype).eval()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("blend", ["residual", "lerp", "multiply", "gate"])
def test_outputs_are_equal_within_the_stated_bound(dtype: torch.dtype, blend: str) -> None:
    host, x = mlp(dtype), torch.randn(5, 12, dtype=dtype)
    linear = blend in ("residual", "lerp")
    model = morph(host, x, blend=blend, blueprint=("affine", "lowrank", "bottleneck", "widen"))
    grow(model, "0", [0], "affine")
    grow(model, "0", [1, 3], "bottleneck")
    grow(model, "0", [2], "lowrank")
    grow(model, "2", [0], "affine")
    grow(model, "2", [1], "lowrank")
    grow(model, "2", [2, 3], "widen" if linear else "bottleneck")
    check(model, host, x, bound=BOUNDS[dtype])
    forms = how(model)
    assert forms["0", "affine"].startswith("own weights" if linear else "small module (blend")
    assert forms["0", "bottleneck"] == "small module"


@pytest.mark.parametrize("state", list(Lifecycle), ids=lambda state: state.name)
def test_only_states_that_blend_are_folded(state: Lifecycle) -> None:
    host, x = mlp(), torch.randn(5, 12, dtype=torch.float64)
    model = morph(host, x)
    grow(model, "0", [0, 2], "bottleneck")
    morphc.seeds(model)["0"].assign([0, 2], state, alpha=0.5)
    folded = morphc.fold(model)
    blends = 3 <= state <= 7
    assert torch.equal(folded(x), host(x)) is not blends
    torch.testing.assert_close(folded(x), model.eval()(x), rtol=1e-12, atol=1e-12)


def test_alpha_zero_is_not_folded() -> None:
    host, x = mlp(), torch.randn(5, 12, dtype=torch.float64)
    model = morph(host, x)
    grow(model, "0", [1], "affine", alpha=0.0, state=Lifecycle.GRAFTING)
    assert how(model) == {}
    assert torch.equal(morphc.fold(model)(x), host(x))


def test_dormant_model_folds_to_its_host_bitwise() -> None:
    host, x = mlp(), torch.randn(5, 12, dtype=torch.float64)
    folded = morphc.fold(morph(host, x))
    assert type(folded) is type(host)
    assert torch.equal(folded(x), host(x))
    assert list(folded.state_dict()) == list(host.state_dict())
    assert all(a is b for a, b in zip(folded.parameters(), host.parameters(), strict=True))


def test_rows_of_other_seeds_keep_their_bits() -> None:
    host, x = mlp(torch.float32), torch.randn(5, 12)
    model = morph(host, x)
    grow(model, "0", [1], "affine")
    weight, before = morphc.fold(model).get_parameter("0.weight"), host.get_parameter("0.weight")
    changed = (weight != before).any(1).nonzero().view(-1).tolist()
    assert changed == list(range(6, 12))  # 22 features in 4 chunks: 6, 6, 5, 5


def test_merged_parameters_keep_their_flags_and_tags() -> None:
    host, x = mlp(), torch.randn(5, 12, dtype=torch.float64)
    host[0].weight.tag = "sharded"
    host[0].weight.requires_grad_(False)
    model = morph(host, x)
    grow(model, "0", [1], "lowrank")
    weight = check(model, host, x)[0].weight
    assert weight is not host[0].weight
    assert weight.tag == "sharded"
    assert not weight.requires_grad


def test_bias_is_only_added_where_a_shift_needs_it() -> None:
    host, x = mlp(), torch.randn(5, 12, dtype=torch.float64)
    model = morph(host, x)
    grow(model, "2", [0], "lowrank")
    assert "2.bias" not in morphc.fold(model).state_dict()
    grow(model, "2", [1], "affine")
    folded = check(model, host, x)
    assert folded.get_parameter("2.bias").shape == (10,)


def test_layer_called_twice_merges() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8, dtype=torch.float64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(self.fc(x).tanh())

    host, x = Twice(), torch.randn(3, 8, dtype=torch.float64)
    model = morph(host, x)
    grow(model, "fc", [0], "lowrank")
    grow(model, "fc", [2], "affine")
    grow(model, "fc", [3], "bottleneck")
    check(model, host, x)
    assert how(model)["fc", "lowrank"] == "own weights"


CONVS = [
    (nn.Conv1d, 1, {}),
    (nn.Conv2d, 2, {"padding": 1, "stride": 2, "bias": False}),
    (nn.Conv2d, 2, {"padding": 1, "padding_mode": "reflect", "dilation": 1}),
    (nn.Conv3d, 3, {"padding": "same"}),
]


@pytest.mark.parametrize(
    ("kind", "axes", "options"), CONVS, ids=["1d", "2d-strided", "2d-reflect", "3d-same"]
)
@pytest.mark.parametrize("blend", ["residual", "lerp"])
def test_convolutions_merge(kind: type[nn.Module], axes: int, options: dict[str, object], blend: str) -> None:
    torch.manual_seed(1)
    host = nn.Sequential(kind(3, 10, 3, **options), nn.ReLU()).double()
    x = torch.randn(2, 3, *(8,) * axes, dtype=torch.float64)
    model = morph(host, x, blend=blend, blueprint=("affine", "lowrank", "depthwise", "bottleneck"))
    grow(model, "0", [0], "affine")
    grow(model, "0", [1], "lowrank")
    grow(model, "0", [2], "depthwise")
    grow(model, "0", [3], "bottleneck")
    folded = check(model, host, x)
    forms = how(model)
    assert (forms["0", "affine"], forms["0", "lowrank"]) == ("own weights", "own weights")
    assert (forms["0", "depthwise"], forms["0", "bottleneck"]) == ("small module", "small module")
    torch.testing.assert_close(folded(x[0]), folded(x)[0])  # an input without a batch axis


def test_channels_last_and_groups() -> None:
    torch.manual_seed(2)
    host = nn.Sequential(nn.Conv2d(4, 12, 3, groups=2), nn.ConvTranspose2d(12, 8, 2)).double()
    x = torch.randn(2, 4, 7, 7, dtype=torch.float64).to(memory_format=torch.channels_last)
    model = morph(host, x, blueprint=("affine", "bottleneck"))
    grow(model, "0", [0, 3], "affine")
    grow(model, "0", [1], "bottleneck")
    grow(model, "1", [2], "affine")
    folded = check(model, host, x)
    assert how(model)["0", "affine"] == how(model)["1", "affine"] == "own weights"
    assert folded.eval()(x).stride() == model.eval()(x).stride()


NORMS = [
    (nn.LayerNorm(12), (4, 12), "own weights"),
    (nn.LayerNorm(12, bias=False), (4, 12), "own weights"),
    (nn.LayerNorm(12, elementwise_affine=False), (4, 12), "small module"),
    (nn.RMSNorm(12), (4, 12), "small module"),
    (nn.BatchNorm1d(12), (4, 12), "own weights"),
    (nn.BatchNorm2d(12), (4, 12, 3, 3), "own weights"),
    (nn.BatchNorm2d(12, affine=False), (4, 12, 3, 3), "small module"),
    (nn.GroupNorm(3, 12), (4, 12, 3, 3), "own weights"),
]


@pytest.mark.parametrize(
    ("layer", "shape", "form"), NORMS, ids=lambda v: str(v) if isinstance(v, nn.Module) else ""
)
def test_norms(layer: nn.Module, shape: tuple[int, ...], form: str) -> None:
    host = nn.Sequential(nn.Identity(), layer.double())
    x = torch.randn(shape, dtype=torch.float64)
    model = morph(host, x, kinds=("norm",), blueprint=("affine", "bottleneck"))
    grow(model, "1", [0, 2], "affine")
    assert how(model)["1", "affine"].startswith(form)
    check(model, host, x)
    grow(model, "1", [1], "bottleneck")
    check(model, host, x)


def test_embedding_takes_the_shift_into_its_rows() -> None:
    host = nn.Sequential(nn.Embedding(7, 12, padding_idx=0)).double()
    x = torch.tensor([[0, 3, 6]])
    model = morph(host, x, kinds=("embedding",), blueprint=("affine", "bottleneck"))
    grow(model, "0", [0, 3], "affine")
    check(model, host, x)
    assert how(model)["0", "affine"] == "own weights"


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 12)
        self.body = nn.Linear(12, 12)
        self.head = nn.Linear(12, 9, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.embed(ids)))


def test_tied_weights_stay_tied_beside_a_small_module() -> None:
    torch.manual_seed(3)
    host, ids = Tied().double(), torch.tensor([[1, 2, 8]])
    model = morph(host, ids)
    grow(model, "head", [0], "affine")
    grow(model, "head", [1], "lowrank")
    grow(model, "body", [2], "affine")
    folded = check(model, host, ids)
    assert how(model)["head", "lowrank"] == "small module (its weight is shared with another layer)"
    assert how(model)["body", "affine"] == "own weights"
    assert folded.head.weight is folded.embed.weight
    assert set(folded.state_dict()) >= set(host.state_dict())
    assert all(".grown." in key for key in set(folded.state_dict()) - set(host.state_dict()))


@pytest.mark.parametrize(
    "wrap", [nn.utils.parametrizations.weight_norm, nn.utils.weight_norm], ids=["parametrization", "legacy"]
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_computed_weights_get_a_small_module(wrap: object) -> None:
    host = nn.Sequential(wrap(nn.Linear(8, 8).double()))  # type: ignore[operator]
    x = torch.randn(3, 8, dtype=torch.float64)
    model = morph(host, x)
    grow(model, "0", [0], "lowrank")
    grow(model, "0", [1], "affine")
    folded = check(model, host, x)
    assert "computed on each call" in how(model)["0", "affine"]
    assert set(folded.state_dict()) >= set(host.state_dict())


class Scaled(nn.Linear):
    """Inherits a Linear's weights and computes something else with them."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x.square(), self.weight, self.bias)


class Int8Linear(nn.Module):
    """As quantization packages bring them: codes and scales in buffers."""

    __module__ = "some_quantizer"

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = 8, 8
        self.register_buffer("weight", torch.randint(-9, 9, (8, 8), dtype=torch.int8))
        self.register_buffer("scales", torch.rand(8, 1, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.weight * self.scales).T


@pytest.mark.parametrize(
    "kind", [lambda: Scaled(8, 8).double(), Int8Linear], ids=["own forward", "quantized"]
)
def test_layers_that_compute_in_their_own_way_get_a_small_module(kind: Callable[[], nn.Module]) -> None:
    torch.manual_seed(8)
    host, x = nn.Sequential(kind(), nn.Tanh()), torch.randn(3, 8, dtype=torch.float64)
    model = morph(host, x, blend="lerp")
    grow(model, "0", [0], "lowrank")
    grow(model, "0", [1], "affine")
    folded = check(model, host, x)
    assert "no layer whose weights are known" in how(model)["0", "lowrank"]
    assert type(folded[0]) is type(host[0])


def test_attention_out_projection() -> None:
    torch.manual_seed(4)
    host = nn.MultiheadAttention(12, 3, batch_first=True).double()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    model = morph(host, x, x, x)
    grow(model, "out_proj", [0], "affine")
    check(model, host, x, x, x)
    assert how(model) == {("out_proj", "affine"): "own weights"}
    grow(model, "out_proj", [1], "lowrank")
    grow(model, "out_proj", [2], "bottleneck")
    folded = check(model, host, x, x, x)
    assert how(model)["out_proj", "lowrank"].endswith("reads the input of the module that owns the layer)")
    named = folded(query=x, key=x, value=x, need_weights=False)
    torch.testing.assert_close(named[0], folded(x, x, x)[0])
    assert named[1] is None


def test_encoder_with_its_fast_path() -> None:
    torch.manual_seed(5)
    layer = nn.TransformerEncoderLayer(12, 2, 24, dropout=0.0, batch_first=True)
    host = nn.TransformerEncoder(layer, 2).double()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    model = morph(host, x, blueprint=("affine", "bottleneck", "widen"))
    grow(model, "layers.0.linear1", [0], "bottleneck")
    grow(model, "layers.0.linear2", [1], "widen")
    grow(model, "layers.1.self_attn.out_proj", [1], "affine")
    check(model, host, x)
    model.eval()
    folded = morphc.fold(model)
    with torch.no_grad():
        a, b = (m(x, src_key_padding_mask=padding) for m in (model, folded))
    torch.testing.assert_close(a[0], b[0], rtol=1e-10, atol=1e-10)


def test_rnn_output_gets_a_small_module_and_keeps_its_tuple() -> None:
    host = nn.LSTM(6, 8, batch_first=True).double()
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    model = morph(host, x, kinds=("rnn",), blueprint=("affine", "bottleneck"))
    grow(model, "", [0], "affine")
    grow(model, "", [3], "bottleneck")
    folded = check(model, host, x)
    out, (h, _) = folded(x)
    assert out.shape == (2, 5, 8)
    assert h.shape == (1, 2, 8)


def test_transformers_conv1d_has_its_weight_transposed() -> None:
    from transformers import GPT2Config, GPT2Model

    torch.manual_seed(6)
    host = GPT2Model(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=11, n_positions=8)).double().eval()
    ids = torch.tensor([[1, 2, 3]])
    model = morph(host, ids, blueprint=("affine", "lowrank", "widen"))
    grow(model, "h.0.attn.c_attn", [0], "lowrank")
    grow(model, "h.0.attn.c_proj", [1], "affine")
    grow(model, "h.0.mlp.c_proj", [1, 2], "widen")
    folded = check(model, host, ids)
    assert set(how(model).values()) == {"own weights", "wider layers"}
    assert (folded.h[0].mlp.c_fc.nf, folded.h[0].mlp.c_proj.nx) == (70, 70)
    assert list(folded.state_dict()) == list(host.state_dict())


class Functional(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.w = nn.Parameter(torch.randn(12, 12, dtype=torch.float64))
        self.v = nn.Parameter(torch.randn(12, 12, dtype=torch.float64))
        self.b = nn.Parameter(torch.randn(12, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        forms = {
            "linear": lambda: F.linear(x, self.w, self.b),
            "linear_t": lambda: F.linear(x, self.w.t(), self.b),
            "addmm": lambda: torch.addmm(self.b, x, self.w),
            "addmm_T": lambda: torch.addmm(self.b, x, self.w.T),
            "matmul": lambda: torch.matmul(x, self.w),
        }
        return F.linear(torch.tanh(forms[self.form]()), self.v)


@pytest.mark.parametrize("form", ["linear", "linear_t", "addmm", "addmm_T"])
@pytest.mark.parametrize("blend", ["residual", "lerp"])
def test_functional_layers_merge_into_their_parameter(form: str, blend: str) -> None:
    torch.manual_seed(7)
    host, x = Functional(form), torch.randn(4, 12, dtype=torch.float64)
    model = morph(host, x, blueprint="affine", blend=blend)
    grow(model, "w", [0, 2], "affine")
    folded = check(model, host, x)
    assert how(model)["w", "affine"] == "own weights"
    assert list(folded.state_dict()) == list(host.state_dict())


def test_functional_layers_that_can_t_merge_are_refused_with_a_way_out() -> None:
    host, x = Functional("matmul"), torch.randn(4, 12, dtype=torch.float64)
    model = morph(host, x, blueprint=("affine", "bottleneck"))
    grow(model, "w", [1], "affine")
    with pytest.raises(FoldError, match=r"seeds \[1\] of 'w'.* no bias .*nn\.Linear"):
        morphc.fold(model)
    with torch.no_grad():
        morphc.seeds(model)["w"].slots["affine"].get_parameter("shift").zero_()
    check(model, host, x)
    grow(model, "v", [1], "bottleneck")
    with pytest.raises(FoldError, match="has no place for one"):
        morphc.fold(model)


def test_plain_models_are_refused() -> None:
    with pytest.raises(NotMorphedError):
        morphc.fold(nn.Linear(2, 2))
