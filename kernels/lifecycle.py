"""`lifecycle` and `report`: one launch each for all seeds of a device.

A tick reads the state, its age and the embargo of every seed, writes the age, and touches the rest only of seeds
that graft or move: 16 bytes a seed, 21 with requests. `morphc.kernels.reference.lifecycle` says what it does.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final

import torch
from torch import Tensor

from morphc.errors import SeedError
from morphc.kernels import codegen, launch
from morphc.kernels.compile import Job
from morphc.kernels.reference import health as rows
from morphc.kernels.reference import lifecycle as reference
from morphc.kernels.reference.lifecycle import Policy, Refusal, SeedArrays
from morphc.kernels.spec import KernelSpec
from morphc.lifecycle import BLENDS, HOLDS_SLOT, Lifecycle

BLOCK: Final = 1024
WARPS: Final = 8
REPORT_BLOCK: Final = 256
REPORT_WARPS: Final = 4

SUMS: Final = {
    "shift": rows.SHIFT,
    "deviations": rows.SUM,
    "squares": rows.SQUARES,
    "row_squares": rows.ROW_SQUARES,
    "zeros": rows.ZEROS,
    "peak": rows.PEAK,
    "grad_squares": rows.GRAD_SQUARES,
    "saliency": rows.SALIENCY,
}
COUNTS: Final = {"rows": rows.ROWS, "nonfinite": rows.NONFINITE, "grad_samples": rows.GRAD_SAMPLES}

_ARRAYS: Final = {
    "lifecycle_ptr": "*i32",
    "slot_ptr": "*i32",
    "ticks_ptr": "*i32",
    "graft_ptr": "*i32",
    "parent_ptr": "*i32",
    "error_ptr": "*i32",
    "embargo_ptr": "*i32",
    "alpha_ptr": "*fp32",
    "history_ptr": "*i32",
    "transitions_ptr": "*i32",
    "ramp_ptr": "*fp32",
}
_REQUESTS: Final = {"request_ptr": "*i32", "refused_ptr": "*i8", "minimum_ptr": "*i32"}
_NUMBERS: Final = {
    "tick_ptr": "*i64",
    "ticket_ptr": "*i32",
    "curves": "i32",
    "duration": "i32",
    "hold": "i32",
    "seeds": "i32",
}
_REPORT: Final = {
    "sums_ptr": "*fp64",
    "counts_ptr": "*i64",
    "widths_ptr": "*i32",
    "health_ptr": "*fp64",
    "seeds": "i32",
}


def _spec(kind: str, dtype: str) -> KernelSpec:
    return KernelSpec(
        kind=kind,
        features=0,
        seeds=0,
        chunk=0,
        slots=0,
        rank=0,
        blueprint="",
        blend="",
        epilogue=None,
        layout="last",
        dtype=dtype,
    )


def _names(states: int) -> list[str]:
    """The states of a set given as bits."""
    return [state.name for state in Lifecycle if states >> state & 1]


@lru_cache(maxsize=2)
def lifecycle_job(requested: bool) -> Job:
    """The lifecycle kernel; with `requested` it also does what is asked of single seeds."""
    source = codegen.render(
        "lifecycle.py.jinja",
        _spec("lifecycle_requests" if requested else "lifecycle", "int32"),
        requested=requested,
        moves=[
            (state.name, followers, _names(followers))
            for state, followers in zip(Lifecycle, reference.TARGETS, strict=True)
        ],
        sets={
            "lapses": _names(reference.LAPSES),
            "waits": _names(reference.WAITS),
            "embargoed": _names(reference.EMBARGOED),
            "barred": _names(reference.BARRED),
            "at_once": _names(reference.AT_ONCE),
            "failures": _names(reference.FAILURES),
            "blends": _names(BLENDS),
            "holds_slot": _names(HOLDS_SLOT),
        },
        states={state.name: int(state) for state in Lifecycle},
        refusals={refusal.name: int(refusal) for refusal in Refusal},
        graft={
            "curve_shift": reference.CURVE_SHIFT,
            "curve_mask": reference.CURVE_MASK,
            "paused": reference.PAUSED,
            "pause_shift": reference.PAUSE_SHIFT,
            "pauses": reference.PAUSES,
            "choice": reference.CHOICE,
        },
        depth=reference.HISTORY,
    )
    arrays = _ARRAYS | _REQUESTS if requested else _ARRAYS
    options = {"num_warps": WARPS}
    return Job(source, "lifecycle", arrays | _NUMBERS, {"BLOCK": BLOCK}, tuple(arrays), options)


@lru_cache(maxsize=1)
def report_job() -> Job:
    """The report kernel."""
    source = codegen.render(
        "report.py.jinja",
        _spec("report", "float64"),
        sums=SUMS,
        counts=COUNTS,
        health={name: row for row, name in enumerate(rows.HEALTH)},
    )
    pointers = tuple(name for name in _REPORT if name.endswith("_ptr"))
    options = {"num_warps": REPORT_WARPS}
    return Job(source, "report", _REPORT, {"BLOCK": REPORT_BLOCK}, pointers, options)


@lru_cache(maxsize=64)
def _lifecycle(requested: bool, aligned: bool, device: torch.device) -> launch.Prepared:
    return launch.prepare_job(lifecycle_job(requested), device, aligned=aligned)


@lru_cache(maxsize=64)
def _report(aligned: bool, device: torch.device) -> launch.Prepared:
    return launch.prepare_job(report_job(), device, aligned=aligned)


class Ticker:
    """Advances all seeds of one device, one tick a call. The device is that of the policy's tensors."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        device = policy.ramp.device
        # Programs that have finished; its own, so that two models on one device can tick at once.
        self._ticket = torch.zeros(1, dtype=torch.int32, device=device)
        self._refused = torch.empty(0, dtype=torch.int8, device=device)

    def advance(self, arrays: SeedArrays, request: Tensor | None = None) -> Tensor | None:
        """One tick, in place; `refused` [N] int8 (see `Refusal`) if there was a `request`.

        request: [N] int32, the state that each seed is to go to, negative for none. `refused` is overwritten by
        the next call that has one. Nothing waits for the device. Raises SeedError for a request of another
        shape, dtype or device.
        """
        policy = self.policy
        seeds = arrays.lifecycle.shape[0]
        device = policy.ramp.device
        used: tuple[Tensor, ...] = (
            arrays.lifecycle,
            arrays.slot,
            arrays.ticks_in_state,
            arrays.graft,
            arrays.parent_state,
            arrays.error_count,
            arrays.embargo,
            arrays.alpha,
            arrays.history,
            arrays.transitions,
            policy.ramp,
        )
        if request is not None:
            _check(request, seeds, device)
            if self._refused.shape[0] != seeds:
                self._refused = torch.empty(seeds, dtype=torch.int8, device=device)
            used += (request, self._refused, policy.minimum)
        kernel = _lifecycle(request is not None, launch.aligned(used), device)
        kernel(
            (max(1, -(-seeds // BLOCK)), 1, 1),
            *used,
            arrays.tick,
            self._ticket,
            policy.ramp.shape[0],
            policy.ramp.shape[1] - 1,
            policy.embargo,
            seeds,
        )
        return self._refused if request is not None else None


def _check(request: Tensor, seeds: int, device: torch.device) -> None:
    fits = request.dtype == torch.int32 and request.shape == (seeds,) and request.device == device
    if not (fits and request.is_contiguous()):
        raise SeedError(
            f"request must be a contiguous int32 tensor of {seeds} states on {device}, one a seed; got "
            f"{tuple(request.shape)} {request.dtype} on {request.device}"
        )


def report(sums: Tensor, counts: Tensor, widths: Tensor) -> Tensor:
    """[len(HEALTH), N] float64; see `morphc.kernels.reference.health.health`."""
    seeds = widths.shape[0]
    health = torch.empty(len(rows.HEALTH), seeds, dtype=torch.float64, device=sums.device)
    if seeds:
        used = (sums, counts, widths, health)
        kernel = _report(launch.aligned(used), sums.device)
        kernel((-(-seeds // REPORT_BLOCK), 1, 1), *used, seeds)
    return health
