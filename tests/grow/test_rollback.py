"""When a graft goes wrong everything goes back to before it, and the run goes on as if it had never been tried."""

from __future__ import annotations

import pytest
import torch
from growing import Never, Task, grown, same

import morphc
from morphc import Lifecycle
from morphc.errors import CheckpointError

L = Lifecycle


class Run:
    """A training run with dropout-like noise, momentum and a schedule, so that all of them have to come back."""

    def __init__(self, model, controller=None, tick_every=4):
        self.model, self.task = model, Task()
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 400)
        self.grower = morphc.Grower(
            model,
            self.optimizer,
            controller or Never(),
            self.task.validate,
            scheduler=self.scheduler,
            tick_every=tick_every,
        )

    def step(self, number, poison=1.0):
        noise = torch.randn(32, 6) * 0.05
        self.optimizer.zero_grad()
        self.model.train()
        place = number % len(self.task.x)
        loss = (self.model(self.task.x[place] + noise) - self.task.y[place]).square().mean() * poison
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        return self.grower.step(loss)


def train_until(run, state, path="2", limit=200):
    for number in range(run.grower.steps, limit):
        run.step(number)
        if state in morphc.seeds(run.model)[path].lifecycle.tolist():
            return run.grower.steps
    raise AssertionError(f"{state.name} was never reached")


def begin(seeds=(0,)):
    plain, model = grown(minimum_ticks=(10, 3, 1, 2, 3))
    torch.manual_seed(11)
    run = Run(model)
    assert all(morphc.seeds(model)["2"].germinate(list(seeds), blueprint="widen"))
    start = train_until(run, L.GRAFTING)
    return plain, run, start


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e6])
@pytest.mark.parametrize("state", [L.GRAFTING, L.STABILIZATION, L.EVALUATING, L.FINE_TUNING])
def test_a_rolled_back_run_is_bitwise_the_run_that_never_tried(poison, state):
    plain, run, start = begin()
    train_until(run, state)
    number = run.grower.steps
    while True:
        event = run.step(number, poison)
        number += 1
        if event.rolled_back:
            break
        assert number < start + 120
    assert event.rewound_to == start == run.grower.steps
    (moved,) = event.transitions
    assert (moved.seed, moved.source, moved.target) == (0, L.GRAFTING, L.ROLLED_BACK)
    seeds = morphc.seeds(run.model)
    assert seeds["2"].lifecycle.tolist() == [L.ROLLED_BACK, L.DORMANT]
    assert seeds._store.state.error_count.tolist() == [0, 0, 1, 0]
    assert (seeds["2"].slots["widen"].owner == -1).all()
    for step in range(start, start + 40):
        run.step(step)

    _, untouched = grown()
    torch.manual_seed(11)
    never = Run(untouched)
    for step in range(start + 40):
        never.step(step)
    assert same(run.model, never.model)
    assert not same(plain, never.model)
    mine, theirs = run.optimizer.state_dict(), never.optimizer.state_dict()
    assert mine["param_groups"] == theirs["param_groups"]
    for place, kept in theirs["state"].items():
        assert all(torch.equal(value, mine["state"][place][name]) for name, value in kept.items())


def test_the_seed_is_not_tried_again_before_its_embargo_ends():
    _, run, _ = begin()
    number = run.grower.steps
    while not run.step(number, float("nan")).rolled_back:
        number += 1
    seeds = morphc.seeds(run.model)
    assert all(seeds["2"].reset([0]))
    tried = 0
    for step in range(run.grower.steps, run.grower.steps + 60):
        (germinated,) = seeds["2"].germinate([0])
        if germinated:
            break
        assert germinated.gate in ("embargo", "table")
        tried += 1
        run.step(step)
    assert germinated
    assert tried >= 5 * 4


def test_a_controller_does_not_try_the_seed_again_before_its_embargo_ends():
    _, model = grown(
        minimum_ticks=(10, 3, 1, 2, 3), seeds_per_layer=1, slots=1, embargo_ticks=12, blueprint="widen"
    )
    torch.manual_seed(11)
    run = Run(model, morphc.PlateauController(patience=1, threshold=0.99, blueprint="widen"))
    start = train_until(run, L.GRAFTING)
    site = morphc.seeds(model)["2"]
    number = start
    while not run.step(number, float("nan")).rolled_back:
        number += 1
    assert all(site.reset([0]))
    back = run.grower.ticks
    for step in range(start, start + 80):
        run.step(step)
        if site.lifecycle[0] != L.DORMANT:
            break
    assert run.grower.ticks - back >= 12
    assert site.lifecycle.tolist() == [L.GERMINATED]


def test_other_seeds_keep_their_place_and_learning():
    _, run, start = begin()
    seeds = morphc.seeds(run.model)
    assert all(seeds["2"].germinate([1], blueprint="bottleneck"))
    number = run.grower.steps
    while not run.step(number, float("nan")).rolled_back:
        number += 1
    assert seeds["2"].lifecycle.tolist() == [L.ROLLED_BACK, L.DORMANT]  # it germinated after the graft began
    assert run.grower.steps == start


def test_a_worse_metric_rolls_back_at_the_epoch():
    _, run, start = begin_with_metric(1.0)
    assert not run.grower.epoch(1.1)
    event = run.grower.epoch(1.5)
    assert "worse by 0.5" in event.rolled_back
    assert "must be at most 0.2" in event.rolled_back
    assert event.rewound_to == start
    for step in range(start, start + 40):
        run.step(step)
    _, untouched = grown()
    torch.manual_seed(11)
    never = Run(untouched)
    never.grower.epoch(1.0)
    for step in range(start + 40):
        never.step(step)
    assert same(run.model, never.model)


def begin_with_metric(metric):
    _, model = grown()
    torch.manual_seed(11)
    run = Run(model)
    run.grower.epoch(metric)
    morphc.seeds(model)["2"].germinate([0], blueprint="widen")
    return None, run, train_until(run, L.GRAFTING)


def test_trouble_without_a_graft_changes_nothing():
    _, model = grown()
    run = Run(model)
    for step in range(8):
        assert not run.step(step, float("nan") if step == 5 else 1.0).rolled_back
    assert run.grower.steps == 8


def test_two_grafts_go_back_one_at_a_time():
    _, run, first = begin()
    train_until(run, L.FINE_TUNING)
    seeds = morphc.seeds(run.model)
    assert all(seeds["0"].germinate([1], blueprint="bottleneck"))
    second = None
    for number in range(run.grower.steps, 300):
        run.step(number)
        if seeds["0"].lifecycle[1] == L.GRAFTING:
            second = run.grower.steps
            break
    still = seeds["2"].lifecycle[0].item()
    number = run.grower.steps
    while not (event := run.step(number, float("nan"))).rolled_back:
        number += 1
    assert event.rewound_to == second
    assert second > first
    assert [(t.path, t.seed) for t in event.transitions] == [("0", 1)]
    assert seeds["2"].lifecycle[0] == still


@pytest.mark.parametrize("where", ["memory", "disk"])
@pytest.mark.parametrize("state", [L.TRAINING, L.GRAFTING, L.EVALUATING, L.FOSSILIZED])
def test_a_snapshot_restores_bitwise_in_any_state(state, where, tmp_path):
    _, model = grown(
        min_improvement=-10.0, min_contribution=-10.0, min_stability=0.0, min_final_stability=0.0
    )
    torch.manual_seed(2)
    run = Run(model, morphc.PlateauController(patience=1, blueprint="widen"))
    morphc.seeds(model)["2"].germinate([0], blueprint="widen")
    start = train_until(run, state)
    snapshot = run.grower.snapshot()
    if where == "disk":
        snapshot.save(tmp_path / "snap")
        snapshot = morphc.Snapshot.load(tmp_path / "snap")
    results = []
    for _ in range(2):
        for step in range(start, start + 30):
            run.step(step)
        results.append({name: value.clone() for name, value in run.model.state_dict().items()})
        run.grower.restore(snapshot)
        assert run.grower.steps == start
    own = [name for name in results[0] if not name.endswith(("seeds.sums", "seeds.counts", "seeds.score"))]
    assert all(torch.equal(results[0][name], results[1][name]) for name in own)


def test_a_damaged_snapshot_is_refused_naming_the_file(tmp_path):
    _, model = grown()
    Run(model).grower.snapshot().save(tmp_path / "snap")
    path = tmp_path / "snap" / "snapshot.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match=r"snapshot\.safetensors is damaged"):
        morphc.Snapshot.load(tmp_path / "snap")


def test_a_flipped_bit_of_a_counter_is_refused_naming_the_file(tmp_path):
    _, model = grown()
    Run(model).grower.snapshot().save(tmp_path / "snap")
    path = tmp_path / "snap" / "snapshot.json"
    data = bytearray(path.read_bytes())
    data[data.index(b'"ticks", ') + 9] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match=r"snapshot\.json is damaged"):
        morphc.Snapshot.load(tmp_path / "snap")


def test_a_snapshot_of_another_model_is_refused_and_changes_nothing():
    snapshot = Run(grown(width=5)[1]).grower.snapshot()
    _, model = grown()
    run = Run(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"fits the model that it was taken of"):
        run.grower.restore(snapshot)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"tick_every": 3}, "tick_every=3 here"),
        (
            {"controller": morphc.PlateauController()},
            "controller: PlateauController here, ScheduleController in",
        ),
        ({"optimizer": torch.optim.Adam}, "another optimizer than this Adam: it has no amsgrad, betas"),
    ],
)
def test_a_snapshot_of_another_run_is_refused_and_changes_nothing(other, message):
    _, model = grown()

    def grower(optimizer=torch.optim.SGD, controller=None, tick_every=4):
        controller = controller or morphc.ScheduleController([])
        return morphc.Grower(
            model, optimizer(model.parameters(), lr=0.1), controller, lambda net: 1.0, tick_every=tick_every
        )

    snapshot = grower().snapshot()
    with torch.no_grad():
        model[0].weight.zero_()
    with pytest.raises(morphc.errors.MorphcError, match=message):
        grower(**other).restore(snapshot)
    assert not model[0].weight.any()


def test_a_foreign_directory_is_not_overwritten(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="something else than a snapshot"):
        Run(grown()[1]).grower.snapshot().save(tmp_path)
    assert (tmp_path / "file").read_text() == "mine"
