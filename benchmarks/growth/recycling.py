"""Ours on a stream of digits: a compiled network whose units `RecycleController` recycles by their gradients.

Every hidden unit is a seed of its own (chunks of one feature). Telemetry keeps the norm of each unit's gradient;
every `every` steps the units at most `tau` times their layer's mean start anew: fresh incoming weights (drawn, or the
best of many drawn), nothing outgoing, no moments, and L2-init pulls them towards what they now are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

import morphc
from benchmarks.growth.batched import Networks
from benchmarks.growth.plasticity import LR, SIZES, Outcome, Stream, initial

TICK = 25
"""Steps a tick: half of the interval of recycling."""


@dataclass(frozen=True)
class Recycling:
    """l2_init, tau and every as in `plasticity.Method`; reset: at jumps of a tick's mean loss. candidates: draws that
    the units which are recycled together are the best of."""

    l2_init: float = 6e-4
    tau: float = 0.1
    every: int = 50
    reset: bool = False
    candidates: int = 1


def host(seed: int) -> nn.Sequential:
    """The network of a seed, with the weights that the baselines start from."""
    weights, biases = Networks(initial([seed]), SIZES).layers(initial([seed]))
    layers: list[nn.Module] = []
    for weight, bias in zip(weights, biases, strict=True):
        layer = nn.Linear(weight.shape[2], weight.shape[1])
        layer.weight.data.copy_(weight[0])
        layer.bias.data.copy_(bias[0])
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def train_one(how: Recycling, stream: Stream, seed: int) -> Outcome:
    """One seed of the stream."""
    config = morphc.Config(seeds_per_layer=64, slots=1, rank=1, telemetry_every=1, gradient_telemetry=True)
    model = morphc.compile(host(seed), torch.zeros(2, 64), config=config)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=LR, fused=True)
    controller = morphc.RecycleController(
        how.tau,
        how.every,
        by="gradient",
        l2_init=how.l2_init,
        candidates=how.candidates,
        moment_reset="spike" if how.reset else None,
    )
    grower = morphc.Grower(model, optimizer, controller, tick_every=TICK)
    end, online = torch.zeros(stream.tasks, 1), torch.zeros(stream.tasks, 1)
    recycled = 0
    for batch in stream.batches([seed]):
        logits = model(batch.x[0])
        loss = functional.cross_entropy(logits, batch.labels[0])
        online[batch.task] += (logits.argmax(-1) == batch.labels[0]).float().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        recycled += sum(told.ok for told in grower.step(loss).transitions)
        if batch.last:
            model.eval()
            with torch.no_grad():
                end[batch.task] = (model(batch.images[0]).argmax(-1) == batch.targets[0]).float().mean()
            model.train()
    online /= stream.steps // stream.tasks
    return Outcome(end, online, torch.tensor([float(recycled)]))
