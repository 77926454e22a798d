"""What a zoo entry is, and the list of all of them."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Entry:
    """One host of the zoo.

    name, family: how the table and `--only` / `--family` call it.
    make: builds the module, with weights from the global RNG (seeded by `build`).
    inputs: `(batch, length) -> (args, kwargs)`; same numbers, same tensors.
    batch, other_batch: the example's batch size and another one (None: the host takes only one).
    length, other_length: sequence length or image side, and another one (0: the host has none).
    extras: further checks, see `checks.EXTRAS`.
    modes: `train` and `eval` set the flags of the whole tree, `as_built` leaves them.
    input_grads: whether floating inputs ask for gradients too.
    unmeasured: layers that run where no telemetry can be taken (inside torch.func transforms).
    note: what is special about the host.
    """

    name: str
    family: str
    make: Callable[[], nn.Module]
    inputs: Callable[[int, int], Inputs]
    batch: int = 2
    other_batch: int | None = 3
    length: int = 0
    other_length: int = 0
    extras: tuple[str, ...] = ()
    modes: tuple[str, ...] = ("train", "eval")
    input_grads: bool = True
    unmeasured: tuple[str, ...] = ()
    note: str = ""

    def build(self, seed: int = 0) -> nn.Module:
        """The host; equal seeds give equal weights."""
        seed_everything(seed)
        return self.make()

    def factory(self) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
        """The host and its example inputs."""
        args, kwargs = self.inputs(self.batch, self.length)
        return self.build(), args, kwargs

    def shapes(self) -> dict[str, tuple[int, int]]:
        """What the host is run on: label -> (batch, length)."""
        cases = {"example": (self.batch, self.length)}
        if self.other_batch is not None:
            cases["other batch"] = (self.other_batch, self.length)
        if self.other_length:
            cases["other length"] = (self.batch, self.other_length)
        return cases


ENTRIES: dict[str, Entry] = {}


def add(entry: Entry) -> None:
    """Put an entry into the zoo; names are unique."""
    if entry.name in ENTRIES:
        raise ValueError(f"two zoo entries are called {entry.name!r}")
    ENTRIES[entry.name] = entry


def zoo(name: str, family: str, inputs: Callable[[int, int], Inputs], **options: Any) -> Callable[[Any], Any]:
    """Decorator: the module class (no arguments) or the function below is an entry's `make`."""

    def register(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        note = options.pop("note", (make.__doc__ or "").strip().split("\n")[0])
        add(Entry(name, family, make, inputs, note=note, **options))
        return make

    return register


def seed_everything(seed: int) -> None:
    """Seed torch, numpy and random."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def rng(*salt: int) -> torch.Generator:
    """A generator of its own, so that making inputs doesn't move the global one."""
    generator = torch.Generator()
    generator.manual_seed(hash((7, *salt)) & 0x7FFFFFFF)
    return generator


def ids(batch: int, length: int, vocab: int = 96, low: int = 3) -> Tensor:
    """Token ids, clear of the special ones below `low`."""
    return torch.randint(low, vocab, (batch, length), generator=rng(batch, length))


def floats(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal values."""
    return torch.randn(*shape, generator=rng(*shape)).to(dtype)


def token_ids(batch: int, length: int) -> Inputs:
    """`input_ids` by keyword, as most of transformers is called."""
    return (), {"input_ids": ids(batch, length)}


def masked_ids(batch: int, length: int) -> Inputs:
    """`input_ids` with the tail of the first row masked out."""
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, length - 2 :] = 0
    return (), {"input_ids": ids(batch, length), "attention_mask": mask}


def features(*shape: int) -> Callable[[int, int], Inputs]:
    """`(batch, length) -> one float tensor [batch, *shape]`; -1 in `shape` stands for the length."""

    def make(batch: int, length: int) -> Inputs:
        return (floats(batch, *(length if side == -1 else side for side in shape)),), {}

    return make


def pixels(channels: int, side: int = 0, name: str = "pixel_values") -> Callable[[int, int], Inputs]:
    """`(batch, length) -> images by keyword`; side 0 takes the length as side."""

    def make(batch: int, length: int) -> Inputs:
        edge = side or length
        return (), {name: floats(batch, channels, edge, edge)}

    return make
