"""Whether a gradient that autograd hands to a backward may be written by it: where nobody else will ever read it.

torch's own engine adds up gradients in place on the same condition: one tensor on the storage, and one hold on the
tensor. Seen from Python there are more holds, those of the calls on the way. How many depends on the versions of Python
and torch, so they are counted once, in backwards of which it is known whether the gradient is shared. While Dynamo
looks at frames, or where an error left it doing so, each call holds more: then no gradient is taken for nobody else's.
"""

from __future__ import annotations

import sys
import threading
from typing import Any, NamedTuple

import torch
from torch import Tensor

Holds = tuple[int, int, int, int, int]


class Counted(NamedTuple):
    """The holds of calls when they were counted.

    alone: on a gradient that nobody else has, and on one that is a view of what nobody else has; None where a shared
    one can't be told from these. calls: on an object that went through a call.
    """

    alone: tuple[Holds, Holds] | None
    calls: int


_counted: Counted | None = None


def nobody_else_has(grad: Tensor) -> bool:
    """To be called with what a backward was given, and from there: a wrapper around it holds the gradient too."""
    global _counted
    if type(grad) is not Tensor or grad.requires_grad:
        return False
    known, calls = _counted, _calls()
    if known is None or calls < known.calls:
        known = _counted = _count()
    if known.alone is None or calls != known.calls:
        return False
    return _within(_holds(grad), known.alone[grad._is_view()])


def _calls() -> int:
    return _references(object())


def _references(marker: object) -> int:
    return sys.getrefcount(marker)


def _holds(grad: Tensor) -> Holds:
    """Python's references to the object, all to the tensor, all to its storage, and the first two of its base."""
    storage = grad.untyped_storage()
    base = grad._base
    return (
        sys.getrefcount(grad),
        grad._use_count(),  # type: ignore[attr-defined]
        torch._C._storage_Use_Count(storage._cdata),
        0 if base is None else sys.getrefcount(base),
        0 if base is None else base._use_count(),  # type: ignore[attr-defined]
    )


def _within(held: Holds, most: Holds) -> bool:
    return all(one <= other for one, other in zip(held, most, strict=True))


class _Probe(torch.autograd.Function):
    """Passes its gradient on, and notes how it is held."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seen: list[Holds]) -> Tensor:
        ctx.mark_dirty(x)
        ctx.seen = seen
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        _note(ctx.seen, grad)
        return grad, None


def _note(seen: list[Holds], grad: Tensor) -> None:
    # As many calls deep as `nobody_else_has`.
    seen.append(_holds(grad))


def _count() -> Counted:
    found: list[Counted] = []

    def count() -> None:
        before = _calls()
        alone = _alone()
        # Somebody may have begun to compile meanwhile, and every count be of another kind.
        found.append(Counted(alone if _calls() == before else None, before))

    # No transform, mode or hook that the caller is in holds for a new thread.
    thread = threading.Thread(target=count, name="morphc-ownership")
    thread.start()
    thread.join()
    return found[0] if found else Counted(None, _calls())


def _alone() -> tuple[Holds, Holds] | None:
    if not hasattr(Tensor, "_use_count") or not hasattr(torch._C, "_storage_Use_Count"):
        return None
    fresh: list[Holds] = []
    viewed: list[Holds] = []
    for _ in range(2):
        (_probed(fresh) * 2.0).sum().backward()  # type: ignore[no-untyped-call]
        (_probed(viewed).view(3, 1) * 2.0).sum().backward()  # type: ignore[no-untyped-call]
    shared = [_of_a_sum(), _of_a_hook(), _of_a_caller(), _of_a_capture()]
    views = [_of_a_view(), _of_a_viewed_sum(), _of_a_viewed_hook()]
    clear = fresh[0] == fresh[1] and viewed[0] == viewed[1]
    if (
        not clear
        or any(_within(each, fresh[0]) for each in shared)
        or any(_within(each, viewed[0]) for each in views)
    ):
        return None
    return fresh[0], viewed[0]


def _probed(seen: list[Holds], leaf: Tensor | None = None) -> Tensor:
    leaf = torch.zeros(3, device="cpu", requires_grad=True) if leaf is None else leaf
    passed: Tensor = _Probe.apply(leaf * 1.0, seen)  # type: ignore[no-untyped-call]
    return passed


def _of_a_sum() -> Holds:
    """Two branches get one tensor; the first to see it isn't alone."""
    seen: list[Holds] = []
    ((_probed(seen) + _probed(seen)) * 2.0).sum().backward()  # type: ignore[no-untyped-call]
    return seen[0]


def _of_a_hook() -> Holds:
    """Somebody's hook keeps it."""
    seen: list[Holds] = []
    kept: list[Tensor] = []
    out = _probed(seen)
    out.register_hook(kept.append)  # type: ignore[no-untyped-call]
    (out * 2.0).sum().backward()  # type: ignore[no-untyped-call]
    return seen[0]


def _of_a_caller() -> Holds:
    """The caller of `backward` made it."""
    seen: list[Holds] = []
    given = torch.ones(3, device="cpu")
    _probed(seen).backward(given)  # type: ignore[no-untyped-call]
    return seen[0]


def _of_a_capture() -> Holds:
    """`torch.autograd.grad` was asked for it."""
    seen: list[Holds] = []
    leaf = torch.zeros(3, device="cpu", requires_grad=True)
    out = _probed(seen, leaf)
    torch.autograd.grad((out * 2.0).sum(), [out, leaf])
    return seen[0]


def _of_a_view() -> Holds:
    """Its storage is somebody else's as well."""
    seen: list[Holds] = []
    given = torch.ones(6, device="cpu")
    _probed(seen).backward(given[:3])  # type: ignore[no-untyped-call]
    return seen[0]


def _of_a_viewed_sum() -> Holds:
    """Its base goes to two branches."""
    seen: list[Holds] = []
    ((_probed(seen).view(3, 1) + _probed(seen).view(3, 1)) * 2.0).sum().backward()  # type: ignore[no-untyped-call]
    return seen[0]


def _of_a_viewed_hook() -> Holds:
    """Somebody's hook keeps its base."""
    seen: list[Holds] = []
    kept: list[Tensor] = []
    out = _probed(seen).view(3, 1)
    out.register_hook(kept.append)  # type: ignore[no-untyped-call]
    (out * 2.0).sum().backward()  # type: ignore[no-untyped-call]
    return seen[0]
