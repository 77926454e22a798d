"""The options of `Config` on the command line. Values are checked by `Config` itself, so messages agree."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import msgspec
import typer

from morphc.config import BACKENDS, BLENDS, KINDS, Config
from morphc.errors import ConfigError

PANEL = "What gets a site, and what a site is"


def _option(kind: Any, *flags: str, help: str, metavar: str | None = None) -> Any:
    return Annotated[kind, typer.Option(*flags, help=help, metavar=metavar, rich_help_panel=PANEL)]


Strings = list[str] | None
# Config field -> how it is given. Fields that take several values can be repeated or separated by commas.
OPTIONS: Mapping[str, Any] = {
    "seeds_per_layer": _option(
        Strings,
        "--seeds",
        metavar="N",
        help="Seeds of every site: a ceiling, 'auto', or PATTERN=N, exact for sites that match (repeatable).",
    ),
    "slots": _option(int | None, "--slots", help="Slots of every site; 10 % of its seeds when not given."),
    "rank": _option(int | None, "--rank", help="Hidden width of a slot's module."),
    "blueprint": _option(Strings, "--blueprint", metavar="NAME", help="What slots hold (repeatable)."),
    "blend": _option(str | None, "--blend", metavar="NAME", help=f"One of {', '.join(BLENDS)}."),
    "kinds": _option(Strings, "--kinds", metavar="KIND", help=f"Layers that get a site: {', '.join(KINDS)}."),
    "include": _option(Strings, "--include", metavar="PATTERN", help="Only sites that match (repeatable)."),
    "exclude": _option(Strings, "--exclude", metavar="PATTERN", help="No sites that match (repeatable)."),
    "telemetry_every": _option(
        int | None, "--telemetry-every", help="Measure every n-th training forward; 0 is never."
    ),
    "telemetry_values": _option(
        int | None, "--telemetry-values", help="Take so many values of a larger activation; 0 takes all."
    ),
    "near_zero": _option(float | None, "--near-zero", help="Up to this size an activation counts as dead."),
    "gradient_telemetry": _option(bool | None, "--gradient-telemetry", help="Measure gradients too."),
    "seed_lr": _option(float | None, "--seed-lr", help="Factor on the host's learning rate."),
    "backend": _option(str | None, "--backend", metavar="NAME", help=f"One of {', '.join(BACKENDS)}."),
    "max_overhead": _option(
        float | None, "--max-overhead", help="Bound of a site's share of its layer's cost, for --seeds auto."
    ),
}
_PARAMETER = {"seeds_per_layer": "seeds"}
_SEVERAL = ("blueprint", "kinds", "include", "exclude")


def with_config(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command all options above; it gets those that were set as one dict, `options`."""

    @functools.wraps(command)
    def run(**arguments: Any) -> Any:
        options = {field: arguments.pop(_PARAMETER.get(field, field)) for field in OPTIONS}
        given = {field: value for field, value in options.items() if value is not None}
        return command(options=given, **arguments)

    signature = inspect.signature(command, eval_str=True)
    own = [p for p in signature.parameters.values() if p.name != "options"]
    added = [
        inspect.Parameter(
            _PARAMETER.get(field, field), inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation
        )
        for field, annotation in OPTIONS.items()
    ]
    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own] + added
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run


def make_config(options: Mapping[str, Any], base: Mapping[str, object] | None = None) -> Config:
    """The Config that the given options ask for, over those of `base` (a plan's). Raises ConfigError."""
    given = dict(options)
    if "seeds_per_layer" in given:
        given["seeds_per_layer"] = _seeds(given["seeds_per_layer"])
    for field in _SEVERAL:
        if field in given:
            given[field] = tuple(part for text in given[field] for part in _parts(field, text))
    if len(given.get("blueprint", ())) == 1:
        given["blueprint"] = given["blueprint"][0]
    if not base:
        return Config(**given)
    config = Config.from_json(msgspec.json.encode(dict(base)))
    return msgspec.structs.replace(config, **given)


def _parts(field: str, text: str) -> list[str]:
    # A pattern may hold a comma inside brackets, so only names are split.
    parts = [text] if field in ("include", "exclude") else text.split(",")
    return [part.strip() for part in parts if part.strip()]


def _seeds(texts: list[str]) -> int | str | dict[str, int]:
    if len(texts) == 1 and "=" not in texts[0]:
        return _whole(texts[0]) if texts[0] != "auto" else "auto"
    counts: dict[str, int] = {}
    for text in texts:
        pattern, equals, count = text.rpartition("=")
        if not equals:
            raise ConfigError(f"--seeds {text!r}: one count holds for all sites; give PATTERN=N to differ")
        counts[pattern] = _whole(count)
    return counts


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ConfigError(
            f'seeds_per_layer={text!r} is no count; give a whole number, "auto" or PATTERN=N'
        ) from None
