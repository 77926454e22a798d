"""The `morphc` command. Nothing here imports torch; the commands do, once their arguments are checked."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

import typer

from morphc.cli.app import app
from morphc.errors import (
    CacheError,
    CheckpointError,
    ConfigError,
    ExampleInputError,
    HostForwardError,
    MorphcError,
    PlanError,
    UnsupportedHostError,
    UserCodeError,
)

INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run `morphc` and return its exit status.

    0: done. 1: the user's code raised, or verification failed. 2: arguments, files or configuration.
    130: Ctrl-C.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminated)
    try:
        status = app(args=argv, prog_name="morphc", standalone_mode=False)
    except MorphcError as error:
        _complain(str(error))
        return exit_status(error)
    except (KeyboardInterrupt, typer.Abort):
        status = INTERRUPTED
    except _Terminated:
        return 128 + signal.SIGTERM
    except Exception as error:
        # typer brings click along under a module name that differs between its versions, so its errors are
        # known by what they can do.
        if not hasattr(error, "format_message"):
            raise
        if message := error.format_message():  # empty when the help was the answer
            _complain(message)
        return 2
    if status == INTERRUPTED:
        _complain("interrupted")
    return status if isinstance(status, int) else 0


def exit_status(error: MorphcError) -> int:
    """2 where other arguments, files or options would help, 1 where the model itself has to change."""
    if isinstance(error, HostForwardError):
        return 1
    if isinstance(error, UserCodeError):
        return 1 if error.__cause__ is not None else 2
    refused = (ConfigError, PlanError, ExampleInputError, UnsupportedHostError, CheckpointError, CacheError)
    return 2 if isinstance(error, refused) else 1


class _Terminated(BaseException):
    """SIGTERM, as an exception, so that a half-written output folder is cleaned up on the way out."""


def _complain(message: str) -> None:
    print(f"morphc: {message}", file=sys.stderr)


def _terminated(signum: int, frame: FrameType | None) -> NoReturn:
    raise _Terminated
