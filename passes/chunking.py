"""How many seeds and slots every site gets: pure functions from plain data to plain data.

Seeds, by `Config.seeds_per_layer`:
1. an integer is a ceiling: a site with fewer features gets one seed a feature, and its note says so;
2. `{pattern: n}` is strict: the last pattern that matches a site's path holds, and must not exceed its
   features;
3. `"auto"`: of the counts with aligned chunks, the largest whose predicted overhead is within `max_overhead`.
   A site of several `parts` (the packed q | k | v of an attention) has a count that cuts each part alike, so that no
   chunk has features of two: at least one seed a part, otherwise the largest such count that the rules allow.

Slots: what `Config.slots` says, up to 16 a seed, or min(seeds, max(4, 10 %)) of all sites within 2 % of the host's
memory.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import lru_cache
from itertools import pairwise
from typing import Literal

from msgspec.structs import replace

from morphc.config import Config
from morphc.errors import ConfigError, did_you_mean
from morphc.kernels import blueprints, cost
from morphc.kernels.blueprints.base import ConvGeometry
from morphc.kernels.cost import HostLayer, SiteShape
from morphc.kernels.cost_terms import dtype_bytes
from morphc.kernels.devices import Device, nominal
from morphc.kernels.spec import NO_BLOCK, TRANSPOSED, KernelSpec, Layout
from morphc.passes.plan import Site

MOST_AUTO_SEEDS = 1024
LEAST_AUTO_CHUNK = 8
ALIGNMENTS = (16, 8)
# What the rows of a site are taken to be when the example input never reached it.
UNKNOWN_ROWS = 1024
# Weights of all slots against the host's own. Gradients and moments come on top of both alike.
MEMORY_SHARE = 0.02
# Slots that one seed can put to use: so many candidates can be trained for it side by side.
MOST_SLOTS_A_SEED = 16
SPEC_KINDS = ("forward", "backward", "train")

Overhead = Callable[[Site, int], float]
Seeds = int | Mapping[str, int] | Literal["auto"]


def bounds(features: int, seeds: int) -> tuple[tuple[int, int], ...]:
    """[start, stop) of every chunk, cut as by `torch.tensor_split`: the first `features % seeds` wider."""
    if not 1 <= seeds <= features:
        raise ConfigError(f"{features} features can't be cut into {seeds} chunks; use 1 to {features}")
    width, wider = divmod(features, seeds)
    starts = [seed * width + min(seed, wider) for seed in range(seeds + 1)]
    return tuple(pairwise(starts))


def aligned_counts(features: int) -> tuple[int, ...]:
    """The seed counts that `"auto"` chooses from, ascending; 1 is always among them.

    1. Chunks that are equal multiples of 16, else of 8 features, where `features` is one.
    2. Otherwise equal chunks of at least 8 features.
    3. Where those allow less than a quarter of the seeds (a prime number of features), uneven ones as well.
    """
    for align in ALIGNMENTS:
        if features % align == 0:
            return tuple(_divisors(features // align, MOST_AUTO_SEEDS))
    most = max(1, min(MOST_AUTO_SEEDS, features // LEAST_AUTO_CHUNK))
    even = _divisors(features, most)
    if 4 * even[-1] >= most:
        return tuple(even)
    uneven = [even[-1] << k for k in range(1, most.bit_length()) if even[-1] << k < most]
    return (*even, *uneven, most)


def plan_seeds(
    sites: Sequence[Site], requested: Seeds, *, overhead: Overhead, max_overhead: float
) -> tuple[tuple[int, str], ...]:
    """Seeds of every site, each with a note that is empty where nothing is to be said.

    `overhead(site, seeds)` is the predicted cost of the dormant site over its host layer's. Raises
    ConfigError naming the site and its source line when the request fits no site, or a pattern's count not
    its site.
    """
    if requested == "auto":
        return tuple(_auto(site, overhead, max_overhead) for site in sites)
    if isinstance(requested, int):
        _check_ceiling(sites, requested)
        return tuple(_ceiling(site, requested) for site in sites)
    _check_patterns(sites, requested)
    planned = []
    for site in sites:
        pattern = next((p for p in reversed(list(requested)) if fnmatchcase(site.path, p)), None)
        if pattern is None:
            planned.append(_auto(site, overhead, max_overhead))
            continue
        if requested[pattern] > site.features:
            raise _too_many(f"seeds_per_layer[{pattern!r}]", requested[pattern], site)
        if not cuts_parts_alike(site, requested[pattern]):
            raise ConfigError(
                f"seeds_per_layer[{pattern!r}]={requested[pattern]} does not cut the {site.parts} parts of "
                f"{site.path!r}, {site.features // site.parts} features each, alike; use "
                f"{_fitting(site, requested[pattern])}"
            )
        planned.append((requested[pattern], ""))
    return tuple(planned)


def wanted_slots(seeds: int) -> int:
    """min(seeds, max(4, 10 % rounded up))."""
    return min(seeds, max(4, -(-seeds // 10)))


def default_slots(
    sites: Sequence[Site], host_bytes: int, bytes_per_slot: Sequence[int], share: float = MEMORY_SHARE
) -> tuple[int, ...]:
    """Slots of every site: what it wants, cut to one common cap so that all fit `share` of `host_bytes`.

    The cap is the same for all, so that equal layers keep equal slots and share their kernels. Every site
    keeps one slot, even where that alone is beyond the budget.
    """
    wanted = [wanted_slots(site.seeds) for site in sites]
    budget = int(host_bytes * share)

    def total(cap: int) -> int:
        return sum(min(w, cap) * each for w, each in zip(wanted, bytes_per_slot, strict=True))

    fits, beyond = 1, max(wanted, default=1) + 1
    while beyond - fits > 1:
        middle = (fits + beyond) // 2
        fits, beyond = (middle, beyond) if total(middle) <= budget else (fits, middle)
    return tuple(min(w, fits) for w in wanted)


def plan_chunks(
    sites: Sequence[Site],
    config: Config,
    device: Device,
    *,
    host_bytes: int | None = None,
    hosts: Mapping[str, HostLayer] | None = None,
) -> tuple[Site, ...]:
    """`sites` with seeds, slots, predicted and note filled in. Running it on its own result changes nothing.

    host_bytes: memory of the host's parameters and buffers; None adds up the watched layers' own weights.
    hosts: host layers that are known more closely than their sites tell (a stride, a kernel). For a CPU the
    nominal one is asked, so that two runs plan alike.
    """
    device, hosts = nominal(device), hosts or {}
    backend = cost.backend_for(config.backend, device)
    layers = {site.path: hosts.get(site.path) or host_layer(site) for site in sites}

    def overhead(site: Site, seeds: int) -> float:
        shape = site_shape(replace(site, seeds=seeds), config)
        return cost.overhead(shape, layers[site.path], device, site.rows or UNKNOWN_ROWS, backend)

    seeds = plan_seeds(sites, config.seeds_per_layer, overhead=overhead, max_overhead=config.max_overhead)
    chosen = [
        replace(site, seeds=count, note=_joined(site.note, note))
        for site, (count, note) in zip(sites, seeds, strict=True)
    ]
    budgeted = _host_bytes(sites, layers) if host_bytes is None else host_bytes
    slots = _slots(chosen, config, layers, budgeted)
    planned = []
    for site, count in zip(chosen, slots, strict=True):
        layer = layers[site.path]
        usable, note = usable_blueprints(site, config, layer.conv)
        if usable and config.slots is not None and count < config.slots:
            fewer = f"{config.slots} slots asked for, {count} are of use: {MOST_SLOTS_A_SEED} for each seed"
            note = _joined(note, fewer)
        site = replace(site, slots=count, note=_joined(site.note, note))
        shape = site_shape(site, config, usable[0] if usable else None, layer.conv)
        rows = site.rows or UNKNOWN_ROWS
        found = cost.predict(shape, layer, device, rows, backend, active=bool(usable))
        numbers = found.numbers()
        # The two that a report sets side by side: a step of the dormant site and one of its layer.
        numbers |= {"us": numbers["dormant_us"], "layer_us": numbers["host_us"]}
        planned.append(replace(site, predicted=numbers))
    return tuple(planned)


def specs(
    sites: Sequence[Site],
    config: Config,
    *,
    kinds: Sequence[str] = SPEC_KINDS,
    arch: str = "any",
    hosts: Mapping[str, HostLayer] | None = None,
) -> tuple[KernelSpec, ...]:
    """Every kernel that planned sites need, each once, in the order of first use; equal layers share."""
    found: dict[KernelSpec, None] = {}
    for site in sites:
        layer = (hosts or {}).get(site.path)
        for blueprint in usable_blueprints(site, config, layer.conv if layer else None)[0]:
            for kind in kinds:
                spec = KernelSpec(
                    kind=kind,
                    features=site.features,
                    seeds=site.seeds,
                    chunk=-(-site.features // site.seeds),
                    slots=site.slots,
                    rank=config.rank,
                    blueprint=blueprint,
                    blend=config.blend,
                    epilogue=site.epilogue,
                    layout=layout_of(site),
                    dtype=site.dtype,
                    arch=arch,
                )
                found.setdefault(spec)
    return tuple(found)


def layout_of(site: Site) -> Layout:
    """`last` where the features are the last axis, else `channels_first`; memory format shows at run time."""
    return "last" if site.feature_axis == -1 else "channels_first"


def spatial_axes(site: Site) -> int:
    """Axes after the feature axis; one for a feature axis counted from the front."""
    return -site.feature_axis - 1 if site.feature_axis < 0 else 1


def site_shape(
    site: Site, config: Config, blueprint: str | None = None, conv: ConvGeometry | None = None
) -> SiteShape:
    """The site as the cost model sees it, with the first of the config's blueprints unless one is named.

    `conv` is how the host layer walks its input, if it is a convolution; its block's other one is taken
    alike.
    """
    name = blueprint or config.blueprints[0]
    block = site.block
    # The block's own input is as wide as its output wherever the block stands on a residual stream.
    tap = site.features if blueprints.get(name).tap == "block" else site.tap_features
    return SiteShape(
        features=site.features,
        seeds=site.seeds,
        slots=site.slots,
        rank=config.rank,
        blueprint=name,
        blend=config.blend,
        dtype=site.dtype,
        telemetry_every=config.telemetry_every,
        telemetry_values=config.telemetry_values,
        fused=site.epilogue is not None,
        owns_input=site.owns_input,
        tap_features=tap,
        spatial=spatial_axes(site),
        conv=conv,
        activation=block.activation if block else "gelu",
        gated=block is not None and block.kind == "gated",
        obstacle=block.obstacle if block else NO_BLOCK,
    )


def host_layer(site: Site) -> HostLayer:
    """The host layer as far as the site tells. Multiply-adds a row stand for its weight's elements."""
    width = site.tap_features or site.features
    known = site.host_flops_per_row // 2
    matmul = site.layer_kind in ("linear", "conv", "attention", "rnn")
    return HostLayer(
        kind=site.layer_kind,
        features=site.features,
        in_features=width,
        weights=known or (width * site.features if matmul else site.features),
        dtype=site.dtype,
    )


@lru_cache(maxsize=256)
def _expressions(shape: SiteShape, layer: HostLayer) -> dict[str, str]:
    return cost.expressions(shape, layer, "torch")


def expressions(site: Site, config: Config) -> dict[str, str]:
    """Bytes and flops of a planned site in the symbol `rows`, as text: see `cost.expressions`."""
    usable, _ = usable_blueprints(site, config)
    shape = site_shape(site, config, usable[0]) if usable else site_shape(replace(site, slots=0), config)
    return dict(_expressions(shape, host_layer(site)))


def usable_blueprints(
    site: Site, config: Config, conv: ConvGeometry | None = None
) -> tuple[tuple[str, ...], str]:
    """Those of the config's blueprints that can stand at the site, and a note on those that can't."""
    usable, refused = [], []
    for name in config.blueprints:
        kind = blueprints.get(name)
        reason = kind.refuses(site_shape(site, config, name, conv).geometry)
        if kind.tap != "chunk" and "ConvTranspose" in site.layer_class:
            reason = TRANSPOSED
        if kind.tap == "layer" and site.parameter is not None:
            reason = reason or "a functional layer's input is not seen by its site"
        if reason:
            refused.append(f"no {name}: {reason}")
        else:
            usable.append(name)
    return tuple(usable), "; ".join(refused)


def cuts_parts_alike(site: Site, count: int) -> bool:
    """Whether `count` chunks are the same number of equal ones in each of the site's parts."""
    if site.parts == 1:
        return True
    return count % site.parts == 0 and site.features // site.parts % (count // site.parts) == 0


def _fitting(site: Site, count: int) -> int:
    """The largest count up to `count` that cuts the site's parts alike, at least one seed a part."""
    return next((n for n in range(count, site.parts, -1) if cuts_parts_alike(site, n)), site.parts)


def _auto(site: Site, overhead: Overhead, max_overhead: float) -> tuple[int, str]:
    counts = aligned_counts(site.features // site.parts)
    for count in reversed([n * site.parts for n in counts if cuts_parts_alike(site, n * site.parts)]):
        if overhead(site, count) <= max_overhead:
            return count, ""
    least = overhead(site, site.parts)
    if least <= max_overhead:
        return site.parts, ""
    word = "one seed is" if site.parts == 1 else f"{site.parts} seeds are"
    return (
        site.parts,
        f"{word} predicted to cost {least:.1%} of its layer, above max_overhead={max_overhead:.1%}",
    )


def _ceiling(site: Site, count: int) -> tuple[int, str]:
    if count <= site.features and not cuts_parts_alike(site, count):
        fitting = _fitting(site, count)
        return fitting, f"{count} seeds asked for, {fitting} cut its {site.parts} parts alike"
    if count <= site.features:
        return count, ""
    plural = "s" if site.features != 1 else ""
    return site.features, f"{count} seeds asked for, {site.features} feature{plural}: one seed each"


def _check_ceiling(sites: Sequence[Site], count: int) -> None:
    widest = max(sites, key=lambda site: site.features, default=None)
    if widest is not None and count > widest.features:
        raise _too_many("seeds_per_layer", count, widest)


def _check_patterns(sites: Sequence[Site], requested: Mapping[str, int]) -> None:
    paths = [site.path for site in sites]
    for pattern in requested:
        if not any(fnmatchcase(path, pattern) for path in paths):
            near = difflib.get_close_matches(pattern, paths, n=8, cutoff=0.0)
            raise ConfigError(f"seeds_per_layer[{pattern!r}] matches no site.{did_you_mean(pattern, near)}")


def _too_many(option: str, count: int, site: Site) -> ConfigError:
    where = repr(site.path) if site.path else "the root module"
    source = f" ({site.source})" if site.source else ""
    return ConfigError(
        f"{option}={count} is more than the {site.features} features of {where}{source}; "
        f'use at most {site.features}, or "auto"'
    )


def _slots(
    sites: Sequence[Site], config: Config, layers: Mapping[str, HostLayer], host_bytes: int
) -> list[int]:
    """Slots of every site; none where no blueprint can stand."""
    usable = [usable_blueprints(site, config, layers[site.path].conv)[0] for site in sites]
    if config.slots is not None:
        return [
            min(config.slots, MOST_SLOTS_A_SEED * site.seeds) if names else 0
            for site, names in zip(sites, usable, strict=True)
        ]
    each = [
        _slot_bytes(site, config, names, layers[site.path].conv)
        for site, names in zip(sites, usable, strict=True)
    ]
    counts = default_slots(sites, host_bytes, each)
    return [count if names else 0 for count, names in zip(counts, usable, strict=True)]


def _slot_bytes(site: Site, config: Config, names: tuple[str, ...], conv: ConvGeometry | None) -> int:
    """Of one slot in every bank; a blueprint at a time, for each has its own tap."""
    return sum(cost.slot_bytes(site_shape(site, config, name, conv), (name,)) for name in names)


def _host_bytes(sites: Sequence[Site], layers: Mapping[str, HostLayer]) -> int:
    return sum(layers[site.path].weights * dtype_bytes(site.dtype) for site in sites)


def _joined(note: str, more: str) -> str:
    """Both notes, without saying the same thing twice."""
    if not more or more in note:
        return note
    return f"{note}; {more}" if note else more


def _divisors(number: int, most: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({d for low in small for d in (low, number // low) if d <= most})
