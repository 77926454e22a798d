"""Running a host through all its modes and shapes, and keeping everything that can be compared."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .registry import Entry, seed_everything
from .tree import freeze, leaves, loss

Record = dict[str, dict[str, Any]]


def copied(value: Any, requires_grad: bool) -> Any:
    """Fresh tensors (memory format kept), so that a forward that writes into its input spoils nothing."""
    if isinstance(value, Tensor):
        copy = value.clone()
        return copy.requires_grad_() if requires_grad and copy.is_floating_point() else copy
    if isinstance(value, dict):
        return {key: copied(item, requires_grad) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(copied(item, requires_grad) for item in value)
    return value


def rng_state() -> dict[str, Any]:
    """Where the global generators stand."""
    return {
        "torch": torch.get_rng_state(),
        "numpy": str(np.random.get_state()),
        "random": str(random.getstate()),
    }


def run(
    model: nn.Module,
    entry: Entry,
    batch: int,
    length: int,
    names: frozenset[str],
    kept: list[Any] | None = None,
    *,
    backward: bool = True,
) -> Record:
    """One forward and backward under a fixed seed.

    `names` are the host's parameters and buffers: of a compiled model only those are compared. `kept` is the list
    that the host's hooks put things into.
    """
    args, kwargs = entry.inputs(batch, length)
    args, kwargs = copied((args, kwargs), backward and entry.input_grads)
    for parameter in model.parameters():
        parameter.grad = None
    if kept is not None:
        kept.clear()
    seed_everything(1234)
    found = list(leaves(model(*args, **kwargs), "output"))
    record: Record = {"outputs": freeze(dict(found))}
    if backward:
        objective = loss(found)
        if objective is not None:
            objective.backward()
    record["gradients"] = {
        name: value
        for name, parameter in model.named_parameters()
        if name in names
        for value in (freeze(parameter.grad)[""],)
    }
    record["inputs"] = freeze((args, kwargs))
    record["input gradients"] = freeze([leaf.grad for _, leaf in leaves((args, kwargs)) if is_leaf(leaf)])
    record["buffers"] = {name: freeze(buffer)[""] for name, buffer in model.named_buffers() if name in names}
    record["what hooks saw"] = freeze(kept)
    record["RNG state"] = freeze(rng_state())
    return record


def is_leaf(value: Any) -> bool:
    """An input that may carry a gradient."""
    return isinstance(value, Tensor) and value.is_leaf


def kept_by(host: nn.Module) -> list[Any] | None:
    """The list that the hooks of this host close over, if it has any."""
    return vars(host).get("kept")


def tensor_names(model: nn.Module) -> frozenset[str]:
    """Names of all parameters and buffers."""
    return frozenset(
        [name for name, _ in model.named_parameters()] + [name for name, _ in model.named_buffers()]
    )


def schedule(entry: Entry) -> Iterator[tuple[str, str, tuple[int, int], bool]]:
    """`(label, mode, (batch, length), backward)` of every run, in order."""
    for mode in entry.modes:
        for label, shape in entry.shapes().items():
            yield f"{mode}, {label}", mode, shape, True
    last = "as_built" if entry.modes == ("as_built",) else "eval"
    yield "eval under no_grad", last, (entry.batch, entry.length), False


def trace(
    model: nn.Module, entry: Entry, names: frozenset[str], kept: list[Any] | None = None
) -> dict[str, Record]:
    """Run the whole schedule; equal hosts give equal traces, buffers evolving in step."""
    records: dict[str, Record] = {}
    for label, mode, (batch, length), backward in schedule(entry):
        if mode != "as_built":
            model.train(mode == "train")
        if backward:
            records[label] = run(model, entry, batch, length, names, kept)
        else:
            with torch.no_grad():
                records[label] = run(model, entry, batch, length, names, kept, backward=False)
    return records
