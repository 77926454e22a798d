"""A small character transformer that grows while it learns to write numbers as words: watch every seed.

Run it with `python examples/grow_transformer.py [plot.png]`: about 20 seconds on a CPU. `--steps 4000` is a longer
run, `--quick` a short one. The text is made here: "412 four hundred and twelve." The same host without seeds trains
on the same batches beside it.
"""

import argparse
import copy
import tempfile
from pathlib import Path

import torch
from torch import nn

WIDTH, HEADS, INNER, LENGTH, BATCH = 32, 2, 4, 48, 16
NAMES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen",
    "- - twenty thirty forty fifty sixty seventy eighty ninety",
)
ONES, TENS = (names.split() for names in NAMES)
LETTERS = " .0123456789" + "abcdefghijklmnopqrstuvwxyz"


def words(number: int) -> str:
    """A number below a thousand as it is said."""
    if number < 20:
        return ONES[number]
    if number < 100:
        return TENS[number // 10] + (" " + ONES[number % 10] if number % 10 else "")
    rest = " and " + words(number % 100) if number % 100 else ""
    return ONES[number // 100] + " hundred" + rest


class Block(nn.Module):
    """Attention, then a feed-forward that is too narrow."""

    def __init__(self) -> None:
        super().__init__()
        self.before_attention, self.before_feed = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.act, self.down = nn.Linear(WIDTH, INNER), nn.GELU(), nn.Linear(INNER, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [rows, length, WIDTH]."""
        rows, length, _ = x.shape
        q, k, v = self.qkv(self.before_attention(x)).view(rows, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        seen = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        return x + self.down(self.act(self.up(self.before_feed(x))))


class Writer(nn.Module):
    """Characters in, logits of the next one out."""

    def __init__(self) -> None:
        super().__init__()
        self.letters, self.places = nn.Embedding(len(LETTERS), WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.Sequential(Block(), Block())
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, len(LETTERS))

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        """text: [rows, length] of int64."""
        x = self.letters(text) + self.places(torch.arange(text.shape[1], device=text.device))
        return self.head(self.norm(self.blocks(x)))


torch.manual_seed(0)
model = Writer()
example_inputs = (torch.zeros(BATCH, LENGTH, dtype=torch.int64),)


class Data:
    """Windows of a text that says numbers below a thousand in random order; other numbers are held out."""

    def __init__(self) -> None:
        self.draw = torch.Generator().manual_seed(1)
        order = torch.randperm(1000, generator=self.draw).tolist()
        self.known, held = self.encode(order[:900] * 8), self.encode(order[900:])
        self.held_out = held[: len(held) // (LENGTH + 1) * (LENGTH + 1)].view(-1, LENGTH + 1)

    def encode(self, numbers: list[int]) -> torch.Tensor:
        order = torch.randperm(len(numbers), generator=self.draw).tolist()
        text = "".join(f"{numbers[place]} {words(numbers[place])}. " for place in order)
        return torch.tensor([LETTERS.index(letter) for letter in text])

    def batch(self) -> torch.Tensor:
        starts = torch.randint(len(self.known) - LENGTH, (BATCH, 1), generator=self.draw)
        return self.known[starts + torch.arange(LENGTH + 1)]

    def validate(self, net: nn.Module) -> float:
        with torch.no_grad():
            return float(loss_of(net, self.held_out))


def loss_of(net: nn.Module, text: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the next character, in nats."""
    return nn.functional.cross_entropy(net(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())


def main() -> None:
    import morphc

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "plot", nargs="?", type=Path, default=Path(tempfile.gettempdir()) / "grow_transformer.png"
    )
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--quick", action="store_true", help="60 steps")
    options = parser.parse_args()
    steps = 60 if options.quick else options.steps

    # Ticks are shortened: a run of this size has no time for the defaults.
    config = morphc.Config(
        include=("blocks.*.up", "blocks.*.down"),
        seeds_per_layer=2,
        slots=2,
        rank=12,
        blueprint="widen",
        minimum_ticks=(8, 4, 2, 2, 130),
        graft_ticks=4,
        graft_patience=30,
        min_isolated_improvement=0.0001,
        min_improvement=0.001,
        min_stability=0.5,
        min_final_stability=0.5,
    )
    data = Data()
    plain = copy.deepcopy(model)
    grown = morphc.compile(model, example_inputs, config=config)
    nets = {"host alone": plain, "grown": grown}
    optimizers = {name: torch.optim.AdamW(net.parameters(), lr=3e-3) for name, net in nets.items()}
    schedules = {
        name: torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps, pct_start=0.1)
        for name, optimizer in optimizers.items()
    }
    controller = morphc.PlateauController(patience=1, threshold=0.1, seeds=4, most=4)
    grower = morphc.Grower(
        grown,
        optimizers["grown"],
        controller,
        evaluate=data.validate,
        scheduler=schedules["grown"],
        tick_every=4,
    )
    losses: dict[str, list[tuple[int, float]]] = {name: [] for name in nets}
    moments: list[tuple[int, str, str]] = []
    for step in range(steps):
        text = data.batch()
        for name, net in nets.items():
            loss = loss_of(net, text)
            optimizers[name].zero_grad()
            loss.backward()
            optimizers[name].step()
        event = grower.step(loss, lambda text=text: loss_of(grown, text))
        for transition in event.transitions:
            if transition:
                print(f"step {step + 1:5d}  {transition}")
                place = f"{transition.path}[{transition.seed}]"
                moments.append((step, place, transition.target.name))
        for schedule in schedules.values():
            schedule.step()
        if step % 30 == 29:
            for name, net in nets.items():
                losses[name].append((step, data.validate(net)))
            grower.epoch(losses["grown"][-1][1])

    folded = morphc.fold(grown)
    with torch.no_grad():
        apart = (folded(data.held_out[:, :-1]) - grown(data.held_out[:, :-1])).abs().max().item()
    inner = [block.up.out_features for block in folded.blocks]
    print(f"\nfolded: feed-forwards {inner} wide (were {INNER}), no seed left, logits {apart:.1e} apart")
    for name, net in {"host alone": plain, "grown": folded}.items():
        size = sum(param.numel() for param in net.parameters())
        print(f"{name:>12}: {size} parameters, held-out loss {data.validate(net):.4f}; writes: {write(net)}")
    if plot(options.plot, losses, moments):
        print(f"plot: {options.plot}")


def write(net: nn.Module, start: str = "347 ") -> str:
    """What the net says of a number, a character at a time."""
    text = start
    with torch.no_grad():
        while len(text) < LENGTH and not text.endswith("."):
            logits = net(torch.tensor([[LETTERS.index(letter) for letter in text]]))
            text += LETTERS[int(logits[0, -1].argmax())]
    return text


def plot(path: Path, losses: dict[str, list[tuple[int, float]]], moments: list[tuple[int, str, str]]) -> bool:
    """Held-out losses, and what became of every seed; False where matplotlib isn't installed."""
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
    for name, curve in losses.items():
        top.plot(*zip(*curve, strict=True), label=name, lw=2 if name == "grown" else 1.2)
    top.set(ylabel="held-out loss, nats a character")
    top.legend(frameon=False)
    colors = {"TRAINING": "0.6", "GRAFTING": "tab:blue", "FINE_TUNING": "tab:cyan", "FOSSILIZED": "tab:green"}
    colors |= {"CULLED": "tab:red", "ROLLED_BACK": "tab:red"}
    places = sorted({place for _, place, _ in moments})
    for state, color in colors.items():
        found = [(step, places.index(place)) for step, place, target in moments if target == state]
        if found:
            bottom.scatter(*zip(*found, strict=True), color=color, s=28, label=state.lower())
    bottom.set(xlabel="step", yticks=range(len(places)), yticklabels=places, ylim=(-0.6, len(places) - 0.4))
    if places:
        bottom.legend(frameon=False, ncols=3, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.35))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True


if __name__ == "__main__":
    main()
