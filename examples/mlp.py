"""A multilayer perceptron that is compiled, trained for a few steps, looked at, and given back as a plain module.

Run it with `python examples/mlp.py`, or look at what morphc does to it with `morphc compile examples/mlp.py`.
"""

import torch
from torch import nn


class MLP(nn.Module):
    """784 -> 512 -> 512 -> 10."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(784, 512)
        self.fc2 = nn.Linear(512, 512)
        self.head = nn.Linear(512, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.fc1(x))
        x = torch.relu(self.fc2(x))
        return self.head(x)


torch.manual_seed(0)
model = MLP()
example_inputs = (torch.randn(128, 784),)


def main() -> None:
    import morphc

    grown = morphc.compile(model, example_inputs, config=morphc.Config(seeds_per_layer=64))
    optimizer = torch.optim.AdamW(grown.parameters(), lr=1e-3)
    target = torch.randint(0, 10, (128,))
    for _ in range(20):
        loss = nn.functional.cross_entropy(grown(*example_inputs), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(morphc.report(grown))

    health = morphc.seeds(grown).telemetry()
    dead = health["dead_fraction"]
    print(f"{len(morphc.seeds(grown))} seeds; dead fraction of the first chunks: {dead[:4].tolist()}")

    plain = morphc.fold(grown)
    same = torch.equal(plain(*example_inputs), grown(*example_inputs))
    print(f"folded into a plain {type(plain).__name__}, same outputs: {same}")


if __name__ == "__main__":
    main()
