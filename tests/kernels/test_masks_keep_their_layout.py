"""Masks stay in the layout that they were made in, which Triton 3.6 asks for: see `compile_worker.exchanged`."""

from __future__ import annotations

import pytest
import torch

from morphc.kernels import telemetry
from morphc.kernels.compile import Job, Resources, compile_all
from morphc.kernels.spec import TuneConfig


def jobs_of(dtype: torch.dtype) -> list[Job]:
    """Telemetry of even and uneven chunks, with few warps: then a warp has as many chunks as a tile."""
    made = []
    for seeds in (64, 61):
        spec = telemetry.spec_of(1024, seeds, dtype)
        for warps in (1, 2, 4):
            made.append(telemetry.job(spec, TuneConfig(8, 256, warps, 2, splits=66)))
    return made


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_telemetry_moves_no_mask(dtype: torch.dtype) -> None:
    for found in compile_all(jobs_of(dtype)):
        assert isinstance(found, Resources)
        assert not found.problem
