"""The compiled model is the host's class, with the host's keys, and can be left again."""

from __future__ import annotations

import copy
import gc
import pickle
from collections import OrderedDict
from typing import Any

import pytest
import torch
from compiler_hosts import HOSTS, Functional, Mlp, Nested, assert_same, rows
from torch import Tensor, nn

import morphc
from morphc.passes.verify import same_bits

FEW = morphc.Config(seeds_per_layer=2)


def compiled(host: nn.Module, *args: Any, **options: Any) -> Any:
    return morphc.compile(host, args or (rows(),), config=options.pop("config", FEW), **options)


class Renamed(nn.Sequential):
    pass


class Heads(nn.ModuleDict):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {name: head(x) for name, head in self.items()}


class Stack(nn.ModuleList):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = layer(x)
        return x


def norms() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 4))


CONTAINERS = {
    "sequential": lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)),
    "sequential subclass": lambda: Renamed(OrderedDict(a=nn.Linear(8, 8), b=nn.Linear(8, 4))),
    "module dict": lambda: Heads({"x": nn.Linear(8, 3), "y": nn.Linear(8, 4)}),
    "module list": lambda: Stack([nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)]),
    "nested": lambda: nn.Sequential(nn.Sequential(nn.Linear(8, 8)), Stack([nn.Linear(8, 8)])),
}
ALL = {**HOSTS, "norms": norms, "linear root": lambda: nn.Linear(8, 4), **CONTAINERS}


@pytest.mark.parametrize("name", ALL)
class TestEveryHost:
    def test_the_type_is_the_hosts(self, name):
        host = ALL[name]()
        model = compiled(host)
        assert type(model) is type(host)
        assert model is not host
        assert isinstance(model, type(host))

    def test_host_keys_are_kept_in_order_and_ours_have_the_reserved_name(self, name):
        host = ALL[name]()
        keys, ours = list(host.state_dict()), list(compiled(host).state_dict())
        added = [key for key in ours if key not in keys]
        assert [key for key in ours if key in keys] == keys
        assert added
        assert all("morphc" in key.split(".") for key in added)
        assert [key for key in added if key.startswith("morphc.seeds.")]

    def test_names_of_parameters_and_modules_are_kept(self, name):
        host = ALL[name]()
        model = compiled(host)
        mine = [n for n, _ in model.named_parameters() if "morphc" not in n.split(".")]
        assert mine == [n for n, _ in host.named_parameters()]
        modules = [n for n, _ in model.named_modules() if "morphc" not in n.split(".")]
        assert modules == [n for n, _ in host.named_modules()]

    def test_tensors_are_shared_unless_asked_not_to(self, name):
        host = ALL[name]()
        theirs = dict(host.named_parameters())
        shared, copied = (
            dict(compiled(host).named_parameters()),
            dict(compiled(host, share=False).named_parameters()),
        )
        assert all(shared[key] is theirs[key] for key in theirs)
        assert not {p.data_ptr() for p in copied.values() if p.numel()} & {
            p.data_ptr() for p in theirs.values()
        }
        assert all(same_bits(copied[key], theirs[key]) for key in theirs)

    def test_a_checkpoint_of_the_host_loads_with_strict_false(self, name):
        host, other = ALL[name](), ALL[name]()
        model = compiled(host, share=False)
        result = model.load_state_dict(other.state_dict(), strict=False)
        assert result.unexpected_keys == []
        assert all("morphc" in key.split(".") for key in result.missing_keys)
        assert all(same_bits(model.state_dict()[key], value) for key, value in other.state_dict().items())

    def test_a_checkpoint_of_the_model_loads_with_strict_true(self, name):
        host = ALL[name]()
        model, other = compiled(host, share=False), compiled(host, share=False)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1)
        other.load_state_dict(model.state_dict(), strict=True)
        assert all(same_bits(other.state_dict()[key], value) for key, value in model.state_dict().items())

    def test_detach_gives_the_host_back_and_leaves_the_model_alone(self, name):
        host = ALL[name]()
        model = compiled(host)
        plain = morphc.detach(model)
        assert type(plain) is type(host)
        assert list(plain.state_dict()) == list(host.state_dict())
        assert [n for n, _ in plain.named_modules()] == [n for n, _ in host.named_modules()]
        assert not any("forward" in vars(module) for module in plain.modules())
        assert {k: v for k, v in vars(plain).items() if k == "morphc"} == {}
        assert len(morphc.seeds(model)) > 0
        with pytest.raises(morphc.errors.NotMorphedError):
            morphc.seeds(plain)
        assert_outputs_equal(host, plain)
        assert len(morphc.seeds(compiled(plain))) == len(morphc.seeds(model))

    def test_it_trains_as_the_host_does(self, name):
        host = ALL[name]()
        twin = copy.deepcopy(host)
        model = compiled(host, share=False)
        for module in (twin, model):
            trainable = [p for p in module.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(trainable, lr=0.01)
            torch.manual_seed(3)
            module.train()
            for _ in range(3):
                optimizer.zero_grad()
                total(module(rows())).backward()
                optimizer.step()
        state = model.state_dict()
        assert all(same_bits(state[key], value) for key, value in twin.state_dict().items())


def total(output: Any) -> Tensor:
    return sum(v.sum() for v in output.values()) if isinstance(output, dict) else output.sum()


def assert_outputs_equal(host: nn.Module, model: nn.Module) -> None:
    host.eval(), model.eval()
    expected, got = host(rows()), model(rows())
    if isinstance(expected, dict):
        assert list(expected) == list(got)
        assert all(same_bits(expected[key], got[key]) for key in expected)
    else:
        assert same_bits(expected, got)


class TestContainers:
    @pytest.mark.parametrize("name", CONTAINERS)
    def test_length_iteration_and_forward_are_the_hosts(self, name):
        host = CONTAINERS[name]()
        model = compiled(host)
        assert len(model) == len(host)
        assert [type(child) for child in model.children()] == [type(child) for child in host.children()]
        assert list(model._modules) == list(host._modules)
        if isinstance(host, nn.ModuleDict):
            assert list(model) == list(host)
            assert "morphc" not in model
        else:
            assert [type(child) for child in model] == [type(child) for child in host]
            assert type(model[-1]) is type(host[-1])
        assert_outputs_equal(host, model)

    def test_a_slice_of_a_sequential_runs(self):
        host = CONTAINERS["sequential"]()
        model = compiled(host)
        assert same_bits(model[:2](rows()), host[:2](rows()))
        assert len(model[1:]) == 2

    def test_one_may_append_to_a_compiled_sequential(self):
        model = compiled(CONTAINERS["sequential"]())
        model.append(nn.Linear(4, 2))
        assert model(rows()).shape == (3, 2)
        assert len(model) == 4


class TestModuleMethods:
    def test_zero_grad_and_grads_of_the_host_parameters_are_shared(self):
        host = Mlp()
        model = compiled(host)
        model(rows()).sum().backward()
        assert host.fc1.weight.grad is model.fc1.weight.grad is not None
        model.zero_grad()
        assert host.fc1.weight.grad is None

    @pytest.mark.parametrize("name", ["mlp", "functional", "sequential", "linear root"])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
    def test_a_cast_moves_the_host_weights_and_spares_the_state(self, name, dtype):
        host = ALL[name]()
        model = compiled(host, share=False).to(dtype)
        assert all(p.dtype is dtype for key, p in model.named_parameters() if "morphc" not in key.split("."))
        seeds = morphc.seeds(model)
        assert (seeds.lifecycle.dtype, seeds.alpha.dtype) == (torch.int32, torch.float32)
        expected = copy.deepcopy(host).to(dtype).eval()(rows().to(dtype))
        assert same_bits(model.eval()(rows().to(dtype)), expected)

    def test_train_and_eval_reach_every_module(self):
        model = compiled(Nested())
        assert all(not m.training for m in model.eval().modules())
        assert all(m.training for m in model.train().modules())

    def test_apply_and_requires_grad_leave_the_slots_frozen(self):
        model = compiled(Mlp()).requires_grad_(False)
        assert not any(p.requires_grad for p in model.parameters())

    def test_slots_do_not_ask_for_gradients_of_the_users_optimizer(self):
        model = compiled(Mlp())
        asked = [name for name, p in model.named_parameters() if p.requires_grad]
        assert asked == [name for name, _ in Mlp().named_parameters()]

    @pytest.mark.parametrize("way", ["module", "method", "attribute"])
    @pytest.mark.parametrize("after", ["nothing", "cast", "meta", "deepcopy", "pickle", "assign", "enlarge"])
    def test_unfreezing_all_parameters_leaves_the_slots_to_morphc(self, way, after):
        model = compiled(Mlp(), config=morphc.Config(seeds_per_layer=2, slots=1))
        if after == "cast":
            model = model.double()
        elif after == "meta":
            model = model.to("meta")
        elif after == "deepcopy":
            model = copy.deepcopy(model)
        elif after == "pickle":
            model = pickle.loads(pickle.dumps(model))
        elif after == "assign":
            state = {name: nn.Parameter(value.clone()) for name, value in model.named_parameters()}
            model.load_state_dict({**model.state_dict(), **state}, assign=True)
        elif after == "enlarge":
            morphc.enlarge(model, slots=2)
        if way == "module":
            model.requires_grad_(True)
        for parameter in model.parameters():
            if way == "method":
                parameter.requires_grad_()
            elif way == "attribute":
                parameter.requires_grad = True
        asked = [name for name, p in model.named_parameters() if p.requires_grad]
        assert asked == [name for name, _ in Mlp().named_parameters()]

    def test_an_optimizer_made_after_unfreezing_trains_the_host_alone(self):
        host = Mlp()
        model = compiled(host, share=False).requires_grad_(True)
        seeds = morphc.seeds(model)
        seeds["fc1"].assign([0], morphc.Lifecycle.FINE_TUNING)
        bank = seeds["fc1"].slots["bottleneck"]
        before = {name: value.clone() for name, value in bank.named_parameters()}
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
        for module in (host, model):
            torch.manual_seed(0)
            module(rows()).square().sum().backward()
        norms = [torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0) for module in (host, model)]
        assert norms[0] == norms[1]
        optimizer.step()
        assert all(torch.equal(value, before[name]) for name, value in bank.named_parameters())
        assert any(grad is not None for grad in bank.grads().values())
        seeds.step_optimizer(lr=0.1)
        assert not all(torch.equal(value, before[name]) for name, value in bank.named_parameters())

    def test_ddp_made_after_unfreezing_waits_for_no_gradient_of_a_slot(self):
        torch.distributed.init_process_group(
            "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
        )
        try:
            model = compiled(Mlp()).requires_grad_(True)
            wrapped = nn.parallel.DistributedDataParallel(model)
            for _ in range(3):
                wrapped(rows()).sum().backward()
            # Before its group: the last to let go of that waits for a thread, which may wait for Python's lock.
            del wrapped
            gc.collect()
        finally:
            torch.distributed.destroy_process_group()

    @pytest.mark.parametrize("name", ALL)
    def test_a_printed_model_has_one_line_a_site(self, name):
        host = ALL[name]()
        model = compiled(host, config=morphc.Config(seeds_per_layer=2, blueprint=("affine", "bottleneck")))
        lines = repr(model).splitlines()
        sites = [line for line in lines if "SeedSite(" in line]
        assert len(sites) == len(morphc.seeds(model).sites)
        assert all(line.endswith("mode=DORMANT)") for line in sites)
        for word in ("Banks", "SlotBank", "SeedState", "Moments", "ParameterList"):
            assert word not in repr(model)

    def test_a_site_and_a_bank_print_what_they_hold(self):
        seeds = morphc.seeds(compiled(Mlp(), config=morphc.Config(seeds_per_layer=2, slots=1, rank=3)))
        assert repr(seeds["fc1"].site) == (
            "SeedSite('fc1', features=16, seeds=2, slots=1 bottleneck, mode=DORMANT)"
        )
        assert repr(seeds["fc1"].slots["bottleneck"]) == (
            "SlotBank('bottleneck', slots=1, chunk=8, rank=3, blend='residual')"
        )

    def test_functional_call_and_torch_func_see_the_hosts_parameters(self):
        host = Mlp().eval()
        model = compiled(host).eval()
        values = {name: p.detach() + 1 for name, p in host.named_parameters()}
        expected = torch.func.functional_call(host, values, (rows(),))
        assert same_bits(torch.func.functional_call(model, values, (rows(),)), expected)

    def test_users_hooks_on_watched_layers_see_what_they_saw(self):
        host = nn.Sequential(nn.Linear(8, 8), nn.ReLU(inplace=True))
        seen: list[Tensor] = []
        host[0].register_forward_hook(lambda module, args, output: seen.append(output.clone()))
        model = compiled(host)
        assert seen == []
        host(rows())
        model(rows())
        assert len(seen) == 2
        assert same_bits(seen[0], seen[1])


class TestReport:
    def test_it_goes_to_json_and_its_plan_comes_back(self):
        import msgspec

        report = morphc.report(compiled(Nested()))
        document = msgspec.json.decode(report.to_json())
        plan = msgspec.convert(document["plan"], morphc.Plan)
        assert plan == report.plan
        assert plan.digest == report.plan.digest
        assert document["totals"]["sites"] == len(report.plan.sites) == 9
        assert document["totals"]["levels"] == {"rewritten": 2, "matched": 1, "as_written": 1}
        assert [p["name"] for p in document["passes"]] == [p.name for p in report.passes]

    def test_its_text_names_every_site(self):
        report = morphc.report(compiled(Functional()))
        text = str(report)
        assert "fc1" in text
        assert "weight" in text
        assert "equal bit for bit" in text

    def test_a_plain_model_has_none(self):
        for call in (morphc.report, morphc.seeds, morphc.detach):
            with pytest.raises(morphc.errors.NotMorphedError, match="Mlp carries no seeds"):
                call(Mlp())

    def test_a_module_around_a_compiled_one_names_it(self):
        around = nn.Sequential(nn.Identity(), compiled(Mlp()))
        with pytest.raises(
            morphc.errors.NotMorphedError, match=r"no seeds of its own, its '1' does: give that"
        ):
            morphc.seeds(around)
        assert morphc.seeds(around[1]).sites

    def test_it_is_found_behind_a_deepcopy(self):
        model = compiled(Mlp())
        assert morphc.report(copy.deepcopy(model)).plan == morphc.report(model).plan


class TestEnlarge:
    def test_every_site_gets_the_slots_and_the_outputs_stay(self):
        host = Mlp()
        model = compiled(host, config=morphc.Config(seeds_per_layer=4, slots=1))
        assert morphc.enlarge(model, slots=3) is model
        assert {
            len(bank.owner) for site in morphc.seeds(model).sites.values() for bank in site.slots.values()
        } == {3}
        assert_same(host, model, rows())
