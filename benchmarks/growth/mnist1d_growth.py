"""E. MNIST-1D: growing a 40-10-10-10 network, and where the new units go.

40-H-H-10 under Adam 1e-2, batches of 100, 6000 steps, on the 4000 training examples of `mnist1d`'s default data
set; reported is the test accuracy, mean of the last five evaluations (every 100 steps), and the training
multiply-adds over those of H=50 from the start.

    python -m benchmarks.growth.mnist1d_growth
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from mnist1d.data import get_dataset_args, make_dataset
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.growth.batched import Networks, cross_entropy_delta, draw_network, draw_rows
from benchmarks.growth.common import Results, options, single_thread, timed
from benchmarks.growth.widening import PASSES, SEARCH, Rounds, grow

INPUTS, CLASSES, WIDEST = 40, 10, 90
STEPS, BATCH, LR = 6000, 100, 1e-2
CANDIDATES = 64
EARLY = tuple(range(450, 3601, 450))
LATE = (4000, 4100, 4200, 4300)


@cache
def data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x and labels to train on, and to test on."""
    made = make_dataset(get_dataset_args())
    x, x_test = (torch.tensor(made[name], dtype=torch.float32) for name in ("x", "x_test"))
    return x, torch.tensor(made["y"]), x_test, torch.tensor(made["y_test"])


def macs(first: int, second: int) -> int:
    """Multiply-adds of one example's training step (forward and backward) for widths `first` and `second`."""
    return 3 * (INPUTS * first + first * second + second * CLASSES)


STATIC = macs(50, 50) * STEPS * BATCH


@dataclass(frozen=True)
class Method:
    """A network and how it grows.

    widths: of the two hidden layers at the start. grow: `gradmax`, `signal` (candidates, placed where they take
    most of the gradient) or `random` (the same candidates and budget, placed and picked at random). events: the
    steps after which `units` are added (to each layer by GradMax, in all by the others). steps: when to stop.
    """

    widths: tuple[int, int]
    grow: str | None = None
    events: tuple[int, ...] = ()
    units: int = 0
    steps: int = STEPS


class Runs:
    """One method on S seeds side by side; layers are WIDEST wide, and units that aren't alive are all zero."""

    def __init__(self, how: Method, seeds: Sequence[int]) -> None:
        self.how, self.count = how, len(seeds)
        sizes = (INPUTS, WIDEST, WIDEST, CLASSES)
        total = sum(fan_out * (fan_in + 1) for fan_in, fan_out in itertools.pairwise(sizes))
        self.networks = Networks(torch.zeros(self.count, total), sizes)
        self.alive = [torch.zeros(self.count, WIDEST, dtype=torch.bool) for _ in range(2)]
        small = (INPUTS, *how.widths, CLASSES)
        for row, seed in enumerate(seeds):
            drawn = draw_network(small, torch.Generator().manual_seed(seed)).unsqueeze(0)
            weights, biases = Networks(drawn, small).layers(drawn)
            for layer in range(3):
                fan_out, fan_in = weights[layer].shape[1:]
                self.networks.weight[layer][row, :fan_out, :fan_in] = weights[layer][0]
                self.networks.bias[layer][row, :fan_out] = biases[layer][0]
        for layer in range(2):
            self.alive[layer][:, : how.widths[layer]] = True
        self.draws = [torch.Generator().manual_seed(5000 + seed) for seed in seeds]
        self.candidates = [torch.Generator().manual_seed(6000 + seed) for seed in seeds]
        self.macs = torch.zeros(self.count)

    def train(self) -> list[Tensor]:
        """Test accuracy [S] every 100 steps."""
        x, labels, x_test, y_test = data()
        accuracy = []
        for step in range(self.how.steps):
            at = step % (len(x) // BATCH) * BATCH
            if at == 0:
                order = torch.stack([torch.randperm(len(x), generator=draw) for draw in self.draws])
            index = order[:, at : at + BATCH]
            self.gradients(x[index], labels[index])
            self.networks.adam(LR)
            first, second = (alive.sum(1).float() for alive in self.alive)
            self.macs += BATCH * 3 * (INPUTS * first + first * second + second * CLASSES)
            if step + 1 in self.how.events:
                self.grow()
            if (step + 1) % 100 == 0:
                logits = self.networks.forward(x_test.expand(self.count, -1, -1))[-1]
                accuracy.append((logits.argmax(-1) == y_test).float().mean(1))
        return accuracy

    def gradients(self, x: Tensor, labels: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Fills the networks' gradient; values before each layer, and the gradients behind layers 2 and 3."""
        values = self.networks.forward(x)
        delta = cross_entropy_delta(values[-1], labels)
        deltas = self.networks.backward(values, delta)
        self.networks.open = [None] * 2
        return values, [deltas[1], delta]

    def grow(self) -> None:
        """Add the units of one event, from the gradient over the whole training set."""
        x, labels, _, _ = data()
        values, deltas = self.gradients(x.expand(self.count, -1, -1), labels.expand(self.count, -1))
        for row in range(self.count):
            self.macs[row] += len(x) * macs(*(int(alive[row].sum()) for alive in self.alive))
        if self.how.grow == "gradmax":
            self.grow_gradmax(values, deltas)
        else:
            for row in range(self.count):
                self.grow_best(row, values, deltas)

    def grow_gradmax(self, values: list[Tensor], deltas: list[Tensor]) -> None:
        for layer in range(2):
            left = torch.linalg.svd(deltas[layer].transpose(1, 2) @ values[layer])[0]
            newborn = torch.zeros(self.count, 1, WIDEST, dtype=torch.bool)
            for row in range(self.count):
                alive = self.alive[layer][row]
                units = (~alive).nonzero()[: self.how.units, 0]
                following = self.networks.weight[layer + 1][row]
                size = following[:, alive].norm(dim=0).mean()
                directions = torch.arange(len(units)) % left.shape[2]
                following[:, units] = left[row][:, directions] * size
                alive[units] = True
                newborn[row, 0, units] = True
            self.networks.open[layer] = newborn

    def grow_best(self, row: int, values: list[Tensor], deltas: list[Tensor]) -> None:
        """CANDIDATES random units for each layer, out-weights by least squares against the gradient behind it."""
        draw, pool = self.candidates[row], []
        for layer in range(2):
            inputs, gradient = values[layer][row], deltas[layer][row] * len(values[0][row])
            reads = torch.ones(INPUTS, dtype=torch.bool) if layer == 0 else self.alive[0][row]
            incoming = torch.zeros(CANDIDATES, inputs.shape[1])
            incoming[:, reads] = draw_rows(draw, CANDIDATES, int(reads.sum()))
            hidden = (inputs @ incoming.T).relu()
            size = hidden.square().sum(0) + 1e-3
            outgoing = -(hidden.T @ gradient) / size.unsqueeze(1)
            gain = outgoing.square().sum(1) * size
            pool += [(float(gain[k]), layer, incoming[k], outgoing[k]) for k in range(CANDIDATES)]
            behind = CLASSES if layer else int(self.alive[1][row].sum())
            self.macs[row] += len(inputs) * CANDIDATES * (int(reads.sum()) + behind)
        if self.how.grow == "signal":
            pool.sort(key=lambda candidate: -candidate[0])
        else:
            pool = [pool[k] for k in torch.randperm(len(pool), generator=draw).tolist()]
        for _, layer, incoming, outgoing in pool[: self.how.units]:
            unit = int((~self.alive[layer][row]).nonzero()[0])
            scale = (outgoing.norm() / incoming.norm()).sqrt() + 1e-6
            self.networks.weight[layer][row, unit] = incoming * scale
            behind = outgoing / scale
            self.networks.weight[layer + 1][row][:, unit] = behind if layer else behind * self.alive[1][row]
            self.alive[layer][row, unit] = True


METHODS = {
    "static 10-10": Method((10, 10)),
    "static 50-50": Method((50, 50)),
    "static 50-50, stopped at step 2300": Method((50, 50), steps=2300),
    "static 50-50, stopped at step 2950": Method((50, 50), steps=2950),
    "static 83-17": Method((83, 17)),
    "static 83-17, stopped at step 2300": Method((83, 17), steps=2300),
    "static 90-10": Method((90, 10)),
    "static 90-10, stopped at step 3200": Method((90, 10), steps=3200),
    "GradMax, 5 a layer every 450 steps": Method((10, 10), "gradmax", EARLY, 5),
    "GradMax, late (10 a layer from 4000)": Method((10, 10), "gradmax", LATE, 10),
    "growth at random, plain torch": Method((10, 10), "random", LATE, 20),
    "growth by signal, plain torch": Method((10, 10), "signal", LATE, 20),
}


OURS = {
    "morphc: at random": Rounds(LATE, "random"),
    "morphc: always the first layer": Rounds(LATE, "first"),
    "morphc: by signal": Rounds(LATE),
}


def train_one(how: Rounds, seed: int) -> tuple[Tensor, float, tuple[int, int]]:
    """One seed through morphc: test accuracy every 100 steps, multiply-adds, and the widths it ends with."""
    x, labels, x_test, y_test = data()
    runs = Runs(Method((10, 10)), [seed])
    host = nn.Sequential(
        nn.Linear(INPUTS, 10), nn.ReLU(), nn.Linear(10, 10), nn.ReLU(), nn.Linear(10, CLASSES)
    )
    for layer, weight, bias in zip(host[::2], runs.networks.weight, runs.networks.bias, strict=True):
        layer.weight.data.copy_(weight[0, : layer.out_features, : layer.in_features])
        layer.bias.data.copy_(bias[0, : layer.out_features])
    optimizer = torch.optim.Adam(host.parameters(), lr=LR)
    cost, accuracy = 0, []
    for step in range(STEPS):
        at = step % (len(x) // BATCH) * BATCH
        if at == 0:
            order = torch.randperm(len(x), generator=runs.draws[0])
        index = order[at : at + BATCH]
        optimizer.zero_grad()
        functional.cross_entropy(host(x[index]), labels[index]).backward()
        optimizer.step()
        cost += BATCH * macs(host[0].out_features, host[2].out_features)
        for _ in range(how.rounds if step + 1 in how.events else 0):
            draw = runs.candidates[0]
            some = torch.randperm(len(x), generator=draw)[: how.rows]
            first, second = host[0].out_features, host[2].out_features
            seeds = 3 * how.units * how.candidates * (INPUTS + second + first + CLASSES)
            cost += (
                PASSES * how.rows * (macs(first, second) + seeds)
                + SEARCH * how.rows * macs(first, second) // 3
            )
            host, optimizer = grow(host, optimizer, x[some], labels[some], how, draw)
        if (step + 1) % 100 == 0:
            with torch.no_grad():
                accuracy.append((host(x_test).argmax(-1) == y_test).float().mean())
    return torch.stack(accuracy), cost / STATIC, (host[0].out_features, host[2].out_features)


def main() -> None:
    arguments = options(__doc__, seeds=10, first_seed=100).parse_args()
    single_thread()
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    results = Results("mnist1d_growth", arguments, steps=STEPS, batch=BATCH, lr=LR)
    for name, how in METHODS.items():
        if not results.wanted(name):
            continue
        runs = Runs(how, seeds)
        accuracy, seconds = timed(runs.train)
        results.add(
            name,
            torch.stack(accuracy[-5:]).mean(0).tolist(),
            seconds,
            curve=torch.stack(accuracy).mean(1),
            macs=(runs.macs / STATIC).mean().item(),
            widths=[alive.sum(1).float().mean().item() for alive in runs.alive],
        )
    for name, rounds in OURS.items():
        if results.wanted(name):
            found, seconds = timed(lambda rounds=rounds: [train_one(rounds, seed) for seed in seeds])
            accuracy, costs, widths = zip(*found, strict=True)
            results.add(
                name,
                torch.stack(accuracy)[:, -5:].mean(1).tolist(),
                seconds,
                curve=torch.stack(accuracy).mean(0),
                macs=sum(costs) / len(costs),
                widths=torch.tensor(widths).float().mean(0),
            )


if __name__ == "__main__":
    main()
