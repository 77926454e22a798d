"""The small decoder of the character experiment, and how its feed-forward layers grow."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

import morphc
from benchmarks.growth.batched import draw_rows
from benchmarks.growth.widening import carried


class Sizes(Protocol):
    """What of a setting the model is made from."""

    @property
    def features(self) -> int: ...
    @property
    def blocks(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def context(self) -> int: ...
    @property
    def dropout(self) -> float: ...


class Block(nn.Module):
    """Attention and a feed-forward layer of `hidden` units, each after a norm and added to what came in."""

    def __init__(self, sizes: Sizes, hidden: int) -> None:
        super().__init__()
        features = sizes.features
        self.heads, self.dropout = sizes.heads, sizes.dropout
        self.before_attention, self.before_units = nn.LayerNorm(features), nn.LayerNorm(features)
        self.qkv, self.mix = nn.Linear(features, 3 * features), nn.Linear(features, features)
        self.up, self.act, self.down = nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, features)
        self.drop = nn.Dropout(sizes.dropout)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, features = x.shape
        parts = self.qkv(self.before_attention(x)).view(batch, length, 3, self.heads, features // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4).unbind(0)
        seen = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.drop(self.mix(seen.transpose(1, 2).reshape(batch, length, features)))
        return x + self.drop(self.down(self.act(self.up(self.before_units(x)))))


class Decoder(nn.Module):
    """Characters [batch, length] to logits [batch, length, letters]."""

    def __init__(self, letters: int, sizes: Sizes, hidden: int) -> None:
        super().__init__()
        self.letters = nn.Embedding(letters, sizes.features)
        self.places = nn.Embedding(sizes.context, sizes.features)
        self.blocks = nn.ModuleList(Block(sizes, hidden) for _ in range(sizes.blocks))
        self.norm, self.head = nn.LayerNorm(sizes.features), nn.Linear(sizes.features, letters)
        nn.init.normal_(self.letters.weight, std=0.02)
        nn.init.normal_(self.places.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        x = self.letters(x) + self.places.weight[: x.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Mean cross-entropy in nats; the forward in bfloat16 on a GPU."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=x.device.type == "cuda"):
        logits = model(x)
    return functional.cross_entropy(logits.float().flatten(0, 1), y.flatten())


def make_optimizer(parameters: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.1, fused=True)


def seeded(
    host: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, units: int
) -> tuple[nn.Module, morphc.Grower]:
    """The host with one `widen` seed of `units` behind every feed-forward layer, at work from the next step on."""
    config = morphc.Config(
        include=("blocks.*.up", "blocks.*.down"),
        seeds_per_layer=1,
        blueprint="widen",
        rank=units,
        slots=1,
        seed_lr=3.0,
        telemetry_every=4,
        gradient_telemetry=True,
        isolation_every=1,
        minimum_ticks=(1, 1, 1, 1, 1),
        min_isolated_improvement=-1.0,
        backend="torch",
    )
    model = morphc.compile(host, (x,), config=config, verify=False)
    model.train()
    idle = morphc.CallbackController(lambda seen: ())
    grower = morphc.Grower(model, optimizer, idle, evaluate=lambda model: 0.0, tick_every=1000)
    for path in downs(model):
        (told,) = morphc.seeds(model)[path].germinate([0])
        if not told:
            raise RuntimeError(str(told))
    grower.tick()
    return model, grower


def downs(model: nn.Module) -> list[str]:
    """The sites behind the feed-forward layers; those before them are there for the blocks to be known."""
    return [path for path in morphc.seeds(model).sites if path.endswith("down")]


def grow_by_seeds(
    grower: morphc.Grower,
    host: nn.Module,
    x: Tensor,
    y: Tensor,
    alphas: Sequence[float],
    most: int | None = None,
) -> tuple[nn.Module, torch.optim.Optimizer, float]:
    """Wider layers with the grower's seeds in them, at the strength of least loss on the batch x, y.

    most: graft only so many seeds, those that would take most of the squared gradient at their site. Returned are the
    wider host, an optimizer that knows what the old one knew, and the strength.
    """
    model = grower.model
    seeds, paths = morphc.seeds(model), downs(model)
    learned, norms = grower.learning(), seeds.telemetry()["gradient_norm"]
    gains = {p: learned[p, 0]["isolated_improvement"] * float(norms[seeds[p].rows][0]) ** 2 for p in paths}
    paths.sort(key=gains.__getitem__, reverse=True)
    for path in paths[most:] if most is not None else ():
        seeds[path].cancel([0])
    paths = paths[:most]
    grower.tick()
    for path in paths:
        if int(seeds[path].lifecycle[0]) != morphc.Lifecycle.GRAFTING:
            raise RuntimeError(f"{path!r} was not grafted: {seeds[path].history(0)}")

    def graft(alpha: float) -> None:
        for path in paths:
            seeds[path].assign([0], morphc.Lifecycle.FOSSILIZED, alpha=alpha)

    losses = []
    model.eval()
    with torch.no_grad():
        for alpha in alphas:
            graft(alpha)
            losses.append(float(loss_of(model, x, y)))
    best = alphas[min(range(len(alphas)), key=losses.__getitem__)]
    graft(best)
    model.train()
    wider = morphc.fold(model)
    return wider, carried(grower.optimizer, host, wider, make_optimizer), best


@torch.no_grad()
def grow_by_zeros(
    host: nn.Module, optimizer: torch.optim.Optimizer, units: int
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Wider layers whose new units read at random and write nothing yet."""
    import copy

    wider = copy.deepcopy(host)
    draw = torch.Generator().manual_seed(units)
    for block in wider.blocks:
        fan_in, hidden, features = block.up.in_features, block.up.out_features, block.down.out_features
        up, down = nn.Linear(fan_in, hidden + units), nn.Linear(hidden + units, features)
        fresh = draw_rows(draw, units, fan_in).to(block.up.weight)
        up.weight, up.bias = joined(block.up.weight, fresh), joined(block.up.bias, fresh[:, 0] * 0)
        down.weight = joined(block.down.weight.T, fresh.new_zeros(units, features), turned=True)
        down.bias = block.down.bias
        block.up, block.down = up, down
    return wider, carried(optimizer, host, wider, make_optimizer)


def joined(first: Tensor, second: Tensor, turned: bool = False) -> nn.Parameter:
    """Rows of `second` below those of `first`."""
    both = torch.cat((first, second))
    return nn.Parameter(both.T.contiguous() if turned else both)
