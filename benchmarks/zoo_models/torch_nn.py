"""torch.nn: recurrent networks, attention, transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .registry import Inputs, features, floats, ids, rng, zoo

SEQUENCE: dict[str, Any] = {"length": 10, "other_length": 6}


def token_matrix(batch: int, length: int) -> Inputs:
    """Ids, by position."""
    return (ids(batch, length),), {}


def token_matrix_masked(batch: int, length: int) -> Inputs:
    """Ids and a padding mask that hides the first row's tail."""
    mask = torch.zeros(batch, length, dtype=torch.bool)
    mask[0, -2:] = True
    return (ids(batch, length), mask), {}


def source_target(batch: int, length: int) -> Inputs:
    """Two float sequences of width 32."""
    return (floats(batch, length, 32), floats(batch, length - 2, 32)), {}


def query_key_value(batch: int, length: int) -> Inputs:
    """Queries of width 32, keys of 24, values of 20."""
    return (floats(batch, length, 32), floats(batch, length + 3, 24), floats(batch, length + 3, 20)), {}


@zoo("lstm_classifier", "torch.nn", token_matrix, **SEQUENCE)
class LstmClassifier(nn.Module):
    """Two bidirectional LSTM layers with dropout between; the last state is classified."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(96, 32)
        self.lstm = nn.LSTM(32, 32, num_layers=2, bidirectional=True, dropout=0.1, batch_first=True)
        self.head = nn.Linear(64, 64)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        states, (last, _) = self.lstm(self.embedding(tokens))
        return self.head(states[:, -1]), last


@zoo("gru_seq2seq", "torch.nn", source_target, **SEQUENCE)
class GruSeq2Seq(nn.Module):
    """A GRU encodes, another decodes step by step in a Python loop (GRUCell)."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.GRU(32, 48, batch_first=True)
        self.cell = nn.GRUCell(32, 48)
        self.out = nn.Linear(48, 64)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        _, hidden = self.encoder(source)
        state, outputs = hidden[0], []
        for step in target.unbind(1):
            state = self.cell(step, state)
            outputs.append(self.out(state))
        return torch.stack(outputs, 1)


@zoo("lstm_projected_packed", "torch.nn", features(-1, 32), **SEQUENCE)
class PackedLstm(nn.Module):
    """LSTM with proj_size over a packed sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(32, 64)
        self.lstm = nn.LSTM(64, 64, proj_size=32)

    def forward(self, x: Tensor) -> Tensor:
        lengths = torch.arange(x.shape[1], x.shape[1] - x.shape[0], -1)
        packed = nn.utils.rnn.pack_padded_sequence(self.proj(x), lengths, batch_first=True)
        return nn.utils.rnn.pad_packed_sequence(self.lstm(packed)[0], batch_first=True)[0]


@zoo("rnn_tanh", "torch.nn", features(-1, 32), **SEQUENCE)
class PlainRnn(nn.Module):
    """nn.RNN returns a tuple through a Sequential-like wrapper."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.RNN(32, 64, nonlinearity="relu", batch_first=True)
        self.head = nn.Sequential(nn.Linear(64, 64), nn.ReLU(inplace=True), nn.Linear(64, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])


@zoo("nn_transformer", "torch.nn", source_target, **SEQUENCE)
def nn_transformer() -> nn.Module:
    """torch.nn.Transformer."""
    return nn.Transformer(32, 4, 2, 2, 64, batch_first=True)


@zoo("transformer_encoder", "torch.nn", features(-1, 32), **SEQUENCE, extras=("fast_path",))
def transformer_encoder() -> nn.Module:
    """torch.nn.TransformerEncoder; eval without gradients takes the fused fast path."""
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


@zoo("transformer_encoder_masked", "torch.nn", token_matrix_masked, **SEQUENCE, extras=("fast_path",))
class MaskedEncoder(nn.Module):
    """TransformerEncoder with a padding mask: the fast path takes nested tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(96, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(32, 64)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.encoder(self.embedding(tokens), src_key_padding_mask=mask))


@zoo("transformer_encoder_prenorm", "torch.nn", features(-1, 32), **SEQUENCE, extras=("fast_path",))
def transformer_encoder_prenorm() -> nn.Module:
    """norm_first, a final norm, no nested tensors."""
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, norm_first=True, batch_first=True)
    return nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(32), enable_nested_tensor=False)


@zoo("transformer_encoder_frozen", "torch.nn", features(-1, 32), **SEQUENCE, extras=("fast_path",))
def transformer_encoder_frozen() -> nn.Module:
    """Frozen: eval takes the fast path with gradients switched on, too."""
    return transformer_encoder().requires_grad_(False)


@zoo("transformer_decoder", "torch.nn", source_target, **SEQUENCE)
class CausalDecoder(nn.Module):
    """TransformerDecoder with a causal mask."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(32, 4, 64, batch_first=True), 2)

    def forward(self, memory: Tensor, target: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        return self.decoder(target, memory, tgt_mask=mask, tgt_is_causal=True)


class _Attention(nn.Module):
    def __init__(self, weights: bool = True, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, dropout=0.1, **options)
        self.weights = weights
        self.out = nn.Linear(32, 64)

    def forward(self, query: Tensor, key: Tensor | None = None, value: Tensor | None = None) -> Any:
        key = query if key is None else key
        value = key if value is None else value
        mixed, weights = self.attention(query, key, value, need_weights=self.weights)
        return self.out(mixed), weights


@zoo("attention_self", "torch.nn", features(-1, 32), **SEQUENCE)
def attention_self() -> nn.Module:
    """MultiheadAttention, batch first, with weights."""
    return _Attention(batch_first=True)


@zoo("attention_no_weights", "torch.nn", features(-1, 32), **SEQUENCE)
def attention_no_weights() -> nn.Module:
    """MultiheadAttention, sequence first, through scaled_dot_product_attention."""
    return _Attention(weights=False)


@zoo("attention_kdim_vdim", "torch.nn", query_key_value, **SEQUENCE)
def attention_kdim_vdim() -> nn.Module:
    """Three separate in-projections."""
    return _Attention(kdim=24, vdim=20, batch_first=True)


@zoo("attention_bias_kv", "torch.nn", features(-1, 32), **SEQUENCE)
def attention_bias_kv() -> nn.Module:
    """add_bias_kv, add_zero_attn, no bias."""
    return _Attention(add_bias_kv=True, add_zero_attn=True, bias=False, batch_first=True)


@zoo("attention_root", "torch.nn", lambda batch, length: (
    (floats(batch, length, 64), floats(batch, length, 64), floats(batch, length, 64)), {},
), **SEQUENCE)  # fmt: skip
def attention_root() -> nn.Module:
    """MultiheadAttention is the root."""
    return nn.MultiheadAttention(64, 4, batch_first=True)


@zoo(
    "attention_unbatched",
    "torch.nn",
    lambda _, length: ((floats(length, 32),), {}),
    **SEQUENCE,
    other_batch=None,
)
def attention_unbatched() -> nn.Module:
    """A single sequence without a batch axis."""
    return _Attention()


@zoo("adaptive_softmax", "torch.nn", lambda batch, length: (
    (floats(batch * 8, 32), torch.randint(0, 60, (batch * 8,), generator=rng(batch, length))), {},
))  # fmt: skip
def adaptive_softmax() -> nn.Module:
    """AdaptiveLogSoftmaxWithLoss: a named tuple out, branches on which targets occur."""
    return nn.AdaptiveLogSoftmaxWithLoss(32, 64, [16, 40])


@zoo("bilinear_mix", "torch.nn", lambda batch, _: ((floats(batch, 16), floats(batch, 24)), {}))
class BilinearMix(nn.Module):
    """nn.Bilinear, PReLU, CosineSimilarity, an EmbeddingBag."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Bilinear(16, 24, 32)
        self.act = nn.PReLU()
        self.bag = nn.EmbeddingBag(10, 32)
        self.out = nn.Linear(32, 64)
        self.similarity = nn.CosineSimilarity()

    def forward(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        bag = self.bag(torch.arange(left.shape[0]).unsqueeze(1) % 10)
        mixed = self.act(self.mix(left, right)) + bag
        return self.out(mixed), self.similarity(mixed, bag)
