"""Slots among sharded parameters: every rank has all of them, whoever shards the host."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeVar

import torch.distributed
from torch import Tensor, nn

from morphc.errors import RankError

if TYPE_CHECKING:
    from morphc.runtime.store import SeedStore

M = TypeVar("M", bound=type[nn.Module])
TO_IGNORE = "_ddp_params_and_buffers_to_ignore"


def is_dtensor(tensor: object) -> bool:
    """Whether it is a DTensor; nobody has one who hasn't imported them, which takes a while."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def whole(tensor: Tensor) -> Tensor:
    """A DTensor's value with the parts of all ranks; another tensor itself."""
    found: Tensor = tensor.full_tensor() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]
    return found


def reshard(model: nn.Module) -> None:
    """Let every module under `fully_shard` have its sharded parameters.

    After a forward without a backward the outermost one has whole ones, which are thrown away later.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None:
        for module in model.modules():
            if isinstance(module, fsdp.FSDPModule):
                module.reshard()


def on_every_rank(tensor: Tensor) -> Tensor:
    """A DTensor as a plain tensor that every rank of its mesh has whole; another tensor itself. Differentiable."""
    if not is_dtensor(tensor):
        return tensor
    from torch.distributed.tensor import Replicate

    sharded: Any = tensor
    found: Tensor = sharded.redistribute(placements=[Replicate()] * sharded.device_mesh.ndim).to_local()
    return found


def laid_out_as(value: Tensor, model: Tensor) -> Tensor:
    """Inverse of `on_every_rank` for a value of the same shape; what was a partial sum is whole on every rank."""
    from torch.distributed.tensor import DTensor, Replicate

    sharded: Any = model
    mesh = sharded.device_mesh
    everywhere = [Replicate()] * mesh.ndim
    wanted = [Replicate() if place.is_partial() else place for place in sharded.placements]
    found = DTensor.from_local(value, mesh, everywhere, run_check=False)
    return found.redistribute(placements=wanted)


def left_whole(module: M) -> M:
    """A class of modules that `fully_shard` leaves as they are, as it does those under torch's own `replicate`.

    Slots are few, and change hands and shape; their gradients are averaged by the Grower.
    """
    if torch.distributed.is_available():
        from torch.distributed._composable.contract import REGISTRY_KEY, RegistryItem

        setattr(module, REGISTRY_KEY, {"replicate": RegistryItem()})
    return module


def hide_from_ddp(root: nn.Module, names: Iterable[str]) -> None:
    """Let DDP neither send nor reduce the parameters and buffers of these names."""
    known: Any = root.__dict__.get(TO_IGNORE, ())
    root.__dict__[TO_IGNORE] = [*known, *(name for name in names if name not in known)]


def show_to_ddp(attributes: dict[str, Any], child: str) -> None:
    """Inverse of `hide_from_ddp`, in a root's `vars`, for names below a child `child`."""
    left = [name for name in attributes.pop(TO_IGNORE, ()) if child not in name.split(".")]
    if left:
        attributes[TO_IGNORE] = left


def check_unsharded(store: SeedStore) -> None:
    """Raises RankError where a slot was sharded."""
    for path, site in store.sites.items():
        for blueprint, bank in site.slots.items():
            for name, tensor in (*bank.named_parameters(), *bank.named_buffers()):
                if is_dtensor(tensor):
                    raise RankError(
                        f"{name!r} of the slots ({blueprint}) at {path!r} was sharded with the host; every rank needs "
                        "all slots: compile before the host is sharded, by fully_shard(...) of torch 2.11 or later or "
                        "with ignored_params= of the parameters whose names hold 'morphc'"
                    )
