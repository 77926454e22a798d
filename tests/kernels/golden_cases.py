"""The kernels whose generated files are kept in tests/golden: of every template a few."""

from __future__ import annotations

from pathlib import Path

import msgspec
import torch

from morphc.kernels import active, gradient, lifecycle, tap, tap_join, telemetry, training
from morphc.kernels.codegen import Source
from morphc.kernels.spec import KernelSpec

KEPT = Path(__file__).parent.parent / "golden"

WIDE = KernelSpec(
    kind="forward",
    features=4096,
    seeds=1024,
    chunk=4,
    slots=102,
    rank=16,
    blueprint="bottleneck",
    blend="residual",
    epilogue=None,
    layout="last",
    dtype="bfloat16",
)
"""A layer of the size that kernels are made for: small chunks, several of which share a dot."""

UNEVEN = msgspec.structs.replace(WIDE, features=103, seeds=10, chunk=11, slots=4, rank=5, dtype="float32")
"""Nothing divides anything."""

IMAGE = msgspec.structs.replace(
    WIDE, features=64, seeds=16, slots=4, layout="channels_first", dtype="float16"
)
"""Behind a convolution."""


LOWRANK = tap_join.TapShape(tap=1024)


def sources() -> dict[str, Source]:
    """Name of the kept file -> source."""
    replace = msgspec.structs.replace
    lowrank = replace(WIDE, blueprint="lowrank")
    found = [
        active.list_source(),
        active.source(WIDE),
        active.source(replace(UNEVEN, blend="gate")),
        active.source(replace(IMAGE, blueprint="affine", blend="multiply")),
        gradient.source(replace(WIDE, kind="backward"), False),
        gradient.source(replace(IMAGE, kind="backward", blueprint="affine", blend="multiply"), False),
        training.source(replace(UNEVEN, kind="train", blend="lerp"), False),
        telemetry.source(telemetry.spec_of(4096, 1024, torch.bfloat16)),
        telemetry.source(telemetry.spec_of(103, 10, torch.float32, epilogue="relu")),
        telemetry.source(telemetry.spec_of(64, 16, torch.float16, "channels_first")),
        tap.tap_source(replace(lowrank, kind="tap"), 1024, 1, False, True, False),
        tap_join.join_source(replace(lowrank, kind="join"), LOWRANK),
        tap_join.backward_source(replace(lowrank, kind="backward"), LOWRANK, False),
        lifecycle.lifecycle_job(False).source,
        lifecycle.report_job().source,
    ]
    named = {source.name: source for source in found}
    assert len(named) == len(found), "two have one name"
    return named
