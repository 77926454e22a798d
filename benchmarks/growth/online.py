"""Slowly changing regression: its examples, and learners written out in plain torch that run side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BITS, SLOW, HOLD = 20, 15, 10_000
TARGETS, BETA = 100, 0.7
LR = 0.01


class Source:
    """The examples of S runs; run s depends on its seed alone.

    A unit with inner weights w and bias b, all +-1, fires where w x + b > 0.7 * 21 - (20 - sum w + b) / 2. That is
    how the published code counts the negative weights; with the bias counted as it is (b to -b) units with b = -1
    fire more often, the target's variance is a third larger, and so is every error.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self.draws = [torch.Generator().manual_seed(3000 + seed) for seed in seeds]
        signs = [torch.randint(2, (TARGETS, BITS + 1), generator=draw) * 2.0 - 1 for draw in self.draws]
        self.weights = torch.stack(signs)
        bits, bias = self.weights.split((BITS, 1), 2)
        self.thresholds = BETA * (BITS + 1) - (BITS - bits.sum(2) + bias.squeeze(2)) / 2
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
    tau: float = 0.05
    every: int = 500
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
                self.out[row, :hidden] = (torch.rand(hidden, generator=draw) * 2 - 1) * (3 / hidden) ** 0.5
                self.alive[row, :hidden] = True
        self.activation = torch.zeros(rows, self.width)
        self.spread = torch.zeros(rows, self.width)
        self.gradient = torch.zeros(rows, self.width)
        self.born = torch.zeros(rows, self.width)
        self.recycled = torch.zeros(rows)
        self.units = torch.zeros(rows)
        self.hidden = torch.ones(rows, self.width + 1)

    def incoming(self, units: int, draw: torch.Generator) -> Tensor:
        """[units, 21]: Kaiming-uniform weights, and a bias of 0."""
        drawn = (torch.rand(units, BITS + 1, generator=draw) * 2 - 1) * (6 / BITS) ** 0.5
        drawn[:, -1] = 0.0
        return drawn

    def learn(self, x: Tensor, y: Tensor) -> Tensor:
        """One example each: x [R, 21], y [R]; the squared error before the step, [R]."""
        before = torch.bmm(self.weight, x.unsqueeze(2)).squeeze(2)
        active = self.hidden[:, :-1]
        torch.clamp(before, min=0, out=active)
        error = (self.hidden * self.out).sum(1).sub_(y)
        scaled = (error * (2 * LR)).unsqueeze(1)
        delta = (self.out[:, :-1] * scaled).mul_(before > 0)
        self.activation.lerp_(active, EMA)
        self.spread.lerp_((active - self.activation).abs_(), EMA)
        self.gradient.lerp_(delta.abs(), EMA)
        self.out.addcmul_(self.hidden, scaled, value=-1)
        self.weight.baddbmm_(delta.unsqueeze(2), x.unsqueeze(1), alpha=-1)
        return error.square_()

    def tend(self, example: int) -> None:
        """Recycle and grow where it is due after `example` examples."""
        for at, setting in enumerate(self.settings):
            rows = slice(at * self.count, (at + 1) * self.count)
            if setting.recycle is not None:
                mask = self.chosen(setting, rows, example)
                if setting.recycle == "utility":  # What the unit gave on average stays, in the bias.
                    gave = self.out[rows, :-1] * self.activation[rows] * mask
                    self.out[rows, -1] += gave.sum(1)
                self.start_anew(rows, mask, example)
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
            size = self.weight[rows, :, :-1].abs().sum(2)
            use = self.spread[rows] * self.out[rows, :-1].abs() / size
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
            self.spread[rows][mask] = 0.0
            self.gradient[rows][mask] = 0.0
            self.born[rows][mask] = float(example)
