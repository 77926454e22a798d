"""Which layers get a site, under which name, and why each of the others does not."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compiler_hosts import (
    HOSTS,
    Branchy,
    Mlp,
    Nested,
    assert_same,
    compiled,
    line_of,
    misses_of,
    rows,
    sites_of,
)
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import morphc
from morphc.compiler import Compiled
from morphc.config import KINDS, Config
from morphc.errors import ConfigError, MorphcWarning
from morphc.webpage import render


def with_kinds(host: nn.Module, *args: Any, kinds: tuple[str, ...] = KINDS, **options: Any) -> Compiled:
    return compiled(host, *args, config=Config(seeds_per_layer=2, kinds=kinds, **options))


def param(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) / 3)


class Convs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv1d(2, 4, 3)
        self.two = nn.Conv2d(2, 4, 3)
        self.three = nn.Conv3d(2, 4, 3)
        self.back = nn.ConvTranspose2d(4, 6, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        one = self.one(x[:, :, 0, 0])
        return one, self.back(self.two(x[:, :, 0])), self.three(x)


class Text(nn.Module):
    """One layer of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.norm = nn.LayerNorm(8)
        self.rms = nn.RMSNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.rnn = nn.LSTM(8, 6, batch_first=True, bidirectional=True)
        self.cell = nn.GRUCell(12, 10)
        self.head = nn.Linear(10, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.rms(self.norm(self.embed(ids)))
        x, _ = self.attention(x, x, x)
        x, _ = self.rnn(x)
        return self.head(self.cell(x[:, -1]))


class TestByType:
    def test_convolutions_are_watched_along_their_channels(self):
        sites = sites_of(compiled(Convs(), torch.randn(2, 2, 5, 5, 5)))
        assert {p: (s.layer_kind, s.features, s.feature_axis) for p, s in sites.items()} == {
            "one": ("conv", 4, -2),
            "two": ("conv", 4, -3),
            "three": ("conv", 4, -4),
            "back": ("conv", 6, -3),
        }

    def test_linear_and_conv_are_the_default(self):
        result = compiled(Text(), torch.randint(11, (3, 5)))
        assert {s.layer_kind for s in sites_of(result).values()} == {"linear"}
        missed = misses_of(result)
        for path, kind in {
            "embed": "embedding",
            "norm": "norm",
            "rms": "norm",
            "rnn": "rnn",
            "cell": "rnn",
        }.items():
            assert missed[path].reason == f"its kind {kind!r} is not in kinds=['linear', 'conv']"

    def test_every_kind_is_watched_when_asked_for(self):
        host = Text()
        result = with_kinds(host, torch.randint(11, (3, 5)))
        found = {p: (s.layer_kind, s.features, s.output_index) for p, s in sites_of(result).items()}
        expected = {
            "embed": ("embedding", 8, None),
            "norm": ("norm", 8, None),
            "rms": ("norm", 8, None),
            "attention.out_proj": ("linear", 8, 0),
            "rnn": ("rnn", 12, 0),
            "cell": ("rnn", 10, None),
            "head": ("linear", 3, None),
        }
        assert found.items() >= expected.items()
        assert_same(host, result.model, torch.randint(11, (2, 4)))

    def test_attention_alone_is_watched_at_its_output(self):
        sites = sites_of(with_kinds(Text(), torch.randint(11, (3, 5)), kinds=("attention",)))
        assert list(sites) == ["attention"]
        assert (sites["attention"].features, sites["attention"].output_index) == (8, 0)

    def test_channel_norms_are_watched_along_their_channels(self):
        host = nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4, affine=True)
        )
        result = with_kinds(host, torch.randn(2, 2, 5, 5), kinds=("norm",))
        assert {p: (s.features, s.feature_axis) for p, s in sites_of(result).items()} == {
            "1": (4, 1),
            "2": (4, 1),
            "3": (4, -3),  # an instance norm also takes an input without its batch
        }

    def test_a_frozen_host_gets_all_its_sites(self):
        host = Mlp().requires_grad_(False)
        result = compiled(host)
        assert set(sites_of(result)) == {"fc1", "fc2"}
        assert not any(p.requires_grad for p in result.model.parameters())
        assert all("equal bit for bit" in note for note in result.report.verification)

    @pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
    def test_a_dynamically_quantized_linear_is_watched(self):
        if "qnnpack" not in torch.backends.quantized.supported_engines and "fbgemm" not in (
            torch.backends.quantized.supported_engines
        ):
            pytest.skip("this build of torch has no engine for quantized layers")
        host = torch.ao.quantization.quantize_dynamic(
            nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval(), {nn.Linear}
        )
        result = compiled(host)
        assert {p: (s.quantized, s.features) for p, s in sites_of(result).items()} == {
            "0": (True, 16),
            "2": (True, 4),
        }
        assert torch.equal(result.model(rows()), host(rows()))

    def test_a_parametrized_layer_is_watched_and_its_buffers_are_left_alone(self):
        host = nn.Sequential(
            parametrizations.spectral_norm(nn.Linear(8, 8)),
            parametrizations.weight_norm(nn.Linear(8, 8)),
            nn.Unflatten(1, (2, 4)),
            parametrizations.spectral_norm(nn.Conv1d(2, 4, 3)),
        ).train()
        before = {name: b.clone() for name, b in host.named_buffers()}
        result = compiled(host)
        assert {"0", "1", "3"} <= set(sites_of(result))
        assert all(torch.equal(before[name], b) for name, b in host.named_buffers())

    def test_an_integer_output_is_no_site(self):
        class Counts(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x).long()

        result = compiled(nn.Sequential(nn.Linear(8, 8), Counts(8, 4)))
        assert set(sites_of(result)) == {"0"}
        assert misses_of(result)["1"].reason == "its output is torch.int64, not floating point"

    def test_a_layer_whose_output_is_not_what_its_type_says(self):
        class Doubles(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                y = super().forward(x)
                return torch.cat([y, y], -1)

        miss = misses_of(compiled(nn.Sequential(nn.Linear(8, 8), Doubles(8, 4))))["1"]
        assert miss.reason == "its output is [3, 8] where axis -1 was expected to be 4"
        assert miss.candidate


class LookAlike(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = param(8, 6), param(6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, 8), self.weight).view(*x.shape[:-1], 6)


class HalfLookAlike(LookAlike):
    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(x @ self.weight, -1)


class Functionals(nn.Module):
    """Parameterised calls in all their forms."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = param(6, 8)
        self.right = param(6, 7)
        self.left = param(5, 7)
        self.ein = param(7, 4)
        self.kernel = param(4, 1, 3, 3)
        self.emb = nn.Embedding(9, 7)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        a = F.linear(x, self.linear)
        b = torch.relu(a @ self.right)
        c = self.left @ b.T
        d = torch.einsum("bi,ij->bj", b, self.ein)
        e = F.conv2d(x.view(-1, 1, 2, 4).repeat(1, 1, 2, 1), self.kernel, padding=1)
        head = F.linear(b, self.emb.weight)
        return c, d, e, head


class TestByComputation:
    def test_a_module_whose_forward_is_one_matmul_is_a_layer(self):
        host = nn.Sequential(LookAlike(), nn.Linear(6, 2))
        result = compiled(host)
        assert {p: (s.layer_class, s.features, s.parameter) for p, s in sites_of(result).items()} == {
            "0": ("LookAlike", 6, None),
            "1": ("Linear", 2, None),
        }
        assert_same(host, result.model, torch.randn(2, 3, 8))

    def test_a_matmul_that_goes_on_is_a_functional_layer(self):
        result = compiled(nn.Sequential(HalfLookAlike(), nn.Linear(6, 2)))
        assert {p: s.parameter for p, s in sites_of(result).items()} == {"0.weight": "weight", "1": None}
        assert misses_of(result)["0"].reason == "its forward is not one weighted matmul or convolution"

    def test_functional_layers_are_named_by_their_parameters(self):
        host = Functionals()
        result = compiled(host)
        found = {p: (s.layer_kind, s.features, s.feature_axis) for p, s in sites_of(result).items()}
        assert found == {
            "linear": ("linear", 6, -1),
            "right": ("linear", 7, -1),
            "left": ("linear", 5, -2),
            "ein": ("linear", 4, -1),
            "kernel": ("conv", 4, -3),
            "emb.weight": ("linear", 9, -1),
        }
        assert sites_of(result)["right"].source == line_of(Functionals.forward, "a @ self.right")

    def test_functional_layers_see_their_values(self):
        host = Functionals()
        model = compiled(host, config=Config(seeds_per_layer=1, telemetry_every=1)).model.train()
        model(rows(4))
        seeds = morphc.seeds(model)
        counts = dict(zip(seeds.sites, seeds.telemetry()["count"].tolist(), strict=True))
        assert counts == {
            "linear": 24,
            "right": 28,
            "left": 20,
            "ein": 16,
            "kernel": 4 * 4 * 16,
            "emb.weight": 36,
        }

    def test_a_parameter_used_twice_alike_is_one_site(self):
        class Twice(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight = param(8, 8)

            def forward(self, x: Tensor) -> Tensor:
                return torch.tanh(torch.tanh(x @ self.weight) @ self.weight)

        host = Twice()
        result = compiled(host)
        assert list(sites_of(result)) == ["weight"]
        assert_same(host, result.model, rows())

    def test_a_parameter_used_twice_with_two_widths_keeps_the_first_and_says_so(self):
        class There(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight = param(8, 5)

            def forward(self, x: Tensor) -> Tensor:
                return torch.tanh(x @ self.weight) @ self.weight.T

        host = There()
        result = compiled(host)
        assert [(s.path, s.features) for s in sites_of(result).values()] == [("weight", 5)]
        (told,) = [m for m in misses_of(result).values() if m.path.startswith("weight (at ")]
        assert told.reason == "used twice, with 5 and 8 output features; the first is watched"
        assert_same(host, result.model, rows())

    def test_a_linear_called_twice_is_one_site(self):
        class Twice(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.fc = nn.Linear(8, 8)
                self.alias = self.fc

            def forward(self, x: Tensor) -> Tensor:
                return self.alias(self.fc(x))

        sites = sites_of(compiled(Twice()))
        assert [(path, site.calls) for path, site in sites.items()] == [("fc", 2)]

    def test_a_bias_alone_is_no_layer(self):
        class Adds(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.bias = param(8)

            def forward(self, x: Tensor) -> Tensor:
                return x + self.bias

        assert sites_of(compiled(Adds())) == {}

    def test_an_einsum_whose_features_are_not_last_says_so(self):
        class Turns(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight = param(8, 5)

            def forward(self, x: Tensor) -> Tensor:
                return torch.relu(torch.einsum("bi,ij->jb", x, self.weight))

        result = compiled(Turns())
        assert sites_of(result) == {}
        miss = misses_of(result)["weight"]
        assert miss.reason == "the feature axis of this einsum isn't its last one"
        assert miss.source == line_of(Turns.forward, "einsum")

    def test_a_parameter_named_like_something_of_morphcs_own(self):
        class Clashes(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.state, self.path, self.mode = param(8, 8), param(8, 8), param(8, 8)

            def forward(self, x: Tensor) -> Tensor:
                return torch.relu(torch.relu(torch.relu(x @ self.state) @ self.path) @ self.mode)

        host = nn.Sequential(Clashes(), nn.Linear(8, 2))
        result = compiled(host)
        assert set(sites_of(result)) == {"0.state", "0.path", "0.mode", "1"}
        assert_same(host, result.model, rows())


class TestPeft:
    @pytest.fixture
    def host(self) -> nn.Module:
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(r=2, target_modules=["fc1"], lora_dropout=0.0, init_lora_weights=False)
        return peft.get_peft_model(Mlp(), config)

    def test_base_and_adapter_layers_are_watched(self, host):
        paths = {path.removeprefix("base_model.model.") for path in sites_of(compiled(host))}
        assert paths == {"fc1.base_layer", "fc1.lora_A.default", "fc1.lora_B.default", "fc2"}

    def test_the_compiled_model_is_still_a_peft_model(self, host):
        model = compiled(host).model
        assert type(model) is type(host)
        assert_same(host, model, rows())
        with model.disable_adapter(), host.disable_adapter():
            assert torch.equal(model.eval()(rows()), host.eval()(rows()))


class TestChoosing:
    def test_include_takes_only_what_matches(self):
        result = compiled(Mlp(), config=Config(seeds_per_layer=2, include=("fc1",)))
        assert set(sites_of(result)) == {"fc1"}
        assert misses_of(result)["fc2"].reason == "not matched by include=['fc1']"

    def test_exclude_names_its_pattern(self):
        result = compiled(Mlp(), config=Config(seeds_per_layer=2, exclude=("zzz", "*2")))
        assert set(sites_of(result)) == {"fc1"}
        miss = misses_of(result)["fc2"]
        assert (miss.reason, miss.candidate, miss.executed) == ("excluded by the pattern '*2'", True, True)

    def test_patterns_are_case_sensitive_fnmatch_patterns(self):
        def chosen(*patterns: str) -> set[str]:
            return set(sites_of(compiled(Mlp(), config=Config(seeds_per_layer=2, include=patterns))))

        assert chosen("fc?") == {"fc1", "fc2"}
        assert chosen("fc[!1]") == {"fc2"}
        assert chosen("f*1", "f*2") == {"fc1", "fc2"}
        with pytest.raises(ConfigError, match="matches none of the 2 candidate layers"):
            chosen("FC1")

    def test_an_include_that_matches_nothing_shows_near_names(self):
        with pytest.raises(ConfigError, match=r"include=\['fc9'\] matches none .*near: 'fc"):
            compiled(Mlp(), config=Config(include=("fc9",)))

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (
                {"exclude": ("fc9",)},
                "exclude pattern 'fc9' matches none of the 2 candidate layers; near: 'fc",
            ),
            ({"include": ("fc1", "FC2")}, "include pattern 'FC2' matches none of the 2 candidate layers"),
            ({"exclude": ("drop",)}, "exclude pattern 'drop' matches none"),
        ],
    )
    def test_a_pattern_that_matches_nothing_is_a_warning(self, options, words):
        report = compiled(Mlp(), config=Config(seeds_per_layer=2, **options)).report
        (warning,) = report.warnings
        assert words in warning
        assert f"warning: {warning}" in str(report)
        assert json.loads(report.to_json())["warnings"] == [warning]
        assert words.split("'")[1] in render(report)
        with pytest.warns(MorphcWarning, match=re.escape(words)) as caught:
            morphc.compile(Mlp(), rows(), config=Config(seeds_per_layer=2, **options))
        assert caught[0].filename == __file__

    def test_a_pattern_that_names_a_container_is_told_what_would_match(self):
        report = compiled(Nested(), config=Config(seeds_per_layer=2, exclude=("first",))).report
        assert report.warnings[0].endswith("'first.*' matches 2")

    def test_patterns_that_match_what_is_left_out_for_another_reason_are_no_warning(self):
        host = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
        assert compiled(host, config=Config(seeds_per_layer=2, exclude=("1",))).report.warnings == ()

    def test_options_of_the_pass_add_to_the_config(self):
        result = compiled(Mlp(), passes="find-candidates{exclude=fc1}")
        assert set(sites_of(result)) == {"fc2"}

    def test_more_seeds_than_any_site_has_features_is_an_error(self):
        with pytest.raises(
            ConfigError, match=r"seeds_per_layer=17 is more than the 16 features of 'fc1' \(.*:\d+\)"
        ):
            compiled(Mlp(), seeds=17)

    def test_a_ceiling_above_a_narrow_layer_is_noted(self):
        site = sites_of(compiled(Mlp(), seeds=10))["fc2"]
        assert (site.seeds, site.note) == (4, "10 seeds asked for, 4 features: one seed each")


class TestAccount:
    @pytest.mark.parametrize("kinds", [("linear", "conv"), KINDS], ids=["default", "all"])
    @pytest.mark.parametrize("name", [*HOSTS, "text", "functionals", "convs"])
    def test_every_module_has_a_site_or_a_reason(self, name, kinds):
        extra = {
            "text": (Text, torch.randint(11, (3, 5))),
            "functionals": (Functionals, rows()),
            "convs": (Convs, torch.randn(2, 2, 5, 5, 5)),
        }
        cls, x = extra.get(name) or (HOSTS[name], rows())
        host = cls()
        result = with_kinds(host, x, kinds=kinds)
        sites, missed = sites_of(result), misses_of(result)
        assert not set(sites) & set(missed)
        for path, _ in host.named_modules():
            assert path in sites or missed[path].reason.strip(), path
        assert all(miss.reason.strip() for miss in missed.values())

    def test_unreached_layers_say_so(self):
        spare = sites_of(compiled(Branchy()))["spare"]
        assert (spare.executed, spare.source) == (False, "")

    def test_shares_add_up(self):
        sites = sites_of(compiled(Mlp())).values()
        assert sum(site.parameter_share for site in sites) == pytest.approx(1.0)
        assert sum(site.flop_share for site in sites) == pytest.approx(1.0)

    def test_a_tied_weight_is_marked(self):
        host = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
        host[2].weight = host[0].weight
        assert {p: s.shared_weight for p, s in sites_of(compiled(host)).items()} == {
            "0": True,
            "1": False,
            "2": True,
        }

    def test_torchscript_children_say_why(self):
        class Doubles(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.fc = nn.Linear(8, 8)

            def forward(self, x: Tensor) -> Tensor:
                return self.fc(x) * 2

        result = compiled(nn.Sequential(torch.jit.trace(Doubles(), rows()), nn.Linear(8, 2)))
        assert set(sites_of(result)) == {"1"}
        assert "TorchScript" in misses_of(result)["0"].reason
