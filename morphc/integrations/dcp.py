"""Checkpoints of a run on many ranks by `torch.distributed.checkpoint`, also for another number of ranks.

Saved are the host (sharded or not), seeds and slots, the optimizer, scheduler and scaler, and the Grower. What each
rank has of its own, random states and what it has measured since the last tick, comes back on as many ranks as before,
and the run goes on bit for bit. On another number of ranks these begin anew.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as load_from
from torch.distributed.checkpoint.state_dict_saver import save as save_to

from morphc.errors import CheckpointError
from morphc.grow.grower import Grower
from morphc.grow.snapshot import TELEMETRY, fittings, model_tensors, restore_fittings, restore_rng, rng_state
from morphc.grow.tree import pack, unpack
from morphc.runtime.store import SeedStore

FORMAT: Final = "morphc ranks 1"


def save(grower: Grower, folder: str | os.PathLike[str], **more: Any) -> None:
    """Write a checkpoint to `folder`; every rank calls it. more: tensors, numbers, texts, lists
    and dicts of your own; rank 0's are kept.

    Not in it are snapshots of grafts under way. A checkpoint that was being written when its writer died has no
    `.metadata`, and `latest` passes it over.
    """
    ranks = grower.ranks
    state = _tensors(grower) | _packed(f"rank{ranks.rank}", _own(grower))
    # What is the same for all is rank 0's: its controller is the one that decides.
    state |= _packed("common", ranks.decided(lambda: {**_common(grower), "more": more}))
    save_to(state, checkpoint_id=os.fspath(folder), process_group=ranks.group)


def load(grower: Grower, folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Bring back what `save` wrote, on any number of ranks; every rank calls it. What was given as `more` then.

    Model, wrapping, optimizer and Grower are made as for a fresh run before. Raises CheckpointError, with the model
    as it was, where the folder has no whole checkpoint or one of another model.
    """
    ranks, where = grower.ranks, Path(folder)
    metadata = _metadata(where)
    common = _unpacked("common", metadata, where, grower)
    if common.get("format") != FORMAT:
        raise CheckpointError(f"{where} was not written by morphc.integrations.dcp.save of this version")
    _fits(grower, common, where)
    mine = {}
    if common["ranks"] == ranks.count:
        mine = _unpacked(f"rank{ranks.rank}", metadata, where, grower)
    state = _tensors(grower)
    _read(state, where, grower)
    store = grower.store
    set_optimizer_state_dict(grower.model, grower.optimizer, optim_state_dict=state["optimizer"])
    for own_part, name in ((grower.scheduler, "scheduler"), (grower.scaler, "scaler")):
        if own_part is not None and common[name] is not None:
            own_part.load_state_dict(common[name])
    store.refresh_modes()
    for path, site in store.sites.items():
        site.pulse.count = common["forwards"].get(path, 0)
        for _, bank in site.slots.items():
            bank.zero_grads()
    told = dict(common["grower"])
    if mine:
        told["window"] = mine["window"]
        restore_fittings(store, mine["fittings"])
        _restore_telemetry(store, mine["telemetry"])
        restore_rng(mine["rng"], grower.device)
    else:
        store.reset_telemetry()
    grower.load_state_dict(told)
    grower.ranks.agree(store)
    found: dict[str, Any] = common["more"]
    return found


def latest(folder: str | os.PathLike[str]) -> Path | None:
    """Of the checkpoints in `folder`, the whole one that was written last; None without any."""
    whole = [path.parent for path in Path(folder).glob("*/.metadata")]
    return max(whole, key=lambda path: (path / ".metadata").stat().st_mtime_ns, default=None)


def _tensors(grower: Grower) -> dict[str, Any]:
    model = model_tensors(
        grower.model
    )  # which also leaves the parameters sharded, as the optimizer knows them
    return {"model": model, "optimizer": get_optimizer_state_dict(grower.model, grower.optimizer)}


def _packed(name: str, tree: Mapping[str, Any]) -> dict[str, Any]:
    """A tree as one text and its tensors, whose names and shapes the metadata tells."""
    tensors: dict[str, Tensor] = {}
    text = json.dumps(pack(dict(tree), tensors))
    return {name: text} | {f"{name}/{key}": value for key, value in tensors.items()}


def _unpacked(name: str, metadata: Metadata, where: Path, grower: Grower) -> dict[str, Any]:
    """Inverse of `_packed`; empty where there is no such tree."""
    known = metadata.state_dict_metadata
    state: dict[str, Any] = {name: ""} if name in known else {}
    for key, told in known.items():
        if key.startswith(f"{name}/") and isinstance(told, TensorStorageMetadata):
            state[key] = torch.empty(told.size, dtype=told.properties.dtype)
    _read(state, where, grower)
    if not state:
        return {}
    tensors = {key.removeprefix(f"{name}/"): value for key, value in state.items() if key != name}
    found: dict[str, Any] = unpack(json.loads(state[name]), tensors)
    return found


def _common(grower: Grower) -> dict[str, Any]:
    store = grower.store
    return {
        "format": FORMAT,
        "ranks": grower.ranks.count,
        "sites": _sites(store),
        "slots": {path: [bank.slots for _, bank in site.slots.items()] for path, site in store.sites.items()},
        "forwards": {path: site.pulse.count for path, site in store.sites.items()},
        "grower": grower.state_dict(),
        "scheduler": grower.scheduler.state_dict() if grower.scheduler is not None else None,
        "scaler": grower.scaler.state_dict() if grower.scaler is not None else None,
    }


def _own(grower: Grower) -> dict[str, Any]:
    store = grower.store
    store.state.settle()
    return {
        "rng": rng_state(grower.device),
        "window": grower.state_dict()["window"],
        "fittings": fittings(store),
        "telemetry": {name: store.state.get_buffer(name).clone() for name in TELEMETRY[:2]},
    }


def _restore_telemetry(store: SeedStore, saved: Mapping[str, Tensor]) -> None:
    store.state.settle()
    store.state.window += 1
    with torch.no_grad():
        for name, value in saved.items():
            store.state.get_buffer(name).copy_(value)


def _sites(store: SeedStore) -> dict[str, list[Any]]:
    return {
        path: [site.features, site.seeds, [name for name, _ in site.slots.items()]]
        for path, site in store.sites.items()
    }


def _fits(grower: Grower, common: Mapping[str, Any], where: Path) -> None:
    store, saved = grower.store, common["sites"]
    own = _sites(store)
    for path in [*own, *(path for path in saved if path not in own)]:
        if own.get(path) != saved.get(path):
            raise CheckpointError(
                f"{where} is of another model: the site at {path!r} has {_told(saved.get(path))} there and "
                f"{_told(own.get(path))} here; compile with the plan it was saved with"
            )
    wanted = max((slots for banks in common["slots"].values() for slots in banks), default=0)
    store.enlarge(wanted)
    for path, banks in common["slots"].items():
        here = [bank.slots for _, bank in store.sites[path].slots.items()]
        if here != list(banks):
            raise CheckpointError(
                f"{where} has {banks} slots at {path!r}, here are {here}; compile with the plan it was saved with"
            )


def _told(site: list[Any] | None) -> str:
    return f"{site[0]} features, {site[1]} seeds of {', '.join(site[2])}" if site is not None else "no seeds"


def _metadata(where: Path) -> Metadata:
    try:
        return FileSystemReader(where).read_metadata()
    except Exception as error:
        raise CheckpointError(
            f"{where} holds no whole checkpoint ({type(error).__name__}: {error}); morphc.integrations.dcp.latest "
            "finds the last whole one among several"
        ) from error


def _read(state: dict[str, Any], where: Path, grower: Grower) -> None:
    try:
        load_from(state, checkpoint_id=os.fspath(where), process_group=grower.ranks.group)
    except CheckpointException as error:  # a BaseException
        rank, why = next(iter(error.failures.items()), (0, None))
        told = f"{type(why[0]).__name__}: {why[0]}" if why is not None else str(error)
        raise CheckpointError(f"{where} can't be read (rank {rank}: {told})") from error
