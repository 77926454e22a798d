"""Recurrent layers that are fed packed sequences: their sites work on the rows of the data."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence

import morphc
from morphc import Config, Lifecycle
from morphc.passes.verify import same_bits

BLUEPRINTS = ("bottleneck", "affine", "lowrank")


class Tagger(nn.Module):
    """Batch first; `by_name` gives the layer its input by name, `state` a first hidden state."""

    def __init__(
        self, layer: nn.RNNBase, by_name: bool = False, state: bool = False, sort: bool = True
    ) -> None:
        super().__init__()
        self.layer = layer
        self.by_name, self.state, self.sort = by_name, state, sort
        self.head = nn.Linear((layer.proj_size or 6) * (1 + layer.bidirectional), 3)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=self.sort)
        given: dict[str, Any] = {}
        if self.state:
            given["hx"] = x.new_ones((1 + self.layer.bidirectional) * self.layer.num_layers, len(x), 6)
        out = self.layer(input=packed, **given) if self.by_name else self.layer(packed, *given.values())
        y: Tensor = self.head(pad_packed_sequence(out[0], batch_first=True)[0])
        return y


HOSTS = {
    "lstm": lambda: Tagger(nn.LSTM(5, 6, batch_first=True)),
    "gru": lambda: Tagger(nn.GRU(5, 6, batch_first=True)),
    "rnn": lambda: Tagger(nn.RNN(5, 6, batch_first=True)),
    "gru_with_a_state": lambda: Tagger(nn.GRU(5, 6, batch_first=True), state=True),
    "by_name": lambda: Tagger(nn.GRU(5, 6, batch_first=True), by_name=True, state=True),
    "unsorted": lambda: Tagger(nn.LSTM(5, 6, batch_first=True), sort=False),
    "projected_both_ways": lambda: Tagger(
        nn.LSTM(5, 6, num_layers=2, batch_first=True, bidirectional=True, proj_size=2), sort=False
    ),
}


def example(host: Tagger) -> tuple[Tensor, Tensor]:
    return torch.randn(3, 4, 5), torch.tensor([4, 3, 1] if host.sort else [2, 4, 1])


def grown(model: nn.Module, path: str, blueprint: str) -> None:
    """Two seeds that blend, with parameters that do something."""
    site = morphc.seeds(model)[path]
    site.assign([0, 2], Lifecycle.FINE_TUNING, blueprint=blueprint)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "morphc." in name:
                parameter.copy_(torch.randn_like(parameter) * 0.3)


def compiled(host: nn.Module, inputs: tuple[Any, ...]) -> nn.Module:
    config = Config(seeds_per_layer=3, slots=2, kinds=("linear", "rnn"), blueprint=BLUEPRINTS, rank=2)
    return morphc.compile(host, inputs, config=config)


@pytest.mark.parametrize("make", HOSTS.values(), ids=HOSTS.keys())
def test_a_dormant_site_changes_nothing(make: Any) -> None:
    host = make()
    inputs = example(host)
    model = compiled(host, inputs)
    assert list(morphc.seeds(model).sites) == ["layer", "head"]
    for training in (True, False):
        model.train(training)
        host.train(training)
        assert same_bits(model(*inputs), host(*inputs))


@pytest.mark.parametrize("blueprint", BLUEPRINTS)
@pytest.mark.parametrize("make", HOSTS.values(), ids=HOSTS.keys())
def test_a_grown_layer_learns_and_folds(make: Any, blueprint: str) -> None:
    host = make()
    inputs = example(host)
    model = compiled(host, inputs)
    grown(model, "layer", blueprint)
    y = model(*inputs)
    assert not torch.equal(y, host(*inputs))
    y.sum().backward()
    grads = morphc.runtime.store.store_of(model).sites["layer"].slots.get(blueprint).grads()
    assert all(grad is not None and grad.abs().sum() > 0 for grad in grads.values())
    folded = morphc.fold(model)
    assert torch.allclose(folded(*inputs), y, atol=1e-5)
    folded(*inputs).sum().backward()
    padded = torch.randn(3, 4, 5)
    assert torch.allclose(folded.layer(padded)[0], model.layer(padded)[0], atol=1e-5)
    again = pickle.loads(pickle.dumps(folded))
    assert same_bits(again(*inputs), folded(*inputs))


def test_a_packed_and_a_padded_layer_are_one() -> None:
    """Sequences of equal lengths: packing changes the order of the rows alone."""
    host = HOSTS["lstm"]()
    x = torch.randn(3, 4, 5)
    model = compiled(host, (x, torch.tensor([4, 4, 4])))
    grown(model, "layer", "lowrank")
    packed = pack_padded_sequence(x, torch.tensor([4, 4, 4]), batch_first=True)
    unpacked, _ = pad_packed_sequence(model.layer(packed)[0], batch_first=True)
    assert torch.allclose(unpacked, model.layer(x)[0], atol=1e-6)


class ValueAlone(nn.LSTM):
    def forward(self, input: Any, hx: Any = None) -> Any:
        return super().forward(input, hx)[0]


@pytest.mark.parametrize("packed", [False, True])
def test_a_layer_that_returns_its_value_without_a_tuple_folds(packed: bool) -> None:
    x = pack_sequence([torch.randn(3, 5), torch.randn(2, 5)]) if packed else torch.randn(3, 2, 5)
    model = compiled(ValueAlone(5, 6), (x,))
    grown(model, "", "bottleneck")
    got, expected = morphc.fold(model)(x), model(x)
    assert type(got) is type(expected)
    if isinstance(got, PackedSequence):
        got, expected = got.data, expected.data
    assert torch.allclose(got, expected, atol=1e-5)
