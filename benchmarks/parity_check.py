"""One spec through all its kernels, beside float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from msgspec.structs import replace
from parity_reference import Errors, Group, adamw, gathered, groups, reconstruction, site, telemetry
from parity_spec import Spec
from sites import bank
from torch import Tensor

from morphc.errors import UnsupportedKernelError
from morphc.kernels import active, gradient, launch, training, tuning
from morphc.kernels import telemetry as kernels
from morphc.kernels.layout import View, view_of
from morphc.kernels.reference import health
from morphc.kernels.reference.telemetry import as_rows
from morphc.kernels.spec import KernelSpec
from morphc.lifecycle import BLENDS, ISOLATED, TRAINS

RATES = training.Rates(1e-3)
SPOILT = (float("nan"), float("inf"), -float("inf"))


class Memory:
    """An activation with the memory that it lies in, gaps included: `storage` flat, `tensor` a view of it."""

    def __init__(self, spec: Spec, values: Tensor, gap: int) -> None:
        """values: of the spec's shape, in any layout."""
        like = torch.empty(spec.shape, device="meta")
        if spec.layout == "channels_last":
            like = like.to(memory_format=torch.channels_last)
        self.shape, self.axis = spec.shape, spec.axis
        self.strides = (spec.features + gap, 1) if gap else like.stride()
        size = values.numel() + gap * spec.rows
        self.storage = torch.full((size,), 7.0, dtype=values.dtype, device=values.device)
        self.tensor.copy_(values)

    @property
    def tensor(self) -> Tensor:
        """As the model sees it."""
        return self.storage.as_strided(self.shape, self.strides)

    @property
    def rows(self) -> Tensor:
        """[rows, features]; a copy where the features don't come last in memory."""
        return as_rows(self.tensor, self.axis)

    @property
    def view(self) -> View:
        """How the kernels walk it; of no rows too."""
        found = view_of(self.tensor, self.axis)
        if found is None:
            assert self.tensor.numel() == 0
            inner = self.shape[2] * self.shape[3] if self.strides[self.axis] != 1 else 1
            walk = "channels_first" if inner > 1 else "last"
            found = View(walk, 0, self.strides[0], inner)
        return found

    def clone(self) -> Memory:
        """The same somewhere else."""
        other = object.__new__(Memory)
        other.__dict__ |= self.__dict__ | {"storage": self.storage.clone()}
        return other

    def differs_only_in(self, columns: Tensor, before: Memory) -> bool:
        """Whether all bits but those of some features are the ones of `before`."""
        restored = self.clone()
        restored.tensor.index_copy_(self.axis, columns, before.tensor.index_select(self.axis, columns))
        return same_bits(restored.storage, before.storage)


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Of float tensors of one type; a NaN equals itself, and 0 is not -0."""
    words = {2: torch.int16, 4: torch.int32}[one.element_size()]
    return torch.equal(one.contiguous().view(words), other.contiguous().view(words))


@dataclass
class Check:
    """The data of one spec, its kernels, and what was found so far."""

    spec: Spec
    device: torch.device
    problems: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    errors: Errors = field(default_factory=Errors)

    def __post_init__(self) -> None:
        spec = self.spec
        self.dtype: torch.dtype = getattr(torch, spec.dtype)
        self.generator = torch.Generator(device=self.device).manual_seed(spec.number)
        self.x = Memory(spec, self.values(), spec.gap)
        # Gradients come from elsewhere, and needn't have the gaps of the activation.
        self.dy = Memory(spec, self.values(), 0)
        if spec.nonfinite:
            self.spoil(self.x.tensor)
        self.view = self.x.view
        self.bank = bank(
            features=spec.features,
            seeds=spec.seeds,
            rank=spec.rank,
            slots=spec.slots,
            blending=spec.blending,
            isolated=spec.isolated,
            dtype=self.dtype,
            device=self.device,
            blueprint=spec.blueprint,
            blend=spec.blend,
            walk=self.view.walk,
            draw=spec.number,
            tap=spec.tap,
            activation=spec.activation,
            gated=spec.gated,
        )
        self.known = self.bank.known
        lister = active.ActiveList(self.device)
        self.listed = lister.new(spec.slots)
        of = self.bank
        lister(of.owner, of.lifecycle, of.alpha, self.listed, BLENDS, ISOLATED, TRAINS)

    def values(self) -> Tensor:
        """Normal, around a mean of 0.2."""
        spec = self.spec
        drawn = torch.randn(spec.shape, generator=self.generator, device=self.device)
        return (drawn + 0.2).to(self.dtype)

    def spoil(self, x: Tensor) -> None:
        """Put a few values in that are not finite."""
        g = torch.Generator().manual_seed(self.spec.number)
        moved = x.movedim(self.spec.axis, -1)
        for turn in range(self.spec.nonfinite):
            row = torch.randint(self.spec.rows, (), generator=g)
            feature = int(torch.randint(self.spec.features, (), generator=g))
            place = tuple(int(at) for at in torch.unravel_index(row, moved.shape[:-1]))
            moved[(*place, feature)] = SPOILT[turn % 3]

    def kernel_spec(self, kind: str) -> KernelSpec:
        """Of one of the bank's kernels."""
        return replace(self.bank.spec, kind=kind)

    def expect(self, holds: bool, problem: str) -> None:
        """Note a problem."""
        if not holds and problem not in self.problems:
            self.problems.append(problem)

    def groups(self) -> list[Group]:
        """The listed seeds in groups that fit in memory; their chunks are made anew each time."""
        return groups(self.x.rows, self.spec.seeds, self.spec.rank, self.known)

    def phases(self) -> tuple[Callable[[], object], ...]:
        """What there is to check, one independent of the other."""
        return self.telemetry, self._learning, lambda: self._unless_refused(self.train)

    def _learning(self) -> None:
        """Forward, backward, and AdamW from its gradients."""
        stash = self.forward()
        self._unless_refused(lambda: self.step(self.backward(stash)))

    def _unless_refused(self, phase: Callable[[], object]) -> None:
        """What no kernel is made for runs on torch: say so and check the rest."""
        try:
            phase()
        except UnsupportedKernelError as error:
            self.skipped.append(str(error))

    def columns(self, which: Tensor) -> Tensor:
        """Features of the listed seeds where `which` [A] is true."""
        seed = self.known.seed[which]
        base, wider = divmod(self.spec.features, self.spec.seeds)
        start = seed * base + seed.clamp(max=wider)
        column = torch.arange(self.spec.chunk, device=self.device)
        inside = column < ((seed < wider).long() + base).unsqueeze(1)
        return (start.unsqueeze(1) + column)[inside]

    def telemetry(self) -> None:
        """Two samples of values of their own, in float32 and in float64 cells; the first of these twice."""
        spec = self.spec
        of = kernels.spec_of(spec.features, spec.seeds, self.dtype, self.view.walk, spec.epilogue)
        if kernels.refuses(of, spec.near_zero):
            self.skipped.append(kernels.refuses(of, spec.near_zero))
            return
        samples = [self._sample() for _ in range(2)]
        kernel = kernels.Telemetry(of, spec.near_zero, self.device)
        found = []
        # Compiling is most of a spec's time, and the passes over float64 cells differ in little.
        for exact in (False, False, True) if spec.number % 4 == 0 else (False, False):
            sums = torch.zeros(8, spec.seeds + 3, dtype=torch.float64, device=self.device)
            counts = torch.zeros(3, spec.seeds + 3, dtype=torch.int64, device=self.device)
            cells = kernel.new_cells(self.view, exact=exact)
            kernel.shift(samples[0].tensor, self.view, sums, counts, 2)
            for sample in samples:
                kernel(sample.tensor, sample.view, cells, sums, counts, 2)
            kernel.merge(cells, sums, counts, 2)
            self.expect(
                not sums[:, :2].any() and not sums[:, -1].any() and not counts[:, :2].any(),
                "telemetry: a neighbour's state was written",
            )
            found.append((sums[:, 2:-1], counts[:, 2:-1]))
        again = all(torch.equal(a, b) for a, b in zip(found[0], found[1], strict=True))
        self.expect(again, "telemetry: other bits a second time")
        for name, measured in (("telemetry", found[0]), ("telemetry exact", found[-1])):
            if name == "telemetry" or len(found) == 3:
                self._compare_telemetry(name, *measured, samples)

    def _sample(self) -> Memory:
        spec = self.spec
        drawn = torch.randn(spec.shape, generator=self.generator, device=self.device)
        zero = torch.rand(spec.shape, generator=self.generator, device=self.device) < 0.1
        values = torch.where(zero & (abs(spec.offset) < 100), 0.0, drawn * spec.scale + spec.offset)
        sample = Memory(spec, values.to(self.dtype), spec.gap)
        if spec.nonfinite:
            self.spoil(sample.tensor)
        return sample

    def _compare_telemetry(self, name: str, sums: Tensor, counts: Tensor, samples: list[Memory]) -> None:
        spec = self.spec
        parts = [
            telemetry(sample.rows, spec.seeds, sums[health.SHIFT], spec.epilogue, spec.near_zero)
            for sample in samples
        ]
        wanted = {
            field: torch.maximum(parts[0][field], parts[1][field])
            if field == "peak"
            else parts[0][field] + parts[1][field]
            for field in parts[0]
        }
        self.expect(bool((counts[health.ROWS] == 2 * spec.rows).all()), f"{name}: rows are miscounted")
        lost = torch.equal(counts[health.NONFINITE].double(), wanted["nonfinite"])
        self.expect(lost, f"{name}: values that are not finite are miscounted")
        self.errors.add(f"{name} total", sums[health.SUM], wanted["total"])
        self.errors.add(f"{name} squares", sums[health.SQUARES], wanted["squares"])
        self.errors.add(f"{name} row_squares", sums[health.ROW_SQUARES], wanted["row_squares"])
        self.errors.add(f"{name} peak", sums[health.PEAK], wanted["peak"])
        # Exactly as many, but for ties (of float32 alone), which may be judged either way.
        beyond = (sums[health.ZEROS] - wanted["zeros"]).abs() > wanted["ties"]
        self.expect(not beyond.any(), f"{name}: the dead are miscounted")
        zeros = torch.where(beyond, sums[health.ZEROS], wanted["zeros"])
        self.errors.add(f"{name} zeros", zeros, wanted["zeros"])

    def forward(self) -> Tensor:
        """With and without a stash, twice; gives the stash."""
        spec = self.kernel_spec("forward")
        kernel = active.Forward(spec, tuning.choose(spec, self.spec.rows), self.device)
        shape = active.stash_shape(spec, self.view)
        stash = torch.full(shape, 5.0, dtype=self.dtype, device=self.device)
        params = self.bank.values
        out = self.x.clone()
        kernel(out.tensor, self.view, self.listed, params, stash)
        self.expect(
            out.differs_only_in(self.columns(self.known.blends), self.x),
            "forward: something that no seed blends into has changed",
        )
        without = (None,) if self.spec.number % 2 else ()
        bare: Tensor | None = None
        for saved in (*without, torch.full_like(stash, 5.0)):
            again = self.x.clone()
            kernel(again.tensor, self.view, self.listed, params, saved)
            if saved is None:
                bare = again.rows
            else:
                self.expect(same_bits(again.storage, out.storage), "forward: other bits a second time")
                self.expect(same_bits(saved, stash), "forward: another stash a second time")
        rows = out.rows
        for group in self.groups():
            result = site(
                group, self.known, self.bank.params, self.spec.blueprint, self.spec.blend, self.bank.geometry
            )
            got = gathered(rows, group.columns, group.inside)
            self.errors.add("forward", got, self._own(group, result.y), group.spoilt_rows)
            if (
                bare is not None
            ):  # another kernel than the one that saves, and what it does again is more or less
                got = gathered(bare, group.columns, group.inside)
                self.errors.add("forward without a stash", got, self._own(group, result.y), group.spoilt_rows)
            self._check_stash(group, stash)
        return stash

    def _own(self, group: Group, value: Tensor) -> Tensor:
        return torch.where(group.inside.unsqueeze(1), value, 0)

    def _check_stash(self, group: Group, stash: Tensor) -> None:
        saved = stash[group.part][: len(group.x)]
        if self.view.walk == "channels_first":
            saved = saved.transpose(1, 2)
        saved = torch.where(group.inside.unsqueeze(1), saved, 0).double()
        self.expect(
            torch.equal(saved.nan_to_num(nan=0.5), group.x.nan_to_num(nan=0.5)),
            "forward: the stash is not what was there before",
        )

    def backward(self, stash: Tensor) -> list[Tensor]:
        """On a copy, and where it can making the copy itself; twice. Then in place. Gives the slots' gradients."""
        spec = self.kernel_spec("backward")
        config = gradient.default(spec, self.spec.rows)
        kernel = gradient.Backward(spec, config, self.device)
        size = spec.slots * gradient.gradient_size(spec)
        untouched = self.dy.clone()
        # Where the kernel makes the copy itself its programs share the rows otherwise, and sums have other bits.
        found: dict[bool, tuple[Memory, Tensor]] = {}
        for copied in (True, True, False, False):
            if not copied and not (kernel.copies and self.spec.number % 2 == 0):
                continue
            dx = self.dy.clone()
            if not copied:
                dx.storage.fill_(3.0)
            flat = torch.full((size,), 9.0, device=self.device)
            kernel(
                self.dy.tensor, self.dy.view, dx.tensor, dx.view, self.listed, self.bank.values, stash, flat,
                copied=copied,
            )  # fmt: skip
            first, grads = found.setdefault(copied, (dx, flat))
            same = same_bits(first.storage, dx.storage) and same_bits(grads, flat)
            self.expect(same, "backward: other bits a second time")
        dx, flat = found[True]
        own, sums = self.dy.clone(), torch.full((size,), 9.0, device=self.device)
        if self.spec.rows:
            kernel.bound(own.view, launch.Resident(self.bank.values))(own.tensor, self.listed, stash, sums)
            same = same_bits(own.storage, dx.storage) and same_bits(sums, flat)
            self.expect(same, "backward: other bits where it may write the gradient it gets")
        if False in found:
            other, grads = found[False]
            self.expect(same_bits(other.storage, dx.storage), "backward: other bits where it copies")
            drift = (grads - flat).norm() / flat.norm().clamp(min=1e-30)
            self.expect(not drift > 1e-5, "backward: other gradients where it copies")
        self.expect(same_bits(self.dy.storage, untouched.storage), "backward: grad_output was written")
        self.expect(
            dx.differs_only_in(self.columns(self.known.blends), self.dy),
            "backward: the gradient has changed where no seed blends",
        )
        named = gradient.sections(spec, flat)
        self._compare_gradients(dx, named)
        return [named[name] for name in self.bank.params]

    def _compare_gradients(self, dx: Memory, named: Mapping[str, Tensor]) -> None:
        free = torch.ones(self.spec.slots, dtype=torch.bool, device=self.device)
        free[self.known.slot[self.known.trains]] = False
        for name, grad in named.items():
            self.expect(not grad[free].any(), f"backward: {name} has a gradient where nothing trains")
        rows, dy_rows = dx.rows, self.dy.rows
        for group in self.groups():
            dy = gathered(dy_rows, group.columns, group.inside)
            result = site(
                group, self.known, self.bank.params, self.spec.blueprint, self.spec.blend, self.bank.geometry, dy
            )  # fmt: skip
            got = gathered(rows, group.columns, group.inside)
            self.errors.add("dx", got, self._own(group, result.dx), group.spoilt_rows)
            for name, grad in result.grads.items():
                got = named[name][self.known.slot[group.part]]
                self.errors.add(f"grad {name}", got, grad, group.spoilt_slots(grad))

    def trained(self, seed: int) -> training.Bank:
        """The bank with moments of its own."""
        g = torch.Generator(device=self.device).manual_seed(seed)
        params = [value.clone() for value in self.bank.values]
        means = [torch.randn(p.shape, generator=g, device=self.device) * 0.1 for p in params]
        squares = [torch.rand(p.shape, generator=g, device=self.device) * 0.01 + 1e-3 for p in params]
        step = torch.randint(0, 50, (self.spec.slots,), generator=g, device=self.device)
        return training.Bank(params, means, squares, step)

    def step(self, grads: list[Tensor]) -> None:
        """AdamW from gradient buffers."""
        clean = [torch.randn(g.shape, generator=self.generator, device=self.device) for g in grads]
        given = [torch.where(grad.isfinite(), grad, fresh) for grad, fresh in zip(grads, clean, strict=True)]
        before, after = self.trained(1), self.trained(1)
        spec = self.kernel_spec("train")
        trainer = training.Trainer(spec, training.default(spec, self.spec.rows), self.device)
        trainer.step(self.listed, after, torch.cat([grad.flatten() for grad in given]), RATES)
        trains = self.known.slot[self.known.trains]
        self._compare_step("adamw", before, after, trains, [grad[trains] for grad in given])

    def train(self) -> None:
        """A reconstruction step of the isolated seeds, twice."""
        if not self.spec.rows:
            return
        spec = self.kernel_spec("train")
        trainer = training.Trainer(spec, training.default(spec, self.spec.rows), self.device)
        before, after, again = self.trained(2), self.trained(2), self.trained(2)
        losses = []
        for trained in (after, again):
            loss = torch.full((spec.slots,), -1.0, device=self.device)
            trainer.reconstruct(self.x.tensor, self.view, self.listed, trained, loss, RATES)
            losses.append(loss)
        same = all(same_bits(a, b) for a, b in zip(_tensors(after), _tensors(again), strict=True))
        self.expect(same and same_bits(*losses), "train: other bits a second time")
        isolated = self.known.isolated
        slots = self.known.slot[isolated]
        others = torch.ones_like(losses[0], dtype=torch.bool)
        others[slots] = False
        self.expect(bool((losses[0][others] == -1).all()), "train: a loss of a slot that does not train")
        none = {name: value[:0].double() for name, value in self.bank.params.items()}
        grads = {name: [value] for name, value in none.items()}
        spoilt = [torch.zeros(0, dtype=torch.bool, device=self.device)]
        steps = [torch.zeros(0, dtype=torch.bool, device=self.device)]
        for group in self.groups():
            loss, found = reconstruction(
                group, self.known, self.bank.params, self.spec.blueprint, self.bank.geometry
            )
            own = isolated[group.part]
            spoilt.append(group.spoilt_slots(loss)[own])
            steps.append(loss[own].isfinite())
            self.errors.add("loss", losses[0][self.known.slot[group.part][own]], loss[own], spoilt[-1])
            for name, grad in found.items():
                grads[name].append(grad[own])
        # A slot whose loss isn't finite sits the step out.
        stepped = torch.cat(steps)
        joined = [torch.cat(grads[name])[stepped] for name in self.bank.params]
        self._compare_step("train", before, after, slots[stepped], joined, torch.cat(spoilt)[stepped])

    def _compare_step(
        self,
        what: str,
        before: training.Bank,
        after: training.Bank,
        slots: Tensor,
        grads: list[Tensor],
        spoilt: Tensor | None = None,
    ) -> None:
        rest = torch.ones(self.spec.slots, dtype=torch.bool, device=self.device)
        rest[slots] = False
        for old, new in zip(_tensors(before), _tensors(after), strict=True):
            self.expect(same_bits(old[rest], new[rest]), f"{what}: a slot that does not train has changed")
        old_step, new_step = before.step, after.step
        moved = torch.equal(new_step[slots], old_step[slots] + 1) and torch.equal(
            new_step[rest], old_step[rest]
        )
        self.expect(moved, f"{what}: the slots' steps are not those that trained, plus one")
        for index, grad in enumerate(grads):
            reference = adamw(
                before.params[index][slots].double(),
                grad.double(),
                before.means[index][slots].double(),
                before.squares[index][slots].double(),
                old_step[slots] + 1,
                lr=RATES.lr,
            )
            for name, of, wanted in zip(
                ("param", "mean", "square"),
                (after.params, after.means, after.squares),
                reference,
                strict=True,
            ):
                broken = None if spoilt is None else spoilt.view(-1, *(1,) * (wanted.dim() - 1))
                self.errors.add(f"{what} {name}", of[index][slots], wanted, broken)


def _tensors(trained: training.Bank) -> list[Tensor]:
    return [*trained.params, *trained.means, *trained.squares]
