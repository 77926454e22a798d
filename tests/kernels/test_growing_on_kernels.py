"""Growing on kernels: isolated training, its measurements and the tick are those of the torch backend."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from where import DEVICE

import morphc
from morphc import Config, Lifecycle
from morphc.kernels.site import BankKernels

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


@pytest.mark.parametrize("forwards", [1, 2])
@pytest.mark.parametrize("layout", ["last", "channels_first"])
def test_reconstruction_where_nothing_blends_is_a_kernel_s_own_step(forwards, layout, monkeypatch):
    """Chunks are saved by the forward before a ReLU works in their place; several forwards a step add up in torch."""
    steps = []
    own = BankKernels.reconstruct
    monkeypatch.setattr(BankKernels, "reconstruct", lambda self, *args: steps.append(own(self, *args)))
    conv = layout == "channels_first"
    found, losses = [], []
    for backend in ("triton", "torch"):
        torch.manual_seed(0)
        x = torch.randn(3, 16, 3, 5, 5, device=DEVICE) if conv else torch.randn(3, 16, 6, device=DEVICE)
        first = nn.Conv2d(3, 7, 3) if conv else nn.Linear(6, 7)
        host = nn.Sequential(first, nn.ReLU(inplace=True), nn.Flatten()).to(DEVICE)
        options = {"isolation": "reconstruction", "blend": "lerp", "blueprint": "bottleneck"}
        config = Config(seeds_per_layer=2, slots=2, rank=2, backend=backend, **options)
        model = morphc.compile(host, (x[0],), config=config, verify=False)
        seeds = morphc.seeds(model)
        assert all(seeds["0"].germinate([1], candidates=2))
        assert all(seeds["0"].advance([1], to=L.TRAINING))
        for step in range(3):
            for _ in range(forwards):
                batch = x[step] if not (step == 1 and conv) else x[step, 1:]
                expected = nn.functional.relu(
                    nn.functional.conv2d(batch, first.weight, first.bias) if conv else first(batch)
                )
                out = model(batch)
                assert torch.equal(out, expected.flatten(1))
                out.square().sum().backward()
            seeds.step_optimizer(lr=0.01, scale=torch.tensor(2.0**12, device=DEVICE))
        bank = seeds["0"].slots["bottleneck"]
        found.append(
            {name: value.clone() for name, value in (*bank.named_parameters(), *bank.named_buffers())}
        )
        losses.append(seeds["0"].site.fitting.fits["bottleneck"].sums)
    assert len(steps) == (3 if forwards == 1 else 0)
    assert found[0]["opt.step"].tolist() == [3, 3]
    for name, value in found[1].items():
        assert torch.allclose(found[0][name], value, atol=1e-5), name
    for name in ("loss", "steps", "lost"):
        assert torch.allclose(losses[0][name], losses[1][name], rtol=1e-4), name


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_a_reconstruction_that_is_not_finite_is_counted_and_moves_nothing(backend):
    torch.manual_seed(0)
    x = torch.randn(16, 6, device=DEVICE)
    options = {"isolation": "reconstruction", "blend": "lerp", "blueprint": "bottleneck"}
    config = Config(seeds_per_layer=2, slots=2, rank=2, backend=backend, **options)
    model = morphc.compile(copy.deepcopy(HOST).to(DEVICE), (x,), config=config, verify=False)
    seeds = morphc.seeds(model)
    seeds["2"].germinate([0, 1])
    seeds["2"].advance([0, 1], to=L.TRAINING)
    bank = seeds["2"].slots["bottleneck"]
    with torch.no_grad():
        model[2].bias[0] = float("inf")
    before = {name: value.clone() for name, value in (*bank.named_parameters(), *bank.named_buffers())}
    model(x).sum().backward()
    seeds.step_optimizer(lr=0.1)
    broken = bank.owner.tolist().index(0)
    for name, value in (*bank.named_parameters(), *bank.named_buffers()):
        assert torch.equal(value[broken], before[name][broken]), name
    assert bank.opt.step[1 - broken] == 1
    assert seeds["2"].site.fitting.fits["bottleneck"].sums["lost"].tolist() == [
        float(slot == broken) for slot in range(2)
    ]


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


@pytest.mark.parametrize("blueprint", ["bottleneck", "lowrank"])
def test_a_slot_whose_gradient_is_not_finite_sits_the_step_out_beside_one_that_moves(blueprint):
    ends = []
    for backend in ("triton", "torch"):
        torch.manual_seed(0)
        x = torch.randn(16, 6, device=DEVICE)
        config = Config(seeds_per_layer=2, slots=3, rank=2, blueprint=blueprint, backend=backend)
        model = morphc.compile(copy.deepcopy(HOST).to(DEVICE), (x,), config=config, verify=False)
        seeds = morphc.seeds(model)
        seeds["2"].assign([1, 0], L.FINE_TUNING)
        bank = seeds["2"].slots[blueprint]
        hurt = bank.owner.tolist().index(1)
        for step in range(4):
            model(x).square().mean().backward()
            before = [param.detach().clone() for param in bank.parameters()]
            if step == 2:
                next(grad for grad in bank.grads().values() if grad is not None)[hurt].view(-1)[0] = float(
                    "nan"
                )
            seeds.step_optimizer(lr=0.01)
            moved = [
                any(
                    not torch.equal(now[slot], then[slot])
                    for now, then in zip(bank.parameters(), before, strict=True)
                )
                for slot in range(3)
            ]
            held = [
                owner >= 0 and not (step == 2 and slot == hurt)
                for slot, owner in enumerate(bank.owner.tolist())
            ]
            assert moved == held, (backend, step)
        ends.append([param.detach() for param in bank.parameters()])
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
