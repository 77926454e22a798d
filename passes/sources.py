"""Where in the user's code something happens: files, lines, and their text."""

from __future__ import annotations

import inspect
import linecache
import os
import sys
from collections.abc import Callable
from types import CodeType
from typing import Any, TypeVar

import torch
from torch import nn

F = TypeVar("F", bound=Callable[..., Any])

TORCH_DIR = torch.__path__[0]
# This package's own frames: `morphc/passes` is reached under that name, whatever the checkout looks like.
_OWN_DIR = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
# Where every module is called from; a line in them says nothing.
_GENERAL = ("container.py", "module.py")
_BOUNDARIES: set[CodeType] = set()


def boundary(function: F) -> F:
    """Decorator of a function that runs the model: whoever called it is not part of the model."""
    _BOUNDARIES.add(function.__code__)
    return function


def is_users(file: str) -> bool:
    """Whether a code object's file is neither torch's nor morphc's nor made at run time."""
    return not file.startswith((TORCH_DIR, _OWN_DIR, "<"))


def user_frame() -> str:
    """`file:line` of the nearest caller outside of torch and of morphc, else of one of torch's layers, else empty."""
    frame = sys._getframe(2)
    fallback = ""
    while frame is not None:
        file = frame.f_code.co_filename
        if frame.f_code in _BOUNDARIES:
            break
        if is_users(file):
            return f"{file}:{frame.f_lineno}"
        torchs = file.startswith(TORCH_DIR) and "/nn/modules/" in file and not file.endswith(_GENERAL)
        if torchs and not fallback:
            fallback = f"{file}:{frame.f_lineno}"
        if frame.f_back is None:
            break
        frame = frame.f_back
    return fallback


def definition(module: nn.Module) -> str:
    """file:line of the module's forward."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if code is not None else ""


def source_text(source: str) -> str:
    """The text of `file:line`, stripped; empty when it can't be read."""
    file, _, line = source.rpartition(":")
    return linecache.getline(file, int(line)).strip() if line.isdigit() and file else ""


def describe_error(raised: BaseException) -> tuple[str, str]:
    """The first line of an error, and the file:line in the user's code where it came from."""
    where = ""
    trace = raised.__traceback__
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if is_users(file):
            where = f"{file}:{trace.tb_lineno}"
        trace = trace.tb_next
    text = str(raised).strip().split("\n")[0]
    return f"{type(raised).__name__}: {text}", where
