"""`--target`: which architectures there are. Needs no torch, so that a wrong one is told at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from morphc.errors import UnknownNameError

TARGETS: Final = ("cuda:80", "cuda:89", "cuda:90", "cuda:100", "hip:gfx942")


def check_targets(targets: Sequence[str]) -> None:
    """Raises UnknownNameError, which lists those that there are."""
    for target in targets:
        if target not in TARGETS:
            raise UnknownNameError("target", target, TARGETS)
