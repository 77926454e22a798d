"""Telemetry against a float64 reference, and when it is taken."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from runtime_helpers import feed, health64, on_layer, seeds_of
from torch import nn
from torch.utils.checkpoint import checkpoint

from morphc.kernels.reference.telemetry import as_rows, measure
from morphc.runtime.state import ROWS


def close(found, want, name, rtol=1e-6):
    torch.testing.assert_close(
        found[name], want[name], rtol=rtol, atol=1e-12, equal_nan=True, msg=lambda m: f"{name}: {m}"
    )


@given(
    st.integers(1, 40).flatmap(lambda f: st.tuples(st.just(f), st.integers(1, f))),
    st.integers(1, 5),
    st.sampled_from(["last", "channels", "channels_last"]),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    st.booleans(),
)
def test_health_equals_a_float64_reference(split, rows, layout, dtype, zeros):
    features, seeds = split
    axis = -1 if layout == "last" else 1
    host, _ = on_layer(nn.Identity(), features, seeds, axis)
    shape = (rows, 3, features) if layout == "last" else (rows, features, 2, 3)
    seen = []
    for _ in range(3):
        x = (torch.randn(shape) + 2).to(dtype)
        if zeros:
            x[torch.rand(shape) < 0.3] = 0
        if layout == "channels_last":
            x = x.contiguous(memory_format=torch.channels_last)
        assert host(x) is x
        seen.append(as_rows(x, axis))
    found, want = seeds_of(host).telemetry(), health64(torch.cat(seen), seeds)
    for name in ("count", "mean", "dead_fraction", "peak"):
        close(found, want, name)
    close(found, want, "variance", 1e-5 if features == seeds else 2e-6)
    mask = want["variance"] > 1e-4
    torch.testing.assert_close(
        found["correlation"][mask], want["correlation"][mask], rtol=1e-4, atol=1e-5, equal_nan=True
    )


@pytest.mark.parametrize("seeds", [1, 5, 16, 33, 64])
def test_mean_1000_and_std_a_hundredth_keep_their_variance(seeds):
    host, _ = on_layer(nn.Identity(), 64, seeds)
    batches = [1000 + 0.01 * torch.randn(200, 64) for _ in range(4)]
    for batch in batches:
        host(batch)
    found, want = seeds_of(host).telemetry(), health64(torch.cat(batches), seeds)
    close(found, want, "mean")
    close(found, want, "variance")
    assert (found["variance"] - 1e-4).abs().max() < 2e-5


@pytest.mark.parametrize("seeds", [2, 7, 20])
def test_the_host_form_and_the_general_form_agree(seeds):
    x = torch.randn(300, 20) * 3 + 1
    host, store = on_layer(nn.Identity(), 20, seeds)
    host(x)
    sums = measure(x, seeds)
    mean = sums.shift + sums.total / sums.finite
    torch.testing.assert_close(seeds_of(host).telemetry()["mean"], mean, rtol=1e-6, atol=1e-7)
    assert store.state.counts[ROWS].tolist() == [300] * seeds


def test_non_finite_values_are_counted_and_left_out():
    x = torch.randn(50, 12)
    x[3, 1], x[7, 5], x[9, 5] = torch.nan, torch.inf, -torch.inf
    host, _ = on_layer(nn.Identity(), 12, 4)
    host(x)
    host(torch.randn(5, 12))
    found = seeds_of(host).telemetry()
    assert found["nonfinite"].tolist() == [1, 2, 0, 0]
    assert found["mean"].isfinite().all()
    assert found["variance"].isfinite().all()
    assert found["peak"].isfinite().all()
    assert found["count"].tolist() == [55 * 3] * 4


def test_a_chunk_that_was_all_nan_first_recovers():
    host, _ = on_layer(nn.Identity(), 4, 2)
    x = torch.ones(6, 4)
    x[:, 2:] = torch.nan
    host(x)
    batch = 1000 + 0.01 * torch.randn(500, 4)
    host(batch)
    found = seeds_of(host).telemetry()
    assert found["nonfinite"].tolist() == [0, 12]
    want = batch[:, 2:].double()
    torch.testing.assert_close(found["variance"][1], want.var(unbiased=False), rtol=1e-6, atol=0)


def test_dead_is_counted_behind_the_epilogue():
    for epilogue, function in (
        ("relu", torch.relu),
        ("gelu", nn.functional.gelu),
        ("hardswish", nn.functional.hardswish),
    ):
        host, store = on_layer(nn.Identity(), 12, 5)
        store.sites["0"].epilogue = epilogue
        x = torch.randn(80, 12) * 4
        x[:, 3] = 0
        host(x)
        want = torch.stack([(c == 0).double().mean() for c in function(x).tensor_split(5, 1)])
        torch.testing.assert_close(seeds_of(host).telemetry()["dead_fraction"], want, rtol=0, atol=2 / 160)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_dead_is_what_is_stored_as_zero(dtype):
    """silu(-21) is too small for float16, and not for bfloat16; values that are not finite change nothing."""
    for spoilt in (0.0, torch.nan):
        host, store = on_layer(nn.Identity(), 8, 2)
        store.sites["0"].epilogue = "silu"
        x = torch.full((10, 8), -21.0, dtype=dtype)
        x[:, 4:] = 1.0
        x[:, 7] = spoilt
        host(x)
        want = [float((nn.functional.silu(x[:, :4]) == 0).all()), 0.0 if spoilt else 0.25]
        assert seeds_of(host).telemetry()["dead_fraction"].tolist() == want


def test_near_zero_sets_another_threshold():
    host, _ = on_layer(nn.Identity(), 8, 2, near_zero=0.5)
    x = torch.randn(40, 8)
    host(x)
    want = torch.stack([(c.abs() <= 0.5).double().mean() for c in x.tensor_split(2, 1)])
    torch.testing.assert_close(seeds_of(host).telemetry()["dead_fraction"], want)


@pytest.mark.parametrize("layout", ["last", "wider", "channels", "channels_last", "channels_apart"])
@pytest.mark.parametrize("every", [1, 4])
def test_of_a_large_activation_every_nth_row_or_sample_is_measured(layout, every):
    axis = -1 if layout in ("last", "wider") else 1
    host, store = on_layer(nn.Identity(), 10, 3, axis, telemetry_every=every, telemetry_values=300)
    seen = []
    for batch in (9, 9, 9, 2, 9):
        x = torch.randn((batch, 13, 10) if axis == -1 else (batch, 10, 13, 1)) + 1
        if layout == "wider":
            x = torch.randn(batch, 13, 17)[..., :10]
        if layout == "channels_last":
            x = x.contiguous(memory_format=torch.channels_last)
        if layout == "channels_apart":
            x = torch.randn(batch, 20, 13, 1)[:, ::2]
        for _ in range(every):
            host(x)
        by = -(-x.numel() // 300) | 1 if x.numel() > 300 else 1
        seen.append(as_rows(x[::by], 1) if layout == "channels" else as_rows(x, axis)[::by])
    found, want = seeds_of(host).telemetry(), health64(torch.cat(seen), 3)
    for name in ("count", "mean", "dead_fraction", "peak", "variance"):
        close(found, want, name)
    assert store.state.counts[ROWS].tolist() == [sum(map(len, seen))] * 3


@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("forwards", [1, 2, 17, 18, 40])
def test_small_activations_that_are_put_aside_are_all_measured_with_their_own_values(every, forwards):
    host, store = on_layer(nn.Identity(), 24, 5, telemetry_every=every)
    seen = []
    for step in range(forwards):
        x = torch.randn(12, 24) * (1 + step) + 3
        if step % every == 0:
            seen.append(x.clone())
        host(x).zero_()  # what is done to the activation behind the site is not seen
    found, want = seeds_of(host).telemetry(), health64(torch.cat(seen), 5)
    for name in ("count", "mean", "dead_fraction", "peak", "variance"):
        close(found, want, name)
    assert store.state.counts[ROWS].tolist() == [12 * len(seen)] * 5


def test_a_change_of_shape_or_a_value_that_is_not_finite_loses_nothing_put_aside():
    host, store = on_layer(nn.Identity(), 8, 2, telemetry_every=1)
    for rows in (4, 4, 4, 6, 6, 4):
        host(torch.randn(rows, 8))
    x = torch.randn(4, 8)
    x[1, 2] = torch.inf
    host(x)
    found = seeds_of(host).telemetry()
    assert store.state.counts[ROWS].tolist() == [32, 32]
    assert found["nonfinite"].tolist() == [1, 0]


def test_what_was_put_aside_is_saved_but_not_added_to_what_is_loaded():
    host, store = on_layer(nn.Identity(), 8, 2, telemetry_every=1)
    for _ in range(3):
        host(torch.randn(4, 8))
    saved = {name: value.clone() for name, value in store.state.state_dict().items()}
    assert saved["counts"][ROWS].tolist() == [12, 12]
    for _ in range(5):
        host(torch.randn(4, 8))
    store.state.load_state_dict(saved)
    found = seeds_of(host).telemetry()
    assert store.state.counts[ROWS].tolist() == [12, 12]
    assert found["count"].tolist() == [48, 48]


def test_every_sixteenth_training_forward_is_measured_and_eval_adds_nothing():
    host, store = on_layer(nn.Identity(), 8, 2, telemetry_every=16)
    for _ in range(33):
        host(torch.randn(4, 8))
    assert store.state.counts[ROWS].tolist() == [12, 12]
    host.eval()
    for _ in range(16):
        host(torch.randn(4, 8))
    assert store.state.counts[ROWS].tolist() == [12, 12]


def test_reading_does_not_reset_and_a_new_window_does():
    host, _ = on_layer(nn.Identity(), 8, 2)
    host(torch.randn(4, 8))
    seeds = seeds_of(host)
    first = seeds.telemetry()
    assert torch.equal(first["mean"], seeds.telemetry()["mean"])
    seeds.reset_telemetry()
    assert seeds.telemetry()["count"].tolist() == [0, 0]
    host(torch.full((4, 8), 3.0))
    assert seeds.telemetry()["mean"].tolist() == [3, 3]


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_in_a_checkpoint_is_not_counted(reentrant):
    host = feed()
    x = torch.randn(4, 6, requires_grad=True)
    checkpoint(host, x, use_reentrant=reentrant).sum().backward()
    assert seeds_of(host).telemetry()["count"].tolist() == [12, 8, 8]


def test_telemetry_off_touches_nothing():
    host, store = on_layer(nn.Identity(), 8, 2, telemetry_every=0)
    host(torch.randn(4, 8))
    assert not store.state.sums.any()
    assert not store.state.counts.any()


def test_gradient_telemetry_gives_norm_and_saliency():
    host, _ = on_layer(nn.Linear(5, 8), 8, 3, gradient_telemetry=True)
    x, g = torch.randn(6, 5), torch.randn(6, 8)
    y = host(x)
    y.backward(g)
    found = seeds_of(host).telemetry()
    norm = torch.stack([c.double().norm() for c in g.tensor_split(3, 1)])
    saliency = torch.stack([c.double().abs().sum() for c in (y.detach() * g).tensor_split(3, 1)])
    torch.testing.assert_close(found["gradient_norm"], norm, rtol=1e-6, atol=0)
    torch.testing.assert_close(found["saliency"], saliency, rtol=1e-6, atol=0)


def test_zero_rows_and_a_bare_vector_are_ordinary_inputs():
    host, store = on_layer(nn.Linear(5, 8), 8, 3)
    assert host(torch.randn(0, 5)).shape == (0, 8)
    assert host(torch.randn(5)).shape == (8,)
    assert store.state.counts[ROWS].tolist() == [1, 1, 1]


def test_two_runs_agree_bit_for_bit():
    def run():
        host, store = on_layer(nn.Identity(), 103, 10)
        generator = torch.Generator().manual_seed(3)
        for _ in range(5):
            host(torch.randn(700, 103, generator=generator))
        store.state.settle()
        return store.state.sums.clone()

    assert torch.equal(run(), run())


def test_telemetry_under_vmap_and_fake_tensors_is_left_out():
    from torch._subclasses.fake_tensor import FakeTensorMode

    host, store = on_layer(nn.Identity(), 8, 2)
    torch.func.vmap(host)(torch.randn(3, 4, 8))
    with FakeTensorMode():
        host(torch.empty(4, 8))
    assert not store.state.counts.any()
