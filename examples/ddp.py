"""Growing on several processes or GPUs with DDP: `torchrun --nproc-per-node 2 examples/ddp.py`, or `python`, for one.

Each rank trains on its own part of every batch. The Grower puts measurements together and averages the gradients of the
slots, rank 0 decides, and nothing is wrapped again when a seed grows. Some seconds on a CPU, where gloo connects ranks.
"""

import gc
import os
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

STEPS, ROWS = 800, 64

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 4))
example_inputs = (torch.zeros(2, 8),)


@cache
def teacher() -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    made = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4)).requires_grad_(False)
    for parameter in made.parameters():
        parameter.uniform_(-0.35, 0.35, generator=generator)
    return made


def batch(step: int, rows: int = ROWS) -> tuple[Tensor, Tensor]:
    x = torch.randn(rows, 8, generator=torch.Generator().manual_seed(step))
    return x, teacher()(x)


def main() -> None:
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    on_gpu = torch.cuda.device_count() >= ranks
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    if ranks > 1:
        dist.init_process_group("nccl" if on_gpu else "gloo")
    train(rank, ranks, device)
    if ranks > 1:
        # What DDP wrapped ends before its group does: torch may wait for ever the other way round.
        gc.collect()
        dist.barrier()
        dist.destroy_process_group()


def train(rank: int, ranks: int, device: torch.device) -> None:
    import morphc

    # Ticks are shortened: a run of this size has no time for the defaults.
    config = morphc.Config(
        seeds_per_layer=4,
        slots=4,
        rank=8,
        blueprint="widen",
        telemetry_every=4,
        minimum_ticks=(8, 2, 2, 2, 8),
        graft_ticks=4,
        min_final_stability=0.5,
    )
    grown = morphc.compile(model.to(device), tuple(x.to(device) for x in example_inputs), config=config)
    run = DistributedDataParallel(grown) if ranks > 1 else grown
    optimizer = torch.optim.AdamW(run.parameters(), lr=1e-2)

    def loss_of(net: nn.Module, step: int, rows: int = ROWS) -> Tensor:
        x, y = (whole.chunk(ranks)[rank].to(device) for whole in batch(step, rows))
        return (net(x) - y).square().mean()

    @torch.no_grad()
    def validation(net: nn.Module) -> float:
        return float(loss_of(net, -1, 1024))  # of this rank's part: the Grower takes the mean

    controller = morphc.PlateauController(patience=1, threshold=0.05, candidates=2)
    grower = morphc.Grower(run, optimizer, controller, validation, tick_every=4)
    (before,) = grower.ranks.mean([validation(grown)])
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(run, step)
        loss.backward()
        optimizer.step()
        event = grower.step(loss)
        if (step + 1) % 40 == 0:
            event = grower.epoch(validation(grown)) or event
        if rank == 0:
            for transition in event.transitions:
                if transition:
                    print(f"step {step + 1:3d}  {transition}")
    plain = morphc.fold(grown)
    (after,) = grower.ranks.mean([validation(plain)])
    if rank == 0:
        size = sum(p.numel() for p in plain.parameters())
        print(
            f"{ranks} ranks   validation loss {before:.4f} -> {after:.4f}   {size} parameters after folding"
        )


if __name__ == "__main__":
    main()
