"""Jinja for kernel templates: where they are found, and errors that name the template's own line.

A template is looked up by name in the package `morphc.templates`; `blueprint:<name>` is the macro template of a
blueprint: the one that its class names in `template`, or the built-in `_blueprint_<name>.jinja`.
"""

from __future__ import annotations

import hashlib
import inspect
import re
import threading
import traceback
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jinja2
from jinja2.ext import Extension
from jinja2.lexer import Token, TokenStream

import morphc.templates
from morphc.errors import MorphcError, TemplateError, did_you_mean
from morphc.kernels.blueprints import base

BLUEPRINT = "blueprint:"
_ROOT = Path(morphc.templates.__file__).parent


class Place(NamedTuple):
    """A line of a template file; lines count from 1."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


def next_pow2(number: int) -> int:
    """Smallest power of two that is not below `number`; 1 for 0."""
    return 1 << max(0, number - 1).bit_length()


def cdiv(number: int, divisor: int) -> int:
    """`number / divisor`, rounded up."""
    return -(-number // divisor)


def expand(template: str, holes: dict[str, Any]) -> str:
    """Render `template` with `holes`. Raises TemplateError, which names file and line of the template."""
    return _render(_environment(), template, holes)


_REFERENCE = re.compile(r"{%[-+]?\s*(?:include|import|from|extends)\s+(?:\"([^\"]+)\"|(\w+))\s*(~)?")


def digest(template: str, holes: dict[str, Any]) -> str:
    """sha256 of a template and of everything that it may include, however deep; nothing is rendered.

    A template that is named by a hole is followed too. Raises TemplateError for one that doesn't exist.
    """
    found: dict[str, str] = {}
    left = [template]
    while left:
        name = left.pop()
        if name in found:
            continue
        try:
            found[name] = _find(name)[0]
        except jinja2.TemplateNotFound as error:
            raise _not_found(error) from error
        for quoted, hole, more in _REFERENCE.findall(found[name]):
            named = quoted or holes.get(hole)
            if more:  # a name that is put together: whatever begins like it
                left += [path.name for path in _ROOT.glob(f"{quoted}*.jinja")]
            elif isinstance(named, str):
                left.append(named)
    made = hashlib.sha256()
    for name in sorted(found):
        made.update(f"{name}\0{len(found[name])}\0{found[name]}".encode())
    return made.hexdigest()


def _not_found(error: jinja2.TemplateNotFound) -> TemplateError:
    known = (path.name for path in _ROOT.glob("*.py.jinja"))
    return TemplateError(f"no template {error.name!r}.{did_you_mean(str(error.name), known)}")


def places(template: str, holes: dict[str, Any]) -> list[tuple[str, Place | None]]:
    """Every line that `template` renders to, with the template line it comes from; None where none is known."""
    env = _environment_with_marks()
    names = env.mark_names
    found: list[tuple[str, Place | None]] = []
    for line in _render(env, template, holes).splitlines():
        marks = _MARK.findall(line)
        # The last mark is the innermost: the macro's line, where a macro wrote this one.
        place = Place(names[int(marks[-1][0])], int(marks[-1][1])) if marks else None
        found.append((_MARK.sub("", line), place))
    return found


def has_template(blueprint: base.Blueprint) -> bool:
    """Whether there are macros for the blueprint's kernels: its own, or built-in ones."""
    return blueprint.template is not None or _builtin(blueprint) is not None


def is_lasting(blueprint: str) -> bool:
    """Whether the blueprint's macros will be the same later: another class may take over the name of a user's."""
    return not blueprint or _builtin(base.get(blueprint)) is not None


class _Environment(jinja2.Environment):
    """With the names of the files that marks are of."""

    mark_names: list[str]


_lock = threading.RLock()


def _new_environment(*extensions: type[Extension]) -> _Environment:
    env = _Environment(
        loader=jinja2.FunctionLoader(_find),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
        extensions=extensions,
    )
    for function in (next_pow2, cdiv, repr):
        env.filters[function.__name__] = function
        env.globals[function.__name__] = function
    env.globals |= {"min": min, "max": max, "divmod": divmod}
    env.mark_names = []
    return env


@lru_cache(maxsize=1)
def _environment() -> _Environment:
    return _new_environment()


@lru_cache(maxsize=1)
def _environment_with_marks() -> _Environment:
    return _new_environment(_Marks)


_MARK = re.compile("\x02([0-9]+):([0-9]+)\x03")


class _Marks(Extension):
    """Writes the template's file and line before every line of its text."""

    def filter_stream(self, stream: TokenStream) -> Iterator[Token]:
        names = self.environment.mark_names  # type: ignore[attr-defined]
        shown = stream.filename or str(stream.name)
        if shown not in names:
            names.append(shown)
        index = names.index(shown)
        for token in stream:
            if token.type == "data":
                lines = token.value.split("\n")
                marked = [
                    f"\x02{index}:{token.lineno + offset}\x03{line}" if line or offset else ""
                    for offset, line in enumerate(lines)
                ]
                token = Token(token.lineno, token.type, "\n".join(marked))
            yield token


def _render(env: _Environment, template: str, holes: dict[str, Any]) -> str:
    try:
        # One at a time: Jinja compiles templates into a cache that is not made for threads.
        with _lock:
            return env.get_template(template).render(holes)
    except jinja2.TemplateSyntaxError as error:
        place = Place(error.filename or str(error.name), error.lineno)
        raise TemplateError(f"{place}: {error.message}") from error
    except jinja2.TemplateNotFound as error:
        raise _not_found(error) from error
    except MorphcError:
        raise
    except Exception as error:
        _raise_placed(error, template)


def _raise_placed(error: Exception, template: str) -> NoReturn:
    """An expression of the template failed: Jinja puts the template's file and line in the traceback."""
    place: Place | str = template
    for frame in traceback.extract_tb(error.__traceback__):
        if frame.filename.endswith(".jinja") or frame.filename.startswith("<template of"):
            place = Place(frame.filename, frame.lineno or 0)
    what = "" if isinstance(error, jinja2.UndefinedError) else f"{type(error).__name__}: "
    raise TemplateError(f"{place}: {what}{error}") from error


def _find(name: str) -> tuple[str, str, Callable[[], bool]]:
    """Text, file name, and whether it is still up to date, of the template called `name`."""
    path = _ROOT / name
    if name.startswith(BLUEPRINT):
        blueprint = base.get(name.removeprefix(BLUEPRINT))
        given = blueprint.template
        if given is not None and "\n" in given:
            # Never up to date: another blueprint may take over the name.
            return given, f"<template of blueprint {blueprint.name!r}>", lambda: False
        found = _builtin(blueprint) if given is None else _beside(blueprint, given)
        if found is None:
            raise TemplateError(
                f"blueprint {blueprint.name!r} has no macros for kernels: give its class a `template`, or use "
                'backend="torch"'
            )
        path = found
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        if name.startswith(BLUEPRINT) and path.parent != _ROOT:
            raise TemplateError(
                f"{path}: the template of {name.replace(':', ' ')!r}: {error.strerror}"
            ) from error
        raise jinja2.TemplateNotFound(name) from error
    if name.startswith(BLUEPRINT):
        return text, str(path), lambda: False
    return text, str(path), lambda: path.is_file() and path.read_text(encoding="utf-8") == text


def _builtin(blueprint: base.Blueprint) -> Path | None:
    """Only for the class it was written for: another one under the same name computes something else."""
    path = _ROOT / f"_blueprint_{blueprint.name}.jinja"
    own = type(blueprint).__module__.startswith(f"{base.__package__}.")
    return path if own and path.is_file() else None


def _beside(blueprint: base.Blueprint, given: str) -> Path:
    """A relative path counts from the file that defines the blueprint."""
    return Path(inspect.getfile(type(blueprint))).parent / given
