"""How large a graft is: least squares where that is right, corrected by the loss; grafts at once, by a schedule."""

from __future__ import annotations

import math
from contextlib import nullcontext

import pytest
import torch
from growing import Never, Task, grown
from torch import nn
from torch.nn import functional as F

import morphc
from morphc import Config, Lifecycle
from morphc.grow.controllers import Advance, Germinate
from morphc.grow.linesearch import Refit, search

L = Lifecycle
ONE = {"width": 6, "seeds_per_layer": 1, "isolation_every": 1, "blueprint": "widen", "rank": 2}


@pytest.mark.parametrize("best", [0.02, 0.07, 0.4, 1.0, 1.7, 3.0])
def test_the_search_comes_near_the_best_scale_in_few_steps(best):
    asked = []

    def value(scale):
        asked.append(scale)
        return 5.0 + (scale - best) ** 2

    scale, before, after = search(value)
    assert scale == pytest.approx(best, rel=0.05)
    assert (before, after) == (5.0 + best**2, pytest.approx(5.0, abs=0.01))
    assert len(asked) == len(set(asked)) <= 7


def test_the_search_knows_when_there_is_nothing_to_learn():
    assert search(lambda scale: 0.0) == (1.0, 0.0, 0.0)
    scale, _, after = search(lambda scale: math.nan)
    assert (scale, math.isnan(after)) == (1.0, True)
    assert search(lambda scale: scale)[0] == 1 / 64
    assert search(lambda scale: -scale if scale < 0.1 else math.inf)[0] == 1 / 16


def classes(logits, target):
    return F.cross_entropy(4 * logits, target.argmax(-1))


LOSSES = {
    "mean squared error": F.mse_loss,
    "sum squared error": lambda out, target: F.mse_loss(out, target, reduction="sum"),
    "cross-entropy": classes,
    "sum cross-entropy": lambda out, target: classes(out, target) * len(out),
}


def grafted(loss_of, path, by, seeds_learn=True, steps=40, **options):
    """Trains a seed in isolation on one batch until it is grafted; (model, Refit, loss(scale) at alpha 1)."""
    task = Task()
    x, y = task.x[0], task.y[0]
    if path == "2":
        model = grown(**{**ONE, **options})[1]
    else:
        torch.manual_seed(3)
        deep = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4))
        chosen = {**ONE, "minimum_ticks": (4, 3, 1, 2, 3), "backend": "torch", **options}
        del chosen["width"]
        model = morphc.compile(deep, (x,), config=Config(slots=4, **chosen))
    seeds = morphc.seeds(model)
    assert all(seeds["2"].germinate([0], candidates=4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    evaluate = {"evaluate": lambda net: float(loss_of(net(x), y))} if by == "evaluate" else {}
    with nullcontext() if evaluate else pytest.warns(morphc.errors.MorphcWarning):
        grower = morphc.Grower(model, optimizer, Never(), tick_every=4, **evaluate)

    def closure():
        assert not model.training
        assert not torch.is_grad_enabled()
        return loss_of(model(x), y)

    for _ in range(steps):
        optimizer.param_groups[0]["lr"] = 0.0
        loss = loss_of(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        optimizer.param_groups[0]["lr"] = 0.05 * seeds_learn  # the seeds', which follow the host's
        event = grower.step(loss, closure if by == "loss" else None)
        if (
            not seeds_learn and grower.steps == 20
        ):  # without an output there is no improvement, and no gate opens
            assert all(grower.advance("2", [0], L.GRAFTING, gates=False, event=event))
        if event.refits:
            break
    assert seeds["2"].lifecycle.tolist() == [L.GRAFTING]
    seeds["2"].assign([0], L.STABILIZATION)
    bank = seeds["2"].slots["widen"]
    (slot,) = [place for place, owner in enumerate(bank.owner.tolist()) if owner == 0]
    weight = bank.out_weight[slot].clone()

    @torch.no_grad()
    def at(scale):
        bank.out_weight[slot] = weight * scale
        value = float(loss_of(model(x), y))
        bank.out_weight[slot] = weight
        return value

    return event.refits["2", 0], at


@pytest.mark.parametrize("path", ["2", "deep"])
@pytest.mark.parametrize("name", LOSSES)
def test_a_graft_has_the_size_that_lowers_the_loss_most(name, path):
    told, at = grafted(LOSSES[name], path, "loss")
    assert told.by == "loss"
    assert told.before == pytest.approx(at(0.0), rel=1e-5)
    assert told.after == pytest.approx(at(1.0), rel=1e-5)
    assert at(1.0) < at(0.0)
    best = min(at(step / 20) for step in range(81))
    assert at(0.0) - at(1.0) > 0.9 * (at(0.0) - best)


@pytest.mark.parametrize("name", ["mean squared error", "sum squared error"])
def test_least_squares_alone_is_right_for_a_squared_loss_at_a_linear_head(name):
    told, at = grafted(LOSSES[name], "2", "estimate", seeds_learn=False)
    assert (told.by, told.scale) == ("estimate", 1.0)
    best = min(at(step / 20) for step in range(81))
    assert at(0.0) - at(1.0) > 0.98 * (at(0.0) - best)
    searched, _ = grafted(LOSSES[name], "2", "loss", seeds_learn=False)
    assert searched.scale == pytest.approx(1.0, abs=0.05)


def test_a_validation_loss_is_searched_where_there_is_no_closure():
    told, at = grafted(LOSSES["cross-entropy"], "deep", "evaluate")
    assert told.by == "evaluate"
    assert at(1.0) < at(0.0)


def test_an_evaluation_that_tells_nothing_leaves_the_estimate():
    _, model = grown(**ONE)
    site = morphc.seeds(model)["2"]
    task = Task()
    site.germinate([0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    grower = morphc.Grower(model, optimizer, Never(), lambda net: 1.0, tick_every=4)
    refits = {}
    for step in range(60):
        loss = task.loss(model, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        refits |= grower.step(loss).refits
    assert refits == {("2", 0): Refit("evaluate", 1.0, 1.0, 1.0)}


@pytest.mark.parametrize("finite", [True, False])
def test_a_closure_without_a_finite_loss_leaves_it_to_the_evaluation(finite):
    _, model = grown(**ONE)
    task = Task()
    morphc.seeds(model)["2"].germinate([0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    evaluate = task.validate if finite else lambda net: float("nan")
    grower = morphc.Grower(model, optimizer, Never(), evaluate, tick_every=4)
    refits = {}
    for step in range(60):
        loss = task.loss(model, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        refits |= grower.step(loss, lambda: (model(task.vx[:0]) - task.vy[:0]).square().mean()).refits
    assert refits["2", 0].by == ("evaluate" if finite else "estimate")


def test_a_closure_that_fails_leaves_the_estimate_and_is_heard():
    _, model = grown(**ONE)
    site = morphc.seeds(model)["2"]
    site.germinate([0])
    site.advance([0], to=L.TRAINING)
    task = Task()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    grower = morphc.Grower(model, optimizer, Never(), task.validate, tick_every=4)

    def closure():
        raise RuntimeError("no batch")

    def train():
        for step in range(60):
            loss = task.loss(model, step)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            grower.step(loss, closure)

    with pytest.raises(RuntimeError, match="no batch"):
        train()
    assert [cohort.rows for cohort in grower.cohorts.open] == [{site.rows.start}]
    assert grower.cohorts.open[0].snapshot is not None
    assert morphc.seeds(model).alpha.tolist() == [0.0, 0.0]
    bank = site.slots["widen"]
    assert bank.out_weight[bank.owner.tolist().index(0)].abs().sum() > 0


def test_what_candidates_are_worth_is_known_before_a_graft():
    _, model = grown(minimum_ticks=(1000, 1, 1, 1, 1), **ONE)
    site = morphc.seeds(model)["2"]
    assert all(site.germinate([0], candidates=4))
    assert site.candidates(0) == []
    task = Task()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    grower = morphc.Grower(model, optimizer, Never(), task.validate, tick_every=1)
    for _ in range(7):  # at the first it has only germinated
        loss = task.loss(model, 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = 0.0
        optimizer.step()
        optimizer.param_groups[0]["lr"] = 0.02
        grower.step(loss)
    found = site.candidates(0)
    assert [told["slot"] for told in found] == [0, 1, 2, 3]
    with torch.no_grad():
        g = 2 * (model(task.x[0]) - task.y[0]) / task.y[0].numel()
    for told in found:
        assert told["steps"] == 6
        assert told["chunk_gradient"] == pytest.approx(float(g.square().sum()), rel=1e-4)
        assert told["site_gradient"] == pytest.approx(told["chunk_gradient"])
        assert 0 < told["explained"] <= 1
        assert told["isolated_improvement"] <= told["explained"] + 1e-3
    best = max(found, key=lambda told: told["explained"])
    learned = grower.learning()["2", 0]
    assert {name: learned[name] for name in ("explained", "chunk_gradient", "site_gradient")} == {
        name: best[name] for name in ("explained", "chunk_gradient", "site_gradient")
    }


def test_a_schedule_grafts_at_once_and_the_fold_is_wider():
    _, model = grown(minimum_ticks=(1000, 1, 1, 1, 1), **ONE)
    task = Task()
    controller = morphc.ScheduleController(
        [(0, Germinate("2", (0,), candidates=4)), (40, Advance("2", (0,), L.FOSSILIZED, gates=False))]
    )
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    grower = morphc.Grower(model, optimizer, controller, lambda net: 1.0, tick_every=4)
    told = []
    for step in range(44):
        loss = task.loss(model, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        event = grower.step(loss, lambda step=step: task.loss(model, step))
        told += [(t.source, t.target) for t in event.transitions if t]
        refits = event.refits if grower.steps == 40 else {}
        if refits:
            assert refits["2", 0].by == "loss"
            assert refits["2", 0].after < refits["2", 0].before
    assert told == [
        (L.DORMANT, L.GERMINATED),
        (L.GERMINATED, L.TRAINING),
        (L.TRAINING, L.FOSSILIZED),
    ]
    assert [entry.target for entry in morphc.seeds(model).history("2", 0)][-2:] == [
        L.FINE_TUNING,
        L.FOSSILIZED,
    ]
    assert morphc.seeds(model)["2"].alpha.tolist() == [1.0]
    assert (morphc.seeds(model)["2"].slots["widen"].owner >= 0).sum() == 1
    assert morphc.fold(model)[0].out_features == 6 + 2
    assert not grower.cohorts.open


def test_a_forced_graft_can_be_rolled_back_and_an_embargo_is_not_forced():
    _, model = grown(embargo_ticks=50, **ONE)
    task = Task()
    seeds = morphc.seeds(model)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    grower = morphc.Grower(model, optimizer, Never(), task.validate, tick_every=4)

    def train(steps, poison=1.0):
        for step in range(grower.steps, grower.steps + steps):
            loss = task.loss(model, step) * poison
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            event = grower.step(loss)
        return event

    seeds["2"].germinate([0])
    train(8)
    (told,) = grower.advance("2", [0], L.FINE_TUNING, gates=False)
    assert (told.ok, told.source, told.target) == (True, L.TRAINING, L.FINE_TUNING)
    event = train(4, float("nan"))
    assert event.rewound_to == 8
    assert seeds["2"].lifecycle.tolist() == [L.ROLLED_BACK]
    assert all(seeds["2"].reset([0]))
    (refused,) = seeds["2"].advance([0], to=L.FOSSILIZED, gates=False)
    assert refused.gate == "embargo"
    (no_way,) = seeds["2"].advance([0], to=L.CANCELLED, gates=False)
    assert (no_way.gate, seeds["2"].lifecycle.tolist()) == ("table", [L.DORMANT])


def test_a_graft_without_a_grower_takes_the_loss_from_the_metrics():
    _, model = grown(**{**ONE, "minimum_ticks": (0, 0, 0, 0, 0)})
    site, task = morphc.seeds(model)["2"], Task()
    site.germinate([0])
    site.advance([0], to=L.TRAINING)
    first = task.loss(model, 0)
    first.backward()
    morphc.seeds(model).step_optimizer(lr=0.01)
    assert all(site.advance([0], to=L.FOSSILIZED, metrics={"loss": first.item()}, gates=False))
    assert task.loss(model, 0).item() < first.item()


def test_a_block_without_biases_gets_none_by_widening():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(6, 4, bias=False), nn.ReLU(), nn.Linear(4, 4, bias=False))
    config = Config(seeds_per_layer=1, slots=1, rank=3, blueprint="widen", backend="torch")
    model = morphc.compile(plain, (torch.zeros(2, 6),), config=config)
    morphc.seeds(model)["2"].assign([0], L.FINE_TUNING)
    task = Task()
    for step in range(5):
        task.loss(model, step).backward()
        morphc.seeds(model).step_optimizer(lr=0.1)
    bank = morphc.seeds(model)["2"].slots["widen"]
    assert not bank.in_bias.any()
    assert bank.out_weight.any()
    folded = morphc.fold(model)
    assert folded[0].bias is None
    assert torch.allclose(folded(task.vx), model.eval()(task.vx), atol=1e-5)
    with_bias = grown(width=4, seeds_per_layer=1, blueprint="widen")[1]
    morphc.seeds(with_bias)["2"].assign([0], L.FINE_TUNING)
    for step in range(5):
        task.loss(with_bias, step).backward()
        morphc.seeds(with_bias).step_optimizer(lr=0.1)
    assert morphc.seeds(with_bias)["2"].slots["widen"].in_bias.any()
