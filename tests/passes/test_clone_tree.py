"""`clone_tree`: new module objects over the same tensors, with nothing that points back into the host."""

from __future__ import annotations

import functools
import threading
import types
import weakref
from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from compiler_hosts import HOSTS, rows
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, rnn

import morphc
from morphc.passes.clone import clone_tree, every_module
from morphc.passes.verify import same_bits


class Pair(nn.Module):
    """A layer and a dropout, called by whatever `wire` puts into its attributes."""

    def __init__(self, wire: Any) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.drop = nn.Dropout(0.5)
        wire(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.calls(x)


@dataclass
class Holder:
    layers: list[nn.Module]

    def run(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Helper:
    def __init__(self, owner: nn.Module) -> None:
        self.owner = owner

    def __call__(self, x: Tensor) -> Tensor:
        return self.owner.drop(self.owner.fc(x))


class Slots:
    __slots__ = ("__fc", "drop", "unset")

    def __init__(self, fc: nn.Module, drop: nn.Module) -> None:
        self.__fc, self.drop = fc, drop

    def __call__(self, x: Tensor) -> Tensor:
        return self.drop(self.__fc(x))


@dataclass(frozen=True, slots=True)
class Frozen:
    layers: tuple[nn.Module, ...]

    def run(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


Layers = namedtuple("Layers", "fc drop")


def composed(layers: Any) -> Any:
    return lambda x: layers[1](layers[0](x))


def closure(m: Pair) -> None:
    m.calls = lambda x: m.drop(m.fc(x))


def default_arguments(m: Pair) -> None:
    def run(x: Tensor, fc: nn.Module = m.fc, *, drop: nn.Module = m.drop) -> Tensor:
        return drop(fc(x))

    m.calls = run


def closure_over_a_list(m: Pair) -> None:
    m.calls = composed([m.fc, m.drop])


def closure_in_a_closure(m: Pair) -> None:
    inner = composed([m.fc, m.drop])
    m.calls = lambda x: inner(x)


def bound_methods(m: Pair) -> None:
    m.parts = {"fc": m.fc.__call__, "drop": [m.drop.__call__]}
    m.calls = types.MethodType(lambda self, x: self.parts["drop"][0](self.parts["fc"](x)), m)


def partial(m: Pair) -> None:
    m.calls = functools.partial(lambda fc, drop, x: drop(fc(x)), m.fc, m.drop)


def object_of_a_class(m: Pair) -> None:
    m.calls = Helper(m)


def method_of_an_object(m: Pair) -> None:
    m.calls = Holder([m.fc, m.drop]).run


def weak_references(m: Pair) -> None:
    m.refs = [weakref.ref(m.fc), weakref.ref(m.drop)]
    m.calls = types.MethodType(lambda self, x: self.refs[1]()(self.refs[0]()(x)), m)


def named_tuple(m: Pair) -> None:
    m.parts = Layers(m.fc, m.drop)
    m.calls = types.MethodType(lambda self, x: self.parts.drop(self.parts.fc(x)), m)


def keyed_by_module(m: Pair) -> None:
    m.order = {m.fc: 0, m.drop: 1}
    m.calls = types.MethodType(lambda self, x: composed(sorted(self.order, key=self.order.get))(x), m)


def plain_tuple_in_a_set_and_a_dict(m: Pair) -> None:
    m.parts = OrderedDict(a=({m.fc},), b=(m.drop,))
    m.calls = types.MethodType(lambda self, x: self.parts["b"][0](next(iter(self.parts["a"][0]))(x)), m)


def recursive_closure(m: Pair) -> None:
    def run(x: Tensor, depth: int = 1) -> Tensor:
        return run(x, depth - 1) if depth else m.drop(m.fc(x))

    m.calls = run


def proxies(m: Pair) -> None:
    m.parts = [weakref.proxy(m.fc), {"drop": weakref.proxy(m.drop)}]
    m.calls = types.MethodType(lambda self, x: self.parts[1]["drop"](self.parts[0](x)), m)


def weak_methods(m: Pair) -> None:
    m.refs = [weakref.WeakMethod(m.fc.__call__), weakref.WeakMethod(m.drop.__call__)]
    m.calls = types.MethodType(lambda self, x: self.refs[1]()(self.refs[0]()(x)), m)


def weak_containers(m: Pair) -> None:
    m.by_name, m.order = weakref.WeakValueDictionary(fc=m.fc), weakref.WeakKeyDictionary({m.drop: 1})
    m.kept = weakref.WeakSet([m.fc])
    m.calls = types.MethodType(
        lambda self, x: next(iter(self.order))(self.by_name["fc"](x)) + 0 * len(self.kept), m
    )


def object_with_slots(m: Pair) -> None:
    m.calls = Slots(m.fc, m.drop)


def frozen_object_with_slots(m: Pair) -> None:
    m.calls = Frozen((m.fc, m.drop)).run


WIRINGS = [
    closure,
    default_arguments,
    closure_over_a_list,
    closure_in_a_closure,
    bound_methods,
    partial,
    object_of_a_class,
    method_of_an_object,
    weak_references,
    named_tuple,
    keyed_by_module,
    plain_tuple_in_a_set_and_a_dict,
    recursive_closure,
    proxies,
    weak_methods,
    weak_containers,
    object_with_slots,
    frozen_object_with_slots,
]


class TestReferences:
    @pytest.mark.parametrize("wire", WIRINGS)
    def test_no_call_of_the_clone_reaches_a_module_of_the_host(self, wire):
        host = Pair(wire)
        clone = clone_tree(host)
        reached = []
        for module in (host.fc, host.drop):
            module.register_forward_hook(lambda module, args, output: reached.append(type(module).__name__))
        clone(rows())
        assert reached == []

    @pytest.mark.parametrize("wire", WIRINGS)
    def test_the_clones_training_flag_is_its_own(self, wire):
        host = Pair(wire).train()
        clone = clone_tree(host).eval()
        x = rows()
        assert same_bits(clone(x), host.fc(x))
        assert host.drop.training

    @pytest.mark.parametrize("wire", WIRINGS)
    def test_the_host_still_calls_its_own_modules(self, wire):
        host = Pair(wire)
        clone = clone_tree(host)
        reached = []
        clone.fc.register_forward_hook(lambda *_: reached.append("clone"))
        host.fc.register_forward_hook(lambda *_: reached.append("host"))
        host(rows())
        assert reached == ["host"]

    def test_a_proxy_that_torch_took_for_a_child_follows(self):
        host = Pair(lambda m: setattr(m, "near", weakref.proxy(m.fc)))
        host.calls = types.MethodType(lambda self, x: self.near(x), host)
        clone = clone_tree(host)
        assert clone.near.weight is host.fc.weight
        clone.fc.mark, host.fc.mark = "clone", "host"
        assert (clone.near.mark, host.near.mark) == ("clone", "host")

    def test_a_closure_without_modules_keeps_its_cells(self):
        count = [0]

        def tick() -> int:
            count[0] += 1
            return count[0]

        host = nn.Linear(2, 2)
        host.tick = tick
        clone = clone_tree(host)
        assert (host.tick(), clone.tick(), host.tick()) == (1, 2, 3)

    def test_a_partials_attributes_follow(self):
        host = nn.Linear(8, 8)
        host.forward = functools.update_wrapper(functools.partial(nn.Linear.forward, host), nn.Linear.forward)
        clone = clone_tree(host)
        assert clone.forward.args == (clone,)
        assert clone.forward.__name__ == "forward"

    def test_an_object_that_two_modules_share_is_copied_once(self):
        host = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        host[0].shared = host[1].shared = Holder([host[0]])
        clone = clone_tree(host)
        assert clone[0].shared is clone[1].shared
        assert clone[0].shared is not host[0].shared
        assert clone[0].shared.layers[0] is clone[0]

    def test_an_object_without_modules_is_shared(self):
        host = nn.Linear(8, 8)
        host.settings = types.SimpleNamespace(rate=0.5)
        assert clone_tree(host).settings is host.settings

    def test_objects_in_a_cycle_end(self):
        host = nn.Linear(8, 8)
        a, b = types.SimpleNamespace(layer=host), types.SimpleNamespace()
        a.other, b.other = b, a
        host.a = a
        clone = clone_tree(host)
        assert clone.a.layer is clone
        assert clone.a.other.other is clone.a

    def test_modules_reachable_only_through_plain_attributes_are_cloned_too(self):
        host = nn.Linear(8, 8)
        host.plain = [nn.Linear(8, 8), {"deep": (nn.Tanh(),)}]
        clone = clone_tree(host)
        assert len(every_module(host)) == len(every_module(clone)) == 3
        assert not {id(m) for m in every_module(host)} & {id(m) for m in every_module(clone)}
        assert clone.plain[0].weight is host.plain[0].weight

    def test_appending_to_the_clones_list_does_not_show_in_the_host(self):
        host = nn.Linear(8, 8)
        host.log, host.seen = [], {"a": []}
        clone = clone_tree(host)
        clone.log.append(1)
        clone.seen["a"].append(1)
        assert (host.log, host.seen) == ([], {"a": []})


class TestHooks:
    def test_a_hook_put_on_the_clone_is_not_on_the_host(self):
        host = nn.Linear(8, 8)
        clone_tree(host).register_forward_hook(lambda *_: None)
        assert not host._forward_hooks

    def test_a_bound_method_hook_is_rebound(self):
        class Watcher(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.fc = nn.Linear(8, 8)
                self.seen = 0
                self.fc.register_forward_hook(self.note)

            def note(self, *_: Any) -> None:
                self.seen += 1

            def forward(self, x: Tensor) -> Tensor:
                return self.fc(x)

        host = Watcher()
        clone = clone_tree(host)
        clone(rows())
        assert (host.seen, clone.seen) == (0, 1)

    def test_a_closure_hook_keeps_what_its_user_looks_at(self):
        host = nn.Sequential(nn.Linear(8, 8))
        host.kept = []
        host[0].register_forward_hook(lambda module, args, output: host.kept.append(output))
        clone_tree(host)(rows())
        assert len(host.kept) == 1

    def test_a_load_state_dict_pre_hook_gets_the_clone(self):
        seen = []

        class Loads(nn.Linear):
            def __init__(self) -> None:
                super().__init__(8, 8)
                self.register_load_state_dict_pre_hook(self.before)

            @staticmethod
            def before(module: nn.Module, *_: Any) -> None:
                seen.append(module)

        host = Loads()
        clone = clone_tree(host)
        clone.load_state_dict(host.state_dict())
        assert seen == [clone]


class Slotted(nn.Module):
    __slots__ = ("extra", "layer_again")

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        object.__setattr__(self, "extra", 2.0)
        object.__setattr__(self, "layer_again", self.layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer_again(x) * self.extra


class Guarded(nn.Module):
    """Its attributes can't be set, and unknown ones come from the wrapped module."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.__dict__["sealed"] = True

    def __setattr__(self, name: str, value: Any) -> None:
        if self.__dict__.get("sealed") and name != "training":
            raise AttributeError(f"{name} is sealed")
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + self.bias


class Locked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()
        self.generator = (i for i in range(3))
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        with self.lock:
            return self.fc(x)


def tied() -> nn.Module:
    host = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    host[2].weight = host[0].weight
    host.append(host[0])
    return host


def lstm() -> nn.Module:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.LSTM(8, 8, num_layers=2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.rnn(x)[0]

    return Last()


def legacy_weight_norm() -> nn.Module:
    return nn.Sequential(
        torch.nn.utils.weight_norm(nn.Linear(8, 8)), torch.nn.utils.spectral_norm(nn.Linear(8, 8))
    )


def parametrized() -> nn.Module:
    return nn.Sequential(
        parametrizations.weight_norm(nn.Linear(8, 8)),
        parametrizations.spectral_norm(nn.Linear(8, 8)),
        parametrizations.orthogonal(nn.Linear(8, 8)),
    )


SPECIAL = {
    f.__name__.lower(): f for f in (Slotted, Guarded, Locked, tied, lstm, legacy_weight_norm, parametrized)
}


class TestValues:
    @pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
    @pytest.mark.parametrize("share", [True, False], ids=["shared", "copied"])
    @pytest.mark.parametrize("name", [*HOSTS, *SPECIAL])
    def test_the_clones_forward_equals_the_hosts(self, name, share):
        host = (HOSTS | SPECIAL)[name]().eval()
        clone = clone_tree(host, copy_tensors=not share)
        assert type(clone) is type(host)
        assert not {id(m) for m in host.modules()} & {id(m) for m in clone.modules()}
        assert same_bits(clone(rows()), host(rows()))

    @pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
    @pytest.mark.parametrize("name", [*HOSTS, *SPECIAL])
    def test_a_shared_clone_has_the_same_tensors_under_the_same_names(self, name):
        host = (HOSTS | SPECIAL)[name]()
        clone = clone_tree(host)
        for iterate in ("named_parameters", "named_buffers"):
            ours, theirs = (dict(getattr(m, iterate)(remove_duplicate=False)) for m in (clone, host))
            assert list(ours) == list(theirs)
            assert all(ours[key] is theirs[key] for key in ours)

    @pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
    @pytest.mark.parametrize("name", [*HOSTS, *SPECIAL])
    def test_a_copy_shares_no_storage_and_keeps_every_tie(self, name):
        host = (HOSTS | SPECIAL)[name]()
        clone = clone_tree(host, copy_tensors=True)
        theirs = dict(host.named_parameters(remove_duplicate=False))
        ours = dict(clone.named_parameters(remove_duplicate=False))
        assert list(ours) == list(theirs)
        storages = {p.untyped_storage().data_ptr() for p in theirs.values()}
        assert not storages & {p.untyped_storage().data_ptr() for p in ours.values()}
        for a in theirs:
            for b in theirs:
                assert (theirs[a] is theirs[b]) == (ours[a] is ours[b]), (a, b)

    def test_training_a_copy_leaves_the_host_alone(self):
        host = lstm()
        clone = clone_tree(host, copy_tensors=True)
        before = host(rows()).detach().clone()
        with torch.no_grad():
            for parameter in clone.parameters():
                parameter.add_(1.0)
        assert same_bits(host(rows()), before)
        assert not torch.equal(clone(rows()), before)

    def test_a_copy_has_its_own_plain_tensors(self):
        host = nn.Linear(8, 8)
        host.running, host.views = torch.zeros(8), {"w": host.weight}
        clone = clone_tree(host, copy_tensors=True)
        clone.running.add_(1)
        assert torch.equal(host.running, torch.zeros(8))
        assert clone.views["w"] is clone.weight

    def test_a_copy_has_its_own_leaves_wherever_attributes_hold_them(self):
        class Weight:
            __slots__ = ("weight",)

        host = nn.Linear(8, 8)
        host.scale = torch.ones(8, requires_grad=True)
        host.held = Weight()
        host.held.weight = nn.Parameter(torch.ones(8))
        host.listed = [host.held.weight, torch.ones(2, device="meta", requires_grad=True), host.weight]
        host.calls = functools.partial(nn.functional.linear, weight=host.scale)
        host.computed = host.scale * 2
        clone = clone_tree(host, copy_tensors=True)
        copied = [clone.scale, clone.held.weight, clone.listed[1], clone.calls.keywords["weight"]]
        own = [host.scale, host.held.weight, host.listed[1], host.calls.keywords["weight"]]
        for mine, theirs in zip(copied, own, strict=True):
            assert mine is not theirs
            assert (type(mine), mine.requires_grad, mine.is_leaf) == (type(theirs), True, True)
            assert mine.is_meta or mine.data_ptr() != theirs.data_ptr()
        assert clone.listed[0] is clone.held.weight
        assert clone.listed[2] is clone.weight
        assert clone.calls.keywords["weight"] is clone.scale
        assert clone.computed is host.computed  # it is no leaf, and goes on being computed from the host's
        shared = clone_tree(host)
        assert shared.scale is host.scale
        assert shared.listed[0] is host.listed[0]

    def test_training_a_copy_leaves_plain_leaves_of_the_host_alone(self):
        host = Pair(lambda m: setattr(m, "calls", lambda x: x))
        host.scale = torch.ones(8, requires_grad=True)
        host.forward = types.MethodType(lambda self, x: self.fc(x) * self.scale, host)
        model = morphc.compile(host, rows(), share=False)
        model(rows()).sum().backward()
        assert host.scale.grad is None
        assert model.scale.grad is not None

    def test_a_dead_proxy_stays_what_it_is(self):
        host = nn.Sequential(nn.Linear(8, 8))
        host.gone = [weakref.proxy(Helper(host))]
        for share in (True, False):
            model = morphc.compile(host, rows(), share=share)
            assert type(model.gone[0]) is weakref.ProxyType or callable(model.gone[0])

    def test_a_module_under_two_names_stays_one(self):
        clone = clone_tree(tied())
        assert clone[0] is clone[3]
        assert clone[0].weight is clone[2].weight

    def test_reading_a_parametrized_weight_is_not_part_of_cloning(self):
        host = nn.Sequential(parametrizations.spectral_norm(nn.Linear(8, 8))).train()
        before = {name: b.clone() for name, b in host.named_buffers()}
        clone_tree(host)
        assert all(same_bits(before[name], b) for name, b in host.named_buffers())

    def test_a_parametrization_of_the_clone_is_its_own(self):
        host = nn.Linear(8, 8)
        parametrize.register_parametrization(host, "weight", nn.Tanh())
        clone = clone_tree(host)
        parametrize.remove_parametrizations(clone, "weight")
        assert parametrize.is_parametrized(host, "weight")
        assert not parametrize.is_parametrized(clone)

    def test_torchscript_is_shared_as_it_is(self):
        host = nn.Sequential(torch.jit.script(nn.Linear(8, 8)), nn.Linear(8, 8))
        clone = clone_tree(host)
        assert clone[0] is host[0]
        assert clone[1] is not host[1]
        copied = clone_tree(host, copy_tensors=True)
        assert copied[0] is not host[0]
        copied(torch.randn(3, 8)).sum().backward()
        assert all(p.is_leaf and p.grad is not None for p in copied.parameters())
        assert all(p.grad is None for p in host.parameters())

    def test_packed_sequences_go_through_a_cloned_rnn(self):
        host = nn.GRU(8, 8, batch_first=True)
        packed = rnn.pack_padded_sequence(torch.randn(2, 5, 8), torch.tensor([5, 3]), batch_first=True)
        assert same_bits(clone_tree(host)(packed)[0].data, host(packed)[0].data)
