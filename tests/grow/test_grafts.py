"""Graft strategies: alpha rises, waits, goes on without a jump, and is what the docs show."""

from __future__ import annotations

import importlib.util
import math
from itertools import pairwise
from pathlib import Path

import pytest

from morphc import Config
from morphc.errors import UnknownNameError
from morphc.runtime import grafts
from morphc.runtime.grafts import STRATEGIES, Signs

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def curves():
    spec = importlib.util.spec_from_file_location("graft_curves", ROOT / "benchmarks" / "graft_curves.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_of_the_docs_is_what_the_code_does(curves):
    page = (ROOT / "docs" / "grafts.md").read_text(encoding="utf-8")
    assert curves.table() in page
    assert all(f"| `{name}` |" in page for name in STRATEGIES)


@pytest.mark.parametrize("curve", ["linear", "cosine", "sigmoid"])
def test_alpha_never_falls_and_never_jumps(curves, curve):
    (free,) = curves.grafts([("fixed_ramp", curve)])
    steepest = max(b - a for a, b in pairwise(free))
    for alphas in curves.grafts([(name, curve) for name in STRATEGIES]):
        assert alphas[0] == 0.0
        assert alphas[-1] == 1.0
        assert all(0 <= b - a <= steepest + 1e-6 for a, b in pairwise(alphas))


def test_a_wait_of_n_ticks_delays_the_rest_by_n(curves):
    free, waited = curves.grafts([("fixed_ramp", "cosine"), ("drift_controlled", "cosine")])
    first, last = curves.TROUBLE["drift 0.2"]
    assert waited[: first + 1] == free[: first + 1]
    assert waited[first : last + 1] == [free[first]] * (last - first + 1)
    assert waited[last:] == free[first : first + len(waited) - last]


CONFIG = Config()


@pytest.mark.parametrize(
    ("name", "signs", "waits"),
    [
        ("performance_linked", {"loss": 1.02}, False),
        ("performance_linked", {"loss": 1.021}, True),
        ("drift_controlled", {"drift": 0.12}, False),
        ("drift_controlled", {"drift": 0.121}, True),
        ("grad_norm_gated", {"gradient": 0.05, "alpha": 0.5}, False),
        ("grad_norm_gated", {"gradient": 0.049, "alpha": 0.5}, True),
        ("grad_norm_gated", {"gradient": 0.51, "alpha": 0.5}, True),
        ("grad_norm_gated", {"gradient": 9.0, "alpha": 0.0}, False),
        ("momentum", {"trend": 0.0}, False),
        ("momentum", {"trend": 1e-6}, True),
        ("stability", {"stability": 0.8}, False),
        ("stability", {"stability": 0.79}, True),
        ("stability", {}, True),
        ("adaptive", {"drift": 0.13}, True),
        ("adaptive", {"drift": 0.07, "loss": 2.0, "trend": 1.0}, False),
        ("adaptive", {"stability": 0.5, "trend": 0.1}, True),
        ("adaptive", {"loss": 1.1}, True),
    ],
)
def test_each_strategy_waits_at_its_bound(name, signs, waits):
    assert grafts.waits(grafts.code(name, "linear"), Signs(**signs), CONFIG) is waits


@pytest.mark.parametrize("name", [name for name in STRATEGIES if name != "stability"])
def test_what_was_not_measured_holds_nothing_up(name):
    assert math.isnan(Signs().loss)
    assert not grafts.waits(grafts.code(name, "linear"), Signs(alpha=0.5), CONFIG)


def test_the_code_of_a_graft_tells_its_name_and_an_unknown_one_is_refused():
    for name in STRATEGIES:
        assert grafts.name_of(grafts.code(name, "sigmoid")) == name
    with pytest.raises(UnknownNameError, match="adaptive"):
        grafts.code("adaptve", "linear")
