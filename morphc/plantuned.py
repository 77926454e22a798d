"""The tuned configs of a plan: they hold for the kernels as the code made them that tuned them."""

from __future__ import annotations

from collections.abc import Iterator

from msgspec.structs import replace

from morphc.errors import MorphcError
from morphc.kernels import tuning
from morphc.kernels.wanted import SOURCES
from morphc.passes.plan import Plan


def with_tuned(plan: Plan) -> Plan:
    """`plan` with the configs that are known for its kernels."""
    tuned = tuning.known(plan.specs)
    current = _made_from(plan)
    names = {_kernel(name) for name in tuned}
    return replace(
        plan, tuned=tuned, made_from={name: current[name] for name in sorted(names & set(current))}
    )


def adopt(plan: Plan) -> str:
    """Use the plan's tuned configs, as far as its kernels are what this version makes; what to tell of the others."""
    current = _made_from(plan) if plan.tuned else {}
    fits = {
        name: config
        for name, config in plan.tuned.items()
        if plan.made_from.get(_kernel(name), "") == current.get(_kernel(name))
    }
    tuning.adopt(fits)
    return "\n".join(_strange(plan, fits.keys() ^ plan.tuned.keys(), current))


def _strange(plan: Plan, names: set[str], current: dict[str, str]) -> Iterator[str]:
    kernels = sorted({_kernel(name) for name in names})
    if not kernels:
        return
    first = kernels[0]
    told = ", ".join(name.rpartition("-")[0] or name for name in kernels[:3])
    more = f" and {len(kernels) - 3} more" if len(kernels) > 3 else ""
    yield (
        f"the plan's tuned configs of {told}{more} are of kernels from other templates "
        f"(the first was made from {plan.made_from.get(first, '?')}, now {current.get(first, 'none')}): they are not "
        "used; morphc.tune(model) finds new ones"
    )


def _kernel(name: str) -> str:
    """Of a name in `Plan.tuned`, without the rows."""
    return name.rpartition("@")[0]


def _made_from(plan: Plan) -> dict[str, str]:
    """Kernel -> the beginning of the key of its source as this version makes it."""
    found = {}
    for spec in plan.specs:
        if spec.kind in SOURCES:
            try:
                found[_kernel(tuning.key(spec, 1))] = SOURCES[spec.kind](spec).key[:12]
            except MorphcError:
                continue  # a kernel that this version refuses: nothing is tuned for it
    return found
