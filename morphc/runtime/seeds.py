"""What `morphc.seeds(model)` returns: a logical view over every seed, and the handle of each site."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from morphc.errors import MorphcError, SeedError, did_you_mean
from morphc.kernels.reference.chunks import bounds
from morphc.kernels.reference.health import HEALTH
from morphc.kernels.reference.lifecycle import HISTORY
from morphc.lifecycle import TABLE, Lifecycle, Mode
from morphc.runtime import commands, moves, recycling, ticking
from morphc.runtime.bank import SlotBank
from morphc.runtime.commands import Metrics, Transition
from morphc.runtime.site import SeedSite
from morphc.runtime.store import SeedStore, store_of

Indices = int | Sequence[int] | Tensor


class Entry(NamedTuple):
    """One remembered transition."""

    tick: int
    source: Lifecycle
    target: Lifecycle


class SiteHandle:
    """The seeds of one site: what they are, and commands to them. `handle.site` is the `SeedSite` in the model."""

    def __init__(self, store: SeedStore, site: SeedSite) -> None:
        self._store = store
        self.site = site

    def __len__(self) -> int:
        return self.site.seeds

    def __repr__(self) -> str:
        return f"SiteHandle({self.site.path!r}, seeds={self.site.seeds}, mode={self.site.mode.name})"

    @property
    def path(self) -> str:
        """The site's name: the layer's, or that of its parameter for a functional layer."""
        return self.site.path

    @property
    def features(self) -> int:
        """How many features the watched activation has."""
        return self.site.features

    @property
    def rows(self) -> slice:
        """The site's rows in the model's arrays."""
        return slice(self.site.offset, self.site.offset + self.site.seeds)

    @property
    def lifecycle(self) -> Tensor:
        """[S] int32, a view on the device."""
        return self._store.state.lifecycle[self.rows]

    @property
    def alpha(self) -> Tensor:
        """[S] float32, a view on the device."""
        return self._store.state.alpha[self.rows]

    @property
    def mode(self) -> Mode:
        """What the site does in a forward: DORMANT, TRAINING or ACTIVE."""
        return self.site.mode

    @property
    def chunks(self) -> list[tuple[int, int]]:
        """[start, stop) of each seed's features."""
        return bounds(self.site.features, self.site.seeds)

    @torch.no_grad()
    def telemetry(self) -> dict[str, Tensor]:
        """Health of the site's seeds, [S] float64 on the CPU; see `Seeds.telemetry`."""
        return dict(zip(HEALTH, self._store.live().health()[:, self.rows].cpu().unbind(0), strict=True))

    def history(self, index: int) -> list[Entry]:
        """The last ten transitions of one seed, oldest first."""
        (seed,) = self.checked(index)
        state = self._store.live()
        row = self.site.offset + seed
        count = int(state.transitions[row])
        ring = state.history[row].tolist()
        kept = [ring[number % HISTORY] for number in range(max(0, count - HISTORY), count)]
        return [Entry(tick, Lifecycle(source), Lifecycle(target)) for tick, source, target in kept]

    @property
    def slots(self) -> Mapping[str, SlotBank]:
        """The banks by blueprint."""
        return MappingProxyType(dict(self.site.slots.items()))

    def germinate(
        self,
        indices: Indices,
        blueprint: str | None = None,
        graft: str = "fixed_ramp",
        candidates: int = 1,
        curve: str | None = None,
    ) -> list[Transition]:
        """Give dormant seeds a slot each and let them begin: at the next tick they train in isolation.

        blueprint: one that the site has a bank of (None: its first). graft: a strategy of docs/grafts.md.
        candidates: slots that learn side by side for each seed; the graft keeps the one which lowers the loss
        most. curve: of alpha, None for `Config.graft_curve`.
        """
        return commands.germinate(
            self._store, self.site, self.checked(indices), blueprint, graft, candidates, curve
        )

    def advance(
        self,
        indices: Indices,
        to: Lifecycle | int,
        metrics: Metrics | Sequence[Metrics] | None = None,
        *,
        gates: bool = True,
    ) -> list[Transition]:
        """Move seeds to `to`, if table, embargo, minimum ticks and gates let them.

        metrics: what the gates of the move look at besides what morphc measures itself (docs/lifecycle.md), for all
        seeds or one mapping each; it goes before what morphc has measured. `loss` there is the host's, by which the
        out-weights get their size at a graft. gates=False asks neither gates nor minimum ticks, and passes through
        the states between: from TRAINING to FOSSILIZED it grafts the best candidate at alpha 1 at once.
        """
        chosen, target = self.checked(indices), state_of(to)
        if gates:
            return commands.advance(self._store, self.site, chosen, target, metrics)
        return commands.force(self._store, self.site, chosen, target, metrics)

    def candidates(self, index: int) -> list[dict[str, float]]:
        """What was measured of each slot of a seed that learns in isolation, in the order of its slots.

        `slot`; `isolated_improvement`, that of the slot's own output; `explained`, the share of the chunk's squared
        gradient that its out-weights take once they are refitted, by which the best is chosen; `chunk_gradient` and
        `site_gradient`, the squared norm of the loss's gradient at the chunk and at the whole site, averaged alike, so
        that explained * chunk_gradient compares sites; `finite_gradients` and `steps`. NaN where nothing was
        measured. Reads the device.
        """
        (seed,) = self.checked(index)
        fitting, banks = self.site.fitting, dict(self.site.slots.items())
        out = []
        for name, slot in moves.held_slots(self.site, seed):
            if fitting is not None and name in fitting.fits:
                (found,) = fitting.fit(name, banks[name]).told([slot])
                out.append({"slot": float(slot), **found})
        return out

    def cancel(self, indices: Indices) -> list[Transition]:
        """Give up before anything was grafted: GERMINATED or TRAINING -> CANCELLED. The slots are free again.

        The minimum ticks of the state count; `rollback` doesn't wait.
        """
        return self._ungated(indices, Lifecycle.CANCELLED)

    def prune(self, indices: Indices) -> list[Transition]:
        """Take seeds out of the host, fossilized ones too: -> CULLED, with an embargo. No gate is asked."""
        return self._ungated(indices, Lifecycle.CULLED)

    def rollback(self, indices: Indices) -> list[Transition]:
        """Abort at once, whatever the age: -> ROLLED_BACK, an error more, an embargo. The host isn't restored."""
        return self._ungated(indices, Lifecycle.ROLLED_BACK)

    def reset(self, indices: Indices) -> list[Transition]:
        """CULLED, CANCELLED or ROLLED_BACK -> DORMANT. A rolled-back seed's embargo goes on."""
        return self._ungated(indices, Lifecycle.DORMANT)

    def recycle(
        self,
        indices: Indices,
        optimizer: torch.optim.Optimizer | None = None,
        incoming: Tensor | Sequence[Tensor] | None = None,
    ) -> list[Transition]:
        """Re-initialise the host's own units of dormant seeds: incoming weights fresh, biases and outgoing zero.

        It needs the layer that reads these units, so the site has to be the inner layer of a block. With the host's
        optimizer, what it remembers of their rows and columns is cleared. `Grower.recycle` also takes a snapshot.
        incoming: [units, in, *kernel], the units' incoming weights in the order of `indices`, instead of drawn ones; of
        a gated block one for each of the two layers. Raises SeedError where their shape is another.
        """
        return recycling.recycle(self._store, self.site, self.checked(indices), optimizer, incoming=incoming)

    def _ungated(self, indices: Indices, to: Lifecycle) -> list[Transition]:
        return commands.advance(self._store, self.site, self.checked(indices), to, gated=False)

    def assign(
        self,
        indices: Indices,
        state: Lifecycle | int,
        *,
        blueprint: str | None = None,
        alpha: float | None = None,
    ) -> None:
        """Put seeds into `state`, whatever state they are in: no gate is asked.

        A state that holds a slot takes one of `blueprint` (None: the one the seed has, else the site's
        first) with fresh parameters; another blueprint than the seed's own swaps; other states give the slot
        back. `alpha` defaults to what it was in GRAFTING, to 1 in the other blending states, and is 0 in the
        rest. Raises SeedError, and then nothing has changed.
        """
        chosen = self.checked(indices)
        target = state_of(state)
        if alpha is not None and not 0.0 <= float(alpha) <= 1.0:
            raise SeedError(f"alpha={alpha!r} is not between 0 and 1")
        self._store.live()
        planned = moves.plan(self._store, self.site, chosen, target, blueprint)
        draws = self._store.live().transitions[self.rows].tolist()
        numbers = []
        for seed, move in planned.items():
            if not move.keep:
                moves.release(self.site, seed)
            elif move.bank is not None and TABLE[target].trains != "isolated":
                moves.release(self.site, seed, keep=(move.bank, move.slot))  # other candidates'
            if move.bank is not None and not move.keep:
                moves.take(self.site, move.bank, move.slot, seed, draws[seed])
            numbers.append(-1 if move.bank is None else moves.number_of(self.site, move.bank, move.slot))
        moves.record(self._store, self.site, chosen, target, alpha=alpha, numbers=numbers)

    @property
    def why_not_recycled(self) -> str:
        """Why the site's units can't be recycled, or an empty string."""
        found = recycling.layers_of(self._store, self.site)
        return found if isinstance(found, str) else ""

    def checked(self, indices: Indices) -> list[int]:
        """The indices as a list. Raises SeedError for what is no seed of the site, and for one named twice."""
        raw = indices.tolist() if isinstance(indices, Tensor) else indices
        listed = [raw] if isinstance(raw, int) else list(raw)
        for index in listed:
            if isinstance(index, bool) or not isinstance(index, int):
                raise SeedError(f"seed index {index!r} of {self.site.path!r} is no integer")
            if not 0 <= index < self.site.seeds:
                raise SeedError(
                    f"seed {index} of {self.site.path!r} doesn't exist: the site has {self.site.seeds}, "
                    f"0 to {self.site.seeds - 1}"
                )
        if len(set(listed)) != len(listed):
            raise SeedError(f"seeds {listed} of {self.site.path!r} name one seed twice")
        return listed


def state_of(state: Lifecycle | int) -> Lifecycle:
    """A state by itself or its number. Raises SeedError, which lists them."""
    try:
        return Lifecycle(state)
    except ValueError:
        known = ", ".join(f"{member.value} {member.name}" for member in Lifecycle)
        raise SeedError(f"{state!r} is no lifecycle state; there are {known}") from None


class Seeds:
    """Every seed of a compiled model, in the order of `sites`."""

    def __init__(self, model: nn.Module) -> None:
        self._store: SeedStore = store_of(model)
        self._store.leave_meta()
        self.sites: Mapping[str, SiteHandle] = MappingProxyType(
            {path: SiteHandle(self._store, site) for path, site in self._store.sites.items()}
        )

    def __len__(self) -> int:
        return len(self._store)

    def __repr__(self) -> str:
        return f"Seeds({len(self)} in {len(self.sites)} sites)"

    def __getitem__(self, path: str) -> SiteHandle:
        if path not in self.sites:
            raise SeedError(f"no site {path!r}.{did_you_mean(path, self.sites)}")
        return self.sites[path]

    @property
    def lifecycle(self) -> Tensor:
        """[N] int32 on the device."""
        return self._store.state.lifecycle

    @property
    def alpha(self) -> Tensor:
        """[N] float32 on the device."""
        return self._store.state.alpha

    @property
    def embargo(self) -> list[int]:
        """[N]: for how many more ticks each seed may not germinate. One copy from the device, if anything changed."""
        found: list[int] = self._store.mirror().embargo.tolist()
        return found

    @torch.no_grad()
    def set_scores(self, scores: Tensor) -> None:
        """Write [N] scores into the seeds' `score`."""
        self._store.state.score.copy_(scores)

    @torch.no_grad()
    def telemetry(self) -> dict[str, Tensor]:
        """Health of every seed since the last tick, [N] float64 on the CPU: one copy, nothing is reset."""
        return dict(zip(HEALTH, self._store.live().health().cpu().unbind(0), strict=True))

    def history(self, path: str, index: int) -> list[Entry]:
        """The last ten transitions of one seed, oldest first."""
        return self[path].history(index)

    def tick(
        self,
        metrics: Metrics | None = None,
        per_seed: Mapping[tuple[str, int], Metrics] | None = None,
    ) -> list[Transition]:
        """One lifecycle step of every seed: they age, ramps rise, embargoes run down, and who may move on does.

        metrics: what gates look at, for all seeds; per_seed: for single ones, by (path, index). Returns the moves
        made, and for seeds that are old enough which gate holds them up. One launch and one copy back.
        """
        return ticking.run(self._store, ticking.decide(self._store, metrics, per_seed))

    def step_optimizer(self, **options: Any) -> None:
        """One AdamW step of the slots that train, from the gradients in the banks."""
        self._store.step_optimizer(**options)

    def reset_telemetry(self) -> None:
        """Begin a new telemetry window."""
        self._store.reset_telemetry()

    def to_pandas(self) -> Any:
        """A DataFrame with one row per seed: site, index, state, alpha and health. Needs pandas."""
        try:
            import pandas  # type: ignore[import-untyped]
        except ImportError as error:
            raise MorphcError(
                "to_pandas() needs pandas, which is not installed: pip install pandas"
            ) from error
        index = [(path, seed) for path, handle in self.sites.items() for seed in range(len(handle))]
        frame: dict[str, Any] = {
            "site": [path for path, _ in index],
            "seed": [seed for _, seed in index],
            "state": [Lifecycle(value).name for value in self._store.live().lifecycle.tolist()],
            "alpha": self.alpha.tolist(),
        }
        frame |= {name: values.tolist() for name, values in self.telemetry().items()}
        return pandas.DataFrame(frame)
