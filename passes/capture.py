"""Capture: the ladder, per region.

1. Rewritten: plain symbolic tracing succeeds without a value, in train and in eval mode.
2. Matched: the recorded run gives a graph for reading.
3. As written: its control flow reads tensor values, it left torch, the example never reached it, or the model is
   nested too deeply to be watched.

A host that refuses its example input is an error of the example; a host that only refuses fake tensors is run on
real ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from morphc.errors import ExampleInputError, HostForwardError, PlanError
from morphc.passes.clone import clone_tree
from morphc.passes.hooks import RUN_HOOKS, Belongings
from morphc.passes.manager import register_pass
from morphc.passes.plan import Plan
from morphc.passes.program import CapturedRegion, Program, graphs_hash
from morphc.passes.quiet import own_state, quiet_state
from morphc.passes.recorder import Region, is_leaf
from morphc.passes.recording import record
from morphc.passes.tracing import trace_region


@register_pass
@dataclass(frozen=True)
class Capture:
    """Record one run and trace each region. `symbolic=false` leaves the first rung out."""

    name: ClassVar[str] = "capture"
    symbolic: bool = True

    def apply(self, program: Program) -> None:
        if program.regions:
            return
        if program.follow is not None:
            _retrace(program, program.follow)
            return
        if program.args is None:
            raise ExampleInputError(
                "no example inputs: pass example_inputs=(x, ...) as the model's forward takes them "
                "(on the command line: --input 32x784:f32, or example_inputs in the file)"
            )
        recording = record(program.host, program.args, program.kwargs)
        if recording.error:
            _explain_failure(program, recording.error, recording.error_source)
        program.recording = recording
        if not recording.layers:
            program.notes.append(
                f"{recording.unseen}: layers were found by their type alone, and every forward runs as written"
            )
        clone = clone_tree(program.host)
        # Reading a parametrized weight computes it, and some parametrizations update their buffers by that.
        own_state(clone)
        modules = dict(clone.named_modules())
        with quiet_state(clone, training=None):
            for path, region in recording.regions.items():
                program.regions[path] = _captured(path, region, modules[path], self.symbolic)
        for path, module in modules.items():
            unseen = path not in program.regions and path not in recording.layers
            if unseen and not is_leaf(module) and not isinstance(module, nn.ModuleList | nn.ModuleDict):
                cls = type(module).__name__
                program.regions[path] = CapturedRegion(path, cls, "as_written", recording.unseen, "")

    def ensures(self, program: Program) -> str:
        missing = [r.path for r in program.regions.values() if r.level != "as_written" and not r.graphs]
        return f"no graph for {missing[:3]}" if missing else ""


def _captured(path: str, region: Region, module: nn.Module, symbolic: bool) -> CapturedRegion:
    cls = type(module).__name__
    source = region.source
    if region.data_dependent:
        return CapturedRegion(path, cls, "as_written", region.data_dependent, source)
    reason, where = "symbolic tracing was turned off", source
    if symbolic:
        traced = trace_region(module, region.arguments)
        if traced.train is not None and traced.eval is not None:
            graphs = {"train": traced.train, "eval": traced.eval}
            return CapturedRegion(
                path, cls, "rewritten", "", source, graphs, traced.given, pristine=graphs_hash(graphs)
            )
        reason, where = traced.reason, traced.source or source
    graphs = {"recorded": region.graph}
    text = f"{reason} at {where}" if where and where not in reason else reason
    return CapturedRegion(path, cls, "matched", text, source, graphs, pristine=graphs_hash(graphs))


def _retrace(program: Program, plan: Plan) -> None:
    """Of a plan that is followed, only the regions whose graphs run are traced again; nothing is searched."""
    running = [note for note in plan.regions if note.runs]
    clone = clone_tree(program.host)
    own_state(clone)
    modules = dict(clone.named_modules())
    with quiet_state(clone, training=None):
        for note in running:
            if note.path not in modules:
                raise PlanError(f"the plan's region {note.path!r} is not in this model")
            traced = trace_region(modules[note.path], dict.fromkeys(note.given, True))
            if traced.train is None or traced.eval is None:
                raise PlanError(f"the plan's region {note.path!r} can't be traced any more: {traced.reason}")
            graphs = {"train": traced.train, "eval": traced.eval}
            program.regions[note.path] = CapturedRegion(
                note.path, note.module_class, "rewritten", "", note.source, graphs, traced.given,
                pristine=graphs_hash(graphs),
            )  # fmt: skip


def _explain_failure(program: Program, error: str, source: str) -> None:
    at = f" at {source}" if source else ""
    own = Belongings(program.host.modules())
    for path, module in program.host.named_modules():
        for table in (vars(module).get(name, {}) for name in RUN_HOOKS):
            made = next((hook for hook in table.values() if own.is_made_outside(hook)), None)
            if made is not None:
                raise HostForwardError(
                    f"the forward of {type(program.host).__name__}'s copy fails on the example inputs{at}: {error}. "
                    f"The hook {getattr(made, '__qualname__', repr(made))} on {path or 'the root'!r} was made outside "
                    "of the model's classes and refers to one of its modules, so it still writes to the host: make it "
                    "in a method of the class, or over a dict that is an attribute of the module"
                )
    raise HostForwardError(
        f"{type(program.host).__name__}'s own forward fails on the example inputs{at}: {error}. "
        "Run model(*example_inputs) by hand first; inputs must be on the model's device and of its dtype"
    )
