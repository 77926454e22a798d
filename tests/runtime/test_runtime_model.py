"""The site in its model: copies, checkpoints, casts, compilers, containers, torch's own fast paths."""

import copy
import inspect
import pickle

import pytest
import torch
import torch._dynamo.testing
from runtime_helpers import feed, on_layer, randomize, same_bits, seeds_of
from torch import nn

from morphc.config import Config
from morphc.errors import AlreadyMorphedError, ConfigError, MorphcError, NotMorphedError, SeedError
from morphc.lifecycle import Lifecycle as L
from morphc.lifecycle import Mode
from morphc.runtime.attach import attach, detach_
from morphc.runtime.requests import SiteRequest
from morphc.runtime.store import root_of, store_of


def active_feed(**options):
    host = feed(**options)
    handle = seeds_of(host)["fc2"]
    handle.assign([0], L.FINE_TUNING)
    handle.assign([1], L.TRAINING)
    randomize(handle.slots["bottleneck"])
    return host


def test_dormant_returns_the_very_tensor():
    host, store = on_layer(nn.Identity(), 8, 4)
    x = torch.randn(3, 8)
    assert host(x) is x
    assert store.sites["0"](x) is x


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_a_copy_is_a_second_model(duplicate):
    host, x = active_feed(), torch.randn(4, 6)
    host(x).sum().backward()
    other = duplicate(host)
    want = host(x)
    assert same_bits(other(x), want)
    assert other.fc2.forward.layer is other.fc2
    assert root_of(other) is other
    assert store_of(other).sites["fc2"] is other.fc2.morphc
    mine, theirs = seeds_of(host), seeds_of(other)
    for name, grad in mine["fc2"].slots["bottleneck"].grads().items():
        assert torch.equal(grad, theirs["fc2"].slots["bottleneck"].grads()[name])
    other(x).sum().backward()
    theirs.step_optimizer(lr=1.0)
    theirs["fc2"].assign([2], L.FINE_TUNING)
    theirs.reset_telemetry()
    assert same_bits(host(x), want)
    assert mine.lifecycle.tolist() == [6, 2, 0]
    assert mine.telemetry()["count"].min() > 0
    assert not same_bits(other(x), want)
    assert theirs.telemetry()["count"].min() > 0


def test_state_dict_round_trip_is_strict_and_bitwise_also_in_training():
    host, x = active_feed(), torch.randn(4, 6)

    def step(model):
        loss = model(x).square().sum()
        loss.backward()
        seeds_of(model).step_optimizer(lr=0.1)
        return loss

    step(host)
    other = feed()
    other.load_state_dict(copy.deepcopy(host.state_dict()), strict=True)
    assert store_of(other).sites["fc2"].mode is Mode.ACTIVE
    for _ in range(3):
        assert same_bits(step(host), step(other))
    assert {key for key in host.state_dict() if key.startswith("morphc.seeds.")} >= {
        f"morphc.seeds.{name}" for name in ("lifecycle", "slot", "alpha", "score", "history")
    }


def test_load_state_dict_with_assign_rebinds_the_slots():
    host, x = active_feed(), torch.randn(4, 6)
    other = feed()
    other.load_state_dict(copy.deepcopy(host.state_dict()), assign=True)
    assert same_bits(other(x), host(x))
    other(x).sum().backward()
    seeds_of(other).step_optimizer(lr=0.5)
    assert not same_bits(other(x), host(x))


def test_host_checkpoints_load_without_strict():
    host = feed()
    plain = {key: value for key, value in host.state_dict().items() if "morphc" not in key}
    result = host.load_state_dict(plain, strict=False)
    assert not result.unexpected_keys
    assert all("morphc" in key for key in result.missing_keys)


@pytest.mark.parametrize("container", [nn.Sequential, type("Stack", (nn.Sequential,), {})])
def test_container_roots_keep_length_iteration_and_checkpoints(container):
    def make():
        torch.manual_seed(0)
        host = container(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
        requests = [
            SiteRequest(str(i), host[i], host[i].out_features, seeds=3, tap_features=5, slots=2)
            for i in (0, 2)
        ]
        attach(host, requests, Config(blueprint="affine", telemetry_every=1))
        return host

    host, x = make(), torch.randn(4, 5)
    assert len(host) == 3
    assert [name for name, _ in host.named_children()] == ["0", "1", "2"]
    seeds_of(host)["2"].assign([1], L.FOSSILIZED)
    randomize(seeds_of(host)["2"].slots["affine"])
    state = host.state_dict()
    assert "morphc.seeds.lifecycle" in state
    other = make()
    assert str(other.load_state_dict(state, strict=True)) == "<All keys matched successfully>"
    assert same_bits(other(x), host(x))
    outer = nn.ModuleDict({"inner": make()})
    assert outer.load_state_dict({f"inner.{key}": value for key, value in state.items()}, strict=True)
    with pytest.raises(RuntimeError, match=r"morphc\.seeds\.alpha"):
        make().load_state_dict(
            {key: value for key, value in state.items() if key != "morphc.seeds.alpha"}, strict=True
        )
    with pytest.raises(RuntimeError, match=r"morphc\.seeds\.extra"):
        make().load_state_dict({**state, "morphc.seeds.extra": torch.zeros(1)}, strict=True)
    host.to("meta")
    assert store_of(host).state.alpha.is_meta


def test_casts_keep_state_and_slot_types():
    host = active_feed()
    store = store_of(host)
    bank = seeds_of(host)["fc2"].slots["bottleneck"]
    for cast, slot_type, value_type in (
        (host.half, torch.float32, torch.float16),
        (host.bfloat16, torch.float32, torch.bfloat16),
        (host.double, torch.float64, torch.float64),
        (host.float, torch.float32, torch.float32),
    ):
        cast()
        assert store.state.alpha.dtype == torch.float32
        assert store.state.score.dtype == torch.float32
        assert store.state.lifecycle.dtype == torch.int32
        assert bank.in_weight.dtype == slot_type
        assert host(torch.randn(4, 6).to(value_type)).dtype == value_type
    host(torch.randn(4, 6)).sum().backward()
    seeds_of(host).step_optimizer(lr=0.1)


@pytest.mark.parametrize("training", [True, False])
def test_a_dormant_model_compiles_as_one_graph_and_telemetry_does_not_recompile(training):
    host, x = feed().train(training), torch.randn(4, 6)
    want = host(x)
    before = store_of(host).state.counts.clone()
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(host, fullgraph=True, backend=counter)
    for _ in range(5):
        y = compiled(x)
        y.sum().backward()
    assert torch.equal(y, want)
    assert counter.frame_count == 1
    store_of(host).state.settle()
    grown = (store_of(host).state.counts - before)[0].tolist()
    assert grown == ([20, 20, 20] if training else [0, 0, 0])


def test_an_active_model_compiles_as_one_graph_and_alpha_does_not_recompile():
    host, x = active_feed(), torch.randn(4, 6)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(host, fullgraph=True, backend=counter)
    handle = seeds_of(host)["fc2"]
    bank = handle.slots["bottleneck"]
    for alpha in (0.2, 0.0, 0.9):
        handle.alpha[0] = alpha
        torch.testing.assert_close(compiled(x), host(x))
        compiled(x).square().sum().backward()
        found = {name: grad.clone() for name, grad in bank.grads().items()}
        bank.zero_grads()
        host(x).square().sum().backward()
        for name, grad in bank.grads().items():
            torch.testing.assert_close(found[name], grad)
        bank.zero_grads()
    assert counter.frame_count == 1


@pytest.mark.parametrize("strict", [True, False])
def test_a_dormant_model_exports(strict):
    host, x = feed().eval(), torch.randn(4, 6)
    program = torch.export.export(host, (x,), strict=strict)
    assert torch.equal(program.module()(x), host(x))


def test_the_wrapped_forward_keeps_its_signature():
    host = feed()
    assert list(inspect.signature(host.fc2.forward).parameters) == ["input"]
    assert inspect.unwrap(host.fc2.forward).__func__ is nn.Linear.forward
    assert host.fc2(input=torch.randn(2, 8)).shape == (2, 7)


def test_detach_leaves_nothing_behind():
    torch.manual_seed(0)
    for make in (feed, lambda: on_layer(nn.Linear(5, 8), 8, 4)[0]):
        host = make()
        path = next(iter(store_of(host).sites))
        seeds_of(host)[path].assign([0], L.FINE_TUNING)
        detach_(host)
        for module in host.modules():
            assert "forward" not in module.__dict__
            assert "morphc" not in module._modules
            assert "morphc" not in module.__dict__
            assert not module._state_dict_hooks
            assert not module._load_state_dict_pre_hooks
        assert not [key for key in host.state_dict() if "morphc" in key]
        with pytest.raises(NotMorphedError):
            store_of(host)


def test_an_instance_forward_of_the_users_is_wrapped_and_given_back():
    layer = nn.Linear(4, 6)
    mine = lambda x: nn.functional.linear(x, layer.weight) * 2  # noqa: E731
    layer.forward = mine
    host, _ = on_layer(layer, 6, 2)
    x = torch.randn(3, 4)
    assert torch.equal(host(x), mine(x))
    detach_(host)
    assert layer.forward is mine


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_outputs_keep_their_containers(kind):
    layer = kind(4, 6, batch_first=True)
    host = nn.ModuleDict({"rnn": layer})
    attach(host, [SiteRequest("rnn", layer, 6, seeds=3, output_index=0, slots=3)], Config(blueprint="affine"))
    x = torch.randn(2, 5, 4)
    want, state = layer(x)
    handle = seeds_of(host)["rnn"]
    handle.assign([1], L.FOSSILIZED)
    with torch.no_grad():
        handle.slots["affine"].scale.fill_(1)
    found, other = layer(x)
    assert torch.equal(found[..., 2:4], want[..., 2:4] * 2)
    assert type(other) is type(state)
    packed = nn.utils.rnn.pack_padded_sequence(x, [5, 3], batch_first=True, enforce_sorted=False)
    out, _ = layer(packed)
    assert isinstance(out, nn.utils.rnn.PackedSequence)
    unpacked, _ = nn.utils.rnn.pad_packed_sequence(out, batch_first=True)
    torch.testing.assert_close(unpacked[0], found[0])


def test_the_encoder_layers_fast_path_stays_while_dormant_and_goes_while_not():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    host = nn.TransformerEncoder(layer, 2).eval()
    first = host.layers[0].linear1
    attach(host, [SiteRequest("layers.0.linear1", first, 16, seeds=4, slots=4)], Config(blueprint="affine"))
    x, mask = torch.randn(2, 5, 8), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    calls = []
    torch_fast = torch._transformer_encoder_layer_fwd

    def spy(*args):
        calls.append(1)
        return torch_fast(*args)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(torch, "_transformer_encoder_layer_fwd", spy)
        plain = host(x, src_key_padding_mask=mask)
        assert len(calls) == 2
        handle = seeds_of(host)["layers.0.linear1"]
        handle.assign([1], L.FOSSILIZED)
        calls.clear()
        slow = host(x, src_key_padding_mask=mask)
        assert len(calls) == 1
        torch.testing.assert_close(slow[:, :3], plain[:, :3], rtol=1e-4, atol=1e-5)
        handle.slots["affine"].scale.fill_(1)
        assert not torch.allclose(host(x, src_key_padding_mask=mask)[:, :3], plain[:, :3])
        handle.assign([1], L.CULLED)
        calls.clear()
        assert same_bits(host(x, src_key_padding_mask=mask), plain)
        assert len(calls) == 2


def test_multihead_attention_keeps_its_fast_path_in_every_mode():
    attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    host = nn.ModuleDict({"attn": attention})
    attach(
        host,
        [SiteRequest("attn", attention, 8, seeds=4, slots=4, output_index=0)],
        Config(blueprint="affine"),
    )
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        plain, weights = attention(x, x, x)
        handle = seeds_of(host)["attn"]
        handle.assign([0], L.FOSSILIZED)
        handle.slots["affine"].scale.fill_(1)
        found, other = attention(x, x, x)
    assert torch.equal(found[..., :2], plain[..., :2] * 2)
    assert torch.equal(found[..., 2:], plain[..., 2:])
    assert torch.equal(weights, other)


def test_the_root_itself_can_be_a_site():
    layer = nn.Linear(5, 8)
    attach(
        layer, [SiteRequest("", layer, 8, seeds=4, slots=2)], Config(blueprint="affine", telemetry_every=1)
    )
    keys = set(layer.state_dict())
    assert {"morphc.seeds.lifecycle", "morphc.slots.affine.scale"} <= keys
    layer(torch.randn(3, 5))
    assert seeds_of(layer).telemetry()["count"].tolist() == [6] * 4
    seeds_of(layer)[""].assign([0, 1], L.TRAINING)
    other = copy.deepcopy(layer)
    other.load_state_dict(layer.state_dict())
    assert seeds_of(other)[""].lifecycle.tolist() == [2, 2, 0, 0]


def test_slots_are_taken_and_given_back_and_refusals_change_nothing():
    host = feed(seeds=3, slots=2, blueprint=("bottleneck", "affine"))
    handle = seeds_of(host)["fc2"]
    handle.assign([0, 1], L.TRAINING)
    with pytest.raises(SeedError, match="no free slot"):
        handle.assign([2], L.TRAINING)
    assert handle.lifecycle.tolist() == [2, 2, 0]
    handle.assign([2], L.TRAINING, blueprint="affine")
    state = store_of(host).state
    assert sorted(state.slot.tolist()) == [0, 1, 2]
    handle.assign([0], L.GRAFTING)
    assert state.slot.tolist()[0] == 0
    handle.assign([0, 2], L.CULLED)
    assert state.slot.tolist() == [-1, 1, -1]
    assert handle.slots["bottleneck"].owner.tolist() == [-1, 1]
    assert handle.slots["affine"].owner.tolist() == [-1, -1]
    assert not any(
        handle.slots["bottleneck"].get_parameter(n)[0].any() for n in handle.slots["bottleneck"].names
    )
    handle.assign([0, 1], L.DORMANT)
    assert store_of(host).sites["fc2"].mode is Mode.DORMANT


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda h: h.assign(3, L.TRAINING), "seed 3 of 'fc2'"),
        (lambda h: h.assign(-1, L.TRAINING), "seed -1"),
        (lambda h: h.assign([0, 0], L.TRAINING), "twice"),
        (lambda h: h.assign("0", L.TRAINING), "no integer"),
        (lambda h: h.assign(0, 11), "no lifecycle state"),
        (lambda h: h.assign(0, L.TRAINING, blueprint="bottlenek"), "has no bank at 'fc2'"),
        (lambda h: h.assign(0, L.GRAFTING, alpha=2.0), "between 0 and 1"),
        (lambda h: h.assign(0, L.TRAINING, blueprint="depthwise"), "no spatial axes"),
    ],
)
def test_bad_commands_are_refused(call, message):
    host = feed(blueprint=("bottleneck", "depthwise"))
    with pytest.raises(SeedError, match=message):
        call(seeds_of(host)["fc2"])
    assert not store_of(host).state.lifecycle.any()


def test_unknown_sites_and_double_attachment_are_refused():
    host = feed()
    with pytest.raises(SeedError, match="Did you mean 'fc2'"):
        seeds_of(host)["fc3"]
    with pytest.raises(AlreadyMorphedError):
        attach(host, [], Config())
    with pytest.raises(ConfigError, match="seeds=9"):
        attach(nn.Linear(2, 3), [SiteRequest("", nn.Linear(2, 3), 3, seeds=9)], Config())


def test_the_handle_of_a_site_tells_what_its_seeds_are():
    host = feed()
    seeds = seeds_of(host)
    host.train()(torch.randn(5, 6))
    handle = seeds["fc2"]
    assert (handle.path, handle.features, len(handle), handle.mode) == ("fc2", 7, 3, Mode.DORMANT)
    assert handle.chunks == [(0, 3), (3, 5), (5, 7)]
    everything = seeds.telemetry()
    for name, values in handle.telemetry().items():
        torch.testing.assert_close(values, everything[name][handle.rows], equal_nan=True)
    assert handle.telemetry()["count"].tolist() == [15.0, 10.0, 10.0]
    handle.assign([1], L.FINE_TUNING)
    assert handle.mode is Mode.ACTIVE
    assert handle.history(1) == seeds.history("fc2", 1) == [(0, L.DORMANT, L.FINE_TUNING)]
    assert handle.history(0) == []


def test_history_remembers_the_last_ten():
    host = feed()
    handle = seeds_of(host)["fc2"]
    for number in range(7):
        handle.assign(1, L.TRAINING)
        handle.assign(1, L.CULLED)
        assert len(seeds_of(host).history("fc2", 1)) == min(10, 2 * number + 2)
    last = seeds_of(host).history("fc2", 1)
    assert [entry.target for entry in last] == [L.TRAINING, L.CULLED] * 5
    assert last[0].source is L.CULLED
    assert seeds_of(host).history("fc2", 0) == []


def test_pandas_is_optional_and_said():
    host = feed()
    try:
        import pandas  # noqa: F401
    except ImportError:
        with pytest.raises(MorphcError, match="pandas"):
            seeds_of(host).to_pandas()
    else:
        assert len(seeds_of(host).to_pandas()) == 3


def test_a_changed_width_is_an_error_only_where_seeds_are_active():
    host = active_feed()
    with pytest.raises(SeedError, match="7 features"):
        store_of(host).sites["fc2"](torch.randn(3, 9))
    assert feed().fc2.morphc(torch.randn(3, 9)).shape == (3, 9)
