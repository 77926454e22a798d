"""A model whose control flow depends on its data: no graph can stand for it, so it runs as written, and is watched all
the same. The report names the line that decides."""

import torch
from torch import nn


class Branchy(nn.Module):
    """Loud inputs take one way, quiet ones another, and hard ones go round again."""

    def __init__(self) -> None:
        super().__init__()
        self.loud = nn.Linear(32, 64)
        self.quiet = nn.Linear(32, 64)
        self.again = nn.Linear(64, 64)
        self.head = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.loud(x) if x.abs().mean() > 0.5 else self.quiet(x)
        for _ in range(4):
            if hidden.norm() < 1.0:
                break
            hidden = torch.tanh(self.again(hidden))
        return self.head(hidden)


torch.manual_seed(0)
model = Branchy()
example_inputs = (torch.randn(16, 32),)


def main() -> None:
    import morphc

    grown = morphc.compile(model, example_inputs, config=morphc.Config(seeds_per_layer=8))
    print(morphc.report(grown))
    quiet = 0.01 * torch.randn(5, 32)
    print(f"the way the example did not take: {torch.equal(grown(quiet), model(quiet))}")


if __name__ == "__main__":
    main()
