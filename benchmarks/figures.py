"""The kernels' benchmark as data: shapes, goals, records, and how they are printed.

A record is one figure of one job:

    {"case", "dtype", "part", "what", "us", "low", "high", "rounds", "over": {...}, "moved", "share", "goal",
     "ok", "failed"}

us is a median, low and high its middle half. over: the figure as a multiple of the same job's `read` and
`copy`. moved: bytes that the variant has to move through the device's memory in whole sectors, share: what it
reaches of the bandwidth that `read` (for telemetry) or `copy` (for the rest) reached beside it. goal: the
bound, `of` a record of the same job or of nothing (then in us).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

Record = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One shape: `rows` x `features` in `seeds` chunks, rank `rank`."""

    name: str
    rows: int
    features: int
    seeds: int
    rank: int = 16

    @property
    def chunk(self) -> int:
        """Width of the widest chunk."""
        return -(-self.features // self.seeds)

    @property
    def title(self) -> str:
        """`4096x4096/64`, with the rank where it is not 16."""
        rank = "" if self.rank == 16 else f" R{self.rank}"
        return f"{self.rows}x{self.features}/{self.seeds}{rank}"


class Goal(NamedTuple):
    """At most `most` times the figure `of` (or us, where `of` is empty); `min:NAME` at most 1/most of it."""

    of: str
    most: float


CASES = {
    case.name: case
    for case in (
        Case("c64", 4096, 4096, 64),
        Case("c4", 4096, 4096, 1024),
        Case("c16", 16384, 4096, 256),
        Case("c2", 8192, 8192, 4096),
        Case("s1k", 128, 2048, 1024),
        Case("lat", 32, 512, 128),
        Case("c256", 4096, 4096, 16),
        Case("c1", 4096, 4096, 4096),
        Case("uneven", 4096, 4096, 300),
        Case("r8", 4096, 4096, 1024, 8),
        Case("r32", 4096, 4096, 1024, 32),
    )
}
TINY = {
    case.name: case
    for case in (
        Case("t8", 48, 64, 8, 4),
        Case("t2", 33, 32, 16, 4),
        Case("tuneven", 16, 50, 7, 3),
    )
}
"""For trying the code on a CPU."""

FRACTIONS = (0.01, 0.1, 1.0)

# Dormant, then at 1, 10 and 100 % active; backward at 10 and 100 %.
_SITE = {
    "c64": (Goal("read", 1.05), Goal("copy", 0.80), Goal("copy", 0.88), Goal("copy", 1.5)),
    "c4": (Goal("read", 1.05), Goal("copy", 0.85), Goal("copy", 1.3), Goal("copy", 2.4)),
    "c16": (Goal("read", 1.05), Goal("copy", 0.60), Goal("copy", 0.88), Goal("copy", 1.6)),
    "c2": (Goal("read", 1.08), Goal("copy", 0.80), Goal("copy", 1.4), Goal("copy", 3.5)),
    "s1k": (Goal("", 2.1), Goal("", 3.5), Goal("", 4.5), Goal("", 5.5)),
    "lat": (Goal("", 1.4), Goal("", 2.2), Goal("", 2.5), Goal("", 2.5)),
}
_BACKWARD = {
    "c64": (Goal("copy", 1.5), Goal("", 87 / 2)),
    "c4": (Goal("copy", 2.5), Goal("", 229 / 2)),
    "c16": (Goal("copy", 1.5), Goal("", 497 / 2)),
    "c2": (Goal("copy", 3.0), Goal("", 1425 / 2)),
}
# Shapes without goals of their own are held to those of the nearest one that has some.
_NEAREST = {"c256": "c64", "c1": "c2", "uneven": "c16", "r8": "c4", "r32": "c4"}


def goals(case: Case) -> dict[str, list[Goal]]:
    """What each variant of a case is to reach, by its name."""
    name = _NEAREST.get(case.name, case.name)
    found: dict[str, list[Goal]] = {}
    if name in _SITE:
        dormant, *active = _SITE[name]
        found["telemetry"] = [dormant]
        for fraction, goal in zip(FRACTIONS, active, strict=True):
            found[f"site {percent(fraction)}"] = [goal]
        found["site 10%"] += [Goal("compiled 10%", 1 / 4), Goal("eager 10%", 1 / 15)]
    if name in _BACKWARD:
        tenth, whole = _BACKWARD[name]
        for what in ("backward own", "backward"):
            found |= {f"{what} 10%": [tenth], f"{what} 100%": [whole]}
    if case.seeds == 1024 and case.rows >= 1024:
        found["train 10%"] = [Goal("site 10%", 3)]
    return found


def percent(fraction: float) -> str:
    """`10%`."""
    return f"{100 * fraction:g}%"


def judge(records: Sequence[Record], wanted: Mapping[str, Sequence[Goal]]) -> None:
    """Fill in `over`, `share`, `goals` and `ok` of the records of one job."""
    us = {r["what"]: r["us"] for r in records if _known(r)}
    each = {r["what"]: r.get("each", ()) for r in records if _known(r)}
    bandwidth = {r["what"]: r["moved"] / r["us"] for r in records if _known(r) and r.get("moved")}
    for record in records:
        if not _known(record):
            continue
        record["over"] = {name: record["us"] / us[name] for name in ("read", "copy") if name in us}
        limit = bandwidth.get("read" if record["what"].startswith("telemetry") else "copy")
        if record.get("moved") and limit:
            record["share"] = record["moved"] / record["us"] / limit
        checks = []
        for goal in wanted.get(record["what"], ()):
            if goal.of and goal.of not in us:
                continue
            bound = goal.most * (us[goal.of] if goal.of else 1)
            ratio = _paired(record, each.get(goal.of, ())) or record["us"] / (us[goal.of] if goal.of else 1)
            checks.append(
                {
                    "of": goal.of or "us",
                    "most": goal.most,
                    "bound_us": bound,
                    "is": ratio,
                    "ok": ratio <= goal.most,
                }
            )
        if checks:
            record["goals"] = checks
            record["ok"] = all(check["ok"] for check in checks)


def _paired(record: Record, other: Sequence[float]) -> float | None:
    """The median of the rounds' ratios, where both were timed in every round: clocks drift between rounds."""
    own = record.get("each", ())
    if not other or len(own) != len(other):
        return None
    return statistics.median(a / b for a, b in zip(own, other, strict=True))


def _known(record: Record) -> bool:
    us = record.get("us")
    return us is not None and math.isfinite(us)


def merged(*runs: Iterable[Record]) -> list[Record]:
    """Records of several runs; of equal ones the last, held as well to what only an earlier run has timed."""
    found: dict[tuple[Any, ...], Record] = {}
    for run in runs:
        for record in run:
            key = record["dtype"], record["case"], record["part"], record["what"]
            if key in found and _known(record):
                _carry_over(found[key], record)
            found[key] = record
    return list(found.values())


def _carry_over(before: Record, record: Record) -> None:
    known = {check["of"] for check in record.get("goals", ())}
    for check in before.get("goals", ()):
        if check["of"] not in known:
            ratio = record["us"] * check["most"] / check["bound_us"]
            record.setdefault("goals", []).append({**check, "is": ratio, "ok": ratio <= check["most"]})
    if "goals" in record:
        record["ok"] = all(check["ok"] for check in record["goals"])


COLUMNS = (
    ("read", "read"),
    ("copy", "copy"),
    ("telemetry", "telem"),
    ("merge", "merge"),
    ("site 1%", "1%"),
    ("site 10%", "10%"),
    ("site 100%", "100%"),
    ("site+stash 10%", "st10%"),
    ("site+stash 100%", "st100%"),
    ("backward own 10%", "b10%"),
    ("backward own 100%", "b100%"),
    ("backward 10%", "bc10%"),
    ("backward 100%", "bc100%"),
    ("train 10%", "tr10%"),
    ("eager 10%", "eager"),
    ("compiled 10%", "comp"),
    ("compiled 0%", "comp0"),
    ("per_seed 10%", "p.seed"),
    ("linear", "linear"),
    ("lora", "lora"),
)
SHARED = ("telemetry", "active 1%", "active 10%", "active 100%", "backward 10%", "backward 100%")


def table(records: Sequence[Record]) -> str:
    """All that matters, in few columns: us, `!` behind what misses a goal; then misses, shares, the rest."""
    lines = []
    for dtype in dict.fromkeys(r["dtype"] for r in records):
        lines += _grid([r for r in records if r["dtype"] == dtype], dtype)
    lines += _misses(records) + _others(records) + _failures(records)
    return "\n".join(lines)


def _grid(records: Sequence[Record], dtype: str) -> list[str]:
    by_case: dict[str, dict[str, Record]] = {}
    for record in records:
        if record["part"] in ("limits", "site", "backward", "train", "rivals"):
            by_case.setdefault(record["case"], {})[record["what"]] = record
    columns = [(what, head) for what, head in COLUMNS if any(what in row for row in by_case.values())]
    if not columns:
        return []
    titles = {name: _title(name) for name in by_case}
    wide = max(len(dtype) + 4, *(len(title) for title in titles.values()))
    lines = ["", f"{dtype + ', us':{wide}s}" + "".join(f"{head:>8s}" for _, head in columns)]
    for name, row in by_case.items():
        lines.append(f"{titles[name]:{wide}s}" + "".join(_cell(row.get(what)) for what, _ in columns))
    shares = [what for what in SHARED if any(row.get(what, {}).get("share") for row in by_case.values())]
    if shares:
        lines.append(
            f"{'% of bandwidth':{wide}s}"
            + "".join(f"{what.replace('active ', 'act '):>14s}" for what in shares)
        )
        for name, row in by_case.items():
            cells = [row.get(what, {}).get("share") for what in shares]
            lines.append(
                f"{titles[name]:{wide}s}"
                + "".join(f"{'-' if cell is None else f'{100 * cell:.0f}':>14s}" for cell in cells)
            )
    return lines


def _title(name: str) -> str:
    case = CASES.get(name) or TINY.get(name)
    return case.title if case else name


def _cell(record: Record | None) -> str:
    if record is None:
        return f"{'':>8s}"
    if record.get("failed"):
        return f"{'failed':>8s}"
    if not _known(record):
        return f"{'-':>8s}"
    mark = "" if record.get("ok", True) else "!"
    return f"{number(record['us']) + mark:>8s}"


def number(value: float) -> str:
    """Three digits."""
    if value >= 1000:
        return f"{value:.0f}"
    return f"{value:.2f}" if value < 10 else f"{value:.1f}"


def _misses(records: Sequence[Record]) -> list[str]:
    judged = [r for r in records if "ok" in r]
    lines = ["", f"goals: {sum(r['ok'] for r in judged)} of {len(judged)} figures reach theirs"]
    for record in judged:
        for check in record.get("goals", ()):
            if check["ok"]:
                continue
            times = check.get("is") or record["us"] / check["bound_us"] * check["most"]
            of = "us" if check["of"] == "us" else f"x {check['of']}"
            lines.append(
                f"  {record['dtype']} {_title(record['case'])} {record['what']}: "
                f"{number(record['us'])} us = {times:.3f} {of}, goal {check['most']:.3f}"
            )
    return lines


def _others(records: Sequence[Record]) -> list[str]:
    shown = ("limits", "site", "backward", "train", "rivals")
    lines = []
    for record in records:
        if record["part"] in shown or record.get("failed"):
            continue
        marks = "" if "ok" not in record else ("  ok" if record["ok"] else "  MISSED")
        figure = f"{number(record['us'])} us" if _known(record) else record.get("note", "-")
        note = f"  {record['note']}" if _known(record) and record.get("note") else ""
        lines.append(
            f"{record['part']} {record['dtype']} {_title(record['case'])} {record['what']}: {figure}{note}{marks}"
        )
    return ["", *lines] if lines else []


def _failures(records: Sequence[Record]) -> list[str]:
    failed = [r for r in records if r.get("failed")]
    lines = ["", f"failed: {len(failed)}"] if failed else []
    for record in failed[:20]:
        told = record["failed"].strip().splitlines()[-1][:160]
        lines.append(
            f"  {record['part']} {record['dtype']} {_title(record['case'])} {record['what']}: {told}"
        )
    return lines


def tuning_table(tuned: Sequence[Mapping[str, Any]]) -> str:
    """For each kernel that was tuned, its guess against the best, and the best's config."""
    lines = []
    for entry in tuned:
        if entry.get("failed"):
            lines.append(
                f"tuned {entry['dtype']} {_title(entry['case'])} {entry['kernel']}: {entry['failed'][:160]}"
            )
            continue
        known = [trial for trial in entry["trials"] if trial.get("us") is not None]
        guess = entry["trials"][0].get("us") if entry["trials"] else None
        config = " ".join(f"{key}={value}" for key, value in entry["config"].items() if value)
        lines.append(
            f"tuned {entry['dtype']} {_title(entry['case'])} {entry['kernel']}: {number(entry['us'])} us of "
            f"{len(known)} (guess {number(guess) if guess else '-'}): {config}"
        )
    return "\n".join(lines)
