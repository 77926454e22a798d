"""morphc compiles a PyTorch model into one that can grow while it trains.

Everything public is named here and loaded on first use, so that `import morphc` costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from morphc import errors
    from morphc.api import compile, detach, enlarge, report, seeds
    from morphc.caching import cache
    from morphc.checkpoint import load, save
    from morphc.config import Config
    from morphc.folding import fold
    from morphc.grow.controllers import (
        CallbackController,
        PlateauController,
        ScheduleController,
    )
    from morphc.grow.grower import Grower
    from morphc.grow.recycler import RecycleController
    from morphc.grow.snapshot import Snapshot
    from morphc.lifecycle import Lifecycle
    from morphc.passes.plan import Plan
    from morphc.reporting import Report
    from morphc.tuneup import tune
    from morphc.version import __version__

__all__ = [
    "CallbackController",
    "Config",
    "Grower",
    "Lifecycle",
    "Plan",
    "PlateauController",
    "RecycleController",
    "Report",
    "ScheduleController",
    "Snapshot",
    "__version__",
    "cache",
    "compile",
    "detach",
    "enlarge",
    "errors",
    "fold",
    "load",
    "report",
    "save",
    "seeds",
    "tune",
]

_HOME = {
    "CallbackController": "morphc.grow.controllers",
    "Config": "morphc.config",
    "Grower": "morphc.grow.grower",
    "Lifecycle": "morphc.lifecycle",
    "Plan": "morphc.passes.plan",
    "PlateauController": "morphc.grow.controllers",
    "RecycleController": "morphc.grow.recycler",
    "Report": "morphc.reporting",
    "ScheduleController": "morphc.grow.controllers",
    "Snapshot": "morphc.grow.snapshot",
    "__version__": "morphc.version",
    "cache": "morphc.caching",
    "compile": "morphc.api",
    "detach": "morphc.api",
    "enlarge": "morphc.api",
    "fold": "morphc.folding",
    "load": "morphc.checkpoint",
    "report": "morphc.api",
    "save": "morphc.checkpoint",
    "seeds": "morphc.api",
    "tune": "morphc.tuneup",
}


def __getattr__(name: str) -> object:
    if name == "errors":
        return import_module("morphc.errors")
    if name not in _HOME:
        raise AttributeError(f"module 'morphc' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
