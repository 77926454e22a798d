"""Forwards that run in place of a module's own: a rewritten graph, or the own forward with its calls watched.

Both are plain picklable callables set as the instance attribute `forward`, so the module keeps its class.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from types import CodeType
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn
from torch.fx.graph_module import _format_import_block, _forward_from_src
from torch.overrides import TorchFunctionMode
from torch.package.importer import sys_importer

if TYPE_CHECKING:
    from morphc.runtime.site import SeedSite


_SCALARS = (bool, int, float, complex, str, type(None))
# Attributes of every nn.Module that change without the forward's noticing.
_MODULES_OWN = frozenset(vars(nn.Module()))


class RegionForward:
    """The instance attribute `forward` of a region's module, in place of the forward that was there before."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.previous = vars(module).get("forward")

    @property
    def __code__(self) -> CodeType:
        """Of the forward that is wrapped: exporters ask for the names and lines of a forward's code."""
        code: CodeType = inspect.unwrap(self._own()).__code__
        return code

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._own())

    def _own(self) -> Callable[..., Any]:
        own: Callable[..., Any] = self.previous or type(self.module).forward.__get__(self.module)
        return own

    def _lead_hidden_sites(self) -> None:
        """Sites of a root that hides them from its `modules()` don't hear of `train()` and `eval()`."""
        holder = vars(self.module).get("morphc")
        if holder is not None and holder.training != self.module.training:
            holder.train(self.module.training)


class RewrittenForward(RegionForward):
    """Runs a region's graph: one for train, one for eval.

    The graph was traced with the arguments `given` and with what the module's attributes, and the objects in them,
    held of numbers, flags and strings: `burnt_in`. A call made in any other way, or after one of those was changed,
    runs the forward that was there before.
    """

    def __init__(self, module: nn.Module, graphs: Mapping[str, fx.Graph], given: tuple[str, ...]) -> None:
        super().__init__(module)
        self.given = given
        # An argument that the example left out may stand before one that it gave: positions end there.
        self.by_position = _leading(given, inspect.signature(self._own()))
        self.burnt_in = {"": _scalars(vars(module))}
        self.burnt_in |= {name: held for name, value in vars(module).items() if (held := _held_by(value))}
        self.sources = {}
        for mode, graph in graphs.items():
            code = graph.python_code("self")
            self.sources[mode] = _format_import_block(code.globals, sys_importer) + code.src
        self._load()

    def _load(self) -> None:
        self.train: Callable[..., Any] = _forward_from_src(self.sources["train"], {})
        self.eval: Callable[..., Any] = (
            self.train
            if self.sources["eval"] == self.sources["train"]
            else _forward_from_src(self.sources["eval"], {})
        )

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k not in ("train", "eval")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._load()

    def _still_holds(self) -> bool:
        held = vars(self.module)
        try:
            return all(
                values.items() <= (_attributes(held[name]) if name else held).items()
                for name, values in self.burnt_in.items()
            )
        except (KeyError, TypeError, RuntimeError):
            return False  # it is gone, has no attributes any more, or is a tensor now

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) > self.by_position:
            return self._own()(*args, **kwargs)
        if kwargs:
            names = self.given[len(args) :]
            if len(names) != len(kwargs) or any(name not in kwargs for name in names):
                return self._own()(*args, **kwargs)
            args = (*args, *(kwargs[name] for name in names))
        if len(args) != len(self.given) or any(arg is None for arg in args):
            return self._own()(*args, **kwargs)
        if not self._still_holds():
            return self._own()(*args)
        self._lead_hidden_sites()
        run = self.train if self.module.training else self.eval
        return run(self.module, *args)


def _scalars(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {n: v for n, v in attributes.items() if type(v) in _SCALARS and n not in _MODULES_OWN}


def _held_by(value: object) -> dict[str, Any]:
    """The scalars of an object that keeps options for a module, such as its `self.config`."""
    if isinstance(value, torch.Tensor | nn.Module | type) or callable(value):
        return {}
    return _scalars(_attributes(value))


def _attributes(value: object) -> Mapping[str, Any]:
    own: Mapping[str, Any] | None = getattr(value, "__dict__", None)
    if own is not None:
        return own
    slots = [slot for cls in type(value).__mro__ for slot in _listed(cls.__dict__.get("__slots__", ()))]
    return {slot: getattr(value, slot) for slot in slots if hasattr(value, slot)}


def _listed(slots: str | Iterable[str]) -> Iterable[str]:
    return (slots,) if isinstance(slots, str) else slots


def _leading(given: tuple[str, ...], signature: inspect.Signature) -> int:
    """How many of `given` are the signature's first positional parameters."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [name for name, parameter in signature.parameters.items() if parameter.kind in kinds]
    return next((i for i, name in enumerate(given) if names[i : i + 1] != [name]), len(given))


class WatchedForward(RegionForward):
    """Runs a module's own forward and hands the results of its weighted calls to their sites.

    The parameters are looked up on each run, so that a replaced one is still found by its name.
    """

    def __init__(
        self, module: nn.Module, sites: Mapping[str, SeedSite], owner_of: Mapping[str, nn.Module]
    ) -> None:
        super().__init__(module)
        self.sites = dict(sites)
        self.owner_of = dict(owner_of)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._lead_hidden_sites()
        watched = {
            id(getattr(self.owner_of[name], name.rpartition(".")[2])): site
            for name, site in self.sites.items()
        }
        with _Watch(watched):
            return self._own()(*args, **kwargs)


class _Watch(TorchFunctionMode):
    """Sends results of weighted calls to the site of their parameter. A view, cast or pick of a parameter is that
    parameter still."""

    def __init__(self, watched: dict[int, SeedSite]) -> None:
        super().__init__()
        self.watched = watched
        self.keep: list[torch.Tensor] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not isinstance(result, torch.Tensor):
            return result
        if func not in _WEIGHTED:
            if (
                args
                and id(args[0]) in self.watched
                and (func is torch.Tensor.__getitem__ or len(_tensors(args)) == 1)
            ):
                # The id is good only while the object lives.
                self.keep.append(result)
                self.watched[id(result)] = self.watched[id(args[0])]
            return result
        operands = _tensors(args) + _tensors(tuple((kwargs or {}).values()))
        for operand in operands:
            base = operand._base
            site = self.watched.get(id(operand)) or (self.watched.get(id(base)) if base is not None else None)
            if site is not None:
                layer_input = next((t for t in operands if t is not operand), None)
                return site(result, layer_input)
        return result


def _tensors(values: tuple[Any, ...]) -> list[torch.Tensor]:
    found = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, tuple | list):
            found.extend(item for item in value if isinstance(item, torch.Tensor))
    return found


_F = torch.nn.functional
_ATEN = torch.ops.aten
_WEIGHTED = frozenset(
    [
        _F.linear, torch.addmm, torch.Tensor.addmm, torch.mm, torch.Tensor.mm, torch.matmul, torch.Tensor.matmul,
        torch.Tensor.__rmatmul__, torch.Tensor.__matmul__, torch.bmm, torch.Tensor.bmm, torch.baddbmm,
        torch.einsum, torch.tensordot, _F.conv1d, _F.conv2d, _F.conv3d, _F.conv_transpose1d,
        _F.conv_transpose2d, _F.conv_transpose3d, torch.conv1d, torch.conv2d, torch.conv3d, _F.embedding,
        _F.layer_norm, _F.rms_norm, _F.batch_norm, _F.group_norm, torch._grouped_mm,
        _ATEN.linear.default, _ATEN.addmm.default, _ATEN.mm.default, _ATEN.matmul.default, _ATEN.bmm.default,
        _ATEN.einsum.default, _ATEN.conv1d.default, _ATEN.conv2d.default, _ATEN.conv3d.default,
        _ATEN.convolution.default, _ATEN.embedding.default, _ATEN.layer_norm.default, _ATEN.rms_norm.default,
        _ATEN.group_norm.default, *filter(None, [getattr(_F, "grouped_mm", None)]),
    ]
)  # fmt: skip


def restore_forward(module: nn.Module) -> None:
    """Undo the wrapping of `module.forward`, back to what it was before."""
    wrapper = vars(module).get("forward")
    while isinstance(wrapper, RegionForward):
        if wrapper.previous is None:
            del vars(module)["forward"]
        else:
            vars(module)["forward"] = wrapper.previous
        wrapper = vars(module).get("forward")
