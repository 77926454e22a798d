"""A blueprint of your own: ReLU units on a chunk. It grows into one layer of a small regression, and is folded.

Registered in the model's own file, it can be named on the command line too:

    morphc compile examples/custom_blueprint.py --blueprint relu-units
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Generator, Tensor, nn

from morphc.kernels.blueprints import Blueprint, Geometry, register

if TYPE_CHECKING:
    import sympy


class ReluUnits(Blueprint):
    """s = relu(x W_in) W_out with `rank` hidden units; W_out is zero at birth, so a newborn changes nothing."""

    name = "relu-units"
    tap = "chunk"

    def shapes(self, geometry: Geometry) -> dict[str, tuple[int, ...]]:
        return {
            "in_weight": (geometry.chunk, geometry.rank),
            "out_weight": (geometry.rank, geometry.chunk),
        }

    def init(self, geometry: Geometry, slots: int, generator: Generator) -> dict[str, Tensor]:
        shapes = self.shapes(geometry)
        bound = geometry.chunk**-0.5
        drawn = torch.empty(slots, *shapes["in_weight"]).uniform_(-bound, bound, generator=generator)
        return {"in_weight": drawn, "out_weight": torch.zeros(slots, *shapes["out_weight"])}

    def apply(self, x: Tensor, params: Mapping[str, Tensor], geometry: Geometry) -> Tensor:
        return torch.bmm(torch.relu(torch.bmm(x, params["in_weight"])), params["out_weight"])

    def flops(self, geometry: Geometry, rows: sympy.Expr) -> sympy.Expr:
        return 4 * geometry.chunk * geometry.rank * rows


register(ReluUnits(), replace=True)

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 1))
example_inputs = (torch.randn(256, 8),)


def main() -> None:
    import morphc

    x = example_inputs[0]
    target = x.abs().sum(1, keepdim=True)
    config = morphc.Config(seeds_per_layer={"0": 1, "1": 1}, blueprint="relu-units", rank=32)
    grown = morphc.compile(model, example_inputs, config=config)
    seeds = morphc.seeds(grown)
    seeds["0"].assign([0], morphc.Lifecycle.FINE_TUNING)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(301):
        loss = nn.functional.mse_loss(grown(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seeds.step_optimizer(lr=0.01)
        if step % 100 == 0:
            print(f"step {step}: loss {loss.item():.3f}")

    plain = morphc.fold(grown)
    print(f"folded, furthest output: {(plain(x) - grown(x)).abs().max().item():.1e}")


if __name__ == "__main__":
    main()
