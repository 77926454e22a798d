"""Growing a model whose parameters are sharded: `torchrun --nproc-per-node 2 examples/fsdp2.py --out checkpoints`.

`fully_shard` shards the host; slots are few and stay whole on every rank. With `--out` there is a checkpoint at every
200th step, and a run that was stopped or killed goes on from the last one, also on another number of ranks. In the end
rank 0 gathers the model and folds it. By `python examples/fsdp2.py` it is one rank. Some seconds on a CPU.
"""

import argparse
import os
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

STEPS, ROWS = 800, 64


class Net(nn.Module):
    """Two residual blocks that are too narrow for their teacher."""

    def __init__(self, width: int = 8, inner: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, inner), nn.ReLU(), nn.Linear(inner, width)) for _ in range(2)
        )
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


torch.manual_seed(0)
model = Net()
example_inputs = (torch.zeros(2, 8),)


@cache
def teacher() -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    made = Net(inner=32).requires_grad_(False)
    for parameter in made.parameters():
        parameter.uniform_(-0.35, 0.35, generator=generator)
    return made


def batch(step: int, rows: int = ROWS) -> tuple[Tensor, Tensor]:
    x = torch.randn(rows, 8, generator=torch.Generator().manual_seed(step))
    return x, teacher()(x)


def main() -> None:
    import morphc

    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--out", type=Path, help="folder of the checkpoints; one that has some is gone on from"
    )
    options = parser.parse_args()
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    on_gpu = torch.cuda.device_count() >= ranks
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if on_gpu else "gloo")
    else:
        dist.init_process_group("nccl" if on_gpu else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from morphc.integrations import dcp

    # Ticks are shortened: a run of this size has no time for the defaults.
    config = morphc.Config(
        seeds_per_layer=2,
        slots=2,
        rank=8,
        blueprint="widen",
        telemetry_every=4,
        minimum_ticks=(8, 2, 2, 2, 8),
        graft_ticks=4,
        min_final_stability=0.5,
    )
    grown = morphc.compile(model.to(device), tuple(x.to(device) for x in example_inputs), config=config)
    mesh = init_device_mesh(device.type, (ranks,))
    for block in grown.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(grown, mesh=mesh)
    optimizer = torch.optim.AdamW(grown.parameters(), lr=1e-2)

    def loss_of(net: nn.Module, step: int, rows: int = ROWS) -> Tensor:
        x, y = (whole.chunk(ranks)[rank].to(device) for whole in batch(step, rows))
        return (net(x) - y).square().mean()

    @torch.no_grad()
    def validation(net: nn.Module) -> float:
        return float(loss_of(net, -1, 1024))  # of this rank's part: the Grower takes the mean

    controller = morphc.PlateauController(patience=1, threshold=0.05)
    grower = morphc.Grower(grown, optimizer, controller, validation, tick_every=4)
    first = 0
    last = dcp.latest(options.out) if options.out is not None else None
    if last is not None:
        first = dcp.load(grower, last)["step"]
    (before,) = grower.ranks.mean([validation(grown)])
    for step in range(first, STEPS):
        optimizer.zero_grad()
        loss = loss_of(grown, step)
        loss.backward()
        optimizer.step()
        event = grower.step(loss)
        if (step + 1) % 40 == 0:
            event = grower.epoch(validation(grown)) or event
        for transition in event.transitions if rank == 0 else ():
            if transition:
                print(f"step {step + 1:3d}  {transition}")
        if options.out is not None and (step + 1) % 200 == 0:
            dcp.save(grower, options.out / f"step-{step + 1}", step=step + 1)
    (after,) = grower.ranks.mean([validation(grown)])

    gathered = get_model_state_dict(grown, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        whole = morphc.compile(Net(), example_inputs, config=config)
        whole.load_state_dict(gathered)
        plain = morphc.fold(whole)
        size = sum(p.numel() for p in plain.parameters())
        x, y = batch(-1, 1024)
        folded = float((plain(x) - y).square().mean().detach())
        print(f"{ranks} ranks, from step {first}   validation loss {before:.4f} -> {after:.4f}")
        print(f"folded: {size} parameters, validation loss {folded:.4f}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
