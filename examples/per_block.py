"""A transformer whose blocks are compiled one by one, as large training programs do: `python examples/per_block.py`.

Each block is a compiled model of its own, with its own optimizer and its own Grower, so a rollback in one block leaves
the others alone. With `--torch-compile` each is given to torch.compile as well, which takes a minute. In the end every
block is folded in its place. Some seconds on a CPU.
"""

import sys

import torch
from torch import Tensor, nn
from torch.nn import functional

STEPS, BATCH, LENGTH, WIDTH, MODULUS = 240, 32, 16, 16, 48


class Block(nn.Module):
    """Attention and an MLP, each behind a norm and beside a skip."""

    def __init__(self, width: int = WIDTH, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.act, self.down = nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(self.act(self.up(self.mlp_norm(x))))


class Transformer(nn.Module):
    """Tokens in, logits out."""

    def __init__(self, layers: int = 2, vocabulary: int = 64) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, WIDTH), nn.Parameter(torch.zeros(LENGTH, WIDTH))
        self.layers = nn.ModuleList(Block() for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.places
        for block in self.layers:
            x = block(x)
        return self.head(self.norm(x))


torch.manual_seed(0)
model = Transformer()
example_inputs = (torch.zeros(2, LENGTH, dtype=torch.long),)


def batch(draw: torch.Generator, rows: int = BATCH) -> Tensor:
    """Rows a, a + d, a + 2d ... modulo `MODULUS`, [rows, LENGTH + 1]."""
    start = torch.randint(MODULUS, (rows, 1), generator=draw)
    stride = torch.randint(1, 5, (rows, 1), generator=draw)
    return (start + stride * torch.arange(LENGTH + 1)) % MODULUS


def loss_of(net: nn.Module, ids: Tensor) -> Tensor:
    return functional.cross_entropy(net(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


def main() -> None:
    import morphc
    from morphc.grow.controllers import Germinate

    # Ticks are shortened: a run of this size has no time for the defaults.
    config = morphc.Config(
        seeds_per_layer=4,
        slots=4,
        rank=16,
        blueprint="widen",
        minimum_ticks=(6, 4, 2, 2, 12),
        graft_ticks=4,
        min_isolated_improvement=0.0,  # most of a language model's gradient is noise, which no seed can take away
        min_final_stability=0.5,
    )
    held_out = batch(torch.Generator().manual_seed(2), 256)

    def validation_loss(_: nn.Module) -> float:
        # A Grower hands over its own block; what counts is what the whole model makes of it.
        with torch.no_grad():
            return float(loss_of(model, held_out))

    growers: dict[str, morphc.Grower] = {}
    for name, block in model.layers.named_children():
        grown = morphc.compile(block, (torch.zeros(2, LENGTH, WIDTH),), config=config)
        if "--torch-compile" in sys.argv:
            grown.compile(fullgraph=True)
        setattr(model.layers, name, grown)
        controller = morphc.ScheduleController([(20 + 60 * int(name), Germinate("down", (0,), candidates=2))])
        optimizer = torch.optim.AdamW(grown.parameters(), lr=1e-2)
        growers[name] = morphc.Grower(grown, optimizer, controller, validation_loss, tick_every=2)
    blocks = {id(param) for param in model.layers.parameters()}
    rest = torch.optim.AdamW([param for param in model.parameters() if id(param) not in blocks], lr=1e-2)
    optimizers = [rest, *(grower.optimizer for grower in growers.values())]

    draw = torch.Generator().manual_seed(1)
    for step in range(STEPS):
        loss = loss_of(model, batch(draw))
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        for name, grower in growers.items():
            for transition in grower.step(loss).transitions:
                if transition:
                    print(f"step {step + 1:4d}  layers.{name}.{transition}")

    grown_loss = validation_loss(model)
    for name, block in model.layers.named_children():
        setattr(model.layers, name, morphc.fold(block))
    widths = ", ".join(str(block.up.out_features) for block in model.layers)
    print(
        f"\nfolded: MLPs of {widths} units, validation loss {validation_loss(model):.4f}, as grown {grown_loss:.4f}"
    )


if __name__ == "__main__":
    main()
