"""Seeds that learn in isolation: the host notices nothing, and what they learned lowers the loss when it is grafted."""

from __future__ import annotations

import pytest
import torch
from growing import Never, Task, grown, same
from torch import nn

import morphc
from morphc import Config, Lifecycle
from morphc.errors import ConfigError
from morphc.runtime.commands import measured
from morphc.runtime.isolation import refit

L = Lifecycle
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.5),
    "adamw_foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
}


def slots(model, path="2"):
    return {
        (name, key): value.clone()
        for name, bank in morphc.seeds(model)[path].slots.items()
        for key, value in (*bank.named_parameters(), *bank.named_buffers())
        if key != "owner"
    }


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("isolation", ["straight_through", "reconstruction"])
def test_host_trains_bitwise_as_without_seeds(optimizer, isolation):
    task = Task()
    blend = {"isolation": isolation, "blend": "lerp", "blueprint": "bottleneck"}
    plain, model = grown(minimum_ticks=(1000, 1, 1, 1, 1), **(blend if isolation == "reconstruction" else {}))
    site = morphc.seeds(model)["2"]
    assert all(site.germinate([0, 1], candidates=2))
    optimizers = [OPTIMIZERS[optimizer](each.parameters()) for each in (plain, model)]
    grower = morphc.Grower(model, optimizers[1], Never(), task.validate, tick_every=4)
    before = slots(model)
    for step in range(40):
        outputs = []
        for module, own in zip((plain, model), optimizers, strict=True):
            own.zero_grad(set_to_none=step % 2 == 0)
            loss = task.loss(module, step)
            loss.backward()
            outputs.append((loss.detach(), nn.utils.clip_grad_norm_(module.parameters(), 0.5)))
            own.step()
        grower.step(loss)
        assert torch.equal(outputs[0][0], outputs[1][0])
        assert torch.equal(outputs[0][1], outputs[1][1])
    assert same(plain, model)
    assert morphc.seeds(model).lifecycle.tolist() == [0, 0, L.TRAINING, L.TRAINING]
    after = slots(model)
    moved = [
        name
        for (name, key) in after
        if key == "out_weight" and not torch.equal(before[name, key], after[name, key])
    ]
    assert moved == [next(iter(site.slots))]


@pytest.mark.parametrize("state", [s for s in L if s not in (L.TRAINING, L.GRAFTING, L.FINE_TUNING)])
def test_in_all_other_states_no_bit_of_a_slot_moves(state):
    task = Task()
    _, model = grown()
    site = morphc.seeds(model)["2"]
    site.assign([0, 1], state, blueprint="bottleneck")
    for param in model.parameters():
        param.requires_grad_(True)
    everything = [p for p in model.parameters() if p.is_leaf]
    optimizer = torch.optim.AdamW(everything, lr=0.1, weight_decay=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    before = slots(model)
    for step in range(5):
        optimizer.zero_grad()
        scaler.scale(task.loss(model, step)).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(everything, 1.0)
        scaler.step(optimizer)
        morphc.seeds(model).step_optimizer(lr=0.1)
        scaler.update()
    after = slots(model)
    assert all(
        torch.equal(before[key].view(torch.uint8), after[key].view(torch.uint8))
        for key in before
        if before[key].dim()
    )


def test_a_gradient_that_is_not_finite_leaves_its_slot_alone_and_is_counted():
    _, model = grown(isolation_every=1)
    seeds = morphc.seeds(model)
    seeds["2"].germinate([0], blueprint="bottleneck")
    seeds["2"].advance([0], to=L.TRAINING)
    before = slots(model)
    model(torch.ones(2, 6)).mul(float("inf")).sum().backward()
    seeds.step_optimizer(lr=0.1)
    after = slots(model)
    assert all(torch.equal(before[key], after[key]) for key in before)
    (refused,) = seeds["2"].advance([0], to=L.GRAFTING, metrics={"isolated_improvement": 1.0})
    assert refused.gate == "minimum_ticks"
    grower_says = measured(seeds._store, seeds["2"].site, seeds._store.mirror())
    assert grower_says[0]["finite_gradients"] == 0.0


def test_a_scaled_loss_trains_the_slots_alike():
    task = Task()
    found = []
    for scale in (None, 2.0**10):
        _, model = grown(minimum_ticks=(1000, 1, 1, 1, 1))
        morphc.seeds(model)["2"].germinate([0], blueprint="bottleneck")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=3) if scale else None
        grower = morphc.Grower(model, optimizer, Never(), task.validate, scaler, tick_every=2)
        for step in range(12):
            optimizer.zero_grad()
            loss = task.loss(model, step)
            (scaler.scale(loss) if scaler else loss).backward()
            if scaler:
                scaler.step(optimizer)
                scaler.update()
            else:
                optimizer.step()
            grower.step(loss)
        found.append(slots(model)["bottleneck", "out_weight"])
    assert found[0].abs().sum() > 0
    assert torch.equal(*found)


def test_improvement_is_the_share_of_the_gradient_that_a_refit_takes_away():
    """At a linear head with squared loss the forecast can be checked: an affine seed that is the residual itself."""
    torch.manual_seed(0)
    model = morphc.compile(
        nn.Sequential(nn.Linear(3, 2)),
        (torch.zeros(2, 3),),
        config=Config(seeds_per_layer=1, slots=1, blueprint="affine", isolation_every=1, backend="torch"),
    )
    seeds = morphc.seeds(model)
    seeds["0"].germinate([0])
    site = seeds["0"]
    site.advance([0], to=L.TRAINING)
    bank = site.slots["affine"]
    with torch.no_grad():
        bank.scale[0] = 0.3
    x = torch.randn(50, 3)
    y = model(x)
    target = (1.3 * y + 0.2 * torch.randn(50, 2)).detach()
    loss = (y - target).square().mean()
    loss.backward()
    s = (0.3 * y).detach().double()
    r = (target - y).detach().double()
    expected = (r * s).sum() ** 2 / (r.square().sum() * s.square().sum())
    known = measured(seeds._store, site.site, seeds._store.mirror())[0]
    assert known["isolated_improvement"] == pytest.approx(float(expected), rel=1e-5)
    assert refit(site.site, "affine", 0, float(loss.detach()))
    factor = (r * s).sum() / s.square().sum()
    assert bank.scale[0].tolist() == pytest.approx([0.3 * float(factor)] * 2, rel=1e-4)


def test_refitted_out_weights_are_the_least_squares_solution():
    torch.manual_seed(0)
    task = Task()
    _, model = grown(width=5, seeds_per_layer=1, isolation_every=1, blueprint="widen")
    seeds = morphc.seeds(model)
    site = seeds["2"]
    site.germinate([0])
    site.advance([0], to=L.TRAINING)
    bank = site.slots["widen"]
    loss = task.loss(model, 0)
    loss.backward()
    x, y = task.x[0].double(), task.y[0].double()
    h = torch.relu(x @ bank.in_weight[0].double() + bank.in_bias[0].double()).detach()
    r = y - model(task.x[0]).detach().double()
    expected = torch.linalg.lstsq(h, r).solution
    product = h @ expected
    assert refit(site.site, "widen", 0, float(loss.detach()))
    scaled = torch.relu(x @ bank.in_weight[0].double() + bank.in_bias[0].double()).detach()
    assert torch.allclose(scaled @ bank.out_weight[0].double(), product, atol=1e-4)
    inner = torch.cat([bank.in_weight[0].flatten(), bank.in_bias[0]]).norm()
    assert 0.49 < float(inner / bank.out_weight[0].norm()) < 2.01
    site.assign([0], L.FINE_TUNING, alpha=1.0)
    assert float(task.loss(model, 0).detach()) < 0.95 * float(loss.detach())


def test_of_the_candidates_the_one_that_lowers_the_loss_most_is_grafted():
    task = Task()
    _, model = grown(width=6, seeds_per_layer=1, isolation_every=1, blueprint="widen", rank=1)
    seeds = morphc.seeds(model)
    site = seeds["2"]
    assert all(site.germinate([0], candidates=4))
    site.advance([0], to=L.TRAINING)
    bank = site.slots["widen"]
    task.loss(model, 0).backward()
    losses = []
    for slot in range(4):
        trial = [seeds._store.state.slot.clone(), bank.out_weight.clone(), bank.in_weight.clone()]
        h = torch.relu(task.x[0] @ bank.in_weight[slot] + bank.in_bias[slot])
        r = task.y[0] - model(task.x[0]).detach()
        left = r - h @ torch.linalg.lstsq(h.double(), r.double()).solution.float() if h.any() else r
        losses.append(float(left.square().mean()))
        assert all(
            torch.equal(a, b) for a, b in zip(trial[1:], (bank.out_weight, bank.in_weight), strict=True)
        )
    for _ in range(8):
        seeds.tick({"isolated_improvement": 1.0, "finite_gradients": 1.0})
    assert seeds.lifecycle.tolist()[-1] >= L.GRAFTING
    assert bank.owner.tolist() == [
        0 if slot == min(range(4), key=losses.__getitem__) else -1 for slot in range(4)
    ]


def test_reconstruction_learns_to_give_the_chunk_back():
    task = Task()
    options = {"isolation": "reconstruction", "blend": "lerp", "blueprint": "bottleneck", "rank": 8}
    _, model = grown(minimum_ticks=(60, 1, 1, 1, 1), max_reconstruction_loss=0.01, **options)
    site = morphc.seeds(model)["2"]
    site.germinate([0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    grower = morphc.Grower(model, optimizer, Never(), task.validate, tick_every=4)
    for step in range(300):
        optimizer.zero_grad()
        loss = task.loss(model, step)
        loss.backward()
        optimizer.step()
        grower.step(loss)
        if site.lifecycle[0] == L.GRAFTING:
            break
    assert site.lifecycle[0] == L.GRAFTING
    assert step >= 60 * 4


def test_reconstruction_with_a_residual_blend_is_refused():
    with pytest.raises(ConfigError, match=r"double it.*lerp"):
        Config(isolation="reconstruction", blend="residual")


def test_reconstruction_of_a_blueprint_that_reads_elsewhere_is_refused():
    _, model = grown(isolation="reconstruction", blend="lerp")
    (refused,) = morphc.seeds(model)["2"].germinate([0], blueprint="widen")
    assert not refused
    assert "reads the block's input" in refused.reason
