"""Which sites a run of the compiled model reaches, and which of the host's modules it still calls.

A site whose layer ran in the host and doesn't in the model is bypassed: something that the clone couldn't follow (a
module in a global table, in a class attribute) still leads to the host's own layer. What the model computes is the same
(the two share their parameters), but seeds there would see nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from morphc.runtime.attention import AttentionForward
from morphc.runtime.store import store_of


@contextmanager
def reached(model: nn.Module, seen: set[str]) -> Iterator[None]:
    """Add to `seen` the paths of the sites whose layers are called meanwhile, in train and in eval mode."""
    store = store_of(model)
    with ExitStack() as undo:
        for wrapper in store.wrapped:
            if wrapper.site is not None:
                undo.callback(setattr, wrapper, "inner", wrapper.inner)
                wrapper.inner = _noting(wrapper.inner, wrapper.site.path, seen)
        for path, site in store.sites.items():
            if store.requests[path].parameter is not None:
                vars(site)["forward"] = _noting(site.forward, path, seen)
                undo.callback(vars(site).pop, "forward")
        for module in model.modules():
            attention = vars(module).get("forward")
            if isinstance(attention, AttentionForward):
                vars(attention)["_own"] = _through(attention, seen)
                undo.callback(vars(attention).pop, "_own")
        yield


def _noting(inner: Callable[..., Any], path: str, seen: set[str]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        seen.add(path)
        return inner(*args, **kwargs)

    return call


def _through(attention: AttentionForward, seen: set[str]) -> Callable[[], Any]:
    """The in-projection's sites are part of a fused call: it counts."""
    own = attention._own

    def get() -> Any:
        seen.update(attention.sites)
        return own()

    return get


@contextmanager
def calls_of_the_host(host: nn.Module, model: nn.Module, seen: list[str]) -> Iterator[None]:
    """Add to `seen` the names of the host's modules that are called meanwhile."""
    own = {id(module) for module in model.modules()}
    names = {id(module): name for name, module in host.named_modules() if id(module) not in own}

    def note(module: nn.Module, args: Any) -> None:
        name = names.get(id(module))
        if name is not None and name not in seen:
            seen.append(name)

    handle = register_module_forward_pre_hook(note)
    try:
        yield
    finally:
        handle.remove()


def bypassed(paths: Sequence[str], called: Sequence[str]) -> str:
    """What to say of sites at `paths`, which no run reached although the example did."""
    one = len(paths) == 1
    how = f"nothing called {'its layer' if one else 'their layers'}"
    if called:
        how = f"the model calls {own_modules(called)}"
    which = f"site {some(paths)} was" if one else f"sites {some(paths)} were"
    return f"{which} bypassed: {how}; seeds there would see nothing"


def own_modules(called: Sequence[str]) -> str:
    """The host's modules that the model calls, and why."""
    return f"the host's own {some(called)}, through a reference that the copy could not follow"


def some(paths: Sequence[str], most: int = 4) -> str:
    """The first few paths."""
    shown = ", ".join(repr(path) if path else "root" for path in paths[:most])
    return f"{shown} and {len(paths) - most} more" if len(paths) > most else shown
