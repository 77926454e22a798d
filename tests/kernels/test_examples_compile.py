"""Every kernel that the examples need compiles for every architecture, and spills nothing."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from golden_cases import IMAGE, LOWRANK, UNEVEN, WIDE

import morphc
from morphc.kernels import compile as compiling
from morphc.kernels import tap, tap_join
from morphc.kernels.blueprints import base
from morphc.kernels.compile import Resources, compile_all
from morphc.kernels.needed import compile_needed
from morphc.kernels.spec import KernelSpec
from morphc.loading import load_model

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))
TARGETS = ("cuda:80", "cuda:90", "cuda:100", "hip:gfx942")
ROWS = 1024
EVERY = 1 if os.environ.get("MORPHC_COMPILE_ALL") else 3
"""Of so many specs one is compiled for a target; by its digest, so that each comes to another target's turn."""


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


def of_goldens() -> list[KernelSpec]:
    """The specs of the kept files, of every kind that a bank has."""
    replace = msgspec.structs.replace
    shapes = [WIDE, UNEVEN, replace(UNEVEN, blend="gate"), IMAGE]
    shapes.append(replace(IMAGE, blueprint="affine", blend="multiply"))
    return [replace(spec, kind=kind) for spec in shapes for kind in ("forward", "backward", "train")]


def test_every_example_has_kernels(specs: dict[str, tuple[KernelSpec, ...]]) -> None:
    assert all(specs.values()), [name for name, found in specs.items() if not found]


@pytest.mark.parametrize("target", TARGETS)
def test_the_kernels_of_the_examples_and_of_the_kept_files_compile_and_spill_nothing(
    specs: dict[str, tuple[KernelSpec, ...]], target: str
) -> None:
    """A third of the specs for each target, by turns; with MORPHC_COMPILE_ALL=1 all of them."""
    every = dict.fromkeys([*(spec for found in specs.values() for spec in found), *of_goldens()])
    turn = TARGETS.index(target)
    mine = [spec for spec in every if (int(spec.digest[:8], 16) + turn) % EVERY == 0]
    compiled = compile_needed(mine, ROWS, target)
    assert {job.function for job, _ in compiled} >= {
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
        f"{job.source.name} {job.function} {dict(job.constants)} {dict(job.options)}: {found.problem}"
        for job, found in compiled
        if not isinstance(found, Resources) or found.problem
    ]
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize("target", TARGETS)
def test_the_kernels_of_a_kept_tap_compile_and_spill_nothing(target: str) -> None:
    spec = msgspec.structs.replace(WIDE, blueprint="lowrank", kind="tap")
    join = msgspec.structs.replace(spec, kind="join")
    backward = msgspec.structs.replace(spec, kind="backward")
    made = tap.jobs(spec, LOWRANK.tap, plan=tap.plan(spec, ROWS, 1, target), target=target)
    jobs = [
        *made.values(),
        tap_join.join_job(join, LOWRANK, tap_join.config_of(join, target), stash=True, target=target),
        *tap_join.backward_jobs(
            backward, LOWRANK, tap_join.backward_config_of(backward, LOWRANK, target), target=target
        ),
    ]
    for job, found in zip(jobs, compile_all(jobs), strict=True):
        assert isinstance(found, Resources), (job.function, found)
        assert not found.problem, (job.function, job.constants, found.problem)
