"""What the kernels are measured against: the memory's own limits, and other ways to the same values.

    read        one read of the activation by a kernel that only sums it
    copy        `Tensor.copy_` into a tensor that is there already
    eager       vectorised torch operations, which are handed the list of active seeds
    compiled    the same through `torch.compile`
    per_seed    one Triton program for each (row, seed), statistics by atomics: the obvious kernel
    linear      the host layer whose output the site watches
    lora        y + (x A) B with rank 16

`eager` and `compiled` form fewer statistics than a site does (sum, squares, zeros, largest): the rivals are
given the easier task.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from morphc.kernels.reference.chunks import bounds, chunk_max, chunk_sums

READ_CONFIGS = ((4, 2048, 4, 1), (8, 4096, 4, 1), (8, 8192, 2, 1), (4, 8192, 1, 64), (8, 16384, 1, 64))
"""Warps, elements a step, steps in flight, programs for each that runs at once; the fastest is the limit."""

MOST_PROGRAMS = 1 << 16


@dataclass(frozen=True)
class Slots:
    """Parameters of the active seeds alone, in the order of `seeds` [A] int64, in the activation's dtype.

    in_weight [A, C, R], in_bias [A, R], out_weight [A, R, C], out_bias [A, C], alpha [A]. columns [A, C]: the
    feature that each column of a chunk is, the last one again in the padding of a narrower chunk.
    """

    seeds: Tensor
    columns: Tensor
    alpha: Tensor
    in_weight: Tensor
    in_bias: Tensor
    out_weight: Tensor
    out_bias: Tensor


def slots_of(
    seeds: Tensor,
    features: int,
    count: int,
    alpha: Tensor,
    weights: tuple[Tensor, Tensor, Tensor, Tensor],
    dtype: torch.dtype,
) -> Slots:
    """Slots for the active `seeds` of `count` on `features`, in `dtype`.

    weights: in_weight, in_bias, out_weight and out_bias of those seeds. In the padding of a narrower chunk
    they are changed so that the padded column neither counts nor differs from the one it repeats: then
    writing both is no race.
    """
    edges = bounds(features, count)
    widest = max(stop - start for start, stop in edges)
    table = [[min(start + column, stop - 1) for column in range(widest)] for start, stop in edges]
    columns = torch.tensor(table, dtype=torch.int64, device=seeds.device)[seeds]
    in_weight, in_bias, out_weight, out_bias = (weight.clone() for weight in weights)
    if widest > 1 and features % count:
        narrow = columns[:, -1] == columns[:, -2]
        in_weight[narrow, -1] = 0
        out_weight[narrow, :, -1] = out_weight[narrow, :, -2]
        out_bias[narrow, -1] = out_bias[narrow, -2]
    values = (alpha, in_weight, in_bias, out_weight, out_bias)
    return Slots(seeds, columns, *(value.to(dtype) for value in values))


def statistics(x: Tensor, seeds: int) -> Tensor:
    """[4, S] float32 of x [rows, F]: sum, squares, zeros, largest magnitude of every chunk."""
    wide = x.float()
    magnitude = wide.abs()
    return torch.stack(
        (
            chunk_sums(wide.sum(0), seeds),
            chunk_sums((wide * wide).sum(0), seeds),
            chunk_sums((magnitude == 0).sum(0).float(), seeds),
            chunk_max(magnitude.amax(0), seeds),
        )
    )


def eager(x: Tensor, count: int, slots: Slots) -> tuple[Tensor, Tensor]:
    """The site on x [rows, F] with `count` seeds: a new value and the statistics."""
    measured = statistics(x, count)
    if slots.seeds.numel() == 0:
        return x, measured
    rows, features = x.shape
    even = features % count == 0
    if even:
        chunks = x.view(rows, count, features // count)
        picked = chunks.index_select(1, slots.seeds).transpose(0, 1)
    else:
        picked = x[:, slots.columns.view(-1)].view(rows, *slots.columns.shape).transpose(0, 1)
    hidden = torch.bmm(picked, slots.in_weight) + slots.in_bias.unsqueeze(1)
    out = torch.bmm(F.gelu(hidden, approximate="tanh"), slots.out_weight) + slots.out_bias.unsqueeze(1)
    joined = (picked + slots.alpha.view(-1, 1, 1) * out).transpose(0, 1)
    if even:
        return chunks.index_copy(1, slots.seeds, joined).view(rows, features), measured
    return x.index_copy(1, slots.columns.view(-1), joined.reshape(rows, -1)), measured


def compiled(mode: str | None = None) -> Callable[[Tensor, int, Slots], tuple[Tensor, Tensor]]:
    """`eager` through torch.compile, for the very shapes that it is called with."""
    torch._dynamo.config.cache_size_limit = 256
    return torch.compile(eager, dynamic=False, fullgraph=True, mode=mode)


@triton.jit
def _read(
    x_ptr,
    out_ptr,
    elements,
    STEP: tl.constexpr,
    FLIGHT: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * STEP
    stride = tl.num_programs(0).to(tl.int64) * STEP
    lane = tl.arange(0, STEP)
    total = tl.zeros([STEP], tl.float32)
    for start in tl.range(first, elements, stride, loop_unroll_factor=FLIGHT):
        total += tl.load(x_ptr + start + lane, mask=start + lane < elements, other=0.0).to(tl.float32)
    tl.store(out_ptr + tl.program_id(0), tl.sum(total, axis=0))


@triton.jit
def _read_even(
    x_ptr,
    out_ptr,
    steps,
    STEP: tl.constexpr,
    FLIGHT: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * steps * STEP
    lane = tl.arange(0, STEP)
    total = tl.zeros([STEP], tl.float32)
    for step in tl.range(0, steps, loop_unroll_factor=FLIGHT):
        total += tl.load(x_ptr + first + step * STEP + lane).to(tl.float32)
    tl.store(out_ptr + tl.program_id(0), tl.sum(total, axis=0))


def reader(x: Tensor, warps: int, step: int, flight: int, waves: int) -> Callable[[Tensor, Tensor], None]:
    """A function that reads all of a tensor like `x` once; its second argument takes MOST_PROGRAMS float32 sums."""
    elements = x.numel()
    step = min(step, triton.next_power_of_2(elements))
    running = _processors(x.device) * max(1, 32 // warps)
    programs = min(running * waves, triton.cdiv(elements, step), MOST_PROGRAMS)
    whole = elements // step
    # As many programs as divide the work: then no load needs a mask.
    even = next((n for n in range(programs, programs // 2, -1) if elements % step == 0 and whole % n == 0), 0)

    def read(value: Tensor, out: Tensor) -> None:
        if even:
            _read_even[(even,)](value, out, whole // even, STEP=step, FLIGHT=flight, num_warps=warps)
        else:
            _read[(programs,)](value, out, elements, STEP=step, FLIGHT=flight, num_warps=warps)

    return read


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@triton.jit
def _per_seed(
    x_ptr,
    held_ptr,
    alpha_ptr,
    in_weight_ptr,
    in_bias_ptr,
    out_weight_ptr,
    out_bias_ptr,
    statistics_ptr,
    features,
    seeds,
    C: tl.constexpr,
    CS: tl.constexpr,
    R: tl.constexpr,
    RS: tl.constexpr,
):
    seed = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    base = features // seeds
    wider = features % seeds
    start = seed * base + tl.minimum(seed, wider)
    width = base + (seed < wider).to(tl.int32)
    column = tl.arange(0, CS)
    inside = column < width
    place = x_ptr + row * features + start + column
    x = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    magnitude = tl.abs(x)
    zeros = tl.where(inside & (magnitude == 0), 1.0, 0.0)
    tl.atomic_add(statistics_ptr + seed, tl.sum(x, axis=0), sem="relaxed")
    tl.atomic_add(statistics_ptr + seeds + seed, tl.sum(x * x, axis=0), sem="relaxed")
    tl.atomic_add(statistics_ptr + 2 * seeds + seed, tl.sum(zeros, axis=0), sem="relaxed")
    tl.atomic_max(statistics_ptr + 3 * seeds + seed, tl.max(magnitude, axis=0), sem="relaxed")
    slot = tl.load(held_ptr + seed)
    if slot >= 0:
        unit = tl.arange(0, RS)
        known = unit < R
        both = inside[:, None] & known[None, :]
        into = tl.load(
            in_weight_ptr + (slot * C + column)[:, None] * R + unit[None, :], mask=both, other=0.0
        ).to(tl.float32)
        hidden = tl.sum(x[:, None] * into, axis=0)
        hidden += tl.load(in_bias_ptr + slot * R + unit, mask=known, other=0.0).to(tl.float32)
        bent = 0.7978845608028654 * hidden * (1 + 0.044715 * hidden * hidden)
        hidden = hidden * tl.sigmoid(2 * bent)
        out = tl.load(
            out_weight_ptr + (slot * R + unit)[None, :] * C + column[:, None], mask=both, other=0.0
        ).to(tl.float32)
        s = tl.sum(hidden[None, :] * out, axis=1)
        s += tl.load(out_bias_ptr + slot * C + column, mask=inside, other=0.0).to(tl.float32)
        y = x + tl.load(alpha_ptr + slot).to(tl.float32) * s
        tl.store(place, y.to(x_ptr.dtype.element_ty), mask=inside)


def per_seed(x: Tensor, count: int, held: Tensor, slots: Slots, measured: Tensor) -> None:
    """In place on x [rows, F]. held: [S] int32, the position in `slots` or -1; measured: [4, S] float32."""
    rows, features = x.shape
    chunk = -(-features // count)
    rank = slots.in_bias.shape[1]
    sizes = {"C": chunk, "CS": triton.next_power_of_2(chunk), "R": rank, "RS": triton.next_power_of_2(rank)}
    weights = (slots.in_weight, slots.in_bias, slots.out_weight, slots.out_bias)
    _per_seed[(count, rows)](x, held, slots.alpha, *weights, measured, features, count, **sizes, num_warps=1)


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The host layer."""
    return F.linear(x, weight, bias)


def lora(x: Tensor, y: Tensor, into: Tensor, out: Tensor) -> Tensor:
    """y + (x A) B: x [rows, in], y [rows, F], into [in, 16], out [16, F]."""
    return y + (x @ into) @ out
