"""Models with grown seeds: what the fold tests start from."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import morphc
from morphc import Config, Lifecycle

BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-2}
DTYPES = list(BOUNDS)
ALPHA = 0.29  # 1 - alpha isn't exact in float32


def morph(host: nn.Module, *inputs: Any, blend: str = "residual", **options: Any) -> nn.Module:
    """`host` compiled with four seeds a site, four slots, rank 3."""
    defaults: dict[str, Any] = {
        "seeds_per_layer": 4,
        "slots": 4,
        "rank": 3,
        "blueprint": ("affine", "lowrank", "bottleneck"),
        "blend": blend,
    }
    return morphc.compile(host, inputs, config=Config(**{**defaults, **options}), verify=False)


def grow(
    model: nn.Module,
    path: str,
    seeds: list[int],
    blueprint: str,
    alpha: float = ALPHA,
    state: Lifecycle = Lifecycle.FINE_TUNING,
) -> None:
    """Put seeds into the blend with random slot parameters."""
    site = morphc.seeds(model)[path]
    site.assign(seeds, state, blueprint=blueprint, alpha=alpha)
    bank = site.slots[blueprint]
    generator = torch.Generator().manual_seed(sum(map(ord, path + blueprint)))
    with torch.no_grad():
        for name in bank.names:
            parameter = bank.get_parameter(name)
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3
            parameter.copy_(noise)


def first(output: Any) -> torch.Tensor:
    """The tensor of an output, or of its first element."""
    while not isinstance(output, torch.Tensor):
        output = output[0]
    return output


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference relative to the largest value of `a`."""
    a, b = a.double(), b.double()
    return ((a - b).abs().max() / a.abs().max()).item()


def check(model: nn.Module, host: nn.Module, *inputs: Any, bound: float = 1e-12, **kwargs: Any) -> nn.Module:
    """Fold, compare with the grown model, and see to it that the growth was worth comparing. Returns the folded."""
    model.eval()
    host.eval()
    folded = morphc.fold(model)
    with torch.no_grad():
        grown, plain, got = (first(m(*inputs, **kwargs)) for m in (model, host, folded))
    assert distance(grown, plain) > 100 * bound if bound < 1e-3 else distance(grown, plain) > 2 * bound
    assert got.dtype == grown.dtype
    assert distance(grown, got) <= bound
    return folded


def how(model: nn.Module) -> dict[tuple[str, str], str]:
    """(site, blueprint) -> what fold_account says that becomes of it."""
    from morphc.folding import fold_account

    found = {}
    for line in fold_account(model):
        site, _, rest = line.partition(": ")
        blueprint = rest.split(" of ")[1].split(",")[0]
        found[site, blueprint] = line.partition(" -> ")[2]
    return found
