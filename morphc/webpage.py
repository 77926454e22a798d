"""`report.html`: the report as one page that needs no network, no server and no other file.

Python prepares the data (one entry per module), the template holds the layout, and a script in it builds the
tree from the data. Text reaches the page as JSON and is set as text, never as markup.
"""

from __future__ import annotations

import importlib.resources
import math
import re
from typing import Any

import jinja2
import markupsafe
import msgspec

from morphc.passes.plan import Miss, RegionNote, Site
from morphc.reporting import ModuleRow, Report, cost_of, percent, shorten, si, us_text

TEMPLATE = "report.html.jinja"
# A diff or a graph of a large model can be megabytes; the page stays one that a browser opens at once.
LONGEST_TEXT = 40_000
ALL_TEXTS = 4_000_000


def render(report: Report) -> str:
    """The page as a string of HTML."""
    source = importlib.resources.files("morphc.templates").joinpath(TEMPLATE).read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    name = report.plan.model_class.rpartition(".")[2] or "model"
    return environment.from_string(
        source
    ).render(
        title=name,
        heading=re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "\u200b", name),  # where a narrow screen may break it
        facts=facts(report),
        verification=(*(f"warning: {line}" for line in report.warnings), *report.verification),
        data=_embeddable(page_data(report)),
        text=str(report),
        version=report.plan.morphc_version,
        digest=report.plan.digest[:12],
    )


def facts(report: Report) -> list[tuple[str, str, str]]:
    """The headline: (number, unit, label)."""
    totals = report.totals
    number, _, unit = si(totals.parameters).partition(" ")
    found = [
        (number, unit, "parameters"),
        (f"{totals.sites:,}", "", "sites"),
        (f"{totals.seeds:,}", "", "seeds"),
    ]
    if totals.us is not None:
        number, _, unit = us_text(totals.us).partition(" ")
        found.append((number, unit, "predicted, a training step"))
    if totals.share is not None:
        found.append((percent(totals.share).removesuffix("%"), "%", "of the watched layers"))
    if report.seconds:
        found.append((f"{report.seconds:.2f}", "s", "to compile"))
    return found


def page_data(report: Report) -> dict[str, Any]:
    """What the page's script gets: `nodes` in tree order, `passes`, and the longest cost for the bars."""
    texts = _Texts()
    nodes = _nodes(report)
    sites = {site.path: site for site in report.plan.sites}
    misses = {miss.path: miss for miss in report.plan.misses}
    regions = {region.path: region for region in report.plan.regions}
    for path, node in nodes.items():
        if path in sites:
            node["site"] = _site(sites[path], report.measured.get(path))
        if path in misses:
            node["miss"] = _miss(misses[path])
        if path in regions:
            node["region"] = _region(regions[path])
        if path in report.graphs:
            node["graph"] = texts.add(report.graphs[path])
    return {
        "nodes": list(nodes.values()),
        "passes": [
            {
                "name": record.name,
                "ms": record.seconds * 1e3,
                "modified": record.modified,
                "created": record.created,
                "erased": record.erased,
                "diff": texts.add(record.diff) if record.diff else None,
            }
            for record in report.passes
        ],
        "texts": texts.all,
    }


def _nodes(report: Report) -> dict[str, dict[str, Any]]:
    """A node per module, and one for each site or miss that is a parameter's and no module's."""
    rows = [ModuleRow(*row) for row in report.tree]
    known = {row.path for row in rows}
    functional = [
        ModuleRow(s.path, s.layer_class or "functional", 0, s.layer_kind) for s in report.plan.sites
    ]
    functional += [ModuleRow(m.path, m.layer_class, 0) for m in report.plan.misses]
    functional += [ModuleRow(r.path, r.module_class, 0) for r in report.plan.regions]
    for row in functional:
        if row.path not in known:
            known.add(row.path)
            rows.append(row)
    if "" not in known:
        rows.insert(0, ModuleRow("", report.plan.model_class.rpartition(".")[2], 0))
        known.add("")
    parents = {row.path: _parent(row.path, known) for row in rows}
    children: dict[str, list[ModuleRow]] = {}
    for row in rows:
        if row.path:
            children.setdefault(parents[row.path], []).append(row)
    ordered: dict[str, dict[str, Any]] = {}
    stack = [(row, -1) for row in rows if row.path == ""]
    while stack:
        (path, module_class, parameters, kind), parent = stack.pop()
        name = path[len(parents[path]) :].lstrip(".") if path else ""
        index = len(ordered)
        ordered[path] = {"path": path, "name": name, "cls": module_class, "up": parent}
        if parameters:
            ordered[path]["params"] = parameters
        if kind:
            ordered[path]["kind"] = kind
        stack.extend((row, index) for row in reversed(children.get(path, [])))
    return ordered


def _parent(path: str, known: set[str]) -> str:
    """The longest known prefix; a module's name may itself hold no dot, a missing parent is skipped."""
    prefix = path
    while prefix:
        prefix = prefix.rpartition(".")[0]
        if prefix in known:
            return prefix
    return ""


def _site(site: Site, measured: float | None) -> dict[str, Any]:
    chunk = math.ceil(site.features / site.seeds) if site.seeds else 0
    data: dict[str, Any] = {
        "level": site.captured_as,
        "why": shorten(site.why_not_better),
        "source": shorten(site.source),
        "layer": site.layer_kind,
        "features": site.features,
        "axis": site.feature_axis,
        "seeds": site.seeds,
        "slots": site.slots,
        "chunk": chunk,
        "dtype": site.dtype,
    }
    optional = {
        "epilogue": site.epilogue,
        "parameter": site.parameter,
        "owner": site.owner,
        "note": shorten(site.note),
        "calls": site.calls if site.calls != 1 else 0,
        "rows": site.rows,
        "quantized": site.quantized,
        "shared": site.shared_weight,
        "measured": measured,
    }
    data |= {key: value for key, value in optional.items() if value}
    if site.block is not None:
        data["block"] = {
            "inputs": list(site.block.inputs),
            "output": site.block.output,
            "activation": site.block.activation,
            "hidden": site.block.hidden,
            "obstacle": site.block.obstacle,
        }
    if cost := cost_of(site):
        data["us"] = cost.us
        data["layer_us"] = cost.layer_us
    return data


def _miss(miss: Miss) -> dict[str, Any]:
    return {
        "reason": shorten(miss.reason),
        "source": shorten(miss.source),
        "executed": miss.executed,
        "candidate": miss.candidate,
    }


def _region(region: RegionNote) -> dict[str, Any]:
    return {
        "level": region.level,
        "reason": shorten(region.reason),
        "source": shorten(region.source),
        "runs": region.runs,
    }


class _Texts:
    """Long texts, each kept once: the graphs of twelve equal blocks are one."""

    def __init__(self) -> None:
        self.all: list[str] = []
        self._index: dict[str, int] = {}
        self._size = 0

    def add(self, text: str) -> int | None:
        if text in self._index:
            return self._index[text]
        shown = text
        if len(text) > LONGEST_TEXT:
            shown = (
                text[:LONGEST_TEXT] + f"\n... {len(text) - LONGEST_TEXT:,} more characters, not shown here\n"
            )
        if self._size + len(shown) > ALL_TEXTS:
            return None
        self._size += len(shown)
        self._index[text] = len(self.all)
        self.all.append(shown)
        return self._index[text]


def _embeddable(data: dict[str, Any]) -> Any:
    """JSON that is safe inside <script>: no character of it can end the element or start a comment."""
    text = msgspec.json.encode(data).decode()
    escaped = text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    return markupsafe.Markup(escaped)
