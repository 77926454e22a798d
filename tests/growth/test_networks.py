"""The networks that the growth experiments' baselines run on, against torch's own layers and optimizer."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

pytest.importorskip("scipy")

from benchmarks.growth.batched import Networks, cross_entropy_delta, draw_network, draw_rows
from benchmarks.growth.common import paired

SIZES = (7, 6, 5, 4)


def networks(rows: int) -> Networks:
    drawn = [draw_network(SIZES, torch.Generator().manual_seed(row)) for row in range(rows)]
    return Networks(torch.stack(drawn), SIZES)


def module(side_by_side: Networks, row: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for weight, bias in zip(side_by_side.weight, side_by_side.bias, strict=True):
        layer = nn.Linear(weight.shape[2], weight.shape[1])
        layer.weight.data.copy_(weight[row])
        layer.bias.data.copy_(bias[row])
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def test_networks_side_by_side_train_as_each_does_alone() -> None:
    draw = torch.Generator().manual_seed(9)
    many = networks(3)
    alone = [module(many, row) for row in range(3)]
    optimizers = [torch.optim.Adam(host.parameters(), lr=1e-2) for host in alone]
    for _ in range(5):
        x = torch.randn(3, 8, 7, generator=draw)
        labels = torch.randint(4, (3, 8), generator=draw)
        values = many.forward(x)
        many.backward(values, cross_entropy_delta(values[-1], labels))
        many.adam(1e-2)
        for row, (host, optimizer) in enumerate(zip(alone, optimizers, strict=True)):
            optimizer.zero_grad()
            functional.cross_entropy(host(x[row]), labels[row]).backward()
            optimizer.step()
    for row, host in enumerate(alone):
        flat = torch.cat([p.detach().flatten() for p in host.parameters()])
        torch.testing.assert_close(many.flat[row], flat, rtol=1e-4, atol=1e-5)


def test_a_recycled_unit_starts_anew_and_no_other() -> None:
    many = networks(2)
    many.first.fill_(1.0)
    mask = torch.zeros(2, 6, dtype=torch.bool)
    mask[1, 3] = True
    before = many.flat.clone()
    fresh = draw_rows(torch.Generator().manual_seed(1), 12, 7).view(2, 6, 7)
    many.recycle(0, mask, fresh)
    assert torch.equal(many.flat[0], before[0])
    assert torch.equal(many.weight[0][1, 3], fresh[1, 3])
    assert not many.weight[1][1, :, 3].any()
    assert many.bias[0][1, 3] == 0
    assert int((many.first[1] == 0).sum()) == 7 + 1 + 5
    weights, _ = many.layers(before)
    kept = [unit for unit in range(6) if unit != 3]
    assert torch.equal(many.weight[0][1, kept], weights[0][1, kept])
    assert torch.equal(many.weight[1][1][:, kept], weights[1][1][:, kept])


def test_adam_starts_anew_in_one_network_alone() -> None:
    many = networks(2)
    many.gradient.fill_(1.0)
    many.adam(1e-2)
    many.reset_moments(torch.tensor([False, True]))
    assert many.first[0].all()
    assert not many.first[1].any()
    assert many.steps.flatten().tolist() == [1.0, 0.0]


def test_a_paired_difference_counts_wins_in_the_direction_asked_for() -> None:
    found = paired([1.0, 2.0, 3.0], [2.0, 2.5, 2.0], higher=False)
    assert found["wins"] == 2
    assert found["pairs"] == 3
    assert found["mean"] == pytest.approx(-1 / 6)
