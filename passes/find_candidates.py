"""Find candidates: which layers get a site, and why each of the others does not.

1. A layer known by its type (`layers.classify`) is a candidate, reached by the example or not.
2. The out-projection of a MultiheadAttention is read by a fused call and never called itself: its site stands
   behind the attention, whose first output is the projection's. Its in-projections are layers named by their
   parameters, whose sites stand at the fused call.
3. A module whose forward is one weighted call (transformers' `Conv1D`, a home-made linear) is a look-alike.
4. A weighted call with a parameter in any other forward is a functional layer, named by its parameter.
5. Containers, activations, dropouts and whatever has no weights are no candidates; `kinds`, `include` and
   `exclude` take candidates out again. Each says so.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar

import torch
from msgspec.structs import replace
from torch import nn

from morphc.config import Config
from morphc.errors import ConfigError
from morphc.passes import layers as kinds_of
from morphc.passes.axes import Probe, settled
from morphc.passes.flow import ACTIVATION_MODULES, Flow, collapse
from morphc.passes.layers import Shape, WeightedCall
from morphc.passes.manager import register_pass
from morphc.passes.plan import Block, Level, Miss, Site
from morphc.passes.program import Program
from morphc.passes.recorder import Layer, torchs_own
from morphc.passes.recording import Recording
from morphc.passes.updates import with_plan
from morphc.runtime.attention import PACKED

_FUSED_ATTENTION = "torch.nn.functional.multi_head_attention_forward"
_IN_PROJECTION_NOTE = (
    "computed inside torch's attention, so its telemetry computes it once more on sampled steps"
)


# Calls that hand a parameter on.
_VIEWS = frozenset(
    f"torch.Tensor.{name}"
    for name in ("t", "transpose", "to", "view", "reshape", "__getitem__", "float", "mT.__get__", "T.__get__")
)


@register_pass
@dataclass(frozen=True)
class FindCandidates:
    """Fill the plan's sites and misses. Options add to the config's `include` and `exclude`."""

    name: ClassVar[str] = "find-candidates"
    include: str | None = None
    exclude: str | None = None

    def apply(self, program: Program) -> None:
        if program.plan.sites or program.follow is not None or program.recording is None:
            return
        search = _Search(program, self.include, self.exclude)
        sites, misses = search.run()
        program.flow = search.flow
        with_plan(program, sites=sites, misses=misses)

    def requires(self, program: Program) -> str:
        known = program.recording is not None or program.follow is not None or program.plan.sites
        return "" if known else "nothing was captured yet"


class _Search:
    def __init__(self, program: Program, include: str | None, exclude: str | None) -> None:
        assert program.recording is not None
        self.program = program
        self.recording: Recording = program.recording
        self.config: Config = program.config
        self.include = (*self.config.include, *([include] if include else []))
        self.exclude = (*self.config.exclude, *([exclude] if exclude else []))
        self.modules = dict(program.host.named_modules())
        self.shapes: dict[str, Shape] = {}
        self.owners: dict[str, str] = {}
        self.attentions: dict[str, str] = {}
        # Layers whose forward is called directly.
        self.past_hooks: set[str] = set()
        self.calls: dict[str, WeightedCall] = {}
        self.misses: dict[str, Miss] = {}
        self.flow = Flow(collapse(self.recording.flow, set(), {}).graph)
        self.probe = Probe(self.recording.how == "real")
        self.turned: dict[str, str] = {}

    def run(self) -> tuple[tuple[Site, ...], tuple[Miss, ...]]:
        self._by_type()
        self._by_computation()
        activations = {
            path: ACTIVATION_MODULES[type(m).__name__]
            for path, m in self.modules.items()
            if type(m).__name__ in ACTIVATION_MODULES
        }
        owners = set(self.owners.values())
        functional = {call.number: path for path, call in self.calls.items()}
        # A block of attention stays open: the layers inside of it are looked at one by one.
        whole = {path for path, shape in self.shapes.items() if shape.kind != "attention" or path in owners}
        self.flow = collapse(self.recording.flow, whole, activations, functional)
        self._outputs()
        self._bypassed()
        chosen = self._filtered()
        sites = tuple(self._site(path) for path in chosen)
        self._account_for_the_rest(set(chosen))
        return self._annotated(sites), tuple(self.misses.values())

    # -- finding -----------------------------------------------------------------------------------------

    def _by_type(self) -> None:
        for path, module in self.modules.items():
            shape = kinds_of.classify(module)
            if shape is None:
                continue
            self.shapes[path] = shape
            if isinstance(module, nn.MultiheadAttention):
                name = f"{path}.out_proj".lstrip(".")
                self.owners[name] = path
                self.shapes[name] = Shape("linear", module.embed_dim, -1, 0)
                self._in_projections(path, module)

        if "attention" in self.config.kinds:
            for path, module in self.modules.items():
                shape = kinds_of.attention_output(module, self.recording.layers.get(path))
                if shape is not None and path not in self.shapes:
                    self.shapes[path] = shape

    def _in_projections(self, path: str, module: nn.MultiheadAttention) -> None:
        """Case 2: seen in the recording if the attention ran, otherwise promised by its type."""
        fused = any(
            data["name"] == _FUSED_ATTENTION and data["regions"][-1:] == (path,)
            for _, data in self.recording.flow.nodes(data=True)
        )
        ran = path in self.recording.layers
        for name in kinds_of.computed_in_projections(module):
            full = f"{path}.{name}".lstrip(".")
            self._miss(
                full, "Tensor", "it is no parameter: something computes it for each call", executed=ran
            )
        for name, shape in kinds_of.in_projections(module).items():
            full = f"{path}.{name}".lstrip(".")
            if ran and not fused:
                reason = (
                    f"the forward of {type(module).__name__} never hands it to torch's functional attention"
                )
                self._miss(full, "Parameter", reason, executed=True)
                continue
            self.shapes[full] = shape
            self.attentions[full] = path

    def _by_computation(self) -> None:
        inner: dict[str, list[WeightedCall]] = {}
        for call in kinds_of.weighted_calls(self.recording):
            inner.setdefault(call.regions[-1] if call.regions else "", []).append(call)
        for path, calls in inner.items():
            if path in self.shapes or self._inside_a_layer(calls[0]):
                continue
            region = self.recording.regions.get(path)
            if region is None:
                continue
            # `return self.fc.forward(x)` is the child's one call, not its parent's.
            inside = calls[0].inside in self.shapes
            shape = None if inside else kinds_of.look_alike(region, self.recording.layers.get(path), calls)
            if shape is not None:
                self.shapes[path] = shape
                continue
            for call in calls:
                self._functional(call)

    def _inside_a_layer(self, call: WeightedCall) -> bool:
        return any(r in self.shapes and self.shapes[r].kind != "attention" for r in call.regions)

    def _functional(self, call: WeightedCall) -> None:
        name = call.parameter
        if call.inside in self.shapes and call.inside not in self.recording.layers:
            # `child.forward(x)`: the layer's own site sees that call, since it is the forward that it wraps.
            shape = self.recording.flow.nodes[call.number]
            self.recording.layers[call.inside] = Layer(
                call.inside,
                1,
                shape["input_shapes"][0],
                shape["shape"],
                shape["dtype"],
                "Tensor",
                call.regions[-1] if call.regions else None,
                call.source,
            )
        if call.inside in self.shapes:
            self.past_hooks.add(call.inside)
            return
        known = self.calls.get(name)
        if call.reason or call.features == 0:
            self._miss(name, call.kind, call.reason or "its output has no feature axis", call.source, True)
        elif known is None:
            self.calls[name] = call
            self.shapes[name] = Shape(call.kind, call.features, call.feature_axis)
        elif (known.features, known.feature_axis) != (call.features, call.feature_axis):
            reason = (
                f"used twice, with {known.features} and {call.features} output features; the first is watched"
            )
            self._miss(f"{name} (at {call.source})", call.kind, reason, call.source, True)

    def _bypassed(self) -> None:
        """Layers that are never called, because somebody else reads their weight: no site of theirs would ever run."""
        readers = {
            name: data
            for _, data in self.recording.flow.nodes(data=True)
            if data["kind"] == "function" and data["name"] not in _VIEWS
            for name in data["weights"]
            if name is not None
        }
        for path, shape in list(self.shapes.items()):
            reader = readers.get(f"{path}.weight".lstrip("."))
            owner = self.owners.get(path, path)
            if (
                reader is None
                or path in self.calls
                or owner in self.recording.layers
                or shape.kind == "embedding"
            ):
                continue
            watched = f"{path}.weight".lstrip(".") in self.calls
            what = reader["name"].rsplit(".", 1)[-1]
            reason = f"never called: its weight is read by {what}, " + (
                "and watched there" if watched else "which hands out no value of this layer alone"
            )
            del self.shapes[path]
            self._miss(path, self._class_of(path), reason, reader["source"], True, not watched)

    def _outputs(self) -> None:
        """Drop layers whose recorded output isn't what their type promises; note tuple outputs."""
        for path, shape in list(self.shapes.items()):
            layer = self.recording.layers.get(self.owners.get(path, path))
            if path in self.calls or path in self.attentions or layer is None:
                continue
            if shape.output_index is None and layer.output_kind == "tuple":
                shape = self.shapes[path] = Shape(
                    shape.kind, shape.features, shape.feature_axis, 0, shape.quantized
                )
            owner = self.modules.get(self.owners.get(path, path))
            wrong = ""
            if owner is not None and not torchs_own(owner):
                before = shape.feature_axis
                shape, wrong = settled(shape, owner, layer, self.probe, movable=path not in self.owners)
                self.shapes[path] = shape
                if shape.feature_axis != before:
                    self.turned[path] = f"its own forward hands its features out at axis {shape.feature_axis}"
            wrong = wrong or kinds_of.check_output(shape, layer)
            packed = shape.kind == "rnn" and layer.output_shape is None
            if wrong and not packed:
                del self.shapes[path]
                self._miss(path, type(self.modules[path]).__name__, wrong, layer.source, True, True)

    # -- choosing ----------------------------------------------------------------------------------------

    def _filtered(self) -> list[str]:
        chosen, matched = [], False
        for path in sorted(self.shapes, key=self._order):
            kind = self.shapes[path].kind
            cls = self._class_of(path)
            if not any(fnmatchcase(path, pattern) for pattern in self.include):
                self._miss(path, cls, f"not matched by include={list(self.include)}", candidate=True)
                continue
            matched = True
            pattern = next((p for p in self.exclude if fnmatchcase(path, p)), None)
            if kind not in self.config.kinds:
                self._miss(path, cls, f"its kind {kind!r} is not in kinds={list(self.config.kinds)}")
            elif pattern is not None:
                self._miss(path, cls, f"excluded by the pattern {pattern!r}", candidate=True)
            elif kind == "attention" and self._watched_inside(path):
                self._miss(path, cls, "its output is that of its out-projection, which is watched")
            elif self._unreachable(path):
                self._miss(path, cls, self._unreachable(path), candidate=True)
            elif self.shapes[path].features < 1:
                self._miss(path, cls, "it has no output features", candidate=True)
            else:
                chosen.append(path)
        if not matched and self.shapes and tuple(self.include) != ("*",):
            self._include_error()
        self._warn_of_idle_patterns()
        return chosen

    def _warn_of_idle_patterns(self) -> None:
        """A pattern that matches nothing is a slip of the pen, or of another model."""
        missed = (path for path, miss in self.misses.items() if miss.candidate)
        known = list(dict.fromkeys((*self.shapes, *missed)))
        for option, patterns in (("include", self.include), ("exclude", self.exclude)):
            for pattern in patterns:
                if not known or pattern == "*" or any(fnmatchcase(path, pattern) for path in known):
                    continue
                below = sum(fnmatchcase(path, f"{pattern}.*") for path in known)
                near = difflib.get_close_matches(pattern, known, n=3, cutoff=0.3)
                hint = f"; {f'{pattern}.*'!r} matches {below}" if below else ""
                hint = hint or (f"; near: {', '.join(map(repr, near))}" if near else "")
                self.program.warn(
                    f"{option} pattern {pattern!r} matches none of the {len(known)} candidate layers{hint}"
                )

    def _include_error(self) -> None:
        wanted = self.include[0]
        near = difflib.get_close_matches(wanted, self.shapes, n=3, cutoff=0.3) or sorted(self.shapes)[:3]
        raise ConfigError(
            f"include={list(self.include)} matches none of the {len(self.shapes)} candidate layers; "
            f"near: {', '.join(map(repr, near))}. Patterns are fnmatch patterns over layer paths"
        )

    def _watched_inside(self, path: str) -> bool:
        return "linear" in self.config.kinds and f"{path}.out_proj".lstrip(".") in self.shapes

    def _unreachable(self, path: str) -> str:
        """Why a site can't be hung there although the layer is a candidate."""
        owner = path if path in self.modules else path.rpartition(".")[0]
        module: nn.Module | None = self.modules.get(owner)
        if module is None:
            return "its parameter belongs to no module of the tree"
        parts = owner.split(".") if owner else []
        for depth in range(len(parts) + 1):
            if isinstance(self.modules.get(".".join(parts[:depth])), torch.jit.ScriptModule):
                return "it runs inside TorchScript, where Python can't watch it"
        if "morphc" in module._modules:
            return "it has a child named 'morphc', the name that sites live under"
        return ""

    def _order(self, path: str) -> tuple[int, str]:
        position = self._positions().get(self.owners.get(path, path) if path not in self.modules else path)
        if position is None:
            position = self._positions().get(path.rpartition(".")[0], len(self.modules))
        return position, path

    def _positions(self) -> dict[str, int]:
        if not hasattr(self, "_position_of"):
            self._position_of = {name: index for index, name in enumerate(self.modules)}
        return self._position_of

    # -- describing --------------------------------------------------------------------------------------

    def _site(self, path: str) -> Site:
        shape, call = self.shapes[path], self.calls.get(path)
        owner, attention = self.owners.get(path), self.attentions.get(path)
        layer = self.recording.layers.get(next(p for p in (owner, attention, path) if p is not None))
        region_path = call.regions[-1] if call and call.regions else layer.region if layer else None
        region_path = attention if attention is not None else region_path
        if region_path is None and path in self.program.regions:
            region_path = path
        level, why = self._level(region_path, layer is not None or call is not None)
        module = self.modules.get(path)
        executed = layer is not None or call is not None
        output = (
            self.recording.flow.nodes[call.number]["shape"] if call else layer.output_shape if layer else None
        )
        dtype = (
            self.recording.flow.nodes[call.number]["dtype"] if call else layer.output_dtype if layer else None
        )
        if dtype is None and module is not None:
            dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
        input_shape = layer.input_shape if layer else None
        tap = kinds_of.tap_width(module) if module is not None else 0
        if not tap and input_shape and shape.kind == "linear":
            tap = int(input_shape[-1])
        unseen = "not reached by the example input" if self.recording.layers else self.recording.unseen
        note = "" if executed else f"{unseen}; watched from its type"
        if path in self.turned:
            tap, note = 0, self.turned[path]  # its input and its output don't line up row by row
        if attention is not None:
            dtype = self._parameter(path).dtype
            tap = int(self._parameter(path).shape[1])
            note = "; ".join(filter(None, (note, _IN_PROJECTION_NOTE)))
        return Site(
            path=path,
            layer_kind=shape.kind,
            features=shape.features,
            feature_axis=shape.feature_axis,
            dtype=kinds_of.dtype_name(dtype),
            source=call.source if call else layer.source if layer else "",
            captured_as=level,
            why_not_better=why,
            layer_class=self._class_of(path),
            parameter=path.rpartition(".")[2] if call or attention is not None else None,
            owner=owner,
            region=region_path,
            output_index=shape.output_index,
            tap_features=tap,
            rows=kinds_of.rows_of(shape, output),
            calls=layer.calls if layer else 1,
            owns_input=self._owns_input(path, module),
            quantized=shape.quantized,
            executed=executed,
            past_hooks=path in self.past_hooks,
            note="; ".join(filter(None, (note, self._fold_note(path, attention is not None)))),
            parts=3 if attention is not None and path.endswith(PACKED) else 1,
            positions=kinds_of.positions_of(shape, output),
        )  # fmt: skip

    def _owns_input(self, path: str, module: nn.Module | None) -> bool:
        if module is None or any(not _is_torch(h) for h in module._forward_hooks.values()):
            return False
        node = self.flow.node_of.get(path)
        return node is not None and self.flow.graph.out_degree(node) <= 1

    def _level(self, region: str | None, executed: bool) -> tuple[Level, str]:
        if region is None:
            return ("rewritten", "") if executed else ("as_written", self.recording.unseen)
        captured = self.program.regions.get(region)
        if captured is None:
            return "rewritten", ""
        where = f"in the forward of {region or captured.module_class!r}: " if captured.reason else ""
        return captured.level, f"{where}{captured.reason}"

    def _class_of(self, path: str) -> str:
        if path in self.modules:
            return type(self.modules[path]).__name__
        if path in self.attentions:
            return type(self.modules[self.attentions[path]]).__name__
        call = self.calls.get(path)
        return call.name.rsplit(".", 1)[-1] if call else "function"

    def _annotated(self, sites: tuple[Site, ...]) -> tuple[Site, ...]:

        paths = [site.path for site in sites]
        # A block's members are modules: what widens it grows their weights.
        kinds = {site.path: site.layer_kind for site in sites if not site.parameter}
        features = {site.path: site.features for site in sites}
        calls = {site.path: site.calls for site in sites}
        roles = self.flow.roles(paths)
        tied = _tied(self.program.host)
        total = sum(p.numel() for p in self.program.host.parameters()) or 1
        flops = {site.path: self._flops_per_row(site) for site in sites}
        all_flops = sum(flops[s.path] * s.rows * s.calls for s in sites) or 1
        result = []
        for site in sites:
            role = roles.get(site.path)
            result.append(
                replace(
                    site,
                    epilogue=None,
                    block=self._block(site, kinds, features, calls),
                    shared_weight=self._weight_name(site) in tied,
                    residual_branch=bool(role and role.residual_branch),
                    bottleneck=bool(role and role.bottleneck),
                    dominates=role.dominates if role else 0,
                    parameter_share=self._numel(site) / total,
                    flop_share=flops[site.path] * site.rows * site.calls / all_flops,
                    host_flops_per_row=flops[site.path],
                )
            )
        return tuple(result)

    def _fold_note(self, path: str, attention: bool) -> str:
        """What must be known before a seed is grown there: a functional layer has no module to hang one into."""
        others = [name for name in self.config.blueprints if name != "affine"]
        functional = attention or path in self.calls
        hung = [name for name in others if name not in ("lowrank", "widen")]
        if path in self.past_hooks and hung:
            return f"its forward is called directly, past hooks: fold doesn't take back {', '.join(hung)}"
        return (
            f"a functional layer: fold takes back affine, not {', '.join(others)}"
            if functional and others
            else ""
        )

    def _block(
        self, site: Site, kinds: dict[str, str], features: dict[str, int], calls: dict[str, int]
    ) -> Block | None:
        block = self.flow.block(site.path, kinds, features, calls) if site.path in kinds else None
        if block is None or block.obstacle:
            return block
        if any(member in self.turned for member in (*block.inputs, block.output)):
            return None
        turned = next((p for p in (*block.inputs, block.output) if "Transpose" in self._class_of(p)), None)
        return block if turned is None else replace(block, obstacle=f"{turned!r} is a transposed convolution")

    def _weight_name(self, site: Site) -> str:
        return site.path if site.parameter else f"{site.path}.weight".lstrip(".")

    def _numel(self, site: Site, least_axes: int = 0) -> int:
        """Elements of the layer's own parameters; with `least_axes=2` of its matrices and kernels alone."""
        module = self.modules.get(site.path)
        if module is not None:
            return sum(p.numel() for p in module.parameters(recurse=False) if p.dim() >= least_axes)
        return self._parameter(site.path).numel()

    def _parameter(self, path: str) -> torch.Tensor:
        """The parameter that a functional layer is named by; an empty tensor where it is computed."""
        owner, _, name = path.rpartition(".")
        parameter = self.modules[owner]._parameters.get(name)
        return parameter if parameter is not None else torch.empty(0)

    def _flops_per_row(self, site: Site) -> int:
        """Two for each multiply-add: weights touched per position."""
        return (
            2 * self._numel(site, least_axes=2)
            if site.layer_kind in ("linear", "conv")
            else 8 * site.features
        )

    def _account_for_the_rest(self, chosen: set[str]) -> None:
        for path, module in self.modules.items():
            if path in chosen or path in self.misses:
                continue
            layer = self.recording.layers.get(path)
            self._miss(
                path, type(module).__name__, self._why_no_layer(path, module),
                layer.source if layer else "", layer is not None,
            )  # fmt: skip
        for call in kinds_of.weighted_calls(self.recording):
            fused = call.inside is not None or self._inside_a_layer(call)
            if not fused and call.parameter not in self.shapes and call.parameter not in self.misses:
                self._miss(
                    call.parameter,
                    call.kind,
                    "its value is not visible outside of its module",
                    call.source,
                    True,
                )

    def _why_no_layer(self, path: str, module: nn.Module) -> str:
        if type(module).__name__ in ACTIVATION_MODULES:
            return "a pointwise activation: no weights; it may fuse into the site before it"
        if isinstance(module, torch.jit.ScriptModule):
            return "it runs inside TorchScript, where Python can't watch it"
        if any(True for _ in module.children()):
            return "a container: its children are looked at one by one"
        if not any(True for _ in module.parameters(recurse=False)):
            return "it has no weights of its own"
        if path not in self.recording.layers:
            return f"no known kind of layer, and {self.recording.unseen}"
        return "its forward is not one weighted matmul or convolution"

    def _miss(
        self,
        path: str,
        cls: str,
        reason: str,
        source: str = "",
        executed: bool | None = None,
        candidate: bool = False,
    ) -> None:
        layer: Layer | None = self.recording.layers.get(path)
        seen = executed if executed is not None else layer is not None or path in self.calls
        where = source or (layer.source if layer else "")
        self.misses[path] = Miss(path, cls, reason, where, seen, candidate)


def _tied(host: nn.Module) -> set[str]:
    """Names of parameters that are the same tensor under several names."""
    groups: dict[int, list[str]] = {}
    for name, parameter in host.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return {name for names in groups.values() if len(names) > 1 for name in names}


def _is_torch(hook: object) -> bool:
    return (getattr(hook, "__module__", None) or "").startswith("torch.")
