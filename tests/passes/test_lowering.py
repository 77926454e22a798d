"""From graphs to a module that runs: rewritten and watched forwards, and the Python that is shown of them."""

from __future__ import annotations

import ast
import copy
import io
import pickle
import re
import types
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compiler_hosts import (
    HOSTS,
    Functional,
    Matched,
    Mlp,
    Nested,
    assert_same,
    compiled,
    line_of,
    regions_of,
    rows,
    sites_of,
)
from torch import Tensor, nn

import morphc
from morphc.config import Config
from morphc.passes.verify import same_bits
from morphc.runtime.forward import SiteForward
from morphc.runtime.regions import RewrittenForward, WatchedForward, restore_forward
from morphc.runtime.site import SeedSite

EVERY = Config(seeds_per_layer=1, telemetry_every=1)


def counts(model: nn.Module) -> dict[str, int]:
    """Values that each site has measured since the last call."""
    seeds = morphc.seeds(model)
    found = {path: int(n) for path, n in zip(seeds.sites, seeds.telemetry()["count"].tolist(), strict=True)}
    seeds.reset_telemetry()
    return found


@dataclass(slots=True)
class Slotted:
    gain: float
    bias: object
    names: list[str]


class Options(nn.Module):
    """A functional layer, and arguments that the example leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 8) / 3)
        self.scale = 1.0

    def forward(self, x: Tensor, shift: Tensor | None = None, *, flip: bool = False) -> Tensor:
        h = torch.relu(F.linear(x, self.weight)) * self.scale
        if shift is not None:
            h = h + shift
        return h.flip(-1) if flip else h


class TestRewrittenForward:
    def test_only_regions_with_functional_layers_run_as_graphs(self):
        result = compiled(Nested())
        assert not any(region.runs for region in regions_of(result).values())
        result = compiled(nn.Sequential(Functional(), Mlp_of(4)))
        assert [path for path, region in regions_of(result).items() if region.runs] == ["0"]
        assert isinstance(vars(result.model[0])["forward"], RewrittenForward)
        assert type(result.model[0]) is Functional

    @pytest.mark.parametrize("given", [{}, {"shift": torch.ones(4)}], ids=["shift left out", "shift given"])
    def test_any_call_is_the_hosts_and_is_seen_by_the_site(self, given):
        host = Options()
        model = compiled(host, rows(), example_kwargs=given, config=EVERY).model
        shift = torch.full((4,), 0.5)
        assert regions_of(compiled(host, rows(), example_kwargs=given))[""].runs
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
            ((rows(),), {}),
            ((), {"x": rows()}),
            ((rows(), shift), {}),
            ((rows(),), {"shift": shift}),
            ((), {"shift": shift, "x": rows()}),
            ((rows(), None), {}),
            ((rows(),), {"flip": True}),
            ((rows(), shift), {"flip": True}),
        ]
        for args, kwargs in calls:
            assert_same(host, model, *args, **kwargs)
            assert counts(model) == {"weight": 12}, (args, kwargs)

    def test_an_active_seed_counts_however_the_model_is_called(self):
        host = Options()
        model = compiled(host).model
        morphc.seeds(model)["weight"].assign([0], morphc.Lifecycle.FOSSILIZED)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "slots" in name:
                    parameter.add_(0.3)
        grown = model(rows())
        assert not torch.equal(grown, host(rows()))
        assert same_bits(model(rows(), shift=torch.zeros(4)), grown)
        assert same_bits(model(x=rows(), flip=True).flip(-1), grown)

    def test_a_wrong_call_raises_what_the_host_raises(self):
        host = Options()
        model = compiled(host).model
        for args, kwargs in [
            ((), {}),
            ((rows(), None, 3), {}),
            ((rows(),), {"shft": 1}),
            ((rows(),), {"x": rows()}),
        ]:
            with pytest.raises(TypeError) as theirs:
                host(*args, **kwargs)
            with pytest.raises(TypeError) as ours:
                model(*args, **kwargs)
            assert str(ours.value) == str(theirs.value)

    def test_a_changed_attribute_is_obeyed_and_the_site_still_sees(self):
        host = Options()
        model = compiled(host, config=EVERY).model
        host.scale = model.scale = 3.0
        assert_same(host, model, rows())
        assert counts(model) == {"weight": 12}
        host.scale = model.scale = torch.tensor([2.0, 1.0, 0.0, -1.0])
        assert_same(host, model, rows())
        host.scale = model.scale = 1.0
        assert_same(host, model, rows())

    @pytest.mark.parametrize("kind", [types.SimpleNamespace, Slotted])
    def test_a_changed_option_of_its_config_object_is_obeyed(self, kind):
        class Configured(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight = nn.Parameter(torch.randn(4, 8) / 3)
                self.config = kind(gain=1.0, bias=None, names=["a"])

            def forward(self, x: Tensor) -> Tensor:
                h = torch.relu(F.linear(x, self.weight)) * self.config.gain
                return h if self.config.bias is None else h + self.config.bias

        host = Configured()
        result = compiled(host, config=EVERY)
        assert regions_of(result)[""].runs
        for name, value in [
            ("gain", 2.0),
            ("bias", 1.0),
            ("bias", torch.ones(4)),
            ("bias", None),
            ("gain", 1.0),
        ]:
            for module in (host, result.model):
                setattr(module.config, name, value)
            assert_same(host, result.model, rows())
            assert counts(result.model) == {"weight": 12}

    def test_other_shapes_dtypes_and_leading_axes(self):
        host = Functional()
        model = compiled(host).model
        for shape in [(1, 8), (0, 8), (8,), (2, 3, 8), (1, 1, 1, 8)]:
            assert_same(host, model, torch.randn(*shape))
        host.double(), model.double()
        assert_same(host, model, rows().double())

    def test_torch_compile_sees_one_graph_and_obeys_its_guards(self):
        host = Options().eval()
        model = compiled(host).model.eval()
        fast = torch.compile(model, backend="eager", fullgraph=True)
        assert same_bits(fast(rows()), host(rows()))
        host.scale = model.scale = 3.0
        assert same_bits(fast(rows()), host(rows()))

    def test_its_signature_is_the_hosts(self):
        import inspect

        assert inspect.signature(compiled(Options()).model.forward) == inspect.signature(Options().forward)

    def test_a_replaced_parameter_is_read_by_its_name(self):
        host = Functional()
        model = compiled(host).model
        host.weight = model.weight = nn.Parameter(torch.ones(4, 16))
        assert_same(host, model, rows())

    @pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
    @pytest.mark.parametrize("name", HOSTS)
    def test_a_compiled_model_is_copied_and_pickled(self, name, way):
        host = HOSTS[name]()
        model = compiled(host, config=EVERY).model
        if way == "deepcopy":
            fresh = copy.deepcopy(model)
        elif way == "pickle":
            fresh = pickle.loads(pickle.dumps(model))
        else:
            file = io.BytesIO()
            torch.save(model, file)
            file.seek(0)
            fresh = torch.load(file, weights_only=False)
        assert type(fresh) is type(host)
        assert not {id(p) for p in fresh.parameters()} & {id(p) for p in host.parameters()}
        assert_same(host, fresh, rows(5))
        assert sum(counts(model).values()) == 0
        seen = counts(fresh)
        assert seen.keys() == morphc.seeds(model).sites.keys()
        assert all(seen[path] for path in seen if path not in ("spare", "third.1.spare"))

    def test_restore_forward_takes_every_wrapper_off(self):
        model = compiled(Functional()).model
        restore_forward(model)
        assert "forward" not in vars(model)


def Mlp_of(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 8), Mlp())


class Experts(nn.Module):
    """Mixture of experts with 3-D weights, one expert at a time: no graph, and each matmul reads a slice."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 3)
        self.up = nn.Parameter(torch.randn(3, 8, 6) / 3)
        self.down = nn.Parameter(torch.randn(3, 6, 8) / 3)

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.gate(x).argmax(-1)
        out = torch.zeros_like(x)
        for expert in range(3):
            picked = (chosen == expert).nonzero().squeeze(-1)
            if len(picked):
                h = torch.relu(x[picked] @ self.up[expert])
                out = out.index_add(0, picked, h @ self.down[expert])
        return out


class Batched(nn.Module):
    """Experts by one batched matmul."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 8, 6) / 3)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] < 0:
            raise ValueError
        return torch.bmm(x.unsqueeze(0).expand(3, -1, -1), self.up).relu().sum(0)


class TestWatchedForward:
    @pytest.mark.parametrize("blueprint", ["widen", "lowrank", "affine", "bottleneck"])
    def test_functional_layers_take_or_refuse_every_blueprint(self, blueprint):
        class Chain(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.fc = nn.Linear(8, 6)
                self.weight = nn.Parameter(torch.randn(6, 4))
                self.last = nn.Linear(4, 3)

            def forward(self, x: Tensor) -> Tensor:
                return self.last(torch.relu(torch.relu(self.fc(x)) @ self.weight))

        host = Chain()
        result = compiled(host, config=Config(seeds_per_layer=2, blueprint=blueprint))
        assert set(sites_of(result)) == {"fc", "weight", "last"}
        assert all(site.block is None for site in sites_of(result).values())
        assert_same(host, result.model, rows())

    def test_expert_weights_are_watched_slice_by_slice(self):
        host = Experts()
        result = compiled(host, rows(12), config=EVERY)
        assert {p: s.features for p, s in sites_of(result).items()} == {"gate": 3, "up": 6, "down": 8}
        assert isinstance(vars(result.model)["forward"], WatchedForward)
        assert_same(host, result.model, rows(12))
        assert counts(result.model)["gate"] == 36
        result.model.train()(rows(12))
        seen = counts(result.model)
        assert seen["gate"] == 36
        assert seen["up"] % 6 == 0
        assert 0 < seen["up"] <= 72

    def test_experts_in_one_batched_matmul(self):
        host = Batched()
        result = compiled(host, config=EVERY)
        assert {p: s.features for p, s in sites_of(result).items()} == {"up": 6}
        assert_same(host, result.model, rows(5))
        assert counts(result.model) == {"up": 3 * 5 * 6}

    def test_a_view_a_cast_or_a_transpose_is_still_the_parameter(self):
        class Views(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight = nn.Parameter(torch.randn(4, 2, 4))

            def forward(self, x: Tensor) -> Tensor:
                if x.shape[0] < 0:
                    raise ValueError
                return torch.relu(x.double() @ self.weight.view(4, 8).t().double())

        host = Views()
        result = compiled(host, config=EVERY)
        assert list(sites_of(result)) == ["weight"]
        assert_same(host, result.model, rows())
        assert counts(result.model) == {"weight": 12}

    def test_one_that_raises_leaves_no_mode_behind(self):
        host = Matched()
        host.weight = nn.Parameter(torch.randn(8, 8))
        host.forward = lambda x: torch.relu(x @ host.weight) if x.shape[0] < 100 else 1 / 0
        model = compiled(host).model
        with pytest.raises(ZeroDivisionError):
            model(torch.randn(100, 8))
        assert_same(host, model, rows())


class TestWhereSitesHang:
    def test_a_layer_keeps_its_class_and_gets_one_child(self):
        host = Mlp()
        model = compiled(host).model
        assert type(model.fc1) is nn.Linear
        assert [name for name, _ in model.fc1.named_children()] == ["morphc"]
        assert isinstance(model.fc1.morphc, SeedSite)
        assert isinstance(vars(model.fc1)["forward"], SiteForward)
        assert not list(host.fc1.children())
        assert "forward" not in vars(host.fc1)

    def test_a_dormant_site_returns_the_very_tensor(self):
        model = compiled(Mlp()).model
        y = rows(3, 16)
        assert model.fc1.morphc(y) is y

    def test_a_bound_forward_kept_in_an_attribute_goes_through_the_site(self):
        class Keeps(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.fc = nn.Linear(8, 8)
                self.fns = {"fc": [self.fc.forward]}

            def forward(self, x: Tensor) -> Tensor:
                return self.fns["fc"][0](x)

        host = Keeps()
        result = compiled(host, config=EVERY)
        assert_same(host, result.model, rows())
        assert counts(result.model) == {"fc": 24}

    def test_a_child_called_past_its_call_goes_through_the_site(self):
        class Past(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.fc = nn.Linear(8, 8)

            def forward(self, x: Tensor) -> Tensor:
                return torch.relu(self.fc.forward(x))

        host = Past()
        result = compiled(host, config=EVERY)
        assert list(sites_of(result)) == ["fc"]
        assert_same(host, result.model, rows())
        assert counts(result.model) == {"fc": 24}

    @pytest.mark.parametrize("wrap", ["closure", "holder"])
    def test_layers_called_through_attributes_are_not_bypassed(self, wrap):
        class Indirect(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.fc = nn.Linear(8, 8)
                self.call = (lambda x: self.fc(x)) if wrap == "closure" else self.fc.__call__

            def forward(self, x: Tensor) -> Tensor:
                return self.call(x)

        host = Indirect()
        model = compiled(host, config=EVERY).model
        assert_same(host, model, rows())
        assert counts(model) == {"fc": 24}


class TestReadableGraphs:
    @pytest.mark.parametrize("name", HOSTS)
    def test_every_shown_region_is_python(self, name):
        result = compiled(HOSTS[name]())
        for path, text in result.report.graphs.items():
            tree = ast.parse(text)
            compile(tree, path or "root", "exec")
            assert ast.get_docstring(tree)
            assert [node.args.args[0].arg for node in tree.body if isinstance(node, ast.FunctionDef)]

    def test_the_site_and_the_users_line_stand_beside_each_other(self):
        text = compiled(Functional()).report.graphs[""]
        file, _, line = line_of(Functional.forward, "F.linear").rpartition("/")[2].rpartition(":")
        users = re.escape("return torch.tanh(F.linear(h, self.weight)) * self.scale")
        assert re.search(rf"\n    weight = self.weight +# {file}:{line}: {users}\n    linear = ", text)
        assert "self.morphc.weight(linear" in text
        assert "self.fc1.morphc(fc1)" in text
        assert "This graph runs in place of the module's own forward." in text

    def test_a_matched_region_says_that_it_is_for_reading_only(self):
        text = compiled(Matched()).report.graphs[""]
        assert "captured as matched" in text
        assert f"a branch depends on a traced value at {line_of(Matched.forward, 'if x.shape')}" in text
        assert "for reading only" in text

    def test_a_rewritten_region_whose_forward_runs_says_so(self):
        assert "The module's own forward runs" in compiled(Mlp()).report.graphs[""]

    def test_the_shown_function_computes_what_the_model_does(self):
        model = compiled(Functional()).model.eval()
        namespace: dict[str, Any] = {"torch": torch}
        exec(compiled(Functional()).report.graphs[""], namespace)
        assert same_bits(namespace["forward"](model, rows()), model(rows()))

    def test_slices_keywords_methods_and_operators_read_as_written(self):
        class Reads(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.fc = nn.Linear(8, 8)
                self.parts = nn.ModuleDict({"class": nn.Linear(8, 8), "a": nn.ModuleList([nn.Tanh()])})

            def forward(self, x: Tensor) -> Tensor:
                h = self.parts["a"][0](self.parts["class"](self.fc(x)[..., 1:5:2].repeat(1, 4)))
                return (h - x).clamp(min=0) / 2 + torch.cat([h, -x], dim=-1)[:, :8]

        text = compiled(Reads()).report.graphs[""]
        ast.parse(text)
        for part in ("[..., 1:5:2]", ".clamp(min=0)", "dim=-1", "self.parts['class'](", "self.parts.a[0]("):
            assert part in text, part
