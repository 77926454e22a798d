"""A plan given back is followed without searching; one of another model is refused by its field."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
import torch
from compiler_hosts import HOSTS, Functional, Mlp, Nested, assert_same, rows
from msgspec.structs import replace
from torch import nn

import morphc
from morphc import plantuned
from morphc.errors import PlanError
from morphc.kernels import tuning
from morphc.kernels.spec import TuneConfig
from morphc.passes import capture, find_candidates

ENCODER = nn.TransformerEncoderLayer(8, 2, 6)
FEW = morphc.Config(seeds_per_layer=2, telemetry_every=1, kinds=("linear",))


def plan_of(host: nn.Module, config: morphc.Config = FEW) -> morphc.Plan:
    return morphc.report(morphc.compile(host, (rows(),), config=config)).plan


def through_json(plan: morphc.Plan) -> morphc.Plan:
    return morphc.Plan.from_json(plan.to_json())


@pytest.fixture
def forbid_search(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From its call on nothing may be recorded and nothing searched."""

    def forbidden(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a plan is followed without searching")

    def forbid() -> None:
        monkeypatch.setattr(capture, "record", forbidden)
        monkeypatch.setattr(find_candidates, "_Search", forbidden)

    return forbid


class TestFollowed:
    @pytest.mark.parametrize("name", HOSTS)
    def test_same_sites_and_digest_without_inputs_and_without_searching(self, name, forbid_search):
        host = HOSTS[name]()
        plan = plan_of(host)
        forbid_search()
        with pytest.raises(morphc.errors.PassError, match="without searching"):
            plan_of(host)
        model = morphc.compile(host, plan=through_json(plan))
        assert morphc.report(model).plan == plan
        assert morphc.report(model).plan.digest == plan.digest
        assert list(morphc.seeds(model).sites) == [site.path for site in plan.sites]
        assert [len(site) for site in morphc.seeds(model).sites.values()] == [
            site.seeds for site in plan.sites
        ]

    @pytest.mark.parametrize("name", HOSTS)
    def test_the_followed_model_is_the_host_and_its_sites_see(self, name):
        host = HOSTS[name]()
        first = morphc.compile(host, (rows(),), config=FEW)
        second = morphc.compile(host, plan=morphc.report(first).plan)
        assert_same(host, second, rows(5))
        first.train()(rows(4)), second.eval()
        morphc.seeds(second).reset_telemetry()
        second.train()(rows(4))
        assert (
            morphc.seeds(first).telemetry()["count"].tolist()
            == morphc.seeds(second).telemetry()["count"].tolist()
        )

    def test_with_example_inputs_it_is_verified(self):
        host = Functional()
        model = morphc.compile(host, (rows(),), plan=plan_of(host))
        assert len([n for n in morphc.report(model).verification if "equal bit for bit" in n]) == 4

    def test_without_example_inputs_the_report_says_that_nothing_was_verified(self):
        host = Mlp()
        assert morphc.report(morphc.compile(host, plan=plan_of(host))).verification == (
            "not verified: no example inputs were given",
        )

    def test_another_instance_of_the_same_model_takes_it(self):
        assert_same(host := Mlp(), morphc.compile(host, plan=plan_of(Mlp())), rows())

    def test_its_config_is_taken(self):
        config = morphc.Config(
            seeds_per_layer={"fc1": 3, "*": 2}, rank=5, include=("fc*",), blueprint=("affine",)
        )
        host = Mlp()
        model = morphc.compile(host, plan=through_json(plan_of(host, config)))
        assert model.morphc.store.config == config
        assert morphc.compile(host, config=config, plan=plan_of(host, config)) is not None

    def test_a_plan_is_the_same_from_one_compile_to_the_next(self):
        host = Nested()
        assert plan_of(host).to_json() == plan_of(host).to_json()

    def test_one_of_another_version_with_the_same_schema_is_followed_and_said(self):
        host = Mlp()
        plan = through_json(replace(plan_of(host), morphc_version="99.1.0"))
        report = morphc.report(morphc.compile(host, plan=plan))
        assert report.plan == plan
        assert f"the plan was made by morphc 99.1.0, this is {morphc.__version__}" in report.verification

    def test_a_demoted_region_stays_demoted(self):
        host = Functional()
        plan = plan_of(host)
        regions = tuple(replace(r, level="matched", reason="it was wrong", runs=False) for r in plan.regions)
        model = morphc.compile(host, plan=replace(plan, regions=regions))
        assert_same(host, model, rows())
        assert morphc.report(model).plan.regions == regions


def edit_site(**changes: Any) -> Callable[[morphc.Plan], morphc.Plan]:
    return lambda plan: replace(plan, sites=(replace(plan.sites[0], **changes), *plan.sites[1:]))


EDITS = {
    "schema_version": lambda p: replace(p, schema_version=99),
    "model_class": lambda p: replace(p, model_class="Other"),
    "model_digest": lambda p: replace(p, model_digest="0" * 64),
    "config": lambda p: replace(p, config={**p.config, "rank": 0}),
    "schema_version of the config": lambda p: replace(p, config={**p.config, "schema_version": 7}),
    "config with an unknown field": lambda p: replace(p, config={**p.config, "flavour": 1}),
    "path": edit_site(path="fc9"),
    "path listed twice": lambda p: replace(p, sites=(p.sites[0], *p.sites)),
    "features": edit_site(features=15),
    "seeds": edit_site(seeds=17),
    "seeds of none": edit_site(seeds=0),
    "slots": edit_site(slots=-1),
    "dtype": edit_site(dtype="float33"),
    "layer_kind": edit_site(layer_kind="liner"),
    "region": edit_site(region="somewhere"),
    "owner": edit_site(owner="somewhere.else"),
    "parameter": edit_site(parameter="bias"),
    "epilogue": edit_site(epilogue="rleu"),
    "output_index": edit_site(output_index=0),
    "output_index of nothing": edit_site(output_index=3),
    "tap_features": edit_site(tap_features=9),
    "tap_features below zero": edit_site(tap_features=-8),
}


class TestRefused:
    @pytest.mark.parametrize("name", EDITS)
    def test_an_edited_field_is_named(self, name):
        host = Mlp()
        with pytest.raises(morphc.errors.MorphcError) as caught:
            morphc.compile(host, plan=EDITS[name](plan_of(host)))
        assert isinstance(caught.value, PlanError) or name == "epilogue"
        assert name.split(" ")[0] in str(caught.value) or (
            name == "epilogue" and "'rleu'" in str(caught.value)
        )

    def test_text_of_another_schema_or_with_an_unknown_field_says_who_wrote_it(self):
        plan = plan_of(Mlp())
        text = (
            replace(plan, schema_version=99, morphc_version="99.1.0").to_json().replace(b"{", b'{"new":1,', 1)
        )
        with pytest.raises(PlanError, match=r"schema_version is 99, .* reads 1: .*made it \(99\.1\.0\)"):
            morphc.Plan.from_json(text)
        text = replace(plan, morphc_version="0.9.0").to_json().replace(b"{", b'{"new":1,', 1)
        with pytest.raises(PlanError, match=r"no plan of morphc: .*`new`.*made by morphc 0\.9\.0"):
            morphc.Plan.from_json(text)

    @pytest.mark.parametrize(
        ("host", "x", "site", "changes", "words"),
        [
            (nn.LSTM(8, 6), (5, 8), "", {"output_index": None}, "output_index=None, the output of a LSTM has it"),
            (nn.LSTM(8, 6), (5, 8), "", {"features": 7}, "features=7, this layer has 6"),
            (nn.LSTM(8, 6), (5, 8), "", {"tap_features": 6}, "tap_features=6, the input of this layer has 8"),
            (ENCODER, (5, 2, 8), "self_attn.out_proj", {"output_index": None}, "of a MultiheadAttention has it"),
            (ENCODER, (5, 2, 8), "self_attn.in_proj_weight", {"tap_features": 24}, "input of this layer has 8"),
            (ENCODER, (5, 2, 8), "self_attn.in_proj_weight", {"output_index": 0}, "a functional layer's"),
            (Functional(), (3, 8), "weight", {"tap_features": -1}, "tap_features=-1"),
        ],
    )  # fmt: skip
    def test_what_a_layer_takes_and_returns_is_checked(self, host, x, site, changes, words):
        config = replace(FEW, kinds=("linear", "rnn"))
        plan = morphc.report(morphc.compile(host, (torch.randn(x),), config=config, verify=False)).plan
        assert morphc.compile(host, plan=plan) is not None
        edited = tuple(replace(s, **changes) if s.path == site else s for s in plan.sites)
        assert edited != plan.sites
        with pytest.raises(PlanError, match=words):
            morphc.compile(host, plan=replace(plan, sites=edited))

    def test_one_of_another_class_names_both(self):
        with pytest.raises(PlanError, match="model_class is 'Mlp', this model is a 'Functional'"):
            morphc.compile(Functional(), plan=plan_of(Mlp()))

    def test_one_of_another_width_names_the_site_and_both_widths(self):
        host = Mlp()
        plan = plan_of(host)
        host.fc1 = nn.Linear(8, 20)
        with pytest.raises(
            PlanError, match=r"'fc1' does not fit .*: features=16, this model's out_features=20"
        ):
            morphc.compile(host, plan=plan)

    @pytest.mark.parametrize("change", ["dtype", "another layer", "input width"])
    def test_one_of_a_changed_model_names_what_differs(self, change):
        host = Mlp()
        plan = plan_of(host)
        if change == "dtype":
            host.double()
        elif change == "another layer":
            host.extra = nn.Linear(2, 2)
        else:
            host.fc1 = nn.Linear(9, 16)
        words = "input of this layer has 9" if change == "input width" else "model_digest differs"
        with pytest.raises(PlanError, match=words):
            morphc.compile(host, plan=plan)

    def test_a_config_that_contradicts_it_names_the_option(self):
        host = Mlp()
        with pytest.raises(PlanError, match="made with rank=16, the config given has 4"):
            morphc.compile(
                host, config=morphc.Config(**{**msgspec.structs.asdict(FEW), "rank": 4}), plan=plan_of(host)
            )

    def test_a_refused_plan_leaves_the_host_alone(self):
        host = Mlp()
        state = {key: value.clone() for key, value in host.state_dict().items()}
        with pytest.raises(PlanError):
            morphc.compile(host, plan=replace(plan_of(host), model_class="Other"))
        assert list(host.state_dict()) == list(state)
        assert all(torch.equal(state[key], value) for key, value in host.state_dict().items())
        assert "forward" not in vars(host.fc1)


class TestTunedConfigs:
    """A config holds for the kernel that was timed, not for one that other templates make."""

    @pytest.fixture(autouse=True)
    def nothing_known(self) -> Iterator[None]:
        tuning.forget()
        yield
        tuning.forget()

    def tuned_plan(self) -> tuple[nn.Module, morphc.Plan, str]:
        host = Mlp()
        plan = plan_of(host)
        spec = next(spec for spec in plan.specs if spec.kind == "forward")
        name = tuning.key(spec, 4)
        tuning.adopt({name: TuneConfig(16, 16, 2, 1)})
        plan = plantuned.with_tuned(plan)
        assert list(plan.tuned) == [name]
        tuning.forget()
        return host, plan, name

    def test_those_of_the_same_code_are_used(self) -> None:
        host, plan, name = self.tuned_plan()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            morphc.compile(host, plan=through_json(plan))
        assert tuning.known() == {name: TuneConfig(16, 16, 2, 1)}

    def test_those_of_another_template_are_named_and_left(self) -> None:
        host, plan, _ = self.tuned_plan()
        old = replace(plan, made_from=dict.fromkeys(plan.made_from, "0123456789ab"))
        with pytest.warns(
            morphc.errors.MorphcWarning, match=r"forward_.*other templates .*0123456789ab.*not used"
        ):
            model = morphc.compile(host, plan=through_json(old))
        assert tuning.known() == {}
        assert morphc.report(model).warnings

    def test_those_that_do_not_say_what_they_are_of_are_left(self) -> None:
        host, plan, _ = self.tuned_plan()
        with pytest.warns(morphc.errors.MorphcWarning, match="made from \\?"):
            morphc.compile(host, plan=replace(plan, made_from={}))
        assert tuning.known() == {}
