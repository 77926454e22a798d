"""Where the sites of a model and their state are kept, and how they get in and out of a state dict."""

from __future__ import annotations

import inspect
import re
from typing import Any, Final

import torch
from torch import Tensor, nn

from morphc.config import Config
from morphc.errors import NotMorphedError, SeedError
from morphc.kernels.backend import chosen
from morphc.kernels.lifecycle import Ticker
from morphc.kernels.training import Rates
from morphc.lifecycle import Lifecycle, Mode, mode_of
from morphc.runtime import compact, fastpath, isolation
from morphc.runtime.forward import SiteForward
from morphc.runtime.meta import device_of, leave
from morphc.runtime.mirror import Mirror, read
from morphc.runtime.requests import SiteRequest
from morphc.runtime.site import SeedSite
from morphc.runtime.state import SeedState
from morphc.runtime.stepping import Steps

CHILD: Final = "morphc"
"""The reserved name under which everything of morphc hangs in a module."""


_LOOKS = re.compile(r"\.\s*(_modules|(named_)?(children|modules))\b")


def looks_at_its_children(root: nn.Module) -> bool:
    """Whether a child more changes what `root` does: a container, or a forward that walks `self.children()`."""
    if isinstance(root, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        return True
    for cls in type(root).__mro__:
        if cls is nn.Module or cls.__module__.startswith("torch.nn."):
            break
        try:
            source = inspect.getsource(vars(cls)["forward"]) if "forward" in vars(cls) else ""
        except (OSError, TypeError):
            continue  # made at run time: nothing to read
        if _LOOKS.search(source):
            return True
    return False


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

    def __repr__(self) -> str:
        """One line, and one more for each site of a parameter of the root's own."""
        own = self.__dict__["site"]
        seeds, sites = self.seeds.lifecycle.shape[0], len(self.store.sites) if self.store is not None else 0
        lines = [f"(root): {own!r}"] if own is not None else []
        lines += [
            f"({name}): {child!r}" for name, child in self._modules.items() if isinstance(child, SeedSite)
        ]
        body = "".join(f"\n  {line}" for line in lines)
        return f"SeedRoot(seeds={seeds}, sites={sites}{body}{chr(10) if body else ''})"

    def train(self, mode: bool = True) -> SeedRoot:
        site = self.__dict__["site"]
        if site is not None:
            site.train(mode)
        super().train(mode)
        return self


class SeedStore:
    """The host's view of a compiled model: its sites in the order of the state's rows.

    hidden: the root is a container, or looks at its own children in its code, and a child more would change what
    it does; so its SeedRoot stays in `__dict__`.
    """

    def __init__(self, root: nn.Module, config: Config, state: SeedState, hidden: bool = False) -> None:
        self.config = config
        self.state = state
        self.sites: dict[str, SeedSite] = {}
        self.requests: dict[str, SiteRequest] = {}
        self.hidden = hidden or looks_at_its_children(root)
        # The BatchNorm between the layers of a block, by the path of its last layer.
        self.norms: dict[str, nn.Module] = {}
        self.wrapped: list[SiteForward] = []
        self.holders: list[nn.Module] = []
        self.fast_paths: dict[str, list[nn.Module]] = {}
        # What compile said of the model; the runtime keeps it and looks at nothing in it.
        self.report: Any = None
        self.mirrored: Mirror | None = None
        self.ticker: Ticker | None = None
        # What a refit at a graft goes by: the host's loss, and the part of it that one seed is to take.
        self.loss: float | None = None
        # How many Growers were made of the model: the last one is in charge.
        self.growers = 0
        # Whether other ranks train the same slots: then every gradient passes through the banks' buffers.
        self.shared = False
        self.graft_share = 1.0

    def mirror(self) -> Mirror:
        """The states on the host: one copy from the device if any has changed since the last."""
        self.mirrored = read(self.live(), self.mirrored)
        return self.mirrored

    def __len__(self) -> int:
        return sum(site.seeds for site in self.sites.values())

    def leave_meta(self, fallback: torch.device | None = None) -> None:
        """Give start values to what is still on meta where its layer has left it: a bank beside its layer, the state
        beside the first of them, else on `fallback`.
        """
        first: torch.device | None = None
        for path, site in self.sites.items():
            layer = self.requests[path].layer
            device = device_of((*layer.named_parameters(), *layer.named_buffers()), CHILD)
            first = first or device
            if device is not None:
                leave(site.slots, device)
                site.follow_plan(device)
        device = first or fallback
        if device is not None and self.state.on_meta:
            leave(self.state, device)

    def live(self) -> SeedState:
        """The state, with values. Raises SeedError while the whole model is on the meta device."""
        if self.state.on_meta:
            self.leave_meta()
            if self.state.on_meta:
                raise SeedError(
                    f"the {len(self)} seeds are on the meta device, as the model is, and have no values; "
                    "give it some first: model.to_empty(device=...) and model.load_state_dict(host_state, "
                    "strict=False), or load_state_dict(..., assign=True)"
                )
        return self.state

    def set_mode(self, site: SeedSite, mode: Mode) -> None:
        """Command a mode; fused attention paths around the site follow."""
        if site.mode is mode:
            return
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise SeedError(
                f"site {site.path!r} would go from {site.mode.name} to {mode.name} while a CUDA graph is being "
                "captured, which holds one mode only; give commands and ticks before or after the capture"
            )
        site.enter(mode)
        for owner in self.fast_paths.get(site.path, ()):
            inside = [other for other in self.sites.values() if owner in self.fast_paths.get(other.path, ())]
            fastpath.switch(owner, any(other.mode is not Mode.DORMANT for other in inside))

    def follow(self, site: SeedSite, states: set[Lifecycle]) -> None:
        """Let the site do what its seeds' states ask for."""
        self.set_mode(site, mode_of(states))
        isolation.follow(self, site, states)

    def refresh_modes(self) -> None:
        """Set every site's mode from the states. Reads the device: for commands, never for a step."""
        states = self.state.lifecycle.tolist() if not self.state.on_meta else [0] * len(self)
        for site in self.sites.values():
            found = {Lifecycle(state) for state in states[site.offset : site.offset + site.seeds]}
            self.follow(site, found)

    @torch.no_grad()
    def enlarge(self, slots: int) -> dict[str, int]:
        """Grow every site's banks to at least min(slots, seeds) slots; the slots of each site then, by path."""
        for site in self.sites.values():
            wanted = min(slots, site.seeds)
            for _, bank in site.slots.items():
                before = bank.slots
                bank.enlarge(wanted)
            site.follow_plan()
            if len(site.slots.items()) == 0 or wanted <= before:
                continue
            # A seed's slot number counts through the site's banks, which all have the same number of slots.
            held = self.state.slot[site.offset : site.offset + site.seeds]
            held.copy_(torch.where(held < 0, held, held // before * wanted + held % before))
        return {
            path: max((bank.slots for _, bank in site.slots.items()), default=0)
            for path, site in self.sites.items()
        }

    @torch.no_grad()
    def step_optimizer(self, scale: Tensor | None = None, **options: Any) -> None:
        """One AdamW step of every slot whose seed's state trains; options as for `adamw_rows`.

        scale: what a GradScaler multiplied the loss with. A slot whose gradient isn't finite is left as it is.
        """
        lr = options.get("lr")
        if not isinstance(lr, int | float) or not 0.0 <= lr < float("inf"):
            raise SeedError(f"lr={lr!r} is no learning rate; give lr=, finite and not negative")
        steps = Steps(Rates(**options), scale)
        for site in self.sites.values():
            if site.mode is not Mode.DORMANT:
                for name, bank in site.slots.items():
                    isolation.step(site, name, bank, options)
                    if steps.add(site, name, bank):
                        continue
                    own = isolation.unscaled(site, bank)
                    finite = None if scale is None else bank.clean_grads(scale, own)
                    by_torch = chosen(site.backend, bank.owner.device) == "torch"
                    if by_torch and compact.step(site, name, bank, finite, **options):
                        continue
                    if finite is None:
                        finite = bank.clean_grads(None, own)
                    bank.step(site.train_rows(bank) & finite, **options)
        steps.run()

    def reset_telemetry(self) -> None:
        """Begin a new telemetry window of every seed."""
        self.state.reset_telemetry()


def store_of(root: nn.Module) -> SeedStore:
    """The store of a compiled model, also behind `torch.compile` or DDP. Raises NotMorphedError."""
    return found(root)[1]


def root_of(model: nn.Module) -> nn.Module:
    """The compiled model itself, taken out of a `torch.compile` or DDP wrapper. Raises NotMorphedError."""
    return found(model)[0]


def found(root: nn.Module) -> tuple[nn.Module, SeedStore]:
    # The store keeps no way back to the root: a GraphModule is unpickled from its attributes before it exists.
    module: object = root
    for _ in range(4):
        if not isinstance(module, nn.Module):
            break
        holder = _holder(module)
        if holder is not None and holder.store is not None:
            return module, holder.store
        module = module._modules.get("_orig_mod") or module._modules.get("module")
    raise NotMorphedError(_without_seeds(root))


def _holder(module: nn.Module) -> SeedRoot | None:
    holder = module.__dict__.get(CHILD) or module._modules.get(CHILD)
    return holder if isinstance(holder, SeedRoot) else None


def _without_seeds(root: object) -> str:
    """What to say of a module that isn't a compiled one: one in it may be."""
    told = f"{type(root).__name__} carries no seeds; give what morphc.compile returned"
    if isinstance(root, nn.Module):
        for path, module in root.named_modules():
            if path and _holder(module) is not None:
                return (
                    f"{type(root).__name__} carries no seeds of its own, its {path!r} does: give that, or compile the "
                    "whole as one"
                )
    return told


def save_hook(root: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Any) -> None:
    holder = root.__dict__[CHILD]
    assert isinstance(holder, SeedRoot)
    holder.state_dict(destination=state_dict, prefix=f"{prefix}{CHILD}.")


def load_hook(
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


def loaded_hook(root: nn.Module, incompatible: Any) -> None:
    # The seeds were loaded before the host, so only now is it known which layers have left the meta device.
    holder = root.__dict__[CHILD]
    assert isinstance(holder, SeedRoot)
    if holder.store is not None:
        holder.store.leave_meta()


def install_hooks(root: nn.Module) -> None:
    root.register_load_state_dict_post_hook(loaded_hook)  # type: ignore[no-untyped-call]
    root.register_state_dict_post_hook(save_hook)  # type: ignore[no-untyped-call]
    root.register_load_state_dict_pre_hook(load_hook)  # type: ignore[no-untyped-call]


def remove_hooks(root: nn.Module) -> None:
    for key, hook in list(root._state_dict_hooks.items()):
        if hook is save_hook:
            del root._state_dict_hooks[key]
    for key, hook in list(root._load_state_dict_post_hooks.items()):
        if hook is loaded_hook:
            del root._load_state_dict_post_hooks[key]
    for key, hook in list(root._load_state_dict_pre_hooks.items()):
        if getattr(hook, "hook", None) is load_hook:
            del root._load_state_dict_pre_hooks[key]
