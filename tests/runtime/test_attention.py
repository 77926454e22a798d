"""Sites on the in-projection of nn.MultiheadAttention."""

import contextlib
import copy
import pickle
from unittest import mock

import pytest
import torch
from torch import nn

import morphc
from morphc.errors import ConfigError, FoldError
from morphc.lifecycle import Lifecycle, Mode
from morphc.passes import chunking
from morphc.runtime.attach import attach, detach_
from morphc.runtime.attention import PACKED, SEPARATE, AttentionForward
from morphc.runtime.forward import SiteForward
from morphc.runtime.requests import SiteRequest

ACTIVE = Lifecycle.FINE_TUNING
E, HEADS = 12, 3
CAUSAL = nn.Transformer.generate_square_subsequent_mask(5)
PADDING = torch.tensor([[False, False, False, False, True], [False, False, False, True, True]])


class Block(nn.Module):
    """One attention that is called as the test wants."""

    def __init__(self, **options):
        super().__init__()
        self.attn = nn.MultiheadAttention(E, HEADS, **options)

    def forward(self, query, key=None, value=None, **options):
        key = query if key is None else key
        value = key if value is None else value
        return self.attn(query, key, value, **options)


def tokens(*shape):
    return torch.randn(*shape, requires_grad=True)


# name: (options of the module, inputs, options of the call)
CALLS = {
    "self": ({}, lambda: [tokens(5, 2, E)], {}),
    "batch-first": ({"batch_first": True}, lambda: [tokens(2, 5, E)], {}),
    "fused": ({"batch_first": True}, lambda: [tokens(2, 5, E)], {"need_weights": False}),
    "per-head": ({}, lambda: [tokens(5, 2, E)], {"average_attn_weights": False}),
    "unbatched": ({"batch_first": True}, lambda: [tokens(5, E)], {}),
    "unbatched-fused": ({}, lambda: [tokens(5, E), tokens(7, E)], {"need_weights": False}),
    "cross": ({"batch_first": True}, lambda: [tokens(2, 5, E), tokens(2, 7, E)], {}),
    "all-different": ({}, lambda: [tokens(5, 2, E), tokens(7, 2, E), tokens(7, 2, E)], {}),
    "dims": ({"kdim": 8, "vdim": 6}, lambda: [tokens(5, 2, E), tokens(7, 2, 8), tokens(7, 2, 6)], {}),
    "no-bias": ({"bias": False}, lambda: [tokens(5, 2, E)], {}),
    "dims-no-bias": (
        {"bias": False, "kdim": 8},
        lambda: [tokens(5, 2, E), tokens(7, 2, 8), tokens(7, 2, E)],
        {},
    ),
    "bias-kv": (
        {"add_bias_kv": True, "add_zero_attn": True, "batch_first": True},
        lambda: [tokens(2, 5, E)],
        {"key_padding_mask": PADDING, "attn_mask": CAUSAL.isneginf()},
    ),
    "zero-attn-fused": (
        {"add_zero_attn": True},
        lambda: [tokens(5, 2, E)],
        {"need_weights": False, "attn_mask": CAUSAL},
    ),
    "padding": ({"batch_first": True}, lambda: [tokens(2, 5, E)], {"key_padding_mask": PADDING}),
    "padding-fused": (
        {"batch_first": True},
        lambda: [tokens(2, 5, E)],
        {"key_padding_mask": PADDING, "need_weights": False},
    ),
    "unbatched-padding": ({}, lambda: [tokens(5, E)], {"key_padding_mask": PADDING[0]}),
    "float-padding": (
        {"batch_first": True},
        lambda: [tokens(2, 5, E)],
        {"key_padding_mask": torch.zeros(2, 5).masked_fill(PADDING, -3.0)},
    ),
    "mask-3d": ({}, lambda: [tokens(5, 2, E)], {"attn_mask": torch.randn(2 * HEADS, 5, 5)}),
    "mask-3d-fused": (
        {},
        lambda: [tokens(5, 2, E)],
        {"attn_mask": torch.randn(2 * HEADS, 5, 5), "need_weights": False},
    ),
    "causal": (
        {},
        lambda: [tokens(5, 2, E)],
        {"attn_mask": CAUSAL, "is_causal": True, "need_weights": False},
    ),
    "causal-weights": ({}, lambda: [tokens(5, 2, E)], {"attn_mask": CAUSAL, "is_causal": True}),
    "causal-padding": (
        {"batch_first": True},
        lambda: [tokens(2, 5, E)],
        {
            "attn_mask": CAUSAL.isneginf(),
            "is_causal": True,
            "key_padding_mask": PADDING,
            "need_weights": False,
        },
    ),
    "dropout": ({"dropout": 0.4}, lambda: [tokens(5, 2, E)], {}),
    "dropout-fused": ({"dropout": 0.4}, lambda: [tokens(5, 2, E)], {"need_weights": False}),
}
EACH_CALL = pytest.mark.parametrize("name", CALLS)


def made(name):
    """(host, inputs, options of the call)"""
    torch.manual_seed(len(name))
    options, inputs, how = CALLS[name]
    host = Block(**options)
    with torch.no_grad():
        for parameter in host.parameters():
            parameter.normal_(0.0, 0.5)
    return host, inputs(), how


def compiled(host, inputs, how=None, *, seeds=9, every=1, **config):
    config = morphc.Config(
        seeds_per_layer=seeds, telemetry_every=every, blueprint="affine", slots=seeds, **config
    )
    example = tuple(x.detach() for x in inputs)
    return morphc.compile(host, example_inputs=example, example_kwargs=how, config=config)


def in_projections(model):
    return {
        p: s for p, s in morphc.seeds(model).sites.items() if p.rpartition(".")[2].endswith("proj_weight")
    }


def ran(model, inputs, how):
    """Outputs, and gradients of all parameters and inputs, under a fixed RNG seed."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    torch.manual_seed(3)
    out, weights = model(*inputs, **how)
    found = [out] if weights is None else [out, weights]
    loss = sum((x * torch.linspace(-1, 1, x.numel()).view(x.shape)).sum() for x in found)
    parameters = [p for n, p in model.named_parameters() if "morphc" not in n]
    grads = torch.autograd.grad(loss, [*parameters, *inputs], allow_unused=True)
    return [*found, *(g for g in grads if g is not None)]


def assert_close(expected, got, bound=1e-6):
    assert len(expected) == len(got)
    for x, y in zip(expected, got, strict=True):
        assert x.shape == y.shape
        assert float((x - y).detach().abs().max()) <= bound * max(1.0, float(x.detach().abs().max()))


@EACH_CALL
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_dormant_attention_is_its_host_bit_for_bit(name, training):
    host, inputs, how = made(name)
    model = compiled(host, inputs, how)
    expected, got = ran(host.train(training), inputs, how), ran(model.train(training), inputs, how)
    assert all(torch.equal(x, y) for x, y in zip(expected, got, strict=True))


@EACH_CALL
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_decomposed_attention_equals_its_host(name, training):
    """Affine slots are the identity at birth, so only the decomposition can differ."""
    host, inputs, how = made(name)
    model = compiled(host, inputs, how)
    for site in in_projections(model).values():
        site.assign(list(range(len(site))), ACTIVE)
        assert site.site.mode is Mode.ACTIVE
    assert_close(ran(host.train(training), inputs, how), ran(model.train(training), inputs, how))


@pytest.mark.parametrize("mode", [Lifecycle.TRAINING, ACTIVE], ids=str)
@pytest.mark.parametrize(
    "name", ["self", "batch-first", "cross", "all-different", "unbatched", "dims", "no-bias"]
)
def test_affine_slots_act_and_learn_as_changed_weights(name, mode):
    host, inputs, how = made(name)
    model = compiled(host, inputs, how, seeds=6)
    changed = copy.deepcopy(host)
    wanted = {}
    for path, site in in_projections(model).items():
        chosen = [1, len(site) - 1]
        site.assign(chosen, mode)
        bank = site.slots["affine"]
        parameter = path.rpartition(".")[2]
        width = site.features // len(site)
        weight = getattr(changed.attn, parameter)
        for slot, seed in enumerate(bank.owner.tolist()):
            if seed < 0:
                continue
            with torch.no_grad():
                bank.get_parameter("scale")[slot] = torch.randn(width) * 0.3
            wanted[path, slot] = (weight, slice(seed * width, (seed + 1) * width), bank)
    with torch.no_grad():
        if mode is ACTIVE:
            for (path, slot), (weight, rows, bank) in wanted.items():
                gain = 1 + bank.get_parameter("scale")[slot]
                weight[rows] *= gain.unsqueeze(1)
                offset = {"k_proj_weight": E, "v_proj_weight": 2 * E}.get(path.rpartition(".")[2], 0)
                if changed.attn.in_proj_bias is not None:
                    changed.attn.in_proj_bias[offset + rows.start : offset + rows.stop] *= gain
    out, expected = model(*inputs, **how)[0], changed(*inputs, **how)[0]
    assert_close([expected], [out])
    cotangent = torch.linspace(-1, 1, out.numel()).view(out.shape)
    (out * cotangent).sum().backward()
    # d/dscale of (1 + scale) (w x + b) is the projection itself; its gradient is that of the bias times the value.
    original = host if mode is ACTIVE else changed
    for (path, slot), (_, rows, bank) in wanted.items():
        grad = slot_gradient(original, changed, path, rows, inputs, how, cotangent)
        assert_close([grad], [bank.grads()["scale"][slot]], 1e-5)


def slot_gradient(host, changed, path, rows, inputs, how, cotangent):
    """Of the scale of some rows of the in-projection, by autograd through the weights of `changed`."""
    scale = torch.zeros(rows.stop - rows.start, requires_grad=True)
    parameter = path.rpartition(".")[2]
    tensors = dict(changed.named_parameters())
    offset = {"k_proj_weight": E, "v_proj_weight": 2 * E}.get(parameter, 0)
    for name, start in ((path, 0), ("attn.in_proj_bias", offset)):
        if name in tensors:
            span = slice(start + rows.start, start + rows.stop)
            plain = host.get_parameter(name)[span].detach()
            delta = plain * (scale if plain.dim() == 1 else scale.unsqueeze(1))
            whole = tensors[name].detach()
            tensors[name] = torch.cat([whole[: span.start], whole[span] + delta, whole[span.stop :]])
    out = torch.func.functional_call(changed, tensors, tuple(x.detach() for x in inputs), how)[0]
    return torch.autograd.grad((out * cotangent).sum(), scale)[0]


def test_seeds_of_one_third_leave_the_others_alone_where_rows_differ():
    host, inputs, how = made("cross")
    model = compiled(host, inputs, how)
    site = in_projections(model)["attn.in_proj_weight"]
    site.assign([7], ACTIVE)
    bank = site.slots["affine"]
    with torch.no_grad():
        bank.get_parameter("shift")[0] = torch.nan
    # Seed 7 is of v: queries and keys, and so the weights, stay finite.
    out, weights = model(*inputs)
    assert torch.equal(weights, host(*inputs)[1])
    assert out.isnan().any()


# -- telemetry -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["self", "unbatched", "cross", "all-different", "dims", "no-bias"])
def test_telemetry_measures_the_projections(name):
    host, inputs, how = made(name)
    model = compiled(host, inputs, how, seeds=6).train()
    for _ in range(3):
        model(*inputs, **how)
    health = morphc.seeds(model).telemetry()
    attn = host.attn
    inputs = [inputs[0], *(inputs[1:] or [inputs[0]])]
    inputs = [*inputs, inputs[-1]][:3]
    biases = (attn.in_proj_bias if attn.in_proj_bias is not None else torch.zeros(3 * E)).chunk(3)
    weights = attn.in_proj_weight
    weights = (
        weights.chunk(3)
        if weights is not None
        else (attn.q_proj_weight, attn.k_proj_weight, attn.v_proj_weight)
    )
    values = [
        nn.functional.linear(x, w, b).reshape(-1, E) for x, w, b in zip(inputs, weights, biases, strict=True)
    ]
    per_value = 2 if attn.in_proj_weight is not None else 6
    chunks = [chunk for value in values for chunk in value.detach().double().tensor_split(per_value, -1)]
    sites = in_projections(model)
    names = [name for name in (PACKED, *SEPARATE) if f"attn.{name}" in sites]
    rows = torch.cat(
        [torch.arange(seeds.rows.start, seeds.rows.stop) for seeds in (sites[f"attn.{n}"] for n in names)]
    )
    assert health["count"][rows].tolist() == [3 * chunk.numel() for chunk in chunks]
    for key, of in (
        ("mean", torch.mean),
        ("variance", lambda c: c.var(correction=0)),
        ("peak", lambda c: c.abs().max()),
        ("correlation", correlation),
    ):
        expected = torch.stack([of(chunk) for chunk in chunks])
        torch.testing.assert_close(health[key][rows], expected, rtol=1e-4, atol=1e-5, equal_nan=True)


def correlation(chunk):
    if chunk.shape[1] == 1:
        return torch.tensor(torch.nan, dtype=torch.float64)
    width, variance = chunk.shape[1], chunk.var(correction=0)
    return (chunk.sum(1).var(correction=0) - width * variance) / ((width - 1) * width * variance)


def test_telemetry_is_sampled_and_a_forward_counts_once():
    host, inputs, _ = made("self")
    model = compiled(host, inputs, every=4).train()
    other = tokens(7, 2, E)
    site = in_projections(model)["attn.in_proj_weight"]
    for key in (None, None, other, other, other, None):  # the first and the fifth are sampled
        model(inputs[0], key)
    counts = morphc.seeds(model).telemetry()["count"][site.rows].view(3, 3)
    assert site.site.pulse.count == 6
    assert counts[0].tolist() == [20 * E / 3] * 3
    assert counts[1].tolist() == counts[2].tolist() == [24 * E / 3] * 3


@pytest.mark.parametrize("active", [False, True], ids=["dormant", "active"])
def test_eval_mode_and_recomputation_add_nothing(active):
    host, inputs, _ = made("self")
    model = compiled(host, inputs).train()
    site = in_projections(model)["attn.in_proj_weight"]
    if active:
        site.assign([0], ACTIVE)
    out, _ = torch.utils.checkpoint.checkpoint(model, *inputs, use_reentrant=False)
    out.sum().backward()
    model.eval()(*inputs)
    assert morphc.seeds(model).telemetry()["count"][site.rows].tolist() == [40.0] * 9


def test_arguments_that_torch_refuses_are_refused_in_its_words():
    host, inputs, _ = made("self")
    model = compiled(host, inputs).train()
    wrong = torch.randn(5, 2, E + 1)
    messages = []
    for active in (False, True):
        if active:
            in_projections(model)["attn.in_proj_weight"].assign([0], ACTIVE)
        with pytest.raises(AssertionError) as caught:
            model(wrong)
        messages.append(str(caught.value))
        with pytest.raises(RuntimeError, match="2D attn_mask is"):
            model(*inputs, attn_mask=torch.zeros(4, 5))
        with pytest.raises(RuntimeError, match="Need attn_mask"):
            model(*inputs, is_causal=True)
    assert messages[0] == messages[1]


def test_gradient_telemetry_is_taken_where_the_projection_is_part_of_the_graph():
    for name in ("self", "cross"):
        host, inputs, how = made(name)
        model = compiled(host, inputs, how, gradient_telemetry=True).train()
        site = in_projections(model)["attn.in_proj_weight"]
        model(*inputs)[0].sum().backward()
        assert morphc.seeds(model).telemetry()["gradient_norm"][site.rows].isnan().all()
        site.assign([0], ACTIVE)
        model(*inputs)[0].sum().backward()
        assert (morphc.seeds(model).telemetry()["gradient_norm"][site.rows] >= 0).all()


# -- fast paths ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def fused_calls():
    calls = []
    with contextlib.ExitStack() as stack:
        for name in ("_transformer_encoder_layer_fwd", "_native_multi_head_attention"):
            inner = getattr(torch, name)

            def counted(*args, _inner=inner, _name=name, **kwargs):
                calls.append(_name)
                return _inner(*args, **kwargs)

            stack.enter_context(mock.patch.object(torch, name, counted))
        yield calls


@pytest.mark.parametrize("state", [Lifecycle.DORMANT, Lifecycle.TRAINING, ACTIVE], ids=str)
def test_fast_path_of_the_attention_runs_unless_a_value_changes(state):
    host = nn.MultiheadAttention(E, 2, batch_first=True).eval()
    x = torch.randn(2, 5, E)
    model = compiled(host, (x, x, x)).eval()
    site = in_projections(model)["in_proj_weight"]
    if state:
        site.assign([0], state)
    with torch.no_grad(), fused_calls() as calls:
        expected = host(x, x, x)[0]
        calls.clear()
        got = model(x, x, x)[0]
    assert bool(calls) is (state is not ACTIVE)
    assert torch.equal(expected, got) if calls else torch.allclose(expected, got, rtol=1e-5, atol=1e-6)


def test_fast_path_of_an_encoder_is_off_while_an_in_projection_is_active():
    layer = nn.TransformerEncoderLayer(E, 2, 24, batch_first=True)
    host = nn.TransformerEncoder(layer, 2).eval()
    x, padding = torch.randn(2, 5, E), PADDING
    model = compiled(host, (x,), {"src_key_padding_mask": padding}).eval()
    site = morphc.seeds(model)["layers.1.self_attn.in_proj_weight"]
    for state in (Lifecycle.DORMANT, ACTIVE, Lifecycle.CULLED):
        if state:
            site.assign([0, 5], state)
        with torch.no_grad(), fused_calls() as calls:
            got = model(x, src_key_padding_mask=padding)
        # While the second layer's is off, the first's may run.
        assert len(calls) == (1 if state is ACTIVE else 2)
        expected = host(x, src_key_padding_mask=padding)
        assert torch.allclose(got[~padding], expected[~padding], rtol=1e-5, atol=1e-6)


# -- planning ------------------------------------------------------------------------------------------------


def test_sites_are_named_by_parameter_and_stand_in_the_attention():
    host, inputs, how = made("dims")
    plan = morphc.report(compiled(host, inputs, how)).plan
    sites = {site.path: site for site in plan.sites}
    assert list(sites) == [
        "attn.k_proj_weight", "attn.q_proj_weight", "attn.v_proj_weight", "attn.out_proj",
    ]  # fmt: skip
    k = sites["attn.k_proj_weight"]
    assert (k.parameter, k.region, k.layer_kind, k.features, k.tap_features) == (
        "k_proj_weight",
        "attn",
        "linear",
        E,
        8,
    )
    assert k.executed
    assert k.parts == 1
    host, inputs, how = made("self")
    (packed, _) = morphc.report(compiled(host, inputs, how)).plan.sites
    assert (packed.path, packed.features, packed.parts) == ("attn.in_proj_weight", 3 * E, 3)


def test_seeds_of_a_packed_site_cut_each_third_alike():
    host, inputs, _ = made("self")
    for asked, given in ((1, 3), (3, 3), (5, 3), (8, 6), (20, 18), (36, 36)):
        model = compiled(host, inputs, seeds=asked, include=("*in_proj_weight",))
        assert len(morphc.seeds(model)) == given
        note = morphc.report(model).plan.sites[0].note
        assert (f"{asked} seeds asked for, {given} cut its 3 parts alike" in note) is (asked != given)
    auto = compiled(host, inputs, seeds=9, max_overhead=1.0)
    assert chunking.cuts_parts_alike(
        morphc.report(auto).plan.sites[0], len(in_projections(auto)["attn.in_proj_weight"])
    )
    with pytest.raises(
        ConfigError,
        match=r"does not cut the 3 parts of 'attn.in_proj_weight', 12 features each, alike; use 6",
    ):
        morphc.compile(
            host,
            example_inputs=(inputs[0].detach(),),
            config=morphc.Config(seeds_per_layer={"*in_proj_weight": 8}),
        )


def test_auto_plans_a_packed_site_in_thirds():
    host = nn.MultiheadAttention(96, 2)
    x = torch.randn(5, 2, 96)
    model = morphc.compile(host, example_inputs=(x, x, x), config=morphc.Config(max_overhead=1.0))
    site = morphc.report(model).plan.sites[0]
    assert (site.path, site.seeds) == ("in_proj_weight", 18)


def test_a_forward_that_does_without_torchs_attention_says_so():
    class Home(nn.MultiheadAttention):
        def forward(self, x):
            return self.out_proj(nn.functional.linear(x, self.in_proj_weight[:E])), None

    class Host(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = Home(E, HEADS)

        def forward(self, x):
            return self.attn(x)[0]

    model = compiled(Host(), (torch.randn(5, 2, E),))
    reasons = {miss.path: miss.reason for miss in morphc.report(model).plan.misses}
    assert "never hands it to torch's functional attention" in reasons["attn.in_proj_weight"]


def test_a_computed_in_projection_says_so():
    host = nn.utils.parametrizations.weight_norm(nn.MultiheadAttention(E, HEADS), "in_proj_weight")
    x = torch.randn(5, 2, E)
    model = compiled(host, (x, x, x))
    reasons = {miss.path: miss.reason for miss in morphc.report(model).plan.misses}
    assert reasons["in_proj_weight"] == "it is no parameter: something computes it for each call"


class Wrapped(nn.MultiheadAttention):
    """A subclass that calls its parent's forward, and has an attention inside that it calls first."""

    def __init__(self, *args):
        super().__init__(*args)
        self.first = nn.MultiheadAttention(*args)

    def forward(self, query, key=None, value=None):
        query = self.first(query, query, query)[0]
        return super().forward(query, query, query, need_weights=False)


def test_subclasses_and_nested_attentions_keep_to_their_own_weights():
    host = Wrapped(E, HEADS)
    x = torch.randn(5, 2, E)
    model = compiled(host, (x,)).train()
    sites = in_projections(model)
    assert set(sites) == {"in_proj_weight", "first.in_proj_weight"}
    model(x)
    counts = morphc.seeds(model).telemetry()["count"]
    assert all(set(counts[site.rows].tolist()) == {40.0} for site in sites.values())
    for site in sites.values():
        site.assign([0, 4, 8], ACTIVE)
    assert torch.allclose(host(x)[0], model(x)[0], atol=1e-6)


# -- copies, and the way back --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("name", ["self", "cross", "dims"])
def test_copies_have_sites_of_their_own(way, name):
    host, inputs, how = made(name)
    model = compiled(host, inputs, how).train()
    for site in in_projections(model).values():
        site.assign([2], ACTIVE)
        with torch.no_grad():
            site.slots["affine"].get_parameter("shift")[0] = 0.5
    expected = model(*inputs, **how)[0]
    twin = way(model)
    before = morphc.seeds(model).telemetry()["count"].clone()
    assert torch.equal(twin(*inputs, **how)[0], expected)
    assert torch.equal(morphc.seeds(model).telemetry()["count"], before)
    for site in in_projections(twin).values():
        site.assign([2], Lifecycle.CULLED)
    assert torch.equal(twin(*inputs, **how)[0], host(*inputs, **how)[0])
    assert torch.equal(model(*inputs, **how)[0], expected)


@pytest.mark.parametrize("include", [("*",), ("*in_proj_weight",)], ids=["both sites", "in-projection only"])
def test_detach_undoes_both_wrappers(include):
    host, inputs, _ = made("self")
    model = compiled(host, inputs, include=include)
    assert type(vars(model.attn)["forward"]) is AttentionForward
    plain = morphc.detach(model)
    folded = morphc.fold(model)
    for module in (plain.attn, folded.attn):
        assert "forward" not in vars(module)
        assert list(module._modules) == ["out_proj"]
    detach_(model)
    assert "forward" not in vars(model.attn)
    assert list(model.attn._modules) == ["out_proj"]
    assert torch.equal(model(*inputs)[0], host(*inputs)[0])


def test_an_instance_forward_of_the_users_runs_inside_and_comes_back():
    host, inputs, _ = made("self")
    calls = []

    def forward(*args, **kwargs):
        calls.append(len(args))
        return nn.MultiheadAttention.forward(attention[0], *args, **kwargs)

    attention = [host.attn]
    host.attn.forward = forward
    site = SiteRequest("attn.in_proj_weight", host.attn, 3 * E, seeds=9, parameter="in_proj_weight")
    out = SiteRequest("attn.out_proj", host.attn.out_proj, E, seeds=3, owner=host.attn, output_index=0)
    expected = host(*inputs)[0]
    store = attach(host, [site, out], morphc.Config(blueprint="affine", telemetry_every=1))
    assert isinstance(host.attn.forward, SiteForward)
    sites = {site.path: store.sites[site.path]}
    host.attn.forward = AttentionForward(host.attn, sites, {site.path: host.attn})
    host.train()
    for mode in Mode:
        store.set_mode(sites[site.path], mode)
        assert torch.allclose(host(*inputs)[0], expected, atol=1e-6)
    assert calls == [3] * 4
    assert morphc.seeds(host).telemetry()["count"][:9].tolist() == [3 * 40] * 9
    detach_(host)
    assert host.attn.forward is forward


def test_seeds_that_do_not_cut_thirds_alike_are_refused():
    host, _, _ = made("self")
    request = SiteRequest("attn.in_proj_weight", host.attn, 3 * E, seeds=4, parameter="in_proj_weight")
    store = attach(host, [request], morphc.Config(blueprint="affine"))
    with pytest.raises(ConfigError, match=r"seeds=4 for 'attn.in_proj_weight'"):
        AttentionForward(host.attn, store.sites, {request.path: host.attn})


def test_fold_refuses_what_it_cannot_merge_and_leaves_the_model_alone():
    host, inputs, _ = made("self")
    model = compiled(host, inputs)
    assert torch.equal(morphc.fold(model)(*inputs)[0], host(*inputs)[0])
    in_projections(model)["attn.in_proj_weight"].assign([0], ACTIVE)
    with contextlib.suppress(FoldError):
        assert torch.allclose(morphc.fold(model)(*inputs)[0], model(*inputs)[0], atol=1e-6)


# -- torch.compile -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["self", "cross", "dims"])
def test_compiled_graphs_measure_on_sampled_steps_without_recompiling(name):
    host, inputs, how = made(name)
    model = compiled(host, inputs, how, every=2).train()
    twin = copy.deepcopy(model)
    torch._dynamo.reset()
    fast = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(4):
            got, expected = fast(*inputs, **how)[0], twin(*inputs, **how)[0]
            assert torch.allclose(got, expected, atol=1e-6)
    measured, wanted = morphc.seeds(model).telemetry(), morphc.seeds(twin).telemetry()
    for key in ("count", "mean", "variance", "dead_fraction", "peak"):
        torch.testing.assert_close(measured[key], wanted[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["self", "cross"])
def test_compiled_graphs_hold_active_sites(name):
    host, inputs, how = made(name)
    model = compiled(host, inputs, how).train()
    site = in_projections(model)["attn.in_proj_weight"]
    site.assign([0, 4, 8], ACTIVE)
    with torch.no_grad():
        site.slots["affine"].get_parameter("scale").normal_()
    expected = ran(model, inputs, how)
    before = morphc.seeds(model).telemetry()["count"][site.rows].clone()
    torch._dynamo.reset()
    got = ran_compiled(model, inputs, how)
    assert_close(expected, got)
    assert torch.equal(morphc.seeds(model).telemetry()["count"][site.rows], 2 * before)


def ran_compiled(model, inputs, how):
    fast = torch.compile(model, backend="aot_eager", fullgraph=True)
    return ran(fast, inputs, how)


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_exported_graphs_hold_no_telemetry(strict):
    host, inputs, _ = made("self")
    model = compiled(host, inputs).train()
    exported = torch.export.export(model, (inputs[0].detach(),), strict=strict)
    assert not any(
        "morphc" in str(node.target) for node in exported.graph.nodes if node.op == "call_function"
    )
    assert torch.allclose(exported.module()(inputs[0].detach())[0], host(*inputs)[0], atol=1e-6)
    assert not morphc.seeds(model).telemetry()["count"].any()
