"""A compiled model whose sites run on kernels: everything that it gives equals what plain torch operations give."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import morphc
from morphc import Config, Lifecycle
from morphc.errors import ConfigError
from morphc.kernels import backend
from morphc.runtime.site import SeedSite

BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 1.5e-2}


class Net(nn.Module):
    """Convolutions with a BatchNorm and an in-place ReLU, then linear layers: what a site meets."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 12, 3, padding=1)
        self.act = nn.ReLU(inplace=True)
        self.fc1 = nn.Linear(12, 23)
        self.fc2 = nn.Linear(23, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.conv(x)).mean((2, 3))
        return self.fc2(self.act(self.fc1(x)))


def compiled(
    backend: str, dtype: torch.dtype = torch.float32, dormant: bool = False, **options: object
) -> nn.Module:
    torch.manual_seed(0)
    host = Net().to(dtype)
    config = Config(seeds_per_layer=5, slots=4, rank=3, backend=backend, **options)  # type: ignore[arg-type]
    model = morphc.compile(host, (example(dtype),), config=config)
    if dormant:
        return model
    generator = torch.Generator().manual_seed(1)
    for site in morphc.seeds(model).sites.values():
        site.assign([0, 3], Lifecycle.GRAFTING, alpha=0.5)
        site.assign([1], Lifecycle.TRAINING)
        for bank in site.slots.values():
            for name in bank.names:
                values = bank.get_parameter(name).data
                values.copy_(torch.randn(values.shape, generator=generator) * 0.3)
    return model


def example(dtype: torch.dtype = torch.float32, batch: int = 3) -> Tensor:
    return torch.randn(batch, 3, 4, 4, generator=torch.Generator().manual_seed(batch)).to(dtype)


def everything(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output, and the gradients of input, host and slots."""
    x = x.clone().requires_grad_()
    out = model(x)
    out.float().square().mean().backward()
    assert x.grad is not None
    found = {"out": out.detach(), "input": x.grad}
    found |= {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for path, site in morphc.seeds(model).sites.items():
        for kind, bank in site.slots.items():
            # A bank without a seed may be left out of the backward.
            params = {n: bank.get_parameter(n) for n in bank.grads()}
            found |= {
                f"{path}/{kind}/{n}": torch.zeros_like(params[n]) if g is None else g.clone()
                for n, g in bank.grads().items()
            }
    return found


def distance(one: Tensor, other: Tensor) -> float:
    return ((one.double() - other.double()).norm() / other.double().norm().clamp(min=1e-12)).item()


def runs(model: nn.Module) -> int:
    """How many banks have kernels by now."""
    sites = morphc.seeds(model).sites.values()
    return sum(kernels is not None for site in sites for kernels in site.site.engine.kernels.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("blueprint", ["bottleneck", "affine", ("affine", "bottleneck")], ids=str)
def test_kernels_and_torch_agree_on_outputs_and_every_gradient(dtype: torch.dtype, blueprint: object) -> None:
    expected = everything(compiled("torch", dtype, blueprint=blueprint), example(dtype))
    model = compiled("triton", dtype, blueprint=blueprint)
    found = everything(model, example(dtype))
    assert runs(model) >= 3
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert distance(found[name], value) < BOUNDS[dtype], name


@pytest.mark.parametrize("blend", ["lerp", "multiply", "gate"])
def test_every_blend_agrees(blend: str) -> None:
    expected = everything(compiled("torch", blend=blend), example())
    found = everything(compiled("triton", blend=blend), example())
    for name, value in expected.items():
        assert distance(found[name], value) < 1e-5, name


def test_a_model_that_only_trains_in_isolation_is_its_host_bit_for_bit() -> None:
    torch.manual_seed(0)
    host = Net()
    model = compiled("triton")
    for site in morphc.seeds(model).sites.values():
        site.assign([0, 3], Lifecycle.TRAINING)
    plain = morphc.detach(copy.deepcopy(model))
    expected, found = everything_plain(plain, example()), everything(model, example())
    del host
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert any(name.endswith("/in_weight") for name in found)


def everything_plain(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    out = model(x)
    out.float().square().mean().backward()
    assert x.grad is not None
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"out": out.detach(), "input": x.grad} | grads


def test_a_changed_state_is_seen_by_the_next_forward_however_it_was_changed() -> None:
    model, reference = compiled("triton"), compiled("torch")
    for change in (
        lambda seeds: seeds["fc1"].assign([2], Lifecycle.FOSSILIZED),
        lambda seeds: seeds.alpha.mul_(0.5),
        lambda seeds: seeds["fc1"].assign([0], Lifecycle.CULLED),
    ):
        for each in (model, reference):
            with torch.no_grad():
                change(morphc.seeds(each))
        with torch.no_grad():
            assert distance(model(example()), reference(example())) < 1e-5


def test_optimizer_steps_agree_and_touch_only_slots_that_train() -> None:
    stepped = {}
    for name in ("torch", "triton"):
        model = compiled(name)
        before = {
            path: site.slots["bottleneck"].in_weight.detach().clone()
            for path, site in morphc.seeds(model).sites.items()
        }
        for _ in range(2):
            everything(model, example())
            morphc.seeds(model).step_optimizer(lr=1e-2)
        stepped[name] = morphc.seeds(model)
        for path, site in stepped[name].sites.items():
            bank = site.slots["bottleneck"]
            assert torch.equal(bank.in_weight[3], before[path][3])
            assert bank.opt.step.tolist() == [2, 2, 2, 0]
    for path, site in stepped["triton"].sites.items():
        for name in site.slots["bottleneck"].names:
            mine = site.slots["bottleneck"].get_parameter(name)
            assert distance(mine, stepped["torch"][path].slots["bottleneck"].get_parameter(name)) < 1e-4


def test_an_output_that_somebody_else_holds_is_not_written_to() -> None:
    class Keeps(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            self.kept = super().forward(x)
            return self.kept

    torch.manual_seed(0)
    host = nn.Sequential(Keeps(8, 16))
    model = morphc.compile(host, (torch.randn(4, 8),), config=Config(seeds_per_layer=4, backend="triton"))
    (site,) = morphc.seeds(model).sites.values()
    site.assign([1], Lifecycle.FOSSILIZED)
    site.slots["bottleneck"].out_bias.data.fill_(1.0)
    x = torch.randn(4, 8)
    with torch.no_grad():
        out = model(x)
        assert torch.equal(model[0].kept, nn.functional.linear(x, host[0].weight, host[0].bias))
    assert not torch.equal(out, model[0].kept)


def test_the_same_model_in_a_traced_graph() -> None:
    expected = everything(compiled("triton"), example())
    model = compiled("triton")
    traced = torch.compile(model, backend="aot_eager", fullgraph=True)
    # The first call finds nothing prepared and does the join again in the backward; the second keeps the stash.
    for _ in range(2):
        for site in morphc.seeds(model).sites.values():
            site.slots["bottleneck"].zero_grads()
        model.zero_grad()
        x = example().requires_grad_()
        out = traced(x)
        out.square().mean().backward()
        assert torch.equal(out.detach(), expected["out"])
        assert x.grad is not None
        assert torch.equal(x.grad, expected["input"])
        for path, site in morphc.seeds(model).sites.items():
            for name, grad in site.slots["bottleneck"].grads().items():
                assert grad is not None
                assert torch.equal(grad, expected[f"{path}/bottleneck/{name}"])


def test_autocast_copies_and_pickles() -> None:
    model = compiled("triton")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(example())
        again = copy.deepcopy(model)(example())
    assert torch.equal(out, again)
    with torch.no_grad():
        assert torch.equal(pickle.loads(pickle.dumps(model))(example()), model(example()))


def test_what_has_no_kernels_runs_on_torch() -> None:
    model = compiled("triton", torch.float64)
    found = everything(model, example(torch.float64))
    assert runs(model) == 0
    expected = everything(compiled("torch", torch.float64), example(torch.float64))
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_triton_where_it_can_not_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ConfigError, match=r"backend=\"triton\" on cpu: .* set TRITON_INTERPRET=1"):
        compiled("triton")
    assert backend.chosen("auto", torch.device("cpu")) == "torch"


@pytest.mark.parametrize("values", [0, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_telemetry_agrees_whenever_it_is_read(dtype: torch.dtype, values: int) -> None:
    models = {
        name: compiled(name, dtype, dormant=True, telemetry_every=1, telemetry_values=values)
        for name in ("torch", "triton")
    }
    for model in models.values():
        morphc.seeds(model).reset_telemetry()
    for batch in (3, 5, 3):
        for model in models.values():
            model(example(dtype, batch) + 2)
        health = {name: morphc.seeds(model).telemetry() for name, model in models.items()}
        for name, value in health["torch"].items():
            torch.testing.assert_close(health["triton"][name], value, rtol=2e-5, atol=1e-6, equal_nan=True)
    first, *_ = health["torch"][
        "count"
    ]  # of 12 features in 5 chunks, the widest first; 11 samples of 16 positions
    assert first == 3 * 16 * (11 if not values else 1 + 1 + 1)


def test_what_was_measured_is_in_a_copy_a_pickle_and_a_state_dict() -> None:
    model = compiled("triton", telemetry_every=1)
    model(example())
    expected = morphc.seeds(copy.deepcopy(model)).telemetry()["count"]
    assert torch.equal(morphc.seeds(pickle.loads(pickle.dumps(model))).telemetry()["count"], expected)
    counts = next(value for key, value in model.state_dict().items() if key.endswith("seeds.counts"))
    assert counts[0].min() > 0
    morphc.seeds(model).reset_telemetry()
    assert morphc.seeds(model).telemetry()["count"].max() == 0
    model(example())
    assert torch.equal(morphc.seeds(model).telemetry()["count"], expected)


def ready(model: nn.Module) -> int:
    """Sites that have what a repeated call takes."""
    return sum(bool(module.engine.ready) for module in model.modules() if isinstance(module, SeedSite))


def test_what_is_kept_between_calls_is_not_used_once_it_no_longer_holds() -> None:
    """Parameters that are replaced, loaded or moved, other shapes and strides, gradients on and off, in turn."""
    models = [compiled("triton"), compiled("torch")]

    def both(x: Tensor) -> list[Tensor]:
        with torch.no_grad():
            found = [model(x) for model in models]
        return [*found, *(model(x).detach() for model in models)]

    def agree(x: Tensor) -> Tensor:
        one, other, graded, reference = both(x)
        assert distance(one, other) < 1e-5
        assert distance(graded, reference) < 1e-5
        assert torch.equal(one, graded)
        return one

    x = example()
    before = agree(x)
    assert ready(models[0]) == 3
    agree(x)
    agree(example(batch=2))
    agree(x.contiguous(memory_format=torch.channels_last))
    others = [{name: p + 0.1 for name, p in model.named_parameters()} for model in models]
    with torch.no_grad():
        found = [
            torch.func.functional_call(model, other, (x,))
            for model, other in zip(models, others, strict=True)
        ]
    assert distance(found[0], found[1]) < 1e-5
    assert distance(found[0], before) > 1e-3
    assert torch.equal(agree(x), before)
    for model in models:
        state = {
            name: value + 0.1 if value.is_floating_point() and "slots" in name else value
            for name, value in model.state_dict().items()
        }
        model.load_state_dict(state)
    assert not torch.equal(agree(x), before)
    models = [copy.deepcopy(model).double().float() for model in models]
    agree(x)


class Narrowed(nn.Conv2d):
    """Gives away 8 of its 12 channels: with channels last, rows with gaps between them."""

    def __init__(self) -> None:
        super().__init__(3, 12, 1)
        self.out_channels = 8

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.contiguous(memory_format=torch.channels_last))[:, :8]


@pytest.mark.parametrize("graded", [False, True])
def test_a_copy_with_other_strides_is_walked_as_it_lies(graded: bool) -> None:
    found = []
    for name in ("triton", "torch"):
        torch.manual_seed(0)
        host = nn.Sequential(Narrowed())
        host.to(memory_format=torch.channels_last)
        config = Config(seeds_per_layer=4, slots=4, rank=3, backend=name)
        model = morphc.compile(host, (example(),), config=config)
        site = morphc.seeds(model)["0"]
        site.assign([0, 2], Lifecycle.FINE_TUNING, alpha=0.5)
        generator = torch.Generator().manual_seed(1)
        (bank,) = site.slots.values()
        for parameter in bank.names:
            values = bank.get_parameter(parameter).data
            values.copy_(torch.randn(values.shape, generator=generator))
        with torch.set_grad_enabled(graded):
            found.append(model(example()).detach())
    assert distance(*found) < 1e-5


def test_a_step_after_more_slots_were_made_is_that_of_torch() -> None:
    """The step before has left a list of active seeds, addresses and kernels for fewer slots behind."""
    found = []
    for chosen in ("torch", "triton"):
        model = compiled(chosen)
        for slots in (4, 5):
            morphc.enlarge(model, slots=slots)
            everything(model, example())
            morphc.seeds(model).step_optimizer(lr=1e-2)
        found.append(model)
    for path, site in morphc.seeds(found[0]).sites.items():
        other = morphc.seeds(found[1]).sites[path]
        for kind, bank in site.slots.items():
            for name in bank.names:
                expected, stepped = (one.slots[kind].get_parameter(name) for one in (site, other))
                assert expected.shape[0] == 5
                assert distance(stepped, expected) < 1e-5, name


@pytest.mark.parametrize("blueprint", ["bottleneck", ("affine", "bottleneck"), "lowrank"], ids=str)
@pytest.mark.parametrize("chosen", ["torch", "triton"])
def test_what_is_kept_from_inference_serves_training(chosen: str, blueprint: object) -> None:
    expected = everything(compiled(chosen, blueprint=blueprint), example())
    model = compiled(chosen, blueprint=blueprint)
    with torch.inference_mode():
        model.eval()(example())
    found = everything(model.train(), example())
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    morphc.seeds(model).step_optimizer(lr=1e-2)
    with torch.inference_mode():
        model(example())
        morphc.seeds(model).tick()
    everything(model, example())
