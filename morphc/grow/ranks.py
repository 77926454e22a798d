"""Ranks that train one model together: what they measure is put together, and all of them decide the same.

Rank 0's controller decides. Everything else that a tick goes by (losses, telemetry, what isolation has measured, the
user's metric) is put together over the ranks first, so each of them finds the same by itself. All of it happens in
torch.distributed's own collectives, at ticks; at a step there is one, of the gradients of the slots that train.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor, nn

from morphc.errors import ConfigError, RankError
from morphc.kernels import tuning
from morphc.kernels.reference.health import (
    GRAD_SAMPLES,
    GRAD_SQUARES,
    HEALTH,
    NONFINITE,
    PEAK,
    ROW_SQUARES,
    ROWS,
    SALIENCY,
    SHIFT,
    SQUARES,
    SUM,
    ZEROS,
    health,
)
from morphc.kernels.reference.telemetry import Sums
from morphc.lifecycle import TRAINS, Lifecycle, Mode
from morphc.runtime.sharded import is_dtensor, reshard
from morphc.runtime.state import merge
from morphc.runtime.store import CHILD

if TYPE_CHECKING:
    from morphc.grow.evaluation import Evaluate
    from morphc.runtime.bank import SlotBank
    from morphc.runtime.isolation import Fit
    from morphc.runtime.store import SeedStore

T = TypeVar("T")
_PART = 1 << 22
ProcessGroup = Any  # of torch.distributed, which a build of torch may lack

_PARTS = {"ss": 1, "xx": 1, "gram": 1, "gg": -1, "site": -1}
"""How a sum of isolation over the joint batch follows from the ranks' mean: times the number of batches to this power.

The gradient that a rank sees is that of its own mean loss, so many times that of the mean over all.
"""


def ranks_of(group: ProcessGroup | None = None, batches: int | None = None) -> Ranks:
    """The ranks of `group`, of the default group if there is one, else a rank by itself.

    batches: so many of them have a batch of their own (all, for None). Raises ConfigError.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return Ranks()
    group = group if group is not None else dist.group.WORLD
    count = dist.get_world_size(group)
    if batches is not None and (batches < 1 or count % batches):
        raise ConfigError(
            f"batches_per_step={batches!r} of {count} ranks: equally many have to share each batch, so it must divide "
            f"{count}"
        )
    return Ranks(group if count > 1 else None, batches)


class Ranks:
    """The processes that train one model; without a group it is one process, and nothing here does anything."""

    def __init__(self, group: ProcessGroup | None = None, batches: int | None = None) -> None:
        self.group = group
        self.count = dist.get_world_size(group) if group is not None else 1
        self.batches = batches if batches is not None else self.count
        self.rank = dist.get_rank(group) if group is not None else 0
        self.where = torch.device("cpu")
        if group is not None and "nccl" in dist.get_backend(group):
            self.where = torch.device("cuda", torch.cuda.current_device())
        self._rows: list[tuple[SlotBank, Tensor]] = []
        self._joined = False
        self.failed: Exception | None = None
        """What this rank has to tell the others when they next `agree`: it is raised on all."""

    @property
    def alone(self) -> bool:
        """Whether there is one rank only."""
        return self.group is None

    # -- words -----------------------------------------------------------------------------------------------

    def told(self, value: T) -> list[T]:
        """Every rank's value, in their order."""
        if self.group is None:
            return [value]
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, value, group=self.group)
        return found

    def decided(self, make: Callable[[], T]) -> T:
        """What `make` gives on rank 0; where it raises there, all ranks raise."""
        if self.group is None:
            return make()
        said: list[Any] = [None, ""]
        error: BaseException | None = None
        if self.rank == 0:
            try:
                said[0] = make()
            except Exception as raised:
                error, said[1] = raised, f"{type(raised).__name__}: {raised}"
        dist.broadcast_object_list(said, group=self.group, group_src=0)
        if error is not None:
            raise error
        if said[1]:
            raise RankError(f"rank 0 raised: {said[1]}")
        made: T = said[0]
        return made

    def same(self, what: str, value: str, way_out: str) -> None:
        """Raise RankError on every rank unless all have the same text."""
        found = self.told(value)
        other = next((rank for rank, text in enumerate(found) if text != found[0]), None)
        if other is not None:
            told = _difference(found[0], found[other], other)
            raise RankError(f"{what} differ between ranks: {told}; {way_out}")

    # -- numbers ---------------------------------------------------------------------------------------------

    def mean(self, values: Sequence[float]) -> list[float]:
        """The mean over ranks of each value, in float64: the same bits on all."""
        if self.group is None or not values:
            return list(values)
        packed = torch.tensor(values, dtype=torch.float64, device=self.where)
        dist.all_reduce(packed, group=self.group)
        found: list[float] = (packed / self.count).tolist()
        return found

    def evaluating(self, evaluate: Evaluate, name: str = "evaluate") -> Evaluate:
        """`evaluate`, whose metric is the mean over the ranks; an error on one is raised on all, by that name."""
        if self.group is None:
            return evaluate

        def together(model: nn.Module) -> float:
            value, error = math.nan, None
            try:
                value = float(evaluate(model))
            except Exception as raised:
                error = raised
            metric, failed = self.mean([value, 0.0 if error is None else 1.0])
            if failed:
                said = self.told("" if error is None else f"{type(error).__name__}: {error}")
                if error is not None:
                    raise error
                rank = next(rank for rank, text in enumerate(said) if text)
                raise RankError(f"{name} raised on rank {rank}: {said[rank]}")
            return metric

        return together

    # -- what is measured ------------------------------------------------------------------------------------

    def health(self, store: SeedStore) -> dict[str, Tensor]:
        """Health of every seed over all ranks' windows, [N] float64 on the CPU; see `Seeds.telemetry`."""
        state = store.live()
        if self.group is None:
            return dict(zip(HEALTH, state.health().cpu().unbind(0), strict=True))
        state.settle()
        sums, counts = state.sums.to(self.where), state.counts.to(self.where)
        every = torch.cat((sums, counts.double()))
        parts = [torch.empty_like(every) for _ in range(self.count)]
        dist.all_gather(parts, every, group=self.group)
        widths = state.widths.to(self.where)
        kept, counted = torch.zeros_like(sums), torch.zeros_like(counts)
        for part in parts:
            own, rows = part[: len(sums)], part[len(sums) :].long()
            finite = rows[ROWS] * widths - rows[NONFINITE]
            new: Any = Sums(
                own[SHIFT], own[SUM], own[SQUARES], own[ROW_SQUARES], own[PEAK], finite, own[ZEROS],
                rows[NONFINITE], rows[ROWS],
            )  # fmt: skip
            merge(kept, counted, widths, new)
            kept[GRAD_SQUARES] += own[GRAD_SQUARES] / (self.count * self.batches)
            kept[SALIENCY] += own[SALIENCY] / self.count
            counted[GRAD_SAMPLES] = torch.maximum(counted[GRAD_SAMPLES], rows[GRAD_SAMPLES])
        return dict(zip(HEALTH, health(kept, counted, widths).cpu().unbind(0), strict=True))

    @contextmanager
    @torch.no_grad()
    def joined(self, store: SeedStore) -> Iterator[None]:
        """Inside, what isolation has measured is that of the joint batch; each rank goes on with its own sums."""
        if self.group is None or self._joined:
            yield
            return
        fits: list[Fit] = []
        for site in store.sites.values():
            for name, bank in site.slots.items() if site.fitting is not None else ():
                assert site.fitting is not None
                fits.append(site.fitting.fit(name, bank))
        own = [fit.sums for fit in fits]
        if fits:
            flat = torch.cat([value.reshape(-1).to(self.where) for sums in own for value in sums.values()])
            dist.all_reduce(flat, group=self.group)
            at = 0
            for fit, sums in zip(fits, own, strict=True):
                fit.sums = {}
                for name, value in sums.items():
                    part = flat[at : at + value.numel()].view(value.shape)
                    fit.sums[name] = (part / self.count * self.batches ** _PARTS.get(name, 0)).to(
                        value.device
                    )
                    at += value.numel()
        lent = [fit.sums for fit in fits]
        self._joined = True
        try:
            yield
        finally:
            self._joined = False
            for fit, sums, joint in zip(fits, own, lent, strict=True):
                if fit.sums is joint:
                    for value in sums.values():  # slots that were taken anew meanwhile
                        value[(joint["steps"] == 0) & (joint["lost"] == 0)] = 0
                    fit.sums = sums

    # -- slots -----------------------------------------------------------------------------------------------

    def follow(self, store: SeedStore) -> None:
        """Remember which slots train, whose gradients `average` puts together until this is called again."""
        if self.group is None:
            return
        self._rows = []
        states = store.mirror().lifecycle
        for site in store.sites.values():
            if site.mode is Mode.DORMANT:
                continue
            for _, bank in site.slots.items():
                owners = bank.owner.tolist()
                rows = [
                    slot
                    for slot, owner in enumerate(owners)
                    if owner >= 0 and 1 << int(states[site.offset + owner]) & TRAINS
                ]
                if rows:
                    self._rows.append((bank, torch.tensor(rows, device=bank.owner.device)))

    @torch.no_grad()
    def average(self, store: SeedStore) -> None:
        """The mean over ranks of the gradients of the slots that train: one all-reduce of those rows.

        A slot that has begun to train since `follow` has no gradient until the next tick, on every rank alike.
        """
        if self.group is None:
            return
        parts: list[Tensor] = []
        for bank, rows in self._rows:
            for name, grad in bank.grads().items():
                own = torch.zeros_like(bank.get_parameter(name)) if grad is None else grad
                parts.append(own.index_select(0, rows).to(self.where))
        for site in store.sites.values():
            for _, bank in site.slots.items() if site.mode is not Mode.DORMANT else ():
                bank.zero_grads()
        if not parts:
            return
        flat = torch.cat([part.flatten() for part in parts])
        dist.all_reduce(flat, group=self.group)
        flat /= self.count
        at = 0
        for bank, rows in self._rows:
            found = {}
            for name in bank.grads():
                shape = (len(rows), *bank.get_parameter(name).shape[1:])
                found[name] = flat[at : at + math.prod(shape)].view(shape)
                at += math.prod(shape)
            bank.give_grads(rows, found)

    # -- agreement -------------------------------------------------------------------------------------------

    def agree_on_setup(self, model: nn.Module, store: SeedStore, options: dict[str, Any]) -> None:
        """All ranks have the same sites, configuration, options, kernel configs and seeds. Raises RankError."""
        if self.group is None:
            return
        config = msgspec.to_builtins(store.config, builtin_types=(float,))
        self.same("the configs", _lines(config), "compile with the same Config on every rank")
        self.same("the Growers' options", _lines(options), "give every rank's Grower the same")
        sites = {}
        for path, site in store.sites.items():
            slots = {name: bank.slots for name, bank in site.slots.items()}
            sites[path] = f"{site.features} features, {site.seeds} seeds, slots {slots}"
        self.same(
            "the sites", _lines(sites), "give every rank the same plan: morphc.compile(model, plan=...)"
        )
        plan = getattr(store.report, "plan", None)
        known = tuning.known(plan.specs) if plan is not None else {}
        self.same(
            "the kernels' tuned configs",
            _lines({name: msgspec.to_builtins(config) for name, config in known.items()}),
            "kernels that work differently differ in their last bits; let morphc.tune tune on one rank for all, or "
            "give every rank the same cache or plan",
        )
        self.same(
            "the host's weights",
            f"fingerprint {_host(model)}",
            "make the Grower after DDP or fully_shard has wrapped the model, or load the same weights on every rank",
        )
        self.agree(store)

    def agree(self, store: SeedStore) -> None:
        """All ranks' seeds are in the same states and hold the same slots, bit for bit. Raises RankError."""
        if self.group is None:
            return
        error, self.failed = self.failed, None
        numbers = [error is not None, *_fingerprint(store)]
        mark = torch.tensor(numbers, dtype=torch.int64, device=self.where)
        every = [torch.empty_like(mark) for _ in range(self.count)]
        dist.all_gather(every, mark, group=self.group)
        if any(each[0] for each in every):
            said = self.told("" if error is None else f"{type(error).__name__}: {error}")
            if error is not None:
                raise error
            rank = next(rank for rank, text in enumerate(said) if text)
            raise RankError(f"rank {rank} raised: {said[rank]}")
        if all(torch.equal(each, every[0]) for each in every):
            return
        way_out = (
            "give every command on every rank, or leave commands to the Grower's controller, and let all ranks begin "
            "from the same weights and checkpoint"
        )
        self.same("the seeds' states", _lines(_described(store)), way_out)
        raise RankError(
            f"the slots' weights differ between ranks, though the seeds' states are the same; {way_out}"
        )


def _fingerprint(store: SeedStore) -> list[int]:
    """Of the states, and of the bits of the slots in use."""
    mirror = store.mirror()
    columns = (
        mirror.lifecycle,
        mirror.slot,
        mirror.ticks_in_state,
        mirror.graft,
        mirror.embargo,
        mirror.alpha,
    )
    told = hashlib.sha256()
    for column in columns:
        told.update(column.tobytes())
    bits = 0
    for site in store.sites.values():
        if site.mode is Mode.DORMANT:
            continue
        for _, bank in site.slots.items():
            told.update(str(bank.owner.tolist()).encode())
            held = bank.owner >= 0
            bits += sum(_bits(param.detach()[held]) for param in bank.parameters())
    return [int.from_bytes(told.digest()[:7], "big"), bits & (2**62 - 1)]


def _bits(tensor: Tensor) -> int:
    """A number that other bits, or the same in another order, would most likely change."""
    whole = tensor.detach().contiguous().flatten().view(torch.uint8)
    found = torch.zeros((), dtype=torch.int64, device=whole.device)
    for number, part in enumerate(torch.split(whole, _PART), 1):  # int64 takes eight times the memory
        place = torch.arange(len(part), device=part.device) % 8191 + 1
        found = found + number * (part.to(torch.int64) * place).sum()
    return int(found)


def _host(model: nn.Module) -> str:
    """Of the bits of the host's parameters that every rank has whole."""
    reshard(model)
    own = [(name, param) for name, param in model.named_parameters() if CHILD not in name.split(".")]
    told = "".join(
        f"{name} {_bits(param)};" for name, param in own if not is_dtensor(param) and not param.is_meta
    )
    return hashlib.sha256(told.encode()).hexdigest()[:12]


def _described(store: SeedStore) -> dict[str, str]:
    """Every seed that isn't as it began, in words."""
    mirror = store.mirror()
    found = {}
    for site in store.sites.values():
        for seed in range(site.seeds):
            row = site.offset + seed
            state = Lifecycle(int(mirror.lifecycle[row]))
            slot, age, embargo = mirror.slot[row], mirror.ticks_in_state[row], mirror.embargo[row]
            told = (
                f"{state.name} for {age} ticks, slot {slot}, alpha {mirror.alpha[row]:g}, embargo {embargo}"
            )
            found[f"{site.path}[{seed}]"] = told
    return found


def _lines(values: dict[str, Any]) -> str:
    return "\n".join(f"{name}: {value}" for name, value in values.items())


def _difference(one: str, other: str, rank: int) -> str:
    """The first line that differs, as rank 0 and `rank` have it."""
    mine, theirs = one.splitlines(), other.splitlines()
    for left, right in zip_longest(mine, theirs, fillvalue="nothing more"):
        if left != right:
            return f"rank 0 has {left!r}, rank {rank} has {right!r}"
    return f"those of rank 0 and rank {rank}"
