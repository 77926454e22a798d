"""Fuse epilogues: `act(Site(Layer(x))) -> Site_act(Layer(x))`, where the activation is the site's sole consumer.

Here the site learns which activation follows it: its dead fraction is then counted after the activation. Whether
the activation itself is computed in the site's kernel is the backend's choice; the plain-torch one leaves it
where it stands.

1. An activation module behind a layer module. 2. An activation function behind either. 3. A functional layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from msgspec.structs import replace

from morphc.passes.manager import register_pass
from morphc.passes.program import Program
from morphc.passes.updates import with_plan


@register_pass
@dataclass(frozen=True)
class FuseEpilogues:
    """Fill each site's `epilogue` and mark the site's node with it."""

    name: ClassVar[str] = "fuse-epilogues"

    def apply(self, program: Program) -> None:
        if program.flow is None:
            return
        flow = program.flow
        with_plan(
            program,
            sites=tuple(
                replace(s, epilogue=flow.epilogue(s.owner or s.path)) if s.executed else s
                for s in program.plan.sites
            ),
        )
        epilogues = {site.path: site.epilogue for site in program.plan.sites if site.epilogue}
        for _, graph in program.graphs():
            for node in graph.nodes:
                if node.meta.get("site") in epilogues:
                    node.meta["epilogue"] = epilogues[node.meta["site"]]
