"""A model that was compiled on the meta device gets its values later: the seeds start then as after a fresh compile."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import morphc
from morphc.errors import MorphcError, SeedError
from morphc.runtime.store import store_of

STATES = morphc.Lifecycle
CONFIG = morphc.Config(seeds_per_layer=3, slots=2, telemetry_every=1)


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.second = nn.Linear(8, 5)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(8, 6)
        self.mid = nn.Linear(6, 6)
        self.head = nn.Linear(6, 8, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(torch.tanh(self.mid(x)))


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(7, 6))
        self.out = nn.Linear(7, 4)

    def forward(self, x):
        return self.out(F.linear(x, self.weight))

    def reset_parameters(self):
        nn.init.normal_(self.weight)


class Walker(nn.Module):
    """Looks at its own children, so the root's state is hidden; and has a functional layer of its own."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6))
        self.a = nn.Linear(6, 6)
        self.b = nn.Linear(6, 6)

    def forward(self, x):
        x = F.linear(x, self.weight)
        for child in self.children():
            x = child(x)
        return x

    def reset_parameters(self):
        nn.init.normal_(self.weight)


def sequential():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5))


def conv():
    return nn.Sequential(
        nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 6, 3, padding=1), nn.BatchNorm1d(6), nn.Flatten()
    )


HOSTS = {
    "plain": Plain,
    "sequential": sequential,
    "tied": Tied,
    "functional": Functional,
    "walker": Walker,
    "conv": conv,
}


def on_meta(make):
    with torch.device("meta"):
        host = make()
        x = torch.empty(4, 6)
    return morphc.compile(host, (x,), config=CONFIG)


def rows():
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(1))


def retied(model):
    """Both ways off meta make one parameter of each name, as they do of any model of torch's."""
    if isinstance(model, Tied):
        model.head.weight = model.embed.weight
    return model


def to_empty(model, values):
    model = model.to_empty(device="cpu")
    model.load_state_dict(values, strict=False)
    return retied(model)


def assign(model, values):
    model.load_state_dict(values, strict=False, assign=True)
    return retied(model)


def to_empty_assign(model, values):
    return assign(model.to_empty(device="cpu"), values)


def by_hand(model, values):
    """As a loader does that sets one tensor after the other and calls nothing of the model."""
    named = dict(model.named_modules())
    made = {}
    for name, value in values.items():
        owner, _, own = name.rpartition(".")
        module = named[owner]
        if own in module._parameters:
            module._parameters[own] = made.setdefault(value.data_ptr(), nn.Parameter(value.clone()))
        else:
            module._buffers[own] = value.clone()
    return model


def module_by_module(model, values):
    for module in model.modules():
        own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
        if any(tensor.is_meta for tensor in own):
            module.to_empty(device="cpu", recurse=False)
            module.reset_parameters()
    model.load_state_dict(values, strict=False)
    return retied(model)


ROADS = {f.__name__: f for f in (to_empty, assign, to_empty_assign, by_hand, module_by_module)}


@pytest.fixture(autouse=True)
def garbage(monkeypatch):
    """`empty_like` off meta gives what no value of a seed is."""
    original = torch.empty_like

    def dirty(tensor, **options):
        made = original(tensor, **options)
        if not made.is_meta:
            made.fill_(77)
        return made

    monkeypatch.setattr(torch, "empty_like", dirty)


def seeds_state(model):
    """Every value of morphc's own, by name; of a hidden root too."""
    store = store_of(model)
    found = {f"state.{name}": value for name, value in store.state.named_buffers()}
    for path, site in store.sites.items():
        found |= {
            f"{path}.{name}": value for name, value in (*site.named_parameters(), *site.named_buffers())
        }
    return found


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("make", HOSTS)
@pytest.mark.parametrize("first_use", ["forward", "assign", "telemetry", "save"])
def test_seeds_start_as_after_a_fresh_compile(make, road, first_use, tmp_path):
    torch.manual_seed(0)
    host = HOSTS[make]().train()
    fresh = morphc.compile(host, (rows(),), config=CONFIG, share=False).train()
    model = ROADS[road](on_meta(HOSTS[make]), host.state_dict()).train()
    found = []
    for each in (fresh, model):
        if first_use == "forward":
            each(rows())
        elif first_use == "telemetry":
            morphc.seeds(each).telemetry()
        elif first_use == "assign":
            seeds = morphc.seeds(each)
            for path in seeds.sites:
                seeds[path].assign([0, 1], STATES.TRAINING)
        else:
            morphc.save(each, tmp_path / str(id(each)))
        store_of(each).state.settle()
        found.append(seeds_state(each))
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        assert not found[1][name].is_meta, name
        assert value.dtype == found[1][name].dtype, name
        assert torch.equal(value, found[1][name]), name


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("make", HOSTS)
def test_outputs_and_gradients_are_the_hosts(make, road):
    torch.manual_seed(0)
    host = HOSTS[make]().train()
    model = ROADS[road](on_meta(HOSTS[make]), host.state_dict()).train()
    outputs = []
    for each in (host, model):
        x = rows().requires_grad_()
        y = each(x)
        y.square().sum().backward()
        outputs.append((y.detach(), x.grad))
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))
    mine = dict(model.named_parameters())
    for name, parameter in host.named_parameters():
        assert torch.equal(parameter.grad, mine[name].grad), name


@pytest.mark.parametrize("cast", ["half", "bfloat16", "to"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("road", ["to_empty", "assign", "by_hand"])
def test_casts_leave_the_types_of_the_state_alone(cast, when, road):
    def apply(model):
        return model.to(torch.bfloat16) if cast == "to" else getattr(model, cast)()

    expected = {name: value.dtype for name, value in seeds_state(on_meta(Plain)).items()}
    model = on_meta(Plain)
    if when == "before":
        model = apply(model)
    model = ROADS[road](model, Plain().state_dict())
    if when == "after":
        model = apply(model)
    morphc.seeds(model)["first"].assign([1], STATES.GRAFTING, alpha=0.25)
    assert {name: value.dtype for name, value in seeds_state(model).items()} == expected
    assert morphc.seeds(model)["first"].alpha.tolist() == [0.0, 0.25, 0.0]


@pytest.mark.parametrize("make", HOSTS)
def test_a_move_reaches_everything_once(make):
    model = morphc.compile(HOSTS[make](), (rows(),), config=CONFIG, share=False)
    path = next(path for path, site in morphc.seeds(model).sites.items() if site.slots)
    morphc.seeds(model)[path].assign([1], STATES.GRAFTING, alpha=0.25)
    model = model.double()
    sites = store_of(model).sites.values()
    moments = [value for site in sites for _, bank in site.slots.items() for value in bank.opt.buffers()]
    assert {value.dtype for value in moments if value.is_floating_point()} == {torch.float64}
    assert morphc.seeds(model)[path].alpha.tolist() == [0.0, 0.25, 0.0]
    assert morphc.seeds(model).alpha.dtype == torch.float32
    assert all(value.is_meta for value in seeds_state(model.to("meta")).values())


@pytest.mark.parametrize(
    "by", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
@pytest.mark.parametrize("make", ["plain", "sequential", "tied", "functional"])
def test_a_copy_on_meta_leaves_it_alone(by, make):
    model = on_meta(HOSTS[make])
    twin = to_empty(by(model), HOSTS[make]().state_dict())
    assert all(value.is_meta for value in seeds_state(model).values())
    assert not any(value.is_meta for value in seeds_state(twin).values())
    path = next(iter(morphc.seeds(twin).sites))
    morphc.seeds(twin)[path].assign([0], STATES.TRAINING)
    twin.train()(rows())


def test_commands_on_meta_say_what_to_call():
    seeds = morphc.seeds(on_meta(Plain))
    assert len(seeds) == 6
    for command in (
        lambda: seeds["first"].assign([0], STATES.TRAINING),
        lambda: seeds["first"].telemetry(),
        lambda: seeds["first"].history(0),
        seeds.telemetry,
    ):
        with pytest.raises(SeedError, match=r"6 seeds are on the meta device.*to_empty\(device=\.\.\.\)"):
            command()


def test_a_layer_left_on_meta_is_named():
    model = on_meta(Plain)
    model.load_state_dict(
        {k: v for k, v in Plain().state_dict().items() if k.startswith("first")}, strict=False, assign=True
    )
    morphc.seeds(model)["first"].assign([0], STATES.TRAINING)
    with pytest.raises(SeedError, match="the layer of site 'second' is on the meta device"):
        morphc.seeds(model)["second"].assign([0], STATES.TRAINING)


def test_save_on_meta_is_refused_and_a_report_is_not(tmp_path):
    model = on_meta(Plain)
    with pytest.raises(MorphcError, match="on the meta device"):
        morphc.save(model, tmp_path / "saved")
    assert "first" in str(morphc.report(model))


@pytest.mark.parametrize("make", HOSTS)
def test_a_move_takes_along_what_is_still_on_meta(make):
    model = by_hand(on_meta(HOSTS[make]), HOSTS[make]().state_dict()).to("cpu")
    assert not any(value.is_meta for value in seeds_state(model).values())


def test_a_model_whose_values_were_given_up_is_dormant():
    model = morphc.compile(Plain(), (rows(),), config=CONFIG)
    morphc.seeds(model)["first"].assign([0], STATES.FINE_TUNING)
    model = to_empty(model.to("meta"), Plain().state_dict())
    handle = morphc.seeds(model)["first"]
    assert handle.mode == 0
    assert handle.lifecycle.tolist() == [0, 0, 0]
    assert handle.slots["bottleneck"].owner.tolist() == [-1, -1]


@pytest.mark.parametrize("make", HOSTS)
def test_a_checkpoint_fills_a_host_on_meta(make, tmp_path):
    host = HOSTS[make]().eval()
    model = morphc.compile(host, (rows(),), config=CONFIG).eval()
    path = next(iter(morphc.seeds(model).sites))
    morphc.seeds(model)[path].assign([0], STATES.FINE_TUNING)
    morphc.save(model, tmp_path / "saved")
    with torch.device("meta"):
        empty = HOSTS[make]().eval()
    loaded = morphc.load(empty, tmp_path / "saved")
    wanted, found = seeds_state(model), seeds_state(loaded)
    assert all(torch.equal(value, found[name]) for name, value in wanted.items())
    assert torch.equal(loaded(rows()), model(rows()))


@pytest.mark.parametrize("road", ["assign", "by_hand"])
def test_a_compiled_graph_measures_once_the_seeds_have_left_meta(road, monkeypatch):
    monkeypatch.undo()
    model = ROADS[road](on_meta(Plain), Plain().state_dict()).train()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    compiled(rows())
    seeds = morphc.seeds(model)
    before = seeds.telemetry()["count"]
    assert bool(before.any()) is (road == "assign")
    compiled(rows())
    assert (seeds.telemetry()["count"] > before).all()
