"""`morphc.cache()`: the kernels that are kept, in the same words as `morphc cache` on the command line."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from morphc.errors import CacheError
from morphc.kernels.cache import bundle, inventory, manifest, misses, place, prune, store
from morphc.kernels.cache.bundle import Imported, Index
from morphc.kernels.cache.inventory import Entry, Problem, Shown
from morphc.kernels.cache.misses import Difference
from morphc.kernels.cache.place import DamagedError
from morphc.kernels.cache.prune import Pruned, Victim
from morphc.kernels.spec import KernelSpec

if TYPE_CHECKING:
    from collections.abc import Iterator


class Why(msgspec.Struct, frozen=True):
    """Why a kernel isn't in the cache, or that it is. nearest: the entry that differs least, if there is any.

    notes: what else keeps its compiled forms from being used here.
    """

    wanted: str
    key: str
    found: bool
    nearest: str | None
    differences: tuple[Difference, ...]
    notes: tuple[str, ...] = ()


class Cache:
    """The cache in `root`; made by `morphc.cache()`."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = root or place.root()

    def __repr__(self) -> str:
        return f"Cache({str(self.root)!r}, {len(inventory.names(self.root))} entries)"

    def entries(self) -> list[Entry]:
        """Every entry, by name."""
        return inventory.entries(self.root)

    def show(self, key: str) -> Shown:
        """One entry: by its key, its name, or the beginning of either. Raises CacheError."""
        return inventory.show(self.root, key)

    def verify(self) -> list[Problem]:
        """Everything that isn't what was put there; nothing is moved."""
        return inventory.verify(self.root)[1]

    def why_miss(self, spec: KernelSpec | str) -> Why:
        """Why that kernel isn't there. spec: a KernelSpec, its JSON, a kernel's name, or an entry's key.

        Raises CacheError for what is none of these.
        """
        from morphc.kernels import wanted

        inventory.names(self.root)  # one that can't be read at all is no miss
        like: dict[str, Any] | None = None
        if isinstance(spec, str):
            spec, like = self._spec_of(spec)
        want = wanted.made_from(spec, like)
        key = place.key_of(want)
        folder = store.kernels(self.root) / store.entry_name(spec.name, key)
        try:
            manifest.verify(folder, "kernel")
            return Why(spec.name, key, True, folder.name, (), tuple(self._notes(folder)))
        except FileNotFoundError:
            pass
        except (OSError, DamagedError) as error:
            return Why(spec.name, key, False, folder.name, (), (f"it is damaged: {error}",))
        near = misses.nearest(misses.manifests_in(store.kernels(self.root)), want)
        if near is None:
            return Why(spec.name, key, False, None, (), ("the cache is empty",))
        told, found = near
        name = store.entry_name(str(told.details.get("name", "")), told.key)
        return Why(spec.name, key, False, name, found)

    def _spec_of(self, text: str) -> tuple[KernelSpec, dict[str, Any] | None]:
        if text.lstrip().startswith("{"):
            try:
                return msgspec.json.decode(text, type=KernelSpec), None
            except place.UNREADABLE as error:
                raise CacheError(f"this is no spec of a kernel: {error}") from error
        try:
            name = inventory.resolve(self.root, text)
        except CacheError as unknown:
            try:
                return KernelSpec.from_name(text), None
            except ValueError:
                raise unknown from None
        try:
            told, _ = manifest.read(store.kernels(self.root) / name)
            return msgspec.convert(told.made_from["spec"], KernelSpec), dict(told.made_from)
        except (OSError, DamagedError, KeyError, msgspec.ValidationError) as error:
            try:
                return KernelSpec.from_name(name.rpartition("-")[0]), None
            except ValueError:
                raise CacheError(
                    f"{name} can't be read: {error}; morphc cache prune removes what is damaged"
                ) from error

    def _notes(self, folder: Path) -> Iterator[str]:
        targets: dict[str, set[str]] = {}
        for where, target in inventory.binary_folders(str(folder)):
            try:
                told = manifest.verify(Path(where), "binary")
            except (OSError, DamagedError) as error:
                yield f"{os.path.basename(where)} is damaged: {error}"
                continue
            targets.setdefault(target, set()).add(str(told.made_from.get("triton")))
        if not targets:
            yield "it is compiled for nothing yet: that is done when it is launched, or by morphc compile --target"
        try:
            here = importlib.metadata.version("triton")
        except importlib.metadata.PackageNotFoundError:
            return
        for target, versions in targets.items():
            if here not in versions:
                others = ", ".join(sorted(versions))
                yield f"for {target} it is compiled by triton {others}, here is {here}: it will be compiled anew"

    def prune(
        self,
        *,
        older_than: str | float | None = None,
        larger_than: str | int | None = None,
        arch: str | None = None,
        version: str | None = None,
        dry_run: bool = False,
    ) -> Pruned:
        """Remove entries: `older_than="30d"` (or seconds) since their last use; beyond `larger_than="1G"` (or bytes) in
        all; compiled forms for `arch`; what `version` of morphc or Triton made. Without any of these, what is beyond 2
        GiB. What living processes use stays. dry_run: say only what would go. Raises CacheError.
        """
        victims = self.victims(older_than=older_than, larger_than=larger_than, arch=arch, version=version)
        return Pruned((), tuple(victims)) if dry_run else self.remove(victims)

    def victims(
        self,
        *,
        older_than: str | float | None = None,
        larger_than: str | int | None = None,
        arch: str | None = None,
        version: str | None = None,
    ) -> list[Victim]:
        """What `prune` would remove."""
        age = prune.seconds(older_than) if isinstance(older_than, str) else older_than
        size = prune.size(larger_than) if isinstance(larger_than, str) else larger_than
        return prune.choose(self.root, older_than=age, larger_than=size, arch=arch, version=version)

    def remove(self, victims: Sequence[Victim]) -> Pruned:
        """Remove what `victims` named."""
        return prune.remove(self.root, list(victims))

    def export(self, path: str | Path, keys: Sequence[str] = (), arch: str | None = None) -> Index:
        """Write a bundle of these entries (all without `keys`), as far as compiled for `arch`. Raises CacheError."""
        return bundle.export(self.root, Path(path), keys, arch)

    def import_(self, path: str | Path) -> Imported:
        """Take over a bundle. Raises BundleError, and then nothing was imported, or CacheError."""
        return bundle.import_(self.root, Path(path))


def cache(root: str | Path | None = None) -> Cache:
    """The kernels that are kept: in `root`, `$MORPHC_CACHE_DIR/v1`, or the platform's folder."""
    return Cache(None if root is None else Path(root))
