"""The report as text: one table per question that it answers, the same in a terminal and in `str()`."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sized
from typing import TypeVar

from rich.console import Console, JustifyMethod, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from morphc.passes.plan import Miss, RegionNote, Site
from morphc.reporting import (
    LEVELS,
    Report,
    cost_of,
    label_of,
    numberless,
    percent,
    shorten,
    si,
    us_text,
)

T = TypeVar("T")
FEW = 4
"""Sites that are named one by one."""

LEVEL_STYLE = {"rewritten": "green", "matched": "cyan", "as_written": "yellow"}


def as_text(report: Report) -> str:
    """The whole report without colours, as wide as its longest line."""
    console = Console(file=io.StringIO(), width=1000, color_system=None, legacy_windows=False)
    print_report(report, console)
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def print_report(report: Report, console: Console) -> None:
    """Print the report in the colours and the width of `console`."""
    for part in parts(report):
        if isinstance(part, Table):
            _fit(part, console)
        console.print(part, highlight=False, soft_wrap=not isinstance(part, Table))


def _fit(table: Table, console: Console) -> None:
    """Leave out what can best be missed until the table fits; the page and the JSON have it all."""
    unbounded = console.options.update(max_width=10_000)
    for header in ("source", "slots", "features", "layer", "module", "backend"):
        if Measurement.get(console, unbounded, table).maximum <= console.width:
            return
        table.columns = [column for column in table.columns if column.header != header]


def parts(report: Report) -> Iterator[RenderableType]:
    """Headline, warnings, sites, what was not chosen, what was not rewritten, passes, verification."""
    yield headline(report)
    yield from (Text(f"warning: {shorten(line)}", "yellow") for line in report.warnings)
    if report.plan.sites:
        yield ""
        yield sites_table(report)
        yield from notes(report)
        yield from fallbacks(report)
        yield ""
        yield totals_line(report)
    else:
        yield Text("no layer got a site", "yellow")
    if report.plan.misses:
        yield ""
        yield from misses_tables(report)
    if any(region.level != "rewritten" for region in report.plan.regions):
        yield ""
        yield regions_table(report.plan.regions)
    if report.passes:
        yield ""
        yield passes_table(report)
    if report.verification:
        yield ""
        yield from (Text(line) for line in report.verification)


def headline(report: Report) -> Text:
    totals = report.totals
    facts = [
        f"{si(totals.parameters)} parameters",
        f"{totals.sites:,} sites",
        f"{totals.seeds:,} seeds",
        f"{totals.slots:,} slots",
    ]
    if report.seconds:
        facts.append(f"{report.seconds:.2f} s")
    return Text.assemble((report.plan.model_class or "model", "bold"), "   ", "   ".join(facts))


def sites_table(report: Report) -> Table:
    """Equal layers of numbered blocks share a row."""
    table = _table(
        "site", "", "layer", ">features", ">seeds", ">slots", "captured", ">cost", ">of layer", "source"
    )
    if report.backends:
        table.add_column("backend", no_wrap=True)
    if report.measured:
        table.add_column("measured", justify="right", no_wrap=True)
    key = lambda site: (_site_key(site), tuple(report.backends.get(site.path, {}).values()))  # noqa: E731
    for sites in _grouped(report.plan.sites, key):
        site, cost = sites[0], cost_of(sites[0])
        row: list[str | Text] = [
            label_of([s.path for s in sites]),
            _times(sites),
            site.layer_class or site.layer_kind,
            str(site.features),
            str(site.seeds),
            str(site.slots),
            Text(site.captured_as.replace("_", " "), LEVEL_STYLE[site.captured_as]),
            us_text(cost.us) if cost else "?",
            percent(cost.share) if cost else "?",
            shorten(site.source),
        ]
        if report.backends:
            names = dict.fromkeys(name for name, _ in report.backends.get(site.path, {}).values())
            row.append(" + ".join(names))
        if report.measured:
            times = [report.measured[s.path] for s in sites if s.path in report.measured]
            row.append(us_text(sum(times) / len(times)) if times else "")
        table.add_row(*row)
    return table


def notes(report: Report) -> Iterator[Text]:
    """What there is to say about single sites."""
    noted = [site for site in report.plan.sites if site.note]
    for sites in _grouped(noted, lambda site: (numberless(site.path), site.note)):
        yield Text(f"{label_of([site.path for site in sites])}: {shorten(sites[0].note)}", "dim")


def fallbacks(report: Report) -> Iterator[Text]:
    """Which sites' seeds torch computes, and why: one line a reason."""
    found: dict[str, dict[str, list[Site]]] = defaultdict(lambda: defaultdict(list))
    for site in report.plan.sites:
        for blueprint, (backend, reason) in report.backends.get(site.path, {}).items():
            if backend == "torch":
                found[reason][blueprint].append(site)
    for reason, by_blueprint in found.items():
        where = [f"{name} of {_labels(sites, report)}" for name, sites in by_blueprint.items()]
        yield Text(f"on torch: {'; '.join(where)}: {shorten(reason)}", "dim")


def _labels(sites: list[Site], report: Report) -> str:
    """The paths of sites, short."""
    if len(sites) == len(report.plan.sites):
        return "every site" if len(sites) > 1 else label_of([sites[0].path])
    if len(sites) <= FEW:
        return ", ".join(label_of([site.path]) for site in sites)
    return ", ".join(
        label_of([site.path for site in group]) for group in _grouped(sites, lambda s: numberless(s.path))
    )


def totals_line(report: Report) -> Text:
    """Predicted cost of all sites, and how many forwards were captured at which level."""
    totals = report.totals
    line = Text()
    if totals.us is not None:
        line.append(f"predicted cost {us_text(totals.us)} a training step")
        line.append(f", {percent(totals.share)} of the watched layers" if totals.share is not None else "")
        line.append("\n")
    line.append("forwards captured: ")
    for position, level in enumerate(LEVELS):
        line.append(", " if position else "")
        line.append(f"{totals.levels[level]} {level.replace('_', ' ')}", LEVEL_STYLE[level])
    return line


def misses_tables(report: Report) -> Iterator[RenderableType]:
    """Why not the rest: layers that could have had a site first; modules without weights are only counted."""
    weightless = {row[0] for row in report.tree if not row[2]}
    misses = report.plan.misses
    with_weights = [miss for miss in misses if miss.candidate or miss.path not in weightless]
    if with_weights:
        yield misses_table(with_weights)
    if rest := len(misses) - len(with_weights):
        also = "and " if with_weights else ""
        yield Text(f"{also}{rest} modules without weights of their own got no site", "dim")


def misses_table(misses: Iterable[Miss]) -> Table:
    """The layers without a site, those that could have had one first."""
    table = _table("not chosen", "", "layer", "why not", "source")
    ordered = sorted(misses, key=lambda miss: (not miss.candidate, not miss.executed))
    groups = _grouped(ordered, lambda m: (m.reason, m.layer_class, m.candidate, numberless(m.path), m.source))
    for group in groups:
        label = label_of([miss.path for miss in group])
        style = "yellow" if group[0].candidate else ""
        reason = Text(shorten(group[0].reason), style)
        table.add_row(label, _times(group), group[0].layer_class, reason, shorten(group[0].source))
    return table


def regions_table(regions: Iterable[RegionNote]) -> Table:
    """Forwards that were captured below the best level, and why."""
    table = _table("not rewritten", "", "module", "captured", "why", "source")
    below = [region for region in regions if region.level != "rewritten"]
    key = lambda r: (r.reason, r.module_class, r.level, numberless(r.path), r.source)  # noqa: E731
    for group in _grouped(below, key):
        label = label_of([region.path for region in group])
        region = group[0]
        level = Text(region.level.replace("_", " "), LEVEL_STYLE[region.level])
        table.add_row(
            label, _times(group), region.module_class, level, shorten(region.reason), shorten(region.source)
        )
    return table


def passes_table(report: Report) -> Table:
    table = _table("pass", ">ms", "modified", ">created", ">erased")
    for record in report.passes:
        modified = Text("yes" if record.modified else "no", "" if record.modified else "dim")
        table.add_row(
            record.name, f"{record.seconds * 1e3:.1f}", modified, str(record.created), str(record.erased)
        )
    return table


def _site_key(site: Site) -> Hashable:
    return (
        numberless(site.path),
        site.layer_class,
        site.features,
        site.seeds,
        site.slots,
        site.captured_as,
        site.source,
        site.epilogue,
        tuple(sorted(site.predicted.items())),
    )


def _grouped(items: Iterable[T], key: Callable[[T], Hashable]) -> list[list[T]]:
    """Items with equal keys together, in the order of each group's first."""
    groups: dict[Hashable, list[T]] = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return list(groups.values())


def _times(group: Sized) -> str:
    return f"×{len(group)}" if len(group) > 1 else ""


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        right = column.startswith(">")  # numbers
        justify: JustifyMethod = "right" if right else "left"
        header = column.lstrip(">")
        table.add_column(header, justify=justify, no_wrap=right, overflow="fold", min_width=len(header))
    return table
