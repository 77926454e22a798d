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
import importlib.machinery
import importlib.util
import os
import sys
import tempfile
import threading
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import msgspec

from morphc.errors import KernelError, MorphcError, TemplateError
from morphc.kernels import templating, triton_api
from morphc.kernels.cache import place, store
from morphc.kernels.cache.manifest import Provenance
from morphc.kernels.spec import KernelSpec
from morphc.kernels.templating import Place, next_pow2
from morphc.kernels.wrapping import wrapped

KERNEL_LINE = 40
"""Line of the first decorator in every generated file.

Triton's own cache key has a kernel's line in it: a header that grew by one would rebuild every binary.
"""


@dataclass(frozen=True, eq=False)
class Source:
    """A generated file. template_digest: of the template and what it includes.

    made_from: all that the text follows from, as JSON has it; key: its sha256, which names the cache's entry. Sources
    with one key are equal.
    """

    name: str
    template: str
    template_digest: str
    spec: KernelSpec
    key: str
    made_from: Mapping[str, Any] = field(repr=False)
    holes: Mapping[str, Any] = field(repr=False)

    @cached_property
    def text(self) -> str:
        """The file's; rendered when somebody first asks, since a kernel that is kept as a binary needs none."""
        return _rendered(self.template, self.spec, self.holes)

    @cached_property
    def digest(self) -> str:
        """sha256 of the text."""
        return place.digest(self.text.encode())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Source) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


def render(template: str, spec: KernelSpec, **holes: Any) -> Source:
    """The kernel file of `spec`; equal arguments give equal text.

    Raises TemplateError, which names the template's file and line, also where the template is sound and what
    it makes is not Python.
    """
    filled = _arithmetic(spec) | holes
    template_digest = templating.digest(template, filled)
    made_from = {
        "schema": place.SCHEMA,
        "spec": msgspec.to_builtins(spec),
        "template": template,
        "template_sha": template_digest,
        "codegen_sha": codegen_digest(),
        "holes": msgspec.json.decode(place.canonical(holes)),
    }
    source = Source(spec.name, template, template_digest, spec, place.key_of(made_from), made_from, filled)
    if not (templating.is_lasting(spec.blueprint) and place.is_folder(entry_of(source))):
        _ = source.text  # what can't be rendered is told here
    return source


def entry_of(source: Source) -> Path:
    """Where the cache has the source's entry, or would have it."""
    return store.kernels(place.root()) / store.entry_name(source.name, source.key)


def _rendered(template: str, spec: KernelSpec, filled: Mapping[str, Any]) -> str:
    text = _assemble(_header(template, spec), _tidy(templating.expand(template, dict(filled))), template)
    try:
        ast.parse(text)
    except SyntaxError as error:
        where = _place(template, filled, text, error.lineno or 1)
        line = text.splitlines()[(error.lineno or 1) - 1].strip()
        raise TemplateError(f"{where or template}: makes invalid Python, {error.msg}: {line}") from error
    return text


@lru_cache(maxsize=1)
def codegen_digest() -> str:
    """sha256 of the code that makes a file of a template."""
    folder = Path(__file__).parent
    files = [folder / name for name in ("codegen.py", "templating.py", "wrapping.py", "spec.py")]
    return place.digest(b"\0".join(file.read_bytes() for file in files))


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


def publish(source: Source, provenance: Provenance | None = None) -> Path:
    """Path of `kernel.py` in the cache, put there if it wasn't, with what is told of it beside.

    The entry appears by one rename, so nobody sees half of it; who loses a race uses the winner's. One that isn't
    whole, or whose text is not the source's, is moved to `quarantine/` with a warning. Where the cache can't be
    written a temporary folder takes its place, with one warning. Layers that share a kernel are added to its
    provenance.
    """
    root = place.root()
    told = msgspec.structs.replace(provenance or Provenance(), template=source.template)
    with _lock:
        path = _published.get((source.key, source.digest, root))
        # Compilers read the file, so each time it is asked for it has to be the one that was put there.
        if path is None or not _holds(path, source.text.encode()):
            path = _published[source.key, source.digest, root] = _put(source, told, root)
        if provenance is not None:
            store.add_provenance(path.parent, told)
        return path


_lock = threading.RLock()
_published: dict[tuple[str, str, Path], Path] = {}
_modules: dict[str, types.ModuleType] = {}


def _put(source: Source, told: Provenance, root: Path) -> Path:
    files = {
        "kernel.py": source.text.encode(),
        "spec.json": msgspec.json.format(msgspec.json.encode(source.spec), indent=2),
    }

    def put(where: Path) -> Path:
        return store.put_kernel(where, source.name, source.made_from, files, told).folder / "kernel.py"

    try:
        return put(root)
    except (OSError, place.DamagedError) as error:
        reason = getattr(error, "strerror", None) or str(error)
    place.warn_once(
        "unwritable",
        root,
        f"kernels are not kept: {root} can't be written ({reason}); name another folder in MORPHC_CACHE_DIR",
    )
    try:
        return put(Path(_temporary().name))
    except OSError as second:
        raise KernelError(
            f"{source.name} can't be written, neither to {root} ({reason}) nor to a temporary folder "
            f"({second.strerror}): Triton compiles files"
        ) from second


def _holds(path: Path, data: bytes) -> bool:
    try:
        return place.read(path) == data
    except (OSError, place.DamagedError):
        return False


def root_of(path: Path) -> Path:
    """The cache that a published `kernel.py` lies in: the user's, or the temporary one."""
    return path.parents[2]


@lru_cache(maxsize=1)
def _temporary() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="morphc-")


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
