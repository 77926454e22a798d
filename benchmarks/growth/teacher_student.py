"""A. Teacher and student: one hidden unit at a time, where is it worth most?

GradMax's setting (Evci et al. 2022): a 10-10-10 ReLU teacher, a student that starts with 5 hidden units and
gets one more at steps 200, 400, .. 1000, full-batch SGD, mean squared error over 1000 normal inputs.

    python -m benchmarks.growth.teacher_student
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

import morphc
from benchmarks.growth.common import Results, options, single_thread, timed

ROWS, WIDTH, START = 1000, 10, 5
EVENTS = (200, 400, 600, 800, 1000)
STEPS = 1500


@dataclass(frozen=True)
class Setting:
    """`teachers` teachers with `students` initialisations each, under full-batch SGD at `lr`."""

    name: str
    teachers: int
    students: int
    lr: float


SETTINGS = (
    Setting("5 teachers x 4 seeds, lr 0.1", 5, 4, 0.1),
    Setting("20 teachers, lr 0.1", 20, 1, 0.1),
    Setting("5 teachers x 4 seeds, lr 1", 5, 4, 1.0),
)


@dataclass(frozen=True)
class Problem:
    """x: [P, 1000, 10], y: [P, 1000, 10], one row per (teacher, student)."""

    x: Tensor
    y: Tensor
    seeds: tuple[int, ...]

    def generators(self, salt: int = 0) -> list[torch.Generator]:
        """One generator per row; the same for the same salt."""
        return [torch.Generator().manual_seed(1_000_003 * salt + seed) for seed in self.seeds]


def problem(setting: Setting) -> Problem:
    """The data of a setting; teacher t is the same in each of them."""
    x, y, seeds = [], [], []
    for teacher in range(setting.teachers):
        draw = torch.Generator().manual_seed(teacher)
        inputs = torch.randn(ROWS, WIDTH, generator=draw)
        first, second = (torch.rand(WIDTH, WIDTH, generator=draw) * 2 - 1 for _ in range(2))
        for student in range(setting.students):
            x.append(inputs)
            y.append((inputs @ first.T).relu() @ second.T)
            seeds.append(10_000 + 100 * teacher + student)
    return Problem(torch.stack(x), torch.stack(y), tuple(seeds))


def step_macs(hidden: int) -> int:
    """Multiply-adds of one step and row: two products forward, three backward (no gradient is asked for at x)."""
    return 5 * WIDTH * hidden


class Students:
    """P students side by side; `first` [P, H, 10], `second` [P, 10, H], no biases.

    The gradient of ReLU at 0 is 1: GradMax's units start with zero incoming weights and would never move.
    """

    def __init__(self, data: Problem, hidden: int) -> None:
        self.data = data
        bound = (6 / (WIDTH + hidden)) ** 0.5
        draws = data.generators()
        self.first = torch.stack([torch.rand(hidden, WIDTH, generator=d) for d in draws]) * 2 * bound - bound
        self.second = torch.stack([torch.rand(WIDTH, hidden, generator=d) for d in draws]) * 2 * bound - bound
        self.macs = 0

    def error_gradient(self) -> tuple[Tensor, Tensor, Tensor]:
        """Pre-activations, hidden values, and the loss's gradient at the output."""
        before = self.data.x @ self.first.transpose(1, 2)
        hidden = before.clamp(min=0)
        return before, hidden, (hidden @ self.second.transpose(1, 2) - self.data.y) * (2 / (ROWS * WIDTH))

    def step(self, lr: float) -> None:
        """One step of full-batch gradient descent."""
        before, hidden, delta = self.error_gradient()
        inner = (delta @ self.second) * (before >= 0)
        self.second -= lr * (delta.transpose(1, 2) @ hidden)
        self.first -= lr * (inner.transpose(1, 2) @ self.data.x)
        self.macs += step_macs(self.first.shape[1])

    def add(self, incoming: Tensor, outgoing: Tensor) -> None:
        """One more unit each: incoming [P, 10], outgoing [P, 10]."""
        self.first = torch.cat((self.first, incoming.unsqueeze(1)), 1)
        self.second = torch.cat((self.second, outgoing.unsqueeze(2)), 2)

    def loss(self) -> Tensor:
        """[P] mean squared error."""
        return self.error_gradient()[2].mul(ROWS * WIDTH / 2).pow(2).mean((1, 2))


Newborn = Callable[[Students, int], tuple[Tensor, Tensor]]


def unit_norm(students: Students, salt: int) -> Tensor:
    drawn = torch.stack([torch.randn(WIDTH, generator=d) for d in students.data.generators(salt)])
    return drawn / drawn.norm(dim=1, keepdim=True)


def incoming_norm(students: Students) -> Tensor:
    return students.first.norm(dim=2).mean(1, keepdim=True)


def outgoing_norm(students: Students) -> Tensor:
    return students.second.norm(dim=1).mean(1, keepdim=True)


def gradmax(students: Students, salt: int) -> tuple[Tensor, Tensor]:
    """Zero in, and out along the direction that makes the incoming weights' gradient largest (an SVD)."""
    _, _, delta = students.error_gradient()
    left = torch.linalg.svd(delta.transpose(1, 2) @ students.data.x)[0]
    return torch.zeros_like(left[:, 0]), left[:, :, 0] * outgoing_norm(students)


def random_unit(students: Students, salt: int) -> tuple[Tensor, Tensor]:
    """Zero in, a random direction out: the function is kept, as GradMax keeps it."""
    outgoing = unit_norm(students, salt) * outgoing_norm(students)
    return torch.zeros_like(outgoing), outgoing


def gaussian_unit(students: Students, salt: int) -> tuple[Tensor, Tensor]:
    """Random in and out, at the norms of the units that are there: the function changes."""
    incoming = unit_norm(students, salt + 1) * incoming_norm(students)
    return incoming, unit_norm(students, salt) * outgoing_norm(students)


def train(data: Problem, lr: float, hidden: int = START, newborn: Newborn | None = None, steps: int = STEPS):
    """(final loss [P], loss curve every 50 steps [T][P], MACs per student and row)."""
    students = Students(data, hidden)
    curve = []
    for step in range(steps):
        if step % 50 == 0:
            curve.append(students.loss())
        if newborn is not None and step in EVENTS:
            students.add(*newborn(students, step))
        students.step(lr)
    curve.append(students.loss())
    return students.loss(), curve, students.macs


ISOLATED, CANDIDATES = 50, 12
SEED_LR = 0.03


def ours(data: Problem, row: int, lr: float) -> tuple[float, list[float], float]:
    """One student that grows through morphc: (final loss, curve every 50 steps, MACs per input row).

    For the last 50 steps before an event one `widen` seed trains 12 candidates beside the student; the best is
    grafted with its out-weights refitted, and folded into wider layers. What those steps cost is counted by torch,
    with all that is measured of the seeds.
    """
    x, y = data.x[row], data.y[row]
    start = Students(Problem(data.x[row : row + 1], data.y[row : row + 1], data.seeds[row : row + 1]), START)
    host = nn.Sequential(nn.Linear(WIDTH, START, bias=False), nn.ReLU(), nn.Linear(START, WIDTH, bias=False))
    host[0].weight.data.copy_(start.first[0])
    host[2].weight.data.copy_(start.second[0])
    curve, macs, isolated, grower = [], 0.0, 0.0, None
    optimizer = torch.optim.SGD(host.parameters(), lr=lr)
    model: nn.Module = host
    for step in range(STEPS):
        if grower is not None and step in EVENTS:
            host = graft(grower)
            model, grower = host, None
            optimizer = torch.optim.SGD(host.parameters(), lr=lr)
        if step + ISOLATED in EVENTS:
            model, optimizer, grower = germinate(host, x, lr)
        with FlopCounterMode(display=False) if step + ISOLATED in EVENTS else nullcontext() as counter:
            loss = functional.mse_loss(model(x), y)
            if step % 50 == 0:
                curve.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if grower is not None:
                grower.step(loss)
        if counter is not None:
            isolated = counter.get_total_flops() / (2 * ROWS)
        macs += isolated if grower is not None else step_macs(host[0].out_features)
    curve.append(functional.mse_loss(model(x), y).item())
    return curve[-1], curve, macs


def germinate(
    host: nn.Module, x: Tensor, lr: float
) -> tuple[nn.Module, torch.optim.Optimizer, morphc.Grower]:
    """The host with a seed of 12 candidates behind its last layer, and what trains both."""
    config = morphc.Config(
        seeds_per_layer=1,
        blueprint="widen",
        rank=1,
        slots=CANDIDATES,
        seed_lr=SEED_LR / lr,
        telemetry_every=0,
        isolation_every=1,
    )
    model = morphc.compile(host, x[:2], config=config, verify=False)
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=lr)
    nothing = morphc.CallbackController(lambda seen: ())
    grower = morphc.Grower(model, optimizer, nothing, evaluate=lambda model: 0.0, tick_every=10)
    grown = morphc.seeds(model)["2"].germinate([0], candidates=CANDIDATES)
    if not grown[0]:
        raise RuntimeError(grown[0].reason)
    grower.tick()
    return model, optimizer, grower


def graft(grower: morphc.Grower) -> nn.Sequential:
    """The wider host: the best candidate, at the size that least squares gives its out-weights."""
    (told,) = grower.advance("2", [0], morphc.Lifecycle.FOSSILIZED, gates=False)
    if not told:
        raise RuntimeError(str(told))
    folded = morphc.fold(grower.model)
    assert isinstance(folded, nn.Sequential)
    return folded


def main() -> None:
    parser = options("Teacher and student", seeds=1)
    arguments = parser.parse_args()
    single_thread()
    results = Results("teacher_student", arguments, steps=STEPS, events=EVENTS)
    for setting in SETTINGS:
        run_setting(setting, results, arguments)


def run_setting(setting: Setting, results: Results, arguments: argparse.Namespace) -> None:
    """Baselines and ours of one setting."""
    data = problem(setting)
    baselines = {
        "small (5 units)": {},
        "random": {"newborn": random_unit},
        "Gaussian": {"newborn": gaussian_unit},
        "GradMax": {"newborn": gradmax},
        "GradMax, equal FLOPs": {"newborn": gradmax, "steps": STEPS + 550},
        "big from the start (10 units)": {"hidden": WIDTH},
    }
    for name, how in baselines.items():
        method = f"{setting.name}: {name}"
        if results.wanted(method):
            (loss, curve, macs), seconds = timed(lambda how=how: train(data, setting.lr, **how))
            curves = torch.stack(curve).mean(1)
            results.add(method, loss.tolist(), seconds, curve=curves, macs=macs)
    method = f"{setting.name}: morphc"
    if results.wanted(method):
        rows = range(len(data.seeds))
        runs, seconds = timed(lambda: [ours(data, row, setting.lr) for row in rows])
        losses, curves, macs = zip(*runs, strict=True)
        curve = torch.tensor(curves).mean(0)
        results.add(method, losses, seconds, curve=curve, macs=macs[0])


if __name__ == "__main__":
    main()
