"""`RecycleController`: the host's own dormant units begin anew, and what keeps the rest of it learnable."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from morphc.errors import ConfigError, MorphcWarning
from morphc.grow.controllers import Command, Controller, Do, Observation, ResetMoments
from morphc.grow.probes import Activity
from morphc.grow.tree import clone
from morphc.lifecycle import Lifecycle
from morphc.runtime import recycling
from morphc.runtime.store import store_of

REST: Final = 50
"""Steps after a jump of the loss in which there is no other."""
MEMORY: Final = 0.95
"""How much of the loss's mean and spread is kept at every step, to tell a jump by."""
SIGMA: Final = 4.0
LEAST: Final = 8
"""Ticks before a loss can be called a jump."""


class Jumps:
    """Tells when the loss jumps: above `factor` times its running mean, and by 4 of its standard deviations."""

    def __init__(self, factor: float) -> None:
        self.factor = factor
        self.mean = self.variance = self.weight = 0.0
        self.ticks = self.step = 0
        self.rest = 0

    def tell(self, loss: float, step: int) -> bool:
        """Take in a tick's mean loss; a jump forgets what was before it."""
        passed, self.step = max(1, step - self.step), step
        if not math.isfinite(loss):
            return False
        mean = self.mean / self.weight if self.weight else loss
        spread = math.sqrt(max(0.0, self.variance / self.weight)) if self.weight else 0.0
        jumped = (
            self.ticks >= LEAST
            and step >= self.rest
            and loss - mean > max((self.factor - 1) * abs(mean), SIGMA * spread)
        )
        if jumped:
            self.mean = self.variance = self.weight = 0.0
            self.ticks, self.rest = 0, step + REST
            mean = loss
        keep = MEMORY**passed
        self.mean = keep * self.mean + (1 - keep) * loss
        self.variance = keep * self.variance + (1 - keep) * (loss - mean) ** 2
        self.weight = keep * self.weight + (1 - keep)
        self.ticks += 1
        return jumped


class Pull:
    """L2-init (Kumar et al. 2023): the gradient of strength * |w - w0|^2, added just before the optimizer's step.

    So it reaches the host through its own optimizer, as a term of the loss would. Of a recycled unit, w0 is what it was
    made anew as. Parameters whose gradient is missing or sparse are left alone.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, strength: float) -> None:
        self.strength = strength
        self.parameters = [param for group in optimizer.param_groups for param in group["params"]]
        self.anchors = [param.detach().clone() for param in self.parameters]
        self.handle: RemovableHandle = optimizer.register_step_pre_hook(self._add)

    @torch.no_grad()
    def _add(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        found = [
            (param, anchor)
            for param, anchor in zip(self.parameters, self.anchors, strict=True)
            if param.grad is not None and param.grad.layout == torch.strided
        ]
        if not found:
            return
        gradients = [param.grad for param, _ in found]
        away = torch._foreach_sub([param for param, _ in found], [anchor for _, anchor in found])
        torch._foreach_mul_(away, 2 * self.strength)
        scale = getattr(optimizer, "grad_scale", None)
        if scale is not None:  # a fused optimizer under a GradScaler divides by the scale itself
            torch._foreach_mul_(away, scale.to(away[0].device))
        torch._foreach_add_(gradients, away)

    @torch.no_grad()
    def follow(self, parameter: nn.Parameter, axis: int, indices: Tensor) -> None:
        """Anchor these rows or columns where they are now."""
        for param, anchor in zip(self.parameters, self.anchors, strict=True):
            if param is parameter:
                places = indices.to(anchor.device)
                anchor.index_copy_(axis, places, param.detach().index_select(axis, places))


class RecycleController:
    """Recycles the host's dormant units every `every` optimizer steps, at the tick that has come by then.

    A seed's units are recycled together; with one feature a chunk they are single units. It grows nothing by itself.

    by: what makes a seed dormant.
        `dead`: a dead fraction of at least 1 - tau in the last tick that measured it.
        `activation`: mean |activation| at most tau times its layer's mean (ReDo, Sokar et al. 2023).
        `gradient`: gradient norm before the activation at most tau times its layer's mean; needs
        `Config(gradient_telemetry=True)`.
    The last two are bias-corrected averages over steps that keep `ema` of themselves at each; a recycled seed's begin
    anew. most: share of a site's seeds that are recycled at a time. candidates: a recycled unit is the best of so many
    fresh ones; for the units of one command they are drawn together (see `Grower.recycle`).
    l2_init: strength of L2-init, see `Pull`. moment_reset: whether the optimizer begins anew as a whole: at a jump of
    the loss (`spike`: a tick's mean loss above `jump` times its running mean), or whenever something is recycled
    (`recycle`). The moments of recycled units are cleared in any case. then: what else decides, such as a
    PlateauController.
    """

    def __init__(
        self,
        tau: float = 0.1,
        every: int = 1000,
        by: Literal["dead", "activation", "gradient"] = "dead",
        most: float = 0.25,
        then: Controller | None = None,
        l2_init: float = 0.0,
        *,
        ema: float = 0.99,
        candidates: int = 1,
        moment_reset: Literal["spike", "recycle"] | None = None,
        jump: float = 1.3,
    ) -> None:
        self.tau, self.every, self.by, self.most, self.then, self.l2_init = (
            tau,
            every,
            by,
            most,
            then,
            l2_init,
        )
        self.ema, self.candidates, self.moment_reset = ema, candidates, moment_reset
        self._check(jump)
        self.germinates = then is not None and getattr(then, "germinates", True)
        self.ranks_candidates = candidates > 1
        self.next, self.step = every, 0
        self.sums: Tensor | None = None
        self.weights: Tensor | None = None
        self.jumps = Jumps(jump)
        self.pull: Pull | None = None
        self.activity: Activity | None = None

    def _check(self, jump: float) -> None:
        bounds: tuple[tuple[str, object, bool, str], ...] = (
            ("tau", self.tau, 0.0 <= self.tau <= 1.0, "between 0 and 1"),
            ("every", self.every, self.every >= 1, "at least 1"),
            ("by", self.by, self.by in ("dead", "activation", "gradient"), "dead, activation or gradient"),
            ("most", self.most, 0.0 < self.most <= 1.0, "above 0 and at most 1"),
            ("l2_init", self.l2_init, 0.0 <= self.l2_init < math.inf, "finite and not negative"),
            ("ema", self.ema, 0.0 <= self.ema < 1.0, "at least 0 and below 1"),
            ("candidates", self.candidates, self.candidates >= 1, "at least 1"),
            (
                "moment_reset",
                self.moment_reset,
                self.moment_reset in ("spike", "recycle", None),
                "spike, recycle or None",
            ),
            ("jump", jump, jump > 1.0, "above 1"),
        )
        for name, value, holds, wanted in bounds:
            if not holds:
                raise ConfigError(f"RecycleController({name}={value!r}): {name} must be {wanted}")

    def begin(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Called by the Grower that it is given to: anchors are taken, and activations watched if they are needed."""
        store = store_of(model)
        if self.by != "activation" and not store.config.telemetry_every:
            raise ConfigError(
                f"RecycleController(by={self.by!r}) goes by telemetry, which telemetry_every=0 turns off; compile "
                "the model with Config(telemetry_every=1) or more"
            )
        if self.by == "gradient" and not store.config.gradient_telemetry:
            raise ConfigError(
                'RecycleController(by="gradient") measures nothing in this model; compile it with '
                "Config(gradient_telemetry=True)"
            )
        found = {path: recycling.layers_of(store, site) for path, site in store.sites.items()}
        reasons = Counter(why for why in found.values() if isinstance(why, str))
        normed = [
            path for path, layers in found.items() if not isinstance(layers, str) and layers.norm is not None
        ]
        if normed and self.candidates > 1:
            names = ", ".join(map(repr, normed))
            warnings.warn(
                f"RecycleController(candidates={self.candidates}): nothing is recycled at {names}, as fresh units "
                "can't be ranked through a BatchNorm; candidates=1 recycles there",
                MorphcWarning,
                stacklevel=3,
            )
        if reasons.total() == len(store.sites) and not self.l2_init:
            ((why, count),) = reasons.most_common(1)
            warnings.warn(
                f"RecycleController: nothing in this model can be recycled; of {count} of its {len(store.sites)} "
                f"sites: {why}. SiteHandle.why_not_recycled tells of each",
                MorphcWarning,
                stacklevel=3,
            )
        if self.pull is not None:
            self.pull.handle.remove()
        if self.activity is not None:
            self.activity.close()
        self.pull = Pull(optimizer, self.l2_init) if self.l2_init else None
        self.activity = Activity(store, store.config.telemetry_every) if self.by == "activation" else None
        begin = getattr(self.then, "begin", None)
        if begin is not None:
            begin(model, optimizer)

    def decide(self, seen: Observation) -> Sequence[Command]:
        """Recycle what is dormant, if it is time; and what the inner controller says."""
        commands: list[Command] = list(self.then.decide(seen)) if self.then is not None else []
        self._average(seen)
        reset = self.moment_reset == "spike" and self.jumps.tell(seen.loss, seen.step)
        if seen.step >= self.next:
            self.next = seen.step + self.every
            dormant = self._dormant(seen)
            commands += dormant
            reset |= self.moment_reset == "recycle" and bool(dormant)
        return [*commands, ResetMoments()] if reset else commands

    def _average(self, seen: Observation) -> None:
        """Take this tick's measurements into the averages [N]."""
        passed, self.step = max(1, seen.step - self.step), seen.step
        measured = seen.measured
        if self.by == "dead":
            values = 1 - seen.telemetry["dead_fraction"]
        elif self.by == "gradient":
            values = seen.telemetry["gradient_norm"]
        else:
            values = self._activations(seen)
            measured = torch.ones_like(values, dtype=torch.bool)
        measured = measured & values.isfinite()
        if self.sums is None or self.weights is None:
            self.sums, self.weights = torch.zeros_like(values), torch.zeros_like(values)
        keep = self.ema**passed if self.by != "dead" else 0.0
        self.sums = torch.where(measured, keep * self.sums + (1 - keep) * values, self.sums)
        self.weights = torch.where(measured, keep * self.weights + (1 - keep), self.weights)

    def _activations(self, seen: Observation) -> Tensor:
        """[N]: mean |activation| of each seed's units in this tick, NaN where nothing was measured."""
        values = torch.full((len(seen.measured),), math.nan, dtype=torch.float64)
        for path, units in (self.activity.take() if self.activity is not None else {}).items():
            handle = seen.seeds[path]
            widths = torch.tensor([stop - start for start, stop in handle.chunks])
            owners = torch.arange(len(handle)).repeat_interleave(widths)
            total = torch.zeros(len(handle), dtype=torch.float64).index_add_(0, owners, units)
            values[handle.rows] = total / widths
        return values

    def _dormant(self, seen: Observation) -> list[Command]:
        """Commands to recycle; the averages of what they name begin anew."""
        found: list[Command] = []
        assert self.sums is not None
        assert self.weights is not None
        for path, handle in seen.seeds.sites.items():
            if handle.why_not_recycled:
                continue
            # NaN where nothing was measured since the units began: they are not dormant.
            level = self.sums[handle.rows] / self.weights[handle.rows]
            if self.by != "dead":
                # Where nothing at all moves the mean is 0 and the level NaN: no unit is below the rest.
                level = level / level.nanmean()
            free = torch.from_numpy(seen.lifecycle[handle.rows].values == int(Lifecycle.DORMANT))
            order = torch.argsort(level.nan_to_num(nan=math.inf), stable=True)
            chosen = order[(free & (level <= self.tau))[order]].tolist()
            chosen = chosen[: max(1, int(self.most * len(handle)))]
            if not chosen:
                continue
            found.append(Do("recycle", path, tuple(chosen), self.candidates))
            rows = torch.tensor(chosen) + handle.rows.start
            self.sums[rows] = self.weights[rows] = 0.0
        return found

    def after_step(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Pass it on to the inner controller."""
        after = getattr(self.then, "after_step", None)
        if after is not None:
            after(model, optimizer)

    def recycled(self, parameter: nn.Parameter, axis: int, indices: Tensor) -> None:
        """Let the anchor of units that were made anew follow them."""
        if self.pull is not None:
            self.pull.follow(parameter, axis, indices)

    def state_dict(self) -> dict[str, Any]:
        """When to recycle next, the averages, the anchors of L2-init, and the inner controller's state."""
        inner = getattr(self.then, "state_dict", None)
        state: dict[str, Any] = clone(
            {
                "next": self.next,
                "step": self.step,
                "sums": self.sums,
                "weights": self.weights,
                "jumps": {name: value for name, value in vars(self.jumps).items() if name != "factor"},
                "anchors": self.pull.anchors if self.pull is not None else [],
                "then": inner() if inner is not None else None,
            }
        )
        return state

    @torch.no_grad()
    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.next, self.step = saved["next"], saved["step"]
        self.sums, self.weights = clone(saved["sums"]), clone(saved["weights"])
        vars(self.jumps).update(saved["jumps"])
        if self.pull is not None:
            if len(saved["anchors"]) != len(self.pull.anchors):
                raise ConfigError(
                    f"the saved RecycleController has {len(saved['anchors'])} anchors of L2-init, this optimizer "
                    f"{len(self.pull.anchors)} parameters"
                )
            for own, kept in zip(self.pull.anchors, saved["anchors"], strict=True):
                own.copy_(kept)
        inner = getattr(self.then, "load_state_dict", None)
        if inner is not None and saved["then"] is not None:
            inner(saved["then"])
