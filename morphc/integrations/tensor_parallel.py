"""Tensor parallelism: torch's plans shard the host's layers, and leave the slots to every rank."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from morphc.runtime.store import CHILD, store_of


@contextmanager
def slots_aside(model: nn.Module) -> Iterator[None]:
    """Inside, a compiled model's layers have no slots among their children, so that nobody shards those.

    with slots_aside(model):
        parallelize_module(model, mesh, {"fc1": ColwiseParallel(), "fc2": RowwiseParallel()})

    A site whose layer's output is sharded gathers it where one of its seeds is at work or telemetry is due, and
    computes on every rank alike. Raises NotMorphedError.
    """
    store_of(model)
    aside: list[tuple[nn.Module, nn.Module]] = []
    for module in list(model.modules()):
        child = module._modules.get(CHILD)
        if child is not None:
            aside.append((module, child))
    for module, _ in aside:
        del module._modules[CHILD]
    try:
        yield
    finally:
        for module, child in aside:
            module._modules[CHILD] = child
