"""The states of all seeds on the host: one copy from the device, kept until a state changes."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from morphc.runtime.state import SeedState

COLUMNS: Final = (
    "lifecycle",
    "slot",
    "ticks_in_state",
    "graft",
    "parent_state",
    "error_count",
    "embargo",
    "transitions",
)
WATCHED: Final = (*COLUMNS, "alpha", "tick")


class Mirror:
    """Columns [N] int32 as in `SeedState`, `alpha` [N] float32 and the number of the last tick."""

    def __init__(self, columns: npt.NDArray[np.int32], versions: tuple[object, ...]) -> None:
        self.lifecycle, self.slot, self.ticks_in_state, self.graft = columns[:4]
        self.parent_state, self.error_count, self.embargo, self.transitions = columns[4:8]
        self.alpha = columns[8].view(np.float32)
        self.tick = int(columns[9][0]) if columns.shape[1] else 0
        self.versions = versions


def versions_of(state: SeedState) -> tuple[object, ...]:
    """Changes whenever one of the mirrored tensors is replaced or written to."""
    buffers = state._buffers  # `get_buffer` takes ten times as long, and this is asked many times a tick
    tensors = [buffers[name] for name in WATCHED]
    return tuple([(id(tensor), tensor._version) for tensor in tensors])  # type: ignore[union-attr]


@torch.no_grad()
def read(state: SeedState, known: Mirror | None = None) -> Mirror:
    """`known` if it still holds, else one copy from the device."""
    versions = versions_of(state)
    if known is not None and known.versions == versions:
        return known
    columns = [state.get_buffer(name) for name in COLUMNS]
    tick = state.tick.to(torch.int32).expand(state.lifecycle.shape[0])
    packed = torch.stack((*columns, state.alpha.view(torch.int32), tick)).cpu()
    array: Any = packed.numpy()
    return Mirror(array, versions)


def touched(state: SeedState) -> None:
    """Say that a kernel has written to the state: it doesn't count as a change by itself."""
    torch.autograd.graph.increment_version(
        tuple(state.get_buffer(name) for name in (*COLUMNS, "alpha", "tick", "history"))
    )
