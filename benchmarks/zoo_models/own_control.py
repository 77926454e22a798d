"""Own models: control flow that depends on data, numpy, .item(), generators, argument styles."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from .registry import features, floats, zoo

FAMILY = "control flow"
WIDE = features(32)


@zoo("branch_on_value", FAMILY, WIDE)
class BranchOnValue(nn.Module):
    """`if` on a tensor's value chooses the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(32, 64)
        self.left = nn.Linear(64, 16)
        self.right = nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.first(x))
        if hidden.sum() > 1e6:
            return self.left(hidden)
        return self.right(hidden) * 2


@zoo("loop_with_break", FAMILY, WIDE)
class LoopWithBreak(nn.Module):
    """A loop left when the state's norm passes a bound."""

    def __init__(self) -> None:
        super().__init__()
        self.step = nn.Linear(32, 32)
        self.out = nn.Linear(32, 64)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(6):
            x = torch.tanh(self.step(x)) * 1.5
            if x.norm() > 4.0:
                break
        return self.out(x)


@zoo("branch_on_shape", FAMILY, features(-1, 32), length=8, other_length=5)
class BranchOnShape(nn.Module):
    """Another layer for long inputs than for short ones: a burnt-in branch would be wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.long = nn.Linear(32, 64)
        self.short = nn.Linear(32, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.long(x) if x.shape[1] > 6 else self.short(x)


@zoo("branch_on_training", FAMILY, WIDE)
class BranchOnTraining(nn.Module):
    """Auxiliary head in train mode only; the output's type changes with the mode."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Dropout(0.2))
        self.main = nn.Linear(64, 10)
        self.auxiliary = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Any:
        hidden = self.body(x)
        return (self.main(hidden), self.auxiliary(hidden)) if self.training else self.main(hidden)


@zoo("item_in_forward", FAMILY, WIDE)
class ItemInForward(nn.Module):
    """.item() scales the output; int() of a tensor sets a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 64)

    def forward(self, x: Tensor) -> Tensor:
        scale = x.abs().max().item()
        y = self.layer(x)
        for _ in range(int((x > 0).sum() % 3) + 1):
            y = y / scale
        return y


@zoo("numpy_round_trip", FAMILY, WIDE)
class NumpyRoundTrip(nn.Module):
    """Through numpy and back in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(32, 64)
        self.after = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.before(x)
        ranks = torch.from_numpy(hidden.detach().numpy().argsort(axis=-1).astype("float32"))
        return self.after(hidden * 0.1 + ranks * 0.01)


@zoo("no_grad_inside", FAMILY, WIDE)
class NoGradInside(nn.Module):
    """A teacher branch under torch.no_grad inside the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = nn.Linear(32, 64)
        self.student = nn.Linear(32, 64)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            target = self.teacher(x)
        return (self.student(x) - target).pow(2)


@zoo("yields", FAMILY, WIDE)
class Yields(nn.Module):
    """forward is a generator."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(32, 64), nn.Linear(64, 64)])

    def forward(self, x: Tensor) -> Iterator[Tensor]:
        for layer in self.layers:
            x = torch.relu(layer(x))
            yield x


@zoo("iterators", FAMILY, WIDE)
class Iterators(nn.Module):
    """zip, enumerate, map and reversed over module lists."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))
        self.norms = nn.ModuleList(nn.LayerNorm(32) for _ in range(3))
        self.out = nn.Linear(32, 64)

    def forward(self, x: Tensor) -> Tensor:
        for index, (layer, norm) in enumerate(zip(self.layers, self.norms, strict=True)):
            x = norm(layer(x)) + index
        parts = map(torch.tanh, (layer(x) for layer in reversed(self.layers)))
        return self.out(sum(parts))


@zoo("kwargs_only", FAMILY, lambda batch, _: ((), {"x": floats(batch, 32), "scale": 2.0}))
class KwargsOnly(nn.Module):
    """Keyword-only arguments, one of them a float."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 64)

    def forward(self, *, x: Tensor, scale: float = 1.0, shift: Tensor | None = None) -> dict[str, Tensor]:
        y = self.layer(x) * scale
        return {"y": y if shift is None else y + shift}


@zoo("star_args", FAMILY, lambda batch, _: (
    (floats(batch, 32), floats(batch, 16)), {"extra": floats(batch, 8), "flag": True},
))  # fmt: skip
class StarArgs(nn.Module):
    """*args and **kwargs, handed on to a child that has them too."""

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(32, 64), nn.Linear(16, 64), nn.Linear(8, 64)])

        def forward(self, *args: Tensor, **kwargs: Any) -> Tensor:
            tensors = [*args, *(value for value in kwargs.values() if isinstance(value, Tensor))]
            return sum(layer(x) for layer, x in zip(self.layers, tensors, strict=True)) * (
                2 if kwargs["flag"] else 1
            )

    def __init__(self) -> None:
        super().__init__()
        self.inner = StarArgs.Inner()

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.inner(*args, **kwargs)


@zoo("optional_none", FAMILY, lambda batch, length: (
    (floats(batch, length, 32), None), {"mask": None, "return_mask": False},
), length=6, other_length=4)  # fmt: skip
class OptionalNone(nn.Module):
    """Optional arguments given as None."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(32, 64)
        self.memory = nn.Linear(32, 64)

    def forward(
        self, x: Tensor, memory: Tensor | None, mask: Tensor | None = None, return_mask: bool = True
    ) -> Any:
        y = self.project(x)
        if memory is not None:
            y = y + self.memory(memory)
        if mask is not None:
            y = y.masked_fill(mask, 0.0)
        return (y, mask) if return_mask else y


class _Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.stem = nn.Linear(32, 32)
        self.block = nn.Sequential(
            nn.Linear(32, 64), nn.ReLU(inplace=True), nn.Dropout(0.2), nn.Linear(64, 32)
        )
        self.chain = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32), nn.GELU())

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + checkpoint(self.block, x, use_reentrant=self.reentrant)
        return checkpoint_sequential(self.chain, 2, x, use_reentrant=self.reentrant)


@zoo("checkpoint_reentrant", FAMILY, WIDE)
def checkpoint_reentrant() -> nn.Module:
    """torch.utils.checkpoint, reentrant, with dropout inside."""
    return _Checkpointed(True)


@zoo("checkpoint_non_reentrant", FAMILY, WIDE)
def checkpoint_non_reentrant() -> nn.Module:
    """torch.utils.checkpoint, by saved-tensor hooks."""
    return _Checkpointed(False)


@zoo("try_except", FAMILY, WIDE)
class TryExcept(nn.Module):
    """Exceptions steer the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow = nn.Linear(16, 64)
        self.wide = nn.Linear(32, 64)

    def forward(self, x: Tensor) -> Tensor:
        try:
            return self.narrow(x)
        except RuntimeError:
            return self.wide(x)
