"""Load a module out of a user's Python file, for `morphc compile model.py[:attr]`.

The file is executed, as `python model.py` would, but under its own module name so that a
`if __name__ == "__main__"` block stays quiet. What it prints goes to stderr: stdout is the result's.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import inspect
import linecache
import re
import sys
import traceback
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from torch import nn

from morphc.errors import UserCodeError, did_you_mean

FACTORY_NAMES = ("model", "make_model", "build_model", "create_model", "get_model")


class LoadedModel(NamedTuple):
    """A host out of a file. `args` and `kwargs` are the file's own example inputs, None where it has none."""

    host: nn.Module
    attr: str
    path: Path
    args: tuple[Any, ...] | None
    kwargs: dict[str, Any] | None


def split_target(target: str) -> tuple[Path, str | None]:
    """`model.py:attr` into its halves. A file whose name really holds a colon wins over the split."""
    path, colon, attr = target.rpartition(":")
    if not colon or Path(target).exists() or "/" in attr or "\\" in attr:
        return Path(target), None
    return Path(path), attr


def load_model(target: str) -> LoadedModel:
    """Execute the file of `target` and build the module it names.

    `attr` is a Module, a Module class or a function; the last two are called without arguments. Without it
    the file has to hold one candidate (see `candidates`). Raises UserCodeError; where the user's own code
    raised, that exception is its `__cause__`.
    """
    path, attr = split_target(target)
    if attr == "" or target.startswith(":") or not target:
        lacks = "name" if attr == "" else "file"
        raise UserCodeError(f"{target!r} lacks the {lacks}; give model.py or model.py:NAME")
    with user_code(path):
        module = execute(path)
        if attr is None:
            attr = _only_candidate(module, path)
        host = _build(module, attr, path)
        args = _example(module, "example_inputs", path)
        kwargs = _example(module, "example_kwargs", path)
    if isinstance(args, dict):
        raise UserCodeError(f"{path}: example_inputs is {_a(args)}; keyword arguments go into example_kwargs")
    if args is not None and not isinstance(args, (tuple, list)):
        args = (args,)
    if kwargs is not None and not isinstance(kwargs, dict):
        raise UserCodeError(f"{path}: example_kwargs is {_a(kwargs)}; make it a dict of names to values")
    return LoadedModel(host, attr, path, None if args is None else tuple(args), kwargs)


@contextlib.contextmanager
def user_code(path: Path) -> Iterator[None]:
    """While code of the user runs: its folder is importable and its prints go to stderr."""
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        with contextlib.suppress(ValueError):  # the user's code may have taken it out itself
            sys.path.remove(folder)


def execute(path: Path) -> ModuleType:
    """Run the file and return it as a module, registered so that its classes pickle and show their source."""
    if not path.exists():
        raise UserCodeError(f"no such file: {path}{_near_file(path)}")
    if not path.is_file():
        raise UserCodeError(f"{path} is no file; give the Python file that builds the model")
    name = "morphc_model_" + re.sub(r"\W", "_", path.stem)
    loader = importlib.util.spec_from_file_location(name, path.resolve())
    if loader is None or loader.loader is None:
        raise UserCodeError(f"{path} is no Python file; its name has to end in .py")
    module = importlib.util.module_from_spec(loader)
    sys.modules[name] = module
    try:
        with _blamed(path, "raised while it was executed"):
            loader.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(name, None)
        raise
    return module


def candidates(module: ModuleType) -> list[str]:
    """Names in a file that may be meant as *the* model, in the order in which they are written.

    1. Modules that hold parameters and are not part of another one (a `backbone` inside `model`, a loss).
    2. Functions of the file without required arguments, annotated to return a Module or named like a factory.
    3. When there is none of these: modules without parameters, else Module classes of the file that can be
       built without arguments.
    """
    public = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    instances = {name: value for name, value in public.items() if isinstance(value, nn.Module)}
    inner = {id(part) for value in instances.values() for part in value.modules() if part is not value}
    outer = {name: value for name, value in instances.items() if id(value) not in inner}
    distinct = list({id(value): name for name, value in reversed(outer.items())}.values())[::-1]
    with_parameters = [name for name in distinct if any(True for _ in outer[name].parameters())]
    own = {name: v for name, v in public.items() if getattr(v, "__module__", None) == module.__name__}
    factories = [name for name, value in own.items() if _is_factory(name, value)]
    if with_parameters or factories:
        order = list(public)
        return sorted([*with_parameters, *factories], key=order.index)
    classes = [n for n, v in own.items() if _is_module_class(v) and not _required_arguments(v)]
    return distinct or classes


def where(error: BaseException, path: Path | None = None) -> str:
    """`file:line` of the innermost frame in `path` (or of any frame), "" when there is none."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if path is not None and Path(f.filename).resolve() == path.resolve()]
    frame = own[-1] if own else frames[-1] if frames and path is None else None
    return f"{path or frame.filename}:{frame.lineno}" if frame else ""


def summary(error: BaseException) -> str:
    """`ValueError: message`, the first line of what the user's code raised."""
    if isinstance(error, SystemExit):
        return f"sys.exit({error.code!r})"
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    first = text.strip().splitlines()[0] if text.strip() else ""
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


@contextlib.contextmanager
def _blamed(path: Path, what: str) -> Iterator[None]:
    """Whatever the user's code raises becomes a UserCodeError with the user's line; Ctrl-C passes."""
    try:
        yield
    except (Exception, SystemExit) as error:
        place = where(error, path)
        line = linecache.getline(*_split_place(place)).strip() if place else ""
        at = f" at {place}" + (f": {line}" if line else "") if place else ""
        raise UserCodeError(f"{path} {what}: {summary(error)}{at}") from error


def _split_place(place: str) -> tuple[str, int]:
    name, _, line = place.rpartition(":")
    return name, int(line) if line.isdigit() else 0


def _only_candidate(module: ModuleType, path: Path) -> str:
    names = candidates(module)
    if len(names) == 1:
        return names[0]
    if names:
        listed = ", ".join(f"{path}:{name}" for name in names)
        raise UserCodeError(f"{path} holds {len(names)} modules; name one of them: {listed}")
    classes = [n for n, v in vars(module).items() if _is_module_class(v) and v.__module__ == module.__name__]
    needs = f" (the arguments that {classes[0]!r} needs are not known)" if classes else ""
    raise UserCodeError(
        f"{path} holds no torch.nn.Module{needs}; assign one to a name, such as `model = ...`, "
        f"or write a function without arguments that returns one"
    )


def _build(module: ModuleType, attr: str, path: Path) -> nn.Module:
    value: Any = module
    for part in attr.split("."):
        if not hasattr(value, part):
            known = [name for name, item in getattr(value, "__dict__", {}).items() if _is_usable(name, item)]
            raise UserCodeError(f"{path} has no {attr!r}.{did_you_mean(part, known)}")
        value = getattr(value, part)
    if isinstance(value, nn.Module):
        return value
    if not callable(value) or (isinstance(value, type) and not _is_module_class(value)):
        what = f"the class {value.__name__}" if isinstance(value, type) else _a(value)
        raise UserCodeError(f"{path}:{attr} is {what}: neither a torch.nn.Module nor a maker of one")
    required = _required_arguments(value)
    if required:
        raise UserCodeError(
            f"{path}:{attr} needs {', '.join(required)}; morphc calls it without arguments: "
            f"write `model = {attr}(...)` in the file, or give them defaults"
        )
    with _blamed(path, f"raised when {attr}() was called"):
        host = value()
    if not isinstance(host, nn.Module):
        raise UserCodeError(f"{path}:{attr}() returned {_a(host)}, no torch.nn.Module")
    return host


def _example(module: ModuleType, name: str, path: Path) -> Any:
    value = getattr(module, name, None)
    if callable(value):
        with _blamed(path, f"raised when {name}() was called"):
            return value()
    return value


def _is_usable(name: str, value: object) -> bool:
    usable = isinstance(value, nn.Module) or _is_module_class(value) or inspect.isfunction(value)
    return usable and not name.startswith("_")


def _is_module_class(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, nn.Module)


def _is_factory(name: str, function: Any) -> bool:
    if not inspect.isfunction(function) or _required_arguments(function):
        return False
    try:
        returns = typing.get_type_hints(function).get("return")
    except (NameError, TypeError, AttributeError):  # an annotation under TYPE_CHECKING, say
        returns = None
    return _is_module_class(returns) or name in FACTORY_NAMES


def _required_arguments(function: Callable[..., object]) -> list[str]:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # C callables have no signature: let the call tell
        return []
    star = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in parameters if p.default is p.empty and p.kind not in star]


def _a(value: object) -> str:
    name = type(value).__name__
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def _near_file(path: Path) -> str:
    if not path.parent.is_dir():
        return ""
    near = difflib.get_close_matches(path.name, [file.name for file in path.parent.glob("*.py")], n=1)
    return f". Did you mean {path.parent / near[0]}?" if near else ""
