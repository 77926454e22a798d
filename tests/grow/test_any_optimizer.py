"""Hosts keep the optimizer that they have: eight bits, one of the user's own, LBFGS; rates and scalers are followed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from growing import Never, Task, grown, same
from torch import Tensor, nn
from torch.optim import lr_scheduler

import morphc
from morphc import Lifecycle
from morphc.grow.controllers import Do, Germinate

L = Lifecycle
BLOCK = 16
LOOSE = {
    "min_isolated_improvement": -1.0,
    "min_contribution": -10.0,
    "cull_contribution": -20.0,
    "min_improvement": -10.0,
    "min_stability": 0.0,
    "min_final_stability": 0.0,
}


class Adam8(torch.optim.Optimizer):
    """Adam whose moments are bytes: blocks of 16 values share a scale. Their shape isn't the parameter's."""

    def __init__(self, params: Any, lr: float = 0.01) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                if not state:
                    blocks = -(-param.numel() // BLOCK)
                    state["step"] = 0
                    for name in ("mean", "square"):
                        state[name] = torch.full((blocks, BLOCK), 128, dtype=torch.uint8)
                        state[f"{name}_scale"] = torch.zeros(blocks, 1)
                state["step"] += 1
                flat = nn.functional.pad(param.grad.flatten(), (0, state["mean"].numel() - param.numel()))
                grad = flat.view(-1, BLOCK)
                mean = 0.9 * self.wide(state, "mean") + 0.1 * grad
                square = 0.99 * self.wide(state, "square") + 0.01 * grad.square()
                self.pack(state, "mean", mean)
                self.pack(state, "square", square)
                rate = group["lr"] * (1 - 0.99 ** state["step"]) ** 0.5 / (1 - 0.9 ** state["step"])
                change = rate * mean / (square.clamp_min(0).sqrt() + 1e-3)
                param.sub_(change.flatten()[: param.numel()].view_as(param))

    @staticmethod
    def wide(state: dict[str, Any], name: str) -> Tensor:
        return (state[name].float() - 128) / 127 * state[f"{name}_scale"]

    @staticmethod
    def pack(state: dict[str, Any], name: str, value: Tensor) -> None:
        scale = value.abs().amax(1, keepdim=True)
        state[f"{name}_scale"] = scale
        state[name] = (value / scale.clamp_min(1e-30) * 127 + 128).round().to(torch.uint8)


class Signs(torch.optim.Optimizer):
    """Sign descent; what it remembers is a list of floats and a nested dict, and no tensor."""

    def __init__(self, params: Any, lr: float = 0.002) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    told = self.state[param].setdefault("told", {"norms": [], "steps": 0})
                    told["norms"] = [*told["norms"][-3:], float(param.grad.norm())]
                    told["steps"] += 1
                    param.sub_(group["lr"] / told["steps"] ** 0.1 * param.grad.sign())


def lbfgs(params: Any) -> torch.optim.LBFGS:
    return torch.optim.LBFGS(list(params), lr=0.2, max_iter=4, history_size=5)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "eight bits": Adam8,
    "of the user's own": Signs,
    "lbfgs": lbfgs,
}


class Run:
    """One model and its optimizer, which is given a closure."""

    def __init__(self, model: nn.Module, make: Callable[[Any], torch.optim.Optimizer]) -> None:
        self.model, self.task = model, Task()
        self.optimizer = make([p for n, p in model.named_parameters() if "morphc" not in n.split(".")])

    def step(self, number: int) -> Tensor:
        def closure() -> Tensor:
            self.optimizer.zero_grad()
            loss = self.task.loss(self.model, number)
            loss.backward()
            return loss

        if isinstance(self.optimizer, torch.optim.LBFGS):
            first: Tensor = self.optimizer.step(closure)
            return first
        loss = closure()
        self.optimizer.step()
        return loss

    def grower(self, controller: Any, **options: Any) -> morphc.Grower:
        return morphc.Grower(
            self.model, self.optimizer, controller, self.task.validate, tick_every=4, **options
        )


def state_of(optimizer: torch.optim.Optimizer) -> Iterator[Any]:
    """The leaves of an optimizer's state."""
    waiting: list[Any] = [optimizer.state_dict()]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, list | tuple):
            waiting += value
        else:
            yield value


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_host_keeps_its_optimizer_and_grows(name: str) -> None:
    plain, model = grown(seeds_per_layer=1, blueprint="widen", **LOOSE)
    twin, run = Run(plain, OPTIMIZERS[name]), Run(model, OPTIMIZERS[name])
    grower = run.grower(morphc.ScheduleController([(6, Germinate("2", (0,)))]))
    moves: list[Lifecycle] = []
    for number in range(140):
        twin.step(number)
        event = grower.step(run.step(number))
        moves += [moved.target for moved in event.transitions if moved]
        if L.GRAFTING not in moves:
            assert same(plain, model), number
    assert moves[-1] == L.FOSSILIZED, moves
    assert len(moves) == 7
    assert not same(plain, model)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_snapshot_keeps_what_it_remembers(name: str, tmp_path: Any) -> None:
    _, model = grown(seeds_per_layer=1, blueprint="widen", **LOOSE)
    run = Run(model, OPTIMIZERS[name])
    grower = run.grower(morphc.ScheduleController([(2, Germinate("2", (0,)))]))
    for number in range(30):
        grower.step(run.step(number))
    grower.snapshot().save(tmp_path / "snap")
    kept = morphc.Snapshot.load(tmp_path / "snap")
    ends = []
    for _ in range(2):
        for number in range(30, 60):
            grower.step(run.step(number))
        ends.append(
            ({n: p.detach().clone() for n, p in model.named_parameters()}, copy.deepcopy(run.optimizer))
        )
        grower.restore(kept)
    (mine, first), (theirs, second) = ends
    assert all(torch.equal(value, theirs[key]) for key, value in mine.items())
    for one, other in zip(state_of(first), state_of(second), strict=True):
        assert torch.equal(one, other) if isinstance(one, Tensor) else one == other


def test_recycling_asks_the_hook_for_a_memory_it_can_not_read() -> None:
    _, model = grown(width=8, seeds_per_layer={"0": 8, "2": 2})
    run, asked = Run(model, Adam8), []

    def forget(optimizer: Any, parameter: nn.Parameter, axis: int, indices: Tensor) -> None:
        asked.append((parameter, axis, indices.tolist()))
        optimizer.state.pop(parameter, None)

    grower = run.grower(morphc.ScheduleController([(8, Do("recycle", "0", (3,)))]), on_recycle=forget)
    for number in range(12):
        grower.step(run.step(number))
    expected = [(model[0].weight, 0, [3]), (model[0].bias, 0, [3]), (model[2].weight, 1, [3])]
    assert [(axis, indices) for _, axis, indices in asked] == [(a, i) for _, a, i in expected]
    assert all(one is other for (one, *_), (other, *_) in zip(asked, expected, strict=True))
    assert run.optimizer.state[model[0].weight]["step"] == 4
    assert run.optimizer.state[model[2].bias]["step"] == 12


def slots_of(model: nn.Module) -> list[Tensor]:
    return [param.detach().clone() for param in morphc.seeds(model)["2"].slots["widen"].parameters()]


SCHEDULES: dict[str, Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler]] = {
    "LambdaLR": lambda opt: lr_scheduler.LambdaLR(opt, lambda step: 0.0 if step % 3 else 1.0),
    "OneCycleLR": lambda opt: lr_scheduler.OneCycleLR(opt, max_lr=0.05, total_steps=40),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_seeds_follow_the_schedule(name: str) -> None:
    """AdamW's first step is the rate itself, in every coordinate that has a gradient; a rate of 0 moves nothing."""
    task = Task()
    _, model = grown(blueprint="widen", seed_lr=2.0)
    morphc.seeds(model)["2"].assign([0], L.FINE_TUNING)
    optimizer = torch.optim.SGD([p for n, p in model.named_parameters() if "morphc" not in n], lr=0.01)
    schedule = SCHEDULES[name](optimizer)
    grower = morphc.Grower(model, optimizer, Never(), task.validate, scheduler=schedule, tick_every=100)
    for number in range(7):
        before, rate = slots_of(model), optimizer.param_groups[0]["lr"]
        optimizer.zero_grad()
        loss = task.loss(model, number)
        loss.backward()
        optimizer.step()
        grower.step(loss)
        schedule.step()
        moved = max(
            float((now - then).abs().max()) for now, then in zip(slots_of(model), before, strict=True)
        )
        if number == 0:
            assert moved == pytest.approx(2 * rate, rel=0.02)
        assert (moved > 0) == (rate > 0)
        assert moved < 2 * rate * 3 + 1e-12


@pytest.mark.parametrize("update_first", [False, True])
@pytest.mark.parametrize("state", [L.TRAINING, L.FINE_TUNING])
def test_a_step_that_the_scaler_skips_is_skipped_by_the_seeds(state: Lifecycle, update_first: bool) -> None:
    """Also where the host's gradient alone overflowed."""
    task = Task()
    _, model = grown(blueprint="widen")
    morphc.seeds(model)["2"].assign([0], state)
    optimizer = torch.optim.SGD([p for n, p in model.named_parameters() if "morphc" not in n], lr=0.01)
    scaler = torch.amp.GradScaler("cpu", 2.0**10)
    grower = morphc.Grower(model, optimizer, Never(), task.validate, scaler, tick_every=100)
    moved = []
    for number in range(5):
        before, weight = slots_of(model), model[0].weight.detach().clone()
        optimizer.zero_grad()
        loss = task.loss(model, number)
        scaler.scale(loss).backward()
        if number == 2:
            model[0].weight.grad[0, 0] = float("inf")
        scaler.step(optimizer)
        if update_first:
            scaler.update()
        grower.step(loss)
        if not update_first:
            scaler.update()
        slots = any(not torch.equal(now, then) for now, then in zip(slots_of(model), before, strict=True))
        moved.append((slots, not torch.equal(model[0].weight, weight)))
    assert moved == [(True, True), (True, True), (False, False), (True, True), (True, True)]
    assert scaler.get_scale() == 2.0**9


def test_scaled_and_unscaled_seeds_learn_the_same() -> None:
    task, ends = Task(), []
    for scale in (None, 2.0**8):
        _, model = grown(blueprint="widen")
        morphc.seeds(model)["2"].assign([0], L.FINE_TUNING)
        optimizer = torch.optim.SGD([p for n, p in model.named_parameters() if "morphc" not in n], lr=0.01)
        scaler = torch.amp.GradScaler("cpu", scale or 1.0, enabled=scale is not None)
        grower = morphc.Grower(model, optimizer, Never(), task.validate, scaler, tick_every=4)
        for number in range(20):
            optimizer.zero_grad()
            loss = task.loss(model, number)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            grower.step(loss)
        ends.append(slots_of(model))
    # A power of two scales without rounding.
    assert all(torch.equal(one, other) for one, other in zip(*ends, strict=True))
