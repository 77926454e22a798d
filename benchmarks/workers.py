"""Jobs in worker processes, which are replaced when they die, hang or lose their CUDA context.

One bad kernel (an illegal access, an endless loop) makes its process useless and must not end the run.
"""

from __future__ import annotations

import multiprocessing
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

Emit = Callable[[Any], None]
Job = Any
Function = Callable[[Job, Emit], None]


class ContextLost(RuntimeError):
    """The device answers no more in this process; what the job had emitted before stands."""


@dataclass
class Outcome:
    """What became of one job. `problem` is empty when it ended by itself; `lost`: its process with it."""

    job: Job
    emitted: list[Any] = field(default_factory=list)
    problem: str = ""
    lost: bool = False
    seconds: float = 0.0


@dataclass
class _Worker:
    process: Any
    pipe: Connection
    outcome: Outcome | None = None
    started: float = 0.0


def device_alive() -> bool:
    """Whether CUDA still answers in this process; true where it was never used."""
    import torch

    if not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def _serve(pipe: Connection, function: Function) -> None:
    while (job := pipe.recv()) is not None:
        problem, alive = "", True
        try:
            function(job, lambda value: pipe.send(("emit", value)))
        except ContextLost as error:
            problem, alive = str(error), False
        except Exception:
            problem, alive = traceback.format_exc(limit=-4), device_alive()
        pipe.send(("end" if alive else "lost", problem))
        if not alive:
            return


def run(
    function: Function,
    jobs: Sequence[Job],
    *,
    workers: int,
    limit_s: float,
    emitted: Callable[[Job, Any], None] | None = None,
    ended: Callable[[Outcome], Job | None] | None = None,
    until: float = float("inf"),
) -> list[Outcome]:
    """Every job once, in order, each for at most `limit_s`; none is begun after `until` (time.monotonic).

    `emitted` sees every value as it comes. `ended` sees each outcome and may give back a job to run instead
    (the same with less in it, say). With `workers` = 0 all runs in this process, and nothing is caught.
    """
    queue, outcomes = deque(jobs), []

    def close(outcome: Outcome) -> None:
        again = ended(outcome) if ended else None
        if again is None:
            outcomes.append(outcome)
        else:
            queue.appendleft(again)

    if not workers:
        while queue:
            close(_here(function, queue.popleft(), emitted))
        return outcomes
    crew = [_start(function) for _ in range(min(workers, len(queue)))]
    try:
        while queue or any(worker.outcome for worker in crew):
            for index, worker in enumerate(crew):
                if worker.outcome is None and queue and time.monotonic() < until:
                    if not worker.process.is_alive():
                        crew[index] = worker = _start(function)
                    worker.outcome, worker.started = Outcome(queue.popleft()), time.monotonic()
                    worker.pipe.send(worker.outcome.job)
            busy = [worker for worker in crew if worker.outcome]
            if not busy:
                break
            ready = wait([worker.pipe for worker in busy], timeout=0.5)
            for worker in busy:
                if worker.pipe in ready:
                    _listen(worker, emitted, close)
                elif time.monotonic() - worker.started > limit_s:
                    _stop(worker)
                    _finish(worker, close, f"no answer within {limit_s:.0f} s", lost=True)
    finally:
        for worker in crew:
            _stop(worker)
    return outcomes


def _here(function: Function, job: Job, emitted: Callable[[Job, Any], None] | None) -> Outcome:
    outcome, start = Outcome(job), time.monotonic()

    def emit(value: Any) -> None:
        outcome.emitted.append(value)
        if emitted:
            emitted(job, value)

    function(job, emit)
    outcome.seconds = time.monotonic() - start
    return outcome


def _start(function: Function) -> _Worker:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, function), daemon=True)
    process.start()
    theirs.close()
    return _Worker(process, ours)


def _stop(worker: _Worker) -> None:
    if worker.process.is_alive():
        worker.process.kill()
    worker.process.join(10)


def _finish(worker: _Worker, close: Callable[[Outcome], None], problem: str, *, lost: bool) -> None:
    outcome = worker.outcome
    assert outcome is not None
    outcome.problem, outcome.lost = problem, lost
    outcome.seconds = time.monotonic() - worker.started
    worker.outcome = None
    close(outcome)


def _listen(
    worker: _Worker, emitted: Callable[[Job, Any], None] | None, close: Callable[[Outcome], None]
) -> None:
    outcome = worker.outcome
    assert outcome is not None
    try:
        kind, value = worker.pipe.recv()
    except (EOFError, ConnectionResetError):
        _stop(worker)
        _finish(worker, close, f"its process ended with {worker.process.exitcode}", lost=True)
        return
    if kind == "emit":
        outcome.emitted.append(value)
        if emitted:
            emitted(outcome.job, value)
        return
    if kind == "lost":
        worker.process.join(10)
    _finish(worker, close, value, lost=kind == "lost")
