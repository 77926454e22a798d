"""`recycle`: the host's own units behind a dormant seed begin anew (ReDo, Sokar et al. 2023, algorithm 1)."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from morphc.errors import SeedError
from morphc.kernels.reference.chunks import bounds
from morphc.lifecycle import Lifecycle
from morphc.runtime import commands
from morphc.runtime.commands import Transition
from morphc.runtime.gates import Failure
from morphc.runtime.sharded import is_dtensor
from morphc.runtime.site import SeedSite

if TYPE_CHECKING:
    from morphc.runtime.store import SeedStore

Hook = Callable[[torch.optim.Optimizer, nn.Parameter, int, Tensor], None]
"""Called with the optimizer, a parameter, an axis and the indices along it that were made anew."""
Incoming = Callable[["Layers", Tensor, torch.Generator], "list[Tensor] | str"]
"""Called with the layers, the units and a generator: the units' incoming weights, one tensor a writer, or why not."""


class Layers(NamedTuple):
    """The layers that write a block's inner units, with the axis of their weight, and the one that reads them.

    activation: the function between; the first writer goes through it. norm: a BatchNorm of the units.
    """

    writers: list[nn.Module]
    reader: nn.Module
    activation: str = "identity"
    norm: nn.Module | None = None


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
        if any(is_dtensor(param) for layer in layers for param in layer.parameters(recurse=False)):
            return "its block's weights are sharded among ranks, and a unit's row may be anywhere"
        return Layers(writers, request.layer, block.activation, store.norms.get(request.path))
    return "no layer is known that alone reads its units (it must be the inner layer of a block)"


def recycle(
    store: SeedStore,
    site: SeedSite,
    chosen: list[int],
    optimizer: torch.optim.Optimizer | None = None,
    hook: Hook | None = None,
    incoming: Incoming | Tensor | Sequence[Tensor] | None = None,
) -> list[Transition]:
    """Fresh incoming weights, zero biases and outgoing weights for the units of dormant seeds.

    incoming: the units' incoming weights, in the order of `chosen`, or what gives them; None draws them from what
    the layer's own initialisation draws.
    """
    mirror = store.mirror()
    layers = layers_of(store, site)
    refusals: dict[int, Failure] = {}
    for seed in chosen:
        source = Lifecycle(int(mirror.lifecycle[site.offset + seed]))
        if isinstance(layers, str):
            reason = f"block: {site.path!r} can't be recycled: {layers}"
            refusals[seed] = Failure("block", math.nan, math.nan, reason)
        elif source is not Lifecycle.DORMANT:
            reason = f"state: {source.name}, must be DORMANT; a seed that is at work has to be pruned first"
            refusals[seed] = Failure("state", float(source), float(Lifecycle.DORMANT), reason)
    free = [seed for seed in chosen if seed not in refusals]
    if free and not isinstance(layers, str):
        units = torch.cat([torch.arange(*bounds(site.features, site.seeds)[seed]) for seed in free])
        generator = torch.Generator().manual_seed(_draw(site, layers, units, mirror.tick))
        fresh = _incoming(site, layers, units, generator, incoming)
        if isinstance(fresh, str):
            reason = f"candidates: {fresh}"
            refusals |= dict.fromkeys(free, Failure("candidates", math.nan, math.nan, reason))
        else:
            _renew(layers, units, fresh, optimizer, hook)
    out = []
    for seed in chosen:
        source = Lifecycle(int(mirror.lifecycle[site.offset + seed]))
        if seed in refusals:
            out.append(commands.refused(site, seed, source, Lifecycle.DORMANT, refusals[seed]))
        else:
            out.append(Transition(site.path, seed, source, Lifecycle.DORMANT, True))
    return out


def weight_of(layer: nn.Module) -> nn.Parameter:
    """The layer's weight."""
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)
    return weight


def drawn(layer: nn.Module, count: int, generator: torch.Generator) -> Tensor:
    """[count, in, *kernel] float32 on the CPU: rows as `nn.Linear` and `nn.Conv` start from, U(+-1/sqrt(fan_in))."""
    weight = weight_of(layer)
    bound = 1 / math.sqrt(weight[0].numel())
    return torch.empty(count, *weight.shape[1:]).uniform_(-bound, bound, generator=generator)


def _draw(site: SeedSite, layers: Layers, units: Tensor, tick: int) -> int:
    """A number for the draw. It depends on what the units were, so a unit that dies again isn't given the same."""
    rows = weight_of(layers.writers[0]).detach()
    before = rows[units.to(rows.device)].to("cpu", torch.float32).numpy().tobytes()
    return zlib.crc32(before, zlib.crc32(f"recycle/{site.path}/{units.tolist()}/{tick}".encode()))


def _incoming(
    site: SeedSite,
    layers: Layers,
    units: Tensor,
    generator: torch.Generator,
    given: Incoming | Tensor | Sequence[Tensor] | None,
) -> list[Tensor] | str:
    if given is None:
        return [drawn(layer, len(units), generator) for layer in layers.writers]
    if callable(given) and not isinstance(given, Tensor):
        return given(layers, units, generator)
    rows = [given] if isinstance(given, Tensor) else list(given)
    wanted = [(len(units), *weight_of(layer).shape[1:]) for layer in layers.writers]
    if [tuple(each.shape) for each in rows] != wanted:
        raise SeedError(
            f"incoming for {len(units)} units of {site.path!r} has shapes {[tuple(each.shape) for each in rows]}, must "
            f"be {wanted}: the units' rows of {'the weight' if len(wanted) == 1 else 'each weight'} that writes them"
        )
    return rows


@torch.no_grad()
def _renew(
    layers: Layers,
    units: Tensor,
    incoming: Sequence[Tensor],
    optimizer: torch.optim.Optimizer | None,
    hook: Hook | None,
) -> None:
    for layer, fresh in zip(layers.writers, incoming, strict=True):
        weight, bias = weight_of(layer), layer.bias
        weight[units.to(weight.device)] = fresh.to(weight)
        _forget(optimizer, weight, 0, units, hook)
        if isinstance(bias, nn.Parameter):
            bias[units.to(bias.device)] = 0
            _forget(optimizer, bias, 0, units, hook)
    for name, value in (("weight", 1), ("bias", 0), ("running_mean", 0), ("running_var", 1)):
        # A scale that has gone to zero would keep the new unit silent.
        own = getattr(layers.norm, name, None)
        if isinstance(own, Tensor):
            own[units.to(own.device)] = value
        if isinstance(own, nn.Parameter):
            _forget(optimizer, own, 0, units, hook)
    weight = weight_of(layers.reader)
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


@torch.no_grad()
def forget_everything(optimizer: torch.optim.Optimizer, hook: Hook | None = None) -> None:
    """Let an optimizer of Adam's family begin anew: moments of the parameters' shapes and the step become 0.

    The hook hears of every row of every parameter, as in `recycle`.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            for name, value in state.items():
                if isinstance(value, Tensor) and (value.shape == parameter.shape or name == "step"):
                    value.zero_()
                elif name == "step":
                    state[name] = 0
            if hook is not None and parameter.dim():
                hook(optimizer, parameter, 0, torch.arange(parameter.shape[0]))
