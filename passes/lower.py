"""Lower: from plan and graphs to a module that runs.

The host is cloned (new module objects, shared tensors) and the sites are hung into the clone:

1. A layer module: its forward is wrapped at its boundary, whatever its region's level.
2. A functional layer in a rewritten region: the region's graph, site included, runs in place of the forward.
3. The in-projection of a MultiheadAttention: its own forward runs, watched for the fused call.
4. A functional layer anywhere else: the region's own forward runs, watched for calls with the parameter.
5. A rewritten region whose graph a pass has changed: the changed graph runs.
"""

from __future__ import annotations

import types
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx, nn

from morphc.passes.clone import clone_tree
from morphc.passes.insert_sites import uncovered
from morphc.passes.isolation import MAX_DEPTH, give, held_by, is_users_object
from morphc.passes.manager import register_pass
from morphc.passes.plan import Site
from morphc.passes.program import Program, graphs_hash
from morphc.runtime.attach import attach
from morphc.runtime.attention import AttentionForward
from morphc.runtime.forward import SiteForward
from morphc.runtime.regions import RegionForward, RewrittenForward, WatchedForward
from morphc.runtime.requests import SiteRequest, functional_name
from morphc.runtime.site import SeedSite

_WRAPPERS = (SiteForward, RegionForward)


@register_pass
@dataclass(frozen=True)
class Lower:
    """Build `program.model`."""

    name: ClassVar[str] = "lower"

    def apply(self, program: Program) -> None:
        model = clone_tree(program.host, copy_tensors=not program.share)
        sites = [site for site in program.plan.sites if site.path not in program.unwatched]
        modules = dict(model.named_modules(remove_duplicate=False))
        attach(model, [_request(site, modules) for site in sites], program.config, program.hidden_root)
        functional: dict[str, list[Site]] = {}
        for site in sites:
            if site.parameter:
                functional.setdefault(_region_of(site), []).append(site)
        for path, region in program.regions.items():
            changed = bool(region.graphs) and region.pristine != graphs_hash(region.graphs)
            attention = path in functional and isinstance(modules[path], nn.MultiheadAttention)
            left = functional.get(path, [])
            inside = [] if attention else [s for s in left if s not in uncovered(region, left)]
            if changed and region.level != "rewritten":
                note = (
                    f"the graph of {path!r} was changed by a pass, but is only for reading: its forward runs"
                )
                program.notes = [*(n for n in program.notes if n != note), note]
            region.runs = (
                region.level == "rewritten"
                and path not in program.demoted
                # A graph that nothing will compare with its forward runs only where a pass wants it to.
                and bool(changed or (inside and not program.unverified))
            )
            if region.runs:
                if inside:
                    # What runs where the graph does not fit the call; its functional layers keep their sites.
                    _watch(modules, path, inside)
                wrapped = RewrittenForward(
                    modules[path], {m: _runnable(g) for m, g in region.graphs.items()}, region.given
                )
                modules[path].__dict__["forward"] = wrapped
                left = [site for site in left if site not in inside]
            if left:
                _watch(modules, path, left)
        for path in functional.keys() - program.regions.keys():
            _watch(modules, path, functional[path])
        rebind_forwards(model)
        program.model = model

    def requires(self, program: Program) -> str:
        if program.recording is None and program.follow is None:
            return "nothing was captured yet; capture comes first"
        return (
            "" if all(site.seeds for site in program.plan.sites) else "some sites have no seeds planned yet"
        )

    def ensures(self, program: Program) -> str:
        if type(program.model) is not type(program.host):
            return "the compiled model has another type than its host"
        return ""


def _request(site: Site, modules: dict[str, nn.Module]) -> SiteRequest:
    owner = site.path.rpartition(".")[0] if site.parameter else site.path
    layer = modules[owner]
    like = next((tensor for tensors in (layer.parameters(), layer.buffers()) for tensor in tensors), None)
    device = like.device if like is not None else torch.device("cpu")
    return SiteRequest(
        path=site.path,
        layer=layer,
        features=site.features,
        feature_axis=site.feature_axis,
        seeds=site.seeds,
        slots=site.slots,
        dtype=getattr(torch, site.dtype),
        device=device,
        kind=site.layer_kind,
        epilogue=site.epilogue,
        output_index=site.output_index,
        block=site.block,
        parameter=site.parameter,
        owner=modules[site.owner] if site.owner is not None else None,
        tap_features=site.tap_features,
        past_hooks=site.past_hooks,
    )


def _region_of(site: Site) -> str:
    """The module whose forward makes the functional layer's call."""
    return site.region if site.region is not None else site.path.rpartition(".")[0]


def _watch(modules: dict[str, nn.Module], path: str, sites: list[Site]) -> None:
    owners = {site.path: modules[site.path.rpartition(".")[0]] for site in sites}
    found: dict[str, SeedSite] = {}
    for site in sites:
        child: nn.Module = owners[site.path].morphc  # type: ignore[assignment]
        found[site.path] = child.get_submodule(functional_name(str(site.parameter)))  # type: ignore[assignment]
    kind = AttentionForward if isinstance(modules[path], nn.MultiheadAttention) else WatchedForward
    modules[path].__dict__["forward"] = kind(modules[path], found, owners)


def rebind_forwards(model: nn.Module) -> None:
    """Let bound methods `layer.forward` that a model keeps in its attributes go through the wrapped one."""
    seen: set[int] = set()

    def rebound(value: Any, depth: int = 0) -> Any:
        if type(value) is types.MethodType and isinstance(value.__self__, nn.Module):
            wrapper = vars(value.__self__).get("forward")
            own = type(value.__self__).forward
            return wrapper if isinstance(wrapper, _WRAPPERS) and value.__func__ is own else value
        if depth >= MAX_DEPTH or id(value) in seen:
            return value
        if type(value) is tuple:
            items = tuple(rebound(item, depth + 1) for item in value)
            return value if all(a is b for a, b in zip(items, value, strict=True)) else items
        held: dict[Any, Any] = {}
        if type(value) is list:
            held = dict(enumerate(value))
        elif type(value) is dict:
            held = value
        elif is_users_object(value):
            held = held_by(value)
        if held:
            seen.add(id(value))
        # Only what changes is written: what is shared with the host holds no method of a module of the clone's.
        changed = {key: new for key, old in held.items() if (new := rebound(old, depth + 1)) is not old}
        if type(value) is list:
            for index, new in changed.items():
                value[index] = new
        elif type(value) is dict:
            value.update(changed)
        elif changed:
            give(value, changed)
        return value

    for module in list(model.modules()):
        for name, value in list(vars(module).items()):
            if name not in ("_modules", "_parameters", "_buffers", "forward"):
                module.__dict__[name] = rebound(value)


def _runnable(graph: fx.Graph) -> fx.Graph:
    """A copy of the graph without the sites of child modules: those are called by the layers themselves."""
    fresh = fx.Graph()
    output = fresh.graph_copy(graph, {})
    if output is not None:
        fresh.output(output)
    fresh.set_codegen(graph._codegen)
    for node in list(fresh.nodes):
        # Annotations may be strings that mean nothing outside of the user's file, and nobody reads them here.
        node.type = None
        if node.op == "call_module" and "site" in node.meta and len(node.args) == 1:
            node.replace_all_uses_with(node.args[0])
            fresh.erase_node(node)
    return fresh
