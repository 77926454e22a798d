"""Recycling of the host's own units: what is dormant, what begins anew, and what keeps the rest learnable."""

from __future__ import annotations

import copy
import sys
import warnings

import pytest
import torch
from growing import Never, Task, grown
from torch import nn
from torch.nn import functional as F

import morphc
from morphc import Config, Lifecycle
from morphc.errors import ConfigError, SeedError
from morphc.grow.controllers import Do
from morphc.grow.recycler import Jumps
from morphc.kernels.reference.activations import activation

L = Lifecycle
UNITS = {"width": 8, "seeds_per_layer": {"0": 8, "2": 2}}


def run(model, controller, steps, optimizer=None, tick_every=4, **options):
    """Trains a model with a Grower around it; the Grower and what was recycled, by step."""
    task = Task()
    optimizer = optimizer or torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    grower = morphc.Grower(model, optimizer, controller, tick_every=tick_every, **options)
    recycled = {}
    for step in range(steps):
        optimizer.zero_grad()
        loss = task.loss(model, step)
        loss.backward()
        optimizer.step()
        event = grower.step(loss)
        found = [(t.path, t.seed) for t in event.transitions if t and t.target is L.DORMANT]
        if found:
            recycled[grower.steps] = found
    return grower, recycled


def silence(model, units, bias=-100.0):
    with torch.no_grad():
        model[0].bias[units] = bias


def test_it_recycles_without_growing_and_asks_for_no_evaluation():
    _, model = grown(telemetry_every=1, **UNITS)
    silence(model, [2, 5])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, recycled = run(model, morphc.RecycleController(tau=0.0, every=8), 24)
    assert recycled == {8: [("0", 2), ("0", 5)]}


def test_dormant_by_activation_is_the_share_of_the_layers_mean_after_the_activation():
    _, model = grown(telemetry_every=1, **UNITS)
    silence(model, [3], bias=-1.0)
    task, ema = Task(), 0.9
    controller = morphc.RecycleController(tau=0.0, every=1000, by="activation", ema=ema)
    plain = copy.deepcopy(morphc.detach(model))
    run(model, controller, 8, torch.optim.SGD(model.parameters(), lr=0.0))
    seen = [F.relu(plain[0](task.x[step])).mean(0).double() for step in range(8)]
    first, second = torch.stack(seen[:4]).mean(0), torch.stack(seen[4:]).mean(0)
    keep = ema**4
    expected = ((keep * first + second) / (1 + keep)).detach()
    rows = morphc.seeds(model)["0"].rows
    assert torch.allclose((controller.sums / controller.weights)[rows], expected, rtol=1e-5)
    level = expected / expected.mean()
    tau = float(level.sort().values[:2].mean())
    _, again = grown(telemetry_every=1, **UNITS)
    silence(again, [3], bias=-1.0)
    again_controller = morphc.RecycleController(tau=tau, every=8, by="activation", ema=ema)
    _, recycled = run(again, again_controller, 8, torch.optim.SGD(again.parameters(), lr=0.0))
    assert recycled == {8: [("0", int(level.argmin()))]}


def test_a_unit_that_was_recycled_is_judged_by_what_it_did_since():
    _, model = grown(telemetry_every=1, gradient_telemetry=True, **UNITS)
    silence(model, [2, 5])
    controller = morphc.RecycleController(tau=0.02, every=8, by="gradient", ema=0.99)
    _, recycled = run(model, controller, 40)
    assert recycled[8] == [("0", 2), ("0", 5)]
    assert all(seed not in (2, 5) for step, found in recycled.items() if step > 8 for _, seed in found)


def test_gradients_that_are_not_measured_are_asked_for():
    _, model = grown(**UNITS)
    with pytest.raises(ConfigError, match="gradient_telemetry=True"):
        run(model, morphc.RecycleController(by="gradient"), 1)
    _, model = grown(telemetry_every=0, **UNITS)
    with pytest.raises(ConfigError, match="telemetry_every=0"):
        run(model, morphc.RecycleController(by="dead"), 1)


@pytest.mark.parametrize("fused", [False, True])
def test_l2_init_is_a_term_of_the_loss_whose_anchor_follows_recycled_units(fused):
    strength = 0.05
    plain, model = grown(**UNITS)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=fused)
    grower, _ = run(model, morphc.RecycleController(every=1000, l2_init=strength), 10, optimizer)
    assert all(grower.recycle("0", [1]))
    task = Task()
    for step in range(10, 20):
        optimizer.zero_grad()
        loss = task.loss(model, step)
        loss.backward()
        optimizer.step()
        grower.step(loss)

    own = torch.optim.Adam(plain.parameters(), lr=0.01, fused=fused)
    anchors = [p.detach().clone() for p in plain.parameters()]
    for step in range(20):
        if step == 10:
            changed = [(plain[0].weight, 0), (plain[0].bias, 0), (plain[2].weight, 1)]
            with torch.no_grad():
                plain[0].weight[1] = grower.controller.pull.anchors[0][1]
                plain[0].bias[1] = 0
                plain[2].weight[:, 1] = 0
                for param, axis in changed:
                    place = [p is param for p in plain.parameters()].index(True)
                    anchors[place].select(axis, 1).copy_(param.select(axis, 1))
                    for moment in ("exp_avg", "exp_avg_sq"):
                        own.state[param][moment].select(axis, 1).zero_()
        own.zero_grad()
        away = sum((p - a).square().sum() for p, a in zip(plain.parameters(), anchors, strict=True))
        (task.loss(plain, step) + strength * away).backward()
        own.step()
    mine = dict(model.named_parameters())
    assert all(torch.allclose(mine[name], value, atol=1e-5) for name, value in plain.named_parameters())


def test_l2_init_is_scaled_with_the_loss_under_a_scaler():
    found = []
    for scaled in (False, True):
        _, model = grown(**UNITS)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8) if scaled else None
        controller = morphc.RecycleController(every=1000, l2_init=0.1)
        grower = morphc.Grower(model, optimizer, controller, scaler=scaler)
        task = Task()
        for step in range(6):
            optimizer.zero_grad()
            loss = task.loss(model, step)
            (scaler.scale(loss) if scaler else loss).backward()
            if scaler:
                scaler.step(optimizer)
                scaler.update()
            else:
                optimizer.step()
            grower.step(loss)
        found.append(model[0].weight.detach().clone())
    assert torch.allclose(*found, atol=1e-6)


@pytest.mark.parametrize("options", [{"amsgrad": True, "foreach": True}, {"fused": True}, {}])
def test_a_jump_of_the_loss_lets_adam_begin_anew(options):
    _, model = grown(**UNITS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, **options)
    task, resets = Task(), []
    hooked = []
    controller = morphc.RecycleController(every=1000, moment_reset="spike")
    grower = morphc.Grower(
        model, optimizer, controller, tick_every=2, on_recycle=lambda *told: hooked.append(told[1])
    )
    for step in range(80):
        optimizer.zero_grad()
        loss = task.loss(model, step) + (4.0 if step >= 60 else 0.0)
        loss.backward()
        optimizer.step()
        grower.step(loss)
        if not any(bool(value.any()) for state in optimizer.state.values() for value in state.values()):
            resets.append(step)
    assert resets == [61]
    assert {id(param) for param in hooked} == {id(param) for param in parameters_of(optimizer)}


def parameters_of(optimizer):
    return [param for group in optimizer.param_groups for param in group["params"]]


def test_moments_begin_anew_where_something_was_recycled_if_asked():
    _, model = grown(telemetry_every=1, **UNITS)
    silence(model, [2])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    controller = morphc.RecycleController(tau=0.0, every=8, moment_reset="recycle")
    run(model, controller, 8, optimizer)
    for state in optimizer.state.values():
        assert not any(bool(value.any()) for value in state.values())


def test_jumps_are_told_from_noise_and_from_a_falling_loss():
    noise = torch.Generator().manual_seed(0)
    jumps = Jumps(1.3)
    steady = (1.0 + 0.1 * torch.randn(300, generator=noise)).tolist()
    assert not any(jumps.tell(value, step) for step, value in enumerate(steady))
    falling = Jumps(1.3)
    assert not any(falling.tell(2.0 * 0.98**step, step) for step in range(200))
    assert falling.tell(2.0, 200)
    assert not falling.tell(4.0, 201)


def best_by_hand(x, g, rows):
    """The candidate whose best outgoing weights take most of |g|^2, by least squares one at a time."""
    gains = []
    for row in rows:
        h = activation("relu")(x @ row)
        solution = torch.linalg.lstsq(h.unsqueeze(1).double(), g.double()).solution
        gains.append(float((g.double() ** 2).sum() - (g - h.unsqueeze(1) * solution).double().square().sum()))
    return max(range(len(rows)), key=gains.__getitem__)


class Once:
    """Recycles units at a tick, as the best of some candidates."""

    ranks_candidates, germinates = True, False

    def __init__(self, tick, path, units, candidates):
        self.tick, self.command = tick, Do("recycle", path, units, candidates)

    def decide(self, seen):
        return [self.command] if seen.tick == self.tick else []


def test_candidates_are_ranked_on_the_batch_before_the_tick(monkeypatch):
    from morphc.grow import probes

    drawn = []
    own = probes.drawn
    monkeypatch.setattr(probes, "drawn", lambda *args: drawn.append(own(*args)) or drawn[-1])
    _, model = grown(**UNITS)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    _, recycled = run(model, Once(2, "0", (4,), 64), 8, optimizer)
    assert recycled == {8: [("0", 4)]}
    task = Task()
    _, twin = grown(**UNITS)
    out = twin(task.x[7])
    out.retain_grad()
    (out - task.y[7]).square().mean().backward()
    best = best_by_hand(task.x[7], out.grad, drawn[0])
    assert torch.equal(model[0].weight[4], drawn[0][best])
    assert (model[2].weight[:, 4] == 0).all()
    assert model[0].bias[4] == 0
    assert not model[0]._forward_pre_hooks
    assert not model[2]._forward_hooks


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


HOSTS = {
    "gated": (Gated, "gate", (4, 6), 8),
    "conv": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3, stride=2, padding=1)),
        "0",
        (2, 3, 7, 7),
        8,
    ),
}


@pytest.mark.parametrize("kind", HOSTS)
def test_candidates_of_other_blocks_take_more_than_a_random_unit_does(kind):
    make, path, shape, seeds = HOSTS[kind]
    torch.manual_seed(1)
    x = torch.randn(shape)
    taken = []
    for candidates in (1, 128):
        torch.manual_seed(2)
        config = Config(seeds_per_layer=seeds, slots=1, rank=1, backend="torch")
        model = morphc.compile(make(), (x,), config=config, verify=False)
        target = torch.randn(model(x).shape, generator=torch.Generator().manual_seed(3))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        grower = morphc.Grower(model, optimizer, Once(1, path, (0, 1), candidates), tick_every=1)
        loss = (model(x) - target).square().sum()
        loss.backward()
        optimizer.step()
        event = grower.step(loss)
        assert all(event.transitions), event.transitions
        optimizer.zero_grad()
        (model(x) - target).square().sum().backward()
        reader = model.down if kind == "gated" else model[2]
        taken.append(float(reader.weight.grad[:, :2].square().sum()))
    assert taken[1] > 1.5 * taken[0]


def test_candidates_without_a_batch_are_refused_with_the_reason():
    _, model = grown(**UNITS)
    grower = morphc.Grower(model, torch.optim.SGD(model.parameters(), lr=0.1), Once(9, "0", (1,), 8))
    (refused,) = grower.recycle("0", [1], candidates=8)
    assert refused.gate == "candidates"
    assert "no training forward" in refused.reason
    with pytest.raises(SeedError, match="candidates=0"):
        grower.recycle("0", [1], candidates=0)


@pytest.mark.parametrize(("rows", "scale", "reason"), [(0, 1.0, "no rows"), (8, torch.inf, "isn't finite")])
def test_candidates_on_a_batch_that_tells_nothing_are_refused_with_the_reason(rows, scale, reason):
    _, model = grown(**UNITS)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    grower = morphc.Grower(model, optimizer, Once(1, "0", (1,), 8), tick_every=4)
    for number, factor in ((8, 1.0), (8, 1.0), (8, 1.0), (rows, scale)):
        loss = model(torch.randn(number, 6)).square().sum() * factor
        loss.backward()
        event = grower.step(loss)
    (refused,) = event.transitions
    assert refused.gate == "candidates"
    assert reason in refused.reason


def test_candidates_behind_a_batch_norm_are_warned_of():
    host = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))
    model = morphc.compile(host, (torch.randn(4, 6),), config=Config(seeds_per_layer=2, backend="torch"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.warns(morphc.errors.MorphcWarning, match="recycled at '0'.*BatchNorm") as heard:
        morphc.Grower(model, optimizer, morphc.RecycleController(candidates=2))
    assert heard[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        morphc.Grower(model, optimizer, morphc.RecycleController(candidates=1))


def test_recycling_needs_no_grower():
    _, model = grown(**UNITS)
    task = Task()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for step in range(3):
        optimizer.zero_grad()
        task.loss(model, step).backward()
        optimizer.step()
    site, rows = morphc.seeds(model)["0"], torch.randn(2, 6)
    assert all(site.recycle([6, 1], optimizer, incoming=rows))
    assert torch.equal(model[0].weight[[6, 1]], rows)
    assert not optimizer.state[model[0].weight]["exp_avg"][[1, 6]].any()
    assert optimizer.state[model[0].weight]["exp_avg"][[0, 2]].all()
    with pytest.raises(SeedError, match=r"shapes \[\(2, 5\)\], must be \[\(2, 6\)\]"):
        site.recycle([6, 1], incoming=torch.randn(2, 5))


def test_a_unit_that_is_recycled_again_is_not_given_what_it_had():
    _, model = grown(**UNITS)
    site = morphc.seeds(model)["0"]
    drawn = []
    for _ in range(3):
        assert all(site.recycle([1]))
        drawn.append(model[0].weight[1].detach().clone())
    assert len({tuple(row.tolist()) for row in drawn}) == 3
    _, twin = grown(**UNITS)
    assert all(morphc.seeds(twin)["0"].recycle([1]))
    assert torch.equal(twin[0].weight[1], drawn[0])


def test_the_batch_norm_of_a_block_forgets_the_units_too():
    torch.manual_seed(0)
    host = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3))
    x = torch.randn(4, 3, 8, 8)
    model = morphc.compile(host, (x,), config=Config(seeds_per_layer=6, slots=1, backend="torch"))
    with torch.no_grad():
        model[1].weight.fill_(0.5), model[1].running_var.fill_(9.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(x).square().sum().backward()
    optimizer.step()
    assert all(morphc.seeds(model)["0"].recycle([2], optimizer))
    norm = model[1]
    assert (norm.weight[2], norm.bias[2], norm.running_mean[2], norm.running_var[2]) == (1, 0, 0, 1)
    assert optimizer.state[norm.weight]["momentum_buffer"][2] == 0
    assert norm.running_var[1] != 1


def test_what_a_recycler_remembers_is_saved_and_restored(tmp_path):
    def made():
        _, model = grown(telemetry_every=1, gradient_telemetry=True, **UNITS)
        silence(model, [2])
        controller = morphc.RecycleController(
            tau=0.3, every=8, by="gradient", l2_init=0.1, moment_reset="spike"
        )
        return model, controller

    model, controller = made()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    grower, _ = run(model, controller, 20, optimizer)
    grower.snapshot().save(tmp_path / "snap")
    task = Task()

    def go_on(model, optimizer, grower):
        for step in range(20, 44):
            optimizer.zero_grad()
            loss = task.loss(model, step)
            loss.backward()
            optimizer.step()
            grower.step(loss)

    go_on(model, optimizer, grower)
    other, fresh = made()
    again = torch.optim.Adam([p for p in other.parameters() if p.requires_grad], lr=0.01)
    resumed, _ = run(other, fresh, 3, again)
    resumed.restore(morphc.Snapshot.load(tmp_path / "snap"))
    go_on(other, again, resumed)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tau", -0.1),
        ("every", 0),
        ("by", "age"),
        ("most", 0.0),
        ("l2_init", -1.0),
        ("ema", 1.0),
        ("candidates", 0),
        ("moment_reset", "always"),
        ("jump", 1.0),
    ],
)
def test_bad_options_are_refused_by_name(name, value):
    with pytest.raises(ConfigError, match=f"{name} must be"):
        morphc.RecycleController(**{name: value})


def test_an_inner_controller_still_decides():
    _, model = grown(**UNITS)
    inner = morphc.PlateauController(patience=1, threshold=0.9)
    with pytest.warns(morphc.errors.MorphcWarning, match="evaluate="):
        run(model, morphc.RecycleController(then=inner), 40)
    assert morphc.seeds(model).lifecycle.max() > L.DORMANT
    assert not morphc.RecycleController(then=Never()).ranks_candidates


def test_what_python_does_in_a_step_and_a_tick_does_not_grow_with_the_seeds():
    """Counted in calls, so that it is the same on every machine."""
    found = {}
    for seeds in (8, 256):
        torch.manual_seed(0)
        host = nn.Sequential(nn.Linear(6, 256), nn.ReLU(), nn.Linear(256, 4))
        config = Config(
            seeds_per_layer={"0": seeds, "2": 1},
            slots=1,
            rank=1,
            telemetry_every=4,
            gradient_telemetry=True,
            backend="torch",
        )
        model = morphc.compile(host, (torch.zeros(2, 6),), config=config, verify=False)
        controller = morphc.RecycleController(tau=0.0, every=8, by="gradient")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        grower, task, calls = morphc.Grower(model, optimizer, controller, tick_every=4), Task(), []
        for step in range(16):
            optimizer.zero_grad()
            loss = task.loss(model, step)
            loss.backward()
            optimizer.step()
            count = 0

            def told(frame, event, argument):
                nonlocal count
                count += event in ("call", "c_call")

            sys.setprofile(told)
            grower.step(loss)
            sys.setprofile(None)
            calls.append(count)
        found[seeds] = calls
    ordinary = [step for step in range(16) if (step + 1) % 4]
    assert [found[8][step] for step in ordinary] == [found[256][step] for step in ordinary]
    assert all(found[256][step] < found[8][step] + 64 for step in range(16)), found
