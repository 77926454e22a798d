"""Growing on kernels: isolated training, its measurements and the tick are those of the torch backend."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from where import DEVICE

import morphc
from morphc import Config, Lifecycle

L = Lifecycle
HOST = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6))


class Quiet:
    def decide(self, seen):
        return ()


def run(backend, blueprint, steps=40, **options):
    torch.manual_seed(0)
    x = torch.randn(steps, 16, 6).to(DEVICE)
    target = (x @ torch.randn(6, 6).to(DEVICE)).tanh()
    config = Config(
        seeds_per_layer=2,
        slots=2,
        rank=2,
        blueprint=blueprint,
        backend=backend,
        minimum_ticks=(4, 3, 1, 1, 2),
        graft_ticks=3,
        isolation_every=1,
        min_isolated_improvement=-1.0,
        **options,
    )
    plain = copy.deepcopy(HOST).to(DEVICE)
    model = morphc.compile(copy.deepcopy(plain), (x[0],), config=config, verify=False)
    seeds = morphc.seeds(model)
    assert all(seeds["2"].germinate([0, 1]))
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.02) for net in (plain, model)]
    grower = morphc.Grower(model, optimizers[1], Quiet(), lambda net: 1.0, tick_every=2)
    told = []
    for step in range(steps):
        outputs = []
        for net, optimizer in zip((plain, model), optimizers, strict=True):
            optimizer.zero_grad()
            outputs.append(net(x[step]))
            loss = (outputs[-1] - target[step]).square().mean()
            loss.backward()
            optimizer.step()
        if seeds["2"].lifecycle.max() <= L.TRAINING:
            assert torch.equal(*outputs)
        event = grower.step(loss)
        told.append((step, [(t.seed, t.target) for t in event.transitions if t], grower.learning()))
    return model, told


@pytest.mark.parametrize("blueprint", ["bottleneck", "widen"])
def test_a_run_on_kernels_is_the_run_on_torch(blueprint):
    model, told = run("triton", blueprint)
    other, expected = run("torch", blueprint)
    assert [moves for _, moves, _ in told] == [moves for _, moves, _ in expected]
    assert max(seed.max() for seed in (morphc.seeds(model).lifecycle,)) >= L.STABILIZATION
    for (step, _, mine), (_, _, theirs) in zip(told, expected, strict=True):
        assert mine.keys() == theirs.keys()
        for seed, known in theirs.items():
            for name in known.keys() & {"isolated_improvement", "isolated_loss", "alpha", "gradient_ratio"}:
                assert mine[seed][name] == pytest.approx(known[name], rel=2e-3, abs=1e-5, nan_ok=True), (
                    step,
                    name,
                )
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-4)


def test_reconstruction_on_kernels_leaves_the_host_alone_beside_an_active_seed():
    options = {"isolation": "reconstruction", "blend": "lerp", "max_reconstruction_loss": -1.0}
    found = []
    for backend in ("triton", "torch"):
        torch.manual_seed(0)
        x = torch.randn(16, 6, device=DEVICE)
        config = Config(
            seeds_per_layer=2, slots=2, rank=2, blueprint="bottleneck", backend=backend, **options
        )
        model = morphc.compile(copy.deepcopy(HOST).to(DEVICE), (x,), config=config, verify=False)
        seeds = morphc.seeds(model)
        seeds["2"].assign([0], L.FINE_TUNING)
        seeds["2"].germinate([1])
        seeds["2"].advance([1], to=L.TRAINING)
        for _ in range(5):
            model(x).square().sum().backward()
            seeds.step_optimizer(lr=0.01)
        found.append({name: bank.clone() for name, bank in seeds["2"].slots["bottleneck"].named_parameters()})
    for name in found[0]:
        assert found[1][name].abs().sum() > 0 or name.endswith("in_bias")
        assert torch.allclose(found[0][name], found[1][name], atol=1e-5), name


def test_seeds_train_inside_one_graph_of_torch_compile():
    torch.manual_seed(0)
    x = torch.randn(16, 6, device=DEVICE)
    config = Config(seeds_per_layer=2, slots=2, rank=2, blueprint="bottleneck", backend="torch")
    model = morphc.compile(copy.deepcopy(HOST).to(DEVICE), (x,), config=config, verify=False)
    seeds = morphc.seeds(model)
    seeds["2"].germinate([0])
    seeds["2"].advance([0], to=L.TRAINING)
    expected = morphc.detach(model)(x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    out = compiled(x)
    assert torch.equal(out, expected)
    out.square().sum().backward()
    grads = seeds["2"].slots["bottleneck"].grads()
    assert grads["out_weight"] is not None
    assert grads["out_weight"].abs().sum() > 0
