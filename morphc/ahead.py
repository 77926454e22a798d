"""A compiled model's kernels, compiled or looked up for a target before anything runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec
import torch
from torch import nn

from morphc.errors import ConfigError, TritonError
from morphc.kernels import backend, binaries, codegen
from morphc.kernels.cache import counters
from morphc.kernels.cache.counters import Count, Miss
from morphc.kernels.cache.manifest import Provenance
from morphc.kernels.cache.store import Found
from morphc.kernels.compile import SHARED_LIMITS, Failure, Resources, compile_all, wanted
from morphc.passes.plan import Plan
from morphc.runtime import ahead
from morphc.runtime.ahead import Needed
from morphc.runtime.store import store_of
from morphc.tuneup import seen_by


class Kernel(msgspec.Struct, frozen=True):
    """One of a target. registers, spills (32-bit values): a thread; shared, size: bytes. problem: why it can't run
    there, or runs badly; key: of its compiled form, and folder: of its entry."""

    name: str
    function: str
    layers: tuple[str, ...]
    registers: int
    spills: int
    shared: int
    size: int
    problem: str
    failed: bool
    key: str
    folder: str


class Ahead(msgspec.Struct, frozen=True):
    """The kernels of a model on a target; compiled: how many times Triton's compiler was asked."""

    target: str
    kernels: tuple[Kernel, ...]
    hits: int
    misses: tuple[Miss, ...]
    saved: float
    spent: float
    compiled: int
    root: str = ""

    @property
    def root_path(self) -> Path:
        """The cache that they are in: the user's, or a temporary one where that can't be written."""
        return Path(self.root)


def target_of_this_machine() -> str:
    """`cuda:90`. Raises ConfigError where there is no GPU that kernels run on."""
    device = torch.device("cuda")
    if reason := backend.unavailable(device):
        raise ConfigError(
            f"there is no GPU here to look kernels up for ({reason}): name it with --target cuda:90"
        )
    if torch.version.hip:
        return f"hip:{torch.cuda.get_device_properties(0).gcnArchName.partition(':')[0]}"
    major, minor = torch.cuda.get_device_capability(0)
    return f"cuda:{major}{minor}"


def kernels_of(
    model: nn.Module, plan: Plan, target: str, fit: Callable[[list[Needed]], Sequence[bool]]
) -> list[Needed]:
    """What `model` launches on `target`; the entries in the cache learn which layers they are for.

    fit: of such kernels, whether each runs without spilling. Behind those that don't, kernels of the next config are
    asked about, as it goes on the device; both are in the answer, since the device asks for both.
    """
    if problem := backend.triton_problem():
        raise TritonError(problem)
    every: dict[tuple[str, ...], Needed] = {}
    unfit: set[tuple[str, ...]] = set()
    while True:
        found = ahead.needed(store_of(model).sites, seen_by(plan.sites), target, unfit)
        fresh = [one for one in found if one.job.identity not in every]
        if not fresh:
            return list(every.values())
        for one in fresh:
            codegen.publish(one.job.source, Provenance(one.layers, tuple(map(_relative, one.sources))))
        for one, good in zip(fresh, fit(fresh), strict=True):
            every[one.job.identity] = one
            if not good:
                unfit.add(one.job.identity)


def _fits(spills: int, shared: int, target: str) -> bool:
    """Whether a device keeps such a kernel, and doesn't go on to the next config."""
    return not spills and shared <= SHARED_LIMITS.get(target, shared)


def _relative(source: str) -> str:
    """`model.py:41`, from the current folder where it lies there: a bundle tells nobody how a disk is laid out."""
    path = Path(source)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else path.name


def compile_kernels(
    model: nn.Module, plan: Plan, target: str, progress: Callable[[str, int, int], None] | None = None
) -> Ahead:
    """Compile them all, in parallel processes, into the cache; those that it has are not compiled."""

    def tell(done: int, total: int) -> None:
        if progress is not None:
            progress(f"kernels for {target}", done, total)

    results: list[Resources | Failure] = []

    def compiled(fresh: list[Needed]) -> list[bool]:
        made = compile_all([one.job for one in fresh], keep=True, progress=tell)
        results.extend(made)
        return [isinstance(one, Failure) or _fits(one.spills, one.shared, target) for one in made]

    with counters.watch() as count:
        found = kernels_of(model, plan, target, compiled)
    want = [wanted(one.job) for one in found]
    kernels = tuple(
        _kernel(one, result, each) for one, result, each in zip(found, results, want, strict=True)
    )
    return Ahead(
        target,
        kernels,
        count.hits,
        tuple(count.misses),
        count.saved,
        count.spent,
        count.compiled,
        str(want[0].root) if want else "",
    )


def _kernel(one: Needed, result: Resources | Failure, want: binaries.Wanted) -> Kernel:
    made = result if isinstance(result, Resources) else None
    return Kernel(
        one.job.source.name,
        one.job.function,
        one.layers,
        made.registers if made else 0,
        made.spills if made else 0,
        made.shared if made else 0,
        made.size if made else 0,
        result.problem,
        made is None,
        want.key,
        want.entry.name,
    )


def missing(model: nn.Module, plan: Plan, target: str) -> tuple[int, Mapping[str, tuple[str, ...]]]:
    """How many kernels the model launches on `target`, and those that aren't in the cache, each with the reasons."""
    looked = _looked_up(model, plan, target)
    lacking = [want for want, found in looked if found is None]
    return len(looked), {f"{each.name} ({each.key[:8]})": each.why() for each in lacking}


def look(model: nn.Module, plan: Plan, target: str) -> Count:
    """What the cache has of the kernels that the model launches on `target`, and why not the rest; compiles nothing."""
    count = Count()
    for want, found in _looked_up(model, plan, target):
        if found is None:
            count.misses.append(Miss(want.name, target, want.why()))
        else:
            count.hits += 1
            count.saved += float(found.manifest.details["seconds"])
    return count


def _looked_up(model: nn.Module, plan: Plan, target: str) -> list[tuple[binaries.Wanted, Found | None]]:
    looked: list[tuple[binaries.Wanted, Found | None]] = []

    def kept(fresh: list[Needed]) -> list[bool]:
        found = [(each, each.find()) for each in (wanted(one.job) for one in fresh)]
        looked.extend(found)
        told = [{"spills": 0, "shared": 0} if known is None else known.manifest.details for _, known in found]
        return [_fits(one["spills"], one["shared"], target) for one in told]

    kernels_of(model, plan, target, kept)
    return looked
