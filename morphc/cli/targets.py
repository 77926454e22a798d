"""`--target` and `--tune`: what there is. Needs no torch, so that a wrong one is told at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from morphc.errors import ConfigError, UnknownNameError

TARGETS: Final = ("cuda:80", "cuda:89", "cuda:90", "cuda:100", "hip:gfx942")
TUNE_MODES: Final = ("off", "quick", "full")


def check_targets(targets: Sequence[str]) -> None:
    """Raises UnknownNameError, which lists those that there are."""
    for target in targets:
        if target not in TARGETS:
            raise UnknownNameError("target", target, TARGETS)


def check_tune(mode: str, targets: Sequence[str]) -> None:
    """Raises UnknownNameError or ConfigError for a --tune that can't be done."""
    if mode not in TUNE_MODES:
        raise UnknownNameError("mode of --tune", mode, TUNE_MODES)
    if mode != "off" and targets:
        raise ConfigError(
            "--tune times kernels on this machine's GPU, and --target compiles for another: give one"
        )
