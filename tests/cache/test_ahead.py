"""The kernels of a model, found without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import torch
from cache_helpers import SPEC, compiled_cache, job
from torch import nn

import morphc
from morphc import ahead as aheads
from morphc.cli.targets import TARGETS
from morphc.errors import CacheMissError, TritonError, UnknownNameError
from morphc.kernels import backend, launch, tuning
from morphc.kernels import site as bank_kernels
from morphc.kernels.cache import counters
from morphc.kernels.compile import Job
from morphc.kernels.spec import KernelSpec
from morphc.runtime import ahead, devicegauge
from morphc.runtime.ahead import Seen
from morphc.runtime.store import store_of


class MLP(nn.Module):
    """Widths that divide evenly, and ones that don't."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(24, 64)
        self.fc2 = nn.Linear(64, 51)
        self.head = nn.Linear(51, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.fc2(torch.relu(self.fc1(x)))))


class Image(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 24, 3, stride=2, padding=1)
        self.head = nn.Linear(24, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.conv2(torch.relu(self.conv1(x))).mean((2, 3)))


def compiled(name: str, blueprint: str, dtype: torch.dtype) -> tuple[nn.Module, torch.Tensor]:
    host, shape = {"mlp": (MLP(), (33, 24)), "image": (Image(), (4, 3, 12, 12))}[name]
    x = torch.randn(shape).to(dtype)
    blueprint, _, isolation = blueprint.partition(" in ")
    options = {"isolation": isolation, "blend": "lerp"} if isolation else {}
    config = morphc.Config(seeds_per_layer=8, slots=4, blueprint=blueprint, telemetry_every=1, **options)
    return morphc.compile(host.to(dtype), (x,), config=config, verify=False), x


def predicted(model: nn.Module, target: str) -> list[Job]:
    sites = morphc.report(model).plan.sites
    seen = {site.path: Seen(site.rows, site.positions, getattr(torch, site.dtype)) for site in sites}
    return [one.job for one in ahead.needed(store_of(model).sites, seen, target)]


def told(one: Job) -> tuple[str, ...]:
    """What the key of its compiled form is made from."""
    parts = (one.signature, one.constants, one.options, sorted(one.aligned))
    return (one.source.key, one.source.name, one.function, *map(str, parts))


@pytest.fixture
def no_kernels_kept() -> Iterator[None]:
    """What was made on the CPU in the place of a GPU is not to be found by anybody else."""

    def clear() -> None:
        bank_kernels.bank_kernels.cache_clear()
        devicegauge.kernels_for.cache_clear()

    clear()
    yield
    clear()


@pytest.mark.usefixtures("no_kernels_kept")
@pytest.mark.parametrize("target", ["cuda:90", "cuda:80", "hip:gfx942"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("host", "blueprint"),
    [
        ("mlp", "bottleneck"),
        ("mlp", "lowrank"),
        ("mlp", "widen"),
        ("mlp", "affine"),
        ("mlp", "affine in reconstruction"),
        ("mlp", "bottleneck in reconstruction"),
        ("image", "bottleneck"),
    ],
)
def test_whatever_the_runtime_asks_for_was_predicted(
    host: str, blueprint: str, dtype: torch.dtype, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model runs on the CPU, whose kernels are collected as if it were the target, and launch nothing."""
    model, x = compiled(host, blueprint, dtype)
    expected = {told(one) for one in predicted(model, target)}
    monkeypatch.setattr(launch, "collected_target", lambda device: target)
    monkeypatch.setattr(backend, "_unavailable", lambda *device: "")
    seeds = morphc.seeds(model)
    with launch.collecting(target) as asked:
        for state in (morphc.Lifecycle.TRAINING, morphc.Lifecycle.FINE_TUNING):
            for path in [path for path in seeds.sites if seeds[path].site.slots.items()]:
                seeds[path].assign([0, 1], morphc.Lifecycle.DORMANT)
                seeds[path].assign([0, 1], state)
            model.train()
            for _ in range(2):
                model(x).float().square().mean().backward()
                seeds.step_optimizer(lr=1e-3)
            model.eval()
            with torch.no_grad():
                model(x)
        store_of(model).state.settle()
    assert {one.source.spec.kind for one in asked} >= {"telemetry", "active_list"}
    assert len({one.source.spec.kind for one in asked}) >= 4
    assert any(one.function == "train" for one in asked) == ("reconstruction" in blueprint)
    for one in asked:
        assert told(one) in expected, (one.source.name, one.function, one.constants, one.options, one.aligned)


def test_equal_layers_share_their_kernels() -> None:
    host = nn.Sequential(*(nn.Linear(32, 32) for _ in range(6)))
    model = morphc.compile(host, (torch.randn(4, 32),), config=morphc.Config(seeds_per_layer=4, slots=2))
    sites = morphc.report(model).plan.sites
    seen = {site.path: Seen(site.rows, site.positions, torch.float32, site.source) for site in sites}
    found = ahead.needed(store_of(model).sites, seen, "cuda:90")
    shared = {one.job.source.spec.kind: one.layers for one in found}
    assert shared["forward"] == tuple("012345")
    assert shared["lifecycle"] == ()
    assert len({told(one.job) for one in found}) == len(found)


def test_a_site_that_was_never_reached_has_none() -> None:
    model, _ = compiled("mlp", "bottleneck", torch.float32)
    assert {one.source.spec.kind for one in _only(model, "fc1", 0)} == {
        "lifecycle",
        "lifecycle_requests",
        "report",
    }
    assert len(list(_only(model, "fc1", 33))) > 10


def _only(model: nn.Module, path: str, rows: int) -> Iterator[Job]:
    found = ahead.needed(store_of(model).sites, {path: Seen(rows, 1, torch.float32)}, "cuda:90")
    yield from (one.job for one in found)


def test_a_model_is_compiled_for_a_target_and_found_again(fresh_cache: Path) -> None:
    # A blueprint of which nothing spills, so that no kernel makes way for another.
    config = morphc.Config(seeds_per_layer=2, slots=1, blueprint="affine")
    model = morphc.compile(nn.Sequential(nn.Linear(8, 8)), (torch.randn(2, 8),), config=config)
    plan = morphc.report(model).plan
    total, lacking = aheads.missing(model, plan, "cuda:80")
    assert len(lacking) == total > 8
    made = aheads.compile_kernels(model, plan, "cuda:80")
    assert len(made.kernels) == total
    assert made.compiled == len(made.misses) == total
    assert all(kernel.registers > 0 and kernel.size > 0 and not kernel.problem for kernel in made.kernels)
    assert aheads.missing(model, plan, "cuda:80") == (total, {})
    looked = aheads.look(model, plan, "cuda:80")
    assert (looked.hits, looked.misses, looked.compiled) == (total, [], 0)
    assert looked.saved == pytest.approx(made.spent)
    again = aheads.compile_kernels(model, plan, "cuda:80")
    assert (again.compiled, again.hits, again.misses) == (0, total, ())
    assert again.saved == pytest.approx(made.spent)
    (entry,) = (entry for entry in morphc.cache().entries() if entry.name.startswith("forward"))
    assert entry.layers == ("0",)
    assert entry.archs == ("cuda-80",)
    looked = aheads.look(model, plan, "cuda:89")
    assert looked.hits == 0
    assert [miss.target for miss in looked.misses] == ["cuda:89"] * total
    assert str(looked) == f"{total} kernels: 0 hits, {total} misses"
    _, lacking = aheads.missing(model, plan, "cuda:89")
    assert all("target: cuda:80 -> cuda:89" in reasons for reasons in lacking.values())


def test_compiling_can_be_forbidden(fresh_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MORPHC_REQUIRE_CACHED", "1")
    with (
        counters.watch() as count,
        pytest.raises(
            CacheMissError, match=r"own_h10_s3_k2_r5_fp32\.add is not in the cache for cuda:90 \(nothing"
        ),
    ):
        compiled_cache([job()])
    assert count.compiled == 0


def test_there_is_no_such_target() -> None:
    model, _ = compiled("mlp", "affine", torch.float32)
    with pytest.raises(UnknownNameError, match=r"unknown target 'cuda:1'\..*Known: .*cuda:90, hip:gfx942"):
        aheads.missing(model, morphc.report(model).plan, "cuda:1")


def test_triton_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = compiled("mlp", "affine", torch.float32)
    monkeypatch.setattr(backend, "triton_problem", lambda: "triton is not installed: pip install triton")
    with pytest.raises(TritonError, match="pip install triton"):
        aheads.compile_kernels(model, morphc.report(model).plan, "cuda:90")


def test_the_command_line_knows_the_same_targets() -> None:
    assert tuple(tuning.TARGETS) == TARGETS


@pytest.mark.parametrize(
    "spec",
    [
        SPEC,
        msgspec.structs.replace(SPEC, blend="gate", layout="channels_first", epilogue="silu"),
        msgspec.structs.replace(
            SPEC, kind="telemetry", blueprint="", blend="", slots=0, rank=0, epilogue="relu"
        ),
        msgspec.structs.replace(SPEC, kind="tap_backward", blueprint="lowrank", dtype="bfloat16"),
    ],
    ids=lambda spec: spec.name,
)
def test_a_name_is_read_back(spec: KernelSpec) -> None:
    assert KernelSpec.from_name(spec.name) == spec
