"""The gates: the docs' tables are the data, and each refusal names gate, value and bound."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

import morphc
from morphc import Config, Lifecycle
from morphc.errors import ConfigError, SeedError, UnknownNameError
from morphc.lifecycle import MINIMUM_TICKS, TABLE
from morphc.runtime.gates import ANY_OF, GATES, ONWARD, bound_of

L = Lifecycle
PAGE = Path(__file__).parents[2] / "docs" / "lifecycle.md"


def rows(heading):
    """The cells of the table under a header row that begins so."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(heading)) + 2
    found = []
    while lines[start].startswith("|"):
        found.append([cell.strip() for cell in lines[start].strip("|").split("|")])
        start += 1
    return found


def test_the_docs_table_of_states_is_the_data():
    expected = [
        [
            str(int(state)),
            state.name,
            row.forward,
            row.trains,
            str(MINIMUM_TICKS.get(state, 0)),
            ", ".join(target.name for target in row.leaves_to),
        ]
        for state, row in TABLE.items()
    ]
    assert rows("| n | state") == expected


def test_the_docs_table_of_gates_is_the_data():
    config = Config()
    expected = []
    for gate in GATES:
        value = f"{bound_of(gate, config):g}"
        bound = f"`{gate.bound}` ({value})" if isinstance(gate.bound, str) else value
        move = f"{gate.source.name} → {gate.target.name}"
        expected.append([move, f"`{gate.metric}`", gate.sign, bound, gate.isolation or "any"])
    assert rows("| move | metric") == expected


def test_every_gate_and_every_automatic_move_is_a_move_of_the_table():
    assert all(gate.target in TABLE[gate.source].leaves_to for gate in GATES)
    assert all(target in TABLE[source].leaves_to for source, targets in ONWARD.items() for target in targets)
    assert {(gate.source, gate.target) for gate in GATES} >= ANY_OF


def site(**options):
    torch.manual_seed(0)
    chosen = {"seeds_per_layer": 4, "slots": 2, "rank": 2, "minimum_ticks": (0, 0, 0, 0, 0), **options}
    model = morphc.compile(nn.Sequential(nn.Linear(4, 8)), (torch.zeros(2, 4),), config=Config(**chosen))
    return morphc.seeds(model), morphc.seeds(model)["0"]


PASSING = {
    "isolated_improvement": 0.005,
    "finite_gradients": 0.9,
    "contribution": 0.01,
    "stability": 0.95,
    "improvement": 0.01,
    "alpha": 1.0,
}


@pytest.mark.parametrize(
    ("source", "target", "metric", "bad", "bound"),
    [
        (L.TRAINING, L.GRAFTING, "isolated_improvement", 0.0049, 0.005),
        (L.TRAINING, L.GRAFTING, "finite_gradients", 0.89, 0.9),
        (L.GRAFTING, L.STABILIZATION, "alpha", 0.99, 1.0),
        (L.EVALUATING, L.FINE_TUNING, "contribution", 0.0, 0.0),
        (L.EVALUATING, L.FINE_TUNING, "stability", 0.79, 0.8),
        (L.FINE_TUNING, L.FOSSILIZED, "improvement", 0.009, 0.01),
        (L.FINE_TUNING, L.FOSSILIZED, "stability", 0.94, 0.95),
    ],
)
@pytest.mark.parametrize("measured", ["bad", "nan", "missing"])
def test_a_gate_refuses_naming_metric_value_and_bound(source, target, metric, bad, bound, measured):
    _, handle = site()
    handle.assign([0], source, alpha=0.5 if source is L.GRAFTING else None)
    metrics = {**PASSING, metric: bad if measured == "bad" else math.nan}
    if measured == "missing" and metric != "alpha":
        del metrics[metric]
    (refused,) = handle.advance([0], to=target, metrics=metrics)
    assert not refused
    assert (refused.gate, refused.bound) == (metric, bound)
    if measured == "bad":
        assert refused.value == bad
        assert f"{metric}: {bad:g}, must be" in refused.reason
    elif metric != "alpha":
        asked = measured == "nan" and metric in ("contribution", "improvement")
        assert ("no finite number" if asked else "not measured") in refused.reason
    assert handle.lifecycle[0] == source
    (done,) = handle.advance([0], to=target, metrics=PASSING)
    assert done
    assert handle.lifecycle[0] == target


@pytest.mark.parametrize("metrics", [{"contribution": -0.06}, {"error_rate": 0.11}, {"errors": 6.0}])
def test_one_reason_is_enough_to_cull(metrics):
    _, handle = site()
    handle.assign([0, 1], L.EVALUATING)
    assert not handle.advance([0], to=L.CULLED, metrics={"contribution": -0.05, "error_rate": 0.1})[0]
    assert handle.advance([1], to=L.CULLED, metrics=metrics)[0]


def test_minimum_ticks_are_waited_for_but_not_by_a_rollback():
    seeds, handle = site(minimum_ticks=(3, 0, 0, 0, 0))
    handle.assign([0, 1], L.TRAINING)
    seeds.tick()
    (refused,) = handle.cancel([0])
    assert (refused.gate, refused.value, refused.bound) == ("minimum_ticks", 1, 3)
    assert "1 in TRAINING, must be at least 3" in refused.reason
    assert handle.rollback([1])[0]
    seeds.tick()
    seeds.tick()
    assert handle.cancel([0])[0]


def test_no_free_slot_is_a_refusal_that_names_the_way_out():
    _, handle = site()
    first, second, third = handle.germinate([0, 1, 2])
    assert first
    assert second
    assert (third.gate, third.value, third.bound) == ("slots", 0, 1)
    assert "morphc.enlarge" in third.reason


def test_a_blueprint_without_a_bank_is_a_refusal():
    _, handle = site()
    (refused,) = handle.germinate([0], blueprint="affine")
    assert "no bank" in refused.reason


def test_an_embargo_is_waited_for_and_history_keeps_ten():
    seeds, handle = site(embargo_ticks=2)
    for _ in range(4):
        assert handle.germinate([0])[0]
        assert handle.advance([0], to=L.TRAINING)[0]
        assert handle.rollback([0])[0]
        assert handle.reset([0])[0]
        (refused,) = handle.germinate([0])
        assert (refused.gate, refused.value) == ("embargo", 2)
        seeds.tick()
        seeds.tick()
    assert [entry.target for entry in handle.history(0)][-4:] == [
        L.GERMINATED,
        L.TRAINING,
        L.ROLLED_BACK,
        L.DORMANT,
    ]
    assert len(handle.history(0)) == 10
    assert seeds._store.state.error_count.tolist() == [4, 0, 0, 0]


@pytest.mark.parametrize(
    "call",
    [
        lambda handle: handle.germinate([4]),
        lambda handle: handle.prune([-1]),
        lambda handle: handle.cancel([0, 0]),
        lambda handle: handle.germinate([0], candidates=0),
        lambda handle: handle.advance([0], to=11),
        lambda handle: handle.advance([0, 1], to=L.TRAINING, metrics=[{}]),
    ],
)
def test_nonsense_raises_and_changes_nothing(call):
    seeds, handle = site()
    with pytest.raises(SeedError):
        call(handle)
    assert seeds._store.state.transitions.tolist() == [0] * 4


def test_unknown_grafts_and_curves_are_refused_with_what_there_is():
    _, handle = site()
    with pytest.raises(UnknownNameError, match="fixed_ramp"):
        handle.germinate([0], graft="fixed_rump")
    with pytest.raises(ConfigError, match="cosine"):
        handle.germinate([0], curve="cubic")


def test_a_tick_copies_the_states_once(monkeypatch):
    seeds, handle = site()
    handle.germinate([0, 1])
    seeds.tick()
    copies = []
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: copies.append(self.shape) or self.detach().clone())
    seeds.tick()
    assert len(copies) == 1
