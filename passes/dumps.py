"""Where the program of a failed pass is written: one folder, of which the newest few are kept."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import platformdirs

KEPT = 8


def folder() -> Path:
    """`$MORPHC_CACHE_DIR/dumps`, or `morphc/dumps` in the platform's cache folder."""
    given = os.environ.get("MORPHC_CACHE_DIR")
    return (Path(given) if given else Path(platformdirs.user_cache_dir("morphc", appauthor=False))) / "dumps"


def dump(name: str, text: str) -> str:
    """Write `text` and return `dump: FILE`, or why there is none: what failed matters more than its dump."""
    place = folder()
    try:
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", prefix=f"{name}-", suffix=".txt", dir=place, delete=False, encoding="utf-8"
        ) as file:
            file.write(text)
    except OSError as error:
        return f"no dump: {place} can't be written: {error.strerror or error}"
    _forget_old(place)
    return f"dump: {file.name}"


def _forget_old(place: Path) -> None:
    found = []
    for path in place.glob("*.txt"):
        try:
            found.append((path.stat().st_mtime_ns, path))
        except OSError:  # another process tidies up too
            continue
    for _, path in sorted(found, reverse=True)[KEPT:]:
        path.unlink(missing_ok=True)
