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
from morphc.lifecycle import TABLE, Lifecycle, Mode, mode_of
from morphc.runtime.bank import SlotBank, draw_of
from morphc.runtime.site import SeedSite
from morphc.runtime.store import SeedStore, store_of


class Entry(NamedTuple):
    """One remembered transition."""

    tick: int
    source: Lifecycle
    target: Lifecycle


class _Move(NamedTuple):
    bank: str | None
    slot: int
    keep: bool


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
        (seed,) = self._checked(index)
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

    def assign(
        self,
        indices: int | Sequence[int] | Tensor,
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
        chosen = self._checked(indices)
        target = _state(state)
        if alpha is not None and not 0.0 <= float(alpha) <= 1.0:
            raise SeedError(f"alpha={alpha!r} is not between 0 and 1")
        arrays = self._store.live()
        moves = self._plan(chosen, target, blueprint)
        draws = arrays.transitions[self.rows].tolist()
        numbers = {}
        for seed, move in moves.items():
            if not move.keep:
                self._release(seed)
            if move.bank is not None and not move.keep:
                bank = self.slots[move.bank]
                bank.take(move.slot, seed, draw_of(self.site.path, move.bank, seed, draws[seed]))
            numbers[seed] = self._number(move)
        self._record(chosen, target, alpha, [numbers[seed] for seed in chosen])
        states = {Lifecycle(value) for value in self.lifecycle.tolist()}
        self._store.set_mode(self.site, mode_of(states))

    def _plan(self, chosen: list[int], target: Lifecycle, blueprint: str | None) -> dict[int, _Move]:
        """Which slot each seed will hold; refuses before anything is changed."""
        banks = self.slots
        if blueprint is not None and blueprint not in banks:
            self._refuse(blueprint)
        if not TABLE[target].holds_slot:
            return {seed: _Move(None, -1, False) for seed in chosen}
        if not banks:
            self._refuse(None)
        if any(bank.on_meta for bank in banks.values()):
            self._store.leave_meta()
            if any(bank.on_meta for bank in banks.values()):
                raise SeedError(
                    f"the layer of site {self.site.path!r} is on the meta device and so are its slots; "
                    "give it values first: model.to_empty(device=...), or load_state_dict(..., assign=True)"
                )
        held = self._store.state.slot[self.rows].tolist()
        owners = {name: bank.owner.tolist() for name, bank in banks.items()}
        free = {name: [slot for slot, owner in enumerate(own) if owner < 0] for name, own in owners.items()}
        names = list(banks)
        moves = {}
        for seed in chosen:
            number = held[seed]
            own = names[number // banks[names[0]].slots] if number >= 0 else None
            wanted = blueprint or own or names[0]
            if own == wanted:
                moves[seed] = _Move(wanted, number % banks[wanted].slots, True)
                continue
            if not free[wanted]:
                taken = len(owners[wanted])
                raise SeedError(
                    f"no free slot of {wanted!r} at {self.site.path!r} for seed {seed}: {len(chosen)} asked, "
                    f"{taken} slots in all; free some, or make more with morphc.enlarge(model, slots=...)"
                )
            moves[seed] = _Move(wanted, free[wanted].pop(0), False)
        return moves

    def _refuse(self, blueprint: str | None) -> None:
        here = ", ".join(self.slots) or "none"
        reasons = "; ".join(f"{name}: {why}" for name, why in self.site.refusals.items())
        if blueprint is None:
            raise SeedError(f"site {self.site.path!r} has no bank to take a slot from ({reasons})")
        if blueprint in self.site.refusals:
            why = self.site.refusals[blueprint]
            raise SeedError(f"blueprint {blueprint!r} can't be used at {self.site.path!r}: {why}")
        raise SeedError(
            f"blueprint {blueprint!r} has no bank at {self.site.path!r} (there: {here});"
            f"{did_you_mean(blueprint, self.slots)} Banks are made at compile, "
            f"for Config(blueprint=...): compile again with {blueprint!r} among them"
        )

    def _release(self, seed: int) -> None:
        for bank in self.slots.values():
            for slot, owner in enumerate(bank.owner.tolist()):
                if owner == seed:
                    bank.free(slot)

    def _number(self, move: _Move) -> int:
        if move.bank is None:
            return -1
        names = list(self.slots)
        return names.index(move.bank) * self.slots[move.bank].slots + move.slot

    @torch.no_grad()
    def _record(self, chosen: list[int], target: Lifecycle, alpha: float | None, numbers: list[int]) -> None:
        arrays = self._store.state
        device = arrays.lifecycle.device
        rows = torch.tensor(chosen, dtype=torch.int64, device=device) + self.site.offset
        before = arrays.lifecycle[rows]
        place = (arrays.transitions[rows] % HISTORY).long()
        tick = arrays.tick.to(torch.int32).expand(len(chosen))
        arrays.history[rows, place] = torch.stack((tick, before, torch.full_like(before, int(target))), 1)
        arrays.transitions[rows] += 1
        arrays.parent_state[rows] = before
        arrays.lifecycle[rows] = int(target)
        arrays.ticks_in_state[rows] = 0
        arrays.slot[rows] = torch.tensor(numbers, dtype=torch.int32, device=device)
        if TABLE[target].forward != "blend":
            arrays.alpha[rows] = 0.0 if alpha is None else alpha
        elif alpha is not None:
            arrays.alpha[rows] = alpha
        elif target is not Lifecycle.GRAFTING:
            arrays.alpha[rows] = 1.0

    def _checked(self, indices: int | Sequence[int] | Tensor) -> list[int]:
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


def _state(state: Lifecycle | int) -> Lifecycle:
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

    @torch.no_grad()
    def telemetry(self) -> dict[str, Tensor]:
        """Health of every seed since the last tick, [N] float64 on the CPU: one copy, nothing is reset."""
        return dict(zip(HEALTH, self._store.live().health().cpu().unbind(0), strict=True))

    def history(self, path: str, index: int) -> list[Entry]:
        """The last ten transitions of one seed, oldest first."""
        return self[path].history(index)

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
