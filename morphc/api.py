"""The Python API: compile a model, ask about it, take it apart again."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

from msgspec import structs
from torch import nn

from morphc.compiler import compile_program
from morphc.config import Config
from morphc.errors import ConfigError, MorphcWarning
from morphc.passes.clone import clone_tree
from morphc.passes.plan import Plan
from morphc.reporting import Report
from morphc.runtime.plain import plain_attributes, plain_value
from morphc.runtime.store import store_of

if TYPE_CHECKING:
    from morphc.runtime.seeds import Seeds

M = TypeVar("M", bound=nn.Module)


def compile(
    host: M,
    example_inputs: Any = None,
    example_kwargs: Mapping[str, Any] | None = None,
    config: Config | None = None,
    plan: Plan | None = None,
    verify: Literal["auto"] | bool = "auto",
    share: bool = True,
) -> M:
    """Put seed sites behind the layers of `host` and return the model that has them, of the same type.

    example_inputs: positional arguments of the forward, as a tuple (one tensor may stand alone); they are run
    through the model on fake tensors to see what it does. A plan makes them unnecessary.
    plan: of an earlier compile (`morphc.report(model).plan`), followed without searching.
    verify: compare host and model bit for bit; "auto" does unless the model is on meta or above 1 GiB.
    share: use the host's own parameter and buffer tensors; False copies them. While they are shared, casts, moves
    and `load_state_dict(assign=True)` on either are seen, or missed, by the other: do those before compiling.

    The host is left as it was. Raises UnsupportedHostError, ExampleInputError, ConfigError, PlanError, PassError,
    VerificationError, each a MorphcError. Warns with MorphcWarning of what was asked for and has no effect.
    """
    compiled = compile_program(host, example_inputs, example_kwargs, config, plan, verify, share)
    for line in compiled.report.warnings:
        warnings.warn(line, MorphcWarning, stacklevel=2)
    return cast(M, compiled.model)


def report(model: nn.Module) -> Report:
    """The account of the compilation: sites, levels, costs, and why each other layer has no site.

    `str()` of it is a table. Raises NotMorphedError.
    """
    return cast(Report, store_of(model).report)


def seeds(model: nn.Module) -> Seeds:
    """A view over every seed of the model, in the order of its sites. Raises NotMorphedError."""
    from morphc.runtime.seeds import Seeds

    return Seeds(model)


def detach(model: M) -> M:
    """The host again: a module without any site, sharing the model's parameters and buffers.

    The model keeps its sites. What active seeds add is lost; `morphc.fold` keeps it. Raises NotMorphedError.
    """
    store_of(model)
    return clone_tree(model, attributes=plain_attributes, read=plain_value)


def enlarge(model: M, *, slots: int) -> M:
    """Give every site at least `slots` slots (at most its seeds), in place; returns `model`.

    Shapes of the slot banks change, so do this before an optimizer state or a checkpoint of the model is taken
    that must fit again. What the slots hold is kept. Raises NotMorphedError, ConfigError.
    """
    store = store_of(model)
    if isinstance(slots, bool) or not isinstance(slots, int) or slots < 1:
        raise ConfigError(f"slots={slots!r} is not a whole number of at least 1")
    now = store.enlarge(slots)
    if store.report is not None:
        plan: Plan = store.report.plan
        sites = tuple(structs.replace(site, slots=now[site.path]) for site in plan.sites)
        store.report = dataclasses.replace(store.report, plan=structs.replace(plan, sites=sites))
    return model
