"""Compiling leaves the host, its inputs and every random number generator as they were found."""

from __future__ import annotations

import collections
import enum
import functools
import random
import types
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from compiler_hosts import compiled, rows
from torch import Tensor, nn

from morphc.passes.isolation import private_copy
from morphc.passes.quiet import isolated


class Log:
    """A user's own cache object."""

    def __init__(self) -> None:
        self.items: list[Any] = []


@dataclass(slots=True)
class Tally:
    """Another one, without a `__dict__`."""

    items: list[int] = field(default_factory=list)
    count: int = 0


class Remembers(nn.Module):
    """Its forward changes everything that an attribute can hold."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.count = 0
        self.listed: list[Any] = []
        self.nested: dict[str, list[int]] = {"a": []}
        self.queue: collections.deque[int] = collections.deque(maxlen=9)
        self.counter: collections.Counter[str] = collections.Counter()
        self.grouped: collections.defaultdict[str, list[int]] = collections.defaultdict(list)
        self.ordered: collections.OrderedDict[str, int] = collections.OrderedDict()
        self.log = Log()
        self.tally = Tally()
        self.counts = functools.partial(list.append, [])
        self.steps = torch.zeros(())
        self.running = torch.zeros(8)
        self.array = np.zeros(2)
        self.register_buffer("mean", torch.zeros(8))
        self.plain = [nn.BatchNorm1d(8)]

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc(x)
        self.count += 1
        self.listed.append(h.detach())
        self.nested["a"].append(1)
        self.queue.append(1)
        self.counter["x"] += 1
        self.grouped["x"].append(1)
        self.ordered[f"{len(self.ordered)}"] = 1
        self.log.items.append(h.detach())
        self.tally.items.append(1)
        self.tally.count += 1
        self.counts(1)
        self.steps += 1
        self.running.mul_(0.9).add_(h.detach().mean(0))
        self.array[0] += 1
        self.mean.lerp_(h.detach().mean(0), 0.1)
        self.late = h
        return self.plain[0](h) + self.running + self.mean + self.steps

    def held(self) -> str:
        names = sorted(set(vars(self)) - {"_parameters", "_modules", "plain", "training"})
        values = {name: vars(vars(self)[name]) if name == "log" else vars(self)[name] for name in names}
        norm = self.plain[0]
        return repr((values, norm.running_mean, norm.num_batches_tracked, norm.training))


class Rolls(nn.Module):
    """It draws from every generator there is, its own ones included."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.torch_generator = torch.Generator().manual_seed(3)
        self.python_generator = random.Random(1)
        self.numpy_generator = np.random.default_rng(2)

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.rand(8, generator=self.torch_generator)
        scale = self.python_generator.random() + self.numpy_generator.random()
        return self.fc(x) * noise * scale + torch.rand(8) * random.random() * np.random.rand()

    def own_states(self) -> tuple[Any, ...]:
        return (
            self.torch_generator.get_state().tolist(),
            self.python_generator.getstate(),
            self.numpy_generator.bit_generator.state,
        )


class Clips(nn.Module):
    """It changes its own weights in every way there is."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 8, max_norm=0.1)
        self.fc = nn.Linear(8, 8)
        self.out = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        self.fc.weight.data.clamp_(-0.1, 0.1)
        with torch.no_grad():
            self.fc.bias.mul_(0.5)
        self.out.weight.data = self.out.weight.data / self.out.weight.data.norm()
        return self.out(self.fc(x)) + self.embed(torch.arange(3)).sum()


class Learns(nn.Module):
    """Its forward runs a backward of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        if y.requires_grad:
            y.sum().backward(retain_graph=True)
        return y


def global_states() -> tuple[Any, ...]:
    kind, keys, *rest = np.random.get_state()
    return torch.get_rng_state().tolist(), random.getstate(), kind, keys.tolist(), rest


@pytest.mark.parametrize("verify", [True, False], ids=["verified", "unverified"])
class TestCompile:
    def test_nothing_that_the_hosts_attributes_hold_changes(self, verify):
        host = Remembers()
        before = host.held()
        compiled(host, verify=verify)
        assert host.held() == before
        assert not hasattr(host, "late")

    def test_no_random_number_generator_moves(self, verify):
        host = Rolls()
        before = global_states(), host.own_states()
        result = compiled(host, verify=verify)
        assert (global_states(), host.own_states()) == before
        assert not any("nondeterministic" in note for note in result.report.verification)

    def test_training_flags_of_each_module_stay(self, verify):
        host = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.BatchNorm1d(8)).train()
        host[1].eval()
        compiled(host, verify=verify)
        assert [m.training for m in host.modules()] == [True, True, False, True]

    def test_a_failed_compile_leaves_the_host_alone_too(self, verify):
        class Fails(Remembers):
            def forward(self, x: Tensor) -> Tensor:
                super().forward(x)
                raise RuntimeError("not today")

        host = Fails()
        before = host.held()
        with pytest.raises(Exception, match="not today"):
            compiled(host, verify=verify)
        assert host.held() == before

    def test_grad_and_requires_grad_stay(self, verify):
        host = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        host[0].weight.grad = torch.full((8, 8), 2.0)
        host[1].bias.requires_grad_(False)
        kept = host[0].weight.grad
        compiled(host, verify=verify)
        assert host[0].weight.grad is kept
        assert torch.equal(kept, torch.full((8, 8), 2.0))
        assert [p.grad is None for p in host.parameters()] == [False, True, True, True]
        assert [p.requires_grad for p in host.parameters()] == [True, True, True, False]

    def test_a_host_that_changes_its_own_weights_gets_them_back(self, verify):
        host = Clips()
        places = [p.data_ptr() for p in host.parameters()]
        before = [p.detach().clone() for p in host.parameters()]
        result = compiled(host, verify=verify)
        assert all(torch.equal(p, old) for p, old in zip(host.parameters(), before, strict=True))
        assert [p.data_ptr() for p in host.parameters()] == places
        assert not any("nondeterministic" in note for note in result.report.verification)

    @pytest.mark.parametrize("had", [True, False], ids=["with grads", "without"])
    def test_a_backward_within_the_forward_leaves_no_gradient(self, verify, had):
        host = Learns()
        if had:
            host(rows())
        before = [p.grad if p.grad is None else p.grad.clone() for p in host.parameters()]
        objects = [p.grad for p in host.parameters()]
        compiled(host, verify=verify)
        assert all(p.grad is old for p, old in zip(host.parameters(), objects, strict=True))
        assert all(
            b is None or torch.equal(p.grad, b) for p, b in zip(host.parameters(), before, strict=True)
        )

    @pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
    def test_the_users_hooks_are_not_called(self, verify):
        host = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
        calls: list[str] = []
        host[0].register_forward_hook(lambda *_: calls.append("forward"))
        host[0].register_forward_pre_hook(lambda *_: calls.append("pre"))
        host[1].register_full_backward_hook(lambda *_: calls.append("backward"))
        host.register_full_backward_pre_hook(lambda *_: calls.append("backward pre"))
        model = compiled(host, verify=verify).model
        assert calls == []
        model(rows()).sum().backward()
        assert sorted(calls) == ["backward", "backward pre", "forward", "pre"]

    def test_an_object_given_as_an_argument_is_not_touched(self, verify):
        class Caches(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.fc = nn.Linear(8, 8)

            def forward(self, x: Tensor, log: Log, names: list[str], table: dict[str, Any]) -> Tensor:
                h = self.fc(x)
                log.items.append(h.detach())
                names.append("called")
                table["last"] = h
                return h + sum(log.items)

        log, names, table = Log(), ["mine"], {"a": torch.ones(8)}
        result = compiled(Caches(), rows(), log, names, table, verify=verify)
        assert (log.items, names, list(table)) == ([], ["mine"], ["a"])
        assert not any("nondeterministic" in note for note in result.report.verification)

    def test_an_input_that_the_forward_overwrites_is_not_touched(self, verify):
        class Overwrites(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.fc = nn.Linear(8, 8)

            def forward(self, x: Tensor) -> Tensor:
                return self.fc(x.clone()) + x.data.mul_(0)

        x = rows()
        compiled(Overwrites(), x, verify=verify)
        assert torch.equal(x, rows())


class TestPrivateCopy:
    def test_aliases_stay_aliases(self):
        shared = [1]
        fresh = private_copy({"a": shared, "b": (shared, shared)}, {})
        assert fresh["a"] is fresh["b"][0] is fresh["b"][1]
        assert fresh["a"] is not shared

    def test_cycles_end(self):
        ring: list[Any] = []
        ring.append(ring)
        fresh = private_copy(ring, {})
        assert fresh is not ring
        assert fresh[0] is fresh

    def test_modules_parameters_functions_and_classes_stay_themselves(self):
        layer = nn.Linear(2, 2)
        for value in (layer, layer.weight, rows, Log, torch, len):
            assert private_copy([value], {})[0] is value
        assert private_copy([layer.forward], {}) == [layer.forward]

    def test_marks_that_are_compared_by_identity_stay_themselves(self):
        class Mark:
            pass

        class Kind(enum.Enum):
            A = 1

        for value in (Mark(), object(), Kind.A, ...):
            assert private_copy([value], {})[0] is value

    def test_an_object_that_refuses_to_be_copied_stays_itself(self):
        class Refuses:
            def __init__(self) -> None:
                self.state = 1

            def __copy__(self) -> Refuses:
                raise RuntimeError("one of a kind")

        value = Refuses()
        assert private_copy(value, {}) is value

    def test_a_generator_goes_on_where_its_original_stands(self):
        generator = torch.Generator().manual_seed(9)
        torch.rand(3, generator=generator)
        fresh = private_copy(generator, {})
        expected = torch.rand(3, generator=fresh)
        assert torch.equal(torch.rand(3, generator=generator), expected)

    def test_a_subclass_of_a_container_keeps_its_class_and_attributes(self):
        class Named(dict):  # type: ignore[type-arg]
            pass

        value = Named(a=[1])
        value.title = ["t"]
        fresh = private_copy(value, {})
        fresh["a"].append(2)
        fresh.title.append("u")
        assert (type(fresh), value, value.title) == (Named, {"a": [1]}, ["t"])


def test_isolated_puts_everything_back_when_the_run_raises():
    host = Remembers().train()
    before, states = host.held(), global_states()

    def run() -> None:
        with isolated(host, training=False):
            host(rows())
            assert not host.training
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run()
    assert (host.held(), global_states(), host.training) == (before, states, True)


def test_a_namespace_of_modules_is_a_holder_and_not_state():
    host = nn.Sequential(nn.Linear(8, 8))
    host.parts = types.SimpleNamespace(first=host[0])
    model = compiled(host).model
    assert model.parts.first is model[0]
    assert host.parts.first is host[0]
