"""Tuning the kernels of a model on this machine's GPU, and keeping what was found.

Every candidate's time goes to the kernel's table in the cache, when its kernel is done: what was timed before isn't
timed again, an interrupted run goes on where it was, and a later process takes the answers over (`adopt_kept`).
"""

from __future__ import annotations

import time as clock
from collections.abc import Callable, Iterable, Sequence
from typing import Final, Literal, NamedTuple

import msgspec
import torch

from morphc.errors import ConfigError
from morphc.kernels import autotune, backend, binaries, codegen, devices, tuning
from morphc.kernels.cache import place, tables
from morphc.kernels.cache.manifest import Provenance
from morphc.kernels.cache.tables import Answer, Table, Trial
from morphc.kernels.codegen import Source
from morphc.kernels.compile import compile_all
from morphc.kernels.devices import Device
from morphc.kernels.spec import KernelSpec, TuneConfig
from morphc.kernels.timer import ProcessTimer, Timer
from morphc.kernels.wanted import SOURCES

Mode = Literal["quick", "full"]
QUICK: Final = 8
"""Candidates of a kernel that a quick run times, best guesses first; a full one times all."""

Progress = Callable[[str, int, int], None]


class Task(NamedTuple):
    """One kernel for a bucket of rows, and the layers that it is for."""

    spec: KernelSpec
    rows: int
    layers: tuple[str, ...] = ()


class Outcome(msgspec.Struct, frozen=True):
    """What a kernel got. us: of its best candidate; guess_us: of the one that is used without tuning, None where it
    wasn't timed. timed: candidates that were timed this time, 0 where all were known. problem: why there is none."""

    kernel: str
    rows: int
    config: TuneConfig | None
    us: float | None
    guess_us: float | None
    roofline: float
    timed: int
    candidates: int
    layers: tuple[str, ...]
    problem: str = ""


class _Work(NamedTuple):
    task: Task
    source: Source
    configs: Sequence[TuneConfig]
    before: Answer | None


class Place(NamedTuple):
    """The device that is tuned for, as tables name it."""

    name: str
    model: Device

    @classmethod
    def of(cls, device: torch.device) -> Place:
        """Raises ConfigError where no kernels run on it."""
        if reason := backend.unavailable(device):
            raise ConfigError(f"kernels can't be timed on {device}: {reason}")
        return cls(torch.cuda.get_device_name(device), devices.parse(str(device)))


def tune(
    tasks: Iterable[Task],
    device: torch.device,
    mode: Mode = "quick",
    *,
    progress: Progress | None = None,
    timer: Timer | None = None,
    where: Place | None = None,
) -> list[Outcome]:
    """Time what isn't known yet of every task, keep all of it, and give the fastest to `tuning.choose`.

    progress(text, done, total) counts kernels. Ctrl-C keeps what was found and is raised. Raises ConfigError where
    `device` runs no kernels.
    """
    told = progress or _silent
    here = where or Place.of(device)
    work = [_work(task, mode, here) for task in _merged(tasks)]
    fresh = [one for one in work if _untimed(one)]
    trials = _compiled(fresh, here.model.arch, told)
    timing = timer or ProcessTimer(device)
    outcomes: list[Outcome] = []
    try:
        for number, one in enumerate(work):
            found = trials.get(number_of(one, fresh))
            if found is not None:
                told(_text(one, None, 0, len(found)), number, len(work))
                answer = _timed(one, found, timing, here, told, number, len(work))
            else:
                answer = one.before
            outcomes.append(_outcome(one, answer, found or (), here))
            if answer is not None:
                tuning.adopt({tuning.key(one.task.spec, one.task.rows): answer.config})
        told("tuned", len(work), len(work))
    finally:
        timing.close()
    return outcomes


def number_of(one: _Work, fresh: Sequence[_Work]) -> int:
    """Its place among those that are timed, -1 if it isn't."""
    return next((at for at, other in enumerate(fresh) if other is one), -1)


def adopt_kept(tasks: Iterable[Task], device: torch.device) -> int:
    """Give `tuning.choose` what the cache knows of these kernels on `device`; how many that are."""
    root = place.root()
    if not place.is_folder(root / "tune") or backend.unavailable(device):
        return 0
    here = Place.of(device)
    found = {}
    for task in _merged(tasks):
        name = tuning.key(task.spec, task.rows)
        if tuning.lookup(task.spec, task.rows) is None:
            answer = _before(SOURCES[task.spec.kind](task.spec), task, here)
            if answer is not None:
                found[name] = answer.config
    tuning.adopt(found)
    return len(found)


def _silent(text: str, done: int, total: int) -> None:
    """Nobody watches."""


def _merged(tasks: Iterable[Task]) -> list[Task]:
    """Equal kernels once, with all their layers; rows as buckets."""
    found: dict[str, Task] = {}
    for task in tasks:
        rows = tuning.bucket(task.rows)
        name = tuning.key(task.spec, rows)
        layers = (*found[name].layers, *task.layers) if name in found else task.layers
        found[name] = Task(task.spec, rows, tuple(dict.fromkeys(layers)))
    return list(found.values())


def _work(task: Task, mode: Mode, here: Place) -> _Work:
    source = SOURCES[task.spec.kind](task.spec)
    configs = tuple(autotune.KINDS[task.spec.kind].configs(task.spec, task.rows, here.model))
    return _Work(task, source, configs[:QUICK] if mode == "quick" else configs, _before(source, task, here))


def _before(source: Source, task: Task, here: Place) -> Answer | None:
    """What was found earlier with this Triton, in this way of timing."""
    path = tables.folder(place.root(), source.key) / tables.file_name(here.name, here.model.arch)
    try:
        answers = tables.read(path).answers
    except (place.DamagedError, OSError):
        return None
    known = (task.rows, binaries.triton_version(), tables.GRAPH_REPLAY)
    return next((one for one in answers if (one.rows, one.triton, one.method) == known), None)


def _untimed(one: _Work) -> list[TuneConfig]:
    known = {trial.config for trial in one.before.trials} if one.before is not None else set()
    return [config for config in one.configs if config not in known]


def _compiled(work: Sequence[_Work], target: str, told: Progress) -> dict[int, list[Trial]]:
    """Of each, by its place in `work`: its new candidates, with the best so far among them for comparison."""
    offered = []
    for one in work:
        configs = _untimed(one)
        if one.before is not None:
            configs = [one.before.config, *configs]
        offered.append(autotune.offered(one.task.spec, one.task.rows, configs, target))
    jobs = [job for candidates in offered for candidate in candidates for job in candidate.jobs]
    results = iter(
        compile_all(jobs, keep=True, progress=lambda done, total: told("compiling candidates", done, total))
    )
    found = {}
    for at, candidates in enumerate(offered):
        compiled = [[next(results) for _ in candidate.jobs] for candidate in candidates]
        found[at] = tuning.examined(candidates, compiled)
    return found


def _text(one: _Work, best: float | None, at: int, count: int) -> str:
    best_text = f", best {best:.1f} us" if best is not None else ""
    return f"{one.task.spec.name} at {one.task.rows} rows: candidate {at} of {count}{best_text}"


def _timed(
    one: _Work, trials: list[Trial], timer: Timer, here: Place, told: Progress, done: int, total: int
) -> Answer | None:
    """Times of the trials that have none; the table has them afterwards, and what was reached of them if this ends
    early."""
    alive = [at for at, trial in enumerate(trials) if not trial.problem and trial.same_as is None]
    times: dict[int, float] = {}
    complete = False
    try:
        for event in timer.time(one.task.spec, one.task.rows, [trials[at].config for at in alive]):
            if event.kind == "failed":
                at = alive[event.at]
                trials[at] = msgspec.structs.replace(trials[at], problem=event.why)
            times |= {alive[at]: us for at, us in event.times.items()}
            told(_text(one, min(times.values(), default=None), event.at + 1, len(alive)), done, total)
        complete = True
    finally:
        answer = _answer(one, trials, times, here, complete)
        if answer is not None:
            _keep(one, answer, here)
    return answer


def _answer(
    one: _Work, trials: Sequence[Trial], times: dict[int, float], here: Place, complete: bool
) -> Answer | None:
    """None where nothing was timed, now or earlier."""
    known = {trial.config: trial for trial in (one.before.trials if one.before is not None else ())}
    # An equal binary's place is counted among the candidates of one run: the time itself is kept instead.
    for at, trial in enumerate(trials):
        source = at if trial.same_as is None else trial.same_as
        us = times.get(source)
        problem = trials[source].problem
        if us is None and not problem:
            continue  # wasn't reached
        known[trial.config] = msgspec.structs.replace(trial, us=us, problem=problem, same_as=None)
    timed = [trial for trial in known.values() if trial.us is not None]
    if not timed:
        return None
    best = min(timed, key=lambda trial: trial.us or 0.0)
    return Answer(
        rows=one.task.rows,
        triton=binaries.triton_version(),
        method=tables.GRAPH_REPLAY,
        config=best.config,
        us=best.us or 0.0,
        memory_us=tuning.memory_us(one.task.spec, one.task.rows, here.model),
        trials=tuple(known.values()),
        created=clock.time(),
        complete=complete,
    )


def _keep(one: _Work, answer: Answer, here: Place) -> None:
    root = codegen.root_of(codegen.publish(one.source, Provenance(one.task.layers)))
    table = Table(place.SCHEMA, one.source.key, one.source.name, here.name, here.model.arch, (answer,))
    try:
        tables.save(root, table)
    except OSError as error:
        place.warn_once(
            "unwritable", root, f"what tuning found is not kept: {root} can't be written ({error.strerror})"
        )


def _outcome(one: _Work, answer: Answer | None, trials: Sequence[Trial], here: Place) -> Outcome:
    spec, rows, layers = one.task
    timed = sum(not trial.problem for trial in trials)
    if answer is None:
        told = "; ".join(dict.fromkeys(trial.problem for trial in trials if trial.problem))
        return Outcome(spec.name, rows, None, None, None, 0.0, timed, len(one.configs), layers, told)
    guess = next((trial.us for trial in answer.trials if trial.config == one.configs[0]), None)
    return Outcome(
        spec.name, rows, answer.config, answer.us, guess, answer.roofline, timed, len(one.configs), layers
    )
