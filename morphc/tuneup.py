"""`morphc.tune`: time the kernels of a compiled model on this machine, once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, get_args

import msgspec
import torch
from torch import nn

from morphc.errors import ConfigError, UnknownNameError
from morphc.kernels import backend, tuner, tuning
from morphc.kernels.spec import TuneConfig
from morphc.kernels.tuner import Outcome, Task
from morphc.passes.plan import Plan, Site
from morphc.runtime import ahead
from morphc.runtime.ahead import Seen
from morphc.runtime.store import store_of

Mode = Literal["off", "quick", "full"]


class Tuning(msgspec.Struct, frozen=True):
    """What a run of tuning found, kernel by kernel; configs: what the kernels now use, by name, as a plan has it."""

    device: str
    outcomes: tuple[Outcome, ...]
    configs: dict[str, TuneConfig]

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def lines(self) -> Iterator[str]:
        """A table."""
        timed = [one for one in self.outcomes if one.timed]
        known = sum(not one.timed and one.us is not None for one in self.outcomes)
        yield f"tuned on {self.device}: {len(self.outcomes)} kernels, {len(timed)} timed now, {known} known"
        wide = max((len(one.kernel) for one in self.outcomes), default=0)
        if self.outcomes:
            yield f"  {'kernel':{wide}}  {'rows':>8} {'best us':>8} {'guess us':>8} {'memory':>6}  config"
        for one in self.outcomes:
            if one.us is None or one.config is None:
                yield f"  {one.kernel:{wide}}  {one.rows:8} {'-':>8} {'-':>8} {'-':>6}  {one.problem}"
                continue
            guess = f"{one.guess_us:8.1f}" if one.guess_us is not None else f"{'-':>8}"
            yield (
                f"  {one.kernel:{wide}}  {one.rows:8} {one.us:8.1f} {guess} {one.roofline:6.0%}  "
                f"{_text(one.config)}"
            )


def _text(config: TuneConfig) -> str:
    return f"{config.block_rows}x{config.block_cols}, {config.num_warps} warps, {config.num_stages} stages"


def tune(
    model: nn.Module,
    mode: Literal["quick", "full"] = "quick",
    *,
    device: torch.device | str | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Tuning:
    """Time candidates of the model's kernels on `device` (None: where the model is, else the current GPU).

    `quick` times the eight best guesses of every kernel, `full` all candidates. Answers are kept in the cache and used
    by every later compile on such a device; what is known is not timed again, and after Ctrl-C the next call goes on.
    Of several ranks of torch.distributed the first one tunes, for all: call it on each. progress(text, done, total).

    Raises NotMorphedError, UnknownNameError for another mode, ConfigError where the device runs no kernels.
    """
    store = store_of(model)
    return tune_sites(tasks_of(model, store.report.plan), mode, device or _device_of(model), progress)


def tune_sites(
    tasks: Iterable[Task],
    mode: str,
    device: torch.device | str,
    progress: Callable[[str, int, int], None] | None = None,
) -> Tuning:
    """`tune` for kernels that were found already."""
    known: tuple[str, ...] = get_args(tuner.Mode)
    if mode not in known:
        raise UnknownNameError("mode of tuning", mode, known)
    device = _indexed(torch.device(device))
    if reason := backend.unavailable(device):
        raise ConfigError(f"there is no GPU to time kernels on: {reason}")
    if device.type != "cuda":
        raise ConfigError(f"kernels are timed on GPUs, and {device} is none")
    every = list(tasks)

    def made() -> bytes:
        outcomes = tuner.tune(every, device, mode, progress=progress)  # type: ignore[arg-type]
        found = {tuning.key(task.spec, task.rows) for task in every}
        configs = {name: config for name, config in tuning.known().items() if name in found}
        name = torch.cuda.get_device_name(device)
        return msgspec.json.encode(Tuning(name, tuple(outcomes), configs))

    result = msgspec.json.decode(by_one_rank(made), type=Tuning)
    tuning.adopt(result.configs)
    return result


def tasks_of(model: nn.Module, plan: Plan) -> list[Task]:
    """The kernels of a compiled model that can be tuned."""
    return list(ahead.tasks(store_of(model).sites, seen_by(plan.sites)))


def seen_by(sites: Iterable[Site]) -> dict[str, Seen]:
    """The activations of a plan's sites as the example input made them."""
    return {
        site.path: Seen(site.rows, site.positions, getattr(torch, site.dtype), site.source) for site in sites
    }


def adopt_kept(model: nn.Module, plan: Plan) -> int:
    """Use what the cache knows about the model's kernels on its device; how many kernels that is."""
    device = _device_of(model)
    return tuner.adopt_kept(tasks_of(model, plan), device) if device.type == "cuda" else 0


def by_one_rank(make: Callable[[], bytes]) -> bytes:
    """What `make` gives, which only the first rank calls where torch.distributed runs; all ranks get it, or raise."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return make()
    where = "cuda" if dist.get_backend() == "nccl" else "cpu"
    told: BaseException | None = None
    data = b""
    if dist.get_rank() == 0:
        try:
            data = make()
        except BaseException as error:
            told = error
    size = torch.tensor([-1 if told is not None else len(data)], dtype=torch.int64, device=where)
    dist.broadcast(size, 0)
    if told is not None:
        raise told
    if int(size) < 0:
        raise ConfigError("tuning failed on the first rank, which says why")
    sent: Any = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else None
    buffer = torch.empty(int(size), dtype=torch.uint8, device=where) if sent is None else sent.to(where)
    dist.broadcast(buffer, 0)
    return bytes(buffer.cpu().tolist())


def _device_of(model: nn.Module) -> torch.device:
    tensors = (*model.parameters(), *model.buffers())
    found = next((tensor.device for tensor in tensors if tensor.device.type == "cuda"), None)
    return found if found is not None else torch.device("cuda")


def _indexed(device: torch.device) -> torch.device:
    if device.type != "cuda" or device.index is not None or not torch.cuda.is_available():
        return device
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", torch.cuda.current_device())))
