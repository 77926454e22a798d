"""Changing a plan: it is frozen, so a pass replaces it."""

from __future__ import annotations

from typing import Any

from msgspec.structs import replace

from morphc.passes.program import Program


def with_plan(program: Program, **changes: Any) -> None:
    """Replace fields of the program's plan."""
    program.plan = replace(program.plan, **changes)
