"""Masks stay in the layout that they were made in, which Triton before 3.8 asks for: see `compile_worker.exchanged`."""

from __future__ import annotations

import pytest
import torch

from morphc.kernels import telemetry
from morphc.kernels.compile import Job, Resources, compile_all
from morphc.kernels.compile_worker import exchanged
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


ORDERED_TWICE = """
\tselp.b32 \t%r7627, 12576, 30052, %p2515;
\tprmt.b32 \t%r7628, %r7625, %r7626, %r7627;
"""


def test_what_is_looked_for() -> None:
    """Byte by byte, by an order that hangs on the lane; not halves of a register, nor in an order that is fixed."""
    assert exchanged(ORDERED_TWICE, "3.6.0")
    assert exchanged(ORDERED_TWICE, "3.7.1+git")
    assert not exchanged(ORDERED_TWICE, "3.8.0")
    assert not exchanged(ORDERED_TWICE.replace("12576", "21520").replace("30052", "30258"), "3.6.0")
    assert not exchanged(ORDERED_TWICE.replace("%r7627;", "0x3120U;"), "3.6.0")
