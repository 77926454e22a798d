"""Every kernel that a compiled model launches on a target, found without a GPU.

The objects that launch kernels are called on the `meta` device, which then stands for the target, with activations as
the example input makes them: what they prepare is what they would prepare there.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import NamedTuple

import msgspec
import torch
from torch import Tensor

from morphc.kernels import gradient, lifecycle, tap_join, telemetry, training
from morphc.kernels.backend import KERNEL_DTYPES
from morphc.kernels.blueprints.base import get
from morphc.kernels.compile import SHARED_LIMITS, Job
from morphc.kernels.launch import collecting, prepare_job
from morphc.kernels.layout import View, thinned, view_of
from morphc.kernels.site import BankKernels, Like, TapBankKernels, refusal, spec_of
from morphc.kernels.spec import KernelSpec
from morphc.kernels.tuner import Task
from morphc.runtime import isolation
from morphc.runtime.bank import SlotBank
from morphc.runtime.site import SeedSite

META = torch.device("meta")


class Seen(NamedTuple):
    """An activation of a site as the example made it. positions: of a sample, behind its features."""

    rows: int
    positions: int
    dtype: torch.dtype
    source: str = ""


class Needed(NamedTuple):
    """A kernel, the layers that launch it, and the user's lines where they are called."""

    job: Job
    layers: tuple[str, ...]
    sources: tuple[str, ...]


def needed(
    sites: Mapping[str, SeedSite],
    seen: Mapping[str, Seen],
    target: str,
    unfit: Collection[tuple[str, ...]] = (),
) -> list[Needed]:
    """The kernels of these sites on `target` (`cuda:90`), each once, in the order of the sites.

    unfit: `identity` of jobs that are known to spill there, behind which the next config is tried. A site that the
    example input never reached has none here, nor has a bank that torch computes.
    """
    found: dict[object, tuple[Job, dict[str, None], dict[str, None]]] = {}
    for path, site in sites.items():
        if path not in seen or not seen[path].rows:
            continue
        for job in _of_site(site, seen[path], target, unfit):
            _, layers, sources = found.setdefault(job.identity, (job, {}, {}))
            layers[path] = None
            if seen[path].source:
                sources[seen[path].source] = None
    with collecting(target) as jobs:
        prepare_job(lifecycle.lifecycle_job(False), META)
        prepare_job(lifecycle.lifecycle_job(True), META)
        prepare_job(lifecycle.report_job(), META)
    for job in jobs:
        found.setdefault(job.identity, (job, {}, {}))
    return [Needed(job, tuple(layers), tuple(sources)) for job, layers, sources in found.values()]


def tasks(sites: Mapping[str, SeedSite], seen: Mapping[str, Seen]) -> Iterator[Task]:
    """What of these sites' kernels can be tuned; a site that the example input never reached has nothing."""
    for path, site in sites.items():
        made = _made(site, seen[path]) if path in seen and seen[path].rows else None
        if made is None:
            continue
        y, view, _ = made
        watched = telemetry.spec_of(site.features, site.seeds, y.dtype, view.walk, site.epilogue)
        if site.telemetry_every and not telemetry.refuses(watched, site.near_zero):
            yield Task(watched, thinned(view, site.features, site.telemetry_values).rows, (path,))
        for _, bank in site.slots.items():
            spec = _spec(site, bank, y.dtype, view)
            if refusal(spec, bank.geometry) or get(bank.blueprint).tap != "chunk":
                continue
            # Only a reconstruction, which `lerp` has, runs the training kernel's forward.
            for kind in ("forward", "backward", *(("train",) if bank.blend == "lerp" else ())):
                yield Task(msgspec.structs.replace(spec, kind=kind), view.rows, (path,))


def _made(site: SeedSite, seen: Seen) -> tuple[Tensor, View, int] | None:
    """The site's activation on meta, how it is walked, and its feature axis; None where no kernel walks it."""
    shape: tuple[int, ...] = (seen.rows, site.features)
    axis = -1
    if seen.positions > 1:
        shape, axis = (seen.rows // seen.positions, site.features, seen.positions), 1
    y = torch.empty(shape, dtype=seen.dtype, device=META)
    view = view_of(y, axis)
    return None if view is None or y.dtype not in KERNEL_DTYPES else (y, view, axis)


def _of_site(site: SeedSite, seen: Seen, target: str, unfit: Collection[tuple[str, ...]]) -> list[Job]:
    made = _made(site, seen)
    if made is None:
        return []
    y, view, axis = made
    with collecting(target, unfit) as jobs:
        _measure(site, y, view)
        for _, bank in site.slots.items():
            kernels = _kernels(site, bank, y.dtype, view, target)
            if isinstance(kernels, BankKernels):
                _chunk_bank(kernels, bank, y, view, axis, True)
                _chunk_bank(BankKernels(kernels.spec, META), bank, y, view, axis, False)
                if not isolation.straight(site):
                    _reconstruct(kernels, bank, view)
            elif kernels is not None:
                _tap_bank(kernels, bank, y, view, axis)
            # Parameters are float32, and AdamW walks them whatever the activation's layout is.
            stepping = _kernels(site, bank, torch.float32, View("last", 1, site.features, 1), target)
            if stepping is not None:
                _step(stepping, bank)
    return jobs


def _kernels(
    site: SeedSite, bank: SlotBank, dtype: torch.dtype, view: View, target: str
) -> BankKernels | TapBankKernels | None:
    """As `morphc.kernels.site.bank_kernels`; None where torch computes the bank."""
    spec = _spec(site, bank, dtype, view)
    if refusal(spec, bank.geometry):
        return None
    if get(bank.blueprint).tap == "chunk":
        return BankKernels(spec, META)
    if tap_join.refuses(spec, bank.geometry, SHARED_LIMITS[target]):
        return None
    return TapBankKernels(spec, bank.geometry, META)


def _spec(site: SeedSite, bank: SlotBank, dtype: torch.dtype, view: View) -> KernelSpec:
    return spec_of(
        bank.blueprint,
        bank.geometry,
        bank.blend,
        features=site.features,
        seeds=site.seeds,
        slots=bank.slots,
        dtype=dtype,
        walk=view.walk,
    )


def _measure(site: SeedSite, y: Tensor, view: View) -> None:
    spec = telemetry.spec_of(site.features, site.seeds, y.dtype, view.walk, site.epilogue)
    if not site.telemetry_every or telemetry.refuses(spec, site.near_zero):
        return
    kernels = telemetry.Telemetry(spec, site.near_zero, META)
    view = thinned(view, site.features, site.telemetry_values)
    cells = kernels.new_cells(view)
    sums = torch.empty(8, site.seeds, dtype=torch.float64, device=META)
    counts = torch.empty(3, site.seeds, dtype=torch.int64, device=META)
    kernels.shift(y, view, sums, counts)
    kernels(y, view, cells, sums, counts)
    kernels.merge(cells, sums, counts)


def _chunk_bank(
    kernels: BankKernels, bank: SlotBank, y: Tensor, view: View, axis: int, blending_first: bool
) -> None:
    """blending_first: a form that spills makes all that come behind it take another config."""
    listed, params = kernels.new_list(), _on_meta(bank.leaves().values())
    _list(kernels, bank, listed)
    forward, stash = kernels.forward_of(view).bound(view), kernels.new_stash(view)
    early = gradient.follows_early(META)
    for saved in (stash, None) if blending_first else (None, stash):
        for begins_early in (False, True) if early else (False,):
            forward(y, listed, params, saved, begins_early)
    like = Like(tuple(y.shape), y.stride(), axis)
    for isolated_only in (not blending_first, blending_first):
        for owned in (False, True):
            for into in (None, torch.empty(kernels.floats, dtype=torch.float32, device=META)):
                kernels.backward(torch.empty_like(y), like, listed, params, stash, isolated_only, owned, into)


def _tap_bank(kernels: TapBankKernels, bank: SlotBank, y: Tensor, view: View, axis: int) -> None:
    listed, params = kernels.new_list(), _on_meta(bank.leaves().values())
    _list(kernels, bank, listed)
    tap = torch.empty(view.rows, bank.geometry.tap_features, dtype=y.dtype, device=META)
    kernels.forward(y, view, listed, params, tap)
    z, stash = y.new_empty(kernels.z_shape(view.rows)), y.new_empty(kernels.stash_shape(view.rows))
    kernels.forward(y, view, listed, params, tap, z, stash)
    like = Like(tuple(y.shape), y.stride(), axis)
    for made in (z, None):
        for wants_tap in (False, True):
            kernels.backward(
                torch.empty_like(y),
                like,
                listed,
                params,
                tap,
                made,
                None if made is None else stash,
                wants_tap,
            )


def _reconstruct(kernels: BankKernels, bank: SlotBank, view: View) -> None:
    if training.refuses(kernels.spec):
        return
    loss = torch.empty(bank.slots, device=META)
    kernels.reconstruct(
        kernels.new_stash(view), view, kernels.new_list(), _held(bank), loss, training.Rates(lr=0.0)
    )


def _held(bank: SlotBank) -> training.Bank:
    params = _on_meta(bank.leaves().values())
    means, squares = ([torch.empty_like(param) for param in params] for _ in range(2))
    return training.Bank(params, means, squares, torch.empty(bank.slots, dtype=torch.int64, device=META))


def _list(kernels: BankKernels | TapBankKernels, bank: SlotBank, listed: Tensor) -> None:
    seeds = kernels.spec.seeds
    owner, lifecycles = bank.owner.to(META), torch.empty(seeds, dtype=torch.int32, device=META)
    kernels.make_list(owner, lifecycles, torch.empty(seeds, device=META), listed, 0, 0, 0)


def _step(kernels: BankKernels | TapBankKernels, bank: SlotBank) -> None:
    held = _held(bank)
    listed, rates = kernels.new_list(), training.Rates(lr=0.0)
    if isinstance(kernels, BankKernels):
        flat = torch.empty(kernels.floats, device=META)
        kernels.stepper.step(listed, held, flat, rates)
        kernels.stepper.step_all([training.addresses(listed, held)], [flat], rates)
    else:
        kernels.stepper.step(listed, held, [torch.empty_like(param) for param in held.params], rates)


def _on_meta(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [tensor.detach().to(META) for tensor in tensors]
