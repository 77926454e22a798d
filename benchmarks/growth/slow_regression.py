"""B. Slowly changing regression: online learning that must not wear out.

The setting of continual backprop (Dohare et al.): 20 input bits, of which 15 are drawn anew every 10 000
examples and 5 with every example; the target is a fixed network of 100 linear threshold units (weights +-1,
threshold 20 * 0.7 minus the number of negative weights); the learner is 20-H-1 ReLU under plain SGD,
one example at a time.

    python -m benchmarks.growth.slow_regression
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.growth.common import Results, options, single_thread, timed

BITS, SLOW, HOLD = 20, 15, 10_000
TARGETS, BETA = 100, 0.7
LR = 0.01
EXAMPLES, WINDOW = 1_000_000, 200_000


class Source:
    """The examples of S runs; run s depends on its seed alone."""

    def __init__(self, seeds: Sequence[int]) -> None:
        self.draws = [torch.Generator().manual_seed(3000 + seed) for seed in seeds]
        signs = [torch.randint(2, (TARGETS, BITS + 1), generator=draw) * 2.0 - 1 for draw in self.draws]
        self.weights = torch.stack(signs)
        self.thresholds = BITS * BETA - (self.weights < 0).sum(2)
        self.out = torch.stack([torch.randint(2, (TARGETS,), generator=d) * 2.0 - 1 for d in self.draws])

    def hold(self) -> tuple[Tensor, Tensor]:
        """The next 10 000 examples: x [10000, S, 20], y [10000, S]."""
        bits = []
        for draw in self.draws:
            slow = torch.randint(2, (1, SLOW), generator=draw).expand(HOLD, -1)
            bits.append(torch.cat((slow, torch.randint(2, (HOLD, BITS - SLOW), generator=draw)), 1))
        x = torch.stack(bits).float()
        ones = torch.ones(*x.shape[:2], 1)
        fired = torch.cat((x, ones), 2) @ self.weights.transpose(1, 2) > self.thresholds.unsqueeze(1)
        return x.transpose(0, 1).contiguous(), (fired.float() @ self.out.unsqueeze(2)).squeeze(
            2
        ).T.contiguous()


@dataclass(frozen=True)
class Method:
    """A learner. hidden: units at the start. recycle: which units start anew, None for none:
    `utility` (continual backprop: the least useful one, at a rate of 1e-4 per unit and example),
    `activation` (ReDo: mean activation at most tau times the layer's mean) or `gradient` (the same of
    |gradient| at the pre-activation). every: examples between two looks. grow_to, grow_every: one more unit each
    `grow_every` examples, up to `grow_to`.
    """

    hidden: int
    recycle: str | None = None
    tau: float = 0.1
    every: int = 1000
    grow_to: int = 0
    grow_every: int = 0


CBP_RATE, CBP_MATURITY = 1e-4, 100
EMA = 0.01


class Learners:
    """R online learners of up to H units; weight [R, H, 21] with the bias last, out [R, H + 1] likewise."""

    def __init__(self, settings: Sequence[Method], seeds: Sequence[int]) -> None:
        self.settings, self.count = settings, len(seeds)
        self.width = max(max(setting.hidden, setting.grow_to) for setting in settings)
        rows = len(settings) * self.count
        self.weight = torch.zeros(rows, self.width, BITS + 1)
        self.out = torch.zeros(rows, self.width + 1)
        self.alive = torch.zeros(rows, self.width, dtype=torch.bool)
        self.draws = torch.Generator().manual_seed(4000 + seeds[0])
        for at, setting in enumerate(settings):
            for row, seed in enumerate(seeds, start=at * self.count):
                draw = torch.Generator().manual_seed(seed)
                hidden = setting.hidden
                self.weight[row, :hidden] = self.incoming(hidden, draw)
                fresh = (torch.rand(hidden + 1, generator=draw) * 2 - 1) / hidden**0.5
                self.out[row, :hidden], self.out[row, -1] = fresh[:-1], fresh[-1]
                self.alive[row, :hidden] = True
        self.activation = torch.zeros(rows, self.width)
        self.gradient = torch.zeros(rows, self.width)
        self.born = torch.zeros(rows, self.width)
        self.recycled = torch.zeros(rows)
        self.units = torch.zeros(rows)
        self.hidden = torch.ones(rows, self.width + 1)

    def incoming(self, units: int, draw: torch.Generator) -> Tensor:
        """[units, 21] as `nn.Linear` draws weight and bias."""
        return (torch.rand(units, BITS + 1, generator=draw) * 2 - 1) / BITS**0.5

    def learn(self, x: Tensor, y: Tensor) -> Tensor:
        """One example each: x [R, 21], y [R]; the squared error before the step, [R]."""
        before = torch.bmm(self.weight, x.unsqueeze(2)).squeeze(2)
        active = self.hidden[:, :-1]
        torch.clamp(before, min=0, out=active)
        error = (self.hidden * self.out).sum(1).sub_(y)
        scaled = (error * LR).unsqueeze(1)
        delta = (self.out[:, :-1] * scaled).mul_(before > 0)
        self.activation.lerp_(active, EMA)
        self.gradient.lerp_(delta.abs(), EMA)
        self.out.addcmul_(self.hidden, scaled, value=-1)
        self.weight.baddbmm_(delta.unsqueeze(2), x.unsqueeze(1), alpha=-1)
        return error.square_()

    def tend(self, example: int) -> None:
        """Recycle and grow where it is due after `example` examples."""
        for at, setting in enumerate(self.settings):
            rows = slice(at * self.count, (at + 1) * self.count)
            if setting.recycle is not None:
                self.start_anew(rows, self.chosen(setting, rows, example), example)
            if setting.grow_every and example % setting.grow_every == 0:
                units = int(self.alive[rows][0].sum())
                if units < setting.grow_to:
                    mask = torch.zeros_like(self.alive[rows])
                    mask[:, units] = True
                    self.alive[rows] |= mask
                    self.start_anew(rows, mask, example)
                    self.recycled[rows] -= 1

    def chosen(self, setting: Method, rows: slice, example: int) -> Tensor:
        """[S, H] bool: the units to start anew."""
        alive, units = self.alive[rows], int(self.alive[rows][0].sum())
        nothing = torch.zeros_like(alive)
        if setting.recycle == "utility":
            period = round(1 / (CBP_RATE * units) / 100) * 100
            if example % period:
                return nothing
            use = self.activation[rows] * self.out[rows, :-1].abs() / self.weight[rows].abs().sum(2)
            ripe = alive & (example - self.born[rows] > CBP_MATURITY)
            worst = use.masked_fill(~ripe, float("inf")).argmin(1, keepdim=True)
            return nothing.scatter(1, worst, True) & ripe
        if example % setting.every:
            return nothing
        score = self.gradient[rows] if setting.recycle == "gradient" else self.activation[rows]
        ripe = alive & (example - self.born[rows] >= setting.every)
        return ripe & (score <= setting.tau * score.sum(1, keepdim=True) / units)

    def start_anew(self, rows: slice, mask: Tensor, example: int) -> None:
        """Fresh incoming weights, nothing outgoing, for the units in `mask` [S, H]."""
        if mask.any():
            self.recycled[rows] += mask.sum(1)
            fresh = self.incoming(self.width * self.count, self.draws).view(self.count, self.width, -1)
            self.weight[rows][mask] = fresh[mask]
            self.out[rows, :-1][mask] = 0.0
            self.activation[rows][mask] = 0.0
            self.gradient[rows][mask] = 0.0
            self.born[rows][mask] = float(example)


METHODS = {
    "plain, 5 units": Method(5),
    "plain, 20 units": Method(20),
    "continual backprop, 5 units": Method(5, "utility"),
    "ReDo, 5 units": Method(5, "activation"),
    "ReDo, 20 units": Method(20, "activation"),
    "recycling, 5 units, plain torch": Method(5, "gradient"),
    "recycling + growth 5 to 10, plain torch": Method(5, "gradient", grow_to=10, grow_every=50_000),
    "recycling + growth 5 to 15, plain torch": Method(5, "gradient", grow_to=15, grow_every=50_000),
    "recycling, 20 units, plain torch": Method(20, "gradient"),
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
    wanted = {name: how for name, how in METHODS.items() if results.wanted(name)}
    (errors, learners), seconds = timed(lambda: train(list(wanted.values()), seeds, arguments.examples))
    for at, name in enumerate(wanted):
        rows = slice(at * len(seeds), (at + 1) * len(seeds))
        results.add(
            name,
            errors[-min(WINDOW, arguments.examples) // HOLD :, rows].mean(0).tolist(),
            seconds / len(wanted),
            curve=errors[:, rows].mean(1),
            recycled=learners.recycled[rows],
            units=learners.units[rows].mean().item(),
        )


if __name__ == "__main__":
    main()
