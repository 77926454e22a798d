"""Sites as plain data, for tests of the cost model and the planner."""

from __future__ import annotations

from typing import Any

from morphc.passes.plan import Site


def make_site(path: str = "encoder.fc1", features: int = 256, **fields: Any) -> Site:
    """A Linear's site; `fields` override."""
    given: dict[str, Any] = {
        "layer_kind": "linear",
        "feature_axis": -1,
        "dtype": "float32",
        "source": "model.py:41",
        "captured_as": "rewritten",
        "why_not_better": "",
        "tap_features": features,
        "rows": 512,
    }
    return Site(path=path, features=features, **(given | fields))
