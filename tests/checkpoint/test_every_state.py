"""A run that is stopped with a seed in any of the eleven states goes on bit for bit in a model that was loaded."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import morphc
from morphc import Lifecycle
from morphc.errors import CheckpointError

sys.path.append(str(Path(__file__).parents[1] / "grow"))

from growing import Never, Task, grown, host

L = Lifecycle
MEASURED = ("seeds.sums", "seeds.counts", "seeds.score")


class Run:
    """A model with AdamW, a schedule and a Grower that ticks every second step."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.task = model, Task()
        own = [param for name, param in model.named_parameters() if "morphc" not in name.split(".")]
        self.optimizer = torch.optim.AdamW(own, lr=0.01)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 100)
        self.grower = morphc.Grower(
            model, self.optimizer, Never(), self.task.validate, scheduler=self.schedule, tick_every=2
        )
        self.moves: list[str] = []

    def train(self, steps: int) -> None:
        for number in range(self.grower.steps, self.grower.steps + steps):
            self.optimizer.zero_grad()
            loss = self.task.loss(self.model, number)
            loss.backward()
            self.optimizer.step()
            event = self.grower.step(loss)
            self.schedule.step()
            self.moves += map(str, event.transitions)

    def values(self) -> dict[str, torch.Tensor]:
        """What the run depends on; measurements of telemetry begin anew in a loaded model."""
        kept = {k: v.clone() for k, v in self.model.state_dict().items() if not k.endswith(MEASURED)}
        for place, state in self.optimizer.state_dict()["state"].items():
            kept |= {f"optimizer {place} {name}": value.clone() for name, value in state.items()}
        return kept


def stopped(state: Lifecycle, folder: Path, blueprint: str) -> Run:
    """A run with one seed in `state` and one that trains, saved after some steps."""
    _, model = grown(
        minimum_ticks=(4, 3, 6, 6, 6), blueprint=blueprint, min_isolated_improvement=-1.0, embargo_ticks=6
    )
    run = Run(model)
    site = morphc.seeds(model)["2"]
    if state is L.CULLED:
        site.assign([0], L.FOSSILIZED)
        assert all(site.prune([0]))
    else:
        site.assign([0], state, alpha=0.3 if state is L.GRAFTING else None)
    site.assign([1], L.TRAINING)
    # GERMINATED and CANCELLED are left at the next tick.
    run.train(6 if state not in (L.CANCELLED, L.GERMINATED) else 1)
    assert int(morphc.seeds(model)["2"].lifecycle[0]) == state
    morphc.save(model, folder / "model")
    run.grower.snapshot().save(folder / "run")
    return run


@pytest.mark.parametrize("blueprint", ["bottleneck", "widen"])
@pytest.mark.parametrize("state", L, ids=lambda state: state.name)
def test_a_run_goes_on_bitwise(state: Lifecycle, blueprint: str, tmp_path: Path) -> None:
    run = stopped(state, tmp_path, blueprint)
    run.moves.clear()
    run.train(30)

    again = Run(morphc.load(host(), tmp_path / "model"))
    assert int(morphc.seeds(again.model)["2"].lifecycle[0]) == state
    again.train(2)  # so that there is something to be replaced
    again.grower.restore(morphc.Snapshot.load(tmp_path / "run"))
    again.moves.clear()
    again.train(30)
    mine, theirs = run.values(), again.values()
    assert mine.keys() == theirs.keys()
    assert not [name for name, value in mine.items() if not torch.equal(value, theirs[name])]
    assert again.moves == run.moves


@pytest.mark.parametrize("state", L, ids=lambda state: state.name)
def test_a_loaded_model_computes_the_same_bits_without_a_grower(state: Lifecycle, tmp_path: Path) -> None:
    run = stopped(state, tmp_path, "bottleneck")
    again = morphc.load(host(), tmp_path / "model")
    x = run.task.vx
    for mode in (True, False):
        assert torch.equal(run.model.train(mode)(x), again.train(mode)(x))
    kept = again.state_dict()
    for name, value in run.model.state_dict().items():
        assert name.endswith(MEASURED) or torch.equal(value, kept[name]), name
    for seed in range(2):
        told: list[Any] = [morphc.seeds(net).history("2", seed) for net in (run.model, again)]
        assert told[0] == told[1]


def test_a_host_of_another_width_is_told_what_differs(tmp_path: Path) -> None:
    stopped(L.FOSSILIZED, tmp_path, "widen")
    other = host(width=7)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"'0\.weight' has shape \[4, 6\], in this host it is \[7, 6\]"):
        morphc.load(other, tmp_path / "model")
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
    assert not any("morphc" in name for name, _ in other.named_modules())
