"""The plan: what compile decided, as plain data that can be printed, saved and given back."""

from __future__ import annotations

import hashlib
from typing import Literal

import msgspec

from morphc.errors import PlanError
from morphc.kernels.spec import Block, KernelSpec, TuneConfig
from morphc.version import __version__

SCHEMA_VERSION = 1

__all__ = ["SCHEMA_VERSION", "Block", "Level", "Miss", "Plan", "RegionNote", "Site"]

Level = Literal["rewritten", "matched", "as_written"]


class Site(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One watched activation.

    `path` is the layer's first name in `named_modules()` (root: ""), or that of its parameter for a functional
    layer. `source` is `file:line` of the call. `feature_axis` counts from the end when negative.
    `region` is the module whose own forward calls the layer. `parameter` is the parameter's own name for a
    functional layer, else None. `output_index` is 0 where the layer returns a tuple and the watched value is its
    first element, else None. `owner` is the module whose forward is wrapped, where that is not the layer itself
    (the out-projection of a MultiheadAttention). `parameter_share`, `flop_share`: of the whole model's.
    `dominates`: how many later values can only be reached through this one. `host_flops_per_row`: the host
    layer's own. `parts`: the features are that many equal parts which each have the same number of chunks, three
    for the packed q | k | v of a MultiheadAttention. `positions`: of a sample, behind its features (height times width
    of an image); 1 where the features come last. `past_hooks`: the layer's `forward` is called directly, so that hooks
    on it, and what `fold` would hang there, see nothing.
    """

    path: str
    layer_kind: str
    features: int
    feature_axis: int
    dtype: str
    source: str
    captured_as: Level
    why_not_better: str
    seeds: int = 0
    slots: int = 0
    epilogue: str | None = None
    layer_class: str = ""
    parameter: str | None = None
    owner: str | None = None
    region: str | None = None
    output_index: int | None = None
    tap_features: int = 0
    rows: int = 0
    calls: int = 1
    owns_input: bool = False
    block: Block | None = None
    quantized: bool = False
    shared_weight: bool = False
    executed: bool = True
    past_hooks: bool = False
    residual_branch: bool = False
    bottleneck: bool = False
    dominates: int = 0
    parameter_share: float = 0.0
    flop_share: float = 0.0
    host_flops_per_row: int = 0
    predicted: dict[str, float] = {}
    note: str = ""
    parts: int = 1
    positions: int = 1


class Miss(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A layer that got no site, and why. `executed` tells whether the example input reached it."""

    path: str
    layer_class: str
    reason: str
    source: str = ""
    executed: bool = False
    candidate: bool = False


class RegionNote(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How one module's own forward was captured. `runs` tells whether a graph runs in its place, for
    calls with the arguments `given`."""

    path: str
    module_class: str
    level: Level
    reason: str
    source: str
    runs: bool = False
    given: tuple[str, ...] = ()


class Plan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything that compile decided. Given back, it is followed without searching again.

    tuned: configs by kernel and rows; made_from: which code those kernels were, by kernel.
    """

    sites: tuple[Site, ...] = ()
    specs: tuple[KernelSpec, ...] = ()
    tuned: dict[str, TuneConfig] = {}
    made_from: dict[str, str] = {}
    misses: tuple[Miss, ...] = ()
    regions: tuple[RegionNote, ...] = ()
    model_class: str = ""
    model_digest: str = ""
    config: dict[str, object] = {}
    morphc_version: str = ""
    schema_version: int = SCHEMA_VERSION

    @property
    def digest(self) -> str:
        """sha256 of the canonical JSON, hex."""
        return hashlib.sha256(self.to_json()).hexdigest()

    def to_json(self) -> bytes:
        """Canonical JSON: equal plans give equal bytes."""
        return msgspec.json.encode(self, order="sorted")

    @classmethod
    def from_json(cls, data: bytes | str) -> Plan:
        """Inverse of `to_json`. Raises PlanError naming the field that doesn't fit."""
        writer = ""
        try:
            # Before anything else: another schema must not fail on a field that this version doesn't know.
            head = msgspec.json.decode(data, type=_Head)
            if head.morphc_version != __version__:
                writer = f" (it was made by morphc {head.morphc_version or '?'}, this is {__version__})"
            check_schema(head.schema_version, head.morphc_version)
            return msgspec.json.decode(data, type=cls)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise PlanError(f"this is no plan of morphc: {error}{writer}") from error


class _Head(msgspec.Struct):
    schema_version: int
    morphc_version: str = ""


def check_schema(found: int, writer: str) -> None:
    """Plans of any version of morphc with the same schema are read. Raises PlanError for another schema."""
    if found != SCHEMA_VERSION:
        raise PlanError(
            f"the plan's schema_version is {found}, this morphc ({__version__}) reads {SCHEMA_VERSION}: compile "
            f"without it, or follow it with the morphc that made it ({writer or 'unknown'})"
        )
