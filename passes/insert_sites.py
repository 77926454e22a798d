"""Insert sites: a `call_module` node `<layer>.morphc` behind each call of a chosen layer.

1. A child module that is a site: its calls, in every graph of the region that makes them.
2. A functional layer: the weighted call that reads the parameter; all uses of its value go through the site.
3. A layer that no graph shows (as written): nothing to do here; its site hangs at the module's boundary.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from morphc.passes.layers import WEIGHTED_CALLS
from morphc.passes.manager import register_pass
from morphc.passes.plan import Site
from morphc.passes.program import CapturedRegion, Program, graphs_hash
from morphc.passes.recorder import function_name
from morphc.runtime.requests import functional_name


@register_pass
@dataclass(frozen=True)
class InsertSites:
    """Put the plan's sites into the captured graphs."""

    name: ClassVar[str] = "insert-sites"

    def apply(self, program: Program) -> None:
        names = {id(module): name for name, module in program.host.named_modules()}
        modules = dict(program.host.named_modules(remove_duplicate=False))
        layers = {(site.owner if site.owner is not None else site.path): site for site in program.plan.sites}
        functional = {site.path: site for site in program.plan.sites if site.parameter}
        for path, region in program.regions.items():
            touched = region.pristine == graphs_hash(region.graphs)
            for graph in region.graphs.values():
                for node in list(graph.nodes):
                    site = _site_of_module(node, path, modules, names, layers)
                    if site is None and node.op in ("call_function", "call_method"):
                        site = _site_of_call(node, path, functional)
                    if site is not None and not _has_site(node, site, path):
                        _insert(graph, node, site, path)
            if touched:
                region.pristine = graphs_hash(region.graphs)

    def requires(self, program: Program) -> str:
        known = program.follow is not None or program.plan.sites or program.plan.misses
        return "" if known else "no candidates were searched for yet"


def site_target(site: Site, region: str) -> str:
    """Where the site's module stands, seen from the region."""
    if site.parameter:
        owner, _, name = site.path.rpartition(".")
        full = f"{owner}.morphc.{functional_name(name)}"
    else:
        full = f"{site.path}.morphc"
    full = full.lstrip(".")
    return full.removeprefix(f"{region}.") if region else full


def _site_of_module(
    node: fx.Node, region: str, modules: dict[str, Any], names: dict[int, str], layers: dict[str, Site]
) -> Site | None:
    if node.op != "call_module":
        return None
    path = node.meta.get("path")
    if path is None:
        module = modules.get(f"{region}.{node.target}".lstrip("."))
        path = names.get(id(module)) if module is not None else None
    site = layers.get(path) if path is not None else None
    return None if site is None or site.parameter else site


def _site_of_call(node: fx.Node, region: str, functional: dict[str, Site]) -> Site | None:
    name = node.meta.get("function") or _name(node)
    if name not in WEIGHTED_CALLS:
        return None
    for operand in node.all_input_nodes:
        parameter = _parameter(operand, region)
        if parameter in functional:
            return functional[parameter]
    return None


def _name(node: fx.Node) -> str:
    if node.op == "call_method":
        return f"torch.Tensor.{node.target}"
    return "torch.matmul" if node.target is operator.matmul else function_name(node.target)


def _parameter(node: fx.Node, region: str) -> str:
    """The parameter that the node is, or is a view of."""
    while node.op in ("call_function", "call_method") and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    if node.op != "get_attr":
        return ""
    return str(node.meta.get("parameter") or f"{region}.{node.target}".lstrip("."))


def uncovered(region: CapturedRegion, sites: list[Site]) -> list[Site]:
    """Functional layers whose parameter a graph of the region reads without a site behind the call."""
    missing = []
    for site in sites:
        for graph in region.graphs.values():
            reads = any(n.op == "get_attr" and _parameter(n, region.path) == site.path for n in graph.nodes)
            if reads and not any(node.meta.get("site") == site.path for node in graph.nodes):
                missing.append(site)
                break
    return missing


def _has_site(node: fx.Node, site: Site, region: str) -> bool:
    target = site_target(site, region)
    users = list(node.users)
    taken = [u for u in users if u.op == "call_function" and getattr(u.target, "__name__", "") == "getitem"]
    return any(
        u.op == "call_module" and u.target == target for u in [*users, *(v for t in taken for v in t.users)]
    )


def _insert(graph: fx.Graph, node: fx.Node, site: Site, region: str) -> None:
    value = node
    if site.output_index is not None:
        # The watched value is one element of the layer's result; where nobody takes it, there is no flow to show.
        element = next(
            (
                user
                for user in node.users
                if getattr(user.target, "__name__", "") == "getitem" and user.args[1] == site.output_index
            ),
            None,
        )
        if element is None:
            return
        value = element
    args = (value, *([_layer_input(node, region, site)] if site.parameter else []))
    with graph.inserting_after(value):
        placed = graph.create_node("call_module", site_target(site, region), args)
    value.replace_all_uses_with(placed, delete_user_cb=lambda user: user is not placed)
    placed.meta = {k: v for k, v in value.meta.items() if k in ("shape", "dtype", "source")}
    placed.meta["site"] = site.path


def _layer_input(node: fx.Node, region: str, site: Site) -> fx.Node:
    """The operand of a weighted call that is not its parameter."""
    return next(operand for operand in node.all_input_nodes if _parameter(operand, region) != site.path)
