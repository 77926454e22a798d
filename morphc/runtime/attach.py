"""Hangs seed sites into a module tree, and takes them out again."""

from __future__ import annotations

import copy
import inspect
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from morphc.config import Config
from morphc.errors import AlreadyMorphedError, ConfigError, NotMorphedError, SeedError
from morphc.kernels.blueprints.base import ConvGeometry, Geometry, get
from morphc.kernels.reference.activations import activation
from morphc.kernels.reference.blends import blend_shapes
from morphc.kernels.reference.chunks import widest
from morphc.lifecycle import Lifecycle, Mode, mode_of
from morphc.runtime import fastpath
from morphc.runtime.bank import SlotBank
from morphc.runtime.regions import restore_forward
from morphc.runtime.site import FunctionalSites, SeedSite, first_tensor
from morphc.runtime.state import SeedState

if TYPE_CHECKING:
    from morphc.passes.plan import Block

CHILD: Final = "morphc"
"""The reserved name under which everything of morphc hangs in a module."""


@dataclass(frozen=True, slots=True, eq=False)
class SiteRequest:
    """One site to make.

    path: the site's key. layer: the layer that gets the child `morphc`. owner: the module whose forward is
    wrapped, where that is not the layer. parameter: name of the parameter of a functional layer; nothing is
    wrapped then, and the caller calls the site. tap_features: width of the layer's input, 0 where it has no
    floating one. slots: None for `default_slots`. output_index: which element of a tuple output is watched.
    """

    path: str
    layer: nn.Module
    features: int
    feature_axis: int = -1
    seeds: int = 1
    dtype: torch.dtype | None = None
    device: torch.device | None = None
    kind: str = "linear"
    epilogue: str | None = None
    output_index: int | None = None
    block: Block | None = None
    parameter: str | None = None
    tap_features: int = 0
    owner: nn.Module | None = None
    slots: int | None = None


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

    def _inner(self) -> Callable[..., Any]:
        if self.replaced is not None:
            return self.replaced
        return types.MethodType(type(self.layer).forward, self.layer)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for target in self.feeds:
            if target.mode:
                target.block_input = first_tensor(args, kwargs)
        out = self.inner(*args, **kwargs)
        site = self.site
        if site is None:
            return out
        if self.output_index is not None:
            return self._within(out, args, kwargs)
        if self.layer.training:
            site.watch(out)
        if site.mode:
            return site.join(out, first_tensor(args, kwargs))
        return out

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


class SeedRoot(nn.Module):
    """The root's own child: `seeds` holds the state, `slots` the root's own banks if it is watched."""

    seeds: SeedState

    def __init__(self, state: SeedState) -> None:
        super().__init__()
        self.seeds = state
        self.store: SeedStore | None = None
        self.__dict__["site"] = None

    def own_site(self, site: SeedSite) -> None:
        """The root's own site: its slots become keys `morphc.slots.*`."""
        self.__dict__["site"] = site
        self.add_module("slots", site.slots)

    def train(self, mode: bool = True) -> SeedRoot:
        site = self.__dict__["site"]
        if site is not None:
            site.train(mode)
        super().train(mode)
        return self


class SeedStore:
    """The host's view of a compiled model: its sites in the order of the state's rows.

    hidden: the root is a container whose length and iteration a child would change, so its SeedRoot stays in
    `__dict__`.
    """

    def __init__(self, root: nn.Module, config: Config, state: SeedState) -> None:
        self.config = config
        self.state = state
        self.sites: dict[str, SeedSite] = {}
        self.requests: dict[str, SiteRequest] = {}
        self.hidden = isinstance(root, nn.Sequential | nn.ModuleList | nn.ModuleDict)
        self.wrapped: list[SiteForward] = []
        self.holders: list[nn.Module] = []
        self.fast_paths: dict[str, list[nn.Module]] = {}
        # What compile said of the model; the runtime keeps it and looks at nothing in it.
        self.report: Any = None

    def __len__(self) -> int:
        return sum(site.seeds for site in self.sites.values())

    def set_mode(self, site: SeedSite, mode: Mode) -> None:
        """Command a mode; fused attention paths around the site follow."""
        if site.mode is mode:
            return
        site.mode = mode
        for owner in self.fast_paths.get(site.path, ()):
            inside = [other for other in self.sites.values() if owner in self.fast_paths.get(other.path, ())]
            fastpath.switch(owner, any(other.mode is not Mode.DORMANT for other in inside))

    def refresh_modes(self) -> None:
        """Set every site's mode from the states. Reads the device: for commands, never for a step."""
        states = self.state.lifecycle.tolist() if not self.state.lifecycle.is_meta else [0] * len(self)
        for site in self.sites.values():
            found = {Lifecycle(state) for state in states[site.offset : site.offset + site.seeds]}
            self.set_mode(site, mode_of(found))

    @torch.no_grad()
    def enlarge(self, slots: int) -> dict[str, int]:
        """Grow every site's banks to at least min(slots, seeds) slots; the slots of each site then, by path."""
        for site in self.sites.values():
            wanted = min(slots, site.seeds)
            for _, bank in site.slots.items():
                before = bank.slots
                bank.enlarge(wanted)
            if len(site.slots.items()) == 0 or wanted <= before:
                continue
            # A seed's slot number counts through the site's banks, which all have the same number of slots.
            held = self.state.slot[site.offset : site.offset + site.seeds]
            held.copy_(torch.where(held < 0, held, held // before * wanted + held % before))
        return {
            path: max((bank.slots for _, bank in site.slots.items()), default=0)
            for path, site in self.sites.items()
        }

    def step_optimizer(self, **options: Any) -> None:
        """One AdamW step of every slot whose seed's state trains; options as for `adamw_rows`."""
        for site in self.sites.values():
            if site.mode is not Mode.DORMANT:
                for _, bank in site.slots.items():
                    bank.step(site.train_rows(bank), **options)

    def reset_telemetry(self) -> None:
        """Begin a new telemetry window of every seed."""
        self.state.reset_telemetry()


def geometry_of(request: SiteRequest, rank: int, root: nn.Module, tap: str = "chunk") -> Geometry:
    """What a blueprint with that tap must know about the site."""
    layer = request.layer
    spatial = spatial_axes(layer)
    base: dict[str, Any] = {
        "features": request.features,
        "chunk": widest(request.features, request.seeds),
        "rank": rank,
        "spatial": spatial,
    }
    if tap == "layer":
        conv = conv_geometry(layer) if spatial else None
        return Geometry(**base, tap_features=request.tap_features, layer_conv=conv)
    block = request.block
    if tap == "block" and block is None:
        return Geometry(**base, tap_features=0, block_obstacle="the layer is not the output of a block")
    if tap == "block" and block is not None:
        first, last = root.get_submodule(block.inputs[0]), root.get_submodule(block.output)
        conv_block = block.kind == "conv"
        activation(block.activation)
        return Geometry(
            **base,
            tap_features=width_in(first),
            block_in=conv_geometry(first) if conv_block else None,
            block_out=conv_geometry(last) if conv_block else None,
            activation=block.activation,
            gated=block.kind == "gated",
            block_obstacle=block.obstacle,
        )
    return Geometry(**base, tap_features=base["chunk"])


def spatial_axes(layer: nn.Module) -> int:
    """Spatial axes of a convolution, 0 for any other layer."""
    return len(layer.kernel_size) if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) else 0


def width_in(layer: nn.Module) -> int:
    """Input width of a linear or convolution layer: look-alikes say it by attribute or by their weight."""
    for name in ("in_features", "in_channels", "nx"):
        width = getattr(layer, name, None)
        if isinstance(width, int):
            return width
    weight = getattr(layer, "weight", None)
    # transformers' Conv1D keeps its weight as [in, out].
    return int(weight.shape[0]) if isinstance(weight, Tensor) and weight.dim() == 2 else 0


def conv_geometry(layer: nn.Module) -> ConvGeometry | None:
    """The geometry of an nn.Conv layer, None for anything else."""
    if not isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return None
    padding = layer.padding if isinstance(layer.padding, str) else tuple(int(p) for p in layer.padding)
    return ConvGeometry(
        kernel=tuple(layer.kernel_size),
        stride=tuple(layer.stride),
        padding=padding,
        dilation=tuple(layer.dilation),
        padding_mode=layer.padding_mode,
        groups=layer.groups,
    )


def slot_numbers(request: SiteRequest, config: Config, root: nn.Module) -> int:
    """Numbers that one slot of every configured blueprint takes at the site."""
    total = 0
    for name in config.blueprints:
        geometry = geometry_of(request, config.rank, root, get(name).tap)
        if not get(name).refuses(geometry):
            shapes = get(name).shapes(geometry) | blend_shapes(config.blend, geometry.chunk)
            total += sum(torch.Size(shape).numel() for shape in shapes.values())
    return total


def default_slots(requests: Sequence[SiteRequest], config: Config, root: nn.Module) -> dict[str, int]:
    """Slots by path: min(seeds, max(4, 10 %)), shrunk alike until all banks stay within 2 % of the host.

    Parameters are counted on both sides (gradients and moments come to the same multiple of each). One slot
    a site is the least there is.
    """
    wanted = {r.path: min(r.seeds, max(4, -(-r.seeds // 10))) for r in requests}
    if config.slots is not None:
        return {r.path: min(r.seeds, config.slots) for r in requests}
    cost = {r.path: 4 * slot_numbers(r, config, root) for r in requests}
    asked = sum(wanted[path] * cost[path] for path in wanted)
    budget = host_bytes(root) // 50
    if asked <= budget:
        return wanted
    return {path: max(1, int(slots * budget / asked)) for path, slots in wanted.items()}


def host_bytes(root: nn.Module) -> int:
    """Bytes of the host's parameters and buffers, tied ones once."""
    seen = {id(t): t for t in (*root.parameters(), *root.buffers())}
    return sum(t.numel() * t.element_size() for t in seen.values())


def attach(root: nn.Module, requests: Sequence[SiteRequest], config: Config) -> SeedStore:
    """Build the sites that `requests` ask for and hang them into `root`, in place.

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
    slots = default_slots(requests, config, root)
    device = _device(root, requests)
    widths = [width for request in requests for width in _widths(request.features, request.seeds)]
    state = SeedState(widths, device)
    store = SeedStore(root, config, state)
    state.store = store
    holder = SeedRoot(state)
    holder.store = store
    offset = 0
    for request in requests:
        wanted = request.slots if request.slots is not None else slots[request.path]
        site = _build(request, config, root, state, offset, wanted)
        site.train(request.layer.training)
        _hang(root, holder, request, site, store)
        offset += request.seeds
    holder.training = root.training
    if store.hidden:
        root.__dict__[CHILD] = holder
        _install_hooks(root)
    else:
        root.add_module(CHILD, holder)
    for request in requests:
        owners = fastpath.owners(root, request.path)
        if owners:
            store.fast_paths[request.path] = owners
        if request.block is not None:
            _feed(root, request.block, store.sites[request.path], store)
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
        if reason:
            refusals[name] = reason
        else:
            device = request.device if request.device is not None else state.alpha.device
            banks[name] = SlotBank(name, geometry, config.blend, slots, dtype, device)
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
        epilogue=request.epilogue,
        near_zero=config.near_zero,
        gradient_telemetry=config.gradient_telemetry,
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
            layer.add_module(CHILD, under)
            store.holders.append(layer)
        under.add_module(request.parameter.replace(".", "_"), site)
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
        layer.add_module(CHILD, site)
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


def store_of(root: nn.Module) -> SeedStore:
    """The store of a compiled model, also behind `torch.compile` or DDP. Raises NotMorphedError."""
    return _found(root)[1]


def root_of(model: nn.Module) -> nn.Module:
    """The compiled model itself, taken out of a `torch.compile` or DDP wrapper. Raises NotMorphedError."""
    return _found(model)[0]


def _found(root: nn.Module) -> tuple[nn.Module, SeedStore]:
    # The store keeps no way back to the root: a GraphModule is unpickled from its attributes before it exists.
    module: object = root
    for _ in range(4):
        if not isinstance(module, nn.Module):
            break
        holder = module.__dict__.get(CHILD) or module._modules.get(CHILD)
        if isinstance(holder, SeedRoot) and holder.store is not None:
            return module, holder.store
        module = module._modules.get("_orig_mod") or module._modules.get("module")
    raise NotMorphedError(f"{type(root).__name__} carries no seeds; give what morphc.compile returned")


def detach_(root: nn.Module) -> None:
    """Take everything of morphc out of `root`, in place; the tree is as it was before `attach`."""
    root, store = _found(root)
    for site in store.sites.values():
        store.set_mode(site, Mode.DORMANT)
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
        _remove_hooks(root)
    else:
        del root._modules[CHILD]


def _save_hook(root: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Any) -> None:
    holder = root.__dict__[CHILD]
    assert isinstance(holder, SeedRoot)
    holder.state_dict(destination=state_dict, prefix=f"{prefix}{CHILD}.")


def _load_hook(
    root: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    metadata: dict[str, Any],
    strict: bool,
    missing: list[str],
    unexpected: list[str],
    errors: list[str],
) -> None:
    holder = root.__dict__[CHILD]
    assert isinstance(holder, SeedRoot)
    under = f"{prefix}{CHILD}."
    own = {key.removeprefix(under): state_dict.pop(key) for key in list(state_dict) if key.startswith(under)}
    assign = bool(metadata.get("assign_to_params_buffers", False))
    try:
        result = holder.load_state_dict(own, strict=False, assign=assign)
    except RuntimeError as error:
        errors.append(str(error))
        return
    missing.extend(under + key for key in result.missing_keys)
    unexpected.extend(under + key for key in result.unexpected_keys)


def _install_hooks(root: nn.Module) -> None:
    root.register_state_dict_post_hook(_save_hook)  # type: ignore[no-untyped-call]
    root.register_load_state_dict_pre_hook(_load_hook)  # type: ignore[no-untyped-call]


def _remove_hooks(root: nn.Module) -> None:
    for key, hook in list(root._state_dict_hooks.items()):
        if hook is _save_hook:
            del root._state_dict_hooks[key]
    for key, hook in list(root._load_state_dict_pre_hooks.items()):
        if getattr(hook, "hook", None) is _load_hook:
            del root._load_state_dict_pre_hooks[key]
