"""A backward writes the gradient that it got only where nobody else will read it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch._C._dynamo.eval_frame import set_eval_frame
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from morphc.runtime import ownership


@pytest.fixture(autouse=True)
def no_frames_of_dynamo() -> Iterator[None]:
    """An error while Dynamo traces a transform leaves it looking at frames, and another test may have had one."""
    before = set_eval_frame(None)
    yield
    set_eval_frame(before)


class Scribble(torch.autograd.Function):
    """Passes its gradient on, and spoils it where it believes itself alone."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, told: list[bool]) -> torch.Tensor:
        ctx.mark_dirty(x)
        ctx.told = told
        return x

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        alone = ownership.nobody_else_has(grad)
        ctx.told.append(alone)
        passed = grad.clone()
        if alone:
            grad.fill_(float("nan"))
        return passed, None


def scribbled(told: list[bool], leaf: torch.Tensor | None = None) -> torch.Tensor:
    leaf = torch.ones(3, requires_grad=True) if leaf is None else leaf
    return Scribble.apply(leaf * 1.0, told)


def test_a_fresh_gradient_is_its_own():
    told: list[bool] = []
    leaf = torch.ones(3, requires_grad=True)
    (scribbled(told, leaf) * 2.0).sum().backward()
    scribbled(told, leaf).relu().sum().backward()
    nn.functional.layer_norm(scribbled(told, leaf), (3,)).square().sum().backward()
    assert told == [True] * 3
    assert leaf.grad.isfinite().all()


def test_a_view_of_a_fresh_gradient_is_its_own():
    told: list[bool] = []
    leaf = torch.ones(3, requires_grad=True)
    (scribbled(told, leaf).view(3, 1) * 2.0).sum().backward()
    (scribbled(told, leaf).reshape(1, 3).unsqueeze(0) * 2.0).sum().backward()
    assert told == [True] * 2
    assert torch.equal(leaf.grad, torch.full((3,), 4.0))


def test_a_view_of_what_somebody_else_reads():
    kept: list[torch.Tensor] = []
    told: list[bool] = []
    one, other = (torch.ones(3, requires_grad=True) for _ in range(2))
    ((scribbled(told, one).view(3, 1) + scribbled(told, other).view(3, 1)) * 2.0).sum().backward()
    assert told[0] is False
    assert torch.equal(one.grad, torch.full((3,), 2.0))
    assert torch.equal(other.grad, torch.full((3,), 2.0))
    wide = scribbled(told).view(3, 1)
    wide.register_hook(kept.append)
    (wide * 2.0).sum().backward()
    given = torch.full((3, 1), 2.0)
    scribbled(told).view(3, 1).backward(given)
    assert told[-2:] == [False, False]
    assert torch.equal(kept[0], given)
    assert torch.equal(given, torch.full((3, 1), 2.0))


def test_parts_of_one_gradient_are_written_apart():
    told: list[bool] = []
    leaves = [torch.ones(3, requires_grad=True) for _ in range(3)]
    (torch.cat([scribbled(told, leaf) for leaf in leaves]) * torch.arange(9.0)).sum().backward()
    assert torch.equal(torch.stack([leaf.grad for leaf in leaves]), torch.arange(9.0).view(3, 3))


def test_two_branches_of_a_sum():
    told: list[bool] = []
    one, other = (torch.ones(3, requires_grad=True) for _ in range(2))
    ((scribbled(told, one) + scribbled(told, other)) * 2.0).sum().backward()
    assert told[0] is False
    assert torch.equal(one.grad, torch.full((3,), 2.0))
    assert torch.equal(other.grad, torch.full((3,), 2.0))


def test_a_sum_with_a_leaf_and_one_with_a_branch_before_it():
    for before in (False, True):
        told: list[bool] = []
        leaf = torch.ones(3, requires_grad=True)
        out = scribbled(told)
        total = leaf + out if before else out + leaf
        (total * 2.0).sum().backward()
        assert torch.equal(leaf.grad, torch.full((3,), 2.0))


def test_what_hooks_captures_and_callers_have():
    told: list[bool] = []
    kept: list[torch.Tensor] = []
    out = scribbled(told)
    out.register_hook(kept.append)
    (out * 2.0).sum().backward()
    leaf = torch.ones(3, requires_grad=True)
    out = scribbled(told, leaf)
    captured, _ = torch.autograd.grad((out * 2.0).sum(), [out, leaf])
    given = torch.full((3,), 2.0)
    scribbled(told).backward(given)
    wide = torch.full((6,), 2.0)
    scribbled(told).backward(wide[:3])
    assert told == [False] * 4
    for tensor in (*kept, captured, given, wide):
        assert torch.equal(tensor, torch.full_like(tensor, 2.0))


def test_a_retained_gradient_stays():
    told: list[bool] = []
    out = scribbled(told)
    out.retain_grad()
    (out * 2.0).sum().backward()
    assert torch.equal(out.grad, torch.full((3,), 2.0))


def test_module_hooks_see_what_came():
    told: list[bool] = []
    seen: list[torch.Tensor] = []

    class Layer(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return scribbled(told, x)

    layer = Layer()
    layer.register_full_backward_hook(lambda module, given, got: seen.extend((*given, *got)))
    layer.register_full_backward_pre_hook(lambda module, got: seen.extend(got))
    (layer(torch.ones(3, requires_grad=True)).clone() * 2.0).sum().backward()
    assert len(seen) == 3
    assert all(torch.equal(tensor, torch.full((3,), 2.0)) for tensor in seen)


def test_an_expanded_gradient_is_not_written():
    told: list[bool] = []
    leaf = torch.ones(3, requires_grad=True)
    scribbled(told, leaf).sum().backward()
    assert told == [False]
    assert torch.equal(leaf.grad, torch.ones(3))


def test_a_torch_that_does_not_tell_never_owns(monkeypatch):
    monkeypatch.delattr(torch._C, "_storage_Use_Count")
    monkeypatch.setattr(ownership, "_counted", None)
    told: list[bool] = []
    (scribbled(told) * 2.0).sum().backward()
    assert told == [False]


def test_what_the_first_caller_is_in_does_not_count(monkeypatch):
    """Modes, hooks and inference: all counts are those of a plain backward."""
    expected = ownership._count()
    assert expected.alone is not None
    for within in (
        torch.no_grad(),
        torch.inference_mode(),
        torch.autograd.graph.save_on_cpu(),
        FakeTensorMode(),
        FlopCounterMode(display=False),
        torch.device("meta"),
    ):
        with within:
            assert ownership._count() == expected


@pytest.mark.parametrize("first", [False, True])
def test_while_dynamo_looks_at_frames_no_gradient_is_its_own(monkeypatch, first):
    """Its frames hold what they are called with once more, and calls as well; whether it is counted then or not."""
    monkeypatch.setattr(ownership, "_counted", None)
    told: list[bool] = []
    leaf = torch.ones(3, requires_grad=True)
    if not first:
        (scribbled(told, leaf) * 2.0).sum().backward()

    @torch.compile(backend="eager")
    def broken(leaf: torch.Tensor) -> None:
        torch._dynamo.graph_break()
        given = torch.full((3,), 2.0)
        scribbled(told, leaf).backward(given)
        assert torch.equal(given, torch.full((3,), 2.0))

    broken(leaf)
    (scribbled(told, leaf) * 2.0).sum().backward()
    given = torch.full((3,), 2.0)
    scribbled(told, leaf).backward(given)
    assert told == [True] * (not first) + [False, True, False]
    assert torch.equal(given, torch.full((3,), 2.0))
