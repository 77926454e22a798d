"""A network that grows inside Lightning's Trainer: `python examples/lightning_loop.py`, some seconds on a CPU.

Without Lightning it says what to install. The checkpoint that Lightning writes holds the seeds too, so `fit` with
`ckpt_path=` goes on where it was.
"""

import logging
import tempfile
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
example_inputs = (torch.zeros(32, 16),)


def data(rows: int, seed: int) -> TensorDataset:
    """A random teacher of 32 tanh units, the same for every seed."""
    draw = torch.Generator().manual_seed(1)
    inner, outer = torch.randn(16, 32, generator=draw) / 3, torch.randn(32, 4, generator=draw) / 3
    x = torch.randn(rows, 16, generator=draw.manual_seed(seed))
    return TensorDataset(x, torch.tanh(x @ inner) @ outer)


def main() -> None:
    try:
        from lightning import pytorch as lightning
    except ImportError:
        print("this example needs Lightning: pip install 'morphc[lightning]'")
        return
    import morphc
    from morphc.integrations.lightning import GrowCallback

    class Regression(lightning.LightningModule):  # type: ignore[misc]
        """Any LightningModule: the compiled model is one of its attributes."""

        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return (self.net(batch[0]) - batch[1]).square().mean()

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", (self.net(batch[0]) - batch[1]).square().mean())

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=3e-3)

    # Ticks are shortened: a run of this size has no time for the defaults.
    config = morphc.Config(
        seeds_per_layer=4,
        slots=4,
        rank=8,
        blueprint="widen",
        minimum_ticks=(10, 6, 3, 3, 40),
        graft_ticks=5,
        min_final_stability=0.5,
    )
    train, held_out = data(2048, seed=2), data(1024, seed=3)
    x, y = held_out.tensors

    def validation_loss(net: nn.Module) -> float:
        return float((net(x) - y).square().mean())

    grow = GrowCallback(
        morphc.PlateauController(patience=1, threshold=0.1, seeds=2, most=2, candidates=2),
        validation_loss,
        metric="val_loss",
        tick_every=4,
        on_event=lambda event: [print(f"step {event.step:4d}  {t}") for t in event.transitions if t],
    )
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    module = Regression(morphc.compile(model, example_inputs, config=config))
    with tempfile.TemporaryDirectory() as folder:
        trainer = lightning.Trainer(
            max_epochs=40,
            accelerator="cpu",
            accumulate_grad_batches=2,
            gradient_clip_val=1.0,
            default_root_dir=folder,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[grow],
        )
        trainer.fit(module, DataLoader(train, 32, shuffle=True), DataLoader(held_out, 1024))
    plain = morphc.fold(module.net)
    with torch.no_grad():
        print(f"\nfolded: {plain[0].out_features} hidden units, validation loss {validation_loss(plain):.4f}")


if __name__ == "__main__":
    main()
