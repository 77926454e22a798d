"""What a kernel falls back to where its config spills."""

from __future__ import annotations

import pytest
import torch
from active_helpers import bank
from gradient_helpers import BOUNDS, case, distance, reference
from msgspec.structs import replace

from morphc.errors import ResourceError
from morphc.kernels import active, gradient, ladder, lanes, launch
from morphc.kernels.compile import Job
from morphc.kernels.launch import Prepared
from morphc.kernels.layout import view_of
from morphc.kernels.spec import TuneConfig

FIRST = TuneConfig(64, 16, 4, 3, programs=2)
CPU = torch.device("cpu")


def prepared(spills: int) -> Prepared:
    found = Prepared("kernel", CPU, lambda grid, *args: None)
    found.spills = spills
    return found


def test_the_first_config_that_spills_nothing_is_taken() -> None:
    second, third = replace(FIRST, num_warps=8), replace(FIRST, block_rows=16)
    spills = {FIRST: 3, second: 0, third: 0}
    tried = []

    def prepare(config: TuneConfig) -> Prepared:
        tried.append(config)
        return prepared(spills[config])

    assert ladder.first_clean(FIRST, (second, third), prepare)[0] == second
    assert tried == [FIRST, second]
    spills[second] = 7
    assert ladder.first_clean(FIRST, (second, third), prepare)[0] == third
    spills[third] = 2
    assert ladder.first_clean(FIRST, (second, third), prepare)[0] == third, "it spills least"


def test_a_config_that_does_not_fit_is_passed_over_and_none_is_an_error() -> None:
    small = replace(FIRST, block_rows=16)

    def prepare(config: TuneConfig) -> Prepared:
        if config == FIRST:
            raise ResourceError("kernel needs 300000 B of shared memory")
        return prepared(5)

    assert ladder.first_clean(FIRST, (small,), prepare)[0] == small
    with pytest.raises(ResourceError, match="300000 B"):
        ladder.first_clean(FIRST, (), prepare)


@pytest.mark.parametrize("kind", ["forward", "backward", "train"])
@pytest.mark.parametrize("blueprint", ["affine", "bottleneck"])
@pytest.mark.parametrize("chunk", [1, 6, 64, 192, 256])
def test_rungs_are_other_configs_that_can_be_launched(kind: str, blueprint: str, chunk: int) -> None:
    spec = replace(
        case(24, 6, 5, 3).spec, kind=kind, features=4 * chunk, seeds=4, chunk=chunk, blueprint=blueprint
    )
    first = gradient.default(spec, 1024)
    found = ladder.rungs(spec, first)
    assert found
    assert first not in found
    assert len(set(found)) == len(found)
    for config in found:
        assert config.num_warps in (1, 2, 4, 8, 16)
        if config.lanes:
            assert config.block_rows % lanes.side(config) == 0
            continue
        assert config.block_rows >= (16 if blueprint == "bottleneck" else 1)
        if kind != "forward" and blueprint == "bottleneck":
            tile = gradient.tile_of(spec, config)
            assert tile.columns % tile.pieces == 0
            assert tile.pieces == 1 or tile.columns // tile.pieces >= 16


def test_a_backward_that_spills_goes_on_with_the_next_config(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a block, partial sums and the reduction's grid are then all the next one's."""
    made = case(24, 6, 5, 3, rows=37)
    first = TuneConfig(32, 16, 4, 3, group=2, programs=1)
    second = TuneConfig(16, 16, 8, 3, programs=2)
    prepare_job = launch.prepare_job

    def spilling(job: Job, device: torch.device, **options: bool) -> Prepared:
        found = prepare_job(job, device, **options)
        if job.function == "backward" and job.options["num_warps"] == 4:
            found = Prepared(found.name, found.device, found.launch)
            found.spills = 9
        return found

    monkeypatch.setattr(launch, "prepare_job", spilling)
    kernel = gradient.Backward(made.spec, first, CPU, "ieee", (second,))
    dx = made.dy.clone()
    flat = torch.full((made.spec.slots * gradient.gradient_size(made.spec),), torch.nan)
    stash, listed = made.stash(), made.active
    view = made.view
    kernel(made.dy, view, dx, view, listed, list(made.params.values()), stash, flat)
    assert kernel.config == second
    assert not kernel.behind
    expected, grads = reference(made)
    bound = BOUNDS[torch.float32]
    assert distance(dx, expected) < bound
    for name, found in gradient.sections(made.spec, flat).items():
        assert distance(found, grads[name]) < bound, name


def test_a_forward_that_spills_goes_on_with_the_next_config(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also through what was bound to the rows of the first one, and for a variant that comes later."""
    made = bank(24, 6, device=CPU, rank=3)
    first, second, third = (TuneConfig(rows, 16, 4, 2, programs=2) for rows in (64, 32, 16))
    spills = {64: 5, 32: 0, 16: 0}
    launch_as_it_is = launch.prepare_job

    def spilling(job: Job, device: torch.device, **options: bool) -> Prepared:
        found = launch_as_it_is(job, device, **options)
        counted = Prepared(found.name, found.device, found.launch)
        counted.spills = spills[job.constants["ROWS"]]
        return counted

    monkeypatch.setattr(launch, "prepare_job", spilling)
    kernel = active.Forward(made.spec, first, CPU, "ieee", (second, third))
    y = torch.randn(70, 24)
    view = view_of(y, -1)
    assert view is not None
    bound = kernel.bound(view)
    for turn, config in enumerate((second, third)):
        x = y.clone()
        stash = torch.zeros(active.stash_shape(made.spec, view)) if turn else None
        bound(x, made.active, made.params, stash)
        assert kernel.config == config
        assert distance(x, made.reference(y)) < BOUNDS[torch.float32]
        spills[32] = 1


def test_wide_float32_chunks_are_in_pieces_and_others_are_not() -> None:
    spec = replace(case(24, 6, 5, 3).spec, features=192, seeds=1, chunk=192, rank=16)
    assert gradient.tile_of(spec, gradient.default(spec, 1024)).pieces == 8
    narrow = replace(spec, dtype="bfloat16")
    assert gradient.tile_of(narrow, gradient.default(narrow, 1024)).pieces == 1
