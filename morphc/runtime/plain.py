"""A module as it was before morphc: what a clone without sites is made from."""

from __future__ import annotations

import types
from functools import partial
from typing import Any

from torch import nn

from morphc.runtime import fastpath
from morphc.runtime.forward import SiteForward
from morphc.runtime.regions import RegionForward
from morphc.runtime.sharded import show_to_ddp
from morphc.runtime.site import FunctionalSites, SeedSite
from morphc.runtime.store import CHILD, SeedRoot, load_hook, loaded_hook, save_hook


class Watcher:
    """Who is a hook of a Grower, or whose methods are: a module without sites has none of them."""


def plain_attributes(module: nn.Module) -> dict[str, Any]:
    """`vars(module)` without a site, a wrapped forward, or a hook of morphc's. The module itself is left alone."""
    attributes = dict(vars(module))
    forward = attributes.get("forward")
    while isinstance(forward, SiteForward | RegionForward):
        forward = forward.replaced if isinstance(forward, SiteForward) else forward.previous
        attributes.pop("forward")
        if forward is not None:
            attributes["forward"] = forward
    attributes.pop(CHILD, None)
    show_to_ddp(attributes, CHILD)
    saved = attributes.pop(fastpath._SAVED, None)
    if saved is not None:
        attributes["use_nested_tensor"] = saved
    children = attributes["_modules"]
    if isinstance(children.get(CHILD), SeedSite | SeedRoot | FunctionalSites):
        attributes["_modules"] = _without(children, lambda name, _: name == CHILD)
    for table, own in (
        ("_forward_hooks", fastpath.no_fast_path),
        ("_state_dict_hooks", save_hook),
        ("_load_state_dict_pre_hooks", load_hook),
        ("_load_state_dict_post_hooks", loaded_hook),
    ):
        if any(_is(hook, own) for hook in attributes.get(table, {}).values()):
            attributes[table] = _without(attributes[table], lambda _, hook, own=own: _is(hook, own))
    for table in ("_forward_hooks", "_forward_pre_hooks"):
        if any(_watches(hook) for hook in attributes.get(table, {}).values()):
            attributes[table] = _without(attributes[table], lambda _, hook: _watches(hook))
    return attributes


def plain_value(value: Any) -> Any:
    """The bound method that a wrapped forward stands for, which a host may keep in a list; anything else as it is."""
    while isinstance(value, SiteForward | RegionForward):
        own = value.layer if isinstance(value, SiteForward) else value.module
        before = value.replaced if isinstance(value, SiteForward) else value.previous
        value = before if before is not None else types.MethodType(type(own).forward, own)
    return value


def _is(hook: Any, own: Any) -> bool:
    return hook is own or getattr(hook, "hook", None) is own


def _watches(hook: Any) -> bool:
    while isinstance(hook, partial):
        hook = hook.func
    return isinstance(getattr(hook, "__self__", hook), Watcher)


def _without(table: Any, drop: Any) -> Any:
    kept = type(table)()
    kept.update((name, value) for name, value in table.items() if not drop(name, value))
    return kept
