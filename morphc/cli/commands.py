"""What the commands do. Importing torch comes after every check that needs none."""

from __future__ import annotations

import contextlib
import inspect as introspection
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TextIO

import msgspec

from morphc.cli.inputs import make_inputs, parse_input
from morphc.cli.options import make_config
from morphc.cli.targets import check_targets, check_tune
from morphc.errors import ConfigError, ExampleInputError, HostForwardError, PlanError, UnknownNameError
from morphc.output import OutputFolder, write_graphs
from morphc.passes.plan import Plan

if TYPE_CHECKING:
    from torch import nn

    from morphc.loading import LoadedModel
    from morphc.reporting import Report
    from morphc.tuneup import Tuning


class Job(NamedTuple):
    """The arguments that several commands share, as they were given."""

    target: str
    inputs: tuple[str, ...]
    options: dict[str, Any]
    passes: str | None = None
    plan: Path | None = None
    output: Path | None = None
    json: bool = False


class Host(NamedTuple):
    """A host and what to call it with."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def compile_file(
    job: Job,
    print_after: tuple[str, ...],
    verify: bool | Literal["auto"],
    targets: tuple[str, ...] = (),
    require_cached: bool = False,
    tune: str = "off",
) -> int:
    """`morphc compile`."""
    check_targets(targets)
    check_tune(tune, targets)
    if tune != "off":
        from morphc.cli.kernels import check_gpu

        check_gpu()
    plan = _read_plan(job.plan) if job.plan else None
    # A plan brings its own config; options beside it are checked against that.
    config = None if plan and not job.options else make_config(job.options, plan.config if plan else None)
    result = sys.stdout

    def show(name: str, text: str) -> None:
        print(f"# after {name}\n{text.rstrip()}\n", file=sys.stderr if job.json else result)

    with _output(job.output) as folder:
        with _loaded(job) as host:
            from morphc.cli.progress import ProgressBar
            from morphc.compiler import compile_program
            from morphc.passes.manager import known_passes

            # Only now, since the user's file may have registered passes of its own.
            for name in print_after:
                if name not in (known := [*known_passes(), "all"]):
                    raise UnknownNameError("pass", name, known)
            with ProgressBar() as bar:
                program = compile_program(
                    host.model,
                    host.args,
                    host.kwargs,
                    config,
                    plan,
                    verify,
                    share=True,
                    passes=job.passes,
                    print_after=print_after,
                    on_print=show,
                    progress=bar,
                )
            from morphc.cli.kernels import for_targets, tune_here

            tuned = tune_here(program, tune) if tune != "off" else None
            with ProgressBar() as bar:
                kernels = for_targets(program, targets, require_cached, bar)
        _publish(program.report, folder)
        if folder is not None:
            kernels.write(folder)
    _present(program.report, job.json, result, folder, kernels.json(), tuned)
    return kernels.present(result if not job.json else sys.stderr)


def inspect_file(job: Job) -> int:
    """`morphc inspect`."""
    config = make_config(job.options)
    with _output(job.output) as folder:
        with _loaded(job) as host:
            from morphc.compiler import inspect

            report = inspect(host.model, host.args, host.kwargs, config)
        _publish(report, folder)
    _present(report, job.json, sys.stdout, folder)
    return 0


def bisect_file(job: Job) -> int:
    """`morphc bisect`."""
    config = make_config(job.options)
    with _loaded(job) as host:
        from morphc.compiler import bisect

        found = bisect(host.model, host.args, host.kwargs, config, job.passes)
    _warn(found.warnings)
    if job.json:
        print(msgspec.json.encode({"culprit": found.culprit, "lines": list(found.lines)}).decode())
    else:
        print("\n".join(found.lines))
    return 1 if found.culprit else 0


@contextlib.contextmanager
def _loaded(job: Job) -> Iterator[Host]:
    """The host with its example inputs. The user's code runs inside: its prints go to stderr."""
    specs = [parse_input(text) for text in job.inputs]
    from morphc.loading import load_model, user_code

    loaded = load_model(job.target)
    args, kwargs = make_inputs(specs, loaded.host) if specs else (loaded.args, loaded.kwargs)
    if args is None and kwargs is None:
        _refuse_missing(loaded)
    # torch logs every shape error that it meets while tracing, with a traceback, before raising it too.
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)
    try:
        with user_code(loaded.path):
            yield Host(loaded.host, args or (), kwargs or {})
    except HostForwardError as error:
        # With inputs out of the file it is the user's code that doesn't run. Otherwise the inputs are an
        # argument of ours, and other ones may do.
        if job.inputs:
            given = " ".join(f"--input {text}" for text in job.inputs)
            raise ExampleInputError(f"{error} (called with {given})") from error
        if args is None and kwargs is None:
            raise ExampleInputError(f"{error} (called without inputs; give --input)") from error
        if stray := _stray_device(loaded.host, args, kwargs):
            raise ExampleInputError(f"{stray} in {loaded.path}: {error}") from error
        raise


def _stray_device(host: nn.Module, *inputs: Any) -> str:
    """What to say when an input lies where no tensor of the host does, else ""."""
    import torch
    from torch.utils._pytree import tree_leaves

    homes = {str(tensor.device) for tensor in (*host.parameters(), *host.buffers())}
    strays = {str(leaf.device) for leaf in tree_leaves(inputs) if isinstance(leaf, torch.Tensor)} - homes
    if not homes or not strays:
        return ""
    return f"example inputs are on {', '.join(sorted(strays))} and the model is on {', '.join(sorted(homes))}"


def _refuse_missing(loaded: LoadedModel) -> None:
    """A forward that needs arguments was given none: say which."""
    try:
        signature = introspection.signature(loaded.host.forward)
    except (TypeError, ValueError):  # no signature to go by: the call itself will tell
        return
    star = (introspection.Parameter.VAR_POSITIONAL, introspection.Parameter.VAR_KEYWORD)
    needed = [p.name for p in signature.parameters.values() if p.default is p.empty and p.kind not in star]
    if needed:
        raise ExampleInputError(
            f"no example inputs: forward of {type(loaded.host).__name__} needs {', '.join(needed)}; give "
            f"--input 32x784:f32 (once for each), or write `example_inputs = (...)` in {loaded.path}"
        )


def _read_plan(path: Path) -> Plan:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"--plan {path}: can't be read: {error.strerror or error}") from error
    try:
        return Plan.from_json(data)
    except PlanError as error:
        raise PlanError(f"--plan {path}: {error}") from error


@contextlib.contextmanager
def _output(target: Path | None) -> Iterator[OutputFolder | None]:
    if target is None:
        yield None
        return
    with OutputFolder(target) as folder:
        yield folder


def _publish(report: Report, folder: OutputFolder | None) -> None:
    if folder is None:
        return
    from morphc.webpage import render

    folder.write("plan.json", report.plan.to_json())
    folder.write("report.json", report.to_json())
    folder.write("report.html", render(report))
    write_graphs(folder, report.graphs)


def _warn(lines: Sequence[str]) -> None:
    for line in lines:
        print(f"morphc: warning: {line}", file=sys.stderr)


def _present(
    report: Report,
    json: bool,
    result: TextIO,
    folder: OutputFolder | None,
    kernels: list[dict[str, Any]] | None = None,
    tuned: Tuning | None = None,
) -> None:
    _warn(report.warnings)
    if json and (kernels or tuned):
        told = msgspec.json.decode(report.to_json())
        told |= {"kernels": kernels} if kernels else {}
        told |= {"tuning": msgspec.to_builtins(tuned)} if tuned is not None else {}
        print(msgspec.json.encode(told).decode(), file=result)
    elif json:
        print(report.to_json().decode(), file=result)
    elif result.isatty():
        from rich.console import Console

        from morphc.reporttable import print_report

        print_report(report, Console(file=result))
    else:
        print(report, file=result)
    if tuned is not None and not json:
        print(f"\n{tuned}", file=result)
    if folder is not None:
        print(f"wrote {folder.target} (open {folder.target / 'report.html'})", file=sys.stderr)
