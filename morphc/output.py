"""`-o out/`: a folder that is there completely or not at all.

Everything is written into a sibling folder that nobody looks for, and a rename as the very last step makes it
`out/`: a reader, or a Ctrl-C, between two files never sees half of it.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType

from morphc.errors import ConfigError

OURS = frozenset({"plan.json", "report.json", "report.html", "graphs", "kernels.json", "kernels.tar.gz"})


class OutputFolder:
    """A context manager around the writing of `target`.

    Entering claims the place, before any long work, and raises ConfigError when it can't be used. Leaving
    publishes what `write` got; leaving through an exception removes every trace.
    """

    def __init__(self, target: Path) -> None:
        self.target = target
        self._final = Path(os.path.realpath(target))
        self._staging = self._final.parent / f".{self._final.name}.{uuid.uuid4().hex}.partial"
        self._created: list[Path] = []

    def __enter__(self) -> OutputFolder:
        try:
            _check_replaceable(self.target, self._final)
            self._make_parents()
            self._staging.mkdir()
        except OSError as error:
            self._discard()
            raise _unwritable(self.target, error) from error
        except BaseException:
            self._discard()
            raise
        return self

    def write(self, name: str, content: str | bytes) -> None:
        """Put one file into the folder; `name` may hold a subfolder (`graphs/h.0.py`)."""
        path = self._staging / name
        data = content.encode() if isinstance(content, str) else content
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        except OSError as error:
            raise _unwritable(self.target, error) from error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._discard()
            return
        try:
            self._publish()
        except OSError as problem:
            self._discard()
            raise _unwritable(self.target, problem) from problem
        except BaseException:
            self._discard()
            raise

    def _publish(self) -> None:
        # Checked again: the work took a while, and somebody else may have used the place since.
        _check_replaceable(self.target, self._final)
        if not self._final.exists():
            self._staging.rename(self._final)
            return
        # A folder can't be renamed over one that has files in it, so the old one steps aside first, and
        # back again if anything (a Ctrl-C too) stops the second rename.
        old = self._staging.with_suffix(".old")
        try:
            self._final.rename(old)
            self._staging.rename(self._final)
        except BaseException:
            if old.exists() and not self._final.exists():
                old.rename(self._final)
            raise
        shutil.rmtree(old, ignore_errors=True)

    def _make_parents(self) -> None:
        missing = [p for p in self._final.parents if not p.exists()]
        for parent in reversed(missing):
            parent.mkdir()
            self._created.append(parent)

    def _discard(self) -> None:
        shutil.rmtree(self._staging, ignore_errors=True)
        for parent in reversed(self._created):
            if any(parent.iterdir()):
                break
            parent.rmdir()


def graph_files(paths: Iterable[str]) -> dict[str, str]:
    """A file name for every region path: `""` is `root.py`, `h.0.mlp` is `h.0.mlp.py`.

    Names are safe on every file system (a ModuleDict key may hold a slash or a space), and two paths never
    get the same one, also where upper and lower case are the same.
    """
    names: dict[str, str] = {}
    taken: set[str] = set()
    for path in paths:
        stem = re.sub(r"[^A-Za-z0-9._-]", "_", path).strip(".") or "root"
        short = hashlib.sha256(path.encode()).hexdigest()[:8]
        if len(stem) > 120:
            stem = f"{stem[:110]}-{short}"
        if stem.lower() in taken:
            stem = f"{stem}-{short}"
        taken.add(stem.lower())
        names[path] = f"{stem}.py"
    return names


def write_graphs(folder: OutputFolder, graphs: Mapping[str, str]) -> None:
    """One readable Python file per region under `graphs/`."""
    files = graph_files(graphs)
    for path, source in graphs.items():
        folder.write(f"graphs/{files[path]}", source.rstrip("\n") + "\n")


def _check_replaceable(target: Path, final: Path) -> None:
    """Refuse any place whose content is not recognisably a previous run's."""
    if not final.exists():
        return
    if not final.is_dir():
        raise ConfigError(f"-o {target}: is a file, not a folder; name another place")
    if final == Path.cwd() or final in Path.cwd().parents:
        raise ConfigError(f"-o {target}: is the folder you are in; name one below it, such as -o out")
    entries = {entry.name for entry in final.iterdir()}
    if entries and "plan.json" not in entries:
        raise ConfigError(
            f"-o {target}: exists and is not a previous output of morphc (it has no plan.json); "
            f"name another folder, or empty it yourself"
        )
    if foreign := sorted(entries - OURS):
        raise ConfigError(
            f"-o {target}: holds {foreign[0]!r}, which morphc didn't write; move it away, since the whole "
            f"folder is replaced"
        )


def _unwritable(target: Path, error: OSError) -> ConfigError:
    reason = error.strerror or str(error)
    return ConfigError(f"-o {target}: can't be written: {reason}; name another place")
