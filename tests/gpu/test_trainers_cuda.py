"""The Trainers on a GPU: their own autocast, and the scaler that they bring."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import morphc
from morphc import Lifecycle

sys.path.append(str(Path(__file__).parents[1] / "integrations"))

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA device, and this machine has none"
)
ALL_THE_WAY = [Lifecycle(number) for number in range(1, 8)]


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_transformers_trainer(tmp_path: Path, precision: str) -> None:
    pytest.importorskip("transformers", reason="the Trainer is transformers': pip install 'morphc[hf]'")
    import test_hf as hf

    moves: list[Lifecycle] = []
    model = hf.grown().cuda()
    call = hf.callback(
        trainer=None, on_event=lambda event: moves.extend(t.target for t in event.transitions if t)
    )
    call.evaluate = lambda net: float(net(input_ids=hf.IDS.cuda(), labels=hf.IDS.cuda()).loss)
    options = {precision: True, "use_cpu": False, "save_strategy": "no"}
    trainer = hf.trainer_of(tmp_path, model, call, **options)
    trainer.train()
    assert moves == ALL_THE_WAY
    # What it was told is the loss itself, not the scaled one.
    assert call.grower.losses.latest < 4.0
    assert (call.grower.scaler is not None) == (precision == "fp16")
    model.eval()
    # The Trainer leaves its autocast around the model's forward; the small modules of a fold round in it.
    away = 1e-2 if precision == "bf16" else 2e-3
    torch.testing.assert_close(
        morphc.fold(model)(hf.IDS.cuda()).logits, model(hf.IDS.cuda()).logits, rtol=away, atol=away
    )


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
@pytest.mark.parametrize("manual", [False, True])
def test_lightning_trainer(tmp_path: Path, precision: str, manual: bool) -> None:
    pytest.importorskip(
        "lightning.pytorch", reason="the Trainer is Lightning's: pip install 'morphc[lightning]'"
    )
    import test_lightning as pl

    class Unclipped(pl.Module):
        # Lightning clips scaled gradients itself only with automatic optimization.
        def clip_gradients(self, *args: object, **kwargs: object) -> None:
            pass

    moves: list[Lifecycle] = []
    call = pl.callback(on_event=lambda event: moves.extend(t.target for t in event.transitions if t))
    call.evaluate = lambda net: float((net(pl.X.cuda()) - pl.Y.cuda()).square().mean())
    module = Unclipped(pl.net(backend="auto"), manual)
    pl.fit(tmp_path, module, call, accelerator="gpu", devices=1, precision=precision)
    assert moves == ALL_THE_WAY
    assert (call.grower.scaler is not None) == (precision == "16-mixed")
