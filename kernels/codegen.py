"""From a `KernelSpec` to a kernel file: rendered, published in the cache, imported.

`render` fills a Jinja template of `morphc.templates`; `publish` puts the text at
`<cache>/kernels/<name>-<hash12>/kernel.py`; `load` imports that file and hands out one of its functions.

What a template may use: `spec` (the KernelSpec); the chunk arithmetic of `torch.tensor_split` as `base` and
`wider` (chunk j is `base + (j < wider)` wide and starts at `j * base + min(j, wider)`), `chunk_pad` and `rank_pad`
(the next powers of two); `blueprint_macros`, the template of the spec's blueprint
(`{% import blueprint_macros as blueprint %}`); `next_pow2`, `cdiv` and `repr`, as functions and as filters; and
whatever the host module hands to `render`. Triton is imported by the header, never by a template. What a template
writes before its first function are constants: `NAME = tl.constexpr(...)`.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.machinery
import importlib.util
import os
import re
import shutil
import sys
import tempfile
import threading
import types
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import msgspec
import platformdirs

from morphc.errors import KernelError, MorphcError, TemplateError
from morphc.kernels import templating, triton_api
from morphc.kernels.spec import KernelSpec
from morphc.kernels.templating import Place, next_pow2
from morphc.kernels.wrapping import wrapped

KERNEL_LINE = 40
"""Line of the first decorator in every generated file.

Triton's own cache key has a kernel's line in it: a header that grew by one would rebuild every binary.
"""


@dataclass(frozen=True, slots=True)
class Source:
    """A generated file. `digest`: sha256 of `text`; `template_digest`: of the template and what it includes."""

    name: str
    text: str
    digest: str
    template: str
    template_digest: str
    spec: KernelSpec
    holes: Mapping[str, Any] = field(repr=False, compare=False)


class Provenance(msgspec.Struct, frozen=True):
    """Who a kernel is for: the paths of its layers, and the user's lines that made them."""

    layers: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    template: str = ""


def render(template: str, spec: KernelSpec, **holes: Any) -> Source:
    """The kernel file of `spec`; equal arguments give equal text.

    Raises TemplateError, which names the template's file and line, also where the template is sound and what
    it makes is not Python.
    """
    filled = _arithmetic(spec) | holes
    expanded = templating.expand(template, filled)
    text = _assemble(_header(template, spec), _tidy(expanded.text), template)
    try:
        ast.parse(text)
    except SyntaxError as error:
        place = _place(template, filled, text, error.lineno or 1)
        line = text.splitlines()[(error.lineno or 1) - 1].strip()
        raise TemplateError(f"{place or template}: makes invalid Python, {error.msg}: {line}") from error
    digest = hashlib.sha256(text.encode()).hexdigest()
    return Source(spec.name, text, digest, template, expanded.digest, spec, filled)


def locate(source: Source, line: int) -> Place | None:
    """The template line that line `line` of the generated file comes from.

    None for the header's, and where the template is not the one any more that it was rendered from.
    """
    try:
        return _place(source.template, source.holes, source.text, line)
    except MorphcError:
        return None


def places(source: Source, compiled: Sequence[tuple[str, int]]) -> str:
    """` (template line)` for what `compile_worker.explain` tells: Triton counts lines from a function's `def`."""
    for text, line in reversed(compiled):
        start = source.text.find(text.rstrip())
        found = locate(source, source.text.count("\n", 0, start) + line) if start >= 0 else None
        if found is not None:
            return f" ({found})"
    return ""


def _arithmetic(spec: KernelSpec) -> dict[str, Any]:
    base, wider = divmod(spec.features, spec.seeds) if spec.seeds else (0, 0)
    return {
        "spec": spec,
        "base": base,
        "wider": wider,
        "chunk_pad": next_pow2(spec.chunk),
        "rank_pad": next_pow2(spec.rank),
        "blueprint_macros": f"{templating.BLUEPRINT}{spec.blueprint}",
    }


def _header(template: str, spec: KernelSpec) -> list[str]:
    """Always as many lines."""
    parts = [
        spec.dtype,
        {"last": "features last", "channels_first": "channels first"}.get(spec.layout, spec.layout),
    ]
    if spec.seeds:
        parts.append(f"{spec.features} features in {spec.seeds} chunks of up to {spec.chunk}")
    if spec.blueprint:
        parts.append(f"{spec.slots} slots of {spec.blueprint} ({spec.blend})")
    return [
        f'"""{spec.name}',
        "",
        f"{'; '.join(parts)}.",
        f"Generated by morphc from {template}, not to be edited.",
        '"""',
        "",
        "import triton",
        "import triton.language as tl",
        "",
    ]


def _assemble(header: list[str], body: list[str], template: str) -> str:
    """Header, constants, filling, and the functions from KERNEL_LINE on."""
    first = next((at for at, line in enumerate(body) if line.startswith("@")), None)
    if first is None:
        raise TemplateError(f"{template}: renders to no function (no line starts with a decorator)")
    attached = first
    while attached and body[attached - 1].startswith("#"):
        attached -= 1
    constants = body[:attached]
    while constants and not constants[-1]:
        constants.pop()
    if constants:
        constants.append("")
    filling = KERNEL_LINE - 1 - len(header) - len(constants) - (first - attached) - 2
    if filling < 1:
        raise TemplateError(
            f"{template}: {len(constants)} lines before the first function; at most "
            f"{len(constants) + filling - 1} fit, so that it stands at line {KERNEL_LINE}"
        )
    lines = [f"# Filled up: the first kernel of every generated file stands at line {KERNEL_LINE}."]
    lines += ["#"] * (filling - 1)
    return "\n".join([*header, *constants, *lines, "", "", *body[attached:]]) + "\n"


def _tidy(text: str) -> list[str]:
    """Blank lines and long lines as `ruff format` has them, whatever the template's blocks left behind."""
    lines: list[str] = []
    blanks = 0
    for _, line in _wrapped(text.splitlines()):
        if not line:
            blanks += 1
            continue
        previous = lines[-1] if lines else ""
        top, inner = not line[0].isspace() and line[0] not in ")]}", previous[:1].isspace()
        opens = line.startswith(("@", "def ")) and not previous.startswith(("@", "#"))
        if lines and top and (inner or opens):
            lines += ["", ""]
        elif blanks and lines and not previous.endswith((":", "(", "[")):
            lines.append("")
        lines.append(line)
        blanks = 0
    return lines


def _wrapped(lines: Sequence[str]) -> Iterator[tuple[int, str]]:
    """Every line, in pieces if it is too long, and which one it was. What is quoted stays as it is."""
    quoted = False
    for at, line in enumerate(map(str.rstrip, lines)):
        was_quoted = quoted
        quoted ^= line.count('"""') % 2 == 1
        for piece in [line] if was_quoted or quoted else wrapped(line):
            yield at, piece


def _place(template: str, holes: Mapping[str, Any], text: str, line: int) -> Place | None:
    """Non-blank lines keep their order from the template to the file, so they are counted off."""
    lines = text.splitlines()
    wanted = lines[line - 1] if line <= len(lines) else ""
    before = lines[: line - 1].count(wanted)
    made = templating.places(template, dict(holes))
    for at, piece in _wrapped([text for text, _ in made]):
        if piece == wanted:
            if not before:
                return made[at][1]
            before -= 1
    return None


def cache_root() -> Path:
    """`$MORPHC_CACHE_DIR/v1`, or `morphc/v1` in the platform's cache folder."""
    given = os.environ.get("MORPHC_CACHE_DIR")
    return (Path(given) if given else Path(platformdirs.user_cache_dir("morphc", appauthor=False))) / "v1"


def publish(source: Source, provenance: Provenance | None = None) -> Path:
    """Path of `kernel.py` in the cache, put there if it wasn't, with `spec.json` and `provenance.json` beside.

    The entry appears by one rename, so nobody sees half of it; who loses a race uses the winner's. An entry
    whose text is not the source's is moved to `quarantine/` with a warning. Where the cache can't be written
    a temporary folder takes its place, with one warning. Layers that share a kernel are added to its provenance.
    """
    root = cache_root()
    told = msgspec.structs.replace(provenance or Provenance(), template=source.template)
    with _lock:
        path = _published.get((source.digest, root))
        if path is None:
            try:
                path = _put(source, told, root)
            except OSError as error:
                path = _put_elsewhere(source, told, root, error)
            _published[source.digest, root] = path
        if provenance is not None:
            _tell(path.with_name("provenance.json"), told)
        return path


_lock = threading.RLock()
_published: dict[tuple[str, Path], Path] = {}
_modules: dict[str, types.ModuleType] = {}


def _put(source: Source, told: Provenance, root: Path) -> Path:
    short = re.sub(r"[^A-Za-z0-9_.-]", "_", source.name)[:120]
    entry = root / "kernels" / f"{short}-{source.digest[:12]}"
    path = entry / "kernel.py"
    data = source.text.encode()
    if entry.is_dir():
        if _holds(path, data):
            return path
        _quarantine(entry, root)
    fresh = entry.with_name(f".{uuid.uuid4().hex}")
    fresh.mkdir(parents=True)
    try:
        (fresh / "kernel.py").write_bytes(data)
        (fresh / "spec.json").write_bytes(msgspec.json.format(msgspec.json.encode(source.spec), indent=2))
        (fresh / "provenance.json").write_bytes(msgspec.json.format(msgspec.json.encode(told), indent=2))
        fresh.rename(entry)
    except OSError:
        shutil.rmtree(fresh, ignore_errors=True)
        # Another process was faster: its entry is as good as ours.
        if not _holds(path, data):
            raise
    return path


def _tell(path: Path, told: Provenance) -> None:
    """Add to the layers and lines that a kernel is for. Of two processes that do so at once, one may be lost."""
    try:
        before = msgspec.json.decode(path.read_bytes(), type=Provenance)
    except (OSError, msgspec.MsgspecError):
        before = Provenance()
    layers = tuple(dict.fromkeys((*before.layers, *told.layers)))
    sources = tuple(dict.fromkeys((*before.sources, *told.sources)))
    after = Provenance(layers, sources, told.template)
    if after == before:
        return
    fresh = path.with_name(f".{uuid.uuid4().hex}")
    # It is for people to read: a cache that can't be written does without.
    with suppress(OSError):
        fresh.write_bytes(msgspec.json.format(msgspec.json.encode(after), indent=2))
        fresh.replace(path)


def _holds(path: Path, data: bytes) -> bool:
    try:
        return path.read_bytes() == data
    except OSError:
        return False


def _quarantine(entry: Path, root: Path) -> None:
    aside = root / "quarantine" / f"{entry.name}-{uuid.uuid4().hex[:8]}"
    aside.parent.mkdir(parents=True, exist_ok=True)
    entry.rename(aside)
    warnings.warn(f"cache entry {entry.name} is not what was put there; moved to {aside}", stacklevel=4)


@lru_cache(maxsize=1)
def _temporary() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="morphc-")


_warned: set[Path] = set()


def _put_elsewhere(source: Source, told: Provenance, root: Path, error: OSError) -> Path:
    if root not in _warned:
        _warned.add(root)
        warnings.warn(
            f"kernels are not kept: {root} can't be written ({error.strerror}); "
            "name another folder in MORPHC_CACHE_DIR",
            stacklevel=4,
        )
    try:
        return _put(source, told, Path(_temporary().name))
    except OSError as second:
        raise KernelError(
            f"{source.name} can't be written, neither to {root} ({error.strerror}) nor to a temporary folder "
            f"({second.strerror}): Triton compiles files"
        ) from second


def module_name(source: Source) -> str:
    """Name of the module that the file is imported as."""
    return f"morphc_kernel_{source.digest[:16]}"


def load(source: Source, function: str) -> Any:
    """`function` of the generated file: a `JITFunction`, or an `InterpretedFunction` under TRITON_INTERPRET=1.

    The file is a real one, so that tracebacks and `inspect.getsource` show its lines.
    """
    with _lock:
        module = _modules.get(source.digest)
        if module is None:
            module = _import(source.text, module_name(source), publish(source))
            _modules[source.digest] = module
    found = getattr(module, function, None)
    if found is None:
        held = [name for name, value in vars(module).items() if hasattr(value, "fn")]
        raise KernelError(f"{source.name} has no kernel {function!r}; it has {', '.join(held)}")
    return found


class _Loader(importlib.machinery.SourceFileLoader):
    """Compiles the text that was published and no other: neither a changed file nor a `.pyc` beside it is run."""

    def __init__(self, name: str, path: str, text: str) -> None:
        super().__init__(name, path)
        self.text = text

    def get_code(self, fullname: str) -> types.CodeType:
        return compile(self.text, self.path, "exec", dont_inherit=True)


def _import(text: str, name: str, path: Path) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(name, path, loader=_Loader(name, str(path), text))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    mode = "1" if triton_api.interprets() else "0"
    kept = os.environ.get("TRITON_INTERPRET")
    # `triton.jit` reads the variable each time, but can't have it otherwise than Triton's own functions.
    os.environ["TRITON_INTERPRET"] = mode
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    finally:
        if kept is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = kept
    return module
