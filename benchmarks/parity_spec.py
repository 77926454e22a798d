"""What the kernels are checked on: specs at random, drawn from their number and the seed alone."""

from __future__ import annotations

import random

import msgspec

MOST_BYTES = 1 << 28
MOST_HIDDEN = 1 << 29
CHUNKS = (1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 16, 17, 24, 31, 32, 48, 64, 100, 128, 200, 255, 256)
ROWS = (4096, 1, 17, 16384, 128, 0, 4096, 333, 2048, 16384, 31, 1024)
FEATURES = (8192, 4096, 2048, 1024, 768, 512, 320, 96)
RANKS = (16, 16, 16, 8, 32, 4, 1, 3, 11, 24, 64)
BLUEPRINTS = (
    *("bottleneck",) * 9,
    *("affine",) * 3,
    *("lowrank",) * 2,
    *("widen",) * 3,
)
TAPS = (4096, 2048, 768, 1024, 320, 100)
BLOCKS = ("gelu", "gelu_tanh", "relu", "silu")
MOST_PRODUCTS = 1 << 40
"""Of a tap's in-projections: multiplications."""

BLENDS = ("residual", "residual", "lerp", "multiply", "gate")
EPILOGUES = (None, None, "relu", "gelu", "gelu_tanh", "silu")


class Spec(msgspec.Struct, frozen=True):
    """One draw. shape, axis: of the activation; gap: elements between the end of a row and the next one. tap: features
    of what the blueprint reads, 0 where that is its own chunk; activation, gated: of the block, for `widen`.
    """

    number: int
    shape: tuple[int, ...]
    axis: int
    layout: str
    gap: int
    dtype: str
    features: int
    seeds: int
    rank: int
    blueprint: str
    blend: str
    slots: int
    blending: int
    isolated: int
    epilogue: str | None
    near_zero: float
    offset: float
    scale: float
    nonfinite: int
    tap: int = 0
    activation: str = "gelu"
    gated: bool = False

    @property
    def rows(self) -> int:
        """Of features."""
        total = 1
        for size in self.shape:
            total *= size
        return total // self.features

    @property
    def chunk(self) -> int:
        """The widest."""
        return -(-self.features // self.seeds)

    @property
    def title(self) -> str:
        """Short, for the table."""
        tap = f" tap {self.tap} {'gated ' if self.gated else ''}{self.activation}" if self.tap else ""
        uneven = "" if self.features % self.seeds == 0 else "u"
        return (
            f"#{self.number} {self.rows}x{self.features}/{self.seeds}{uneven} c{self.chunk} r{self.rank} "
            f"{self.dtype} {self.layout}{'+gap' if self.gap else ''} {self.blueprint}{tap} {self.blend} "
            f"{self.blending}+{self.isolated}{' nonfinite' if self.nonfinite else ''}"
        )


def draw(number: int, seed: int, *, tiny: bool = False) -> Spec:
    """Rows, dtypes and layouts take turns; the rest is random."""
    r = random.Random(f"{seed}/{number}")
    rows = ROWS[number % len(ROWS)]
    dtype = ("bfloat16", "float32", "float16")[(number + number // len(ROWS)) % 3]
    blueprint = r.choice(BLUEPRINTS)
    tapped = blueprint in ("lowrank", "widen")
    layout = "last" if tapped else r.choice(("last", "last", "last", "channels_first", "channels_last"))
    features = r.choice(FEATURES) if r.random() < 0.7 else r.randrange(17, 8193)
    chunk = r.choice(CHUNKS)
    rank = r.choice(RANKS)
    if tiny:
        rows, features = min(rows, r.choice((0, 1, 17, 40))), r.randrange(5, 70)
        rank, chunk = min(rank, 11), min(chunk, 24)
    tap = r.choice(TAPS) if tapped else 0
    if tiny and tapped:
        tap = r.randrange(3, 50)
    while rows * features * (4 if dtype == "float32" else 2) > MOST_BYTES:
        rows //= 2
    seeds = max(1, round(features / min(chunk, features)))
    while -(-features // seeds) > 256:
        seeds += 1
    shares = (0.3, 0.6, 1.0) if tiny else (0.01, 0.1, 0.1, 0.5, 1.0)
    held = max(1, round(r.choice(shares) * seeds)) if r.random() > 0.06 else 0
    while held > 1 and held * rows * rank > MOST_HIDDEN:
        held //= 2
    while held > 1 and held * rows * rank * tap > MOST_PRODUCTS:
        held //= 2
    isolated = min(held, r.choice((0, 0, 1, held // 3, held)))
    shape, axis, gap = _place(r, rows, features, layout)
    spread = r.choice(((0.0, 1.0), (0.3, 1.0), (-2.0, 0.5), (1000.0, 0.01), (0.0, 30.0)))
    return Spec(
        number=number,
        shape=shape,
        axis=axis,
        layout=layout,
        gap=gap,
        dtype=dtype,
        features=features,
        seeds=seeds,
        rank=rank,
        blueprint=blueprint,
        blend=r.choice(BLENDS),
        slots=min(seeds, held + r.choice((0, 1, 5))) or 1,
        blending=held - isolated,
        isolated=isolated,
        epilogue=r.choice(EPILOGUES),
        near_zero=r.choice((0.0, 0.0, 1e-3, 0.1)),
        offset=spread[0],
        scale=spread[1],
        nonfinite=r.choice((0, 0, 0, 0, 3)) if rows else 0,
        tap=tap,
        activation=r.choice(BLOCKS),
        gated=blueprint == "widen" and r.random() < 0.5,
    )


def _place(r: random.Random, rows: int, features: int, layout: str) -> tuple[tuple[int, ...], int, int]:
    if layout == "last":
        outer = r.choice([n for n in (1, 2, 4, 8) if rows % n == 0])
        shape = (outer, rows // outer, features) if outer > 1 else (rows, features)
        gap = r.choice((0, 0, 0, 8, 64, 3)) if outer == 1 else 0
        return shape, -1, gap
    sizes = [n for n in (1, 2, 4, 7, 14, 16, 32) if rows % (n * n) == 0] or [1]
    side = r.choice(sizes)
    return (rows // (side * side), features, side, side), 1, 0
