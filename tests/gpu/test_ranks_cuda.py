"""Two ranks with a GPU each, over nccl: what tests/ranks does with gloo on a CPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "ranks"))

from rank_helpers import HERE, launch

pytestmark = pytest.mark.skipif(
    torch.cuda.device_count() < 2,
    reason=f"needs two CUDA devices, and this machine has {torch.cuda.device_count()}",
)


@pytest.mark.parametrize(
    ("file", "function"),
    [
        ("test_ddp", "a_seed_from_germination_to_fossil"),
        ("test_ddp", "what_is_sent"),
        ("test_ddp", "going_back"),
        ("test_ddp", "recycled_alike"),
        ("test_ddp", "disagreements"),
        ("test_fsdp", "from_germination_to_fossil"),
        ("test_fsdp", "other_types"),
        ("test_tensor_parallel", "columns_then_rows"),
        ("test_trainers", "under_transformers"),
    ],
)
def test_ranks_grow_alike(tmp_path: Path, file: str, function: str) -> None:
    launch(str(HERE / f"{file}.py"), function, tmp_path, RANKS_ON="cuda")


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_checkpoints_are_written_and_gone_on_from(tmp_path: Path, kind: str) -> None:
    for _ in range(2):
        launch(str(HERE / "test_dcp.py"), "run", tmp_path, RANKS_ON="cuda", KIND=kind)
