"""What is known of a block's units from its own forward: how active they are, and which fresh ones would help most.

`Activity` averages |h| of every unit over training forwards (the score of ReDo, Sokar et al. 2023). `Probes` keeps what
a block's first layers read (x) and the gradient g at what its last layer wrote, of one forward; of a fresh unit with
output h, the best outgoing weights take |h'g|^2 / |h|^2 of the squared gradient, and candidates are ranked by that.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from morphc.kernels.reference.activations import activation
from morphc.runtime.plain import Watcher
from morphc.runtime.recycling import Layers, drawn, layers_of, weight_of

if TYPE_CHECKING:
    from morphc.runtime.store import SeedStore

MOST_ROWS: Final = 4096
"""Rows of a batch that candidates are ranked on; more are thinned out evenly."""


def unit_axis(layer: nn.Module) -> int:
    """The axis of a Linear's or a convolution's input along which its units lie, counted from the end."""
    return -1 if isinstance(layer, nn.Linear) else 1 - weight_of(layer).dim()


def _training(layer: nn.Module) -> bool:
    return layer.training and torch.is_grad_enabled() and not is_compiling()


class Activity(Watcher):
    """Mean |h| of every unit of the blocks that can be recycled; every n-th training forward counts."""

    def __init__(self, store: SeedStore, every: int) -> None:
        self.every = max(1, every)
        self.sums: dict[str, Tensor] = {}
        self.forwards: dict[str, int] = {}
        self.counted: dict[str, int] = {}
        self._handles: list[RemovableHandle] = []
        for path, site in store.sites.items():
            layers = layers_of(store, site)
            if isinstance(layers, Layers):
                hook = partial(self._see, path)
                self._handles.append(layers.reader.register_forward_pre_hook(hook))

    def close(self) -> None:
        """Take the hooks out again."""
        for handle in self._handles:
            handle.remove()

    @torch.no_grad()
    def _see(self, path: str, reader: nn.Module, args: tuple[Any, ...]) -> None:
        if not (args and isinstance(args[0], Tensor) and reader.training) or is_compiling():
            return
        if torch._C._current_graph_task_id() != -1:
            return  # a checkpoint computes its forward again, inside the backward
        self.forwards[path] = self.forwards.get(path, 0) + 1
        if (self.forwards[path] - 1) % self.every:
            return
        h = args[0].detach()
        axis = unit_axis(reader)
        found = h.abs().to(torch.float32).movedim(axis, -1).flatten(0, -2).mean(0)
        self.sums[path] = self.sums[path] + found if path in self.sums else found
        self.counted[path] = self.counted.get(path, 0) + 1

    def take(self) -> dict[str, Tensor]:
        """[units] float64 on the CPU by site: the mean since the last call. Reads the device."""
        found = {path: total.cpu().double() / self.counted[path] for path, total in self.sums.items()}
        self.sums.clear()
        self.counted.clear()
        return found


Choice = Callable[[Layers, Tensor, torch.Generator], "list[Tensor] | str"]
"""The incoming weights of the best fresh units, one tensor for each writer, or why there are none."""


class Probes(Watcher):
    """x and g of the last training forward of every block that can be recycled, while it is armed."""

    def __init__(self, store: SeedStore) -> None:
        self.store = store
        self._reads: dict[str, Tensor] = {}
        self._gradients: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = []

    def arm(self) -> None:
        """Look at the coming forwards."""
        self.disarm()
        for path, site in self.store.sites.items():
            layers = layers_of(self.store, site)
            if isinstance(layers, Layers):
                reads = layers.writers[0].register_forward_pre_hook(partial(self._read, path))
                wrote = layers.reader.register_forward_hook(partial(self._wrote, path))
                self._handles += [reads, wrote]

    def disarm(self) -> None:
        """Look no more, and hold no batch any longer."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._reads.clear()
        self._gradients.clear()

    def _read(self, path: str, layer: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor) and _training(layer):
            self._reads[path] = args[0].detach()

    def _wrote(self, path: str, layer: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        if isinstance(out, Tensor) and out.requires_grad and _training(layer):
            out.register_hook(partial(self._gradients.__setitem__, path))  # type: ignore[no-untyped-call]

    def best(self, path: str, candidates: int) -> Choice:
        """For `recycling.recycle`: the incoming weights of the best of so many fresh units."""

        def choose(layers: Layers, units: Tensor, generator: torch.Generator) -> list[Tensor] | str:
            x, g = self._reads.get(path), self._gradients.get(path)
            if x is None or g is None or x.shape[0] != g.shape[0] or not x.numel():
                return (
                    "no training forward and backward of its block was seen at the step before this tick (or one of no "
                    "rows); they are ranked on that batch"
                )
            if not g.isfinite().all():
                return (
                    "the gradient of the batch before this tick isn't finite; they are ranked on that batch"
                )
            if layers.norm is not None:
                return "fresh units can't be ranked through the BatchNorm of its block"
            return best_incoming(layers, x, g.detach(), len(units), max(candidates, len(units)), generator)

        return choose


def best_incoming(
    layers: Layers, x: Tensor, g: Tensor, count: int, candidates: int, generator: torch.Generator
) -> list[Tensor]:
    """Incoming weights of the `count` best of `candidates` fresh units, best first; one tensor for each writer.

    x: [rows, ..., in] or [N, in, *spatial], what the writers read. g: the loss's gradient at what the reader wrote.
    """
    x, g = _thinned(x, layers.reader), _thinned(g, layers.reader)
    rows = [drawn(writer, candidates, generator).to(x.device) for writer in layers.writers]
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        h = activation(layers.activation)(_run(layers.writers[0], x, rows[0]))
        for writer, more in zip(layers.writers[1:], rows[1:], strict=True):
            h = h * _run(writer, x, more)
        shape = list(weight_of(layers.reader).shape)
        shape[1] = candidates
        with torch.enable_grad():
            # The gradient of outgoing weights is h'g, whatever kind of layer reads them.
            out = torch.zeros(shape, device=x.device, requires_grad=True)
            (cross,) = torch.autograd.grad(_run(layers.reader, h, out), out, g)
        norms = h.movedim(unit_axis(layers.reader), 0).flatten(1).square().sum(1)
        gain = cross.movedim(1, 0).flatten(1).square().sum(1) / norms.clamp(min=1e-12)
        order = gain.argsort(descending=True, stable=True)[:count]
    return [each[order] for each in rows]


def _thinned(value: Tensor, layer: nn.Module) -> Tensor:
    """Float32, at most `MOST_ROWS` rows of it; a Linear's are flattened."""
    value = value.to(torch.float32)
    if isinstance(layer, nn.Linear):
        value = value.reshape(-1, value.shape[-1])
    return value[:: -(-value.shape[0] // MOST_ROWS)]


def _run(layer: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """The layer with another weight, of other width, and without its bias."""
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        out: Tensor = layer._conv_forward(x, weight, None)
        return out
    return functional.linear(x, weight)
