"""`SiteForward`: what a watched layer's `forward` is."""

from __future__ import annotations

import copy
import inspect
import types
from collections.abc import Callable
from types import CodeType
from typing import Any

from torch import Tensor, nn
from torch.compiler import is_compiling

from morphc.runtime.site import SeedSite, first_tensor

MAKERS = (
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
    nn.Embedding, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d,
)  # fmt: skip
"""Layers whose own forward returns a tensor that nobody else holds, and whose backward doesn't read it."""


def makes_its_output(layer: nn.Module) -> bool:
    """Whether the value that the layer returns may be written in place.

    A subclass counts as long as its forward is the one it inherits.
    """
    return any(type(layer).forward is maker.forward for maker in MAKERS)


class SiteForward:
    """The `forward` of a watched layer: its own forward, then the site.

    It is an instance attribute of the layer, so the layer keeps its class and its hooks. `feeds` are the
    sites that read this layer's input as the input of their block.
    """

    def __init__(self, layer: nn.Module, site: SeedSite | None, output_index: int | None = None) -> None:
        self.layer = layer
        self.site = site
        self.output_index = output_index
        self.feeds: tuple[SeedSite, ...] = ()
        self.replaced: Callable[..., Any] | None = layer.__dict__.get("forward")
        self.inner = self._inner()
        self.fresh = self.replaced is None and makes_its_output(layer)

    def _inner(self) -> Callable[..., Any]:
        if self.replaced is not None:
            return self.replaced
        return types.MethodType(type(self.layer).forward, self.layer)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if is_compiling():
            return self._traced(args, kwargs)
        for target in self.feeds:
            if target.mode:
                target.block_input = first_tensor(args, kwargs)
        out = self.inner(*args, **kwargs)
        site = self.site
        if site is None:
            return out
        if self.output_index is not None:
            return self._within(out, args, kwargs)
        measured = self.layer.training and site.watch(out)
        if site.mode:
            joined = site.join_ready(out, self.fresh, measured)
            return (
                site.join(out, first_tensor(args, kwargs), self.fresh, measured) if joined is None else joined
            )
        return out

    def _traced(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The same where dynamo looks on, which would guard on every mode that is asked for."""
        for target in self.feeds:
            target.block_input = first_tensor(args, kwargs)
        out = self.inner(*args, **kwargs)
        site = self.site
        if site is None:
            return out
        value, rebuild = (out, None) if self.output_index is None else _element(out, self.output_index)
        if not isinstance(value, Tensor):
            return out
        value = site.traced(value, first_tensor(args, kwargs), self.layer.training)
        return value if rebuild is None else rebuild(value)

    def _within(self, out: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The watched value is an element of `out`, whose container comes back with that element replaced."""
        site = self.site
        assert site is not None
        assert self.output_index is not None
        value, rebuild = _element(out, self.output_index)
        if not isinstance(value, Tensor):
            return out
        if self.layer.training:
            site.watch(value)
        if not site.mode:
            return out
        return rebuild(site.join(value, first_tensor(args, kwargs)))

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        return self.inner

    @property
    def __code__(self) -> CodeType:
        """Of the forward that is wrapped: exporters ask for the names and lines of a forward's code."""
        code: CodeType = inspect.unwrap(self.inner).__code__
        return code

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.inner)

    @property
    def __name__(self) -> str:
        return "forward"

    def __getstate__(self) -> dict[str, Any]:
        # A bound method pickles as getattr(layer, "forward"), which is this very object.
        return {name: value for name, value in self.__dict__.items() if name != "inner"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.inner = self._inner()


def _element(out: Any, index: int) -> tuple[Any, Callable[[Tensor], Any]]:
    """Element `index` of a layer's output, and how to put another in its place.

    Cases: a tensor where a tuple was expected (the layer returned only its value); a packed sequence; a
    named tuple; a tuple or list; a mapping (transformers' outputs are ordered ones); a dataclass.
    """
    if isinstance(out, Tensor):
        return out, lambda new: new
    if isinstance(out, tuple) and not _is_packed(out):
        value: Any = out[index] if index < len(out) else None
        if _is_packed(value):
            return value.data, lambda new: _replaced(out, index, value._replace(data=new))
        return value, lambda new: _replaced(out, index, new)
    if _is_packed(out):
        return out.data, lambda new: out._replace(data=new)
    if isinstance(out, list):
        return (out[index] if index < len(out) else None), lambda new: [*out[:index], new, *out[index + 1 :]]
    if isinstance(out, dict):
        names = list(out)
        return (out[names[index]] if index < len(names) else None), lambda new: _copied(
            out, names[index], new
        )
    if hasattr(out, "__dataclass_fields__"):
        names = list(out.__dataclass_fields__)
        return getattr(out, names[index], None), lambda new: _copied(out, names[index], new)
    return None, lambda new: out


def _is_packed(value: Any) -> bool:
    return isinstance(value, nn.utils.rnn.PackedSequence)


def _replaced(out: tuple[Any, ...], index: int, new: Any) -> Any:
    items = [*out[:index], new, *out[index + 1 :]]
    made: Any = type(out)
    return made._make(items) if hasattr(out, "_make") else made(items)


def _copied(out: Any, name: str, new: Tensor) -> Any:
    copied = out.copy() if type(out) is dict else copy.copy(out)
    if isinstance(copied, dict):
        copied[name] = new
    else:
        setattr(copied, name, new)
    return copied
