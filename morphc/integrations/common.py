"""What the callbacks share: is this model one that grows, and what of its run a framework's checkpoint lacks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from morphc.errors import ConfigError, NotMorphedError
from morphc.grow.grower import Grower
from morphc.grow.snapshot import model_state, restore_model
from morphc.runtime.sharded import TO_IGNORE, hide_from_ddp
from morphc.runtime.store import CHILD, SeedRoot, store_of

HOST = "host/"
TREE = "model"


def check_grows(model: nn.Module, whose: str) -> None:
    """Raise NotMorphedError for a model without seeds, ConfigError for one whose seeds have no slot to grow in."""
    try:
        store = store_of(model)
    except NotMorphedError:
        raise NotMorphedError(
            f"{whose}, a {type(model).__name__}, carries no seeds; give it morphc.compile(model, example_inputs)"
        ) from None
    if not any(site.slots.items() for site in store.sites.values()):
        refused = next((f"; {path}: {why}" for path, why in _refusals(store.sites)), "")
        raise ConfigError(
            f"{whose}, a {type(model).__name__}, has {len(store)} seeds in {len(store.sites)} sites and no slot for "
            f"any of them, so nothing can germinate{refused}; morphc.report(model) says of every layer why"
        )


def _refusals(sites: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(path, why) for path, site in sites.items() for why in site.refusals.values()]


def check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, whose: str) -> None:
    """Raise ConfigError if the optimizer trains nothing of the model, though there is something to train."""
    mine = {id(param) for param in model.parameters() if param.requires_grad}
    held = {id(param) for group in optimizer.param_groups for param in group["params"]}
    if mine and not mine & held:
        raise ConfigError(
            f"{whose} trains none of the {len(mine)} trainable parameters of this {type(model).__name__}; make it "
            "from the compiled model's parameters, or compile with share=True"
        )


def roots(module: nn.Module) -> dict[str, nn.Module]:
    """The compiled models inside a module, by path; not those within another."""
    found: dict[str, nn.Module] = {}
    for path, each in module.named_modules():
        holder = each.__dict__.get(CHILD) or each._modules.get(CHILD)
        inside = any(path.startswith(f"{outer}.") or not outer for outer in found)
        if isinstance(holder, SeedRoot) and holder.store is not None and not inside:
            found[path] = each
    return found


def hide_slots_from_ddp(module: nn.Module) -> None:
    """Have a DDP around `module` leave the slots in it alone: it asks what it wraps, and nothing in that."""
    for path, root in roots(module).items():
        if path:
            hide_from_ddp(module, [f"{path}.{name}" for name in root.__dict__.get(TO_IGNORE, ())])


def training_state(grower: Grower) -> dict[str, Any]:
    """Seeds, slots, what is measured of them, and the Grower: what is needed besides the host, its optimizer and its
    schedule, which a framework saves itself. Tensors and plain data only.
    """
    model = model_state(grower.model)
    tensors = {name: value for name, value in model["tensors"].items() if not name.startswith(HOST)}
    return {TREE: {**model, "tensors": tensors}, "grower": grower.state_dict()}


def restore_training_state(grower: Grower, saved: Mapping[str, Any]) -> None:
    """Inverse of `training_state`; the host stays as it is. Raises CheckpointError if it is another model's."""
    now = model_state(grower.model)["tensors"]
    own = {name: value for name, value in now.items() if name.startswith(HOST)}
    restore_model(grower.model, {**saved[TREE], "tensors": {**own, **saved[TREE]["tensors"]}})
    grower.load_state_dict(saved["grower"])
