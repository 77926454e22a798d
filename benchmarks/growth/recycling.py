"""Ours on a stream of digits: a compiled network whose units are recycled by their gradients.

Every hidden unit is a seed of its own (chunks of one feature). Telemetry keeps the norm of each unit's gradient
since the last look; every `every` steps the units at most `tau` times their layer's mean start anew: fresh
incoming weights (drawn, or the best of many drawn), nothing outgoing, no moments, and L2-init pulls them towards
what they now are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

import morphc
from benchmarks.growth.batched import Networks, draw_rows
from benchmarks.growth.plasticity import LR, SIZES, Outcome, Spikes, Stream, best_first, initial

SITES = ("0", "2")


@dataclass(frozen=True)
class Recycling:
    """l2_init, tau, every and reset as in `plasticity.Method`.

    sampled: telemetry on every n-th step. candidates: draws that the recycled units are the best of.
    """

    l2_init: float = 6e-4
    tau: float | None = 0.1
    every: int = 50
    reset: bool = False
    sampled: int = 1
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


class Anchored:
    """Where L2-init pulls each parameter to."""

    def __init__(self, model: nn.Module, strength: float) -> None:
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.anchors = [p.detach().clone() for p in self.parameters]
        self.strength = strength

    def pull(self) -> None:
        """Adds the gradient of `strength * |w - w0|^2`."""
        gradients = [p.grad for p in self.parameters]
        torch._foreach_add_(gradients, self.parameters, alpha=2 * self.strength)
        torch._foreach_sub_(gradients, self.anchors, alpha=2 * self.strength)

    def follow(self, parameter: Tensor, index: tuple[object, ...]) -> None:
        """The anchor of `parameter[index]` becomes its present value."""
        (at,) = (n for n, own in enumerate(self.parameters) if own is parameter)
        self.anchors[at][index] = parameter.detach()[index]


def behind(model: nn.Sequential, x: Tensor, labels: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Per site what its layer reads, and the loss's gradient at what the layer after it writes."""
    values, written = [x], []
    for at, layer in enumerate(model):
        values.append(layer(values[-1]))
        if at in (2, 4):
            written.append(values[-1])
    gradients = torch.autograd.grad(functional.cross_entropy(values[-1], labels), written)
    return {site: (values[int(site)].detach(), gradients[n]) for n, site in enumerate(SITES)}


@torch.no_grad()
def follow(anchors: Anchored, model: nn.Sequential, site: str, units: list[int]) -> None:
    """L2-init's anchor of recycled units is what they now are."""
    layer, after = model[int(site)], model[int(site) + 2]
    anchors.follow(layer.weight, (units,))
    anchors.follow(layer.bias, (units,))
    anchors.follow(after.weight, (slice(None), units))


def train_one(how: Recycling, stream: Stream, seed: int) -> Outcome:
    """One seed of the stream."""
    config = morphc.Config(
        seeds_per_layer=64,
        slots=1,
        rank=1,
        telemetry_every=how.sampled if how.tau is not None else 0,
        gradient_telemetry=how.tau is not None,
    )
    model = morphc.compile(host(seed), torch.zeros(2, 64), config=config)
    seeds = morphc.seeds(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=LR, fused=True)
    anchors, spikes = Anchored(model, how.l2_init), Spikes(1)
    draw = torch.Generator().manual_seed(5000 + seed)
    end, online = torch.zeros(stream.tasks, 1), torch.zeros(stream.tasks, 1)
    recycled = resets = 0
    for step, batch in enumerate(stream.batches([seed]), start=1):
        logits = model(batch.x[0])
        loss = functional.cross_entropy(logits, batch.labels[0])
        online[batch.task] += (logits.argmax(-1) == batch.labels[0]).float().mean()
        if how.reset and bool(spikes(loss.detach().view(1))):
            optimizer.state.clear()
            resets += 1
        optimizer.zero_grad()
        loss.backward()
        if how.l2_init:
            anchors.pull()
        optimizer.step()
        if how.tau is not None and step % how.every == 0:
            health = seeds.telemetry()["gradient_norm"]
            for site in SITES:
                norm = health[seeds[site].rows]
                units = (norm <= how.tau * norm.mean()).nonzero().flatten().tolist()
                if not units:
                    continue
                if not all(seeds[site].recycle(units, optimizer)):
                    raise RuntimeError(f"units of {site!r} could not be recycled")
                if how.candidates > 1:
                    reads, gradient = behind(model, batch.x[0], batch.labels[0])[site]
                    drawn = draw_rows(draw, how.candidates, 64).unsqueeze(0)
                    best = best_first(drawn, reads.unsqueeze(0), gradient.unsqueeze(0))[0]
                    model[int(site)].weight.data[units[: len(best)]] = best[: len(units)]
                follow(anchors, model, site, units)
                recycled += len(units)
            seeds.reset_telemetry()
        if batch.last:
            model.eval()
            with torch.no_grad():
                end[batch.task] = (model(batch.images[0]).argmax(-1) == batch.targets[0]).float().mean()
            model.train()
    online /= stream.steps // stream.tasks
    return Outcome(end, online, torch.tensor([float(recycled)]), torch.tensor([float(resets)]))
