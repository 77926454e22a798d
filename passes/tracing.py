"""Plain symbolic tracing of one module's own forward: the only graphs that may run in its place.

A region is *rewritten* when fx traces it without a single value: no shape, no branch on a tensor. Arguments that
the example left at their defaults are bound to those defaults, and the graph's caller remembers it: a call that is
made differently runs the module's own forward. `self.training` and plain attributes are burnt in, so each region is
traced in train and in eval mode, and the two graphs are kept apart when they differ.

What a graph can't say is refused: a forward that keeps something (an attribute, a list, a buffer), draws random
numbers outside of a traced call, makes a constant tensor, or switches gradients or autocast within.
"""

from __future__ import annotations

import inspect
import random
import traceback
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from morphc.passes.isolation import held_by, is_proxy, is_users_object
from morphc.passes.program import graph_text
from morphc.passes.recorder import is_leaf
from morphc.passes.sources import boundary, definition, is_users, user_frame


@dataclass
class Traced:
    """The graphs of one region, or why there are none."""

    train: fx.Graph | None
    eval: fx.Graph | None
    reason: str = ""
    source: str = ""
    given: tuple[str, ...] = ()

    @property
    def succeeded(self) -> bool:
        return self.train is not None


class _RegionTracer(fx.Tracer):
    """Children are leaves; every node knows the user's file:line."""

    def __init__(self) -> None:
        super().__init__(param_shapes_constant=False)
        self.record_stack_traces = False
        self.modes = _modes()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _modes() != self.modes:
            raise _Refused(
                "part of it runs under no_grad or autocast, which a graph can't say",
                user_frame(),
            )
        node = super().create_node(*args, **kwargs)
        source = user_frame()
        if source:
            node.meta["source"] = source
        return node


def _modes() -> tuple[bool, ...]:
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
    )


def trace_region(clone: nn.Module, arguments: Mapping[str, bool]) -> Traced:
    """Trace the forward of `clone`, a throwaway clone's module, in train and in eval mode.

    arguments: the arguments that a call gives, and whether each is something else than None.
    """
    if is_leaf(clone):
        return Traced(None, None, "a layer of torch itself")
    try:
        signature = inspect.signature(clone.forward)
    except (TypeError, ValueError) as error:
        return Traced(None, None, f"its forward has no readable signature ({error})", definition(clone))
    concrete: dict[str, Any] = {}
    for name, parameter in signature.parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            stars = "*" if parameter.kind is parameter.VAR_POSITIONAL else "**"
            return Traced(None, None, f"its forward takes {stars}{name}", definition(clone))
        if not arguments.get(name, False):
            if parameter.default is parameter.empty:
                return Traced(None, None, f"argument {name!r} was None in the example", definition(clone))
            concrete[name] = parameter.default
    graphs = []
    flag = clone.training
    try:
        for training in (True, False):
            clone.training = training
            graphs.append(_trace(clone, concrete))
        with torch.set_grad_enabled(not torch.is_grad_enabled()):
            other = _trace(clone, concrete)
        if graph_text(other) != graph_text(graphs[-1]):
            raise _Refused("it asks whether gradients are on", definition(clone))
    except _Refused as refused:
        return Traced(None, None, refused.reason, refused.source)
    finally:
        clone.training = flag
    given = tuple(name for name in signature.parameters if name not in concrete)
    return Traced(graphs[0], graphs[1], given=given)


class _Refused(Exception):
    def __init__(self, reason: str, source: str) -> None:
        super().__init__(reason)
        self.reason, self.source = reason, source


@boundary
def _trace(module: nn.Module, concrete: dict[str, Any]) -> fx.Graph:
    before = dict(vars(module))
    state, numbers = _state(module), _random_state()
    try:
        graph = _RegionTracer().trace(module, concrete_args=concrete or None)
        graph.lint()
        kept = _state(module)
        changed = next((name for name in kept if kept[name] != state.get(name)), "")
        if changed.startswith("_tensor_constant"):
            raise _Refused("it makes a tensor that does not depend on its inputs", definition(module))
        if changed:
            raise _Refused(f"it keeps something in {changed!r}", definition(module))
        if numbers != _random_state():
            raise _Refused("it draws random numbers that no traced call shows", definition(module))
    except _Refused:
        raise
    except Exception as error:  # the module's own code runs on proxies here and may raise anything
        text = str(error).strip().split("\n")[0]
        raise _Refused(_plain_words(type(error).__name__, text), _where(error)) from error
    finally:
        # A forward that keeps something (a cache, a counter) must not keep a proxy.
        for name in set(vars(module)) - set(before):
            del vars(module)[name]
        vars(module).update(before)
    _drop_specialisation(graph, concrete)
    return graph


def _state(module: nn.Module) -> dict[str, object]:
    """Marks of everything that a forward may change in its module."""
    marks: dict[str, object] = {}
    for name, value in vars(module).items():
        if name in ("_parameters", "_buffers"):
            marks.update((key, _mark(tensor)) for key, tensor in value.items())
        elif name != "_modules" and not name.endswith("_hooks"):
            marks[name] = _mark(value)
    return marks


def _mark(value: object, depth: int = 0) -> object:
    if is_proxy(value):
        return id(value)
    if isinstance(value, torch.Tensor):
        return id(value), value._version
    inside: list[object] = []
    if depth < 2:
        if isinstance(value, dict):
            inside = list(value.values())
        elif isinstance(value, list | tuple | set | deque):
            inside = list(value)
        elif is_users_object(value):
            inside = list(held_by(value).values())
    return (id(value), *(_mark(item, depth + 1) for item in inside))


def _random_state() -> tuple[object, ...]:
    state = np.random.get_state(legacy=False)
    generator = (state["state"]["key"].tobytes(), state["state"]["pos"], state["has_gauss"], state["gauss"])
    return random.getstate(), generator, torch.get_rng_state().numpy().tobytes()


def _drop_specialisation(graph: fx.Graph, concrete: dict[str, Any]) -> None:
    """Erase the placeholders of bound arguments and fx's assertions on them: the guard checks the call."""
    doomed: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder":
            if _base_name(node, concrete) in concrete:
                doomed.add(node)
        elif doomed.intersection(node.all_input_nodes):
            doomed.add(node)
    for node in reversed(list(graph.nodes)):
        if node in doomed:
            graph.erase_node(node)


def _base_name(node: fx.Node, concrete: dict[str, Any]) -> str:
    """fx names the leaves of a bound argument `name_1`, `name_2`, ..."""
    target = str(node.target)
    head, _, tail = target.rpartition("_")
    return head if target not in concrete and tail.isdigit() else target


def _plain_words(kind: str, text: str) -> str:
    if "control flow" in text:
        return "a branch depends on a traced value"
    if "can't be iterated" in text or "cannot be iterated" in text or "Proxy object" in text:
        return "it unpacks or iterates over a traced value"
    return f"symbolic tracing stopped with {kind}: {text[:160]}"


def _where(error: BaseException) -> str:
    found = ""
    for frame in traceback.extract_tb(error.__traceback__):
        if is_users(frame.filename):
            found = f"{frame.filename}:{frame.lineno}"
    return found
