"""`recycle`: the host's own units behind a dormant seed begin anew (ReDo, Sokar et al. 2023, algorithm 1)."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from morphc.kernels.reference.chunks import bounds
from morphc.lifecycle import Lifecycle
from morphc.runtime import commands
from morphc.runtime.commands import Transition
from morphc.runtime.gates import Failure
from morphc.runtime.site import SeedSite

if TYPE_CHECKING:
    from morphc.runtime.store import SeedStore

Hook = Callable[[torch.optim.Optimizer, nn.Parameter, int, Tensor], None]
"""Called with the optimizer, a parameter, an axis and the indices along it that were made anew."""


class Layers(NamedTuple):
    """The layers that write a block's inner units, with the axis of their weight, and the one that reads them."""

    writers: list[nn.Module]
    reader: nn.Module


def layers_of(store: SeedStore, site: SeedSite) -> Layers | str:
    """The layers around the site's units, or why there are none that can be recycled."""
    for request in store.requests.values():
        block = request.block
        if block is None or site.path not in block.inputs:
            continue
        if block.obstacle:
            return block.obstacle
        writers = [store.requests[path].layer for path in block.inputs if path in store.requests]
        known = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
        layers = [*writers, request.layer]
        if len(writers) != len(block.inputs) or not all(isinstance(layer, known) for layer in layers):
            return "its block is not made of Linear or convolution layers that all have sites"
        if any(getattr(layer, "groups", 1) != 1 for layer in layers):
            return "a convolution of its block works in groups"
        return Layers(writers, request.layer)
    return "no layer is known that alone reads its units (it must be the inner layer of a block)"


def recycle(
    store: SeedStore,
    site: SeedSite,
    chosen: list[int],
    optimizer: torch.optim.Optimizer | None = None,
    hook: Hook | None = None,
) -> list[Transition]:
    """Fresh incoming weights, zero biases and outgoing weights for the units of dormant seeds."""
    mirror = store.mirror()
    layers = layers_of(store, site)
    out = []
    cuts = bounds(site.features, site.seeds)
    for seed in chosen:
        row = site.offset + seed
        source = Lifecycle(int(mirror.lifecycle[row]))
        why = None
        if isinstance(layers, str):
            why = Failure("block", math.nan, math.nan, f"block: {site.path!r} can't be recycled: {layers}")
        elif source is not Lifecycle.DORMANT:
            reason = f"state: {source.name}, must be DORMANT; a seed that is at work has to be pruned first"
            why = Failure("state", float(source), float(Lifecycle.DORMANT), reason)
        if why is not None or isinstance(layers, str):
            assert why is not None
            out.append(commands.refused(site, seed, source, Lifecycle.DORMANT, why))
            continue
        units = torch.arange(*cuts[seed])
        draw = zlib.crc32(f"recycle/{site.path}/{seed}/{mirror.tick}".encode())
        _renew(layers, units, torch.Generator().manual_seed(draw), optimizer, hook)
        out.append(Transition(site.path, seed, source, Lifecycle.DORMANT, True))
    return out


@torch.no_grad()
def _renew(
    layers: Layers,
    units: Tensor,
    generator: torch.Generator,
    optimizer: torch.optim.Optimizer | None,
    hook: Hook | None,
) -> None:
    for layer in layers.writers:
        weight, bias = layer.weight, layer.bias
        assert isinstance(weight, nn.Parameter)
        bound = 1 / math.sqrt(weight[0].numel())
        fresh = torch.empty(len(units), *weight.shape[1:]).uniform_(-bound, bound, generator=generator)
        weight[units.to(weight.device)] = fresh.to(weight)
        _forget(optimizer, weight, 0, units, hook)
        if isinstance(bias, nn.Parameter):
            bias[units.to(bias.device)] = 0
            _forget(optimizer, bias, 0, units, hook)
    weight = layers.reader.weight
    assert isinstance(weight, nn.Parameter)
    weight[:, units.to(weight.device)] = 0
    _forget(optimizer, weight, 1, units, hook)


def _forget(
    optimizer: torch.optim.Optimizer | None,
    parameter: nn.Parameter,
    axis: int,
    units: Tensor,
    hook: Hook | None,
) -> None:
    """Clear what the optimizer remembers of these rows or columns: every state tensor of the parameter's shape."""
    if optimizer is None:
        return
    for value in optimizer.state.get(parameter, {}).values():
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            value.index_fill_(axis, units.to(value.device), 0)
    if hook is not None:
        hook(optimizer, parameter, axis, units)
