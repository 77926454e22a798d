"""First calls, so that the timed ones measure the compiler and not the import of its libraries."""

from __future__ import annotations

import dataclasses

from . import compiler
from .registry import ENTRIES
from .runs import tensor_names, trace


def up() -> None:
    """Compile and run two hosts twice; what goes wrong shows when their own turn comes."""
    for name in ("sequential_plain", "bert"):
        entry = dataclasses.replace(ENTRIES[name], other_batch=None, other_length=0)
        for verify in (False, True):
            host = entry.build()
            try:
                trace(compiler.compiled(host, entry, 64, verify), entry, tensor_names(host))
            except Exception as error:  # reported with its traceback by the host's own check
                print(f"warm-up of {name}: {type(error).__name__}: {error}")
