"""The currency of the cost model: bytes, flops and launches as functions of the number of rows.

Every formula is written once and takes `rows` as a sympy symbol, which gives an expression to show and to
reason about, or as an int, which gives the number at once. sympy is imported when a symbol or a proof is
asked for, never by importing this module.
"""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING, Any

import msgspec

from morphc.errors import UnknownNameError

if TYPE_CHECKING:
    import sympy

# A number, or a sympy expression in `rows`. sympy has no types, so to the type checker it is Any.
Quantity = Any

BYTES = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "complex64": 8,
    "complex128": 16,
    "int8": 1,
    "uint8": 1,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
}


class Cost(msgspec.Struct, frozen=True):
    """What work moves and computes: bytes read and written, flops in matmuls and outside, ops launched."""

    read: Quantity = 0
    written: Quantity = 0
    matmul: Quantity = 0
    vector: Quantity = 0
    launches: Quantity = 0

    @property
    def bytes(self) -> Quantity:
        """Bytes read and written."""
        return self.read + self.written

    @property
    def flops(self) -> Quantity:
        """Flops in matmuls and outside of them."""
        return self.matmul + self.vector

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(_fields(self), _fields(other), strict=True)))

    def times(self, factor: int | Fraction) -> Cost:
        """This cost `factor` times; exact for a Fraction."""
        return Cost(*(value * factor for value in _fields(self)))

    def at(self, rows: int) -> Cost:
        """The numbers for so many rows, exact."""
        return Cost(*(_at(value, rows) for value in _fields(self)))


def rows_symbol() -> sympy.Symbol:
    """The symbol `rows`: all positions of the activation flattened, a positive integer."""
    import sympy

    return sympy.Symbol("rows", integer=True, positive=True)


def dtype_bytes(dtype: str) -> int:
    """Bytes of one element of `float32`, `torch.bfloat16`, ... Raises UnknownNameError."""
    name = dtype.removeprefix("torch.")
    if name not in BYTES:
        raise UnknownNameError("dtype", name, BYTES)
    return BYTES[name]


def ceil_div(value: Quantity, divisor: int) -> Quantity:
    """`value / divisor` rounded up, for numbers and expressions."""
    if isinstance(value, int):
        return -(-value // divisor)
    import sympy

    return sympy.ceiling(value / divisor)


def divides(divisor: Quantity, value: Quantity) -> bool:
    """Whether sympy proves that `divisor` divides `value` for every value of the symbols in them.

    `divides(16, 64 * n)` is true for an integer symbol n, so a tile of 16 needs no mask; `divides(8, rows)`
    is false, for nothing is known of rows. False means "not proved".
    """
    import sympy

    quotient = sympy.sympify(value) / sympy.sympify(divisor)
    return bool(sympy.expand(quotient).is_integer)


def _fields(cost: Cost) -> tuple[Quantity, ...]:
    return msgspec.structs.astuple(cost)


def _at(value: Quantity, rows: int) -> Quantity:
    if isinstance(value, int | float | Fraction):
        return value
    number = value.subs({rows_symbol(): rows})
    if number.is_integer:
        return int(number)
    return Fraction(int(number.p), int(number.q)) if number.is_Rational else float(number)
