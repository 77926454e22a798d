"""Growing under FSDP2: the host's parameters are sharded, the slots are whole on every rank."""

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
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import morphc
from morphc.errors import FoldError, RankError
from morphc.grow.controllers import Germinate, ScheduleController
from morphc.runtime.sharded import is_dtensor

EVERY = 4


def sharded(model: nn.Module, **more: Any) -> nn.Module:
    mesh = init_device_mesh(DEVICE.type, (dist.get_world_size(),))
    for layer in (model.fc1, model.fc2):
        fully_shard(layer, mesh=mesh, **more)
    return fully_shard(model, mesh=mesh, **more)


def grown(model: nn.Module, steps: int, broken: int = -1) -> tuple[list[str], morphc.Grower]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    controller = ScheduleController([(1, Germinate("fc1", (1, 3)))])
    grower = morphc.Grower(model, optimizer, controller, validation, tick_every=EVERY)
    told = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model, *part(batch(step)))
        loss.backward()
        optimizer.step()
        event = grower.step(torch.full_like(loss, float("nan")) if step == broken else loss)
        told += [f"{step} {transition}" for transition in event.transitions if transition]
        told += [f"{step} rolled back"] if event.rolled_back else []
    return told, grower


def whole(model: nn.Module) -> dict[str, torch.Tensor]:
    """The host's parameters and the slots."""
    host = {n: p.full_tensor().detach().clone() for n, p in model.named_parameters() if is_dtensor(p)}
    return host | slots_of(model)


def from_germination_to_fossil() -> None:
    model = sharded(compiled())
    assert is_dtensor(model.fc1.weight)
    assert not any(is_dtensor(p) for n, p in model.named_parameters() if "morphc" in n)
    told, grower = grown(model, 60)
    same_on_all(model)
    assert everywhere(told) == [told] * dist.get_world_size()
    ratio = grower.learning()["fc1", 1]["gradient_ratio"]
    if dist.get_rank() == 0:
        torch.save((told, whole(model), ratio), Path(os.environ["FOLDER"]) / "found.pt")
    else:
        whole(model)

    # A graft that goes wrong is undone, and snapshots hold each rank's part.
    model = sharded(compiled(minimum_ticks=(1, 3, 1, 1, 1), graft_ticks=20))
    told, grower = grown(model, 5 * EVERY, broken=5 * EVERY - 1)
    assert told[-1].endswith("rolled back"), told
    kept, snapshot = whole(model), grower.snapshot()
    for step in range(3):
        grower.optimizer.zero_grad()
        loss = loss_of(model, *part(batch(step)))
        loss.backward()
        grower.optimizer.step()
        grower.step(loss)
    assert not torch.equal(whole(model)["fc1.weight"], kept["fc1.weight"])
    grower.restore(snapshot)
    for name, value in whole(model).items():
        assert torch.equal(value, kept[name]), name


def test_ranks_grow_alike_and_as_one_process_does_on_the_joint_batch(tmp_path: Path) -> None:
    launch(__file__, "from_germination_to_fossil", tmp_path)
    events, found, ratio = torch.load(tmp_path / "found.pt", weights_only=True)
    model = compiled()
    told, grower = grown(model, 60)
    assert events == told
    assert told[-1].endswith("FOSSILIZED")
    for name, value in (slots_of(model) | dict(model.named_parameters())).items():
        if name in found:
            torch.testing.assert_close(found[name], value.detach(), rtol=1e-3, atol=1e-4, msg=name)
    assert "fc1.weight" in found
    assert ratio == pytest.approx(grower.learning()["fc1", 1]["gradient_ratio"], rel=1e-2)


def other_types() -> None:
    # Sharded parameters compute in bfloat16; slots stay as they are.
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = sharded(compiled(), mp_policy=policy)
    told, _ = grown(model, 10 * EVERY)
    assert any("GRAFTING" in line for line in told), told
    assert {p.dtype for n, p in model.named_parameters() if "morphc" in n} == {torch.float32}
    same_on_all(model)
    # A host in bfloat16: slots are float32, as ever.
    model = sharded(compiled().to(torch.bfloat16))
    x, _ = part(batch(0))
    model(x.bfloat16()).sum().backward()
    # Slots that somebody has sharded after all are refused.
    model = compiled()
    bank = morphc.seeds(model)["fc1"].slots["bottleneck"]
    from torch.distributed.tensor import distribute_tensor

    mesh = init_device_mesh(DEVICE.type, (dist.get_world_size(),))
    bank._parameters["in_weight"] = nn.Parameter(
        distribute_tensor(bank.in_weight.detach(), mesh), requires_grad=False
    )
    with pytest.raises(
        RankError, match=r"'in_weight' of the slots \(bottleneck\) at 'fc1' was sharded.*ignored_params"
    ):
        grown(model, 1)


def test_types_of_slots_and_host_may_differ_and_sharded_slots_are_refused(tmp_path: Path) -> None:
    launch(__file__, "other_types", tmp_path)


def nothing_is_recycled() -> None:
    model = sharded(compiled())
    grower = morphc.Grower(
        model, torch.optim.SGD(model.parameters(), lr=0.01), ScheduleController([]), validation
    )
    (told,) = grower.recycle("fc1", [0])
    assert not told
    assert "sharded among ranks" in str(told)
    with pytest.raises(FoldError, match=r"'scale' is sharded among ranks: gather"):
        morphc.fold(model)


def test_units_of_sharded_layers_are_not_recycled(tmp_path: Path) -> None:
    launch(__file__, "nothing_is_recycled", tmp_path)
