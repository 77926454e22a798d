"""Small hosts and helpers shared by the tests of the passes and of the API."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from morphc.compiler import Compiled, compile_program
from morphc.config import Config
from morphc.passes.plan import Miss, RegionNote, Site
from morphc.passes.verify import same_bits


class Mlp(nn.Module):
    """Rewritten: nothing in its forward asks for a value."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(8, 16)
        self.drop = nn.Dropout(0.5)
        self.fc2 = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.drop(torch.relu(self.fc1(x))))


class Functional(nn.Module):
    """Rewritten, with a functional layer in the middle: its graph runs in place of the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(8, 16)
        self.weight = nn.Parameter(torch.randn(4, 16) / 4)
        self.scale = 2.0

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.fc1(x))
        return torch.tanh(F.linear(h, self.weight)) * self.scale


class Matched(nn.Module):
    """Matched: it asks for its input's shape."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(8, 16)
        self.fc2 = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] > 100:
            return self.fc2(self.fc1(x))
        return self.fc2(torch.relu(self.fc1(x)))


class Branchy(nn.Module):
    """As written: a branch on a tensor's value."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(8, 16)
        self.fc2 = nn.Linear(16, 4)
        self.spare = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x)
        if h.sum() > 1e9:
            return self.spare(h)
        return self.fc2(h)


class Nested(nn.Module):
    """Regions of each level below one root."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Mlp()
        self.lift = nn.Linear(4, 8)
        self.second = Matched()
        self.third = nn.ModuleList([nn.Linear(4, 8), Branchy()])

    def forward(self, x: Tensor) -> Tensor:
        h = self.second(self.lift(self.first(x)))
        for layer in self.third:
            h = layer(h)
        return h


HOSTS = {cls.__name__.lower(): cls for cls in (Mlp, Functional, Matched, Branchy, Nested)}


def rows(count: int = 3, width: int = 8) -> Tensor:
    """The same input each time."""
    return torch.randn(count, width, generator=torch.Generator().manual_seed(7))


def compiled(
    host: nn.Module, *args: Any, seeds: int = 2, config: Config | None = None, **options: Any
) -> Compiled:
    """`compile_program` on positional arguments, `rows()` when none are given."""
    config = config or Config(seeds_per_layer=seeds)
    return compile_program(host, args or (rows(),), config=config, **options)


def sites_of(result: Compiled) -> dict[str, Site]:
    return {site.path: site for site in result.report.plan.sites}


def misses_of(result: Compiled) -> dict[str, Miss]:
    return {miss.path: miss for miss in result.report.plan.misses}


def regions_of(result: Compiled) -> dict[str, RegionNote]:
    return {region.path: region for region in result.report.plan.regions}


def line_of(where: Any, text: str) -> str:
    """`file:line` of the first line with `text` in the source of a function or class."""
    lines, start = inspect.getsourcelines(where)
    offset = next(index for index, line in enumerate(lines) if text in line)
    return f"{inspect.getsourcefile(where)}:{start + offset}"


def run(
    model: nn.Module, *args: Any, training: bool = True, **kwargs: Any
) -> tuple[Any, dict[str, Tensor | None]]:
    """Output, and gradients of every parameter, under a fixed seed; nothing is left in `.grad`."""
    model.train(training)
    torch.manual_seed(5)
    output = model(*args, **kwargs)
    names = [name for name, p in model.named_parameters() if p.requires_grad and ".morphc." not in f".{name}"]
    own = dict(model.named_parameters())
    found = torch.autograd.grad(output.sum(), [own[name] for name in names], allow_unused=True)
    return output.detach(), dict(zip(names, found, strict=True))


def assert_same(host: nn.Module, model: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Equal bits of outputs and of all gradients, in train and in eval mode."""
    for training in (True, False):
        expected, wanted = run(host, *args, training=training, **kwargs)
        got, grads = run(model, *args, training=training, **kwargs)
        assert same_bits(expected, got)
        assert wanted.keys() == grads.keys()
        for name, gradient in wanted.items():
            other = grads[name]
            assert (gradient is None) == (other is None), name
            assert gradient is None or same_bits(gradient, other), name
