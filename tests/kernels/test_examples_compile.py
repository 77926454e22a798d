"""Every kernel that the examples need compiles for every architecture, and spills nothing."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import morphc
from morphc.kernels import compile as compiling
from morphc.kernels.blueprints import base
from morphc.kernels.compile import Resources, compile_all
from morphc.kernels.needed import needed
from morphc.kernels.spec import KernelSpec
from morphc.loading import load_model

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))
TARGETS = ("cuda:80", "cuda:90", "cuda:100", "hip:gfx942")
ROWS = 1024


def specs_of(path: Path) -> tuple[KernelSpec, ...]:
    """The specs of an example's plan, with as many seeds as it asks for itself."""
    found = re.search(r"seeds_per_layer=(\d+)", path.read_text())
    config = morphc.Config(seeds_per_layer=int(found[1])) if found else morphc.Config()
    loaded = load_model(str(path))
    model = morphc.compile(loaded.host, loaded.args, loaded.kwargs, config=config, verify=False)
    return morphc.report(model).plan.specs


@pytest.fixture(scope="module")
def specs() -> Iterator[dict[str, tuple[KernelSpec, ...]]]:
    with pytest.MonkeyPatch.context() as patch:
        # Some examples register a blueprint of their own.
        patch.setattr(base, "_REGISTRY", dict(base._REGISTRY))
        yield {path.name: specs_of(path) for path in EXAMPLES}
    compiling._POOL.close()


def test_every_example_has_kernels(specs: dict[str, tuple[KernelSpec, ...]]) -> None:
    assert all(specs.values()), [name for name, found in specs.items() if not found]


@pytest.mark.skipif(
    not os.environ.get("MORPHC_COMPILE_ALL"),
    reason="minutes on two cores, and some float32 tiles of wide chunks still spill; MORPHC_COMPILE_ALL=1 runs it",
)
@pytest.mark.parametrize("target", TARGETS)
def test_the_kernels_of_the_examples_compile_and_spill_nothing(
    specs: dict[str, tuple[KernelSpec, ...]], target: str
) -> None:
    jobs = needed(dict.fromkeys(spec for found in specs.values() for spec in found), ROWS, target)
    functions = {job.function for job in jobs}
    assert functions >= {
        "forward",
        "backward",
        "reduce",
        "train",
        "adamw",
        "telemetry",
        "merge",
        "active_list",
    }
    bad = [
        f"{job.source.name} {job.function} {dict(job.constants)}: {found.problem}"
        for job, found in zip(jobs, compile_all(jobs), strict=True)
        if not isinstance(found, Resources) or found.problem
    ]
    assert not bad, "\n".join(bad)
