"""A small blueprint with a template of its own, and a spec for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import msgspec

from morphc.kernels.blueprints import Affine, base
from morphc.kernels.spec import KernelSpec

SPEC = KernelSpec(
    kind="forward",
    features=10,
    seeds=3,
    chunk=4,
    slots=2,
    rank=5,
    blueprint="bottleneck",
    blend="residual",
    epilogue=None,
    layout="last",
    dtype="float32",
)

TEMPLATE = """\
{# Adds `more` to everything, and FEATURES. #}
FEATURES = tl.constexpr({{ spec.features }})
{% macro plus(x) %}
{{ x }} + {{ more }}
{%- endmacro %}
@triton.jit
def half(x):
    return x * 0.5



{% if spec.seeds %}
# What it does to x is half of it plus something.
{% endif %}
@triton.jit
def add(x_ptr, n, scale, BLOCK: tl.constexpr):

    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n).to(tl.float32)
    x = {{ plus("half(x)") }}
    tl.store(x_ptr + i, x * scale + FEATURES, mask=i < n)
"""
SIGNATURE = {"x_ptr": "*fp32", "n": "i32", "scale": "fp32"}


@contextmanager
def blueprint(text: str | None, name: str = "own") -> Iterator[KernelSpec]:
    """A registered blueprint whose template is `text`; its spec."""
    made = type("Own", (Affine,), {"name": name, "template": text, "__module__": __name__})()
    base.register(made)
    try:
        yield msgspec.structs.replace(SPEC, blueprint=name)
    finally:
        del base._REGISTRY[name]
