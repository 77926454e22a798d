"""Undoing a graft: everything as before it, but the seeds that did it, and what was learned of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from morphc.grow.snapshot import Snapshot
from morphc.lifecycle import Lifecycle
from morphc.runtime import grafts, ticking
from morphc.runtime.commands import Transition
from morphc.runtime.store import SeedStore

if TYPE_CHECKING:
    from morphc.grow.grower import Grower
    from morphc.grow.measuring import Measuring

_L = Lifecycle
KEPT: Final = 2
"""Snapshots of grafts that are kept."""


@dataclass
class Cohort:
    """Seeds that were grafted at the same tick.

    rows: those still undecided. step: at which the graft began. metric: the last epoch's then, None before the first.
    loss: mean of the tick before. health: telemetry then. snapshot: taken right after the graft's tick, at alpha 0.
    """

    rows: set[int]
    step: int
    metric: float | None
    loss: float
    health: Mapping[str, Tensor]
    snapshot: Snapshot | None = None

    def drift(self, row: int, now: Mapping[str, Tensor]) -> float:
        """sqrt((mean - mean0)^2 + (std - std0)^2) / std0 of the chunk; NaN where not measured."""
        mean0, std0 = float(self.health["mean"][row]), math.sqrt(float(self.health["variance"][row]))
        mean, std = float(now["mean"][row]), math.sqrt(float(now["variance"][row]))
        if not std0 > 0:
            return math.nan
        return math.hypot(mean - mean0, std - std0) / std0


class Cohorts:
    """The grafts that aren't decided yet, oldest first; the last `KEPT` of them with their snapshots."""

    def __init__(self, store: SeedStore) -> None:
        self.store = store
        self.open: list[Cohort] = []

    def begin(
        self, rows: Sequence[int], step: int, metric: float | None, loss: float, health: Mapping[str, Tensor]
    ) -> Cohort:
        """A graft begins; its snapshot is the caller's to take, and no older ones than `KEPT` are kept."""
        cohort = Cohort(set(rows), step, metric, loss, health)
        self.open.append(cohort)
        for old in self.open[:-KEPT]:
            old.snapshot = None
        return cohort

    def close(self) -> None:
        """Forget the snapshots of grafts that are decided."""
        states = self.store.mirror().lifecycle
        for cohort in self.open:
            cohort.rows = {row for row in cohort.rows if _L.GRAFTING <= states[row] <= _L.FINE_TUNING}
        self.open = [cohort for cohort in self.open if cohort.rows]

    def rewind(self, step: int) -> None:
        """The run is back at `step`: later grafts haven't happened."""
        self.open = [cohort for cohort in self.open if cohort.step <= step]

    def holds_up(self) -> dict[int, str]:
        """One cohort at a time, so that what a graft brings can be told from what another does: rows, and why."""
        states = self.store.mirror().lifecycle
        between = (states >= int(_L.GRAFTING)) & (states <= int(_L.EVALUATING))
        if not between.any():
            return {}
        site, seed = ticking.site_at(self.store, int(between.nonzero()[0][0]))
        reason = (
            f"hold: {site.path}[{seed}] is being grafted or evaluated, and cohorts go one after the other"
        )
        return {int(row): reason for row in (states == int(_L.TRAINING)).nonzero()[0]}

    def signs(self, known: Measuring) -> dict[int, grafts.Signs]:
        """What the strategies of grafting seeds look at, by row."""
        states = self.store.mirror()
        found = {}
        for row in (int(row) for row in (states.lifecycle == int(_L.GRAFTING)).nonzero()[0]):
            cohort = next((each for each in self.open if row in each.rows), None)
            start = cohort.loss if cohort is not None else math.nan
            found[row] = grafts.Signs(
                loss=known.losses.latest / start if start else math.nan,
                trend=known.losses.trend,
                drift=cohort.drift(row, known.health) if cohort is not None else math.nan,
                gradient=known.ratios.of(row),
                stability=known.losses.stability,
            )
        return found


def worse_by(metric: float, before: float | None, lower_is_better: bool) -> float:
    """By how much a metric is worse than `before`, relative to it; infinite where it isn't finite."""
    if not math.isfinite(metric):
        return math.inf
    if before is None or not math.isfinite(before):
        return 0.0
    loss = metric - before if lower_is_better else before - metric
    return loss / max(abs(before), 1e-12)


def offenders(store: SeedStore, cohorts: Sequence[Cohort]) -> tuple[list[int], Snapshot | None]:
    """The rows of the latest graft that isn't decided, and what to go back to.

    Where no cohort is known (a resumed run) all seeds in states 3 to 6 are meant, and there is no snapshot.
    """
    if cohorts:
        return sorted(cohorts[-1].rows), cohorts[-1].snapshot
    states = store.mirror().lifecycle
    undecided = (states >= int(_L.GRAFTING)) & (states <= int(_L.FINE_TUNING))
    return [int(row) for row in undecided.nonzero()[0]], None


@torch.no_grad()
def roll_back(grower: Grower, rows: Sequence[int], snapshot: Snapshot | None) -> list[Transition]:
    """Restore the snapshot, and put the offending seeds into ROLLED_BACK: an error more, an embargo, no slot.

    What was learned since of other seeds stays too: error counts, embargoes, and whoever was rolled back already.
    """
    store = grower.store
    state = store.state
    before = store.mirror()
    errors, embargo = state.error_count.clone(), state.embargo.clone()
    out_already = [int(row) for row in (before.lifecycle == int(_L.ROLLED_BACK)).nonzero()[0]]
    if snapshot is not None:
        health = grower.measuring.health
        grower.restore(snapshot)
        grower.measuring.health = health
    out: list[Transition] = []
    holding = store.mirror().lifecycle
    again = [row for row in out_already if _L.TRAINING <= holding[row] <= _L.FINE_TUNING]
    for row in (*rows, *again):
        site, seed = ticking.site_at(store, row)
        moved = grower.seeds[site.path].rollback([seed])
        out += moved if row in rows else []
    torch.maximum(state.embargo, embargo, out=state.embargo)
    errors[list(rows)] += 1
    state.error_count.copy_(errors)
    return out
