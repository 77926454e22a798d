"""Memory that outlives a CUDA graph, or a block of inference.

What is made in `torch.inference_mode` is of no use to a later backward. And while torch warms a CUDA graph up or
captures it, what the thread allocates comes from the graph's own pool, and torch refuses what is still held there
afterwards. What a site keeps between calls is therefore made outside of inference, and allocated by another thread, to
which the pool does not belong.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")
_depth = threading.local()


@contextmanager
def in_graph() -> Iterator[None]:
    """Around what an op of a compiled graph does."""
    before = getattr(_depth, "inside", False)
    _depth.inside = True
    try:
        yield
    finally:
        _depth.inside = before


def lasting(make: Callable[[], T], device: torch.device) -> T:
    """What `make` returns, in memory that belongs to no graph, and of use to a later backward."""
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False), torch.no_grad():
            return lasting(make, device)
    if device.type != "cuda" or not getattr(_depth, "inside", False):
        return make()

    def run() -> T:
        with torch.cuda.device(device), torch.no_grad():
            made = make()
            # Another thread has another current stream: done before the caller's goes on.
            torch.cuda.current_stream().synchronize()
            return made

    with ThreadPoolExecutor(1) as other:
        return other.submit(run).result()
