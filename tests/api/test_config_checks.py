"""`Config` and the arguments of `compile` are checked where they are given, each with one clear message."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import morphc
from morphc import Config, Lifecycle
from morphc.errors import ConfigError, PlanError, SeedError, UnsupportedHostError

BAD = {
    "an unknown option": (
        {"telemetry_evry": 3},
        r"unknown option 'telemetry_evry'. Did you mean 'telemetry_every'\?",
    ),
    "half a seed": ({"seeds_per_layer": 2.5}, "seeds_per_layer=2.5"),
    "a flag for a count": ({"seeds_per_layer": True}, "seeds_per_layer=True"),
    "nothing included": ({"include": ()}, r"include=\(\) leaves every layer out"),
    "a text for patterns": ({"include": "fc1"}, r"include='fc1' is one text; write include=\('fc1',\)"),
    "a text for kinds": ({"kinds": "linear"}, r"write kinds=\('linear',\)"),
    "a text for a number": ({"near_zero": "a"}, "near_zero='a'"),
    "a text for a flag": ({"gradient_telemetry": "yes"}, "gradient_telemetry='yes'"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_option_is_refused_when_the_config_is_made(case: str) -> None:
    options, message = BAD[case]
    with pytest.raises(ConfigError, match=message):
        Config(**options)


def test_a_good_config_survives_json() -> None:
    config = Config(seeds_per_layer={"h.*": 4}, slots=3, blueprint=("affine", "lowrank"), max_overhead=1)
    assert Config.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"config": {"rank": 4}}, ConfigError, r"config is a dict: give morphc.Config\(...\)"),
        ({"plan": "plan.json"}, PlanError, "plan is a str: read it with morphc.Plan.from_json"),
        ({"verify": "yes"}, ConfigError, "verify='yes' is neither"),
    ],
)
def test_arguments_of_another_type_are_refused(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        morphc.compile(nn.Linear(3, 3), (torch.randn(2, 3),), **arguments)


def test_the_reserved_name_is_not_taken_for_a_site() -> None:
    host = nn.ModuleDict({"morphc": nn.Linear(3, 3)})
    with pytest.raises(
        UnsupportedHostError, match="named 'morphc', the name that sites live under: rename it"
    ):
        morphc.compile(host, (torch.randn(2, 3),))


def test_slots_that_no_seed_can_use_are_not_made_and_the_report_says_so() -> None:
    host, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)), torch.randn(2, 8)
    model = morphc.compile(host, (x,), config=Config(seeds_per_layer=4, slots=1000))
    sites = morphc.seeds(model).sites
    assert [bank.slots for site in sites.values() for bank in site.slots.values()] == [64, 32]
    assert "1: 4 seeds asked for, 2 features: one seed each; 1000 slots asked for, 32 are of use" in str(
        morphc.report(model)
    )


@pytest.mark.parametrize("options", [{}, {"lr": float("nan")}, {"lr": -1.0}])
def test_a_bad_learning_rate_moves_nothing(options: dict[str, float]) -> None:
    host, x = nn.Linear(3, 3), torch.randn(2, 3)
    model = morphc.compile(host, (x,), config=Config(seeds_per_layer=3, slots=1))
    seeds = morphc.seeds(model)
    seeds[""].assign([0], Lifecycle.FINE_TUNING)
    model(x).sum().backward()
    with pytest.raises(SeedError, match="lr="):
        seeds.step_optimizer(**options)
    assert torch.equal(model(x), host(x))


def test_affine_seeds_of_an_in_projection_fold_into_it() -> None:
    torch.manual_seed(0)
    host, x = nn.TransformerEncoderLayer(12, 3, 20, batch_first=True, dropout=0.0), torch.randn(2, 5, 12)
    model = morphc.compile(host, (x,), config=Config(seeds_per_layer=6, slots=3, blueprint="affine"))
    seeds = morphc.seeds(model)
    seeds["self_attn.in_proj_weight"].assign([0, 3], Lifecycle.FINE_TUNING)
    model(x).square().sum().backward()
    seeds.step_optimizer(lr=0.1)
    grown = model.eval()(x)
    assert not torch.allclose(grown, host.eval()(x))
    torch.testing.assert_close(morphc.fold(model).eval()(x), grown, rtol=1e-5, atol=1e-5)
