"""The Grower end to end: success, cull and cancel, controllers, evaluation, recycling, and what it must not do."""

from __future__ import annotations

import copy
import math
import pickle
import re

import pytest
import torch
from growing import Never, Task, grown, host, same
from torch import nn

import morphc
from morphc import Config, Lifecycle
from morphc.errors import ConfigError, MorphcError, MorphcWarning
from morphc.grow.controllers import Advance, Do, Germinate, ResetMoments, score
from morphc.grow.evaluation import contributions
from morphc.grow.signals import Losses
from morphc.kernels.reference.health import HEALTH
from morphc.runtime import compact

L = Lifecycle
LOOSE = {
    "min_contribution": -1.0,
    "cull_contribution": -2.0,
    "min_stability": 0.0,
    "min_final_stability": 0.0,
}


def train(model, controller, steps, task=None, evaluate=True, tick_every=4, lr=0.01, **options):
    task = task or Task()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    grower = morphc.Grower(
        model, optimizer, controller, task.validate if evaluate else None, tick_every=tick_every, **options
    )
    events = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = task.loss(model, step)
        loss.backward()
        optimizer.step()
        events.append(grower.step(loss))
    return grower, [(t.path, t.seed, t.target) for event in events for t in event.transitions if t]


def test_a_seed_goes_all_the_way_and_the_fold_keeps_what_it_brought():
    task = Task()
    _, model = grown(seeds_per_layer=1, **{**LOOSE, "minimum_ticks": (4, 3, 1, 2, 40)})
    controller = morphc.ScheduleController([(300, Germinate("2", (0,), "widen", candidates=4))])
    _, moves = train(model, controller, 700, task)
    assert [target for _, _, target in moves] == [
        L.GERMINATED,
        L.TRAINING,
        L.GRAFTING,
        L.STABILIZATION,
        L.EVALUATING,
        L.FINE_TUNING,
        L.FOSSILIZED,
    ]
    folded = morphc.fold(model)
    assert folded[0].out_features == 4 + 3
    assert torch.allclose(folded(task.vx), model(task.vx), atol=1e-5)
    _, alone = grown(seeds_per_layer=1)
    train(alone, Never(), 700, task)
    assert task.validate(folded) < 0.95 * task.validate(alone)


def test_a_seed_that_makes_it_worse_is_culled_and_the_host_is_its_own_again():
    task = Task()
    _, model = grown(**{**LOOSE, "cull_contribution": -0.05})
    seeds = morphc.seeds(model)
    seeds["2"].germinate([0], blueprint="bottleneck")
    seeds["2"].assign([0], L.EVALUATING)
    with torch.no_grad():
        seeds["2"].slots["bottleneck"].out_bias[:] = 5.0
    _, moves = train(model, Never(), 16, task, lr=1e-6)
    assert moves[0] == ("2", 0, L.CULLED)
    assert torch.equal(model(task.vx), morphc.detach(model)(task.vx))
    assert (seeds["2"].slots["bottleneck"].owner == -1).all()


def test_without_an_evaluation_nothing_passes_and_the_seed_is_given_up():
    _, model = grown(graft_patience=3, min_isolated_improvement=-1.0)
    controller = morphc.ScheduleController([(0, Germinate("2", (0,)))])
    with pytest.warns(MorphcWarning, match="evaluate="):
        _, moves = train(model, controller, 120, evaluate=False)
    assert L.FINE_TUNING not in [target for _, _, target in moves]
    assert ("2", 0, L.CULLED) in moves


def test_a_cancelled_seed_leaves_no_trace():
    task = Task()
    plain, model = grown(min_isolated_improvement=2.0)
    seeds = morphc.seeds(model)
    seeds["2"].germinate([0, 1])
    controller = morphc.ScheduleController([(30, Do("cancel", "2", (0, 1)))])
    _, moves = train(model, controller, 60, task)
    expected = [L.TRAINING, L.CANCELLED, L.DORMANT]
    assert [target for _, seed, target in moves if seed == 0] == expected
    assert all((bank.owner == -1).all() for bank in seeds["2"].slots.values())
    optimizer = torch.optim.Adam(plain.parameters(), lr=0.01)
    for step in range(60):
        optimizer.zero_grad()
        task.loss(plain, step).backward()
        optimizer.step()
    assert same(plain, model)


@pytest.fixture
def reads(monkeypatch):
    """The names of what a device would have to be waited for, as it is called."""
    found = []
    for name in ("item", "tolist", "cpu", "__bool__", "__float__", "__int__", "nonzero"):
        own = getattr(torch.Tensor, name)

        def told(self, *args, _own=own, _name=name, **kwargs):
            found.append(_name)
            return _own(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, told)
    return found


@pytest.mark.parametrize("state", [L.TRAINING, L.GRAFTING, L.FINE_TUNING])
def test_between_ticks_nothing_reads_the_device(state, reads, monkeypatch):
    # In host memory states are read when they have changed: here as on other devices.
    monkeypatch.setattr(compact, "in_host_memory", lambda *_: False)
    task = Task()
    _, model = grown()
    morphc.seeds(model)["2"].assign([0, 1], state, alpha=0.5 if state is L.GRAFTING else None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    grower = morphc.Grower(model, optimizer, Never(), task.validate, tick_every=8)
    reads.clear()
    for step in range(7):
        optimizer.zero_grad()
        loss = task.loss(model, step)
        loss.backward()
        optimizer.step()
        grower.step(loss)
    assert reads == []
    grower.step(task.loss(model, 7))
    assert reads


def test_growing_goes_on_in_a_deep_copy_and_leaves_the_original_alone():
    task = Task()
    for state in L:
        _, model = grown()
        morphc.seeds(model)["2"].assign([0], state)
        twin = copy.deepcopy(model)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        train(twin, morphc.PlateauController(patience=1), 40, task)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), state
        assert torch.equal(task.loss(model, 0), task.loss(copy.deepcopy(model), 0))


def test_an_optimizer_made_before_compile_trains_the_model():
    plain = host()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05)
    model = morphc.compile(plain, (torch.zeros(2, 6),), config=Config(backend="torch"))
    task = Task()
    grower = morphc.Grower(model, optimizer, Never(), task.validate)
    first = task.validate(model)
    for step in range(50):
        optimizer.zero_grad()
        loss = task.loss(model, step)
        loss.backward()
        optimizer.step()
        grower.step(loss)
    assert task.validate(model) < 0.9 * first


def test_the_state_of_a_grower_round_trips_and_the_run_goes_on_bitwise(tmp_path):
    task = Task()

    def run(model, grower, optimizer, steps):
        for step in steps:
            optimizer.zero_grad()
            loss = task.loss(model, step)
            loss.backward()
            optimizer.step()
            grower.step(loss)

    def made(model):
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        controller = morphc.PlateauController(patience=1, threshold=0.5, candidates=2)
        return morphc.Grower(model, optimizer, controller, task.validate, tick_every=4), optimizer

    _, model = grown(**LOOSE)
    grower, optimizer = made(model)
    run(model, grower, optimizer, range(50))
    grower.snapshot().save(tmp_path / "snap")
    morphc.save(model, tmp_path / "model")
    run(model, grower, optimizer, range(50, 120))

    again = morphc.load(host(), tmp_path / "model")
    other, optimizer = made(again)
    run(again, other, optimizer, range(3))  # so that the optimizer has something to be replaced
    other.restore(morphc.Snapshot.load(tmp_path / "snap"))
    assert other.steps == 50
    run(again, other, optimizer, range(50, 120))
    assert same(model, again)
    assert torch.equal(morphc.seeds(model).lifecycle, morphc.seeds(again).lifecycle)
    assert max(morphc.seeds(model).lifecycle.tolist()) > L.GERMINATED


@pytest.mark.parametrize("players", [2, 5])
def test_contributions_share_what_the_seeds_bring(players):
    """A game whose Shapley values are known: each brings its number, and the first two something together."""
    gains = dict(enumerate((3.0, 1.0, 0.5, 0.0, -2.0)[:players]))
    asked = []

    class Game:
        def without(self, off):
            asked.append(off)
            present = set(gains) - off
            return 100.0 - sum(gains[p] for p in present) - (4.0 if {0, 1} <= present else 0.0)

    found = contributions(Game(), list(gains), True, draw=1)
    if players == 2:
        assert found == {0: pytest.approx(7 / 99), 1: pytest.approx(5 / 97)}
        assert len(asked) == 3
    else:
        # An order and its reverse together give each of the pair exactly half.
        expected = {p: (gains[p] + (2.0 if p < 2 else 0.0)) / 100 for p in gains}
        assert found == {p: pytest.approx(value) for p, value in expected.items()}


def test_an_evaluation_disturbs_nothing():
    _, model = grown()
    model.train()
    model[1].eval()
    morphc.seeds(model)["2"].assign([0], L.EVALUATING)
    task, seen = Task(), []

    def evaluate(net):
        seen.append((net.training, torch.is_grad_enabled(), net[1].training))
        return task.validate(net) + 0 * float(torch.rand(()))

    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    grower = morphc.Grower(model, optimizer, Never(), evaluate, tick_every=1)
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    for _ in range(3):
        grower.step(torch.tensor(1.0))
    assert set(seen) == {(False, False, False)}
    assert torch.equal(torch.rand(3), expected)
    assert (model.training, model[1].training, model[0].training) == (True, False, True)
    assert morphc.seeds(model).alpha.tolist() == [0, 0, 1, 0]


def test_plateau_germinates_where_the_score_says_once_the_metric_stalls():
    _, model = grown(blueprint="bottleneck")
    controller = morphc.PlateauController(patience=2, threshold=0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    grower = morphc.Grower(model, optimizer, controller, lambda net: 0.0, tick_every=1)
    wanted = []
    for metric in (1.0, 0.8, 0.79, 0.78):
        grower.epoch(metric)
        sums = grower.store.state.sums
        grower.store.sites["0"].pulse.count += 1  # as if it had been measured
        sums.zero_()
        grower.store.state.counts.fill_(10)
        grower.store.state.counts[1:] = 0
        sums[4, 1] = 15.0  # the second seed's chunk is dead in three values of four
        event = grower.step(torch.tensor(1.0))
        wanted.append([(t.path, t.seed) for t in event.transitions if t.target is L.GERMINATED])
    assert wanted == [[], [], [], [("0", 1)]]


def test_scores_are_weighted_sums_of_what_was_measured():
    nan = math.nan
    told = dict.fromkeys(HEALTH, torch.full((3,), nan, dtype=torch.float64))
    told["dead_fraction"] = torch.tensor([0.5, 0.0, nan]).double()
    told["variance"] = torch.tensor([1.0, 4.0, nan]).double()
    told["gradient_norm"] = torch.tensor([1.0, 2.0, 0.0]).double()
    assert score(told, (1.0, 0.5, 0.5, 2.0, 1.0)).tolist() == [0.5 + 0.5 * 0.75 + 2 * 0.5, 2.0, 0.0]


def test_recycling_clears_dead_units_and_the_optimizers_memory_of_them():
    _, model = grown(width=8, seeds_per_layer={"0": 8, "2": 2})
    task = Task()
    with torch.no_grad():
        model[0].bias[[2, 5]] = -100.0
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, amsgrad=True)
    hooked = []
    grower = morphc.Grower(
        model,
        optimizer,
        Never(),
        task.validate,
        on_recycle=lambda opt, param, axis, indices: hooked.append((param, axis, indices.tolist())),
    )
    for step in range(5):
        optimizer.zero_grad()
        loss = task.loss(model, step)
        loss.backward()
        optimizer.step()
        grower.step(loss)
    before = model(task.vx)
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    done = grower.recycle("0", [2, 5])
    assert all(done)
    assert torch.allclose(model(task.vx), before, atol=1e-6)
    live = [0, 1, 3, 4, 6, 7]
    assert torch.equal(model[0].weight[live], kept["0.weight"][live])
    assert not torch.equal(model[0].weight[[2, 5]], kept["0.weight"][[2, 5]])
    assert model[0].bias[[2, 5]].tolist() == [0.0, 0.0]
    assert (model[2].weight[:, [2, 5]] == 0).all()
    for param, axis in ((model[0].weight, 0), (model[0].bias, 0), (model[2].weight, 1)):
        for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
            value = optimizer.state[param][name].movedim(axis, 0)
            assert not value[[2, 5]].any()
            assert value[live].any()
    assert [(axis, indices) for _, axis, indices in hooked] == [(0, [2, 5]), (0, [2, 5]), (1, [2, 5])]
    grower.restore(grower.before_recycling)
    assert all(
        torch.equal(value, kept[name]) for name, value in model.state_dict().items() if name[0].isdigit()
    )


def test_what_can_not_be_recycled_says_why():
    _, model = grown()
    (last,) = morphc.seeds(model)["2"].recycle([0])
    assert "inner layer of a block" in last.reason
    seeds = morphc.seeds(model)
    seeds["0"].assign([0], L.TRAINING)
    (busy,) = seeds["0"].recycle([0])
    assert "TRAINING, must be DORMANT" in busy.reason


def test_the_recycle_controller_finds_dead_units_and_pulls_to_the_beginning():
    _, model = grown(width=8, seeds_per_layer={"0": 8, "2": 2}, telemetry_every=1)
    with torch.no_grad():
        model[0].bias[[2, 5]] = -100.0
    controller = morphc.RecycleController(tau=0.0, every=8, l2_init=20.0)
    started = model[0].weight.detach().clone()
    _, moves = train(model, controller, 8, tick_every=4)
    assert [(path, seed) for path, seed, target in moves if target is L.DORMANT] == [("0", 2), ("0", 5)]
    _, free = grown(width=8, seeds_per_layer={"0": 8, "2": 2}, telemetry_every=1)
    train(free, Never(), 8, tick_every=4)
    live = [0, 1, 3, 4, 6, 7]
    assert (model[0].weight - started)[live].norm() < 0.99 * (free[0].weight - started)[live].norm()


@pytest.mark.parametrize("options", [{"tick_every": 0}, {"tick_every": True}, {"better": "best"}])
def test_bad_options_are_refused(options):
    _, model = grown()
    with pytest.raises(ConfigError):
        morphc.Grower(model, torch.optim.SGD(model.parameters()), evaluate=lambda net: 0.0, **options)


@pytest.mark.parametrize("include", [("*",), ("*in_proj_weight",)])
def test_plateau_germinates_where_a_fold_can_follow_if_there_is_such_a_place(include):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0, batch_first=True)
    x = torch.randn(2, 3, 8)
    config = Config(seeds_per_layer=2, slots=4, include=include, backend="torch")
    model = morphc.compile(layer, (x,), config=config)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    controller = morphc.PlateauController(patience=1, seeds=20)
    grower = morphc.Grower(model, optimizer, controller, lambda net: 1.0, tick_every=1)
    model(x).sum().backward()
    paths = {moved.path for _ in range(3) for moved in grower.step(1.0).transitions if moved}
    only = {"self_attn.in_proj_weight"}
    others = {"self_attn.out_proj", "linear1", "linear2"}
    assert paths == (others if include == ("*",) else only)


@pytest.mark.parametrize("given", [None, "good", torch.ones(3), {"loss": 1.0}])
def test_what_is_no_number_is_refused_by_name(given):
    _, model = grown(**LOOSE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    grower = morphc.Grower(model, optimizer, Never(), lambda net: given, tick_every=1)
    with pytest.raises(ConfigError, match="the loss given to step is"):
        grower.step(given)
    assert grower.steps == 0
    with pytest.raises(ConfigError, match="the metric given to epoch is"):
        grower.epoch(given)
    morphc.seeds(model)["2"].assign([0], L.EVALUATING)
    grower.step(1.0)
    with pytest.raises(ConfigError, match="what evaluate= returned is"):
        grower.step(1.0)
    with pytest.raises(ConfigError, match="is no function"):
        morphc.Grower(model, optimizer, Never(), 3.0)


@pytest.mark.parametrize(
    ("decided", "error"),
    [
        (Germinate("2", (0,)), "has to be a list"),
        (["germinate"], "no command"),
        ([Do("explode", "2", (0,))], "unknown command of Do 'explode'"),
        ([Advance("2", (0,), "FOSSILIZED")], "no lifecycle state"),
    ],
)
def test_what_is_no_command_is_refused(decided, error):
    _, model = grown(**LOOSE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    controller = morphc.CallbackController(lambda seen: decided)
    grower = morphc.Grower(model, optimizer, controller, lambda net: 1.0, tick_every=1)
    with pytest.raises(MorphcError, match=error):
        grower.step(1.0)
    for bad in (controller.decide, morphc.PlateauController):
        with pytest.raises(ConfigError, match="no method `decide` to call"):
            morphc.Grower(model, optimizer, bad, lambda net: 1.0)
    with pytest.raises(ConfigError, match="is no optimizer"):
        morphc.Grower(model, None, controller, lambda net: 1.0)


def test_an_evaluation_that_is_not_finite_is_told_as_such():
    _, model = grown(**LOOSE)
    morphc.seeds(model)["2"].assign([0], L.EVALUATING)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    grower = morphc.Grower(model, optimizer, Never(), lambda net: float("nan"), tick_every=1)
    told = [moved for _ in range(4) for moved in grower.step(1.0).transitions]
    assert "no finite number" in told[-1].reason


def test_losses_tell_outliers_and_stability():
    losses = Losses(6.0, 3)
    steady = [1.0 + 0.01 * (-1) ** n for n in range(64)]
    assert losses.tell(steady) == ""
    assert losses.tell([1.05, 1.5, 1.0, 1.5]) == ""
    assert "3 of the last" in losses.tell([1.5])
    assert "nan" in Losses(6.0, 3).tell([1.0, math.nan])
    line = Losses(6.0, 3)
    for n in range(10):
        line.tell([2.0 - 0.1 * n])
    assert line.stability == pytest.approx(1.0)
    assert math.isnan(Losses(6.0, 3).stability)


def test_the_newborns_gradient_is_measured_beside_its_incumbents():
    _, model = grown()
    morphc.seeds(model)["2"].assign([1], L.FINE_TUNING, blueprint="bottleneck")
    task = Task()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    grower = morphc.Grower(model, optimizer, Never(), task.validate, tick_every=1)
    loss = task.loss(model, 0)
    loss.backward()
    bank = morphc.seeds(model)["2"].slots["bottleneck"]
    slot = bank.owner.tolist().index(1)
    mine = torch.cat([grad[slot].flatten() for grad in bank.grads().values()]).square().mean().sqrt()
    layer = torch.cat([p.grad.flatten() for p in model[2].parameters(recurse=False)]).square().mean().sqrt()
    grower.step(loss)
    assert grower.learning()["2", 1]["gradient_ratio"] == pytest.approx(float(mine / layer), rel=1e-5)


def test_a_frozen_host_still_grows():
    task = Task()
    plain = host()
    plain.requires_grad_(False)
    model = morphc.compile(
        plain,
        (torch.zeros(2, 6),),
        config=Config(seeds_per_layer=1, rank=4, backend="torch", blueprint="widen"),
    )
    morphc.seeds(model)["2"].assign([0], L.FINE_TUNING)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.01)
    grower = morphc.Grower(model, optimizer, Never(), task.validate, tick_every=100)
    first = task.validate(model)
    for step in range(60):
        loss = task.loss(model, step)
        loss.backward()
        grower.step(loss)
    assert task.validate(model) < 0.95 * first


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scaler": "x"}, "scaler='x' has no method 'get_scale'"),
        ({"scheduler": "x"}, "scheduler='x' has no method 'state_dict'"),
        ({"tick_every": 2.0}, "tick_every=2.0 is not a whole number of at least 1"),
    ],
)
def test_what_the_run_has_is_checked_where_it_is_given(options, words):
    _, model = grown()
    with pytest.raises(ConfigError, match=re.escape(words)):
        morphc.Grower(model, torch.optim.SGD(model.parameters(), 0.1), evaluate=lambda _: 0.0, **options)


def test_a_restore_of_something_else_changes_nothing():
    _, model = grown()
    grower = morphc.Grower(model, torch.optim.SGD(model.parameters(), 0.1), evaluate=lambda _: 0.0)
    with pytest.raises(ConfigError, match="None is no snapshot"):
        grower.restore(None)


@pytest.mark.parametrize("options", [{"seeds": "2"}, {"most": 1.5}, {"patience": 0}, {"cooldown": -1}])
def test_a_plateau_is_counted_in_whole_numbers(options):
    ((name, value),) = options.items()
    with pytest.raises(ConfigError, match=f"{name}={value!r} is not a whole number"):
        morphc.PlateauController(**options)


@pytest.mark.parametrize("schedule", [[(1, "grow")], [3], [("1", ResetMoments())], ResetMoments()])
def test_a_schedule_has_steps_and_commands(schedule):
    with pytest.raises(ConfigError, match="is no pair of a step and a command"):
        morphc.ScheduleController(schedule)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_grower_is_not_copied_but_says_what_is(copied):
    _, model = grown()
    grower = morphc.Grower(model, torch.optim.SGD(model.parameters(), 0.1), evaluate=lambda _: 0.0)
    with pytest.raises(TypeError, match=r"snapshot\(\) or state_dict\(\)"):
        copied(grower)


def test_the_last_grower_of_a_model_is_in_charge():
    """A cell of a notebook that is run again makes another."""
    _, model = grown(seeds_per_layer=1)
    first, _ = train(model, Never(), 2, tick_every=2)
    second, _ = train(model, Never(), 2, tick_every=2)
    before = first.steps
    with pytest.raises(ConfigError, match="another Grower was made of this model"):
        first.step(0.0)
    assert first.steps == before
    second.step(0.0)
    of_a_copy, _ = train(copy.deepcopy(model), Never(), 2, tick_every=2)
    of_a_copy.step(0.0)
    second.step(0.0)
