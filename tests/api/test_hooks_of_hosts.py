"""Hosts that work by hooks of their own: over dicts, lists, tensors and objects that their forward reads."""

from __future__ import annotations

import functools
import types
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import morphc
from morphc import Config
from morphc.passes.verify import same_bits

# Of torch's: the layer gets its input by name, where a full backward hook doesn't look for it.
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")


class Hooked(nn.Module):
    """`setup` registers hooks on `self.layer`; the forward reads what they left, by `left`."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.last = nn.Linear(4, 3)
        self.setup()

    def setup(self) -> None:
        raise NotImplementedError

    def left(self) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.layer(input=x) + self.left())
        return y


class OverDict(Hooked):
    def setup(self) -> None:
        kept = self.kept = {}
        self.layer.register_forward_hook(lambda module, args, output: kept.update(y=output))

    def left(self) -> Tensor:
        return self.kept["y"]


class OverList(OverDict):
    def setup(self) -> None:
        kept = self.kept = []
        self.layer.register_forward_hook(lambda module, args, output: kept.append(output))

    def left(self) -> Tensor:
        y = self.kept[-1]
        self.kept.clear()
        return y


class OverDeque(OverList):
    def setup(self) -> None:
        kept = self.kept = deque(maxlen=2)
        self.layer.register_forward_hook(lambda module, args, output: kept.append(output))


class OverNestedDict(OverDict):
    def setup(self) -> None:
        self.outer: dict[str, dict[str, Tensor]] = {"inner": {}}
        inner = self.outer["inner"]
        self.layer.register_forward_hook(lambda module, args, output: inner.update(y=output))

    def left(self) -> Tensor:
        return self.outer["inner"]["y"]


def keep(store: dict[str, Tensor], name: str, module: nn.Module, args: object, output: Tensor) -> None:
    store[name] = output


class OverPartial(OverDict):
    def setup(self) -> None:
        self.kept = {}
        self.layer.register_forward_hook(functools.partial(keep, self.kept, "y"))


class OverPartialOfMethod(OverDict):
    def setup(self) -> None:
        self.kept = {}
        self.layer.register_forward_hook(functools.partial(self.note, store=self.kept))

    def note(self, module: nn.Module, args: object, output: Tensor, store: dict[str, Tensor]) -> None:
        store["y"] = output


class OverDefault(OverDict):
    def setup(self) -> None:
        self.kept = {}

        def hook(module: nn.Module, args: object, output: Tensor, store: Any = self.kept) -> None:
            store["y"] = output

        self.layer.register_forward_hook(hook)


class OverKeywordDefault(OverDict):
    def setup(self) -> None:
        self.kept = {}

        def hook(module: nn.Module, args: object, output: Tensor, *, store: Any = self.kept) -> None:
            store["y"] = output

        self.layer.register_forward_hook(hook)


class BoundMethod(OverDict):
    def setup(self) -> None:
        self.kept = {}
        self.layer.register_forward_hook(self.note)

    def note(self, module: nn.Module, args: object, output: Tensor) -> None:
        self.kept["y"] = output


def keeper(store: dict[str, Tensor]) -> Callable[..., None]:
    def hook(module: nn.Module, args: object, output: Tensor) -> None:
        store["y"] = output

    return hook


class MadeByAFunction(OverDict):
    def setup(self) -> None:
        self.kept = {}
        self.layer.register_forward_hook(keeper(self.kept))


class Recorder:
    def __init__(self, kept: dict[str, Tensor]) -> None:
        self.kept = kept

    def __call__(self, module: nn.Module, args: object, output: Tensor) -> None:
        self.kept["y"] = output


class CallableObject(OverDict):
    def setup(self) -> None:
        self.kept = {}
        self.layer.register_forward_hook(Recorder(self.kept))


class HeldObject(OverDict):
    def setup(self) -> None:
        self.recorder = Recorder({})
        self.layer.register_forward_hook(self.recorder)

    def left(self) -> Tensor:
        return self.recorder.kept["y"]


class OverNamespace(OverDict):
    def setup(self) -> None:
        kept = self.kept = types.SimpleNamespace()
        self.layer.register_forward_hook(lambda module, args, output: setattr(kept, "y", output))

    def left(self) -> Tensor:
        y: Tensor = self.kept.y
        return y


class PreHookWithKeywords(OverDict):
    def setup(self) -> None:
        kept = self.kept = {}

        def hook(module: nn.Module, args: object, kwargs: dict[str, Tensor]) -> None:
            kept["y"] = kwargs["input"]

        self.layer.register_forward_pre_hook(hook, with_kwargs=True)


class ChangesItsOutput(OverDict):
    def setup(self) -> None:
        kept = self.kept = {}

        def hook(module: nn.Module, args: object, kwargs: dict[str, Tensor], output: Tensor) -> Tensor:
            kept["y"] = kwargs["input"]
            return output * 2

        self.layer.register_forward_hook(hook, with_kwargs=True, always_call=True)


class OverABuffer(Hooked):
    """A running mean of the layer's output."""

    mean: Tensor

    def setup(self) -> None:
        self.register_buffer("mean", torch.zeros(4))
        mean = self.mean

        def hook(module: nn.Module, args: object, output: Tensor) -> None:
            mean.mul_(0.9).add_(output.detach().mean(0), alpha=0.1)

        self.layer.register_forward_hook(hook)

    def left(self) -> Tensor:
        return self.mean


class OverAParameter(Hooked):
    def setup(self) -> None:
        self.scale = nn.Parameter(torch.full((4,), 2.0))
        scale = self.scale
        self.layer.register_forward_hook(lambda module, args, output: output * scale)

    def left(self) -> Tensor:
        return torch.ones(())


class PairOfHooks(Hooked):
    """One pushes what the other pops; the stack is no attribute."""

    def setup(self) -> None:
        stack: list[Tensor] = []
        self.layer.register_forward_pre_hook(
            lambda module, args, kwargs: stack.append(kwargs["input"]), with_kwargs=True
        )
        self.layer.register_forward_hook(lambda module, args, output: output + stack.pop())

    def left(self) -> Tensor:
        return torch.ones(())


class BackwardHooks(Hooked):
    def setup(self) -> None:
        counts = self.counts = [0]
        seen = self.seen = {}

        def before(module: nn.Module, grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            counts[0] += 1
            return (grads[0] * 2,)

        self.layer.register_full_backward_pre_hook(before)
        self.layer.register_full_backward_hook(lambda module, into, out: seen.update(g=out[0].detach()))

    def left(self) -> Tensor:
        return torch.ones(())


class OnAContainer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
        kept = self.kept = []
        for child in self.inner:
            child.register_forward_hook(lambda module, args, output: kept.append(output))
        self.inner.register_forward_hook(lambda module, args, output: output + sum(kept))

    def forward(self, x: Tensor) -> Tensor:
        self.kept.clear()
        y: Tensor = self.inner(x)
        return y


class FunctionInAnAttribute(OverDict):
    def setup(self) -> None:
        kept = self.kept = {}
        self.note = lambda value: kept.update(y=value)

    def forward(self, x: Tensor) -> Tensor:
        self.note(self.layer(x))
        y: Tensor = self.last(self.left())
        return y


HOSTS = [
    OverDict, OverList, OverDeque, OverNestedDict, OverPartial, OverPartialOfMethod, OverDefault, OverKeywordDefault,
    BoundMethod, MadeByAFunction, CallableObject, HeldObject, OverNamespace, PreHookWithKeywords, ChangesItsOutput,
    OverABuffer, OverAParameter, PairOfHooks, BackwardHooks, OnAContainer, FunctionInAnAttribute,
]  # fmt: skip


def made(kind: type[nn.Module], ran: bool) -> nn.Module:
    """Equal hosts at each call; `ran`: with what a training step leaves behind."""
    torch.manual_seed(0)
    host = kind()
    if ran:
        host(torch.ones(2, 4, requires_grad=True)).sum().backward()
        host.zero_grad()
    return host


def state(host: nn.Module) -> list[object]:
    """What the host's attributes hold, two levels deep: identities of tensors with their versions, and scalars."""

    def mark(value: Any, depth: int = 0) -> object:
        if isinstance(value, Tensor):
            return id(value), value._version
        if isinstance(value, dict) and depth < 3:
            return [(key, mark(item, depth + 1)) for key, item in value.items()]
        if isinstance(value, list | deque) and depth < 3:
            return [mark(item, depth + 1) for item in value]
        if isinstance(value, Recorder | types.SimpleNamespace):
            return mark(vars(value), depth + 1)
        return value if isinstance(value, int | str | None) else id(value)

    return [mark(vars(module)) for module in host.modules()]


def compiled(host: nn.Module, share: bool = True) -> nn.Module:
    return morphc.compile(host, (torch.randn(3, 4),), config=Config(seeds_per_layer=2, slots=1), share=share)


@pytest.mark.parametrize("share", [True, False], ids=["shared", "copied"])
@pytest.mark.parametrize("ran", [False, True], ids=["fresh", "after_a_run"])
@pytest.mark.parametrize("kind", HOSTS, ids=lambda kind: kind.__name__)
class TestAHostWithHooksOfItsOwn:
    def test_computes_what_it_computed(self, kind: type[nn.Module], ran: bool, share: bool) -> None:
        model, host = compiled(made(kind, ran), share), made(kind, ran)
        assert len(morphc.seeds(model).sites) == 2
        assert not morphc.report(model).warnings
        for training in (True, False):
            for module in (model, host):
                module.train(training)
                module.zero_grad()
            for _ in range(2):
                x = torch.randn(3, 4, requires_grad=True)
                got, expected = model(x), host(x)
                assert same_bits(got, expected)
                got.sum().backward()
                expected.sum().backward()
            grads = {name: parameter.grad for name, parameter in model.named_parameters()}
            for name, parameter in host.named_parameters():
                assert parameter.grad is not None
                assert same_bits(grads[name], parameter.grad), name

    def test_is_left_as_it_was(self, kind: type[nn.Module], ran: bool, share: bool) -> None:
        host = made(kind, ran)
        before = state(host)
        compiled(host, share)
        assert state(host) == before

    def test_folds_and_detaches(self, kind: type[nn.Module], ran: bool, share: bool) -> None:
        model, host = compiled(made(kind, ran), share), made(kind, ran)
        plain, folded = morphc.detach(model), morphc.fold(model)
        for module in (host, plain):
            module.eval()
        x = torch.randn(3, 4)
        assert same_bits(plain(x), host(x))
        assert same_bits(folded.eval()(x), host(x))


@pytest.mark.parametrize(
    "kind", [OverDict, OverPartial, MadeByAFunction, OverDeque, HeldObject, OverNamespace]
)
def test_the_model_leaves_values_with_itself(kind: type[nn.Module]) -> None:
    host = made(kind, ran=True)
    model = compiled(host)
    before = state(host)
    model(torch.randn(3, 4))
    assert state(host) == before


def test_saved_and_loaded(tmp_path: Any) -> None:
    model = compiled(made(OverDict, ran=True)).eval()
    morphc.save(model, tmp_path)
    loaded = morphc.load(made(OverDict, ran=False), tmp_path).eval()
    x = torch.randn(3, 4)
    assert same_bits(loaded(x), model(x))


def test_a_handle_removes_the_hook_of_its_own_module() -> None:
    class Removable(OverDict):
        def setup(self) -> None:
            kept = self.kept = {}
            self.handle = self.layer.register_forward_hook(lambda module, args, output: kept.update(y=output))

    host = made(Removable, ran=False)
    model: Any = compiled(host)
    model.handle.remove()
    assert not model.layer._forward_hooks
    assert len(host.layer._forward_hooks) == 1


def test_a_forward_that_removes_its_hook_leaves_the_hosts() -> None:
    class Once(OverDict):
        def setup(self) -> None:
            kept = self.kept = {}

            def hook(module: nn.Module, args: object, output: Tensor) -> None:
                kept["y"] = output.detach()
                self.handle.remove()

            self.handle = self.layer.register_forward_hook(hook)

    host: Any = made(Once, ran=False)
    model: Any = compiled(host)
    assert len(host.layer._forward_hooks) == 1
    x = torch.randn(3, 4)
    assert same_bits(model(x), host(x))
    assert not model.layer._forward_hooks


def test_a_hook_of_the_users_sees_no_run_of_the_compilers_and_keeps_its_own_list() -> None:
    seen: list[Tensor] = []
    host = made(OverDict, ran=False)
    host.layer.register_forward_hook(
        functools.partial(lambda store, module, args, output: store.append(output), seen)
    )
    model = compiled(host)
    assert not seen
    model(torch.randn(3, 4))
    assert len(seen) == 1


def test_a_hook_over_the_host_that_a_stranger_made_is_named_and_writes_nothing() -> None:
    def writer(host: Any) -> Callable[..., None]:
        def hook(module: nn.Module, args: object, output: Tensor) -> None:
            host.kept = output

        return hook

    class Written(OverDict):
        def setup(self) -> None:
            self.layer.register_forward_hook(writer(self))

        def left(self) -> Tensor:
            y: Tensor = self.kept
            return y

    host = made(Written, ran=False)
    with pytest.raises(
        morphc.errors.HostForwardError, match=r"writer.<locals>.hook on 'layer' was made outside"
    ):
        compiled(host)
    assert not hasattr(host, "kept")
