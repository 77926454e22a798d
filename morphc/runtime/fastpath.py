"""Switches torch's fused attention paths off while a site inside such a module is not dormant.

Case 1. `nn.TransformerEncoderLayer` skips its own layers in eval mode unless a forward hook hangs on any of
them: so a hook that does nothing is hung on it. Case 2. `nn.TransformerEncoder` may hand nested tensors to
such layers, which only the fast path can read: `use_nested_tensor` is off meanwhile. `nn.MultiheadAttention`
needs nothing: its fused path still goes through its own forward, where its sites are; the torch-function mode
by which `attention` watches its in-projection makes torch leave that path by itself.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from morphc.lifecycle import Mode
from morphc.runtime.site import SeedSite

_SAVED = "_morphc_use_nested_tensor"


def no_fast_path(module: nn.Module, args: object, output: object) -> None:
    """A forward hook that does nothing; its presence is the message."""


def owners(root: nn.Module, path: str) -> list[nn.Module]:
    """The modules on the way from the root to the layer that have a fast path."""
    found: list[nn.Module] = []
    module = root
    for name in ["", *path.split(".")]:
        if name:
            child = module._modules.get(name)
            if child is None:
                break
            module = child
        if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerEncoder):
            found.append(module)
    return found


def update(sites_of: Sequence[tuple[nn.Module, Sequence[SeedSite]]]) -> None:
    """Bring each owner in line with the modes of the sites in it."""
    for owner, sites in sites_of:
        switch(owner, any(site.mode is not Mode.DORMANT for site in sites))


def switch(owner: nn.Module, off: bool) -> None:
    """Turn the fast path of `owner` off, or back to what the user had."""
    if isinstance(owner, nn.TransformerEncoder):
        saved = owner.__dict__.get(_SAVED)
        if off and saved is None:
            owner.__dict__[_SAVED] = owner.use_nested_tensor
            owner.use_nested_tensor = False
        elif not off and saved is not None:
            owner.use_nested_tensor = saved
            del owner.__dict__[_SAVED]
        return
    hung = [key for key, hook in owner._forward_hooks.items() if hook is no_fast_path]
    if off and not hung:
        owner.register_forward_hook(no_fast_path)
    elif not off:
        for key in hung:
            del owner._forward_hooks[key]
