"""Compiled forms of kernels in the cache: what they are made from, found again, and put there."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from morphc.errors import CacheMissError
from morphc.kernels import codegen
from morphc.kernels.cache import counters, misses, place, prune, store
from morphc.kernels.cache.store import Found
from morphc.kernels.codegen import Source

REQUIRED: Final = "MORPHC_REQUIRE_CACHED"
"""Variable that forbids compiling: what isn't in the cache is an error."""

METADATA: Final = "kernel.json"

# What changes the code that Triton makes, besides what it is given.
_SETTINGS: Final = (
    "AMDGCN_USE_BUFFER_OPS",
    "DISABLE_LLVM_OPT",
    "DISABLE_MMA_V3",
    "DISABLE_MMA_V5",
    "DISABLE_PTXAS_OPT",
    "LLVM_PASS_PLUGIN_PATH",
    "PTXAS_OPTIONS",
    "TRITON_DEBUG",
    "TRITON_F32_DEFAULT",
    "TRITON_INSTRUMENTATION_MODE",
    "TRITON_PTXAS_BLACKWELL_PATH",
    "TRITON_PTXAS_PATH",
)


@lru_cache(maxsize=1)
def triton_version() -> str:
    """Of the Triton that is installed."""
    return version("triton")


@dataclass(frozen=True, slots=True)
class Wanted:
    """One compiled form of a kernel, and where it is or would be."""

    name: str
    root: Path
    entry: Path
    made_from: Mapping[str, Any]

    @property
    def key(self) -> str:
        """Of all that it is made from."""
        return place.key_of(self.made_from)

    def find(self) -> Found | None:
        """It, whole; None where it isn't there. What the cache holds in its place and can't be moved isn't either."""
        try:
            return store.find_binary(self.root, self.entry, self.made_from)
        except OSError:
            return None

    def why(self) -> tuple[str, ...]:
        """Why it isn't there."""
        return misses.of_binary(self.root, self.entry, self.made_from)

    def keep(self, files: Mapping[str, bytes], details: Mapping[str, Any]) -> None:
        """Put it there; a cache that can't be written does without, with one warning."""
        try:
            store.put_binary(self.entry, self.made_from, files, details)
            prune.keep_bound(self.root)
        except OSError as error:
            place.warn_once(
                "unwritable",
                self.root,
                f"kernels are not kept: {self.root} can't be written ({error.strerror}); "
                "name another folder in MORPHC_CACHE_DIR",
            )

    def refuse_to_compile(self) -> None:
        """Raises CacheMissError where compiling is forbidden."""
        if os.environ.get(REQUIRED, "0").lower() not in ("", "0", "false", "no", "off"):
            raise CacheMissError(self.name, str(self.made_from["target"]), self.why())


def wanted(
    source: Source,
    function: str,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    aligned: Sequence[str],
    options: Mapping[str, Any],
    target: str,
) -> Wanted:
    """The compiled form that follows from these; options: as Triton takes them. The kernel's entry is published if it
    isn't there; its text is looked at by who compiles it."""
    entry = codegen.entry_of(source)
    root = place.root()
    if _held(root, entry) is None:
        path = codegen.publish(source)
        entry, root = path.parent, codegen.root_of(path)
    made_from = {
        "schema": place.SCHEMA,
        "kernel": source.key,
        "function": function,
        "signature": [[name, kind] for name, kind in signature.items()],
        "constants": dict(constants),
        "aligned": sorted(aligned),
        "options": dict(options),
        "target": target,
        "triton": triton_version(),
        "settings": {name: os.environ[name] for name in _SETTINGS if os.environ.get(name)},
    }
    return Wanted(f"{source.name}.{function}", root, entry, made_from)


def _held(root: Path, entry: Path) -> Found | None:
    try:
        return store.find(entry, "kernel", root)
    except OSError:
        return None


def count_hit(found: Found) -> None:
    """Count a kernel that needn't be compiled."""
    counters.hit(float(found.manifest.details.get("seconds", 0.0)))


def count_miss(want: Wanted, reasons: Sequence[str], seconds: float) -> None:
    """Count one that had to be."""
    counters.miss(counters.Miss(want.name, str(want.made_from["target"]), tuple(reasons)), seconds)
