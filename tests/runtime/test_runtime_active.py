"""Sites whose seeds blend or train: values, gradients, isolation."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from runtime_helpers import ALL_BLUEPRINTS, conv_feed, feed, on_layer, randomize, same_bits, seeds_of
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from morphc.config import BLENDS
from morphc.lifecycle import TABLE, Lifecycle
from morphc.runtime import compact
from morphc.runtime.store import store_of

L = Lifecycle
BLENDING = [state for state, row in TABLE.items() if row.forward == "blend"]
IDENTITY = [state for state, row in TABLE.items() if row.forward == "identity"]
LINEAR = [name for name in ALL_BLUEPRINTS if name != "depthwise"]


def host_and_input(blueprint, blend, dtype=torch.float64):
    make = conv_feed if blueprint == "depthwise" else feed
    host = make(dtype=dtype, blueprint=blueprint, blend=blend, telemetry_every=0)
    path = next(iter(store_of(host).sites))
    x = torch.randn(2, 3, 4, 4) if blueprint == "depthwise" else torch.randn(3, 6)
    return host, path, x.to(dtype)


@pytest.mark.parametrize("blend", BLENDS)
@pytest.mark.parametrize("blueprint", ALL_BLUEPRINTS)
def test_gradients_of_input_and_slot_pass_gradcheck(blueprint, blend):
    host, path, x = host_and_input(blueprint, blend)
    handle = seeds_of(host)[path]
    handle.assign([0, 1], L.GRAFTING, alpha=0.7)
    bank = handle.slots[blueprint]
    randomize(bank)
    x.requires_grad_()
    names = list(bank.names)
    prefix = next(name for name, module in host.named_modules() if module is bank)
    fresh = [bank.get_parameter(name).detach().clone().requires_grad_() for name in names]

    def run(x, *params):
        swapped = {f"{prefix}.{name}": value for name, value in zip(names, params, strict=True)}
        return torch.func.functional_call(host, swapped, (x,))

    assert gradcheck(run, (x, *fresh))
    if blend == "residual":
        assert gradgradcheck(run, (x, *fresh))


@pytest.mark.parametrize("blueprint", ["bottleneck", "lowrank", "widen"])
def test_conv_forms_pass_gradcheck(blueprint):
    host = conv_feed(dtype=torch.float64, blueprint=blueprint, telemetry_every=0)
    handle = seeds_of(host)["conv2"]
    handle.assign([0, 1], L.FINE_TUNING)
    randomize(handle.slots[blueprint])
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    assert gradcheck(host, (x,))
    assert host(x[0]).shape == (5, 4, 4)


@pytest.mark.parametrize("blueprint", LINEAR)
def test_torch_func_sees_through_an_active_site(blueprint):
    host, path, x = host_and_input(blueprint, "residual")
    handle = seeds_of(host)[path]
    handle.assign([0], L.FINE_TUNING)
    handle.assign([1], L.TRAINING)
    randomize(handle.slots[blueprint])
    want = torch.autograd.functional.jacobian(lambda v: host(v).sum(0), x)
    torch.testing.assert_close(torch.func.jacrev(lambda v: host(v).sum(0))(x), want)
    torch.testing.assert_close(torch.func.vmap(host)(x.unsqueeze(1)).squeeze(1), host(x))


@pytest.mark.parametrize("blend", BLENDS)
@pytest.mark.parametrize("blueprint", ALL_BLUEPRINTS)
def test_a_newborn_is_exactly_zero_and_so_the_identity(blueprint, blend):
    host, path, x = host_and_input(blueprint, blend, torch.float32)
    before = host(x)
    seeds_of(host)[path].assign([0, 1], L.GRAFTING, alpha=1.0)
    after = host(x)
    if blend == "lerp":
        return  # at full strength a lerp is the newborn itself
    assert torch.equal(after, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("blend", BLENDS)
def test_at_alpha_zero_every_bit_stays(dtype, blend):
    host, _ = on_layer(nn.Identity(), 10, 4, blend=blend, blueprint=("affine", "bottleneck"), slots=4)
    handle = seeds_of(host)["0"]
    handle.assign([0, 2], L.GRAFTING, alpha=0.0, blueprint="affine")
    handle.assign([1, 3], L.EVALUATING, alpha=0.0, blueprint="bottleneck")
    for bank in handle.slots.values():
        randomize(bank, 1e30)
    x = torch.randn(6, 10).to(dtype)
    x[0, 0], x[1, 1], x[2, 2], x[3, 3] = -0.0, torch.inf, torch.nan, -torch.inf
    assert same_bits(host(x), x)
    x.requires_grad_()
    g = torch.randn(6, 10).to(dtype)
    host(x).backward(g)
    assert torch.equal(x.grad, g)


@given(
    st.integers(2, 24).flatmap(lambda f: st.tuples(st.just(f), st.integers(2, f))),
    st.data(),
    st.sampled_from(["last", "channels", "channels_last", "vector"]),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    st.integers(0, 3),
)
def test_a_doubling_seed_doubles_exactly_its_chunk(split, data, layout, dtype, rows):
    features, seeds = split
    chosen = data.draw(st.lists(st.integers(0, seeds - 1), unique=True, min_size=1, max_size=seeds))
    axis = -1 if layout in ("last", "vector") else 1
    host, _ = on_layer(nn.Identity(), features, seeds, axis, slots=seeds)
    handle = seeds_of(host)["0"]
    handle.assign(chosen, L.FOSSILIZED)
    with torch.no_grad():
        handle.slots["affine"].scale.fill_(1.0)
    shape = {"last": (rows, 2, features), "vector": (features,)}.get(layout, (rows, features, 2, 3))
    x = torch.randn(shape).to(dtype)
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    y = host(x)
    assert y.dtype == dtype
    assert y.stride() == x.stride()
    for index, (a, b) in enumerate(
        zip(x.tensor_split(seeds, axis), y.tensor_split(seeds, axis), strict=True)
    ):
        assert same_bits(b, a * 2 if index in chosen else a)


@pytest.mark.parametrize("blueprint", ["affine", "bottleneck"])
def test_inf_and_nan_stay_in_their_chunk_in_values_and_gradients(blueprint):
    host, _ = on_layer(nn.Identity(), 11, 4, blueprint=blueprint, slots=3)
    handle = seeds_of(host)["0"]
    handle.assign([0, 2], L.FINE_TUNING)
    randomize(handle.slots[blueprint])
    clean = torch.randn(5, 11)
    dirty = clean.clone()
    dirty[:, 0], dirty[1, 1] = torch.nan, torch.inf
    results = []
    for x in (clean, dirty):
        x.requires_grad_()
        handle.slots[blueprint].zero_grads()
        y = host(x)
        y[:, 3:].sum().backward()
        slot_grads = [g.detach().clone()[1] for g in handle.slots[blueprint].grads().values()]
        results.append((y.detach()[:, 3:], x.grad[:, 3:], *slot_grads))
    for a, b in zip(*results, strict=True):
        assert same_bits(a, b)


def test_a_poisoned_slot_poisons_nothing_else():
    host, _ = on_layer(nn.Linear(5, 9), 9, 3, slots=3, blueprint="bottleneck")
    handle = seeds_of(host)["0"]
    handle.assign([0, 1], L.FINE_TUNING)
    handle.assign(2, L.GRAFTING, alpha=0.0)
    bank = handle.slots["bottleneck"]
    randomize(bank)
    x = torch.randn(4, 5)

    def run():
        host.zero_grad()
        bank.zero_grads()
        y = host(x)
        y.square().sum().backward()
        return y.detach(), host[0].weight.grad.clone(), bank.grads()["in_weight"][:2].clone()

    want = run()
    with torch.no_grad():
        for name in bank.names:
            bank.get_parameter(name)[2] = torch.nan
    for a, b in zip(want, run(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("state", IDENTITY)
def test_identity_states_return_the_value_untouched(state):
    host, path, x = host_and_input("bottleneck", "residual", torch.float32)
    plain = host(x)
    handle = seeds_of(host)[path]
    handle.assign([0, 1], state)
    for bank in handle.slots.values():
        randomize(bank)
    assert same_bits(host(x), plain)
    assert handle.lifecycle.tolist() == [state, state, 0]
    assert (handle.slots["bottleneck"].owner >= 0).sum() == (2 if TABLE[state].holds_slot else 0)


@pytest.mark.parametrize("state", BLENDING)
def test_blending_states_blend(state):
    host, path, x = host_and_input("bottleneck", "residual", torch.float32)
    plain = host(x)
    handle = seeds_of(host)[path]
    handle.assign([1], state, alpha=0.5)
    randomize(handle.slots["bottleneck"])
    after = host(x)
    assert not torch.equal(after[:, 3:5], plain[:, 3:5])
    assert same_bits(after[:, :3], plain[:, :3])
    assert same_bits(after[:, 5:], plain[:, 5:])


@pytest.mark.parametrize("state", list(L))
def test_only_states_that_train_get_slot_gradients(state):
    host, path, x = host_and_input("bottleneck", "residual", torch.float32)
    handle = seeds_of(host)[path]
    handle.assign([0], L.FINE_TUNING)
    handle.assign([1], state, alpha=0.5)
    bank = handle.slots["bottleneck"]
    randomize(bank)
    before = [bank.get_parameter(name).clone() for name in bank.names]
    host(x).square().sum().backward()
    trains = TABLE[state].trains != "nothing"
    grad = bank.grads()["out_weight"]
    assert grad[0].any()
    assert bool(grad[1].any()) is trains
    seeds_of(host).step_optimizer(lr=0.1)
    for name, old in zip(bank.names, before, strict=True):
        assert torch.equal(bank.get_parameter(name)[1], old[1]) is not trains
        assert torch.equal(bank.get_parameter(name)[2], old[2])


@pytest.mark.parametrize("blueprint", LINEAR)
def test_training_seeds_leave_host_outputs_and_gradients_bitwise(blueprint):
    def run(state):
        host, path, x = host_and_input(blueprint, "residual", torch.float32)
        if state is not None:
            handle = seeds_of(host)[path]
            handle.assign([0, 1, 2], state)
            randomize(handle.slots[blueprint])
        x.requires_grad_()
        y = host(x)
        y.square().sum().backward()
        grads = [p.grad for p in host.parameters() if p.requires_grad]
        own = None if state is None else seeds_of(host)[path].slots[blueprint].grads()
        return [y.detach(), x.grad, *grads], own

    want, _ = run(None)
    found, own = run(L.TRAINING)
    for a, b in zip(want, found, strict=True):
        assert same_bits(a, b)
    assert all(bool(grad.any()) for name, grad in own.items() if not name.startswith("gate_b"))


def test_straight_through_gives_the_slot_the_tasks_gradient():
    host, path, x = host_and_input("affine", "residual", torch.float64)
    handle = seeds_of(host)[path]
    handle.assign([0], L.TRAINING)
    y = host(x)
    y.square().sum().backward()
    g = (2 * y.detach())[:, :3]
    bank = handle.slots["affine"]
    torch.testing.assert_close(bank.grads()["shift"][0], g.sum(0))
    torch.testing.assert_close(bank.grads()["scale"][0], (g * y.detach()[:, :3]).sum(0))


def test_a_frozen_host_still_trains_its_seeds_also_before_an_inplace_relu():
    layer = nn.Linear(5, 8)
    host, _ = on_layer(layer, 8, 4, blueprint="bottleneck", slots=4)
    host.append(nn.ReLU(inplace=True))
    host.requires_grad_(False)
    handle = seeds_of(host)["0"]
    for state in (L.TRAINING, L.FINE_TUNING):
        handle.assign([0, 3], state)
        randomize(handle.slots["bottleneck"])
        host(torch.randn(16, 5)).square().sum().backward()
        assert handle.slots["bottleneck"].grads()["out_weight"].any()
        handle.slots["bottleneck"].zero_grads()


def test_mixed_seeds_and_an_inplace_relu_train_together():
    host, _ = on_layer(nn.Linear(5, 8), 8, 4, blueprint=("bottleneck", "affine"), slots=4)
    host.append(nn.ReLU(inplace=True))
    handle = seeds_of(host)["0"]
    handle.assign([0], L.TRAINING, blueprint="bottleneck")
    handle.assign([1], L.FINE_TUNING, blueprint="affine")
    for bank in handle.slots.values():
        randomize(bank)
    host(torch.randn(16, 5)).square().sum().backward()
    assert handle.slots["bottleneck"].grads()["out_weight"].any()
    assert handle.slots["affine"].grads()["scale"].any()
    assert host[0].weight.grad.any()


class NoSync(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ not in (
            "_local_scalar_dense",
            "nonzero",
            "item",
            "equal",
            "is_nonzero",
        )
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("blueprint", ALL_BLUEPRINTS)
def test_no_step_reads_the_device(blueprint, monkeypatch):
    # In host memory states are read when they have changed: here as on other devices.
    monkeypatch.setattr(compact, "in_host_memory", lambda *_: False)
    host, path, x = host_and_input(blueprint, "residual", torch.float32)
    handle = seeds_of(host)[path]
    store_of(host).sites[path].pulse.every = 1
    with NoSync():
        host(x).sum().backward()
    handle.assign([0], L.TRAINING)
    handle.assign([1], L.FINE_TUNING)
    with NoSync():
        host(x).sum().backward()
        seeds_of(host).step_optimizer(lr=0.1)


def test_the_launch_count_does_not_grow_with_the_seeds():
    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            Count.calls += 1
            return func(*args, **(kwargs or {}))

    counts = []
    for seeds in (4, 64):
        host, _ = on_layer(nn.Linear(8, 128), 128, seeds, slots=seeds, blueprint="bottleneck")
        handle = seeds_of(host)["0"]
        handle.assign(list(range(seeds)), L.FINE_TUNING)
        host.eval()
        Count.calls = 0
        with Count():
            host(torch.randn(4, 8))
        counts.append(Count.calls)
    assert counts[0] == counts[1]


def test_row_wise_adamw_is_adamw_for_the_rows_that_train():
    host, path, x = host_and_input("bottleneck", "residual", torch.float64)
    handle = seeds_of(host)[path]
    handle.assign([0, 1], L.FINE_TUNING)
    bank = handle.slots["bottleneck"]
    randomize(bank)
    twins = {name: nn.Parameter(bank.get_parameter(name)[:2].detach().clone()) for name in bank.names}
    optimizer = torch.optim.AdamW(twins.values(), lr=0.05, weight_decay=0.1)
    for _ in range(5):
        host(x).square().sum().backward()
        for name, twin in twins.items():
            twin.grad = bank.grads()[name][:2].clone()
        seeds_of(host).step_optimizer(lr=0.05, weight_decay=0.1)
        optimizer.step()
    for name, twin in twins.items():
        torch.testing.assert_close(
            bank.get_parameter(name)[:2].detach(), twin.detach(), rtol=1e-12, atol=1e-12
        )
    assert bank.opt.step.tolist() == [5, 5, 0]


def test_half_precision_hosts_keep_float32_slots_also_under_autocast():
    for dtype in (torch.bfloat16, torch.float16):
        host, _ = on_layer(nn.Linear(5, 8).to(dtype), 8, 4, blueprint="bottleneck", slots=4)
        handle = seeds_of(host)["0"]
        handle.assign([0], L.FINE_TUNING)
        bank = handle.slots["bottleneck"]
        randomize(bank)
        assert bank.in_weight.dtype == torch.float32
        assert host(torch.randn(3, 5).to(dtype)).dtype == dtype
    host, _ = on_layer(nn.Linear(5, 8), 8, 4, blueprint="bottleneck", slots=4)
    seeds_of(host)["0"].assign([0], L.FINE_TUNING)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert host(torch.randn(3, 5)).dtype == torch.bfloat16
