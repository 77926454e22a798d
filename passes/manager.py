"""Runs passes and checks them: what changed, whether the graphs still hold together, how long it took."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import inspect
import re
import time
import traceback
import typing
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import entry_points
from itertools import pairwise
from typing import Any, ClassVar, Protocol, runtime_checkable

from morphc.errors import ConfigError, MorphcError, PassError, PassOrderError, UnknownNameError
from morphc.passes.dumps import dump
from morphc.passes.program import Program
from morphc.passes.sources import describe_error, source_text


@runtime_checkable
class Pass(Protocol):
    """A frozen dataclass with a `name`, its options as fields, and one method.

    `apply` changes `program` in place; whether it changed anything is derived by the manager. A pass may also
    define `requires(program)` and `ensures(program)`: each returns what is wrong, or an empty string, and is
    asked before and after on the program as it then is.
    """

    name: ClassVar[str]

    def apply(self, program: Program) -> None: ...


@dataclasses.dataclass(frozen=True)
class PassRecord:
    """What one run of a pass did."""

    name: str
    seconds: float
    modified: bool
    created: int
    erased: int
    diff: str


_REGISTRY: dict[str, type[Any]] = {}


def register_pass(cls: type[Any]) -> type[Any]:
    """Make a pass class known by its `name`; usable as a class decorator.

    Raises ConfigError when it is no frozen dataclass with a `name` and an `apply`.
    """
    params = getattr(cls, "__dataclass_params__", None)
    if params is None or not params.frozen:
        raise ConfigError(
            f"pass {cls.__name__} must be a frozen dataclass, so that its options are its fields"
        )
    if not isinstance(getattr(cls, "name", None), str) or not callable(getattr(cls, "apply", None)):
        raise ConfigError(f"pass {cls.__name__} needs a class attribute `name` and a method `apply(program)`")
    _REGISTRY[cls.name] = cls
    return cls


def known_passes() -> dict[str, type[Any]]:
    """Built-in passes and those of the entry point `morphc.passes`."""
    for point in entry_points(group="morphc.passes"):
        if point.name in _REGISTRY:
            continue
        try:
            found = point.load()
        except Exception as error:  # a package's own code runs here, and its user must learn which
            raise ConfigError(
                f"entry point {point.name!r} of morphc.passes ({point.value}) can't be loaded: "
                f"{type(error).__name__}: {error}"
            ) from error
        register_pass(found)
    return dict(_REGISTRY)


def parse_passes(text: str) -> list[Pass]:
    """`capture,plan-chunks{seeds=1024}` -> passes. Raises UnknownNameError, ConfigError."""
    found: list[Pass] = []
    position = 0
    item = re.compile(r"\s*([\w-]+)\s*(?:\{([^}]*)\})?\s*(?:,|$)")
    while position < len(text):
        match = item.match(text, position)
        if match is None:
            raise ConfigError(
                f"can't read passes at {text[position:]!r}; write name{{option=value,...}},name,..."
            )
        found.append(_make(match.group(1), match.group(2) or ""))
        position = match.end()
    if not found:
        raise ConfigError("passes is empty; name at least one, or leave it out for the default pipeline")
    return found


def _make(name: str, options: str) -> Pass:
    known = known_passes()
    if name not in known:
        raise UnknownNameError("pass", name, known)
    cls = known[name]
    hints = typing.get_type_hints(cls)
    fields = {field.name.replace("_", "-"): field.name for field in dataclasses.fields(cls)}
    values = {}
    for part in filter(None, (piece.strip() for piece in options.split(","))):
        key, separator, value = part.partition("=")
        if key.strip() not in fields:
            raise UnknownNameError(f"option of pass {name!r}", key.strip(), fields)
        if not separator:
            raise ConfigError(f"option {key!r} of pass {name!r} has no value; write {key}=VALUE")
        field = fields[key.strip()]
        values[field] = _convert(name, key.strip(), value.strip(), hints[field])
    made: Pass = cls(**values)
    return made


def _convert(name: str, key: str, value: str, kind: Any) -> Any:
    choices = _choices(kind)
    if bool in choices and value.lower() in ("true", "false"):
        return value.lower() == "true"
    for choice in (int, float):
        if choice in choices:
            try:
                return choice(value)
            except ValueError:
                continue
    if type(None) in choices and value.lower() == "none":
        return None
    literals = [c for c in choices if isinstance(c, str)]
    if str in choices or value in literals:
        return value
    wanted = " or ".join("none" if c is type(None) else getattr(c, "__name__", repr(c)) for c in choices)
    raise ConfigError(f"option {key}={value!r} of pass {name!r} is not {wanted}")


def _choices(kind: Any) -> tuple[Any, ...]:
    """The members of a union, those of a Literal among them: `int | Literal["auto"]` -> int, "auto"."""
    members = typing.get_args(kind)
    if not members:
        return (kind,)
    if typing.get_origin(kind) is typing.Literal:
        return members
    return tuple(choice for member in members for choice in _choices(member))


def run_passes(
    program: Program,
    passes: Sequence[Pass],
    *,
    print_after: Sequence[str] = (),
    on_print: Callable[[str, str], None] | None = None,
) -> list[PassRecord]:
    """Run `passes` in order.

    Raises PassError naming the pass, the node, the line that raised and a dump; PassOrderError where a pass can't
    start yet.
    """
    records = []
    before = program.text()
    chosen = _sites(program)
    for number, step in enumerate(passes):
        if program.progress is not None:
            program.progress(step.name, number, len(passes))
        if wrong := _asked(step, "requires", program):
            raise PassOrderError(f"pass {step.name!r} can't start: {wrong}")
        started = time.perf_counter()
        nodes = _nodes(program)
        with _blamed(step, program):
            step.apply(program)
        seconds = time.perf_counter() - started
        _lint(step, program)
        if wrong := _asked(step, "ensures", program):
            text = program.text()
            raise PassError(f"pass {step.name!r} left a broken program: {wrong} ({dump(step.name, text)})")
        chosen = _account_for_sites(step, program, chosen)
        after = program.text()
        now = _nodes(program)
        diff = ""
        if after != before:
            diff = "".join(
                difflib.unified_diff(
                    before.splitlines(True), after.splitlines(True), "before", f"after {step.name}", n=1
                )
            )
        records.append(
            PassRecord(step.name, seconds, after != before, len(now - nodes), len(nodes - now), diff)
        )
        if on_print is not None and ("all" in print_after or step.name in print_after):
            on_print(step.name, after)
        before = after
    return records


def _sites(program: Program) -> set[str]:
    return {site.path for site in program.plan.sites}


def _account_for_sites(step: Pass, program: Program, before: set[str]) -> set[str]:
    """The sites there are now. Raises PassError if one went without a Miss that says why."""
    now = _sites(program)
    silent = before - now - {miss.path for miss in program.plan.misses}
    if silent:
        raise PassError(
            f"pass {step.name!r} took the site {min(silent)!r} out of the plan and left no Miss that says why"
        )
    return now


def _nodes(program: Program) -> set[tuple[str, str]]:
    return {(name, node.name) for name, graph in program.graphs() for node in graph.nodes}


def check_order(passes: Sequence[Pass], pipeline: Sequence[Pass]) -> None:
    """Raises PassOrderError where built-in passes first come in another order than in `pipeline`.

    One that comes again does nothing new, unless a pass in between has changed something.
    """
    order = [step.name for step in pipeline]
    first = list(dict.fromkeys(step.name for step in passes if step.name in order))
    for before, after in pairwise(first):
        if order.index(after) < order.index(before):
            raise PassOrderError(
                f"pass {after!r} comes after {before!r}, and has to come before it; the order of the built-in "
                f"passes is {','.join(order)}"
            )


def _asked(step: Pass, which: str, program: Program) -> str:
    """What the pass says is wrong before or after it."""
    ask = getattr(step, which, None)
    if ask is None:
        return ""
    with _blamed(step, program):
        wrong: str = ask(program)
    return wrong


def _lint(step: Pass, program: Program) -> None:
    for name, graph in program.graphs():
        try:
            graph.lint()
            if not any(node.op == "output" for node in graph.nodes):
                raise RuntimeError("the graph has no output node")
        except Exception as error:
            text = str(error).strip().split("\n")[0]
            raise PassError(
                f"pass {step.name!r} broke the graph of {name}: {text} ({dump(step.name, program.text())})"
            ) from error


@contextlib.contextmanager
def _blamed(step: Pass, program: Program) -> Iterator[None]:
    """Whatever the pass raises becomes a PassError that says where; an error of morphc's own says so itself."""
    try:
        yield
    except Exception as error:
        own = type(step).__module__.startswith("morphc.")
        if isinstance(error, MorphcError) and (own or type(error) is not PassError):
            raise
        raise _pass_error(step, program, error) from error


def _pass_error(step: Pass, program: Program, error: Exception) -> PassError:
    node = getattr(error, "node", None)
    where = ""
    if node is not None and hasattr(node, "meta"):
        where = f" at node {node.name!r} ({node.meta.get('source', 'no source line')})"
    text = str(error).strip()
    if not isinstance(error, PassError):
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    if place := _line_of(step, error):
        text += f" at {place}" + (f": {line}" if (line := source_text(place)) else "")
    return PassError(f"pass {step.name!r} failed{where}: {text} ({dump(step.name, program.text())})")


def _line_of(step: Pass, error: Exception) -> str:
    """`file:line` of the innermost frame in the file of the pass; for a pass of morphc's, in the user's code."""
    if type(step).__module__.startswith("morphc."):
        return describe_error(error)[1]
    code = getattr(inspect.unwrap(type(step).apply), "__code__", None)
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if code is not None and frame.filename == code.co_filename]
    return f"{own[-1].filename}:{own[-1].lineno}" if own else describe_error(error)[1]
