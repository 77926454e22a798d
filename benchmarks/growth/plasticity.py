"""Task streams on the digits, and the baselines that try to stay plastic on them.

The network is a 64-64-64-10 ReLU MLP under Adam 3e-3 with batches of 32, on the 8x8 digits of scikit-learn
scaled to [0, 1]. Every method of a run sees the same initial networks, tasks and batches, seed by seed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional

from benchmarks.growth.batched import Networks, cross_entropy_delta, draw_network, draw_rows

SIZES = (64, 64, 64, 10)
LR = 3e-3
BATCH = 32
SPIKE_FACTOR, SPIKE_MARGIN, SPIKE_EMA, SPIKE_REST = 1.3, 0.3, 0.95, 50


class Batch(NamedTuple):
    """One batch of a stream: x [S, B, 64], labels [S, B]; `last` closes a task."""

    x: Tensor
    labels: Tensor
    task: int
    first: bool
    last: bool
    images: Tensor
    targets: Tensor


@dataclass(frozen=True)
class Stream:
    """Tasks that follow each other without notice.

    kind: `labels` draws new random labels for the same images, `pixels` permutes the pixels anew. images: how
    many of the digits are used. window: the last tasks that count.
    """

    kind: str
    images: int
    epochs: int
    tasks: int
    window: int

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole stream."""
        return self.tasks * self.epochs * (self.images // BATCH)

    def batches(self, seeds: Sequence[int]) -> Iterator[Batch]:
        """Every batch, one row per seed; row s depends on `seeds[s]` alone."""
        digits = load_digits()
        pixels = torch.tensor(digits.data[: self.images] / 16, dtype=torch.float32)
        truth = torch.tensor(digits.target[: self.images])
        draws = [torch.Generator().manual_seed(1000 + seed) for seed in seeds]
        for task in range(self.tasks):
            if self.kind == "labels":
                x = pixels.expand(len(seeds), -1, -1)
                labels = torch.stack([torch.randint(10, (self.images,), generator=draw) for draw in draws])
            else:
                x = torch.stack([pixels[:, torch.randperm(64, generator=draw)] for draw in draws])
                labels = truth.expand(len(seeds), -1)
            for epoch in range(self.epochs):
                order = torch.stack([torch.randperm(self.images, generator=draw) for draw in draws])
                starts = range(0, self.images - BATCH + 1, BATCH)
                for start in starts:
                    index = order[:, start : start + BATCH]
                    yield Batch(
                        x.gather(1, index.unsqueeze(-1).expand(-1, -1, 64)),
                        labels.gather(1, index),
                        task,
                        epoch == 0 and start == 0,
                        epoch == self.epochs - 1 and start == starts[-1],
                        x,
                        labels,
                    )


def initial(seeds: Sequence[int]) -> Tensor:
    """[S, N]: the networks that all methods start from."""
    return torch.stack([draw_network(SIZES, torch.Generator().manual_seed(seed)) for seed in seeds])


@dataclass(frozen=True)
class Method:
    """A way to stay plastic.

    l2_init: pull towards the initial weights, `l2_init * |w - w0|^2` added to the loss. tau: recycle hidden
    units whose score is at most tau times their layer's mean, looked at each `every` steps; None never does.
    criterion: the score, mean over the batch of the `activation` (ReDo) or of |gradient| at the pre-activation
    (`gradient`), averaged with `ema` over steps. shrink: (factor, noise) at each new task (told where it
    begins). reset: Adam starts anew when the loss jumps. candidates: how many incoming weights are drawn for a
    layer's recycled units; those whose outgoing gradient takes most of the batch's loss are taken. start, grow_every:
    the width of the hidden layers at the beginning, and the steps after which each gets one more unit, up to 64.
    """

    l2_init: float = 0.0
    tau: float | None = None
    criterion: str = "activation"
    every: int = 50
    ema: float = 0.99
    shrink: tuple[float, float] | None = None
    reset: bool = False
    candidates: int = 1
    start: int = 64
    grow_every: int = 0


class Spikes:
    """Sees a loss jump: above 1.3 times its average plus 0.3, at most once in 50 steps."""

    def __init__(self, rows: int) -> None:
        self.average = torch.zeros(rows)
        self.weight = torch.zeros(rows)
        self.rest = torch.full((rows,), SPIKE_REST)

    def __call__(self, loss: Tensor) -> Tensor:
        """[R] bool for the losses [R] of one step."""
        self.rest -= 1
        usual = self.average / self.weight.clamp(min=1e-9)
        jumped = (loss > SPIKE_FACTOR * usual + SPIKE_MARGIN) & (self.rest <= 0)
        self.average[jumped] = 0.0
        self.weight[jumped] = 0.0
        self.rest[jumped] = SPIKE_REST
        self.average.mul_(SPIKE_EMA).add_(loss * (1 - SPIKE_EMA))
        self.weight.mul_(SPIKE_EMA).add_(1 - SPIKE_EMA)
        return jumped


def best_first(incoming: Tensor, x: Tensor, gradient: Tensor) -> Tensor:
    """Candidates `incoming` [S, K, in] by what their best outgoing weights would take of the loss, best first.

    x: [S, B, in] what they read, gradient: [S, B, out] at what they write to. For a unit h that is |h' g|^2 / |h|^2.
    """
    hidden = torch.bmm(x, incoming.transpose(1, 2)).relu_()
    gain = torch.bmm(hidden.transpose(1, 2), gradient).square().sum(-1)
    order = (gain / (hidden.square().sum(1) + 1e-6)).argsort(1, descending=True)
    return incoming.gather(1, order.unsqueeze(-1).expand_as(incoming))


class Outcome(NamedTuple):
    """Per method: accuracy per task and seed [T, S], at the task's end and while it was learned, and counts."""

    end: Tensor
    online: Tensor
    recycled: Tensor


def train(methods: Mapping[str, Method], stream: Stream, seeds: Sequence[int]) -> dict[str, Outcome]:
    """All methods on all seeds side by side."""
    settings = list(methods.values())
    count, width = len(seeds), len(seeds) * len(settings)
    groups = [slice(at * count, at * count + count) for at in range(len(settings))]

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values).repeat_interleave(count).unsqueeze(1)

    l2 = column([2 * setting.l2_init for setting in settings])
    ema = column([setting.ema for setting in settings])
    tau = column([-1.0 if setting.tau is None else setting.tau for setting in settings])
    every = column([setting.every for setting in settings])
    by_gradient = column([float(setting.criterion == "gradient") for setting in settings]) > 0
    resets_on = column([float(setting.reset) for setting in settings]).flatten() > 0
    networks = Networks(initial(seeds).repeat(len(settings), 1), SIZES)
    born = torch.tensor([setting.start for setting in settings]).repeat_interleave(count).unsqueeze(1)
    pace = column([float(setting.grow_every) for setting in settings])
    unborn = torch.arange(64) >= born
    if unborn.any():  # A unit without weights has no gradient, and stays as it is.
        for layer in range(2):
            networks.recycle(layer, unborn, torch.zeros(width, 64, 64))
    draws = torch.Generator().manual_seed(2000 + seeds[0])
    spikes = Spikes(width)
    scores, ages = torch.zeros(2, width, 64), torch.zeros(2, width, 64)
    end, online = torch.zeros(stream.tasks, width), torch.zeros(stream.tasks, width)
    recycled = torch.zeros(width)
    recycles = bool((tau >= 0).any() | (pace > 0).any())
    for step, batch in enumerate(stream.batches(seeds), start=1):
        if batch.first and batch.task:
            for group, setting in zip(groups, settings, strict=True):
                if setting.shrink is not None:
                    factor, noise = setting.shrink
                    fresh = torch.stack([draw_network(SIZES, draws) for _ in seeds])
                    networks.flat[group] = factor * networks.flat[group] + noise * fresh
        labels = batch.labels.repeat(len(settings), 1)
        values = networks.forward(batch.x.repeat(len(settings), 1, 1))
        logits = values[-1]
        online[batch.task] += (logits.argmax(-1) == labels).float().mean(1)
        if resets_on.any():
            loss = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
            jumped = spikes(loss.view(width, -1).mean(1)) & resets_on
            if jumped.any():
                networks.reset_moments(jumped)
        delta = cross_entropy_delta(logits, labels)
        deltas = networks.backward(values, delta)
        networks.gradient.addcmul_(networks.flat - networks.anchor, l2)
        networks.adam(LR)
        if recycles:
            for layer in range(2):
                score = torch.where(by_gradient, deltas[layer].abs().mean(1), values[layer + 1].mean(1))
                scores[layer].mul_(ema).add_(score * (1 - ema))
                ages[layer] += 1
                due = (step % every == 0) & (tau >= 0)
                grows = (pace > 0) & (step % pace.clamp(min=1) == 0)
                if due.any() or grows.any():
                    alive = torch.arange(64) < born
                    now = scores[layer] / (1 - ema ** ages[layer])
                    mask = due & alive & (now <= tau * (now * alive).sum(1, keepdim=True) / born)
                    recycled += mask.sum(1)
                    mask |= grows & (torch.arange(64) == born)
                    fresh = draw_rows(draws, width * 64, 64).view(width, 64, 64)
                    behind = deltas[1] if layer == 0 else delta
                    for group, setting in zip(groups, settings, strict=True):
                        if setting.candidates > 1 and mask[group].any():
                            drawn = draw_rows(draws, count * setting.candidates, 64).view(count, -1, 64)
                            best = best_first(drawn, values[layer][group], behind[group])
                            for row in range(count):
                                units = mask[group][row].nonzero()[: setting.candidates, 0]
                                fresh[group][row, units] = best[row, : len(units)]
                    networks.recycle(layer, mask, fresh)
                    scores[layer][mask] = 0.0
                    ages[layer][mask] = 0.0
            born += grows & (born < 64)
        if batch.last:
            x, targets = batch.images.repeat(len(settings), 1, 1), batch.targets.repeat(len(settings), 1)
            end[batch.task] = (networks.forward(x)[-1].argmax(-1) == targets).float().mean(1)
    online /= stream.steps // stream.tasks
    return {
        name: Outcome(end[:, group], online[:, group], recycled[group])
        for name, group in zip(methods, groups, strict=True)
    }
