"""Tuning a model's kernels: what is timed, what is kept, and what the next run takes over."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

import morphc
from morphc import tuneup
from morphc.errors import ConfigError, UnknownNameError
from morphc.kernels import autotune, devices, timer, tuner, tuning
from morphc.kernels.spec import KernelSpec, TuneConfig
from morphc.kernels.timer import Event, ProcessTimer
from morphc.kernels.tuner import Outcome, Task

HERE = tuner.Place("A device", devices.H200)
SPEC = KernelSpec(
    kind="forward", features=64, seeds=8, chunk=8, slots=4, rank=4, blueprint="bottleneck", blend="residual",
    epilogue=None, layout="last", dtype="bfloat16",
)  # fmt: skip
CONFIGS = tuple(TuneConfig(16, 16, 2, stages, group=2, programs=2) for stages in (1, 2, 3))


class Clock:
    """Candidates take the microseconds given, in the order of CONFIGS; None fails. stop: Ctrl-C behind that one."""

    def __init__(self, *us: float | None, stop: int | None = None) -> None:
        self.us, self.stop = us, stop
        self.asked: list[TuneConfig] = []

    def time(self, spec: KernelSpec, rows: int, configs: Sequence[TuneConfig]) -> Iterator[Event]:
        for at, config in enumerate(configs):
            self.asked.append(config)
            yield Event("begin", at)
            if (us := self.us[CONFIGS.index(config)]) is None:
                yield Event("failed", at, "CUDA out of memory")
            else:
                yield Event("times", times={at: us})
            if at == self.stop:
                raise KeyboardInterrupt

    def close(self) -> None:
        """Nothing to end."""


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Three candidates whose binaries differ, and a cache of its own."""
    monkeypatch.setenv("MORPHC_CACHE_DIR", str(tmp_path))
    kind = autotune.KINDS["forward"]._replace(configs=lambda *_: CONFIGS)
    monkeypatch.setattr(autotune, "KINDS", dict(autotune.KINDS) | {"forward": kind})
    monkeypatch.setattr(tuner, "QUICK", 2)
    tuning.forget()
    yield
    tuning.forget()


def run(clock: Clock, mode: tuner.Mode = "full", rows: int = 30) -> Outcome:
    tasks = [Task(SPEC, rows, ("fc1",)), Task(SPEC, rows, ("fc2",))]
    (found,) = tuner.tune(tasks, torch.device("cpu"), mode, timer=clock, where=HERE)
    return found


def test_the_fastest_is_used_from_then_on_and_by_later_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    found = run(Clock(9.0, 5.0, 7.0))
    assert (found.config, found.us, found.guess_us, found.timed) == (CONFIGS[1], 5.0, 9.0, 3)
    assert (found.rows, found.layers) == (32, ("fc1", "fc2"))
    assert tuning.choose(SPEC, 30) == CONFIGS[1]
    tuning.forget()  # as another process begins
    monkeypatch.setattr(tuner.backend, "unavailable", lambda _: "")
    monkeypatch.setattr(tuner.Place, "of", classmethod(lambda *_: HERE))
    assert tuner.adopt_kept([Task(SPEC, 32), Task(SPEC, 64)], torch.device("cpu")) == 1
    assert tuning.lookup(SPEC, 32) == CONFIGS[1]
    assert tuning.lookup(SPEC, 64) is None


def test_what_is_known_is_not_timed_again() -> None:
    first = run(Clock(9.0, 5.0, 7.0), "quick")
    assert (first.timed, first.candidates) == (2, 2)
    again = Clock()
    assert run(again, "quick").us == 5.0
    assert not again.asked
    # One more candidate is timed beside the best so far, since clocks drift.
    more = Clock(9.0, 6.0, 4.0)
    assert (run(more).config, more.asked) == (CONFIGS[2], [CONFIGS[1], CONFIGS[2]])
    (table,) = morphc.cache().show(SPEC.name).tables
    (answer,) = table.answers
    assert {trial.config: trial.us for trial in answer.trials} == dict(
        zip(CONFIGS, (9.0, 6.0, 4.0), strict=True)
    )
    assert answer.complete


def test_ctrl_c_keeps_what_was_timed_and_the_next_run_goes_on() -> None:
    with pytest.raises(KeyboardInterrupt):
        run(Clock(9.0, 5.0, 4.0, stop=1))
    (table,) = morphc.cache().show(SPEC.name).tables
    assert not table.answers[0].complete
    clock = Clock(9.0, 5.0, 4.0)
    assert run(clock).config == CONFIGS[2]
    assert clock.asked == [CONFIGS[1], CONFIGS[2]]


def test_candidates_that_fail_are_kept_with_the_reason() -> None:
    found = run(Clock(9.0, None, 7.0))
    assert found.config == CONFIGS[2]
    (table,) = morphc.cache().show(SPEC.name).tables
    assert {trial.problem for trial in table.answers[0].trials} == {"", "CUDA out of memory"}
    nothing = run(Clock(None, None, None), rows=500)
    assert (nothing.config, nothing.problem) == (None, "CUDA out of memory")


def test_a_device_without_kernels_is_refused() -> None:
    model = morphc.compile(nn.Linear(8, 8), torch.randn(2, 8))
    with pytest.raises(UnknownNameError, match=r"unknown mode of tuning 'quik'"):
        morphc.tune(model, "quik")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="kernels are timed on GPUs, and cpu is none"):
        morphc.tune(model, device="cpu")


WORKER = """
import json, os, sys
for line in sys.stdin:
    question = json.loads(line)
    for at, config in enumerate(question["configs"]):
        print(json.dumps({"begin": at}), flush=True)
        if config["num_stages"] == 2:
            os._exit(7)
    print(json.dumps({"times": [[at, c["num_stages"]] for at, c in enumerate(question["configs"])]}))
    print(json.dumps({"end": True}), flush=True)
"""


def test_a_candidate_that_ends_the_process_is_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "worker.py").write_text(WORKER)
    real, started = subprocess.Popen, []

    def start(command: list[str], **options: object) -> subprocess.Popen[str]:
        started.append(command)
        return real([sys.executable, str(tmp_path / "worker.py")], **options)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(timer.subprocess, "Popen", start)
    timing = ProcessTimer(torch.device("cuda:0"))
    told = [event for event in timing.time(SPEC, 32, CONFIGS) if event.kind != "begin"]
    assert told == [
        Event("failed", 1, "ended the process that timed it (status 7)"),
        Event("times", times={0: 1, 2: 3}),
    ]
    assert len(started) == 2
    assert [event.kind for event in timing.time(SPEC, 32, CONFIGS[:1])] == ["begin", "times"]
    assert len(started) == 2, "a process that still runs is asked again"
    timing.close()


def test_the_worker_imports_what_this_process_imported() -> None:
    command = [sys.executable, "-P", "-c", "import morphc.kernels; print(morphc.kernels.__file__)"]
    env = {"PYTHONPATH": str(timer.ROOT), "PATH": ""}
    found = subprocess.run(command, capture_output=True, text=True, check=True, env=env, cwd="/").stdout
    assert Path(found.strip()).resolve().parent == Path(timer.__file__).resolve().parent


def _rank(rank: int, folder: str, fails: bool) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )

    def make() -> bytes:
        if fails:
            raise ConfigError("no GPU")
        return json.dumps({"from": rank}).encode()

    try:
        told = tuneup.by_one_rank(make).decode()
    except ConfigError as error:
        told = str(error)
    Path(folder, f"{rank}.txt").write_text(told)
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("fails", "told"),
    [
        (False, ['{"from": 0}', '{"from": 0}']),
        (True, ["no GPU", "tuning failed on the first rank, which says why"]),
    ],
)
def test_one_rank_tunes_for_all(tmp_path: Path, fails: bool, told: list[str]) -> None:
    mp.spawn(_rank, (str(tmp_path), fails), nprocs=2)
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)] == told
