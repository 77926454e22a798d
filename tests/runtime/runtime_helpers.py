"""Small hosts with sites, and references in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from morphc.config import Config
from morphc.kernels.reference.chunks import bounds
from morphc.passes.plan import Block
from morphc.runtime.attach import attach
from morphc.runtime.bank import SlotBank
from morphc.runtime.requests import SiteRequest
from morphc.runtime.seeds import Seeds
from morphc.runtime.store import SeedStore

ALL_BLUEPRINTS = ("affine", "lowrank", "bottleneck", "widen", "depthwise")


class Feed(nn.Module):
    """fc2(gelu(fc1(x)))."""

    def __init__(self, width: int = 6, inner: int = 8, out: int = 7) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class ConvFeed(nn.Module):
    """conv2(relu(conv1(x)))."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.act = nn.Tanh()
        self.conv2 = nn.Conv2d(4, 5, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.act(self.conv1(x)))


def feed(seeds: int = 3, slots: int = 3, dtype: torch.dtype = torch.float32, **options: Any) -> Feed:
    """A Feed with a site of `seeds` behind fc2."""
    torch.manual_seed(0)
    host = Feed().to(dtype)
    block = Block(inputs=("fc1",), output="fc2", activation="gelu", kind="linear", hidden=8)
    request = SiteRequest(
        "fc2", host.fc2, 7, seeds=seeds, tap_features=8, block=block, dtype=dtype, slots=slots
    )
    attach(host, [request], Config(**{"rank": 2, "telemetry_every": 1, "blueprint": "bottleneck"} | options))
    return host


def conv_feed(seeds: int = 2, slots: int = 2, dtype: torch.dtype = torch.float32, **options: Any) -> ConvFeed:
    """A ConvFeed with a site of `seeds` behind conv2."""
    torch.manual_seed(0)
    host = ConvFeed().to(dtype)
    block = Block(inputs=("conv1",), output="conv2", activation="tanh", kind="conv", hidden=4)
    request = SiteRequest(
        "conv2",
        host.conv2,
        5,
        1,
        seeds=seeds,
        tap_features=4,
        block=block,
        kind="conv",
        dtype=dtype,
        slots=slots,
    )
    attach(host, [request], Config(**{"rank": 2, "telemetry_every": 1, "blueprint": "bottleneck"} | options))
    return host


def on_layer(
    layer: nn.Module, features: int, seeds: int, axis: int = -1, slots: int | None = None, **options: Any
) -> tuple[nn.Sequential, SeedStore]:
    """A Sequential of one layer with a site of `seeds` behind it."""
    host = nn.Sequential(layer)
    parameter = next(iter(layer.parameters()), None)
    dtype = parameter.dtype if parameter is not None else torch.float32
    request = SiteRequest("0", layer, features, axis, seeds=seeds, dtype=dtype, slots=slots)
    store = attach(
        host, [request], Config(**{"blueprint": "affine", "telemetry_every": 1, "rank": 2} | options)
    )
    return host, store


def randomize(bank: SlotBank, scale: float = 0.5) -> None:
    """Parameters that are nowhere zero, in every slot."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name in bank.names:
            param = bank.get_parameter(name)
            param.copy_(torch.randn(param.shape, generator=generator) * scale)


def bits(x: Tensor) -> Tensor:
    """The bit patterns, so that -0.0, Inf and NaN compare."""
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return x.contiguous().view(kinds[x.element_size()])


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Bitwise equality."""
    return a.dtype == b.dtype and a.shape == b.shape and bool((bits(a) == bits(b)).all())


def seeds_of(host: nn.Module) -> Seeds:
    """The view of all seeds."""
    return Seeds(host)


def health64(x: Tensor, seeds: int) -> dict[str, Tensor]:
    """The derived health of a [rows, F] activation, seed by seed in float64."""
    found: dict[str, list[float]] = {}
    for start, stop in bounds(x.shape[1], seeds):
        chunk = x[:, start:stop].double()
        width = stop - start
        variance = chunk.var(unbiased=False)
        row = chunk.sum(1).var(unbiased=False)
        correlation = (
            (row - width * variance) / (width * (width - 1) * variance)
            if width > 1
            else torch.tensor(torch.nan)
        )
        values = {
            "count": chunk.numel(),
            "mean": chunk.mean(),
            "variance": variance,
            "dead_fraction": (chunk == 0).double().mean(),
            "correlation": correlation,
            "peak": chunk.abs().max(),
        }
        for name, value in values.items():
            found.setdefault(name, []).append(float(value))
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in found.items()}
