"""Whole training runs through what users call: success, cull, cancel, and a rollback of a graft that blows up."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from growing import Task, host, same
from torch import nn

import morphc
from morphc import Config, Lifecycle
from morphc.errors import MorphcWarning
from morphc.grow.controllers import Germinate
from morphc.grow.grower import Event

L = Lifecycle
SHORT = {"minimum_ticks": (6, 4, 2, 3, 30), "graft_ticks": 4, "graft_patience": 20, "embargo_ticks": 6}
TICK = 4


class Noise(Task):
    """Twelve rows with labels that mean nothing: what is learned of them makes validation worse."""

    def __init__(self) -> None:
        super().__init__(batches=1, rows=12)
        self.y = 2 * torch.randn(self.y.shape, generator=torch.Generator().manual_seed(1))


class Run:
    """A host with one seed a layer, Adam, a Grower, and what its events told."""

    def __init__(
        self,
        task: Task,
        controller: Any,
        evaluate: Callable[[nn.Module], float] | None = None,
        **options: Any,
    ) -> None:
        chosen: dict[str, Any] = {
            "seeds_per_layer": 1,
            "slots": 2,
            "rank": 8,
            "backend": "torch",
            **SHORT,
            **options,
        }
        self.task = task
        self.model = morphc.compile(host(), (task.x[0],), config=Config(**chosen))
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.01)
        self.grower = morphc.Grower(
            self.model, self.optimizer, controller, evaluate or task.validate, tick_every=TICK
        )
        self.moves: list[Lifecycle] = []
        self.events: list[Event] = []

    def train(
        self, steps: int, until: Callable[[Event], bool] = lambda event: False, epochs: bool = True
    ) -> Run:
        """Train; `until` says at which event to stop, `epochs` whether validation is told every 50 steps."""
        for number in range(self.grower.steps, self.grower.steps + steps):
            loss = one_step(self.model, self.optimizer, self.task, number)
            event = self.grower.step(loss, lambda number=number: self.task.loss(self.model, number))
            self.events.append(event)
            self.moves += [moved.target for moved in event.transitions if moved]
            if epochs and number % 50 == 49:
                self.grower.epoch(self.task.validate(self.model))
            if until(event):
                break
        return self


def one_step(model: nn.Module, optimizer: torch.optim.Optimizer, task: Task, number: int) -> torch.Tensor:
    optimizer.zero_grad()
    loss = task.loss(model, number)
    loss.backward()
    optimizer.step()
    return loss


def alone(task: Task, steps: int) -> nn.Module:
    """The host without seeds, trained on the same batches."""
    plain = host()
    optimizer = torch.optim.Adam(plain.parameters(), lr=0.01)
    for number in range(steps):
        one_step(plain, optimizer, task, number)
    return plain


def plateau(**options: Any) -> morphc.PlateauController:
    return morphc.PlateauController(patience=2, threshold=0.02, most=1, **options)


def test_success_by_itself_from_plateau_to_a_plain_wider_host() -> None:
    task = Task()
    run = Run(task, plateau(candidates=2), blueprint="widen", min_final_stability=0.5).train(600)
    assert run.moves == [
        L.GERMINATED,
        L.TRAINING,
        L.GRAFTING,
        L.STABILIZATION,
        L.EVALUATING,
        L.FINE_TUNING,
        L.FOSSILIZED,
    ]
    folded = morphc.fold(run.model)
    assert folded[0].out_features == folded[2].in_features == 4 + 8
    torch.testing.assert_close(folded(task.vx), run.model(task.vx), rtol=1e-4, atol=1e-5)
    assert task.validate(folded) < 0.9 * task.validate(alone(task, 600))
    told = morphc.seeds(run.model).history("2", 0)
    assert [entry.target for entry in told] == run.moves


def test_a_seed_that_memorises_noise_is_culled_and_may_begin_again() -> None:
    task = Noise()
    run = Run(task, plateau(), blueprint="widen", isolation_every=1)
    run.train(800, lambda event: L.DORMANT in run.moves, epochs=False)
    assert run.moves[-2:] == [L.CULLED, L.DORMANT]
    assert run.moves[run.moves.index(L.CULLED) - 1] == L.EVALUATING
    (path,) = {moved.path for event in run.events for moved in event.transitions if moved}
    assert (morphc.seeds(run.model)[path].slots["widen"].owner == -1).all()
    assert torch.equal(run.model(task.vx), morphc.detach(copy.deepcopy(run.model))(task.vx))
    assert all(morphc.seeds(run.model)[path].germinate([0]))


def test_a_seed_that_is_never_grafted_says_why_and_is_warned_of_once() -> None:
    task = Task()
    both = morphc.ScheduleController([(0, Germinate(path, (0,))) for path in ("0", "2")])
    run = Run(task, both, min_isolated_improvement=2.0, graft_patience=4)
    with pytest.warns(
        MorphcWarning, match=r"isolated_improvement: .* must be >= 2.*min_isolated_improvement="
    ) as heard:
        run.train(100, lambda event: L.CULLED in run.moves)
    assert len(heard) == 1
    assert heard[0].filename == __file__
    culls = [moved for event in run.events for moved in event.transitions if moved.target is L.CULLED]
    assert len(culls) == 2
    for moved in culls:
        assert moved
        assert "graft_patience=4" in moved.reason
        assert str(moved).endswith("must be >= 2")


@pytest.mark.parametrize("after", [L.GERMINATED, L.TRAINING])
def test_cancelled_by_the_user_the_run_is_bitwise_that_of_the_host_alone(after: Lifecycle) -> None:
    task = Task()
    run = Run(task, plateau(), blueprint="widen", min_isolated_improvement=2.0)
    run.train(200, lambda event: after in run.moves)
    assert run.moves[-1] == after
    run.train(
        7 * TICK if after is L.TRAINING else 0
    )  # what trains isn't given up before its minimum of ticks
    assert all(morphc.seeds(run.model)["2"].cancel([0]))
    run.train(100)
    assert run.moves[-1] == L.DORMANT
    assert L.GRAFTING not in run.moves
    assert same(alone(task, run.grower.steps), run.model)
    assert morphc.seeds(run.model)["2"].mode.name == "DORMANT"


@pytest.mark.parametrize("blueprint", ["bottleneck", "widen"])
def test_a_graft_that_blows_up_is_undone_and_training_goes_on_as_if_it_had_never_been(blueprint: str) -> None:
    task = Task()
    run = Run(task, plateau(), blueprint=blueprint, seed_lr=1e3, min_isolated_improvement=-1.0)
    run.train(400, lambda event: bool(event.rolled_back))
    event = run.events[-1]
    assert run.moves[-2:] == [L.GRAFTING, L.ROLLED_BACK]
    assert "6 sigma" in event.rolled_back or "nan" in event.rolled_back or "inf" in event.rolled_back
    assert event.rewound_to == run.grower.steps < len(run.events)
    assert same(alone(task, run.grower.steps), run.model)
    run.train(200)
    assert same(alone(task, run.grower.steps), run.model)
    assert run.moves[-1] == L.ROLLED_BACK
    assert all(
        torch.isfinite(value).all() for value in run.model.state_dict().values() if value.is_floating_point()
    )
