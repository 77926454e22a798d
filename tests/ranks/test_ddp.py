"""Growing under DDP: the same seeds on every rank, by the gradients of the joint batch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rank_helpers import (
    DEVICE,
    batch,
    compiled,
    everywhere,
    launch,
    loss_of,
    part,
    same_on_all,
    slots_of,
    validation,
)
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import morphc
from morphc.errors import ConfigError, RankError
from morphc.grow.controllers import CallbackController, Germinate, ScheduleController
from morphc.grow.recycler import RecycleController
from morphc.kernels import tuning
from morphc.kernels.tuning import TuneConfig
from morphc.lifecycle import Lifecycle

EVERY = 4


def grown(model: nn.Module, run: nn.Module, steps: int, *, closure: bool = False) -> tuple[list[str], Any]:
    """What happened in so many steps, and the Grower."""
    optimizer = torch.optim.AdamW(run.parameters(), lr=0.01)
    controller = ScheduleController([(1, Germinate("fc1", (1, 3), candidates=1))])
    grower = morphc.Grower(run, optimizer, controller, validation, tick_every=EVERY)
    told = []
    for step in range(steps):
        x, y = part(batch(step))
        optimizer.zero_grad()
        loss = loss_of(run, x, y)
        loss.backward()
        optimizer.step()
        event = grower.step(loss, (lambda x=x, y=y: loss_of(run, x, y)) if closure else None)
        told += [f"{step} {transition}" for transition in event.transitions if transition]
        told += [f"{step} {path} by {refit.by}" for (path, _), refit in event.refits.items()]
    return told, grower


def a_seed_from_germination_to_fossil() -> None:
    folder, found = Path(os.environ["FOLDER"]), {}
    for name, options in (
        ("plain", {}),
        ("reconstruction", {"isolation": "reconstruction", "blend": "lerp"}),
    ):
        model = compiled(**options)
        told, _ = grown(model, DistributedDataParallel(model), 60, closure=True)
        same_on_all(model)
        assert everywhere(told) == [told] * dist.get_world_size()
        found[name] = (told, slots_of(model), model.fc1.weight.detach())
    if dist.get_rank() == 0:
        torch.save(found, folder / "found.pt")


def test_ranks_grow_alike_and_as_one_process_does_on_the_joint_batch(tmp_path: Path) -> None:
    launch(__file__, "a_seed_from_germination_to_fossil", tmp_path)
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    for name, options in (
        ("plain", {}),
        ("reconstruction", {"isolation": "reconstruction", "blend": "lerp"}),
    ):
        model = compiled(**options)
        told, _ = grown(model, model, 60, closure=True)
        events, slots, weight = found[name]
        assert events == told
        last = "FOSSILIZED" if name == "plain" else "TRAINING"
        assert any(line.endswith(last) for line in told), told
        assert name == "reconstruction" or any("by loss" in line for line in told), told
        for key, value in slots_of(model).items():
            torch.testing.assert_close(slots[key], value, rtol=1e-3, atol=1e-4, msg=f"{name} {key}")
        torch.testing.assert_close(weight, model.fc1.weight.detach(), rtol=1e-3, atol=1e-4)


class Counted:
    """Counts the collectives that Python asks for."""

    names = ("all_reduce", "all_gather", "all_gather_object", "broadcast_object_list", "broadcast")

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.count = 0
        for name in self.names:
            patch.setattr(dist, name, self.counting(getattr(dist, name)))

    def counting(self, call: Any) -> Any:
        def counted(*args: Any, **more: Any) -> Any:
            self.count += 1
            return call(*args, **more)

        return counted


def what_is_sent() -> None:
    torch.manual_seed(dist.get_rank())
    model = compiled()
    ddp = DistributedDataParallel(model)
    ours = {name for name, _ in (*model.named_parameters(), *model.named_buffers()) if "morphc" in name}
    assert ours
    assert ours <= set(ddp.parameters_to_ignore)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.01)
    grower = morphc.Grower(ddp, optimizer, ScheduleController([]), validation, tick_every=EVERY)
    with pytest.MonkeyPatch.context() as patch:
        counted = Counted(patch)
        counts = []
        for step in range(3 * EVERY):
            if step == EVERY:
                for site in ("fc1", "fc2"):
                    grower.seeds[site].assign([0], Lifecycle.FINE_TUNING)
            before = counted.count
            optimizer.zero_grad()
            loss = loss_of(ddp, *part(batch(step)))
            loss.backward()
            optimizer.step()
            grower.step(loss)
            counts.append(counted.count - before)
    # Dormant: none between ticks. Two sites at work: one for both, from the next tick on.
    assert counts[: EVERY - 1] == [0] * (EVERY - 1), counts
    assert counts[EVERY : 2 * EVERY - 1] == [0] * (EVERY - 1), counts
    assert counts[2 * EVERY : -1] == [1] * (EVERY - 1), counts
    loss_of(ddp, *part(batch(0))).backward()
    rows = everywhere(morphc.seeds(model).telemetry()["mean"].tolist())
    assert rows[0] != rows[1]  # each rank's own telemetry: nothing was broadcast over it
    same_on_all(model)


def going_back() -> None:
    model = compiled(minimum_ticks=(1, 3, 1, 1, 1), graft_ticks=20)
    ddp = DistributedDataParallel(model)
    told, grower = grown(model, ddp, 4 * EVERY)
    assert any("GRAFTING" in line for line in told), told
    kept, begun = slots_of(model), model.fc1.weight.detach().clone()
    snapshot = grower.snapshot()
    # The loss is broken on the last rank alone.
    for step in range(EVERY):
        grower.optimizer.zero_grad()
        loss = loss_of(ddp, *part(batch(100 + step)))
        loss.backward()
        grower.optimizer.step()
        event = grower.step(torch.tensor(float("nan")) if dist.get_rank() == 1 else loss)
    assert "nan" in event.rolled_back, event
    assert not torch.equal(kept["lifecycle"], slots_of(model)["lifecycle"])
    same_on_all(model)
    grower.restore(snapshot)
    assert torch.equal(begun, model.fc1.weight)
    for key, value in slots_of(model).items():
        assert torch.equal(value, kept[key]), key


def recycled_alike() -> None:
    host = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 4)).to(DEVICE)
    with torch.no_grad():
        host[0].bias[:6] = -100.0  # dead
    torch.manual_seed(0)
    model = morphc.compile(
        host, (batch(0)[0],), config=morphc.Config(seeds_per_layer=4, slots=2, telemetry_every=1)
    )
    ddp = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(ddp.parameters(), lr=0.01)
    controller = RecycleController(every=EVERY, candidates=6, most=1.0)
    grower = morphc.Grower(ddp, optimizer, controller, tick_every=EVERY)
    before = model[0].weight.detach().clone()
    for step in range(2 * EVERY):
        optimizer.zero_grad()
        loss = loss_of(ddp, *part(batch(step)))
        loss.backward()
        optimizer.step()
        grower.step(loss)
    assert not torch.equal(before[:6], model[0].weight[:6])
    first, second = everywhere(model[0].weight.detach())
    assert torch.equal(first, second)


def test_dormant_slots_send_nothing_and_active_ones_once_a_step(tmp_path: Path) -> None:
    launch(__file__, "what_is_sent", tmp_path)


def test_a_graft_is_undone_on_every_rank(tmp_path: Path) -> None:
    launch(__file__, "going_back", tmp_path)


def test_units_are_recycled_alike(tmp_path: Path) -> None:
    launch(__file__, "recycled_alike", tmp_path)


def disagreements() -> None:
    rank = dist.get_rank()

    def grower(model: nn.Module, **options: Any) -> morphc.Grower:
        given = {"evaluate": validation, "controller": ScheduleController([]), "tick_every": 1} | options
        return morphc.Grower(model, torch.optim.SGD(model.parameters(), lr=0.01), **given)

    def steps(grower: morphc.Grower, many: int = 1) -> None:
        for _ in range(many):
            loss = loss_of(grower.model, *part(batch(0)))
            loss.backward()
            grower.step(loss)

    told = r"the configs differ .* rank 0 has 'telemetry_every: 1', rank 1 has 'telemetry_every: 2'; compile with"
    with pytest.raises(RankError, match=told):
        grower(compiled(telemetry_every=1 + rank))
    told = r"the sites differ .*fc1: 12 features, 4 seeds.*bottleneck': 2.* rank 1 has .*bottleneck': 3.*plan"
    with pytest.raises(RankError, match=told):
        grower(enlarged(2 + rank))
    model = compiled()
    with torch.no_grad():
        model.fc2.bias += rank
    with pytest.raises(RankError, match=r"the host's weights differ .* after DDP or fully_shard has wrapped"):
        grower(model)
    told = r"the Growers' options differ .*'tick_every: 1', rank 1 has 'tick_every: 2'"
    with pytest.raises(RankError, match=told):
        grower(compiled(), tick_every=1 + rank)
    model = compiled()
    if rank == 1:
        spec = morphc.report(model).plan.specs[0]
        tuning.adopt({tuning.key(spec, 16): TuneConfig(16, 16, 2, 1)})
    with pytest.raises(RankError, match=r"tuned configs differ .* rank 1 .*morphc\.tune"):
        grower(model)
    tuning.forget()
    one = grower(compiled())
    if rank == 1:
        one.seeds["fc1"].germinate([2])
    told = r"states differ .* has 'fc1\[2\]: DORMANT .* 'fc1\[2\]: GERMINATED .* on every rank"
    with pytest.raises(RankError, match=told):
        steps(one)
    one = grower(compiled())
    one.seeds["fc1"].assign([2], Lifecycle.FINE_TUNING)
    if rank == 1:
        with torch.no_grad():
            one.seeds["fc1"].slots["bottleneck"].out_weight[0] += 1
    with pytest.raises(RankError, match="the slots' weights differ"):
        steps(one)

    one = grower(compiled(), tick_every=2)
    one.step(1.0 if rank == 0 else "text")  # type: ignore[arg-type]
    error, told = (
        (RankError, "rank 1 raised: .*the loss given to step")
        if rank == 0
        else (ConfigError, "the loss given to step is 'text'")
    )
    with pytest.raises(error, match=told):
        one.step(1.0)
    one.step(1.0), one.step(1.0)
    error, told = (
        (RankError, "epoch raised on rank 1") if rank == 0 else (ConfigError, "the metric given to epoch")
    )
    with pytest.raises(error, match=told):
        one.epoch(1.0 if rank == 0 else None)  # type: ignore[arg-type]

    def refuses(model: nn.Module) -> float:
        if rank == 1:
            raise ZeroDivisionError("mine")
        return validation(model)

    one = grower(compiled(), evaluate=refuses)
    one.seeds["fc1"].assign([2], Lifecycle.EVALUATING)
    error, told = (
        (RankError, "evaluate raised on rank 1: ZeroDivisionError: mine")
        if rank == 0
        else (ZeroDivisionError, "mine")
    )
    with pytest.raises(error, match=told):
        steps(one, 3)

    def raises(seen: object) -> list[Any]:
        raise KeyError("no idea")

    one = grower(compiled(), controller=CallbackController(raises))
    with pytest.raises(KeyError if rank == 0 else RankError, match="no idea"):
        steps(one)


def enlarged(slots: int) -> nn.Module:
    model = compiled()
    morphc.enlarge(model, slots=slots)
    return model


def test_ranks_that_are_not_alike_are_told_so(tmp_path: Path) -> None:
    launch(__file__, "disagreements", tmp_path)
