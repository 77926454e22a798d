"""A network that is too small, and grows while it trains: watch every seed from germination to fossil or cull.

Run it with `python examples/grow_mlp.py [plot.png]`: about half a minute on a CPU. The same host without seeds, and one
that was as wide from the beginning as the grown one is in the end, train on the same batches beside it.
"""

import copy
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

STEPS, BATCH = 6000, 64


class Host(nn.Module):
    """16 -> width -> 4."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(16, width)
        self.act = nn.ReLU()
        self.down = nn.Linear(width, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.act(self.up(x)))


torch.manual_seed(0)
model = Host(6)
example_inputs = (torch.zeros(BATCH, 16),)


class Data:
    """A random two-layer teacher of 40 tanh units, and a validation set."""

    def __init__(self) -> None:
        self.draw = torch.Generator().manual_seed(1)
        self.inner = torch.randn(16, 40, generator=self.draw) / 3
        self.outer = torch.randn(40, 4, generator=self.draw) / 3
        self.held_out = self.batch(2000)

    def batch(self, rows: int = BATCH) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.randn(rows, 16, generator=self.draw)
        return x, torch.tanh(x @ self.inner) @ self.outer

    def validate(self, net: nn.Module) -> float:
        x, y = self.held_out
        with torch.no_grad():
            return float((net(x) - y).square().mean())


def main() -> None:
    import morphc

    # Ticks are shortened: a run of this size has no time for the defaults.
    config = morphc.Config(
        kinds=("linear",),
        seeds_per_layer=4,
        slots=4,
        rank=6,
        blueprint="widen",
        minimum_ticks=(10, 6, 3, 3, 100),
        graft_ticks=5,
        graft_patience=20,
        min_final_stability=0.8,
    )
    data = Data()
    plain, wide = copy.deepcopy(model), Host(6 + 4 * 6)
    grown = morphc.compile(model, example_inputs, config=config)
    nets = {"host alone": plain, "wide from the start": wide, "grown": grown}
    optimizers = {name: torch.optim.Adam(net.parameters(), lr=3e-3) for name, net in nets.items()}
    controller = morphc.PlateauController(patience=1, threshold=0.02, seeds=2, most=8, candidates=2)
    grower = morphc.Grower(grown, optimizers["grown"], controller, evaluate=data.validate)

    losses: dict[str, list[tuple[int, float]]] = {name: [] for name in nets}
    alphas: list[tuple[int, list[float]]] = []
    moments: list[tuple[int, str]] = []
    for step in range(STEPS):
        x, y = data.batch()
        for name, net in nets.items():
            loss = (net(x) - y).square().mean()
            optimizers[name].zero_grad()
            loss.backward()
            optimizers[name].step()
        event = grower.step(loss)
        for transition in event.transitions:
            if transition:
                print(f"step {step + 1:5d}  {transition}")
                moments.append((step, transition.target.name))
        if step % 100 == 99:
            for name, net in nets.items():
                losses[name].append((step, data.validate(net)))
            alphas.append((step, morphc.seeds(grown)["down"].alpha.tolist()))
            grower.epoch(losses["grown"][-1][1])

    folded = morphc.fold(grown)
    x, y = data.held_out
    with torch.no_grad():
        apart = (folded(x) - grown(x)).abs().max().item()
    print(f"\nfolded: {folded.up.out_features} hidden units, no seed left, outputs {apart:.1e} apart")
    for name, curve in losses.items():
        print(f"{name:>20}: validation loss {curve[-1][1]:.5f}")
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.gettempdir()) / "grow_mlp.png"
    if plot(path, losses, alphas, moments):
        print(f"plot: {path}")


def plot(
    path: Path,
    losses: dict[str, list[tuple[int, float]]],
    alphas: list[tuple[int, list[float]]],
    moments: list[tuple[int, str]],
) -> bool:
    """Validation losses, and alpha of every seed; False where matplotlib isn't installed."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: pip install matplotlib")
        return False
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (top, bottom) = pyplot.subplots(2, 1, figsize=(8, 6), sharex=True, layout="constrained")
    for name, curve in losses.items():
        top.plot(*zip(*curve, strict=True), label=name, lw=2 if name == "grown" else 1.2)
    for step, state in moments:
        if state in ("GRAFTING", "FOSSILIZED", "CULLED"):
            color = {"GRAFTING": "tab:blue", "FOSSILIZED": "tab:green", "CULLED": "tab:red"}[state]
            top.axvline(step, color=color, lw=0.8, ls=":")
    top.set(
        yscale="log", ylabel="validation loss", title="blue: a graft begins · green: fossilized · red: culled"
    )
    top.legend(frameon=False)
    steps = [step for step, _ in alphas]
    for seed, values in enumerate(zip(*(values for _, values in alphas), strict=True)):
        bottom.plot(steps, values, label=f"seed {seed}")
    bottom.set(xlabel="step", ylabel="alpha")
    bottom.legend(frameon=False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True


if __name__ == "__main__":
    main()
