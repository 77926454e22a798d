"""Two processes of one machine that train together, over gloo; each runs a function of a test file by name."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

import morphc
from morphc import Config
from morphc.lifecycle import Lifecycle

HERE = Path(__file__).parent
ON_GPU = os.environ.get("RANKS_ON") == "cuda"
DEVICE = torch.device("cuda", int(os.environ["RANK"])) if ON_GPU else torch.device("cpu")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(6, 12)
        self.fc2 = nn.Linear(12, 4)
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.fc2(torch.relu(self.fc1(x)))


def batch(step: int, rows: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(rows, 6, generator=generator)
    return x.to(DEVICE), (torch.sin(2 * x[:, :4]) + x[:, 2:]).to(DEVICE)


def part(tensors: tuple[Tensor, ...]) -> list[Tensor]:
    """This rank's rows of a batch; all of them without ranks."""
    if not dist.is_initialized():
        return list(tensors)
    return [tensor.chunk(dist.get_world_size())[dist.get_rank()] for tensor in tensors]


def compiled(**options: object) -> nn.Module:
    torch.manual_seed(0)
    given: dict[str, object] = {
        "seeds_per_layer": 4, "slots": 2, "rank": 2, "blueprint": "bottleneck", "telemetry_every": 1,
        "isolation_every": 1, "minimum_ticks": (1, 1, 1, 1, 1), "graft_ticks": 2, "embargo_ticks": 2,
        "min_isolated_improvement": 0.0, "min_contribution": -1.0, "min_improvement": -1.0, "min_stability": 0.0,
    }  # fmt: skip
    return morphc.compile(Net().to(DEVICE), (batch(0)[0],), config=Config(**(given | options)))


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return (model(x) - y).square().mean()


def validation(model: nn.Module) -> float:
    return float(loss_of(model, *part(batch(1000, 32))))


def slots_of(model: nn.Module) -> dict[str, Tensor]:
    """The weights in all slots, and the states."""
    seeds = morphc.seeds(model)
    found = {
        f"{path}/{name}/{key}": tensor.detach().clone()
        for path, site in seeds.sites.items()
        for name, bank in site.slots.items()
        for key, tensor in bank.named_parameters()
    }
    return found | {
        "lifecycle": seeds._store.state.lifecycle.clone(),
        "alpha": seeds._store.state.alpha.clone(),
    }


def everywhere(value: object) -> list[object]:
    found: list[object] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def same_on_all(model: nn.Module) -> None:
    first, *others = everywhere(slots_of(model))
    assert isinstance(first, dict)
    for other in others:
        assert isinstance(other, dict)
        for name, value in first.items():
            assert torch.equal(value, other[name]), name


def states(model: nn.Module) -> set[Lifecycle]:
    return {Lifecycle(int(value)) for value in morphc.seeds(model)._store.state.lifecycle}


def launch(
    file: str, function: str, folder: Path, ranks: int = 2, wait: bool = True, **more: str
) -> list[subprocess.Popen[str]]:
    """Run `function` of a test file in so many processes, rendezvous by a file; asserts that all end well.

    more: environment variables; RANKS_ON=cuda gives each process a GPU, and nccl instead of gloo.
    """
    store = folder / f"store-{function}-{len(list(folder.iterdir()))}"
    code = (
        f"import sys; sys.path[:0] = [{str(HERE)!r}]\n"
        "import torch, torch.distributed as dist, os\n"
        "torch.set_num_threads(1)\n"
        f"where, rank = 'file://{store}', int(os.environ['RANK'])\n"
        "on_gpu = os.environ.get('RANKS_ON') == 'cuda'\n"
        "torch.cuda.set_device(rank) if on_gpu else None\n"
        "backend = 'nccl' if on_gpu else 'gloo'\n"
        f"dist.init_process_group(backend, init_method=where, rank=rank, world_size={ranks})\n"
        f"import {Path(file).stem} as tests\n"
        f"tests.{function}()\n"
        # What is wrapped ends before its group: torch may wait for ever the other way round.
        "import gc; gc.collect()\n"
        "dist.barrier(); dist.destroy_process_group()\n"
        # At the end of an interpreter gloo's threads now and then end the process first.
        "sys.stdout.flush(); os._exit(0)\n"
    )
    env = {**os.environ, "OMP_NUM_THREADS": "1", "FOLDER": str(folder), "WORLD_SIZE": str(ranks), **more}
    env.pop("TRITON_INTERPRET", None)
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    if wait:
        told = [process.communicate(timeout=120)[0] for process in running]
        assert [process.returncode for process in running] == [0] * ranks, "\n".join(told)
    return running
