"""B. Slowly changing regression: online learning that must not wear out.

The setting of continual backprop (Dohare et al. 2024): 20 input bits, of which 15 are drawn anew every 10 000
examples and 5 with every example; the target is a fixed network of 100 linear threshold units with weights of
+-1; the learner is 20-H-1 ReLU under plain SGD on the squared error, one example at a time. Its weights are drawn
Kaiming-uniform, its biases start at 0.

    python -m benchmarks.growth.slow_regression
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.growth.common import Results, options, single_thread, timed
from benchmarks.growth.online import HOLD, Learners, Method, Source
from benchmarks.growth.side_by_side import Ours, train_side_by_side

EXAMPLES, WINDOW = 1_000_000, 200_000
METHODS = {
    "plain, 5 units": Method(5),
    "plain, 20 units": Method(20),
    "continual backprop, 5 units": Method(5, "utility"),
    "ReDo, 5 units": Method(5, "activation", tau=0.05, every=500),
    "ReDo, 18 units": Method(18, "activation", tau=0.1, every=1000),
    "ReDo, 20 units": Method(20, "activation", tau=0.1, every=1000),
    "recycling, 5 units, plain torch": Method(5, "gradient"),
    "recycling + growth 5 to 15, plain torch": Method(5, "gradient", grow_to=15, grow_every=50_000),
    "recycling + growth 5 to 18, plain torch": Method(5, "gradient", grow_to=18, grow_every=40_000),
    "recycling, 18 units, plain torch": Method(18, "gradient"),
    "recycling, 20 units, plain torch": Method(20, "gradient"),
}
OURS = {
    "morphc: recycling, 5 units": Ours(5),
    "morphc: recycling + growth 5 to 18": Ours(5, grow_to=18),
    "morphc: recycling, 20 units": Ours(20),
}


def train(methods: Sequence[Method], seeds: Sequence[int], examples: int) -> tuple[Tensor, Learners]:
    """Mean squared error per 10 000 examples [T, R], rows by method, then seed; and the learners."""
    source, learners = Source(seeds), Learners(methods, seeds)
    errors = torch.zeros(examples // HOLD, learners.out.shape[0])
    for hold in range(examples // HOLD):
        x, y = source.hold()
        x = torch.cat((x, torch.ones(*x.shape[:2], 1)), 2).repeat(1, len(methods), 1)
        y = y.repeat(1, len(methods))
        for at in range(HOLD):
            errors[hold] += learners.learn(x[at], y[at])
            if at % 100 == 99:
                learners.tend(hold * HOLD + at + 1)
        learners.units += learners.alive.sum(1)
    learners.units /= examples // HOLD
    return errors / HOLD, learners


def main() -> None:
    parser = options(__doc__, seeds=30)
    parser.add_argument("--examples", type=int, default=EXAMPLES)
    arguments = parser.parse_args()
    single_thread()
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    results = Results("slow_regression", arguments, examples=arguments.examples, window=WINDOW)

    def store(name: str, errors: Tensor, seconds: float, recycled: Tensor, units: float) -> None:
        last = errors[-min(WINDOW, arguments.examples) // HOLD :]
        curve = errors.mean(1)
        results.add(name, last.mean(0).tolist(), seconds, curve=curve, recycled=recycled, units=units)

    wanted = {name: how for name, how in METHODS.items() if results.wanted(name)}
    if wanted:
        told, seconds = timed(lambda: train(list(wanted.values()), seeds, arguments.examples))
        errors, learners = told
        for at, name in enumerate(wanted):
            rows = slice(at * len(seeds), (at + 1) * len(seeds))
            units = learners.units[rows].mean().item()
            store(name, errors[:, rows], seconds / len(wanted), learners.recycled[rows], units)
    for name, how in OURS.items():
        if results.wanted(name):
            found, seconds = timed(lambda how=how: train_side_by_side(how, seeds, arguments.examples))
            store(name, found[0], seconds, *found[1:])


if __name__ == "__main__":
    main()
