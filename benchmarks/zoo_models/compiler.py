"""How the zoo reaches morphc, and what it reads from a report."""

from __future__ import annotations

import importlib
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from .candidates import Candidate
from .registry import Entry

ROOT = Path(__file__).resolve().parents[2]
Compile = Callable[..., nn.Module]


def load() -> Any:
    """The morphc of this checkout. Raises ImportError or AttributeError when it can't compile yet."""
    sys.path.insert(0, str(ROOT))
    try:
        package = importlib.import_module("morphc")
        if not callable(package.compile):
            raise AttributeError("morphc.compile is not callable")
    finally:
        # transformers looks for a package named `kernels` and must not find the room of that name.
        sys.path.remove(str(ROOT))
    return package


def compiled(host: nn.Module, entry: Entry, seeds: int, verify: bool, telemetry_every: int = 16) -> nn.Module:
    """`morphc.compile` with the entry's example."""
    morphc = load()
    args, kwargs = entry.inputs(entry.batch, entry.length)
    return morphc.compile(
        host,
        example_inputs=args,
        example_kwargs=kwargs,
        config=morphc.Config(seeds_per_layer=seeds, telemetry_every=telemetry_every),
        verify=verify,
    )


def covers(site_path: str, candidate: Candidate) -> bool:
    """A site's path is one of the candidate's names; a parameter used twice has a suffix after its name."""
    for name in candidate.names:
        rest = site_path.removeprefix(name)
        if site_path == name or (site_path.startswith(name) and name and rest[0] in "#@:[~"):
            return True
    return False


def no_site(candidate: Candidate, reason: str) -> dict[str, Any]:
    """The row of a candidate without a site."""
    return {
        "path": candidate.path,
        "kind": candidate.kind,
        "counted": candidate.counted,
        "site": False,
        "level": None,
        "reason": reason,
    }


def account(model: nn.Module, candidates: list[Candidate]) -> dict[str, Any]:
    """Which candidates got a site, the reason for each that did not, and the capture levels."""
    plan = load().report(model).plan
    rows = []
    for candidate in candidates:
        site = next((site for site in plan.sites if covers(site.path, candidate)), None)
        reasons = [miss.reason for miss in plan.misses if covers(miss.path, candidate) and miss.reason]
        row = no_site(candidate, (reasons or ["no reason given"])[0])
        rows.append(row if site is None else {**row, "site": True, "level": site.captured_as, "reason": ""})
    return {
        "candidates": rows,
        "sites": len(plan.sites),
        "extra_sites": [
            site.path for site in plan.sites if not any(covers(site.path, other) for other in candidates)
        ],
        "site_levels": dict(Counter(site.captured_as for site in plan.sites)),
        "region_levels": dict(Counter(region.level for region in plan.regions)),
        "regions_running": sum(region.runs for region in plan.regions),
        "region_reasons": sorted(
            {
                f"{region.module_class}: {region.reason}"
                for region in plan.regions
                if region.level != "rewritten"
            }
        ),
    }


def silent_sites(model: nn.Module, candidates: list[Candidate]) -> list[str]:
    """Sites of executed candidates whose telemetry counted nothing: they were bypassed."""
    seeds = load().seeds(model)
    telemetry = seeds.telemetry()
    counts = telemetry["count"] + telemetry["nonfinite"]
    silent, row = [], 0
    for path, site in seeds.sites.items():
        mine = counts[row : row + len(site)]
        row += len(site)
        if not bool((mine > 0).all()):
            silent += [candidate.path for candidate in candidates if covers(path, candidate)]
    return silent
