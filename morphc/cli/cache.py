"""`morphc cache`: the seven verbs. Nothing here imports torch, but for why-miss, which generates code."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from morphc.caching import Cache
from morphc.cli import cachetext
from morphc.errors import CacheError
from morphc.kernels.cache import inventory
from morphc.kernels.cache.prune import Pruned, told_size

app = typer.Typer(
    name="cache",
    no_args_is_help=True,
    help="Look into the kernels that are kept, check them, make room, carry them to another machine.",
    epilog="The cache is in MORPHC_CACHE_DIR, or the platform's cache folder; morphc doctor says where.",
    context_settings={"help_option_names": ["-h", "--help"]},
)
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Key = Annotated[
    str,
    typer.Argument(
        metavar="KEY", help="A key, a kernel's name, or the beginning of either.", show_default=False
    ),
]


def _print_json(value: Any) -> None:
    print(msgspec.json.encode(value).decode())


@app.command()
def ls(json: Json = False) -> int:
    """List the kernels: layers, architectures, tuned times, resources, size, last use."""
    cache = Cache()
    found = cache.entries()
    if json:
        _print_json(found)
    else:
        print("\n".join(cachetext.listing(found, str(cache.root))))
    return 0


@app.command()
def show(
    key: Key,
    source: Annotated[bool, typer.Option("--source/--no-source", help="Show the kernel's file too.")] = True,
    json: Json = False,
) -> int:
    """Show one kernel: spec, compiled forms, the whole tuning table, source."""
    found = Cache().show(key)
    if json:
        _print_json(found)
        return 0
    print("\n".join(cachetext.shown(found)))
    if source:
        print()
        cachetext.print_source(found.source, sys.stdout)
    return 0


@app.command("why-miss")
def why_miss(
    spec: Annotated[
        str,
        typer.Argument(
            metavar="SPEC|NAME",
            help="A kernel's name or key, or a spec as JSON.",
            show_default=False,
        ),
    ],
    json: Json = False,
) -> int:
    """Say why a kernel isn't there: the nearest one, and the fields that differ (exit status 1 when it is missing)."""
    found = Cache().why_miss(spec)
    if json:
        _print_json(found)
    else:
        print("\n".join(cachetext.why(found)))
    return 0 if found.found else 1


@app.command()
def verify(json: Json = False) -> int:
    """Check every checksum; exit status 1 with the list of what is damaged. Changes nothing."""
    cache = Cache()
    count, problems = inventory.verify(cache.root)
    if json:
        _print_json({"checked": count, "problems": problems})
    else:
        for problem in problems:
            print(f"{problem.path}: {problem.problem}")
        if problems:
            print(f"{len(problems)} of {count} are damaged: they are made again when needed, or pruned")
        else:
            print(f"{count} checked, all whole")
    return 1 if problems else 0


@app.command()
def prune(
    older_than: Annotated[
        str | None, typer.Option(metavar="AGE", help="What was last used longer ago: 30d, 12h, 2w.")
    ] = None,
    larger_than: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="What is beyond that much in all, used longest ago first: 500M, 2G."
        ),
    ] = None,
    arch: Annotated[
        str | None, typer.Option(metavar="ARCH", help="What is compiled for it: cuda:80.")
    ] = None,
    version: Annotated[
        str | None, typer.Option(metavar="VERSION", help="What that version of morphc or Triton made.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Don't ask.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would go.")] = False,
    json: Json = False,
) -> int:
    """Remove kernels, and what is damaged or in quarantine. Shows what goes and asks; without options keeps 2 GiB.

    What a living process uses stays.
    """
    cache = Cache()
    victims = cache.victims(older_than=older_than, larger_than=larger_than, arch=arch, version=version)
    shown = sys.stderr if json else sys.stdout
    for line in cachetext.victims(victims):
        print(line, file=shown)
    if dry_run or not victims:
        done = Pruned((), ())
    elif yes or _agreed(len(victims)):
        done = cache.remove(victims)
        print(cachetext.removed(done), file=shown)
    else:
        print("nothing was removed", file=shown)
        done = Pruned((), ())
    if json:
        _print_json({"chosen": victims, "removed": done.removed, "stayed": done.stayed})
    return 0


def _agreed(count: int) -> bool:
    if not sys.stdin.isatty():
        raise CacheError(
            f"prune would remove {count} things and there is nobody to ask: give --yes or --dry-run"
        )
    return typer.confirm(f"Remove {'it' if count == 1 else f'these {count}'}?", err=True)


@app.command()
def export(
    path: Annotated[
        Path, typer.Argument(metavar="BUNDLE", help="The file to write: x.tar.gz.", show_default=False)
    ],
    keys: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY]...", help="Kernels to take along; all without.", show_default=False),
    ] = None,
    arch: Annotated[
        str | None, typer.Option(metavar="ARCH", help="Only what is compiled for it: cuda:90.")
    ] = None,
    json: Json = False,
) -> int:
    """Write kernels with their compiled forms and tuning tables into one file."""
    index = Cache().export(path, keys or (), arch)
    if json:
        _print_json(index)
    else:
        print(f"wrote {path}: {cachetext.counted(index.files)}, {told_size(path.stat().st_size)}")
    return 0


@app.command("import")
def import_(
    path: Annotated[
        Path, typer.Argument(metavar="BUNDLE", help="A file that export wrote.", show_default=False)
    ],
    json: Json = False,
) -> int:
    """Take over a bundle. Each entry is checked first; one that isn't whole, and nothing is imported."""
    done = Cache().import_(path)
    if json:
        _print_json(done)
    else:
        known = f", {done.known} were here" if done.known else ""
        tuned = f", {done.tables} tuning tables" if done.tables else ""
        print(f"{done.entries} kernels: {done.added} compiled forms are new{known}{tuned}")
    return 0
