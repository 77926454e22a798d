"""What decides which kernels a bank of a site runs, as one value."""

from __future__ import annotations

import msgspec
import torch

from morphc.kernels.blueprints.base import Geometry, get
from morphc.kernels.site import refusal, spec_of


class SiteSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything that decides which kernels a bank runs, besides the tensors given.

    axis: the feature axis, counted from the end. blends, isolated, trains: sets of states, bit n for state n.
    """

    blueprint: str
    blend: str
    geometry: Geometry
    features: int
    seeds: int
    slots: int
    axis: int
    blends: int
    isolated: int
    trains: int

    def text(self) -> str:
        """As canonical JSON."""
        return msgspec.json.encode(self, order="sorted").decode()

    def refusal(self, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> str:
        """Why there are no kernels for it, an empty string if there are. What float32 has, all types have
        that kernels read.
        """
        spec = spec_of(
            self.blueprint,
            self.geometry,
            self.blend,
            features=self.features,
            seeds=self.seeds,
            slots=self.slots,
            dtype=dtype,
            walk="last",
        )
        reason = refusal(spec, self.geometry, device)
        if not reason and self.axis != -1 and get(self.blueprint).tap != "chunk":
            return (
                f"blueprint {self.blueprint!r} reads rows of features, and these lie along axis {self.axis}"
            )
        return reason
