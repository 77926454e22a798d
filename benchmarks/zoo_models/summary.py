"""The zoo's table and JSON document."""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
from collections import Counter
from importlib import metadata
from typing import Any

TARGETS = {"share": 0.99, "compile_median_s": 0.5, "compile_verified_median_s": 1.5, "compile_max_s": 6.0}


def version(package: str) -> str:
    """Installed version, or a dash."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "-"


def numbers(results: list[dict[str, Any]], key: str) -> dict[str, float]:
    """Median and largest of a timing."""
    values = [result[key] for result in results if key in result]
    if not values:
        return {}
    worst = max((result for result in results if key in result), key=lambda result: result[key])
    return {"median": round(statistics.median(values), 4), "max": max(values), "max_host": worst["name"]}


def document(
    results: list[dict[str, Any]], warm_up: float, plain: bool, morphc_version: str
) -> dict[str, Any]:
    """Everything: environment, summary, one record a host."""
    rows = [(result["name"], row) for result in results for row in result.get("candidates", [])]
    counted = [(name, row) for name, row in rows if row["counted"]]
    sited = sum(row["site"] for _, row in counted)
    levels = Counter(row["level"] for _, row in counted if row["site"])
    site_levels: Counter[str] = Counter()
    region_levels: Counter[str] = Counter()
    for result in results:
        site_levels.update(result.get("site_levels", {}))
        region_levels.update(result.get("region_levels", {}))
    summary = {
        "hosts": len(results),
        "passed": sum(result["ok"] for result in results),
        "failed": [result["name"] for result in results if not result["ok"]],
        "families": dict(Counter(result["family"] for result in results)),
        "executed_candidates": len(counted)
        if not plain
        else sum(r.get("candidates_total", 0) for r in results),
        "with_site": sited,
        "site_share": round(sited / len(counted), 5) if counted else None,
        "candidates_by_level": dict(levels),
        "sites_by_level": dict(site_levels),
        "regions_by_level": dict(region_levels),
        "regions_running_as_graph": sum(result.get("regions_running", 0) for result in results),
        "misses": [{"host": name, **row} for name, row in counted if not row["site"]],
        "counted_apart": [{"host": name, **row} for name, row in rows if not row["counted"]],
        "compile_s": numbers(results, "compile_s"),
        "compile_verified_s": numbers(results, "compile_verified_s"),
        "seconds": round(sum(result["seconds"] for result in results), 1),
        "targets": TARGETS,
    }
    environment = {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "threads": 1,
        **{package: version(package) for package in ("torch", "transformers", "peft")},
        "morphc": morphc_version,
        "warm_up_s": warm_up,
    }
    kind = "plain hosts against themselves" if plain else "compiled against plain"
    return {
        "schema_version": 1,
        "kind": kind,
        "environment": environment,
        "summary": summary,
        "hosts": results,
    }


def portable(message: str) -> str:
    """Without the folders of this machine."""
    return re.sub(r"(/[\w.-]+)+/(?=[\w.-]+)", "", message)


def as_json(document: dict[str, Any]) -> str:
    """The document with one line a host; of its layers the number, and those without a site."""
    lines = []
    for result in document["hosts"]:
        rows = result.get("candidates", [])
        counted = [row for row in rows if row["counted"]]
        short = {
            "executed": len(counted),
            "with_site": sum(row["site"] for row in counted),
            "counted_apart": len(rows) - len(counted),
            "misses": [row for row in counted if not row["site"]],
        }
        kept = {key: value for key, value in result.items() if key not in ("candidates", "region_reasons")}
        kept["failures"] = [
            {"check": checks, "message": portable(failure["message"])}
            for checks, failure in merged(result["failures"])
        ]
        lines.append(json.dumps({**kept, "layers": short} if rows else kept))
    head = json.dumps({key: value for key, value in document.items() if key != "hosts"}, indent=1)
    return head.removesuffix("\n}") + ',\n "hosts": [\n  ' + ",\n  ".join(lines) + "\n ]\n}\n"


def table(document: dict[str, Any]) -> str:
    """The document as text."""
    columns = ("params", 8), ("sites", 9), ("levels r/m/a", 12), ("off s", 7), ("on s", 7)
    head = (
        f"{'host':28} {'family':18} " + " ".join(f"{name:>{width}}" for name, width in columns) + "  result"
    )
    lines = [head, "-" * len(head)]
    lines += [row(result) for result in document["hosts"]]
    for result in document["hosts"]:
        for checks, failure in merged(result["failures"]):
            lines.append(f"\n{result['name']} · {checks}\n    {failure['message']}")
            lines += [f"    | {line}" for line in failure["traceback"].splitlines()[-8:]]
    return "\n".join([*lines, "", *closing(document["summary"])])


def merged(failures: list[dict[str, str]]) -> list[tuple[str, dict[str, str]]]:
    """Failures that say the same, once, with the checks they came from."""
    groups: dict[str, list[dict[str, str]]] = {}
    for failure in failures:
        groups.setdefault(re.sub(r"/tmp/\S+", "", failure["message"]), []).append(failure)
    return [("; ".join(failure["check"] for failure in group), group[0]) for group in groups.values()]


def markdown(document: dict[str, Any]) -> str:
    """The failures alone, those of one cause together."""
    summary = document["summary"]
    lines = ["# Zoo: failures", "", *closing(summary)[:2], ""]
    for result in document["hosts"]:
        for checks, failure in merged(result["failures"]):
            lines += [f"## {result['name']} ({result['family']}: {result.get('note', '')})", f"{checks}", ""]
            lines += [f"**{failure['message']}**", ""]
            if failure["traceback"]:
                lines += ["```", *failure["traceback"].splitlines()[-14:], "```", ""]
    return "\n".join([*lines, "## Summary", *[f"- {line}" for line in closing(summary)], ""])


def row(result: dict[str, Any]) -> str:
    """One host."""
    counted = [row for row in result.get("candidates", []) if row["counted"]]
    sites = (
        f"{sum(row['site'] for row in counted)}/{len(counted)}"
        if counted
        else f"-/{result.get('candidates_total', '?')}"
    )
    levels = result.get("site_levels", {})
    shown = "/".join(str(levels.get(level, 0)) for level in ("rewritten", "matched", "as_written"))
    off, on = (seconds(result.get(key)) for key in ("compile_s", "compile_verified_s"))
    verdict = "ok" if result["ok"] else "FAILED: " + ", ".join(f["check"] for f in result["failures"])[:80]
    return (
        f"{result['name']:28} {result['family']:18} {result.get('parameters', 0):>8} {sites:>9} {shown:>12} "
        f"{off:>7} {on:>7}  {verdict}"
    )


def seconds(value: float | None) -> str:
    """Seconds, or a dash."""
    return "-" if value is None else f"{value:.3f}"


def closing(summary: dict[str, Any]) -> list[str]:
    """The lines under the table."""
    lines = [
        f"{summary['passed']} of {summary['hosts']} hosts pass; {summary['executed_candidates']} layers ran"
    ]
    if summary["failed"]:
        lines.append("failed: " + ", ".join(summary["failed"]))
    if summary["site_share"] is None:
        return lines
    lines.append(
        f"sites: {summary['with_site']} of {summary['executed_candidates']} executed candidate layers = "
        f"{100 * summary['site_share']:.2f} % (target {100 * TARGETS['share']:.0f} %)"
    )
    for what in ("sites_by_level", "regions_by_level"):
        total = sum(summary[what].values()) or 1
        parts = [f"{level} {count} ({100 * count / total:.1f} %)" for level, count in summary[what].items()]
        lines.append(f"{what.replace('_', ' ')}: " + ", ".join(parts))
    for key, bound in (
        ("compile_s", "compile_median_s"),
        ("compile_verified_s", "compile_verified_median_s"),
    ):
        times = summary[key]
        if times:
            lines.append(
                f"{key}: median {times['median']:.3f} (target {TARGETS[bound]}), max {times['max']:.3f} "
                f"by {times['max_host']} (target {TARGETS['compile_max_s']})"
            )
    lines += [
        f"no site: {miss['host']} {miss['path']} ({miss['kind']}): {miss['reason']}"
        for miss in summary["misses"]
    ]
    for apart in summary["counted_apart"]:
        got = f"site ({apart['level']})" if apart["site"] else apart["reason"]
        lines.append(f"counted apart: {apart['host']} {apart['path']} ({apart['kind']}): {got}")
    return lines
