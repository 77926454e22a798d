"""`SeedSite`: one watched activation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.utils.rnn import PackedSequence

from morphc.errors import SeedError
from morphc.lifecycle import ISOLATED, Mode
from morphc.runtime import active, compact, engine, isolation, traced
from morphc.runtime.active import jit_traced
from morphc.runtime.bank import SlotBank
from morphc.runtime.cells import Cells
from morphc.runtime.devicegauge import DeviceGauge
from morphc.runtime.meta import refuses
from morphc.runtime.sharded import is_dtensor, laid_out_as, on_every_rank
from morphc.runtime.telemetry import Gauge, accumulate, accumulate_gradient, exporting

if TYPE_CHECKING:
    from morphc.runtime.state import SeedState


_backward_task = torch._C._current_graph_task_id


class Pulse:
    """Counts a site's training forwards in eager mode; assigning to a module's attribute would be slow.

    What the gauge remembers is for speed, and never copied or pickled.
    """

    __slots__ = ("count", "every", "gauge")

    def __init__(self, every: int, count: int = 0) -> None:
        self.every = every
        self.count = count
        self.gauge: Gauge | DeviceGauge | None = None

    def __reduce__(self) -> tuple[type[Pulse], tuple[int, int]]:
        return Pulse, (self.every, self.count)


class Banks(nn.Module):
    """The banks of one site by blueprint."""

    def __init__(self, banks: dict[str, SlotBank]) -> None:
        super().__init__()
        for name, bank in banks.items():
            self.add_module(name, bank)

    def items(self) -> list[tuple[str, SlotBank]]:
        """(blueprint, bank) in the order of the configuration."""
        return [(name, bank) for name, bank in self._modules.items() if isinstance(bank, SlotBank)]

    def __repr__(self) -> str:
        return f"Banks({', '.join(repr(bank) for _, bank in self.items())})"

    def get(self, blueprint: str) -> SlotBank | None:
        """The bank of that blueprint, or None."""
        bank = self._modules.get(blueprint)
        return bank if isinstance(bank, SlotBank) else None


class SeedSite(nn.Module):
    """One watched activation: `features` along `feature_axis`, cut into `seeds` chunks.

    Its rows in the model's state are `offset` to `offset + seeds`. `mode` mirrors what was commanded.
    `refusals` says of each configured blueprint without a bank here why.
    """

    slots: Banks

    def __init__(
        self,
        path: str,
        features: int,
        seeds: int,
        *,
        feature_axis: int = -1,
        offset: int = 0,
        state: SeedState,
        banks: dict[str, SlotBank] | None = None,
        refusals: dict[str, str] | None = None,
        telemetry_every: int = 16,
        telemetry_values: int = 0,
        epilogue: str | None = None,
        near_zero: float = 0.0,
        gradient_telemetry: bool = False,
        straight_through: bool = True,
    ) -> None:
        super().__init__()
        self.path = path
        self.features = features
        self.seeds = seeds
        self.feature_axis = feature_axis
        self.offset = offset
        self.telemetry_every = telemetry_every
        self.telemetry_values = telemetry_values
        self.epilogue = epilogue
        self.near_zero = near_zero
        self.gradient_telemetry = gradient_telemetry
        # The set of states whose slots get the task's gradient apart from the host.
        self.isolated_states = ISOLATED if straight_through else 0
        self.refusals = refusals or {}
        self.mode = Mode.DORMANT
        self.slots = Banks(banks or {})
        self.pulse = Pulse(telemetry_every)
        self.engine = engine.Engine()
        self.block_input: Tensor | None = None
        self.fitting: isolation.Fitting | None = None
        # Not a child: the state belongs to the root, and must not be moved or saved once per site.
        self.__dict__["state"] = state
        # What a hidden root can't have as a child, so that one site, reached by every walk of the tree, takes it along.
        # One alone: what `to_empty` moves twice loses the values that it got when it left meta.
        self.__dict__["carried"] = None
        # Sites that stand for parts of this one, and are in its mode.
        self.__dict__["parts"] = ()
        self.follow_plan()

    if TYPE_CHECKING:
        state: SeedState
        anchor: Tensor
        cell: Tensor
        cells: Cells

    def forward(self, y: Tensor, layer_input: Tensor | None = None) -> Tensor:
        """The site's value. Dormant: the very tensor that came in."""
        if is_compiling():
            return self.traced(y, layer_input, self.training)
        if self.training:
            self.watch(y)
        return self.join(y, layer_input) if self.mode else y

    def traced(self, y: Tensor, layer_input: Tensor | None, training: bool) -> Tensor:
        """The site's value in a graph that is being traced. One that is exported holds what the site does now."""
        if exporting():
            return self.join(y, layer_input) if self.mode else y
        return traced.through(self, y, layer_input, training)

    def watch(self, y: Tensor) -> bool:
        """Count one training forward of the layer, and measure it when telemetry is due; whether it was."""
        pulse = self.pulse
        every = pulse.every
        if not every:
            return False
        if _backward_task() != -1:
            return False  # a checkpoint computes its forward again, inside the backward
        count = pulse.count
        pulse.count = count + 1
        # Nothing is asked of `y` in a torch.jit.trace, which would record the asking.
        due = count % every == 0 and not jit_traced()
        measured = due and accumulate(self, on_every_rank(y.detach()) if is_dtensor(y) else y)
        if measured and self.gradient_telemetry and y.requires_grad and torch.is_grad_enabled():
            y.register_hook(_gradient_hook(self, on_every_rank(y.detach())))  # type: ignore[no-untyped-call]
        return measured

    def follow_plan(self, device: torch.device | None = None) -> None:
        """Derive what traced graphs hold of the site, after its banks or their device have changed.

        device: where the site is, if it has no bank to tell.
        """
        banks = [bank for _, bank in self.slots.items()]
        self.taps = frozenset(bank.kind.tap for bank in banks)
        # Not the path: equal blocks, compiled one by one, are to share a graph.
        # The ops' schemas: what a cache of the compiler kept from before a change of them isn't to be found.
        plan = [*traced.SCHEMAS, self.features, self.seeds, self.feature_axis, self.epilogue]
        plan += [engine.spec_of_bank(self, bank).text() for bank in banks]
        self.key = hashlib.sha256(json.dumps(plan).encode()).hexdigest()[:16]
        cells: Cells | None = self.__dict__.get("cells")
        if banks:
            device = banks[0].owner.device
        elif device is None:
            device = cells.device if cells is not None else self.state.lifecycle.device
        if cells is None or cells.device != device:
            self.__dict__["cells"] = Cells(self, device)
        self.enter(self.mode)
        for part in self.__dict__["parts"]:
            part.follow_plan(device)

    def enter(self, mode: Mode) -> None:
        """Be in `mode`, in eager mode and in compiled graphs."""
        self.mode = mode
        self.__dict__.update(cell=self.cells.of[mode], anchor=self.cells.anchor)
        for part in self.__dict__["parts"]:
            part.enter(mode)

    def __getstate__(self) -> dict[str, Any]:
        # They stand for this very object.
        return {
            name: value for name, value in self.__dict__.items() if name not in ("anchor", "cell", "cells")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        # The state may still be on its way.
        banks = [bank for _, bank in self.slots.items() if "_buffers" in bank.__dict__]
        self.__dict__["cells"] = Cells(self, banks[0].owner.device if banks else torch.device("cpu"))
        self.enter(self.mode)

    @property
    def backend(self) -> str:
        """What `Config.backend` says."""
        store = self.state.store
        return store.config.backend if store is not None else "auto"

    def join_ready(self, y: Any, owned: bool, early: bool) -> Tensor | None:
        """What `join` gives, where all that it asks of a bank and a shape was asked before; None elsewhere."""
        if type(y) is not Tensor or self.fitting is not None or self.mode is Mode.TRAINING:
            return None
        ready = self.engine.ready.get(y.shape)
        if ready is None or not ready.holds(self, y):
            return None
        if self.block_input is not None:  # setting an attribute of a module takes a microsecond
            self.block_input = None
        return ready.join(self, y, False, owned, early)

    def join(
        self, y: Tensor, layer_input: Tensor | None = None, owned: bool = False, early: bool = False
    ) -> Tensor:
        """`y` with the slots of the site's seeds joined, as the state of each asks.

        owned: nobody but the caller holds `y`, which may then be written in place. early: nothing was launched on
        the stream since this site measured `y`.
        """
        if type(y) is not Tensor and is_dtensor(y):
            self.block_input = (
                self.block_input if self.block_input is None else on_every_rank(self.block_input)
            )
            tap = layer_input if layer_input is None else on_every_rank(layer_input)
            return laid_out_as(self.join(on_every_rank(y), tap), y)
        fitting = self.fitting
        if fitting is None or not self.training or is_compiling():
            return self._join(y, layer_input, owned, early)
        if active.takes_hooks() and not active.recomputed():
            return self._learn(fitting, y, layer_input, owned)
        return self._join(y, layer_input, owned, early)

    def _learn(
        self, fitting: isolation.Fitting, y: Tensor, layer_input: Tensor | None, owned: bool
    ) -> Tensor:
        """`join` in training, with a look at the seeds that learn in isolation."""
        hooks = isolation.watch(self, fitting, y, layer_input)
        out = self._join(y, layer_input, owned, False)
        if hooks and isinstance(out, Tensor) and out.requires_grad:
            for hook in hooks:
                out.register_hook(hook)  # type: ignore[no-untyped-call]
        return out

    def _join(self, y: Tensor, layer_input: Tensor | None, owned: bool, early: bool) -> Tensor:
        if self.mode is Mode.TRAINING and not isolation.straight(self):
            self.block_input = None
            return y
        if not is_compiling() and type(y) is Tensor:
            ready = self.engine.ready.get(y.shape)
            if ready is not None and ready.holds(self, y):
                self.block_input = None
                return ready.join(self, y, self.mode is Mode.TRAINING, owned, early)
        if not isinstance(y, Tensor) or not y.is_floating_point() or y.is_nested or y.layout != torch.strided:
            return y
        if y.shape[self.feature_axis] != self.features:
            raise SeedError(
                f"site {self.path!r} was made for {self.features} features, its layer now gives "
                f"{y.shape[self.feature_axis]} (shape {tuple(y.shape)})"
            )
        block_input, self.block_input = self.block_input, None
        isolated_only = self.mode == Mode.TRAINING
        if isolated_only and not active.slots_learn():
            return y
        out = y
        described: tuple[Tensor, Tensor] | None = None
        for name, bank in self.slots.items():
            kind = bank.kind
            tap = {"chunk": None, "layer": layer_input, "block": block_input}[kind.tap]
            if tap is None and kind.tap != "chunk":
                raise SeedError(
                    f"site {self.path!r}: blueprint {name!r} reads the {kind.tap}'s input, and got none"
                )
            joined = engine.join(self, name, bank, out, tap, isolated_only=isolated_only, owned=owned)
            if joined is not None:
                out, owned = joined, True
                continue
            joined = compact.join(self, name, bank, out, tap, isolated_only)
            if joined is not None:
                out = joined
                continue
            described = described or self._states_on(y.device)
            out = active.through_bank(
                out,
                y,
                tap,
                bank.leaves(),
                active.describe(
                    self.owner_of(bank), *described, self.features, self.seeds, self.isolated_states
                ),
                kind,
                bank.geometry,
                bank.blend,
                self.feature_axis,
                isolated_only=isolated_only,
            )
        return out

    def _states_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Lifecycle and alpha [S] of the site's seeds, on `device`."""
        rows = slice(self.offset, self.offset + self.seeds)
        lifecycle, alpha = self.state.lifecycle[rows], self.state.alpha[rows]
        if lifecycle.device != device:
            return lifecycle.to(device, non_blocking=True), alpha.to(device, non_blocking=True)
        return lifecycle, alpha

    def owner_of(self, bank: SlotBank) -> Tensor:
        """[K]: the seed of this site that holds each slot, -1 where there is none."""
        return bank.owner

    def train_rows(self, bank: SlotBank) -> Tensor:
        """[K] bool: the slots of `bank` whose owner's state trains."""
        rows = slice(self.offset, self.offset + self.seeds)
        state = self.state
        return active.describe(bank.owner, state.lifecycle[rows], state.alpha[rows], self.features).trains

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SeedSite:
        store = self.state.store
        bank = next((bank for _, bank in self.slots.items() if bank.on_meta), None)
        if store is not None and bank is not None and refuses(fn, bank.owner):
            store.leave_meta()
        probe = fn(torch.zeros(1, device=self.cells.device))
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        carried: nn.Module | None = self.__dict__.get("carried")
        if carried is not None:
            carried._apply(fn)  # type: ignore[no-untyped-call]
        self.follow_plan(probe.device)
        return self

    def __repr__(self) -> str:
        """One line, for there is a site behind every layer of a printed model."""
        banks = " + ".join(f"{bank.slots} {name}" for name, bank in self.slots.items())
        return (
            f"SeedSite({self.path!r}, features={self.features}, seeds={self.seeds}, slots={banks or 'none'}, "
            f"mode={self.mode.name})"
        )


class FunctionalSites(nn.Module):
    """The sites of a module that applies its own parameters itself: one child a parameter name."""


def _gradient_hook(site: SeedSite, value: Tensor) -> Callable[[Tensor], None]:
    def hook(grad: Tensor) -> None:
        accumulate_gradient(site, value, on_every_rank(grad.detach()))

    return hook


def first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The layer's input: its first positional argument, else its first keyword, that is a floating tensor.

    Of a packed sequence the data, [rows, features], whose rows are those of the output's data.
    """
    for value in (*args, *kwargs.values()):
        if isinstance(value, PackedSequence):
            value = value.data
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
    return None
