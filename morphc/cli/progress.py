"""A bar on stderr, shown when the work is long and somebody is watching."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

LONG = 0.7


class ProgressBar:
    """Called as `bar(stage, done, total)`. Draws nothing in the first `LONG` seconds or off a terminal.

    remaining: also show how long it will take.
    """

    def __init__(self, remaining: bool = False) -> None:
        self._remaining = remaining
        self._started = time.monotonic()
        self._watched = sys.stderr.isatty()
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> ProgressBar:
        return self

    def __call__(self, stage: str, done: int, total: int) -> None:
        if not self._watched or time.monotonic() - self._started < LONG:
            return
        if self._progress is None:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                *((TextColumn("left"), TimeRemainingColumn()) if self._remaining else ()),
            )
            self._progress = Progress(*columns, console=Console(stderr=True), transient=True)
            self._task = self._progress.add_task(stage, total=total)
            self._progress.start()
        assert self._task is not None
        self._progress.update(self._task, description=stage, completed=done, total=total)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()
