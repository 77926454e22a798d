"""Blocks that are compiled one by one inside a model that is not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import morphc
from morphc import Lifecycle


class Block(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.act(self.up(x)))


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.layers:
            x = block(x)
        return self.head(x)


def made() -> tuple[Stack, list[morphc.Grower]]:
    torch.manual_seed(0)
    model = Stack()
    config = morphc.Config(seeds_per_layer=2, slots=2, rank=3, blueprint="widen", backend="torch")
    growers = []
    for name, block in model.layers.named_children():
        setattr(model.layers, name, morphc.compile(block, (torch.zeros(2, 8),), config=config))
        own = getattr(model.layers, name)
        optimizer = torch.optim.AdamW(own.parameters(), lr=0.01)
        controller = morphc.ScheduleController([])
        growers.append(morphc.Grower(own, optimizer, controller, lambda _: 1.0, tick_every=1))
    return model, growers


def train(model: Stack, growers: list[morphc.Grower], steps: int) -> None:
    x = torch.randn(32, 8, generator=torch.Generator().manual_seed(1))
    for _ in range(steps):
        loss = (model(x) - x[:, :3].tanh()).square().mean()
        model.zero_grad()
        loss.backward()
        for grower in growers:
            grower.optimizer.step()
            grower.step(loss)


@pytest.mark.parametrize("compiled", [False, True])
def test_every_block_learns_and_is_folded_in_its_place(compiled):
    model, growers = made()
    for block in model.layers if compiled else ():
        block.compile(fullgraph=True, backend="aot_eager")
    for grower in growers:
        grower.seeds["down"].assign([0], Lifecycle.FINE_TUNING)
    train(model, growers, 5)
    x = torch.randn(4, 8)
    expected = model(x)
    assert not torch.equal(expected, Stack.forward(plain(model, morphc.detach), x))
    folded = plain(model, morphc.fold)
    assert [block.up.out_features for block in folded.layers] == [16 + 3, 16 + 3]
    torch.testing.assert_close(folded(x), expected, rtol=1e-5, atol=1e-6)
    assert not any("morphc" in name for name in folded.state_dict())


def plain(model: Stack, how) -> Stack:
    out = Stack()
    out.head = model.head
    for name, block in model.layers.named_children():
        setattr(out.layers, name, how(block))
    return out


def test_a_rollback_in_one_block_leaves_the_other_alone():
    model, growers = made()
    train(model, growers, 2)
    growers[0].seeds["down"].assign([0], Lifecycle.TRAINING)
    before = [{name: value.clone() for name, value in block.state_dict().items()} for block in model.layers]
    kept = growers[0].snapshot()
    train(model, growers, 3)
    after = {name: value.clone() for name, value in model.layers[1].state_dict().items()}
    growers[0].restore(kept)
    assert all(
        torch.equal(value, before[0][name])
        for name, value in model.layers[0].state_dict().items()
        if "sums" not in name and "counts" not in name
    )
    assert all(torch.equal(value, after[name]) for name, value in model.layers[1].state_dict().items())
    assert not torch.equal(after["up.weight"], before[1]["up.weight"])
