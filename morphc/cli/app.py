"""The commands: what they take, and their help. What they do is in `morphc.cli.commands`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from morphc.cli import cache
from morphc.cli.options import with_config
from morphc.version import __version__

app = typer.Typer(
    name="morphc",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Compile a PyTorch model into one that can grow while it trains.",
    epilog="Exit status: 0 done, 1 the model's code raised or verification failed, "
    "2 arguments, files or configuration, 130 Ctrl-C.",
)

Target = Annotated[
    str,
    typer.Argument(
        metavar="MODEL.PY[:ATTR]",
        help="A Python file, which is executed, and the name in it of a Module, a Module class or a "
        "function that makes one. ATTR can be left out when there is only one.",
        show_default=False,
    ),
]
Inputs = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        "-i",
        metavar="SHAPE",
        help="An example input such as 32x784:f32, 2x16:i64<1000 or mask=2x16:bool (repeatable, in the "
        "order of forward's arguments). Without any, example_inputs and example_kwargs of the file are used.",
    ),
]
Passes = Annotated[
    str | None,
    typer.Option(
        metavar="LIST",
        help="The passes to run instead of the default ones, with options: 'capture,plan-chunks{seeds=64}'.",
    ),
]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        metavar="FOLDER",
        help="Write plan.json, report.json, report.html and the graphs as Python here (and with --target "
        "kernels.tar.gz), all or nothing. "
        "A previous output is replaced.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        typer.echo(f"morphc {__version__}")


@app.command("compile", no_args_is_help=True)
@with_config
def compile_(
    target: Target,
    options: dict[str, Any],
    inputs: Inputs = None,
    passes: Passes = None,
    print_after: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PASS",
            help="Print the graphs after this pass, or after 'all' (repeatable); with --json to stderr.",
        ),
    ] = None,
    verify: Annotated[
        bool | None,
        typer.Option(
            "--verify/--no-verify",
            help="Compare outputs and gradients with the host's. By default on, but for a model on meta "
            "or above 1 GB.",
        ),
    ] = None,
    plan: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Follow this plan instead of searching.")
    ] = None,
    targets: Annotated[
        list[str] | None,
        typer.Option(
            "--target",
            metavar="ARCH",
            help="Compile the model's kernels for cuda:80, cuda:90, cuda:100 or hip:gfx942 too, without a GPU "
            "(repeatable); with -o a bundle of them is written, for morphc cache import.",
        ),
    ] = None,
    require_cached: Annotated[
        bool,
        typer.Option(
            "--require-cached",
            help="Compile no kernel: exit status 1 and why, where one is not in the cache for --target, or for "
            "this machine's GPU.",
        ),
    ] = False,
    tune: Annotated[
        str,
        typer.Option(
            metavar="off|quick|full",
            help="Time candidates of every kernel on this machine's GPU and keep the answers in the cache: the eight "
            "best guesses of each, or all of them. What is known is not timed again; Ctrl-C keeps what was found.",
        ),
    ] = "off",
    output: Output = None,
    json: Json = False,
) -> int:
    """Compile the model in a file and report on every layer of it."""
    from morphc.cli import commands

    return commands.compile_file(
        commands.Job(target, tuple(inputs or ()), options, passes, plan, output, json),
        targets=tuple(dict.fromkeys(targets or ())),
        require_cached=require_cached,
        tune=tune,
        print_after=tuple(print_after or ()),
        verify="auto" if verify is None else verify,
    )


@app.command(no_args_is_help=True)
@with_config
def inspect(
    target: Target,
    options: dict[str, Any],
    inputs: Inputs = None,
    output: Output = None,
    json: Json = False,
) -> int:
    """Show what would be chosen, and why not the rest. Installs nothing; works on meta."""
    from morphc.cli import commands

    return commands.inspect_file(commands.Job(target, tuple(inputs or ()), options, output=output, json=json))


@app.command(no_args_is_help=True)
@with_config
def bisect(
    target: Target,
    options: dict[str, Any],
    inputs: Inputs = None,
    passes: Passes = None,
    json: Json = False,
) -> int:
    """Find the first pass after which the model differs from its host (exit status 1 when there is one)."""
    from morphc.cli import commands

    return commands.bisect_file(commands.Job(target, tuple(inputs or ()), options, passes, json=json))


app.add_typer(cache.app)


@app.command()
def doctor(json: Json = False) -> int:
    """Show what morphc finds on this machine and what it will use."""
    from morphc.cli import doctor as examination

    return examination.run(json)
