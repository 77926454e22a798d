"""`--input`: example tensors described on the command line.

    32x784            float32, positional
    32x784:bf16       another dtype
    2x16:i64<1000     whole numbers from 0 up to, not including, 1000
    mask=2x16:bool    a keyword argument
    scalar:f32        a tensor without dimensions

Parsing needs no torch; `make_inputs` does.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from morphc.errors import ConfigError, UnknownNameError

if TYPE_CHECKING:
    import torch
    from torch import nn

DTYPES = {
    "f32": "float32",
    "f16": "float16",
    "bf16": "bfloat16",
    "f64": "float64",
    "i64": "int64",
    "i32": "int32",
    "i16": "int16",
    "i8": "int8",
    "u8": "uint8",
    "bool": "bool",
    "c64": "complex64",
    "c128": "complex128",
}
_SHAPE = re.compile(r"(scalar|\d+(?:x\d+)*)(?::([A-Za-z]\w*))?(?:<(\d+))?")
_WHOLE = ("int64", "int32", "int16", "int8", "uint8")


class InputSpec(NamedTuple):
    """One example tensor: keyword `name` (None: positional), `shape`, torch dtype name, exclusive `bound`."""

    name: str | None
    shape: tuple[int, ...]
    dtype: str
    bound: int | None


def parse_input(text: str) -> InputSpec:
    """Read one `--input`. Raises ConfigError saying what the grammar is."""
    name, equals, rest = text.rpartition("=")
    name = name.strip()
    match = _SHAPE.fullmatch(rest.strip().replace("×", "x"))
    if match is None or (equals and not name.isidentifier()):
        raise ConfigError(
            f"--input {text!r} is no shape; write it as 32x784:f32, 2x16:i64<1000 or mask=2x16:bool"
        )
    shape_text, dtype_text, bound_text = match.groups()
    shape = () if shape_text == "scalar" else tuple(int(size) for size in shape_text.split("x"))
    short = dtype_text or ("i64" if bound_text else "f32")
    dtype = DTYPES.get(short, short)
    if dtype not in DTYPES.values():
        raise UnknownNameError("dtype", short, [*DTYPES, *DTYPES.values()])
    bound = int(bound_text) if bound_text else None
    if bound is not None and dtype not in _WHOLE:
        raise ConfigError(f"--input {text!r}: the bound <{bound} is for whole numbers, not for {short}")
    if bound == 0:
        raise ConfigError(f"--input {text!r}: no whole number is below 0; give a bound of 1 or more")
    return InputSpec(name or None, shape, dtype, bound)


def make_inputs(
    specs: Sequence[InputSpec], host: nn.Module
) -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]]:
    """Random tensors for `specs` on the host's device, the same on every run; the global RNG is left alone.

    Whole numbers without a bound stay below the smallest embedding table of the host, so that they are
    valid ids for whichever of its embeddings they reach.
    """
    import torch

    device = next((p.device for p in host.parameters()), torch.device("cpu"))
    tables = [m.num_embeddings for m in host.modules() if isinstance(m, torch.nn.Embedding)]
    generator = torch.Generator().manual_seed(0)
    args: list[torch.Tensor] = []
    kwargs: dict[str, torch.Tensor] = {}
    for spec in specs:
        value = _random(spec, min(tables, default=2), generator).to(device)
        if spec.name is None:
            args.append(value)
        elif spec.name in kwargs:
            raise ConfigError(f"--input gives {spec.name!r} twice")
        else:
            kwargs[spec.name] = value
    return tuple(args), kwargs


def _random(spec: InputSpec, ids: int, generator: torch.Generator) -> torch.Tensor:
    import torch

    dtype: Any = getattr(torch, spec.dtype)
    if spec.dtype == "bool":
        return torch.randint(0, 2, spec.shape, generator=generator).bool()
    if spec.dtype in _WHOLE:
        bound = spec.bound if spec.bound is not None else ids
        largest = torch.iinfo(dtype).max
        if bound - 1 > largest:
            raise ConfigError(f"--input: {spec.dtype} holds numbers up to {largest}, not below {bound}")
        return torch.randint(0, bound, spec.shape, generator=generator).to(dtype)
    return torch.randn(spec.shape, generator=generator, dtype=dtype if dtype.is_complex else None).to(dtype)
