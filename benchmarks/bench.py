"""The variants of one shape: buffers to rotate over, the site's kernels on them, and the rivals."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import rivals
import torch
from figures import FRACTIONS, Case, Goal, Record, percent
from sites import Bank, bank
from timing import Variant, buffers_for
from torch import Tensor

from morphc.kernels import active, gradient, telemetry, training, tuning
from morphc.kernels.layout import View
from morphc.kernels.spec import KernelSpec, TuneConfig
from morphc.lifecycle import BLENDS, ISOLATED, TRAINS

ALPHA = 2.0**-12
"""So small that values which a site is applied to thousands of times stay where they are."""

SECTOR = 32
RANK_OF_LORA = 16


@dataclass(frozen=True)
class Setting:
    """What a job runs in. warm: everything is called once and nothing timed, so two buffers are enough.

    precision: of float32 dots, `tf32x3` as where torch's own products are not allowed tf32, or `tf32`.
    """

    dtype: torch.dtype
    device: torch.device
    tiny: bool
    warm: bool
    precision: active.Precision = "tf32x3"


@dataclass(frozen=True)
class Entry:
    """A variant, the part that it belongs to, and the bytes that it has to move where that is known."""

    part: str
    variant: Variant
    moved: float | None = None


@dataclass
class Plan:
    """What a job times, and the goals by name. extra: further figures, found after the timing."""

    entries: list[Entry]
    goals: Mapping[str, Sequence[Goal]] = field(default_factory=dict)
    extra: Callable[[], list[Record]] | None = None


class Buffers:
    """Tensors of one shape in one block of memory, which calls take turns with: `buffers[i]` for the i-th call."""

    def __init__(self, setting: Setting, *shape: int, fill: bool = True) -> None:
        size = torch.Size(shape).numel() * setting.dtype.itemsize
        self.count = 2 if setting.warm or setting.tiny else buffers_for(size)
        self.all = torch.empty(self.count, *shape, dtype=setting.dtype, device=setting.device)
        if fill:
            for one in self.all:
                one.copy_(torch.randn(shape, device=setting.device))
        self.each = list(self.all.unbind())

    def __getitem__(self, index: int) -> Tensor:
        return self.each[index % self.count]


class Site:
    """The kernels of one bank on activations of one shape, with the configs that `tuning.choose` gives."""

    def __init__(self, case: Case, setting: Setting, fraction: float, *, isolated: bool = False) -> None:
        count = max(1, round(fraction * case.seeds)) if fraction else 0
        self.case = case
        self.device = setting.device
        self.precision = setting.precision
        self.bank: Bank = bank(
            features=case.features,
            seeds=case.seeds,
            rank=case.rank,
            slots=count or max(1, round(0.1 * case.seeds)),
            blending=0 if isolated else count,
            isolated=count if isolated else 0,
            dtype=setting.dtype,
            device=setting.device,
            all_train=True,
            alpha=ALPHA,
        )
        self.view = View("last", case.rows, case.features, 1)
        self.lister = active.ActiveList(setting.device)
        self.active = self.lister.new(self.bank.spec.slots)
        self.list_seeds()
        self.params = self.bank.values

    def spec(self, kind: str) -> KernelSpec:
        """Of one of the bank's kernels."""
        from msgspec.structs import replace

        return replace(self.bank.spec, kind=kind)

    def config(self, kind: str) -> TuneConfig:
        """What the product uses: what was timed, else a guess (see `kernels/site.py`)."""
        spec, rows = self.spec(kind), self.case.rows
        if kind == "forward":
            return tuning.choose(spec, rows)
        default = gradient.default if kind == "backward" else training.default
        return tuning.lookup(spec, rows) or default(spec, rows)

    def list_seeds(self) -> None:
        """Make the list of active seeds."""
        bank = self.bank
        self.lister(bank.owner, bank.lifecycle, bank.alpha, self.active, BLENDS, ISOLATED, TRAINS)

    @cached_property
    def forward(self) -> Callable[..., None]:
        """`forward(x, stash=None, early=False)`, in place."""
        kernel = active.Forward(self.spec("forward"), self.config("forward"), self.device, self.precision)
        view, listed, params = self.view, self.active, self.params

        def call(x: Tensor, stash: Tensor | None = None, early: bool = False) -> None:
            kernel(x, view, listed, params, stash, early=early)

        return call

    @cached_property
    def stash_shape(self) -> tuple[int, ...]:
        """Of what the forward saves for the backward."""
        return active.stash_shape(self.spec("forward"), self.view)

    @cached_property
    def backward(self) -> Callable[[Tensor, Tensor, Tensor], None]:
        """`backward(dy, dx, stash)`: the slots' gradients go to a buffer of their own.

        dx is written whole, where it isn't dy.
        """
        return self.backward_with(self.config("backward"))

    def backward_with(self, config: TuneConfig) -> Callable[[Tensor, Tensor, Tensor], None]:
        """The same with that config."""
        spec = self.spec("backward")
        kernel = gradient.Backward(spec, config, self.device, self.precision)
        grads = torch.zeros(spec.slots * gradient.gradient_size(spec), device=self.device)
        view, listed, params = self.view, self.active, self.params

        def call(dy: Tensor, dx: Tensor, stash: Tensor) -> None:
            own = dx is dy
            if not (own or kernel.copies):
                dx.copy_(dy)
            copied = own or not kernel.copies
            kernel(dy, view, dx, view, listed, params, stash, grads, copied=copied)

        return call

    @cached_property
    def trained(self) -> training.Bank:
        """The bank as AdamW reads and writes it."""
        means = [torch.zeros_like(value) for value in self.params]
        squares = [torch.full_like(value, 1e-3) for value in self.params]
        step = torch.ones(self.bank.spec.slots, dtype=torch.int64, device=self.device)
        return training.Bank(self.params, means, squares, step)

    @cached_property
    def trainer(self) -> training.Trainer:
        """Steps the slots."""
        return training.Trainer(self.spec("train"), self.config("train"), self.device, self.precision)

    @cached_property
    def sectors(self) -> float:
        """Bytes of the memory sectors that the listed chunks lie in, one time."""
        item = getattr(torch, self.bank.spec.dtype).itemsize
        case = self.case
        base, wider = divmod(case.features, case.seeds)
        touched = set()
        for seed in self.bank.known.seed.tolist():
            start = seed * base + min(seed, wider)
            stop = start + base + (seed < wider)
            touched.update(range(start * item // SECTOR, (stop * item - 1) // SECTOR + 1))
        return float(len(touched) * SECTOR * case.rows)

    @cached_property
    def saved(self) -> float:
        """Bytes of the stash that are written."""
        return float(len(self.bank.known.seed) * self.case.rows * self.case.chunk * self.item)

    @property
    def item(self) -> int:
        """Bytes of a value."""
        size: int = getattr(torch, self.bank.spec.dtype).itemsize
        return size


class Watched:
    """Telemetry's kernels on activations of one shape, with cells and state of their own.

    every: the device counts the samples and measures each that is due; 0: all are. writes: the activation that is
    applied and written in the same pass.
    """

    def __init__(
        self,
        case: Case,
        setting: Setting,
        *,
        config: TuneConfig | None = None,
        every: int = 0,
        writes: str | None = None,
    ) -> None:
        spec = telemetry.spec_of(case.features, case.seeds, setting.dtype, epilogue=writes)
        self.spec = spec
        self.kernel = telemetry.Telemetry(spec, 0.0, setting.device, config)
        self.view = View("last", case.rows, case.features, 1)
        self.cells = self.kernel.new_cells(self.view)
        self.clock = self.kernel.new_clock(self.view) if every else None
        self.every = max(1, every)
        self.sums = torch.zeros(8, case.seeds, dtype=torch.float64, device=setting.device)
        self.counts = torch.zeros(3, case.seeds, dtype=torch.int64, device=setting.device)

    def sample(self, x: Tensor, y: Tensor | None = None) -> None:
        """As the site does it: every so many samples their sums are handed on."""
        self.kernel(x, self.view, self.cells, self.sums, self.counts, y=y, clock=self.clock, every=self.every)

    def only(self, x: Tensor) -> None:
        """A sample, and no sums handed on."""
        self.cells.pending = 0
        self.sample(x)

    def merged(self, x: Tensor) -> None:
        """A sample whose sums are handed on at once."""
        self.kernel(x, self.view, self.cells, self.sums, self.counts, merged=True)


class Bench:
    """One shape in one dtype. Every method named after a part gives its entries."""

    def __init__(self, case: Case, setting: Setting) -> None:
        self.case = case
        self.setting = setting
        self.device = setting.device
        self.x = Buffers(setting, case.rows, case.features)
        self.size = float(case.rows * case.features * setting.dtype.itemsize)
        self.sites: dict[tuple[float, bool], Site] = {}
        self.stashes: dict[Site, Buffers] = {}

    def site_at(self, fraction: float, *, isolated: bool = False) -> Site:
        """The site with that share of its seeds active, blending or isolated."""
        key = (fraction, isolated)
        if key not in self.sites:
            self.sites[key] = Site(self.case, self.setting, fraction, isolated=isolated)
        return self.sites[key]

    @cached_property
    def y(self) -> Buffers:
        """Where copies go."""
        return Buffers(self.setting, self.case.rows, self.case.features, fill=False)

    def stash(self, site: Site) -> Buffers:
        """What a forward has saved, or will."""
        if site not in self.stashes:
            self.stashes[site] = Buffers(self.setting, *site.stash_shape)
        return self.stashes[site]

    @cached_property
    def dy(self) -> Buffers:
        """Gradients that come in."""
        return Buffers(self.setting, self.case.rows, self.case.features)

    def variant(self, name: str, call: Callable[[int], object]) -> Variant:
        """Rotated over all buffers."""
        return Variant(name, call, calls=self.x.count)

    def limits(self) -> list[Entry]:
        """One read, by several kernels of which the fastest counts, and one copy."""
        out = torch.zeros(rivals.MOST_PROGRAMS, device=self.device)
        x, y = self.x, self.y
        entries = []
        for config in rivals.READ_CONFIGS:
            read = rivals.reader(x[0], *config)
            name = f"read {' '.join(map(str, config))}"
            entries.append(
                Entry("limits", self.variant(name, lambda i, read=read: read(x[i], out)), self.size)
            )
        copy = self.variant("copy", lambda i: y[i].copy_(x[i]))
        return [*entries, Entry("limits", copy, 2 * self.size)]

    @cached_property
    def watched(self) -> Watched:
        """Telemetry of the site."""
        return Watched(self.case, self.setting)

    def site(self) -> list[Entry]:
        """The forward: telemetry, active seeds, both."""
        x, size, watched = self.x, self.size, self.watched
        idle = Watched(self.case, self.setting, every=1 << 30)
        entries = [
            Entry("site", self.variant("telemetry", lambda i: watched.sample(x[i])), size),
            Entry("site", self.variant("telemetry pass", lambda i: watched.only(x[i])), size),
            Entry("site", self.variant("telemetry merged", lambda i: watched.merged(x[i])), size),
            Entry("site", self.variant("telemetry not due", lambda i: idle.sample(x[i]))),
        ]
        for fraction in FRACTIONS:
            entries += self._active(self.site_at(fraction), percent(fraction))
        none = self.site_at(0.0)
        entries.append(Entry("site", self.variant("active 0%", lambda i: none.forward(x[i]))))
        lister = self.site_at(0.1)
        entries.append(Entry("site", Variant("list 10%", lambda i: lister.list_seeds())))
        return entries

    def _active(self, site: Site, name: str) -> list[Entry]:
        """The forward alone, behind telemetry, and with a stash; at one share of active seeds."""
        x, watched, forward = self.x, self.watched, site.forward
        early = gradient.follows_early(self.device)
        entries = []

        def add(what: str, call: Callable[[int], object], moved: float) -> None:
            entries.append(Entry("site", self.variant(f"{what} {name}", call), moved))

        def whole(i: int) -> None:
            watched.sample(x[i])
            forward(x[i], early=early)

        def apart(i: int) -> None:
            watched.sample(x[i])
            forward(x[i])

        add("active", lambda i: forward(x[i]), 2 * site.sectors)
        add("site", whole, self.size + 2 * site.sectors)
        add("site apart", apart, self.size + 2 * site.sectors)
        if name == "1%":
            return entries
        stash = self.stash(site)

        def saving(i: int) -> None:
            watched.sample(x[i])
            forward(x[i], stash[i], early=early)

        add("active+stash", lambda i: forward(x[i], stash[i]), 2 * site.sectors + site.saved)
        add("site+stash", saving, self.size + 2 * site.sectors + site.saved)
        return entries

    def backward(self) -> list[Entry]:
        """The site's backward: in place, in a gradient that nobody else has, and into one of its own."""
        entries = []
        for fraction in FRACTIONS[1:]:
            site = self.site_at(fraction)
            ways = (
                ("backward own", self.dy, 2 * site.sectors + site.saved),
                ("backward", self.y, 2 * self.size + site.saved),
            )
            for what, into, moved in ways:
                name = f"{what} {percent(fraction)}"
                call = _backward(site.backward, self.dy, into, self.stash(site))
                entries.append(Entry("backward", self.variant(name, call), moved))
        return entries

    def train(self) -> list[Entry]:
        """A reconstruction step of a tenth of the seeds, and AdamW from gradients that are there."""
        site = self.site_at(0.1, isolated=True)
        loss = torch.zeros(self.case.seeds, device=self.device)
        rates = training.Rates(1e-6)
        x, trainer, trained = self.x, site.trainer, site.trained
        gradient = torch.full((sum(value.numel() for value in site.params),), 1e-3, device=self.device)

        def train(i: int) -> None:
            trainer.reconstruct(x[i], site.view, site.active, trained, loss, rates)

        def step(i: int) -> None:
            trainer.step(site.active, trained, gradient, rates)

        floats = sum(value.numel() for value in site.params)
        return [
            Entry("train", self.variant("train 10%", train), site.sectors),
            Entry("train", Variant("adamw 10%", step), 4.0 * 7 * floats),
        ]

    def rivals(self) -> list[Entry]:
        """See rivals.py."""
        return list(self._rivals())

    def _rivals(self) -> Iterator[Entry]:
        case, x, device, dtype = self.case, self.x, self.device, self.setting.dtype
        compiled = rivals.compiled()
        for fraction in (0.0, *FRACTIONS):
            slots = self.rival_slots(fraction)
            name = percent(fraction)
            if fraction in (0.01, 0.1, 1.0):
                yield Entry("rivals", Variant(f"eager {name}", _eager(rivals.eager, x, case.seeds, slots)))
            if fraction in (0.0, 0.1) and not self.setting.tiny:
                yield Entry("rivals", Variant(f"compiled {name}", _eager(compiled, x, case.seeds, slots)))
        slots = self.rival_slots(0.1)
        held = torch.full((case.seeds,), -1, dtype=torch.int32, device=device)
        held[slots.seeds] = torch.arange(len(slots.seeds), dtype=torch.int32, device=device)
        measured = torch.zeros(4, case.seeds, device=device)
        yield Entry(
            "rivals",
            Variant("per_seed 10%", lambda i: rivals.per_seed(x[i], case.seeds, held, slots, measured)),
        )
        weight = torch.randn(case.features, case.features, device=device).to(dtype) * case.features**-0.5
        bias = torch.zeros(case.features, device=device, dtype=dtype)
        yield Entry("rivals", Variant("linear", lambda i: rivals.linear(x[i], weight, bias)))
        into = weight[:, :RANK_OF_LORA].contiguous()
        out = weight[:RANK_OF_LORA].contiguous()
        y = self.dy
        yield Entry("rivals", Variant("lora", lambda i: rivals.lora(x[i], y[i], into, out)))

    def rival_slots(self, fraction: float) -> rivals.Slots:
        """The seeds that are active at that share, with fresh parameters in the activation's dtype."""
        case, device = self.case, self.device
        none = torch.zeros(0, dtype=torch.int64, device=device)
        seeds = self.site_at(fraction).bank.known.seed if fraction else none
        count = len(seeds)
        shapes = ((case.chunk, case.rank), (case.rank,), (case.rank, case.chunk), (case.chunk,))
        weights = tuple(torch.randn(count, *shape, device=device) * 0.1 for shape in shapes)
        alpha = torch.full((count,), ALPHA, device=device)
        return rivals.slots_of(seeds, case.features, case.seeds, alpha, weights, self.setting.dtype)

    def finite(self) -> bool:
        """Whether activations and gradients still are about what they were, after all that was done in place."""
        made = [vars(self)[name] for name in ("x", "dy") if name in vars(self)]
        return all(bool(one.float().abs().amax() < 100) for buffers in made for one in buffers.each)


def _backward(
    backward: Callable[..., None], dy: Buffers, dx: Buffers, stash: Buffers
) -> Callable[[int], object]:
    return lambda i: backward(dy[i], dx[i], stash[i])


def _eager(
    function: Callable[..., Any], x: Buffers, seeds: int, slots: rivals.Slots
) -> Callable[[int], object]:
    return lambda i: function(x[i], seeds, slots)
