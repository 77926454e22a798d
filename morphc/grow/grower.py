"""`Grower`: grows a compiled model while the user's own loop trains it. Used as a learning-rate scheduler is.

grower = morphc.Grower(model, optimizer, evaluate=validation_loss)
for x, y in batches:
    loss = criterion(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    grower.step(loss)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from morphc.errors import ConfigError, SeedError
from morphc.grow import linesearch
from morphc.grow.checks import check_arguments, warn_of_setup
from morphc.grow.controllers import (
    Advance,
    Command,
    Controller,
    Germinate,
    Observation,
    PlateauController,
    ResetMoments,
    States,
    commands_of,
)
from morphc.grow.evaluation import Evaluate, number
from morphc.grow.hostrates import HostRates
from morphc.grow.linesearch import Refit
from morphc.grow.measuring import Measuring
from morphc.grow.patience import give_up
from morphc.grow.probes import Choice, Probes
from morphc.grow.ranks import ProcessGroup, ranks_of
from morphc.grow.rollback import Cohorts, offenders, roll_back, worse_by
from morphc.grow.snapshot import (
    Snapshot,
    check_optimizer,
    model_state,
    optimizer_state,
    restore_model,
    restore_optimizer,
    restore_rng,
    rng_state,
)
from morphc.grow.tree import clone
from morphc.lifecycle import Lifecycle
from morphc.runtime import recycling, ticking
from morphc.runtime.commands import Transition
from morphc.runtime.seeds import Seeds, state_of
from morphc.runtime.sharded import check_unsharded
from morphc.runtime.store import store_of

_L = Lifecycle


@dataclass
class Event:
    """What happened at a step: what the tick and the controller moved or refused, and a rollback's reason.

    refits: how the out-weights of seeds that were grafted got their size, by (path, index).
    """

    step: int
    transitions: list[Transition] = field(default_factory=list)
    refits: dict[tuple[str, int], Refit] = field(default_factory=dict)
    rolled_back: str = ""
    rewound_to: int | None = None

    def __bool__(self) -> bool:
        return bool(self.transitions) or bool(self.rolled_back)


class Grower:
    """Ticks, isolated steps, grafts, gates, counterfactual evaluation, snapshots and rollback of one model.

    evaluate: model -> metric on validation data; it is called in eval mode without gradients, and random states are as
    before afterwards. better: whether a `lower` or a `higher` metric is better, in `evaluate` and in `epoch`.
    scaler, scheduler: the user's own, if any; they are only read, saved and restored. tick_every: steps a tick.
    on_recycle: called with (optimizer, parameter, axis, indices) for every parameter that `recycle` renewed, for
    optimizers whose state isn't shaped as the parameter.

    process_group: the ranks that train the model together; None for the default group of torch.distributed if it is
    initialised. Every rank has a Grower, made after DDP or `fully_shard` wrapped the model, and calls the same methods.
    Rank 0's controller decides, metrics and losses are averaged, and RankError says where ranks are not alike.
    batches_per_step: how many of the ranks see a batch of their own; under tensor parallelism several share one.

    Call `step` after `optimizer.step()` and before gradients are cleared. Between ticks nothing waits for the device.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        controller: Controller | None = None,
        evaluate: Evaluate | None = None,
        scaler: Any = None,
        scheduler: Any = None,
        tick_every: int = 16,
        *,
        better: Literal["lower", "higher"] = "lower",
        on_recycle: recycling.Hook | None = None,
        process_group: ProcessGroup | None = None,
        batches_per_step: int | None = None,
    ) -> None:
        check_arguments(optimizer, controller, evaluate, scaler, scheduler, tick_every, better)
        self.ranks = ranks_of(process_group, batches_per_step)
        self.model, self.optimizer = model, optimizer
        self.evaluate: Evaluate | None = None
        if evaluate is not None:
            self.evaluate = self.ranks.evaluating(
                lambda net: number(evaluate(net), "what evaluate= returned")
            )
        self.controller: Controller = controller if controller is not None else PlateauController()
        self.scaler, self.scheduler, self.on_recycle = scaler, scheduler, on_recycle
        self.tick_every, self.lower = tick_every, better == "lower"
        self.seeds = Seeds(model)
        self.store = store_of(model)
        self.config = self.store.config
        self.steps = self.ticks = 0
        self.metrics: list[float] = []
        self.new_epoch = False
        check_unsharded(self.store)
        self.store.shared = not self.ranks.alone
        self.ranks.agree_on_setup(
            model,
            self.store,
            {
                "optimizer": type(optimizer).__name__,
                "tick_every": tick_every,
                "better": better,
                "evaluate": "given" if evaluate is not None else "None",
                "controller": type(self.controller).__name__,
            },
        )
        self.measuring = Measuring(model, self.seeds, self.evaluate, self.lower, self.ranks)
        self.losses, self.ratios = self.measuring.losses, self.measuring.ratios
        self.cohorts = Cohorts(self.store)
        self.before_recycling: Snapshot | None = None
        self._recycled_at = 0
        self._warned: set[str] = set()
        self._closure: Callable[[], Tensor | float] | None = None
        self._window = torch.zeros(tick_every, dtype=torch.float32, device=self.device)
        self.rates = HostRates(model, optimizer, scaler, self.config.seed_lr)
        self.probes = Probes(self.store) if getattr(self.controller, "ranks_candidates", False) else None
        begin = getattr(self.controller, "begin", None)
        if begin is not None:
            begin(model, optimizer)
        self._look_ahead()
        self.store.refresh_modes()
        self.ranks.follow(self.store)
        judged = evaluate is not None or not getattr(self.controller, "germinates", True)
        warn_of_setup(model, optimizer, judged)
        self.store.growers += 1
        self._number = self.store.growers

    def __reduce_ex__(self, protocol: Any) -> str | tuple[Any, ...]:
        raise TypeError(
            "a Grower is neither copied nor pickled: it is tied to its model and optimizer. Make one of the copied "
            "model, or keep its state with snapshot() or state_dict()"
        )

    @property
    def device(self) -> torch.device:
        """Where the seeds' states are."""
        return self.store.state.lifecycle.device

    # -- every step ------------------------------------------------------------------------------------------

    def step(self, loss: Tensor | float, closure: Callable[[], Tensor | float] | None = None) -> Event:
        """After every `optimizer.step()`: the slots' own step, and at every `tick_every`th the tick.

        closure: computes the loss of this step's batch anew. It is called only where a graft begins, in eval mode and
        without gradients, to find the size of what is grafted (see `morphc.grow.linesearch`).
        """
        if self._number != self.store.growers:
            raise ConfigError(
                "another Grower was made of this model after this one, and both would step its slots; call step of the "
                "newer one alone"
            )
        if isinstance(loss, Tensor) and loss.numel() == 1 and not loss.is_complex():
            value = loss.detach()
        else:
            value = torch.tensor(self._number_of_step(loss))
        self._closure = closure
        if value.device != self._window.device and self._window.device != self.device:
            self._window = self._window.to(self.device)
        self._window[self.steps % self.tick_every].copy_(value.reshape(()), non_blocking=True)
        self.steps += 1
        due = self.steps % self.tick_every == 0
        self.ranks.average(self.store)
        if due:
            self.ratios.take()
        self.store.step_optimizer(lr=self.rates.lr(due), scale=self.rates.scale_of_step)
        after = getattr(self.controller, "after_step", None)
        if after is not None:
            after(self.model, self.optimizer)
        event = self.tick() if due else Event(self.steps)
        self._look_ahead()
        return event

    def _number_of_step(self, loss: object) -> float:
        try:
            return number(loss, "the loss given to step")
        except ConfigError as error:
            if self.ranks.alone:
                raise
            # The other ranks go on to what this step sends: all raise at the tick, when they next compare notes.
            self.ranks.failed = error
            return math.nan

    def _look_ahead(self) -> None:
        """Where candidates for recycling are ranked on the batch before a tick, be ready for that batch."""
        if self.probes is None:
            return
        if (self.steps + 1) % self.tick_every == 0:
            self.probes.arm()
        else:
            self.probes.disarm()

    def epoch(self, val_metric: float | Tensor) -> Event:
        """Tell the validation metric of an epoch; a graft that made it worse than the bound is rolled back.

        With several ranks each tells its own, and the mean counts.
        """
        metric = self.ranks.evaluating(lambda _: number(val_metric, "the metric given to epoch"), "epoch")(
            self.model
        )
        event = Event(self.steps)
        told = [cohort for cohort in self.cohorts.open if cohort.metric is not None]
        if told:
            drop = worse_by(metric, told[-1].metric, self.lower)
            if not drop <= self.config.max_metric_drop:
                reason = f"the metric is worse by {drop:.3g}, must be at most {self.config.max_metric_drop:g}"
                event = self._roll_back(reason)
                if event.rolled_back:
                    return event
        self.metrics.append(metric)
        self.new_epoch = True
        return event

    # -- every tick ------------------------------------------------------------------------------------------

    def tick(self) -> Event:
        """One tick: look for trouble, evaluate, move the seeds, let the controller command. `step` calls it."""
        self.ranks.agree(self.store)
        with self.ranks.joined(self.store):
            event = self._tick()
        self.ranks.follow(self.store)
        return event

    def _tick(self) -> Event:
        self.ticks += 1
        filled = (self.steps - 1) % self.tick_every + 1 if self.steps else 0
        trouble = self.losses.tell(self.ranks.mean(self._window[:filled].tolist()))
        self.ratios.read()
        self.measuring.take_health(self.steps)
        if trouble:
            event = self._roll_back(trouble)
            if event.rolled_back:
                return event
        ticking.pause(self.store, self.cohorts.signs(self.measuring))
        per_seed = self.measuring.worth(self.ticks)
        plan = ticking.decide(self.store, None, per_seed, hold=self.cohorts.holds_up())
        grafted = plan.into(_L.GRAFTING)
        self._prepare(grafted)
        event = Event(self.steps, ticking.run(self.store, plan))
        try:
            event.refits = self._size(grafted)
        except BaseException:
            # A user's evaluate or closure: who catches it trains on, with a graft to go back from.
            self._begin(grafted)
            raise
        event.transitions += give_up(self.measuring, event.transitions, self._warned)
        self._begin(grafted)
        self.cohorts.close()
        event.transitions += self._command(event)
        return event

    def _begin(self, grafted: Sequence[int]) -> None:
        """Remember what to go back to if the graft of these rows goes wrong."""
        if grafted:
            metric = self.metrics[-1] if self.metrics else None
            cohort = self.cohorts.begin(
                grafted, self.steps, metric, self.losses.latest, self.measuring.health
            )
            cohort.snapshot = self.snapshot()

    def _prepare(self, rows: Sequence[int]) -> None:
        """What the refit at the graft goes by."""
        latest = self.losses.latest
        scale = float(self.rates.scale) if self.rates.scale is not None else 1.0
        self.store.loss = latest * scale if math.isfinite(latest) else None
        sites = {ticking.site_at(self.store, row)[0].path for row in rows}
        self.store.graft_share = 1 / max(1, len(sites))

    def _size(self, grafted: Sequence[int]) -> dict[tuple[str, int], Refit]:
        """Correct the size of what is being grafted by the loss: the step's own, else a validation loss, if given."""
        objectives: list[tuple[str, Callable[[], float]]] = []
        if self._closure is not None:
            objectives.append(("loss", partial(self._loss_of_step, self._closure)))
        if self.evaluate is not None and self.lower:
            objectives.append(("evaluate", partial(self.evaluate, self.model)))
        found: dict[int, Refit] = {}
        for by, objective in objectives:
            left = [row for row in grafted if row not in found]
            sized = linesearch.size(self.model, self.store, left, objective) if left else {}
            # A batch without rows gives nothing finite.
            found |= {row: Refit(by, *told) for row, told in sized.items() if math.isfinite(told[1])}
        places = {row: ticking.site_at(self.store, row) for row in grafted}
        estimate = Refit("estimate")
        return {(site.path, seed): found.get(row, estimate) for row, (site, seed) in places.items()}

    def _loss_of_step(self, closure: Callable[[], Tensor | float]) -> float:
        """The step's loss over the batches of all ranks."""
        return self.ranks.evaluating(lambda _: number(closure(), "what the closure returned"))(self.model)

    def _command(self, event: Event) -> list[Transition]:
        seen = Observation(
            seeds=self.seeds,
            config=self.config,
            step=self.steps,
            tick=self.ticks,
            loss=self.losses.latest,
            metrics=tuple(self.metrics),
            new_epoch=self.new_epoch,
            lower_is_better=self.lower,
            lifecycle=States(self.store.mirror().lifecycle),
            telemetry=self.measuring.health,
            measured=self.measuring.fresh,
        )
        self.new_epoch = False
        out: list[Transition] = []
        for command in self.ranks.decided(lambda: commands_of(self.controller, seen)):
            out += self.execute(command, event)
        return out

    def execute(self, command: Command, event: Event | None = None) -> list[Transition]:
        """Do one command of a controller; what it refits is told to the event."""
        if isinstance(command, Germinate):
            return self.seeds[command.path].germinate(
                command.seeds, command.blueprint, command.graft, command.candidates
            )
        if isinstance(command, Advance):
            return self.advance(command.path, command.seeds, command.to, gates=command.gates, event=event)
        if isinstance(command, ResetMoments):
            recycling.forget_everything(self.optimizer, self.on_recycle)
            return []
        if command.what == "recycle":
            return self.recycle(command.path, command.seeds, command.candidates)
        done: list[Transition] = getattr(self.seeds[command.path], command.what)(command.seeds)
        return done

    def advance(
        self,
        path: str,
        seeds: Sequence[int],
        to: Lifecycle,
        *,
        gates: bool = True,
        event: Event | None = None,
    ) -> list[Transition]:
        """`site.advance`, with what the Grower does at a graft: out-weights get their size, and a snapshot is taken.

        gates=False asks no gate and no age, and passes through the states between (see `SiteHandle.advance`).
        """
        with self.ranks.joined(self.store):
            found = self._advance(path, seeds, to, gates, event)
        self.ranks.follow(self.store)
        return found

    def _advance(
        self, path: str, seeds: Sequence[int], to: Lifecycle, gates: bool, event: Event | None
    ) -> list[Transition]:
        handle, out, to = self.seeds[path], [], state_of(to)
        chosen = handle.checked(seeds)
        states = self.store.mirror().lifecycle[handle.rows]
        early = [seed for seed in chosen if states[seed] < _L.GRAFTING]
        if early and (to is _L.GRAFTING or (not gates and _L.GRAFTING < to <= _L.FOSSILIZED)):
            self._prepare([handle.rows.start + seed for seed in early])
            first = handle.advance(early, _L.GRAFTING, gates=gates)
            grafted = [handle.rows.start + told.seed for told in first if told]
            refits = self._size(grafted)
            if event is not None:
                event.refits |= refits
            onward = [told.seed for told in first if told] if to is not _L.GRAFTING else []
            done = {told.seed: told for told in handle.advance(onward, to, gates=False)}
            out = [replace(done.get(told.seed, told), source=told.source, target=to) for told in first]
            if to is not _L.FOSSILIZED:
                self._begin(grafted)
            chosen = [seed for seed in chosen if seed not in early]
        return out + handle.advance(chosen, to, gates=gates)

    def recycle(self, path: str, seeds: Sequence[int], candidates: int = 1) -> list[Transition]:
        """`site.recycle` with the optimizer's memory of the units; `before_recycling` is a snapshot from before.

        candidates: so many fresh units are drawn, and those taken whose best outgoing weights take most of the squared
        gradient of the batch before this tick (see `morphc.grow.probes`); for controllers with `ranks_candidates`.
        """
        if isinstance(candidates, bool) or not isinstance(candidates, int) or candidates < 1:
            raise SeedError(f"candidates={candidates!r} is not a whole number of at least 1")
        if self._recycled_at != self.steps or self.before_recycling is None:
            self.before_recycling, self._recycled_at = self.snapshot(), self.steps
        handle = self.seeds[path]
        incoming = None
        if candidates > 1:
            probes = self.probes if self.probes is not None else Probes(self.store)
            incoming = partial(self._chosen_units, probes.best(path, candidates))
        return recycling.recycle(
            self.store, handle.site, handle.checked(seeds), self.optimizer, self._recycled, incoming
        )

    def _chosen_units(
        self, best: Choice, layers: recycling.Layers, units: Tensor, generator: torch.Generator
    ) -> list[Tensor] | str:
        """The units that rank 0 chose on its batch."""
        device = recycling.weight_of(layers.writers[0]).device

        def choose() -> list[Tensor] | str:
            found = best(layers, units, generator)
            return found if isinstance(found, str) else [rows.cpu() for rows in found]

        found = self.ranks.decided(choose)
        return found if isinstance(found, str) else [rows.to(device) for rows in found]

    def _recycled(
        self, optimizer: torch.optim.Optimizer, parameter: nn.Parameter, axis: int, indices: Tensor
    ) -> None:
        follow = getattr(self.controller, "recycled", None)
        if follow is not None:
            follow(parameter, axis, indices)
        if self.on_recycle is not None:
            self.on_recycle(optimizer, parameter, axis, indices)

    # -- going back ------------------------------------------------------------------------------------------

    def _roll_back(self, reason: str) -> Event:
        """Undo the last graft; an Event without `rolled_back` where none is under way."""
        event = Event(self.steps)
        self.cohorts.close()
        rows, snapshot = offenders(self.store, self.cohorts.open)
        if not rows:
            return event
        if self.cohorts.open:
            self.cohorts.open.pop()
        event.transitions = roll_back(self, rows, snapshot)
        event.rolled_back = (
            reason if snapshot is not None else f"{reason}; no snapshot, the host is as it was"
        )
        event.rewound_to = self.steps if snapshot is not None else None
        return event

    def snapshot(self) -> Snapshot:
        """Everything that the run depends on, copied; see `morphc.grow.snapshot`."""
        return Snapshot(
            {
                "model": model_state(self.model),
                "optimizer": optimizer_state(self.optimizer),
                "scheduler": clone(self.scheduler.state_dict()) if self.scheduler is not None else None,
                "scaler": clone(self.scaler.state_dict()) if self.scaler is not None else None,
                "rng": rng_state(self.device),
                "grower": self.state_dict(),
            }
        )

    def restore(self, snapshot: Snapshot) -> None:
        """Bring everything back, bit for bit. Where the snapshot is of another model, kind of optimizer, controller or
        `tick_every`, CheckpointError or ConfigError says so, and nothing has changed.
        """
        if not isinstance(snapshot, Snapshot):
            raise ConfigError(
                f"{snapshot!r} is no snapshot; Grower.snapshot() and Snapshot.load(path) give one"
            )
        tree = snapshot.tree
        check_optimizer(self.optimizer, tree["optimizer"])
        self._check_saved(tree["grower"])
        restore_model(self.model, tree["model"])
        restore_optimizer(self.optimizer, tree["optimizer"])
        for own, kept in ((self.scheduler, tree["scheduler"]), (self.scaler, tree["scaler"])):
            if own is not None and kept is not None:
                own.load_state_dict(clone(kept))
        restore_rng(tree["rng"], self.device)
        self.load_state_dict(tree["grower"])
        self.ranks.follow(self.store)
        self.cohorts.rewind(self.steps)

    def state_dict(self) -> dict[str, Any]:
        """Counters, losses, metrics and the controller's own state. The model's is `morphc.save`'s, or a snapshot's."""
        controller = getattr(self.controller, "state_dict", None)
        state: dict[str, Any] = clone(
            {
                "steps": self.steps,
                "ticks": self.ticks,
                "metrics": self.metrics,
                "new_epoch": self.new_epoch,
                "window": self._window,
                **self.measuring.state_dict(),
                "controller": controller() if controller is not None else None,
                "controller_class": type(self.controller).__name__,
            }
        )
        return state

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self._check_saved(saved)
        saved = clone(saved)
        self.steps, self.ticks, self.metrics = saved["steps"], saved["ticks"], list(saved["metrics"])
        self.new_epoch = saved["new_epoch"]
        self.measuring.load_state_dict(saved)
        self._window = saved["window"].to(self.device)
        load = getattr(self.controller, "load_state_dict", None)
        if load is not None and saved["controller"] is not None:
            load(saved["controller"])
        self.ranks.follow(self.store)

    def _check_saved(self, saved: Mapping[str, Any]) -> None:
        if "window" not in saved:
            raise ConfigError("the state that is loaded is not one of Grower.state_dict()")
        if saved["window"].shape != self._window.shape:
            raise ConfigError(
                f"tick_every={self.tick_every} here, {saved['window'].shape[0]} in the state that is loaded"
            )
        own, kept = type(self.controller).__name__, saved.get("controller_class")
        if kept is not None and kept != own and saved["controller"] is not None:
            raise ConfigError(
                f"controller: {own} here, {kept} in the state that is loaded; give the Grower a {kept}, set as before"
            )

    def learning(self) -> dict[tuple[str, int], dict[str, float]]:
        """What was measured of every seed that holds a slot, by (path, index).

        `isolated_improvement` and `isolated_loss` (or `reconstruction_loss`) of its best candidate,
        `finite_gradients`, `errors`, `alpha`, and `gradient_ratio`: newborn over incumbent, the RMS gradient of
        the slot over that of its host layer's parameters at the last tick. Reads the device.
        """
        return self.measuring.learning()
