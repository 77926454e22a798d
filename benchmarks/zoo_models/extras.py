"""Checks beyond forward and backward: copies, pickles, the way back, and transformers' own methods."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import torch
from torch import nn

from . import compiler
from .registry import Entry, seed_everything
from .runs import copied
from .tree import differences, freeze

Guard = Callable[[str], AbstractContextManager[None]]


def evaluated(model: nn.Module, entry: Entry) -> dict[str, Any]:
    """Outputs in eval mode under no_grad, with a fixed seed."""
    if entry.modes != ("as_built",):
        model.eval()
    args, kwargs = copied(entry.inputs(entry.batch, entry.length), False)
    seed_everything(7)
    with torch.no_grad():
        return freeze(model(*args, **kwargs))


def same(expected: dict[str, Any], got: dict[str, Any]) -> None:
    """Raise AssertionError naming the first difference."""
    gaps = differences(expected, got)
    if gaps:
        raise AssertionError(gaps[0] + (f" (+{len(gaps) - 1})" if gaps[1:] else ""))


@contextlib.contextmanager
def fused_calls() -> Iterator[list[str]]:
    """Names of the fused transformer kernels that run inside."""
    calls: list[str] = []
    with contextlib.ExitStack() as stack:
        for name in ("_transformer_encoder_layer_fwd", "_native_multi_head_attention"):
            inner = getattr(torch, name)
            counted = counting(inner, name, calls)
            stack.enter_context(mock.patch.object(torch, name, counted))
        yield calls


def counting(inner: Callable[..., Any], name: str, calls: list[str]) -> Callable[..., Any]:
    """`inner`, noting its name each time."""

    def call(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return inner(*args, **kwargs)

    return call


def generated(model: nn.Module, entry: Entry) -> dict[str, Any]:
    """Greedy and sampled tokens of transformers' `generate`."""
    model.eval()
    _, kwargs = entry.inputs(entry.batch, entry.length)
    prompt = {key: value for key, value in kwargs.items() if key in ("input_ids", "attention_mask")}
    greedy = model.generate(**prompt, max_new_tokens=4, do_sample=False)
    seed_everything(5)
    sampled = model.generate(**prompt, max_new_tokens=4, do_sample=True, top_k=20)
    return freeze({"greedy": greedy, "sampled": sampled})


def reloaded(model: nn.Module, entry: Entry) -> dict[str, Any]:
    """`save_pretrained`, then what the class's `from_pretrained` makes of it."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = type(model).from_pretrained(folder)
    return evaluated(again, entry)


def through_pickle(model: nn.Module) -> nn.Module:
    """Pickled whole and read back."""
    return pickle.loads(pickle.dumps(model))


def through_torch_save(model: nn.Module) -> nn.Module:
    """`torch.save` of the whole module, and `torch.load`."""
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": through_pickle,
    "torch.save": through_torch_save,
}
EXTRAS: dict[str, Callable[[nn.Module, Entry], dict[str, Any]]] = {
    "generate": generated,
    "save_pretrained": reloaded,
}


def can(host: nn.Module, entry: Entry, way: Callable[[nn.Module], nn.Module]) -> bool:
    """Whether the plain host itself survives this kind of copy, unchanged."""
    try:
        copied_host = way(host)
        return not differences(evaluated(host, entry), evaluated(copied_host, entry))
    except Exception:  # the host's own limit (a lock, a lambda, a closure): then there is nothing to compare
        return False


def check_host(entry: Entry) -> None:
    """The extras work on the plain host, so that a failure afterwards is morphc's."""
    for name in entry.extras:
        if name == "fast_path":
            with fused_calls() as calls:
                evaluated(entry.build(), entry)
            if not calls:
                raise AssertionError("the plain host doesn't take the fast path")
            continue
        first = EXTRAS[name](entry.build(), entry)
        same(first, EXTRAS[name](entry.build(), entry))
        if name == "save_pretrained":
            same(evaluated(entry.build(), entry), first)


def check_compiled(entry: Entry, model: nn.Module, guard: Guard) -> None:
    """The same of the compiled model. Its buffers were moved by earlier runs, so a host is brought level."""
    host = entry.build()
    host.load_state_dict(model.state_dict(), strict=False)
    expected = evaluated(host, entry)
    for name, way in COPIES.items():
        if can(host, entry, way):
            with guard(name):
                same(expected, evaluated(way(model), entry))
    for name in entry.extras:
        with guard(name):
            if name == "fast_path":
                with fused_calls() as wanted:
                    outputs = evaluated(host, entry)
                with fused_calls() as calls:
                    same(outputs, evaluated(model, entry))
                if calls != wanted:
                    raise AssertionError(f"the fast path ran {len(wanted)} fused kernels, now {len(calls)}")
            else:
                same(EXTRAS[name](host, entry), EXTRAS[name](model, entry))
    with guard("detach"):
        plain = compiler.load().detach(model)
        left = [key for key in plain.state_dict() if "morphc" in key.split(".")]
        if left or type(plain) is not type(model):
            raise AssertionError(f"detach left {left[:3]}, class {type(plain).__name__}")
        same(expected, evaluated(plain, entry))
