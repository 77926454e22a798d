"""Growing under tensor parallelism: a sharded layer's site sees the whole output, on every rank alike."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from rank_helpers import DEVICE, batch, compiled, everywhere, launch, loss_of, same_on_all, slots_of
from test_fsdp import whole
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import morphc
from morphc.errors import ConfigError
from morphc.grow.controllers import Germinate, ScheduleController
from morphc.integrations.tensor_parallel import slots_aside
from morphc.runtime.sharded import is_dtensor

EVERY = 4


def metric(model: nn.Module) -> float:
    return float(loss_of(model, *batch(1000, 32)))


def grown(model: nn.Module) -> list[str]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    commands = [(1, Germinate("fc1", (1, 3))), (1, Germinate("fc2", (0,)))]
    several = {"batches_per_step": 1} if dist.is_initialized() else {}
    grower = morphc.Grower(
        model, optimizer, ScheduleController(commands), metric, tick_every=EVERY, **several
    )
    told = []
    for step in range(60):
        optimizer.zero_grad()
        x, y = batch(step)
        loss = loss_of(model, x, y)
        loss.backward()
        optimizer.step()
        event = grower.step(loss)
        told += [f"{step} {transition}" for transition in event.transitions if transition]
    return told


def columns_then_rows() -> None:
    model = compiled(gradient_telemetry=True)
    mesh = init_device_mesh(DEVICE.type, (dist.get_world_size(),))
    with slots_aside(model):
        parallelize_module(model, mesh, {"fc1": ColwiseParallel(), "fc2": RowwiseParallel()})
    assert is_dtensor(model.fc1.weight)
    assert not any(is_dtensor(p) for n, p in model.named_parameters() if "morphc" in n)
    with pytest.raises(ConfigError, match="batches_per_step=3 of 2 ranks"):
        morphc.Grower(model, torch.optim.SGD(model.parameters()), batches_per_step=3)
    loss_of(model, *batch(0)).backward()
    health = {name: value[:4] for name, value in morphc.seeds(model).telemetry().items()}
    told = grown(model)
    same_on_all(model)
    assert everywhere(told) == [told] * dist.get_world_size()
    found = whole(model)
    if dist.get_rank() == 0:
        torch.save((told, found, health), Path(os.environ["FOLDER"]) / "found.pt")


def test_a_sharded_layer_grows_as_it_does_on_one_rank(tmp_path: Path) -> None:
    launch(__file__, "columns_then_rows", tmp_path)
    events, found, health = torch.load(tmp_path / "found.pt", weights_only=True)
    model = compiled(gradient_telemetry=True)
    loss_of(model, *batch(0)).backward()
    for name, value in morphc.seeds(model).telemetry().items():
        torch.testing.assert_close(health[name], value[:4], rtol=1e-4, atol=1e-6, equal_nan=True, msg=name)
    told = grown(model)
    assert any(line.endswith("GRAFTING") for line in told), "\n".join(told)
    assert events == told
    for name, value in (slots_of(model) | dict(model.named_parameters())).items():
        if name in found:
            torch.testing.assert_close(found[name], value.detach(), rtol=1e-3, atol=1e-4, msg=name)
    assert "fc1.weight" in found
