"""A small network has to learn new random labels again and again, and loses the ability; recycled units keep it.

Run it with `python examples/plasticity.py [plot.png]`: about 10 seconds on a CPU. `--tasks 40` is a longer run,
`--quick` a short one. Recycling makes units anew whose gradient has become small beside that of their layer.
"""

import argparse
import copy
import tempfile
from pathlib import Path

import torch
from torch import nn

IMAGES, CLASSES, BATCH, EPOCHS = 256, 10, 32, 20
WIDTH = 32

torch.manual_seed(0)
model = nn.Sequential(
    nn.Linear(64, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, CLASSES)
)
example_inputs = (torch.zeros(BATCH, 64),)


def task(number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same images under labels of their own."""
    images = torch.randn(IMAGES, 64, generator=torch.Generator().manual_seed(1))
    labels = torch.randint(CLASSES, (IMAGES,), generator=torch.Generator().manual_seed(100 + number))
    return images, labels


def main() -> None:
    import morphc

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("plot", nargs="?", type=Path, default=Path(tempfile.gettempdir()) / "plasticity.png")
    parser.add_argument("--tasks", type=int, default=16)
    parser.add_argument("--quick", action="store_true", help="three tasks")
    options = parser.parse_args()
    tasks = 3 if options.quick else options.tasks

    # One seed a unit, and nothing that grows: seeds are used for what they measure and for recycling.
    config = morphc.Config(
        kinds=("linear",),
        seeds_per_layer={"0": WIDTH, "2": WIDTH, "4": 1},
        slots=1,
        telemetry_every=4,
        gradient_telemetry=True,
    )
    plain = copy.deepcopy(model)
    recycled = morphc.compile(model, example_inputs, config=config)
    nets = {"host alone": plain, "recycled": recycled}
    optimizers = {name: torch.optim.Adam(net.parameters(), lr=5e-3) for name, net in nets.items()}
    controller = morphc.RecycleController(tau=0.3, every=48, by="gradient")
    grower = morphc.Grower(recycled, optimizers["recycled"], controller, tick_every=16)

    accuracy: dict[str, list[float]] = {name: [] for name in nets}
    renewed: list[int] = []
    for number in range(tasks):
        images, labels = task(number)
        order = torch.Generator().manual_seed(number)
        renewed.append(0)
        for _ in range(EPOCHS):
            for rows in torch.randperm(IMAGES, generator=order).split(BATCH):
                for name, net in nets.items():
                    loss = nn.functional.cross_entropy(net(images[rows]), labels[rows])
                    optimizers[name].zero_grad()
                    loss.backward()
                    optimizers[name].step()
                event = grower.step(loss)
                renewed[-1] += sum(bool(done) for done in event.transitions)
        with torch.no_grad():
            for name, net in nets.items():
                accuracy[name].append((net(images).argmax(1) == labels).float().mean().item())
        told = ", ".join(f"{name} {values[-1]:.2f}" for name, values in accuracy.items())
        print(f"task {number + 1:3d}: accuracy at its end: {told}; {renewed[-1]} units recycled")
    last = max(1, tasks // 4)
    print(f"\nmean over the last {last}:")
    for name, values in accuracy.items():
        print(f"{name:>12}: {sum(values[-last:]) / last:.3f}")
    if plot(options.plot, accuracy, renewed):
        print(f"plot: {options.plot}")


def plot(path: Path, accuracy: dict[str, list[float]], renewed: list[int]) -> bool:
    """Accuracy and recycled units by task; False where matplotlib isn't installed."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: pip install matplotlib")
        return False
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (top, bottom) = pyplot.subplots(
        2, 1, figsize=(8, 6), sharex=True, layout="constrained", height_ratios=(3, 1)
    )
    places = range(1, len(renewed) + 1)
    for name, values in accuracy.items():
        top.plot(places, values, marker="o", ms=3, label=name, lw=2 if name == "recycled" else 1.2)
    top.axhline(1 / CLASSES, color="gray", lw=0.8, ls=":")
    top.set(ylabel="accuracy at the task's end", ylim=(0, 1.02))
    top.legend(frameon=False, loc="center left")
    bottom.bar(places, renewed, color="tab:orange")
    bottom.set(xlabel="task (new random labels)", ylabel="units recycled")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True


if __name__ == "__main__":
    main()
