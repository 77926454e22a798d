"""Times of candidates from a process that may die of one: `tune_worker` and its pipes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, NamedTuple, Protocol

import msgspec
import torch

from morphc.errors import KernelError
from morphc.kernels.spec import KernelSpec, TuneConfig

_FOLDER: Final = Path(__file__).absolute().parent
ROOT: Final = _FOLDER.parent if _FOLDER.parent.name != "morphc" else _FOLDER.parent.parent
"""The folder that `import morphc` finds the package in."""


class Event(NamedTuple):
    """`begin` and `failed` are of candidate `at`; `times` has microseconds by candidate, newer ones for some."""

    kind: str
    at: int = -1
    why: str = ""
    times: Mapping[int, float] = MappingProxyType({})


class Timer(Protocol):
    """What `tuner.tune` has its candidates timed by."""

    def time(self, spec: KernelSpec, rows: int, configs: Sequence[TuneConfig]) -> Iterator[Event]:
        """Every candidate has a `begin` first, and a time or a failure in the end."""

    def close(self) -> None:
        """No more is timed."""


class ProcessTimer:
    """On `device`, in a process that is started again if a candidate ends it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._process: subprocess.Popen[str] | None = None

    def time(self, spec: KernelSpec, rows: int, configs: Sequence[TuneConfig]) -> Iterator[Event]:
        """See `Timer`. A candidate that ended the process is left out, and the others are timed anew."""
        left = list(range(len(configs)))
        while left:
            running = -1
            for told in self._asked(spec, rows, [configs[at] for at in left]):
                if "begin" in told:
                    running = left[told["begin"]]
                    yield Event("begin", running)
                elif "failed" in told:
                    yield Event("failed", left[told["failed"]], told["why"])
                elif "times" in told:
                    yield Event("times", times={left[at]: us for at, us in told["times"]})
                elif "end" in told:
                    return
            # The pipe has ended, and the process with it.
            status = self._ended()
            if running < 0:
                raise KernelError(f"the process that times kernels ended before the first (status {status})")
            yield Event("failed", running, f"ended the process that timed it (status {status})")
            left.remove(running)

    def _asked(self, spec: KernelSpec, rows: int, configs: Sequence[TuneConfig]) -> Iterator[dict[str, Any]]:
        if self._process is None or self._process.poll() is not None:
            self._process = self._started()
        question = {
            "spec": msgspec.to_builtins(spec),
            "rows": rows,
            "device": str(self._device),
            "configs": msgspec.to_builtins(configs),
        }
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        except OSError:
            return
        for line in self._process.stdout:
            told = json.loads(line)
            yield told
            if "end" in told:
                return

    def _started(self) -> subprocess.Popen[str]:
        if not sys.executable:
            raise KernelError("this Python doesn't know its own executable (sys.executable)")
        paths = [str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        env = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}
        return subprocess.Popen(
            # -P: the folder that somebody works in may hold modules with everyday names.
            [sys.executable, "-P", "-m", "morphc.kernels.tune_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=env,
            text=True,
            # A group of its own: Ctrl-C is ours to handle.
            start_new_session=True,
        )

    def _ended(self) -> int:
        assert self._process is not None
        status = self._process.wait()
        self.close()
        return status

    def close(self) -> None:
        """End the process."""
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        self._process = None
