"""State of all seeds as a structure of arrays: one row per seed, in the order of the sites."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from morphc.kernels.reference.health import (
    NONFINITE,
    PEAK,
    ROW_SQUARES,
    ROWS,
    SHIFT,
    SQUARES,
    SUM,
    ZEROS,
    health,
)
from morphc.kernels.reference.lifecycle import HISTORY
from morphc.kernels.reference.telemetry import Sums
from morphc.kernels.reference.telemetry_cpu import Array, Floats, Ints, center_of, cut_of, first_shift
from morphc.runtime.devicegauge import Pending
from morphc.runtime.meta import refuses, started

if TYPE_CHECKING:
    from morphc.runtime.store import SeedStore

INT_ARRAYS: Final = (
    "lifecycle",
    "slot",
    "ticks_in_state",
    "graft",
    "parent_state",
    "error_count",
    "embargo",
)
FLOAT_ARRAYS: Final = ("alpha", "score")
_STARTS: Final = {"slot": -1, "graft": -1, "history": -1}
"""What is not zero in a seed that nothing has happened to yet."""


class SeedState(nn.Module):
    """Buffers [N]; `history` [N, 10, 3] holds (tick, from, to), a ring that `transitions` counts, or -1.

    Their types never change: `.half()` and `.to(dtype)` move them and leave the numbers alone. Whatever takes them off
    the meta device gives them the values of a fresh compile.
    """

    lifecycle: Tensor
    slot: Tensor
    ticks_in_state: Tensor
    graft: Tensor
    parent_state: Tensor
    error_count: Tensor
    embargo: Tensor
    alpha: Tensor
    score: Tensor
    history: Tensor
    transitions: Tensor
    tick: Tensor
    sums: Tensor
    counts: Tensor
    widths: Tensor

    def __init__(self, widths: Sequence[int], device: torch.device | None = None) -> None:
        super().__init__()
        count = len(widths)
        self.features = tuple(widths)  # the buffer's values, for when it leaves the meta device
        ints: dict[str, Any] = {"dtype": torch.int32, "device": device}
        for name in INT_ARRAYS:
            self.register_buffer(name, torch.zeros(count, **ints))
        for name in FLOAT_ARRAYS:
            self.register_buffer(name, torch.zeros(count, dtype=torch.float32, device=device))
        self.register_buffer("history", torch.zeros(count, HISTORY, 3, **ints))
        self.register_buffer("transitions", torch.zeros(count, **ints))
        self.register_buffer("tick", torch.zeros((), dtype=torch.int64, device=device))
        self.register_buffer("sums", torch.zeros(8, count, dtype=torch.float64, device=device))
        self.register_buffer("counts", torch.zeros(3, count, dtype=torch.int64, device=device))
        self.register_buffer(
            "widths", torch.tensor(widths, dtype=torch.int32, device=device), persistent=False
        )
        for name, value in _STARTS.items():
            self.get_buffer(name).fill_(value)
        self.store: SeedStore | None = None
        self.window = 0
        self.pending = Pending()
        self.register_state_dict_pre_hook(_settle)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_settle)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(_loaded)  # type: ignore[no-untyped-call]

    def settle(self) -> None:
        """Bring `sums` and `counts` up to date with what was measured or put aside. Waits for no device."""
        self.pending.settle()

    def __getstate__(self) -> dict[str, Any]:
        self.settle()
        return self.__dict__.copy()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SeedState:
        self.settle()
        was_on_meta = self.on_meta
        if was_on_meta and self.store is not None and refuses(fn, self.tick):
            self.store.leave_meta()
        for name, buffer in self._buffers.items():
            if buffer is None:
                continue
            moved = started(fn, buffer, _STARTS.get(name, 0))
            if moved.dtype != buffer.dtype:
                moved = moved.to(buffer.dtype) if buffer.is_meta else buffer.to(moved.device)
            if name == "widths" and buffer.is_meta and not moved.is_meta:
                moved = torch.tensor(self.features, dtype=buffer.dtype, device=moved.device)
            self._buffers[name] = moved
        if self.store is not None and self.on_meta is not was_on_meta:
            self.window += 1
            self.store.refresh_modes()  # what the seeds were told before is gone with the values
        return self

    @property
    def on_meta(self) -> bool:
        """Whether any of the arrays has no values yet."""
        return any(buffer.is_meta for buffer in self._buffers.values() if buffer is not None)

    def reset_parameters(self) -> None:
        """Nothing: what leaves meta starts by itself. Whoever materialises a model module by module calls it."""

    def reset_telemetry(self) -> None:
        """Begin a new window."""
        self.settle()
        self.window += 1
        self.sums.zero_()
        self.counts.zero_()

    def health(self) -> Tensor:
        """[len(HEALTH), N] float64, derived from the window's sums."""
        self.settle()
        return health(self.sums, self.counts, self.widths)


def merge(kept: Tensor, counts: Tensor, widths: Tensor, new: Sums) -> None:
    """Add `new` to the views `kept` [8, S] and `counts` [3, S]: move its sums to the kept shift, then add.

    With d = new.shift - kept shift:  sum of (x - s) = total + n d,  sum of (x - s)^2 = squares + 2 d total +
    n d^2, and for a row of C values (row + C d)^2 likewise.
    """
    fresh = counts[ROWS] * widths == counts[NONFINITE]
    kept[SHIFT].copy_(torch.where(fresh, new.shift, kept[SHIFT]))
    d = new.shift - kept[SHIFT]
    nd = new.finite * d
    kept[SUM] += new.total + nd
    kept[SQUARES] += new.squares + d * (2 * new.total + nd)
    wide = widths * d
    kept[ROW_SQUARES] += new.row_squares + wide * (2 * new.total + new.rows * wide)
    kept[ZEROS] += new.zeros
    torch.maximum(kept[PEAK], new.peak, out=kept[PEAK])
    counts[ROWS] += new.rows
    counts[NONFINITE] += new.nonfinite


def center_host(kept: Floats, counts: Ints, values: Array, seeds: int) -> Array | None:
    """The shift to measure around, as [F], or None for zero; seeds that have measured nothing yet take theirs
    from `values` [rows, F].
    """
    shift, cut = kept[SHIFT], cut_of(values.shape[1], seeds)
    fresh = counts[ROWS] * cut.widths == counts[NONFINITE]
    if fresh.any():
        first = first_shift(values, cut)
        np.copyto(shift, first, where=fresh & np.isfinite(first))
    return center_of(shift, cut, values.dtype)


def _settle(state: nn.Module, *_: object) -> None:
    assert isinstance(state, SeedState)
    state.settle()


def _loaded(state: nn.Module, incompatible: Any) -> None:
    """The host's mirror of the states follows what was loaded. A command: it may read the device."""
    assert isinstance(state, SeedState)
    state.window += 1
    if state.store is not None:
        state.store.leave_meta()  # with assign=True a checkpoint of the host alone brings no values for the seeds
        state.store.refresh_modes()
