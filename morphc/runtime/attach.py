"""Hangs seed sites into a module tree, and takes them out again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from morphc.config import Config
from morphc.errors import AlreadyMorphedError, ConfigError, SeedError
from morphc.kernels.blueprints.base import get
from morphc.kernels.reference.activations import activation
from morphc.kernels.spec import TRANSPOSED, Block
from morphc.lifecycle import Mode
from morphc.runtime import fastpath
from morphc.runtime.bank import SlotBank
from morphc.runtime.forward import SiteForward
from morphc.runtime.regions import restore_forward
from morphc.runtime.requests import SiteRequest, functional_name, geometry_of, is_transposed, spatial_axes
from morphc.runtime.sharded import hide_from_ddp, show_to_ddp
from morphc.runtime.site import FunctionalSites, SeedSite
from morphc.runtime.state import SeedState
from morphc.runtime.store import CHILD, SeedRoot, SeedStore, found, install_hooks, remove_hooks


def attach(
    root: nn.Module, requests: Sequence[SiteRequest], config: Config, hidden: bool = False
) -> SeedStore:
    """Build the sites that `requests` ask for and hang them into `root`, in place.

    hidden: keep what belongs to the model as a whole out of the root's children, where they can be seen.

    Raises AlreadyMorphedError if the tree carries sites or a module of the user's has a child `morphc`.
    """
    for path, module in root.named_modules():
        if CHILD in module._modules or CHILD in module.__dict__:
            raise AlreadyMorphedError(f"module {path!r} already has a child {CHILD!r}; give the plain host")
    for request in requests:
        if not 1 <= request.seeds <= request.features:
            raise ConfigError(
                f"seeds={request.seeds} for the {request.features} features of {request.path!r}; "
                f"use 1 to {request.features}"
            )
        if request.epilogue is not None:
            activation(request.epilogue)
    device = _device(root, requests)
    widths = [width for request in requests for width in _widths(request.features, request.seeds)]
    state = SeedState(widths, device)
    store = SeedStore(root, config, state, hidden)
    state.store = store
    holder = SeedRoot(state)
    holder.store = store
    offset = 0
    for request in requests:
        slots = request.slots if request.slots is not None else min(request.seeds, config.slots or 4)
        site = _build(request, config, root, state, offset, slots)
        site.train(request.layer.training)
        _hang(root, holder, request, site, store)
        offset += request.seeds
    holder.training = root.training
    if store.hidden:
        carrier = next((s for p, s in store.sites.items() if store.requests[p].layer is not root), None)
        if carrier is not None:
            carrier.__dict__["carried"] = holder
        root.__dict__[CHILD] = holder
        install_hooks(root)
    else:
        root._modules[CHILD] = holder  # add_module asks hasattr, which a wrapper may hand on to its child
    for request in requests:
        owners = fastpath.owners(root, request.path)
        if owners:
            store.fast_paths[request.path] = owners
        if request.block is not None and request.block.norm is not None:
            store.norms[request.path] = root.get_submodule(request.block.norm)
        if request.block is not None:
            _feed(root, request.block, store.sites[request.path], store)
    everything = (
        *root.named_parameters(remove_duplicate=False),
        *root.named_buffers(remove_duplicate=False),
    )
    hide_from_ddp(root, [name for name, _ in everything if CHILD in name.split(".")])
    return store


def _widths(features: int, seeds: int) -> list[int]:
    base, wider = divmod(features, seeds)
    return [base + 1] * wider + [base] * (seeds - wider)


def _device(root: nn.Module, requests: Sequence[SiteRequest]) -> torch.device:
    for request in requests:
        if request.device is not None:
            return request.device
    first = next(iter((*root.parameters(), *root.buffers())), None)
    return first.device if first is not None else torch.device("cpu")


def _build(
    request: SiteRequest, config: Config, root: nn.Module, state: SeedState, offset: int, slots: int
) -> SeedSite:
    banks: dict[str, SlotBank] = {}
    refusals: dict[str, str] = {}
    dtype = torch.float64 if request.dtype == torch.float64 else torch.float32
    for name in config.blueprints:
        kind = get(name)
        geometry = geometry_of(request, config.rank, root, kind.tap)
        reason = kind.refuses(geometry)
        if kind.tap == "layer" and request.parameter is not None:
            reason = reason or "a functional layer's input is not seen by its site"
        if kind.tap != "chunk" and is_transposed(request.layer):
            reason = TRANSPOSED
        if not reason and slots < 1:
            reason = "the plan gives the site no slots"
        if reason:
            refusals[name] = reason
        else:
            device = request.device if request.device is not None else state.alpha.device
            frozen = _biasless(request, root) if kind.tap == "block" else ()
            frozen = tuple(own for own in frozen if own in kind.shapes(geometry))
            banks[name] = SlotBank(name, geometry, config.blend, slots, dtype, device, frozen)
    axis = request.feature_axis
    if spatial_axes(request.layer) and axis >= 0:
        axis = -1 - spatial_axes(request.layer)  # counted from the end: an input may come without its batch
    return SeedSite(
        request.path,
        request.features,
        request.seeds,
        feature_axis=axis,
        offset=offset,
        state=state,
        banks=banks,
        refusals=refusals,
        telemetry_every=config.telemetry_every,
        telemetry_values=config.telemetry_values,
        epilogue=request.epilogue,
        near_zero=config.near_zero,
        gradient_telemetry=config.gradient_telemetry,
        straight_through=config.isolation == "straight_through",
    )


def _biasless(request: SiteRequest, root: nn.Module) -> tuple[str, ...]:
    """The biases that new units of the block may not have, since its own layers have none."""
    assert request.block is not None
    paths = request.block.inputs
    names = ("gate_in_bias", "in_bias") if len(paths) == 2 else ("in_bias",)
    return tuple(
        name
        for name, path in zip(names, paths, strict=True)
        if getattr(root.get_submodule(path), "bias", None) is None
    )


def _hang(root: nn.Module, holder: SeedRoot, request: SiteRequest, site: SeedSite, store: SeedStore) -> None:
    if request.path in store.sites:
        raise SeedError(f"two sites are named {request.path!r}")
    store.sites[request.path] = site
    store.requests[request.path] = request
    layer = request.layer
    if request.parameter is not None:
        under: nn.Module | None = holder if layer is root else layer._modules.get(CHILD)
        if under is None:
            under = FunctionalSites()
            layer._modules[CHILD] = under
            store.holders.append(layer)
        under.add_module(functional_name(request.parameter), site)
        return
    if layer is root:
        holder.own_site(site)
    else:
        existing = layer._modules.get(CHILD)
        if existing is not None:
            for name, child in existing.named_children():
                site.add_module(name, child)
        else:
            store.holders.append(layer)
        layer._modules[CHILD] = site
    owner = request.owner if request.owner is not None else layer
    _wrap(owner, site, request.output_index, store)


def _wrap(
    module: nn.Module, site: SeedSite | None, output_index: int | None, store: SeedStore
) -> SiteForward:
    forward = SiteForward(module, site, output_index)
    module.__dict__["forward"] = forward
    store.wrapped.append(forward)
    return forward


def _feed(root: nn.Module, block: Block, site: SeedSite, store: SeedStore) -> None:
    """Let the block's first layer leave its input at the site, where a bank there reads it."""
    if not any(bank.kind.tap == "block" for _, bank in site.slots.items()):
        return
    first = root.get_submodule(block.inputs[0])
    forward = first.__dict__.get("forward")
    if not isinstance(forward, SiteForward):
        forward = _wrap(first, None, None, store)
    forward.feeds = (*forward.feeds, site)


def detach_(root: nn.Module) -> None:
    """Take everything of morphc out of `root`, in place; the tree is as it was before `attach`."""
    root, store = found(root)
    for site in store.sites.values():
        store.set_mode(site, Mode.DORMANT)
    show_to_ddp(root.__dict__, CHILD)
    for module in root.modules():
        restore_forward(module)
    for forward in reversed(store.wrapped):
        if forward.replaced is not None:
            forward.layer.__dict__["forward"] = forward.replaced
        else:
            del forward.layer.__dict__["forward"]
    for layer in store.holders:
        del layer._modules[CHILD]
    if store.hidden:
        del root.__dict__[CHILD]
        remove_hooks(root)
    else:
        del root._modules[CHILD]
