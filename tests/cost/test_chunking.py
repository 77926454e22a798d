"""Seeds and slots of every site, as pure functions."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from site_factory import make_site

from morphc.config import Config
from morphc.errors import ConfigError
from morphc.kernels import cost, devices
from morphc.kernels.blueprints import ConvGeometry
from morphc.passes import chunking
from morphc.passes.chunking import aligned_counts, bounds, default_slots, plan_chunks, plan_seeds, specs
from morphc.passes.plan import Block, Site

MakeSite = Callable[..., Site]


def free(site: Site, seeds: int) -> float:
    """An overhead that any number of seeds keeps."""
    return 0.0


def counts(sites: tuple[Site, ...], requested: chunking.Seeds) -> list[int]:
    """The planned seeds, without a cost to limit them."""
    return [n for n, _ in plan_seeds(sites, requested, overhead=free, max_overhead=0.02)]


# -- bounds
# ---------------------------------------------------------------------------------------------------


@given(st.integers(1, 5000), st.integers(1, 5000))
@settings(max_examples=80, deadline=None)
def test_bounds_are_those_of_tensor_split(features: int, seeds: int) -> None:
    seeds = min(seeds, features)
    cut = bounds(features, seeds)
    parts = torch.tensor_split(torch.arange(features), seeds)
    assert cut == tuple((int(part[0]), int(part[-1]) + 1) for part in parts)
    assert sum(stop - start for start, stop in cut) == features
    assert max(stop - start for start, stop in cut) == -(-features // seeds)


def test_103_features_in_10_chunks() -> None:
    assert [stop - start for start, stop in bounds(103, 10)] == [11, 11, 11, 10, 10, 10, 10, 10, 10, 10]


@pytest.mark.parametrize("seeds", [0, 11])
def test_bounds_refuse_empty_chunks(seeds: int) -> None:
    with pytest.raises(ConfigError, match=f"10 features can't be cut into {seeds} chunks; use 1 to 10"):
        bounds(10, seeds)


# -- seeds: an integer
# ------------------------------------------------------------------------------------------


def test_an_integer_is_a_ceiling_and_the_note_says_so() -> None:
    sites = (make_site("fc1", 512), make_site("head", 10))
    planned = plan_seeds(sites, 64, overhead=free, max_overhead=0.02)
    assert planned == ((64, ""), (10, "64 seeds asked for, 10 features: one seed each"))


def test_an_integer_beyond_every_site_is_an_error_with_the_source_line() -> None:
    sites = (make_site(), make_site("head", 10))
    expected = (
        "seeds_per_layer=300 is more than the 256 features of 'encoder.fc1' (model.py:41); "
        'use at most 256, or "auto"'
    )
    with pytest.raises(ConfigError) as caught:
        counts(sites, 300)
    assert str(caught.value) == expected


def test_the_root_module_and_a_missing_source_are_named_readably() -> None:
    with pytest.raises(ConfigError, match=r"300 is more than the 8 features of the root module; use"):
        counts((make_site("", 8, source=""),), 300)


def test_no_sites_take_any_request() -> None:
    assert counts((), 300) == []


# -- seeds: patterns
# --------------------------------------------------------------------------------------------


def test_the_last_matching_pattern_wins_and_the_rest_are_auto() -> None:
    sites = (make_site("encoder.fc1"), make_site("encoder.fc2"), make_site("head", 32))
    assert counts(sites, {"encoder.*": 4, "*.fc2": 8}) == [4, 8, 2]
    assert counts(sites, {"*.fc2": 8, "encoder.*": 4}) == [4, 4, 2]


def test_a_pattern_is_strict() -> None:
    sites = (make_site("encoder.fc1"), make_site("encoder.head", 10, source="model.py:50"))
    with pytest.raises(ConfigError) as caught:
        counts(sites, {"encoder.*": 64})
    assert str(caught.value) == (
        "seeds_per_layer['encoder.*']=64 is more than the 10 features of 'encoder.head' (model.py:50); "
        'use at most 10, or "auto"'
    )


def test_a_pattern_that_a_later_one_overrules_is_not_checked() -> None:
    sites = (make_site("encoder.fc1"), make_site("encoder.head", 10))
    assert counts(sites, {"encoder.*": 64, "*.head": 10}) == [64, 10]


def test_a_pattern_that_matches_nothing_is_an_error_with_a_suggestion() -> None:
    sites = (*(make_site(f"h.{i}.fc1") for i in range(40)), make_site("encoder.fc1"))
    with pytest.raises(
        ConfigError, match=r"seeds_per_layer\['encodr.fc1'\] matches no site. Did you mean 'encoder.fc1'"
    ):
        counts(sites, {"encodr.fc1": 4})
    with pytest.raises(ConfigError) as caught:
        counts(sites, {"zzz": 4})
    assert len(str(caught.value)) < 200


# -- seeds: auto
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("features", "most"),
    [
        (4096, 256),
        (768, 48),
        (512, 32),
        (10, 1),
        (7, 1),
        (1, 1),
        (24, 3),
        (1000, 125),
        (16384, 1024),
        (65536, 1024),
    ],
)
def test_auto_prefers_chunks_of_sixteen(features: int, most: int) -> None:
    assert counts((make_site(features=features),), "auto") == [most]


@given(st.integers(1, 70_000))
@settings(max_examples=120, deadline=None)
def test_auto_counts_are_legal_ascending_and_start_at_one(features: int) -> None:
    found = aligned_counts(features)
    assert found[0] == 1
    assert list(found) == sorted(set(found))
    assert found[-1] <= min(features, 1024)
    align = next((a for a in (16, 8) if features % a == 0), None)
    if align:
        assert all(features % n == 0 and features // n % align == 0 for n in found)
    elif features >= 8:
        assert features // found[-1] >= 8


def test_a_prime_number_of_features_still_gets_many_seeds() -> None:
    assert aligned_counts(50257)[-1] == 1024
    assert aligned_counts(103)[-1] == 12


@given(
    features=st.integers(1, 4096),
    rows=st.integers(1, 4096),
    bounds_of=st.tuples(st.floats(1e-4, 1.0), st.floats(1e-4, 1.0)),
    device=st.sampled_from([devices.CPU, devices.H200, devices.L4]),
)
@settings(max_examples=60, deadline=None)
def test_auto_keeps_max_overhead_and_is_monotone_in_it(
    features: int, rows: int, bounds_of: tuple[float, float], device: devices.Device
) -> None:
    site = make_site(features=features, rows=rows)
    tight, loose = sorted(bounds_of)
    planned = []
    for bound in (tight, loose):
        (found,) = plan_chunks((site,), Config(max_overhead=bound), device)
        exact = cost.overhead(
            chunking.site_shape(found, Config()),
            chunking.host_layer(site),
            device,
            rows,
            cost.backend_for("auto", device),
        )
        assert exact <= bound or (found.seeds == 1 and "above max_overhead" in found.note)
        planned.append(found.seeds)
    assert 1 <= planned[0] <= planned[1] <= features


def test_a_layer_too_small_for_the_bound_gets_one_seed_and_a_note() -> None:
    (found,) = plan_chunks((make_site(features=16, rows=1),), Config(max_overhead=0.0001), devices.CPU)
    assert found.seeds == 1
    assert "of its layer, above max_overhead=0.0%" in found.note


# -- slots
# ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("seeds", "slots"), [(1, 1), (3, 3), (4, 4), (40, 4), (41, 5), (1024, 103)])
def test_slots_wanted(seeds: int, slots: int) -> None:
    assert chunking.wanted_slots(seeds) == slots


@given(
    st.lists(st.tuples(st.integers(1, 2000), st.integers(0, 100_000)), min_size=1, max_size=12),
    st.integers(0, 10**9),
)
@settings(max_examples=100, deadline=None)
def test_slots_keep_the_memory_budget_down_to_one_each(
    given_: list[tuple[int, int]], host_bytes: int
) -> None:
    sites = [make_site(features=2000, seeds=seeds) for seeds, _ in given_]
    each = [size for _, size in given_]
    slots = default_slots(sites, host_bytes, each)
    spent = sum(n * size for n, size in zip(slots, each, strict=True))
    assert all(1 <= n <= chunking.wanted_slots(site.seeds) for n, site in zip(slots, sites, strict=True))
    assert spent <= host_bytes * 0.02 or set(slots) == {1}
    more = default_slots(sites, 2 * host_bytes, each)
    assert all(a <= b for a, b in zip(slots, more, strict=True))


def test_equal_sites_get_equal_slots() -> None:
    sites = [make_site(seeds=256) for _ in range(12)]
    assert len(set(default_slots(sites, 5_000_000, [9000] * 12))) == 1


def test_no_sites_need_no_slots() -> None:
    assert default_slots((), 10**9, ()) == ()


def test_slots_that_are_asked_for_are_given() -> None:
    (found,) = plan_chunks((make_site(),), Config(slots=6, seeds_per_layer=2), devices.CPU)
    assert (found.seeds, found.slots, found.note) == (2, 6, "")


def test_slots_that_no_seed_can_use_are_not_made_and_the_note_says_so() -> None:
    config = Config(slots=1000, seeds_per_layer=4)
    (found,) = plan_chunks((make_site(),), config, devices.CPU)
    assert (found.seeds, found.slots) == (4, 64)
    assert found.note == "1000 slots asked for, 64 are of use: 16 for each seed"
    assert plan_chunks((found,), config, devices.CPU) == (found,)


# -- the whole plan
# ---------------------------------------------------------------------------------------------


def test_the_plan_is_filled_in_and_plain(gpt2_sites: tuple[Site, ...]) -> None:
    planned = plan_chunks(gpt2_sites, Config(), devices.H200)
    for before, after in zip(gpt2_sites, planned, strict=True):
        assert after.seeds >= 1
        assert 1 <= after.slots <= after.seeds
        assert after.predicted["us"] == after.predicted["dormant_us"] > 0
        assert after.predicted["layer_us"] == after.predicted["host_us"]
        assert replace(after, seeds=0, slots=0, predicted={}, note="") == replace(before, note="")
    assert msgspec.json.decode(msgspec.json.encode(planned), type=tuple[Site, ...]) == planned


@pytest.mark.parametrize(
    "config", [Config(), Config(seeds_per_layer=64), Config(max_overhead=0.0001)], ids=str
)
def test_planning_twice_changes_nothing(config: Config, gpt2_sites: tuple[Site, ...]) -> None:
    sites = (*gpt2_sites, make_site("head", 10, note="a note of an earlier pass"))
    once = plan_chunks(sites, config, devices.CPU)
    assert plan_chunks(once, config, devices.CPU) == once
    assert once[-1].note.startswith("a note of an earlier pass")


def test_a_measured_cpu_plans_like_the_nominal_one(gpt2_sites: tuple[Site, ...]) -> None:
    other = replace(devices.CPU, bandwidth=1.0, fp32=1e18, op_us=9e9, measured=True)
    assert plan_chunks(gpt2_sites, Config(), other) == plan_chunks(gpt2_sites, Config(), devices.CPU)


def test_slots_of_gpt2_stay_within_two_percent(gpt2_sites: tuple[Site, ...]) -> None:
    host_bytes = 50_000_000
    config = Config(seeds_per_layer=1024)
    planned = plan_chunks(gpt2_sites, config, devices.CPU, host_bytes=host_bytes)
    spent = sum(
        site.slots * cost.slot_bytes(chunking.site_shape(site, config), ("bottleneck",)) for site in planned
    )
    assert 0.5 * 0.02 * host_bytes < spent <= 0.02 * host_bytes
    assert any(site.slots < chunking.wanted_slots(site.seeds) for site in planned)


def test_a_blueprint_that_can_not_stand_leaves_no_slots_and_says_why() -> None:
    (found,) = plan_chunks((make_site(),), Config(blueprint="depthwise"), devices.CPU)
    assert found.slots == 0
    assert found.note.startswith("no depthwise: the layer has no spatial axes")
    assert specs((found,), Config(blueprint="depthwise")) == ()


def test_widen_needs_a_block() -> None:
    config = Config(blueprint=("widen", "affine"))
    block = Block(inputs=("fc1",), output="fc2", activation="relu", kind="linear", hidden=512)
    bare, inside = plan_chunks((make_site(), make_site(block=block)), config, devices.CPU)
    assert "no widen: no block is known whose last layer it is" in bare.note
    assert "widen" not in inside.note
    assert [spec.blueprint for spec in specs((bare,), config, kinds=["forward"])] == ["affine"]


def test_convolutions_are_planned_on_their_channels() -> None:
    conv = make_site(
        "conv", 64, layer_kind="conv", feature_axis=-3, tap_features=3, rows=4096, host_flops_per_row=2 * 9408
    )
    (found,) = plan_chunks((conv,), Config(blueprint=("depthwise", "lowrank")), devices.CPU)
    assert found.slots >= 1
    assert chunking.layout_of(conv) == "channels_first"
    assert chunking.host_layer(conv).weights == 9408


def test_slots_of_a_convolution_are_counted_with_its_kernel() -> None:
    square = ConvGeometry(kernel=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1))
    site = make_site("conv", 64, layer_kind="conv", feature_axis=-3, tap_features=64, seeds=4)
    config = Config(blueprint="lowrank", rank=2)
    shape = chunking.site_shape(site, config, conv=square)
    assert cost.slot_bytes(shape, ("lowrank",)) == 4 * (2 * 64 * 9 + 2 * 16)
    grouped = cost.HostLayer(
        kind="conv", features=64, in_features=64, weights=576, conv=replace(square, groups=64)
    )
    (found,) = plan_chunks((site,), config, devices.CPU, hosts={"conv": grouped})
    assert found.slots == 0
    assert "no lowrank: the layer is a convolution in 64 groups" in found.note
    assert specs((found,), config, hosts={"conv": grouped}) == ()


def test_a_closer_known_host_layer_is_used(site: MakeSite) -> None:
    wide = cost.HostLayer(kind="linear", features=256, in_features=256, weights=256**2 * 100)
    plain, known = (
        plan_chunks((site(),), Config(), devices.CPU, hosts=h)[0] for h in ({}, {"encoder.fc1": wide})
    )
    assert known.predicted["layer_us"] > 50 * plain.predicted["layer_us"]


def test_twelve_equal_blocks_share_a_handful_of_kernels(gpt2_sites: tuple[Site, ...]) -> None:
    planned = plan_chunks(gpt2_sites, Config(), devices.H200)
    found = specs(planned, Config(), kinds=["forward"])
    assert sorted(spec.features for spec in found) == [768, 2304, 3072, 50257]
    assert len(specs(planned, Config())) == 3 * len(found)
    assert len({spec.digest for spec in found}) == len(found)


def test_planning_a_hundred_layers_is_quick(gpt2_sites: tuple[Site, ...]) -> None:
    import time

    start = time.perf_counter()
    plan_chunks(gpt2_sites * 3, Config(), devices.A100)
    assert time.perf_counter() - start < 0.5
