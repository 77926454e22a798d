"""Where a value is dead behind its activation: |act(v)| <= near_zero, as comparisons of v itself.

What counts is the value that the model stores: act(v) by torch's float32 function on the CPU, rounded to the type of
the activation (so that silu(-21) is 0 in float16, and in bfloat16 isn't), compared as a float32 with near_zero.

Telemetry counts the dead before the activation runs. Evaluating it again would cost more than all that is measured
beside; but the dead lie in a few intervals, which torch can be asked for once. A device's own erf, tanh or exp may
differ from torch's in the last bit, so of float32 a few values beside an end may be judged otherwise than there.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from functools import lru_cache
from typing import Final, NamedTuple

import torch
from torch import Tensor

from morphc.kernels.reference.activations import activation


class Interval(NamedTuple):
    """Of values, both ends included."""

    low: float
    high: float


PIECE: Final = 1 << 15
"""Values that torch computes in one thread; of whole vectors, since what is left over takes another function."""


@lru_cache(maxsize=256)
def dead_values(epilogue: str | None, near_zero: float, dtype: str) -> tuple[Interval, ...]:
    """Where act(v), as it is stored, is at most near_zero; an end at the largest value is infinite.

    Of the 16-bit types every value is tried. Of float32 those that are bfloat16 as well, and between two of them
    that differ all; where rounding makes the answer flicker there, the end that judges fewest wrongly.
    """
    tried = _finite_values("float16" if dtype == "float16" else "bfloat16")
    dead = _stored_dead(tried, epilogue, near_zero, dtype)
    low = -math.inf
    found: list[Interval] = []
    for edge in (dead[1:] != dead[:-1]).nonzero().flatten().tolist():
        ends = tried[edge : edge + 2]
        if dtype == "float32":
            between = _between(ends)
            inside = _stored_dead(between, epilogue, near_zero, dtype)
            # Of the values up to a place those that belong behind it, and of those behind it the others.
            wrong = (inside != inside[0]).to(torch.int64).cumsum(0)
            right = (inside == inside[0]).to(torch.int64).cumsum(0)
            place = int((wrong + right[-1] - right)[:-1].argmin())
            ends = between[place : place + 2]
        if dead[edge]:
            found.append(Interval(low, ends[0].item()))
        else:
            low = ends[1].item()
    if dead[-1]:
        found.append(Interval(low, math.inf))
    return tuple(found)


def _stored_dead(values: Tensor, epilogue: str | None, near_zero: float, dtype: str) -> Tensor:
    """Whether each of `values`, float32, is dead."""
    act, kind = activation(epilogue or "identity"), getattr(torch, dtype)
    padded = torch.nn.functional.pad(values, (0, -len(values) % 64))
    after = torch.cat([act(piece.clone()).to(kind).float() for piece in torch.split(padded, PIECE)])
    return after[: len(values)].abs() <= near_zero


@lru_cache(maxsize=4)
def _finite_values(dtype: str) -> Tensor:
    """All values of a 16-bit type in ascending order, as float32; zero once."""
    kind = getattr(torch, dtype)
    bits = torch.arange(0, 1 << 15, dtype=torch.int32).to(torch.int16)
    positive = bits.view(kind).float()
    positive = positive[positive.isfinite()]
    return torch.cat((-positive[1:].flip(0), positive))


def _between(ends: Tensor) -> Tensor:
    """All float32 from ends[0] to ends[1], ascending."""
    bits = ends.view(torch.int32).to(torch.int64)
    # As sign and magnitude, the order of the values is that of the numbers.
    first, last = torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits).tolist()
    numbers = torch.arange(first, last + 1)
    bits = torch.where(numbers < 0, -numbers - (1 << 31), numbers)
    return bits.to(torch.int32).view(torch.float32)


def dead_expression(dead: Sequence[Interval]) -> str:
    """Triton for "v lies in one of the intervals"."""
    tests = []
    for low, high in dead:
        if low == high:
            tests.append(f"v == {low!r}")
        elif low == -math.inf and high == math.inf:
            tests.append("v == v")
        elif low == -math.inf:
            tests.append(f"v <= {high!r}")
        elif high == math.inf:
            tests.append(f"v >= {low!r}")
        elif low == -high:
            tests.append(f"tl.abs(v) <= {high!r}")
        else:
            tests += [f"(v >= {low!r}) & (v <= {high!r})"]
    if not tests:
        return "v != v"
    return tests[0] if len(tests) == 1 else " | ".join(f"({test})" for test in tests)


def dead_ptx(dead: Sequence[Interval], dtype: str) -> list[str]:
    """The same in PTX of two 16-bit values: $0 gets 0xffff in the half of a dead one. $1: the values; t, u: free."""
    if dtype not in ("bfloat16", "float16"):
        return []
    pair = "bf16x2" if dtype == "bfloat16" else "f16x2"

    def compare(test: str, bound: float, into: str, value: str = "$1") -> list[str]:
        return [f"mov.b32 t, {_twice(bound, dtype)};", f"set.{test}.u32.{pair} {into}, {value}, t;"]

    lines: list[str] = []
    for number, (low, high) in enumerate(dead):
        into = "u" if number else "$0"
        if low == high:
            lines += compare("eq", low, into)
        elif low == -math.inf:
            lines += compare("le", min(high, _largest(dtype)), into)
        elif high == math.inf:
            lines += compare("ge", low, into)
        elif low == -high:
            lines += [f"abs.{pair} v, $1;", *compare("le", high, into, "v")]
        else:
            lines += [*compare("ge", low, "v"), *compare("le", high, into), f"and.b32 {into}, {into}, v;"]
        if number:
            lines.append("or.b32 $0, $0, u;")
    return lines or ["mov.b32 $0, 0;"]


def _largest(dtype: str) -> float:
    return torch.finfo(getattr(torch, dtype)).max


def _twice(value: float, dtype: str) -> str:
    """The bits of a 16-bit value in both halves of a word."""
    if dtype == "float16":
        (bits,) = struct.unpack("<H", struct.pack("<e", value))
    else:
        bits = struct.unpack("<I", struct.pack("<f", value))[0] >> 16
    return f"0x{bits:04x}{bits:04x}"
