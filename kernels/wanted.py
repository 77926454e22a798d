"""What a spec's kernel would be made from now: what `why-miss` compares the cache with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from morphc.errors import CacheError, MorphcError
from morphc.kernels import active, codegen, gradient, lifecycle, telemetry, training
from morphc.kernels.cache import place
from morphc.kernels.codegen import Source
from morphc.kernels.spec import KernelSpec

SOURCES: Final[Mapping[str, Callable[[KernelSpec], Source]]] = {
    "forward": active.source,
    "backward": lambda spec: gradient.source(spec, False),
    "train": lambda spec: training.source(spec, False),
    "telemetry": telemetry.source,
    "active_list": lambda spec: active.list_source(),
    "lifecycle": lambda spec: lifecycle.lifecycle_job(False).source,
    "lifecycle_requests": lambda spec: lifecycle.lifecycle_job(True).source,
    "report": lambda spec: lifecycle.report_job().source,
}
"""Kind -> its file, as far as it follows from the spec alone."""


def made_from(spec: KernelSpec, like: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What the kernel of `spec` would be made from by this version.

    like: of an entry of the same spec, for kinds whose files follow from more than it (the layer's geometry): what it
    was made from, by the code of today. Raises CacheError for such a kind without.
    """
    if spec.kind in SOURCES:
        try:
            return dict(SOURCES[spec.kind](spec).made_from)
        except MorphcError:
            if like is None:
                raise
    if like is None:
        raise CacheError(
            f"{spec.name!r} isn't in the cache, and its name alone doesn't say what it would be made from: a kernel of "
            f"kind {spec.kind!r} follows from its layer's input as well. Compile the model with --require-cached, "
            "which names what each missing kernel differs in, or give the key of an entry (morphc cache ls)"
        )
    return {**like, "schema": place.SCHEMA, "codegen_sha": codegen.codegen_digest()}
