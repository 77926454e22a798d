"""Compiled models with `lowrank` and `widen`, which read an input, on kernels: graphs, steps, copies."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from tap_helpers import (
    DEVICE,
    KINDS,
    Convs,
    compiled,
    distance,
    everything,
    everything_of,
    example,
    kernels_of,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

import morphc
from morphc import Config, Lifecycle
from morphc.kernels import tap_step
from morphc.kernels.compile import Resources, compile_all
from morphc.kernels.site import coverage, spec_of


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_gives_what_it_gives_on_torch(kind: str) -> None:
    expected = everything(compiled(kind, "torch"), example())
    model = compiled(kind)
    found = everything(model, example())
    assert kernels_of(model)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert distance(found[name], value) < 1e-5, name


def test_several_banks_of_one_site() -> None:
    found = {}
    for backend in ("torch", "triton"):
        model = compiled("lowrank", backend, blueprint=("affine", "lowrank", "widen"), states=())
        handle = morphc.seeds(model)["fc2"]
        for seed, kind in enumerate(("widen", "affine", "lowrank", "widen")):
            handle.assign([seed], Lifecycle.FOSSILIZED if seed < 3 else Lifecycle.TRAINING, blueprint=kind)
        for _, bank in handle.site.slots.items():
            for number, name in enumerate(bank.names):
                generator = torch.Generator().manual_seed(number)
                values = bank.get_parameter(name).data
                values.copy_(torch.randn(values.shape, generator=generator) * 0.4)
        found[backend] = everything(model, example())
        if backend == "triton":
            assert len(handle.site.engine.kernels) == 3
            assert len(kernels_of(model)) == 3
    for name, value in found["torch"].items():
        assert distance(found["triton"][name], value) < 1e-5, name


def test_a_host_that_is_frozen_still_trains_its_seeds() -> None:
    model = compiled("widen")
    model.requires_grad_(False)
    model(example()).square().mean().backward()
    grads = morphc.seeds(model)["fc2"].site.slots.get("widen").grads()
    assert all(grad is not None and grad[:2].any() for grad in grads.values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("blend", ["residual", "gate"])
def test_optimizer_steps_agree_and_touch_only_slots_that_train(kind: str, blend: str) -> None:
    stepped = {}
    for backend in ("torch", "triton"):
        model = compiled(kind, backend, blend=blend)
        (bank,) = [bank for _, bank in morphc.seeds(model)["fc2"].site.slots.items()]
        before = {name: bank.get_parameter(name).detach().clone() for name in bank.names}
        for _ in range(3):
            everything(model, example(5))
            morphc.seeds(model).step_optimizer(lr=1e-2)
        stepped[backend] = bank
        assert bank.opt.step.tolist() == [3, 3, 0, 0]
        for name, value in before.items():
            param = bank.get_parameter(name)
            assert torch.equal(param[2:], value[2:])
            assert bank.grads()[name] is None
            # Only a seed that blends has a use for its gate.
            assert not torch.equal(param[0], value[0])
    for name in stepped["torch"].names:
        mine, theirs = (stepped[backend].get_parameter(name) for backend in ("triton", "torch"))
        assert distance(mine, theirs) < 1e-4, name


def test_a_large_slot_is_stepped_by_several_programs() -> None:
    """17 000 floats of an in-weight."""
    stepped = {}
    for backend in ("torch", "triton"):
        torch.manual_seed(0)
        host = nn.Sequential(nn.Linear(8, 1000), nn.ReLU(), nn.Linear(1000, 6)).to(DEVICE)
        config = Config(seeds_per_layer=2, slots=2, rank=17, blueprint="lowrank", backend=backend)
        x = torch.randn(2, 8, device=DEVICE)
        model = morphc.compile(host, (x,), config=config)
        site = morphc.seeds(model)["2"]
        site.assign([1], Lifecycle.FINE_TUNING)
        bank = site.site.slots.get("lowrank")
        bank.out_weight.data.fill_(0.1)
        for _ in range(2):
            model(x).square().sum().backward()
            morphc.seeds(model).step_optimizer(lr=1e-2, betas=(0.8, 0.95), weight_decay=0.1)
        stepped[backend] = bank
    for name in ("in_weight", "out_weight"):
        mine, theirs = (stepped[backend].get_parameter(name) for backend in ("triton", "torch"))
        assert distance(mine, theirs) < 1e-5, name
        assert torch.equal(mine[1], theirs[1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "states", [(Lifecycle.GRAFTING, Lifecycle.TRAINING, Lifecycle.FOSSILIZED), (Lifecycle.TRAINING,)]
)
def test_the_same_model_in_a_traced_graph(kind: str, states: tuple[Lifecycle, ...]) -> None:
    torch._dynamo.reset()
    expected = everything(compiled(kind, states=states), example())
    model = compiled(kind, states=states)
    traced = torch.compile(model, backend="aot_eager", fullgraph=True)
    found = everything_of(traced, model, example())
    assert kernels_of(model)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["lowrank", "widen"])
def test_behind_a_convolution_torch_computes_them(kind: str) -> None:
    found = {}
    for backend in ("torch", "triton"):
        model = compiled(kind, backend, host=Convs)
        x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).to(DEVICE)
        found[backend] = everything(model, x)
        assert not kernels_of(model)
    for name, value in found["torch"].items():
        assert torch.equal(found["triton"][name], value), name


def test_a_dormant_site_makes_no_kernels() -> None:
    model = compiled("widen", states=())
    everything(model, example())
    engine = morphc.seeds(model)["fc2"].site.engine
    assert not engine.kernels
    assert not engine.lists


def test_autocast_copies_and_pickles() -> None:
    model = compiled("widen")
    kind = "cuda" if DEVICE.type == "cuda" else "cpu"
    with torch.autocast(kind, dtype=torch.bfloat16):
        out = model(example())
        again = copy.deepcopy(model)(example())
    assert torch.equal(out, again)
    with torch.no_grad():
        assert torch.equal(pickle.loads(pickle.dumps(model))(example()), model(example()))


def test_a_checkpointed_layer() -> None:
    model = compiled("widen, gated", blend="multiply")
    expected = everything(model, example())
    morphc.seeds(model)["fc2"].site.slots.get("widen").zero_grads()
    found = everything_of(lambda x: checkpoint(model, x, use_reentrant=False), model, example())
    for name, value in expected.items():
        if not name.startswith(("fc2", "gate", "up")):
            assert torch.equal(found[name], value), name


def test_the_report_names_the_backend_of_every_site_and_why_torch_has_it() -> None:
    torch.manual_seed(0)
    host = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 600), nn.ReLU(), nn.Linear(600, 16)
    )
    blueprint = ("bottleneck", "lowrank", "depthwise")
    seeds = {"0": 4, "3": 2, "5": 4}
    config = Config(blueprint=blueprint, seeds_per_layer=seeds, rank=3, backend="triton")
    report = morphc.report(
        morphc.compile(host.to(DEVICE), (torch.randn(2, 3, 4, 4).to(DEVICE),), config=config)
    )
    wide = "chunks of 300 features are wider than the 256 that a tile holds"
    reasons = {
        path: {name: reason for name, (_, reason) in found.items()} for path, found in report.backends.items()
    }
    assert reasons["0"]["lowrank"] == "blueprint 'lowrank' behind a convolution runs as convolutions"
    assert reasons["0"]["bottleneck"] == ""
    assert "neighbours" in reasons["0"]["depthwise"]
    assert reasons["3"]["lowrank"] == wide
    assert reasons["3"]["bottleneck"].startswith(wide)
    assert reasons["5"] == {"bottleneck": "", "lowrank": ""}
    for found in report.backends.values():
        for name, reason in found.values():
            assert name == ("torch" if reason else "triton")
    text = str(report)
    assert "triton + torch" in text
    assert f"on torch: lowrank of 3: {wide}" in text
    told = json.loads(report.to_json())["backends"]["5"]["lowrank"]
    assert told == {"backend": "triton", "reason": ""}


def test_the_report_gives_the_reason_that_holds_for_all_once() -> None:
    host = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)).double()
    for backend, reason in (
        ("triton", "no kernel reads float64"),
        ("torch", 'backend="torch" was asked for'),
    ):
        config = Config(seeds_per_layer=2, backend=backend)
        model = morphc.compile(host.to(DEVICE), (torch.randn(2, 8).double().to(DEVICE),), config=config)
        assert f"on torch: bottleneck of every site: {reason}" in str(morphc.report(model))


def test_what_kernels_cover_of_each_blueprint() -> None:
    assert coverage("affine") == coverage("bottleneck") == "kernels"
    assert coverage("depthwise").startswith("torch: ")
    for name in ("lowrank", "widen"):
        assert coverage(name).startswith("linear layers: kernels; convolutions: torch: ")


def test_the_step_compiles_without_spills() -> None:
    (bank,) = [
        bank for _, bank in morphc.seeds(compiled("widen, gated", blend="gate"))["fc2"].site.slots.items()
    ]
    size = {"features": 23, "seeds": 5, "slots": 4}
    spec = spec_of("widen", bank.geometry, "gate", dtype=torch.bfloat16, walk="last", **size)
    for result in compile_all(tap_step.jobs(spec, bank.geometry), processes=1):
        assert isinstance(result, Resources), result
        assert not result.problem
