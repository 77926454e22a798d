"""Checkpoints by torch.distributed.checkpoint: resumed bit for bit, on another number of ranks, after a kill."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from rank_helpers import batch, compiled, launch, loss_of, part, same_on_all, validation
from test_fsdp import EVERY, sharded, whole
from torch.nn.parallel import DistributedDataParallel

import morphc
from morphc.errors import CheckpointError
from morphc.grow.controllers import Germinate, ScheduleController
from morphc.integrations import dcp

LAST = 44


def grower_of(kind: str, **options: object) -> morphc.Grower:
    model = compiled(telemetry_every=3, **options)
    wrapped = sharded(model) if kind == "fsdp" else DistributedDataParallel(model) if kind == "ddp" else model
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
    controller = ScheduleController([(1, Germinate("fc1", (1, 3))), (24, Germinate("fc2", (0,)))])
    return morphc.Grower(wrapped, optimizer, controller, validation, scheduler=scheduler, tick_every=EVERY)


def train(grower: morphc.Grower, folder: Path, kill_at: int = -1) -> None:
    """To step LAST from the newest checkpoint, with one at every 14th step, which is no tick's."""
    last = dcp.latest(folder)
    first = dcp.load(grower, last)["step"] if last is not None else 0
    for step in range(first, LAST):
        if step == kill_at and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        grower.optimizer.zero_grad()
        x, y = part(batch(step))
        loss = loss_of(grower.model, x + 0.01 * torch.randn(x.shape).to(x), y)  # each rank's own chance
        loss.backward()
        grower.optimizer.step()
        grower.scheduler.step()
        grower.step(loss)
        if (step + 1) % 14 == 0:
            dcp.save(grower, folder / f"step-{step + 1}", step=step + 1)


def run() -> None:
    kind, folder = os.environ["KIND"], Path(os.environ["FOLDER"])
    torch.manual_seed(7 + dist.get_rank())
    chance = torch.get_rng_state()
    grower = grower_of(kind)
    torch.set_rng_state(chance)
    train(grower, folder / "checkpoints", int(os.environ.get("KILL_AT", "-1")))
    found = whole(grower.model) if kind == "fsdp" else dict(grower.model.module.state_dict())
    found = {name: value for name, value in found.items() if "sums" not in name and "counts" not in name}
    if dist.get_rank() == 0:
        found["lr"] = torch.tensor(grower.optimizer.param_groups[0]["lr"])
        torch.save(found, folder / "end.pt")


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_run_that_was_killed_goes_on_bit_for_bit(tmp_path: Path, kind: str) -> None:
    launch(__file__, "run", tmp_path, KIND=kind)
    expected = torch.load(tmp_path / "end.pt", weights_only=True)
    shutil.rmtree(tmp_path / "checkpoints")
    (tmp_path / "end.pt").unlink()
    killed = launch(__file__, "run", tmp_path, wait=False, KIND=kind, KILL_AT="31")
    assert killed[1].wait(60) == -signal.SIGKILL
    killed[0].kill()
    for process in killed:
        process.communicate(timeout=60)
    assert dcp.latest(tmp_path / "checkpoints") == tmp_path / "checkpoints" / "step-28"
    (tmp_path / "checkpoints" / "step-35").mkdir()  # one whose writer was killed in it
    launch(__file__, "run", tmp_path, KIND=kind)
    found = torch.load(tmp_path / "end.pt", weights_only=True)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    if kind == "fsdp":
        other_numbers_of_ranks(tmp_path)


def from_one_rank() -> None:
    folder = Path(os.environ["FOLDER"])
    grower = grower_of("fsdp")
    assert dcp.load(grower, folder / "one") == {"step": 42}
    same_on_all(grower.model)
    whole(grower.model)
    again = whole(grower.model)
    expected = torch.load(folder / "one.pt", weights_only=True)
    for name, value in again.items():
        assert torch.equal(value, expected[name]), name
    for step in range(2 * EVERY):
        grower.optimizer.zero_grad()
        loss = loss_of(grower.model, *part(batch(step)))
        loss.backward()
        grower.optimizer.step()
        grower.step(loss)
    same_on_all(grower.model)


def other_numbers_of_ranks(folder: Path) -> None:
    """Two ranks' checkpoint on one, and one's on two."""
    grower = grower_of("one", slots=4)
    with pytest.raises(CheckpointError, match=r"bottleneck|slots at 'fc1'"):
        dcp.load(grower, folder / "checkpoints" / "step-42")
    grower = grower_of("one")
    assert dcp.load(grower, folder / "checkpoints" / "step-42") == {"step": 42}
    assert grower.steps == 42
    assert grower.optimizer.param_groups[0]["lr"] == pytest.approx(0.01 * 0.99**42)
    state = grower.optimizer.state[grower.model.fc1.weight]
    assert float(state["step"]) == 42
    assert state["exp_avg"].shape == (12, 6)
    assert state["exp_avg"].any()
    dcp.save(grower, folder / "one", step=42)
    kept = dict(grower.model.named_parameters()) | {
        f"{path}/{name}/{key}": tensor
        for path, site in grower.seeds.sites.items()
        for name, bank in site.slots.items()
        for key, tensor in bank.named_parameters()
    }
    state = grower.store.state
    kept |= {"lifecycle": state.lifecycle, "alpha": state.alpha}
    torch.save({name: value.detach().clone() for name, value in kept.items()}, folder / "one.pt")
    launch(__file__, "from_one_rank", folder)


def test_what_is_no_checkpoint_of_this_model_is_refused(tmp_path: Path) -> None:
    grower = grower_of("one")
    with pytest.raises(CheckpointError, match=r"nothing holds no whole checkpoint .*latest"):
        dcp.load(grower, tmp_path / "nothing")
    dcp.save(grower, tmp_path / "it", step=0)
    before = grower.model.fc1.weight.detach().clone()
    with pytest.raises(
        CheckpointError, match=r"the site at 'fc1' has 12 features, 4 seeds .* there and 12 features, 3"
    ):
        dcp.load(grower_of("one", seeds_per_layer=3), tmp_path / "it")
    (next((tmp_path / "it").glob("*.distcp"))).write_bytes(b"")
    with pytest.raises(CheckpointError, match="can't be read"):
        dcp.load(grower, tmp_path / "it")
    assert torch.equal(before, grower.model.fc1.weight)
    assert dcp.latest(tmp_path / "elsewhere") is None
