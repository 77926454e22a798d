"""Sites and shapes shared by the tests of the cost model and the chunk planner."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from site_factory import make_site

from morphc.passes.plan import Site


@pytest.fixture
def gpt2_sites() -> tuple[Site, ...]:
    """The layers of GPT-2 small: twelve equal blocks and a head."""
    widths = {
        "attn.c_attn": (768, 2304),
        "attn.c_proj": (768, 768),
        "mlp.c_fc": (768, 3072),
        "mlp.c_proj": (3072, 768),
    }
    blocks = [
        make_site(f"h.{block}.{name}", out, tap_features=width, rows=1024, host_flops_per_row=2 * width * out)
        for block in range(12)
        for name, (width, out) in widths.items()
    ]
    return (*blocks, make_site("lm_head", 50257, tap_features=768, rows=1024))


@pytest.fixture
def site() -> Callable[..., Site]:
    """`make_site`, as a fixture."""
    return make_site
