"""A snapshot: everything that a step of training depends on, in memory or on disk.

Host parameters and buffers, seeds and slots, the optimizer's state and options, scheduler, scaler, the random states of
torch, Python and NumPy, and the Grower's own. Telemetry is not among it: what was measured stays measured.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from morphc.checkpointfile import sha256_of
from morphc.errors import CheckpointError
from morphc.grow.tree import clone, pack, unpack
from morphc.lifecycle import Lifecycle
from morphc.publishing import publish, recover, sibling, sync
from morphc.runtime.isolation import Fitting
from morphc.runtime.sharded import reshard
from morphc.runtime.store import CHILD, SeedStore, root_of, store_of

WEIGHTS: Final = "snapshot.safetensors"
MANIFEST: Final = "snapshot.json"
FORMAT: Final = "morphc snapshot"
SCHEMA_VERSION: Final = 2
TELEMETRY: Final = ("sums", "counts", "widths")


@dataclass(frozen=True)
class Snapshot:
    """`tree`: the state as nested mappings. It is never written to: restoring copies out of it."""

    tree: dict[str, Any]

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write it to a directory, which appears whole or not at all. Raises CheckpointError."""
        target = Path(os.path.realpath(directory))
        recover(target)
        if os.path.lexists(target) and not (target / MANIFEST).is_file():
            raise CheckpointError(f"{directory} holds something else than a snapshot and is not overwritten")
        tensors: dict[str, Tensor] = {}
        tree = pack(self.tree, tensors)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with sibling(target) as fresh:
                save_file(tensors, fresh / WEIGHTS)
                head = {
                    "format": FORMAT,
                    "schema_version": SCHEMA_VERSION,
                    "sha256": sha256_of(fresh / WEIGHTS),
                    "tree_sha256": _digest(tree),
                }
                text = json.dumps({**head, "tree": tree}, allow_nan=False)
                (fresh / MANIFEST).write_text(text, encoding="utf-8")
                for name in (WEIGHTS, MANIFEST):
                    sync(fresh / name)
                publish(fresh, target)
        except OSError as error:
            raise CheckpointError(f"{directory} can't be written: {error}") from error

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> Snapshot:
        """Read what `save` wrote. Raises CheckpointError naming the file."""
        path = Path(directory)
        recover(path)
        try:
            head = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path / MANIFEST} can't be read: {error}") from error
        if not isinstance(head, dict) or head.get("format") != FORMAT:
            raise CheckpointError(f"{path / MANIFEST} is no morphc snapshot")
        if head.get("schema_version") != SCHEMA_VERSION:
            raise CheckpointError(
                f"{path / MANIFEST} has schema_version={head.get('schema_version')!r}, this morphc reads "
                f"{SCHEMA_VERSION}"
            )
        if _digest(head.get("tree")) != head.get("tree_sha256"):
            raise CheckpointError(f"{path / MANIFEST} is damaged: its tree_sha256 isn't that of its tree")
        try:
            intact = sha256_of(path / WEIGHTS) == head.get("sha256")
        except OSError as error:
            raise CheckpointError(f"{path / WEIGHTS} can't be read: {error}") from error
        if not intact:
            raise CheckpointError(f"{path / WEIGHTS} is damaged: its sha256 isn't that of {MANIFEST}")
        try:
            tensors = load_file(path / WEIGHTS)
            return cls(unpack(head["tree"], tensors))
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path / WEIGHTS} can't be read: {error}") from error
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path / MANIFEST} is damaged: {error}") from error


def _digest(tree: Any) -> str:
    return hashlib.sha256(json.dumps(tree).encode()).hexdigest()


# -- the model -----------------------------------------------------------------------------------------------


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Host, states and slots by name: the very tensors, without telemetry."""
    root, store = root_of(model), store_of(model)
    reshard(root)
    found: dict[str, Tensor] = {}
    for name, tensor in (*root.named_parameters(), *root.named_buffers()):
        if CHILD not in name.split("."):
            found[f"host/{name}"] = tensor
    for name, tensor in store.state.named_buffers():
        if name not in TELEMETRY:
            found[f"state/{name}"] = tensor
    for path, site in store.sites.items():
        for blueprint, bank in site.slots.items():
            for name, tensor in (*bank.named_parameters(), *bank.named_buffers()):
                found[f"bank/{path}/{blueprint}/{name}"] = tensor
    return found


def fittings(store: SeedStore) -> dict[str, Any]:
    """What isolation has measured, by site: the very tensors."""
    return {
        path: {
            "count": site.fitting.count,
            "fits": {name: dict(fit.sums) for name, fit in site.fitting.fits.items()},
        }
        for path, site in store.sites.items()
        if site.fitting is not None
    }


def model_state(model: nn.Module) -> dict[str, Any]:
    """Host, seeds, slots, what is measured in isolation, and how many forwards each site has counted."""
    store = store_of(model)
    return {
        "tensors": clone(model_tensors(model)),
        "fittings": clone(fittings(store)),
        "forwards": {path: site.pulse.count for path, site in store.sites.items()},
    }


@torch.no_grad()
def restore_model(model: nn.Module, saved: Mapping[str, Any]) -> None:
    """Copy a `model_state` back into the very tensors that the model has. Raises CheckpointError, changing nothing."""
    store = store_of(model)
    own, kept = model_tensors(model), saved["tensors"]
    for name in own.keys() ^ kept.keys():
        where = "the snapshot lacks" if name in own else "this model lacks"
        raise CheckpointError(f"{where} {name!r}; a snapshot fits the model that it was taken of")
    for name, tensor in own.items():
        if tensor.shape != kept[name].shape or tensor.dtype != kept[name].dtype:
            raise CheckpointError(
                f"{name!r} is {tuple(tensor.shape)} {tensor.dtype} here and {tuple(kept[name].shape)} "
                f"{kept[name].dtype} in the snapshot; a snapshot fits the model that it was taken of"
            )
    for name, tensor in own.items():
        tensor.copy_(kept[name])
    store.refresh_modes()
    for path, site in store.sites.items():
        site.pulse.count = saved["forwards"].get(path, 0)
        for _, bank in site.slots.items():
            bank.zero_grads()
    restore_fittings(store, saved["fittings"])


@torch.no_grad()
def restore_fittings(store: SeedStore, saved: Mapping[str, Any]) -> None:
    """Copy what `fittings` gave back."""
    for path, told in saved.items():
        site = store.sites[path]
        fitting = site.fitting = Fitting(store.config.isolation_every, store.shared)
        fitting.count = told["count"]
        for name, sums in told["fits"].items():
            fit = fitting.fit(name, dict(site.slots.items())[name])
            for key, value in sums.items():
                fit.sums[key].copy_(value)


# -- the optimizer -------------------------------------------------------------------------------------------


def _has_own_format(optimizer: torch.optim.Optimizer) -> bool:
    return type(optimizer).state_dict is not torch.optim.Optimizer.state_dict


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What the optimizer remembers. `Optimizer.load_state_dict` casts states to the parameter's type, so they are
    taken as they are; one with a `state_dict` of its own is asked for that.
    """
    if _has_own_format(optimizer):
        return {"own": clone(optimizer.state_dict())}
    params = [param for group in optimizer.param_groups for param in group["params"]]
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    states = {place: dict(optimizer.state[p]) for place, p in enumerate(params) if p in optimizer.state}
    return {"groups": clone(groups), "states": clone(states)}


def check_optimizer(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """Raises CheckpointError where `saved` is of another kind of optimizer, or of other groups."""
    groups = saved.get("groups")
    if groups is None:
        return
    if len(groups) != len(optimizer.param_groups):
        raise CheckpointError(
            f"the optimizer has {len(optimizer.param_groups)} parameter groups, the snapshot {len(groups)}"
        )
    missing = sorted(set(optimizer.defaults) - set(groups[0]))
    if missing:
        raise CheckpointError(
            f"the snapshot is of another optimizer than this {type(optimizer).__name__}: it has no "
            f"{', '.join(missing)}; give the Grower the same kind that it was taken with"
        )


@torch.no_grad()
def restore_optimizer(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """Inverse of `optimizer_state`; tensors that are still there are written to in place. Raises CheckpointError."""
    if "own" in saved:
        optimizer.load_state_dict(clone(saved["own"]))
        return
    check_optimizer(optimizer, saved)
    for group, kept in zip(optimizer.param_groups, saved["groups"], strict=True):
        for name, value in kept.items():
            group[name] = _into(group.get(name), value)
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for place, param in enumerate(params):
        kept = saved["states"].get(place)
        if kept is None:
            optimizer.state.pop(param, None)
            continue
        state = optimizer.state[param]
        for name in [name for name in state if name not in kept]:
            del state[name]
        for name, value in kept.items():
            # `step` stays where the optimizer keeps it, often the CPU; the rest belongs to the parameter.
            state[name] = _into(state.get(name), value, None if name == "step" else param.device)


def _into(own: Any, saved: Any, device: torch.device | None = None) -> Any:
    if not isinstance(saved, Tensor):
        return clone(saved)
    if isinstance(own, Tensor) and own.shape == saved.shape and own.dtype == saved.dtype:
        return own.copy_(saved)
    return saved.clone() if device is None else saved.to(device, copy=True)


# -- chance --------------------------------------------------------------------------------------------------


def rng_state(device: torch.device) -> dict[str, Any]:
    """The random states of torch (CPU and the model's device), Python and NumPy."""
    found: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": np.random.get_state(),
    }
    if device.type == "cuda":
        found["cuda"] = torch.cuda.get_rng_state(device)
    return found


def restore_rng(saved: Mapping[str, Any], device: torch.device) -> None:
    """Inverse of `rng_state`."""
    torch.set_rng_state(saved["torch"].cpu())
    version, numbers, gauss = saved["python"]
    random.setstate((version, tuple(numbers), gauss))
    np.random.set_state(saved["numpy"])
    if device.type == "cuda" and "cuda" in saved:
        torch.cuda.set_rng_state(saved["cuda"].cpu(), device)


def states_in(snapshot: Snapshot) -> list[Lifecycle]:
    """The state of every seed in a snapshot."""
    values = snapshot.tree["model"]["tensors"]["state/lifecycle"].tolist()
    return [Lifecycle(value) for value in values]
