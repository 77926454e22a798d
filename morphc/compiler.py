"""The compiler, top to bottom: `compile_program` is the whole pipeline."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import msgspec
import torch
from msgspec.structs import replace
from torch import nn

from morphc import plantuned
from morphc.config import Config
from morphc.errors import (
    AlreadyMorphedError,
    ConfigError,
    ExampleInputError,
    MorphcError,
    PlanError,
    UnsupportedHostError,
)
from morphc.kernels.backend import chosen
from morphc.kernels.blueprints import base as blueprints
from morphc.passes.capture import Capture
from morphc.passes.emit import readable_graphs
from morphc.passes.find_candidates import FindCandidates
from morphc.passes.fuse_epilogues import FuseEpilogues
from morphc.passes.insert_sites import InsertSites
from morphc.passes.lower import Lower
from morphc.passes.manager import Pass, PassRecord, check_order, parse_passes, run_passes
from morphc.passes.plan import Miss, Plan, RegionNote
from morphc.passes.plan_chunks import PlanChunks
from morphc.passes.program import Program
from morphc.passes.shapes import PropagateShapes
from morphc.passes.verify import Verify
from morphc.plancheck import check_plan, config_of, model_digest
from morphc.reporting import Report
from morphc.runtime.backends import Backend, backends_of
from morphc.runtime.site import FunctionalSites, SeedSite
from morphc.runtime.store import SeedRoot, store_of
from morphc.tuneup import adopt_kept
from morphc.version import __version__

VerifyWhen = Literal["auto"] | bool
_LARGE_BYTES = 1 << 30


def default_passes() -> list[Pass]:
    """The pipeline, in the order it reads."""
    return [
        Capture(),
        PropagateShapes(),
        FindCandidates(),
        PlanChunks(),
        InsertSites(),
        FuseEpilogues(),
        Lower(),
        Verify(),
    ]


@dataclasses.dataclass
class Compiled:
    """What `compile_program` returns: the model and its account."""

    model: nn.Module
    report: Report


def compile_program(
    host: nn.Module,
    example_inputs: Any = None,
    example_kwargs: Mapping[str, Any] | None = None,
    config: Config | None = None,
    plan: Plan | None = None,
    verify: VerifyWhen = "auto",
    share: bool = True,
    passes: str | Sequence[Pass] | None = None,
    print_after: Sequence[str] = (),
    on_print: Callable[[str, str], None] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Compiled:
    """Compile `host`. The public `morphc.compile` returns the model of this."""
    started = time.perf_counter()
    program = _program(host, example_inputs, example_kwargs, config, plan, share, progress)
    steps = _steps(passes)
    if not _wants_verify(verify, host, program):
        program.unverified = plan is None
        steps = [step for step in steps if not isinstance(step, Verify)]
    records = run_passes(program, steps, print_after=print_after, on_print=on_print)
    if program.model is None:
        raise UnsupportedHostError("the passes given don't end in a model; end them with lower")
    _finish(program)
    if plan is None and adopt_kept(program.model, program.plan):
        program.plan = plantuned.with_tuned(program.plan)
    report = _report(program, records, time.perf_counter() - started)
    store_of(program.model).report = report
    return Compiled(program.model, report)


def inspect(
    host: nn.Module,
    example_inputs: Any = None,
    example_kwargs: Mapping[str, Any] | None = None,
    config: Config | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Report:
    """What would be chosen, and why not the rest. Installs nothing; a model on meta needs no memory."""
    started = time.perf_counter()
    program = _program(host, example_inputs, example_kwargs, config, None, True, progress)
    steps = [step for step in default_passes() if not isinstance(step, Lower | Verify)]
    records = run_passes(program, steps)
    _finish(program)
    return _report(program, records, time.perf_counter() - started)


@dataclasses.dataclass
class Bisection:
    """The first pass after which the lowered model differs from its host; None when none does.

    warnings: as those of a `Report`.
    """

    culprit: str | None
    lines: list[str]
    warnings: list[str] = dataclasses.field(default_factory=list)


def bisect(
    host: nn.Module,
    example_inputs: Any = None,
    example_kwargs: Mapping[str, Any] | None = None,
    config: Config | None = None,
    passes: str | Sequence[Pass] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Bisection:
    """Run the pipeline pass by pass; after each one lower and compare, without demoting anything."""
    program = _program(host, example_inputs, example_kwargs, config, None, True, progress)
    lines: list[str] = []
    for step in _steps(passes):
        if isinstance(step, Lower | Verify):
            continue
        try:
            run_passes(program, [step])
            run_passes(program, [PlanChunks(), Lower(), Verify(strict=True)])
        except (ConfigError, ExampleInputError):
            raise  # the arguments are wrong, or the host itself: no pass is to blame
        except MorphcError as error:
            lines.append(f"{step.name}: BROKEN: {error}")
            return Bisection(step.name, lines, program.warnings)
        notes = [note for note in program.verification if "nondeterministic" in note]
        lines.append(f"{step.name}: equal{' (' + notes[0] + ')' if notes else ''}")
    return Bisection(None, lines, program.warnings)


def _program(
    host: nn.Module,
    example_inputs: Any,
    example_kwargs: Mapping[str, Any] | None,
    config: Config | None,
    plan: Plan | None,
    share: bool,
    progress: Callable[[str, int, int], None] | None,
) -> Program:
    check_host(host)
    if config is not None and not isinstance(config, Config):
        raise ConfigError(
            f"config is a {type(config).__name__}: give morphc.Config(...), or Config(**options)"
        )
    if plan is not None and not isinstance(plan, Plan):
        raise PlanError(
            f"plan is a {type(plan).__name__}: read it with morphc.Plan.from_json(path.read_bytes())"
        )
    args = _as_args(example_inputs)
    if args is None and example_kwargs:
        args = ()
    program = Program(
        host,
        args,
        dict(example_kwargs or {}),
        config or Config(),
        follow=plan,
        share=share,
        progress=progress,
    )
    for name in program.config.blueprints:
        blueprints.get(name)
    if program.config.backend == "triton":
        for device in {tensor.device for tensor in (*host.parameters(), *host.buffers())}:
            if device.type != "meta":
                chosen("triton", device)
    if plan is not None:
        check_plan(plan, host, config)
        program.config = config or config_of(plan)
        if plan.morphc_version != __version__:
            program.notes.append(f"the plan was made by morphc {plan.morphc_version}, this is {__version__}")
        program.plan = plan
        if strange := plantuned.adopt(plan):
            program.warn(strange)
        program.demoted = {note.path: note.reason for note in plan.regions if not note.runs}
    return program


def _steps(passes: str | Sequence[Pass] | None) -> list[Pass]:
    if passes is None:
        return default_passes()
    steps = parse_passes(passes) if isinstance(passes, str) else list(passes)
    check_order(steps, default_passes())
    if any(isinstance(step, Lower) for step in steps):
        return steps
    # Not a whole pipeline: built-in passes take the place of their namesakes, with the options given; others come
    # before lower, where they see captured graphs with their sites in.
    given = {step.name: step for step in steps}
    pipeline = [given.get(step.name, step) for step in default_passes()]
    builtin = {step.name for step in pipeline}
    others = [step for step in steps if step.name not in builtin]
    at = next(i for i, step in enumerate(pipeline) if isinstance(step, Lower))
    return [*pipeline[:at], *others, *pipeline[at:]]


def check_host(host: object) -> None:
    """Raises UnsupportedHostError naming what to pass instead."""
    if not isinstance(host, nn.Module):
        raise UnsupportedHostError(f"morphc.compile takes an nn.Module, not {type(host).__name__}")
    name = type(host).__name__
    if name == "OptimizedModule":
        raise UnsupportedHostError(
            "this model went through torch.compile already: pass the module given to torch.compile "
            "(model._orig_mod), and torch.compile what morphc.compile returns"
        )
    wrappers = ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel")
    for path, module in host.named_modules():
        kind = type(module).__name__
        if kind in wrappers and type(module).__module__.startswith("torch."):
            inner = "model.module" if not path else f"the module inside {path!r}"
            raise UnsupportedHostError(
                f"this model is wrapped in {kind}: pass {inner}, and wrap what morphc.compile returns"
            )
        if kind.startswith("FSDP") and hasattr(module, "unshard"):
            raise UnsupportedHostError(
                "this model was sharded by fully_shard: compile it first, shard it after"
            )
        if kind == "OptimizedModule":
            raise UnsupportedHostError(
                f"{path!r} went through torch.compile already: put its _orig_mod back, "
                "and torch.compile the whole afterwards"
            )
    for path, module in host.named_modules():
        taken = None if isinstance(module, torch.jit.ScriptModule) else _named_morphc(module)
        if isinstance(taken, SeedRoot | SeedSite | FunctionalSites):
            raise AlreadyMorphedError(
                "this model carries seed sites already: use it as it is, or compile morphc.detach(model) anew"
            )
        if taken is not None:
            where = f"{path!r}" if path else "the root"
            raise UnsupportedHostError(
                f"{where} has a child or an attribute named 'morphc', the name that sites live under: rename it"
            )
        if vars(module).get("_compiled_call_impl") is not None:
            where = f"{path!r} was" if path else "this model was"
            raise UnsupportedHostError(
                f"{where} compiled in place, by its compile(): set its _compiled_call_impl to None, "
                "and call compile() on it again after morphc.compile"
            )
    if isinstance(host, torch.jit.ScriptModule):
        raise UnsupportedHostError("this model is TorchScript: pass the nn.Module that it was scripted from")
    lazy = [n for n, p in host.named_parameters() if nn.parameter.is_lazy(p)]
    if lazy:
        raise UnsupportedHostError(
            f"parameter {lazy[0]!r} is lazy and has no shape yet ({len(lazy)} of them): "
            "run the model once before compiling"
        )


def _named_morphc(module: nn.Module) -> object:
    tables = (vars(module), module._modules, module._parameters, module._buffers)
    return next((table["morphc"] for table in tables if "morphc" in table), None)


def _as_args(example_inputs: Any) -> tuple[Any, ...] | None:
    if example_inputs is None:
        return None
    if isinstance(example_inputs, tuple | list):
        return tuple(example_inputs)
    if isinstance(example_inputs, torch.Tensor):
        return (example_inputs,)
    if isinstance(example_inputs, Mapping):
        raise ExampleInputError("example_inputs is a mapping: give keyword arguments as example_kwargs={...}")
    raise ExampleInputError(
        f"example_inputs is a {type(example_inputs).__name__}; give a tuple of the forward's positional arguments"
    )


def _wants_verify(verify: VerifyWhen, host: nn.Module, program: Program) -> bool:
    if program.args is None:
        if verify is True:
            raise ExampleInputError("verify=True needs example_inputs to run host and model on")
        program.verification = ["not verified: no example inputs were given"]
        return False
    if verify != "auto":
        if not isinstance(verify, bool):
            raise ConfigError(f'verify={verify!r} is neither True, False nor "auto"')
        if not verify:
            program.verification = ["not verified: verify=False"]
        return bool(verify)
    parameters = list(host.parameters())
    if any(p.device.type == "meta" for p in parameters):
        program.verification = ["not verified: the model is on the meta device"]
        return False
    size = sum(p.numel() * p.element_size() for p in parameters)
    if size > _LARGE_BYTES:
        program.verification = [
            f"not verified: {size / _LARGE_BYTES:.1f} GiB is above 1 GiB; verify=True does it"
        ]
        return False
    return True


def _finish(program: Program) -> None:
    if program.follow is not None:
        return
    regions = tuple(
        RegionNote(
            r.path,
            r.module_class,
            "matched" if r.path in program.demoted else r.level,
            program.demoted.get(r.path, r.reason),
            r.source,
            r.runs,
            r.given if r.runs else (),
        )
        for r in program.regions.values()
    )
    sites = tuple(site for site in program.plan.sites if site.path not in program.unwatched)
    lost = tuple(
        Miss(site.path, site.layer_class, program.unwatched[site.path], site.source, True, True)
        for site in program.plan.sites
        if site.path in program.unwatched
    )
    program.plan = replace(
        program.plan,
        sites=sites,
        misses=(*program.plan.misses, *lost),
        regions=regions,
        model_class=type(program.host).__qualname__,
        model_digest=model_digest(program.host),
        config=msgspec.json.decode(program.config.to_json()),
        morphc_version=__version__,
    )


def _report(program: Program, records: Sequence[PassRecord], seconds: float) -> Report:
    # A tied parameter counts once, where it is found first.
    own: dict[str, int] = {}
    for name, parameter in program.host.named_parameters():
        owner = name.rpartition(".")[0]
        own[owner] = own.get(owner, 0) + parameter.numel()
    tree = tuple(
        (name, type(module).__name__, own.get(name, 0), "") for name, module in program.host.named_modules()
    )
    return Report(
        plan=program.plan,
        passes=tuple(records),
        verification=(*program.notes, *program.verification),
        warnings=tuple(program.warnings),
        seconds=seconds,
        graphs=readable_graphs(program),
        tree=tree,
        backends=_backends(program),
    )


def _backends(program: Program) -> dict[str, dict[str, Backend]]:
    """Of every site that was made; sites whose dtype nobody has seen are taken for float32."""
    if program.model is None:
        return {}
    sites = store_of(program.model).sites
    dtypes = {site.path: getattr(torch, site.dtype, torch.float32) for site in program.plan.sites}
    return {path: backends_of(site, dtypes.get(path, torch.float32)) for path, site in sites.items()}
