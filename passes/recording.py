"""One run of the model, watched: every torch call and every module call, as a graph per region and one flow.

The run happens on a throwaway clone: on real tensors where the model is small or values decide its control flow,
else under FakeTensorMode (no memory, no arithmetic). A TorchFunctionMode sees each torch call with the values that it
got, so `b, s, d = x.shape` and `if mask is not None` need no support: by then they are plain Python. What is
recorded has shapes and branches burnt in and is for reading, never for running.

Two views of the same run:
- `Region.graph`: an fx graph of one module's own forward, its children kept as `call_module`;
- `Recording.flow`: a networkx graph of all calls across regions (leaf layers and torch functions), an edge
  for each tensor that goes from one to the other.
"""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import networkx as nx
import torch
from torch import nn
from torch.utils._pytree import tree_map

from morphc.passes.clone import clone_tree
from morphc.passes.isolation import KeptParameters, private_copy
from morphc.passes.quiet import (
    cuda_devices,
    deeper_stack,
    isolated,
    no_torchscript,
    own_state,
    quiet_log,
    quiet_state,
)
from morphc.passes.recorder import Layer, Recorder, Region, tensor_leaves
from morphc.passes.sources import boundary, describe_error

_SMALL_BYTES = 64 << 20


@dataclass
class Recording:
    """All that was seen. `how` is "fake", "real" or "" when no run succeeded, with `error` saying why.

    `fallback_reason`: why not a better kind of run. `unseen`: what is to say of a module that the run didn't show.
    """

    how: str
    regions: dict[str, Region]
    layers: dict[str, Layer]
    flow: nx.DiGraph
    error: str = ""
    error_source: str = ""
    fallback_reason: str = ""

    @property
    def unseen(self) -> str:
        # Whatever was watched has shown its root at least.
        return "the example input never reached it" if self.layers else self.fallback_reason


def record(
    host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, allow_real: bool = True
) -> Recording:
    """Run `host` once on the example, watched. Nothing of the host changes; a failure is part of the answer.

    A host whose calls are nested too deeply to be watched, but not to run, gives a recording with nothing in it.
    """
    found = _recorded(host, args, kwargs, allow_real)
    if found.error.startswith("RecursionError") and not _on_meta(host):
        alone = _attempt(host, args, kwargs, fake=False, hooks=True, gradients=True, watched=False)
        if not alone.error:
            alone.fallback_reason = "the calls of this model are nested too deeply to be watched"
            return alone
    return found


def _recorded(host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], allow_real: bool) -> Recording:
    if allow_real and _is_small(host, args, kwargs):
        return _real(host, args, kwargs)
    first = _attempt(host, args, kwargs, fake=True, hooks=False)
    if not first.error or not allow_real or _on_meta(host):
        return first
    second = _real(host, args, kwargs)
    second.fallback_reason = first.error
    return second


def _real(host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Recording:
    """On real tensors. A forward may take gradients itself, or need its hooks: both only where it fails without."""
    found = _attempt(host, args, kwargs, fake=False, hooks=False)
    for hooks in (False, True):
        if found.error:
            found = _attempt(host, args, kwargs, fake=False, hooks=hooks, gradients=True)
    return found


def _is_small(host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a real run costs less than fake tensors, whose first use in a process imports for over a second."""
    leaves = [x for x in tensor_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    held = [*host.parameters(), *host.buffers(), *leaves]
    if any(tensor.device.type == "meta" for tensor in held):
        return False
    return sum(tensor.numel() * tensor.element_size() for tensor in held) <= _SMALL_BYTES


def _on_meta(host: nn.Module) -> bool:
    return any(p.device.type == "meta" for p in host.parameters())


@contextmanager
def _module_calls(recorder: Recorder) -> Iterator[None]:
    """Send `nn.Module.__call__` through the recorder. fx patches the same attribute to see module calls."""
    original = nn.Module.__call__

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return recorder.call(module, types.MethodType(original, module), args, kwargs)

    nn.Module.__call__ = call  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.__call__ = original  # type: ignore[method-assign]


@boundary
def _attempt(
    host: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    fake: bool,
    hooks: bool,
    gradients: bool = False,
    watched: bool = True,
) -> Recording:
    clone = clone_tree(host)
    # Also under fake tensors: an in-place update of a real buffer of one number is carried out on it.
    own_state(clone, everyones_hooks=hooks)
    recorder = Recorder(clone)
    parameters = KeptParameters(*([] if fake else [clone]))
    error = source = ""
    with ExitStack() as stack:
        stack.enter_context(quiet_state(clone, training=False))
        stack.enter_context(torch.set_grad_enabled(gradients))
        stack.enter_context(deeper_stack())
        if hooks:
            # A hook of the user's that is over the host writes there, also when the clone runs.
            stack.enter_context(isolated(host, training=False, keep_hooks=True))
        # What the model warns of in this run is no news to whoever runs it.
        stack.enter_context(warnings.catch_warnings(action="ignore"))
        if fake:
            stack.enter_context(quiet_log("torch._subclasses.fake_tensor"))
            if cuda_devices(host):
                stack.enter_context(no_torchscript())
            from torch._subclasses.fake_tensor import FakeTensorMode  # imports torch._dynamo: over a second

            mode = FakeTensorMode(allow_non_fake_inputs=True)
            stack.enter_context(mode)
            own: Callable[[torch.Tensor], torch.Tensor] = mode.from_tensor
        else:
            own = torch.clone
        memo: dict[int, Any] = {}
        args, kwargs = tree_map(
            lambda x: own(x) if isinstance(x, torch.Tensor) else private_copy(x, memo), (args, kwargs)
        )
        if watched:
            stack.enter_context(recorder)
            stack.enter_context(_module_calls(recorder))
        try:
            clone(*args, **kwargs)
        except Exception as raised:  # whatever the model's own code raises: the caller decides what it means
            error, source = describe_error(raised)
    parameters.restore()
    how = "" if error else ("fake" if fake else "real")
    return Recording(how, recorder.regions, recorder.layers, recorder.flow, error, source)
