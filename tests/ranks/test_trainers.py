"""Trainers of other packages on two ranks: transformers' and Lightning's, each with its own DDP around the model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rank_helpers import DEVICE, everywhere, launch, same_on_all
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import morphc
from morphc import Lifecycle
from morphc.grow.controllers import Germinate, ScheduleController

FAST: dict[str, Any] = {
    "seeds_per_layer": 2, "slots": 2, "rank": 4, "blueprint": "widen", "minimum_ticks": (3, 2, 1, 1, 2),
    "graft_ticks": 2, "min_isolated_improvement": -1.0, "min_contribution": -10.0, "cull_contribution": -20.0,
    "min_improvement": -10.0, "min_stability": 0.0, "min_final_stability": 0.0,
}  # fmt: skip
WHOLE_LIFE = [Lifecycle(number) for number in range(1, 8)]


def ddp_has_no_slots(wrapped: object) -> None:
    assert isinstance(wrapped, DistributedDataParallel)
    slots = {id(p) for name, p in wrapped.named_parameters() if ".slots." in name}
    assert slots
    assert not slots & {id(parameter) for parameter in wrapped._module_parameters}


# -- transformers ---------------------------------------------------------------------------------------------


def under_transformers() -> None:
    import transformers

    from morphc.integrations.hf import GrowCallback

    site, folder = "transformer.h.0.mlp.c_proj", os.environ["FOLDER"]
    ids = (torch.arange(32).unsqueeze(1) * 5 + torch.arange(12)) % 16
    data = [{"input_ids": row, "labels": row} for row in ids]

    def loss_of(model: nn.Module) -> float:
        return float(model(input_ids=ids.to(DEVICE), labels=ids.to(DEVICE)).loss)

    def trained(resume: str | None) -> tuple[nn.Module, Any, list[Lifecycle]]:
        torch.manual_seed(0)
        config = transformers.GPT2Config(
            vocab_size=16, n_positions=12, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
        )
        example = {"input_ids": ids[:2], "labels": ids[:2]}
        host = transformers.GPT2LMHeadModel(config)
        model = morphc.compile(host, (), example, config=morphc.Config(**FAST))
        moves: list[Lifecycle] = []
        controller = ScheduleController([(4, Germinate(site, (0,), candidates=2))])
        call = GrowCallback(
            controller,
            loss_of,
            tick_every=2,
            on_event=lambda event: moves.extend(t.target for t in event.transitions if t),
        )
        arguments = transformers.TrainingArguments(
            output_dir=folder, max_steps=40, per_device_train_batch_size=4, learning_rate=3e-3,
            logging_strategy="no", save_steps=16, eval_strategy="steps", eval_steps=8, report_to=[],
            use_cpu=DEVICE.type == "cpu", disable_tqdm=True, ddp_backend=dist.get_backend(),
        )  # fmt: skip
        trainer = transformers.Trainer(
            model=model, args=arguments, train_dataset=data, eval_dataset=data[:8], callbacks=[call]
        )
        trainer.train(resume_from_checkpoint=resume)
        ddp_has_no_slots(trainer.model_wrapped)
        return model, call.grower, moves

    model, grower, moves = trained(None)
    assert moves == WHOLE_LIFE
    assert grower.steps == 40
    assert len(grower.metrics) == 5
    same_on_all(model)
    dist.barrier()
    again, other, _ = trained(f"{folder}/checkpoint-16")
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert other.metrics == grower.metrics


@pytest.mark.parametrize("package", ["transformers", "lightning"])
def test_a_trainer_grows_a_model_on_two_ranks_and_resumes(tmp_path: Path, package: str) -> None:
    pytest.importorskip(package, reason=f"the Trainer is that of {package}: pip install {package}")
    # Both look for what torchrun sets.
    env = {
        "TORCHELASTIC_RUN_ID": "here", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29511",
    }  # fmt: skip
    launch(__file__, f"under_{package}", tmp_path, **env)


# -- Lightning ------------------------------------------------------------------------------------------------


def under_lightning() -> None:
    import lightning.pytorch as lightning
    from torch.utils.data import DataLoader, TensorDataset

    from morphc.integrations.lightning import GrowCallback

    folder = os.environ["FOLDER"]
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(64, 6, generator=draw)
    y = torch.tanh(x @ torch.randn(6, 4, generator=draw))

    class Looks(lightning.Callback):  # type: ignore[misc, name-defined]
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            ddp_has_no_slots(trainer.strategy.model)

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            host = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
            self.net = morphc.compile(host, (x[:2],), config=morphc.Config(**FAST, telemetry_every=1))

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return (self.net(batch[0]) - batch[1]).square().mean()

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            loss = (self.net(batch[0]) - batch[1]).square().mean()
            self.log("val_loss", loss, sync_dist=True)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.net.parameters(), lr=0.01)

    def trained(epochs: int, resume: str | None) -> tuple[nn.Module, Any, list[Lifecycle]]:
        moves: list[Lifecycle] = []
        call = GrowCallback(
            ScheduleController([(4, Germinate("2", (0,), candidates=2))]),
            lambda net: float((net(x.to(DEVICE)) - y.to(DEVICE)).square().mean()),
            metric="val_loss",
            tick_every=2,
            on_event=lambda event: moves.extend(t.target for t in event.transitions if t),
        )
        trainer = lightning.Trainer(
            max_epochs=epochs, accelerator="gpu" if DEVICE.type == "cuda" else "cpu", devices=2, strategy="ddp",
            logger=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
            enable_checkpointing=False, callbacks=[call, Looks()],
        )  # fmt: skip
        module = Module()
        data = TensorDataset(x, y)
        trainer.fit(module, DataLoader(data, batch_size=8), DataLoader(data, batch_size=32), ckpt_path=resume)
        trainer.save_checkpoint(f"{folder}/{epochs}.ckpt")
        return module.net, call.grower, moves

    model, grower, moves = trained(12, None)
    assert moves == WHOLE_LIFE
    assert grower.steps == 48
    assert len(grower.metrics) == 12
    assert everywhere(grower.metrics) == [grower.metrics] * 2
    same_on_all(model)
    trained(5, None)
    dist.barrier()
    again, other, _ = trained(12, f"{folder}/5.ckpt")
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert other.metrics == grower.metrics
