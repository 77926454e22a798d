"""What is measured of seeds in TRAINING, the reconstruction that some of them learn, and the refit at the graft.

A seed in isolation learns from g, the task's gradient at its chunk, while the host keeps y untouched. On every n-th
training forward the sums below are taken, each an average that forgets (`DECAY`), all on the device:

    gs = <g, s>, ss = |s|^2, gg = |g|^2, xx = |x|^2 of the chunk      site = |g|^2 over the whole site
    gram = h'h, cross = h'g                                           h: what the out-weights multiply

`s` is made by the parameters that the step's own gradient hasn't touched yet, so gs is a forecast and not a fit:
the share of the chunk's squared gradient that the seed takes away when its scale is refitted is
-sign(gs) gs^2 / (gg ss), its `isolated_improvement`. The best candidate is the one whose out-weights, refitted by
least squares, take most away: tr(cross' gram^-1 cross) / gg.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from morphc.kernels.reference.train import reconstruct
from morphc.lifecycle import TABLE, Lifecycle
from morphc.runtime import active, reconstructing
from morphc.runtime.lasting import lasting

if TYPE_CHECKING:
    from morphc.runtime.active import Slots
    from morphc.runtime.bank import SlotBank
    from morphc.runtime.reconstructing import Saved
    from morphc.runtime.site import SeedSite
    from morphc.runtime.store import SeedStore

DECAY: Final = 0.95
RIDGE: Final = 1e-6
LARGEST: Final = 3.0
"""A refitted seed's output is at most so many times as large as its chunk: the curvature is an estimate."""
SCALARS: Final = ("gs", "ss", "gg", "xx", "site", "loss", "steps", "lost")


class Fit:
    """The sums of one bank: `SCALARS` [K] float32, `gram` [K, R, R] and `cross` [K, R, C] where there is an h."""

    def __init__(self, bank: SlotBank, device: torch.device) -> None:
        self.saved: Saved | None = None
        self.summed = False
        self.sums = {name: torch.zeros(bank.slots, device=device) for name in SCALARS}
        out = bank.kind.outs(bank.geometry)
        if bank.kind.has_basis(bank.geometry):
            rank, chunk = bank.get_parameter(out[0]).shape[1:]
            self.sums["gram"] = torch.zeros(bank.slots, rank, rank, device=device)
            self.sums["cross"] = torch.zeros(bank.slots, rank, chunk, device=device)

    def __getstate__(self) -> dict[str, Any]:
        # What kernels have saved for the coming step is theirs; a copy has none, as it has no gradients of the host's.
        return {**self.__dict__, "saved": None}

    @torch.no_grad()
    def forget(self, slot: int) -> None:
        """Begin anew for a slot."""
        for value in self.sums.values():
            value[slot] = 0

    @torch.no_grad()
    def add(self, found: dict[str, Tensor], chosen: Tensor) -> None:
        """Let one step's sums in, of the slots where `chosen`; `lost` averages how many had something not finite."""
        finite = torch.ones_like(chosen)
        for value in found.values():
            finite &= value.reshape(value.shape[0], -1).isfinite().all(1)
        good = chosen & finite
        first = self.sums["steps"] == 0
        for name, value in found.items():
            old = self.sums[name]
            shape = (-1, *(1,) * (old.dim() - 1))
            mixed = torch.where(first.view(shape), value, old * DECAY + value * (1 - DECAY))
            old.copy_(torch.where(good.view(shape), mixed, old))
        self.sums["steps"] += good
        lost = self.sums["lost"]
        kept = torch.where(first & (lost == 0), (~finite).float(), lost * DECAY + ~finite * (1 - DECAY))
        lost.copy_(torch.where(chosen, kept, lost))

    @torch.no_grad()
    def summary(self) -> Tensor:
        """[4, K]: isolated improvement, loss (reconstruction, else <g, s>), steps, lost."""
        gs, loss = self.sums["gs"], self.sums["loss"]
        share = -gs.sign() * gs.square() / (self.sums["gg"] * self.sums["ss"])
        return torch.stack((share, loss, self.sums["steps"], self.sums["lost"]))

    @torch.no_grad()
    def explained(self, slots: list[int]) -> list[float]:
        """For each slot, the share of the chunk's squared gradient that the refit takes away; NaN if not measured."""
        if "gram" not in self.sums:
            found: list[float] = self.summary()[0][slots].abs().tolist()
            return found
        gram, cross = self.sums["gram"][slots].double(), self.sums["cross"][slots].double()
        taken = (cross * solve(gram, cross)).sum((1, 2))
        shares: list[float] = (taken / self.sums["gg"][slots].double()).tolist()
        return shares

    @torch.no_grad()
    def told(self, slots: list[int]) -> list[dict[str, float]]:
        """What was measured of each slot, NaN where nothing was; the names of `SiteHandle.candidates`."""
        rows = [*self.summary()[[0, 2, 3]], self.sums["gg"], self.sums["site"]]
        share, steps, lost, chunk, site = torch.stack(rows)[:, slots].tolist()
        explained = self.explained(slots)
        return [
            {
                "isolated_improvement": share[place],
                "explained": explained[place],
                "chunk_gradient": chunk[place] if steps[place] else float("nan"),
                "site_gradient": site[place] if steps[place] else float("nan"),
                "finite_gradients": 1.0 - lost[place],
                "steps": steps[place],
            }
            for place in range(len(slots))
        ]


def solve(gram: Tensor, cross: Tensor) -> Tensor:
    """gram^-1 cross, [K, R, C] float64, with a ridge that keeps dead units' weights at zero."""
    rank = gram.shape[-1]
    level = gram.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=1e-30) * RIDGE
    ridge = level.view(-1, 1, 1) * torch.eye(rank, dtype=gram.dtype, device=gram.device)
    found: Tensor = torch.linalg.solve(gram + ridge, cross)
    return found


class Fitting:
    """The sums of a site's banks, and what its forward does for them while seeds train in isolation.

    shared: other ranks train the same slots, so that reconstruction's gradients are summed and not taken at once.
    """

    def __init__(self, every: int, shared: bool = False) -> None:
        self.every = every
        self.shared = shared
        self.count = 0
        self.fits: dict[str, Fit] = {}

    def fit(self, name: str, bank: SlotBank) -> Fit:
        """The sums of a bank, on its device."""
        device = bank.owner.device
        found = self.fits.get(name)
        if found is None or found.sums["gs"].shape[0] != bank.slots:
            fresh = lasting(lambda: Fit(bank, device), device)
            for key, value in found.sums.items() if found is not None else ():
                fresh.sums[key][: value.shape[0]] = value
            found = self.fits[name] = fresh
        if found.sums["gs"].device != device:
            found.sums = {key: value.to(device) for key, value in found.sums.items()}
        return found

    def skipped(self) -> bool:
        """Count one training forward if it is none to measure; whether it was."""
        if self.count % self.every == 0:
            return False
        self.count += 1
        return True

    def due(self) -> bool:
        """Count one training forward; whether it is one to measure."""
        self.count += 1
        return (self.count - 1) % self.every == 0


def straight(site: SeedSite) -> bool:
    """Whether isolated seeds of the site learn from the task's gradient."""
    return bool(site.isolated_states)


def follow(store: SeedStore, site: SeedSite, states: set[Lifecycle]) -> None:
    """Measure at the site while one of its seeds is in a state that trains in isolation."""
    isolated = any(TABLE[state].trains == "isolated" for state in states)
    if isolated and site.fitting is None:
        site.fitting = Fitting(store.config.isolation_every, store.shared)
    elif not isolated:
        site.fitting = None


def tap_of(
    site: SeedSite, bank: SlotBank, layer_input: Tensor | None, block_input: Tensor | None
) -> Tensor | None:
    """What the bank's blueprint reads besides its chunk; None for a chunk tap, or where there is nothing."""
    return {"chunk": None, "layer": layer_input, "block": block_input}[bank.kind.tap]


@torch.no_grad()
def watch(
    site: SeedSite, fitting: Fitting, y: Tensor, layer_input: Tensor | None
) -> list[Callable[[Tensor], None]]:
    """Look at a training forward before the site changes anything; what to call with the gradient at its value."""
    hooks: list[Callable[[Tensor], None]] = []
    if not isinstance(y, Tensor) or not y.is_floating_point() or y.is_nested or y.layout != torch.strided:
        return hooks
    learns = not straight(site)
    due = fitting.due()
    if not (due or learns) or y.shape[site.feature_axis] != site.features:
        return hooks
    described = site._states_on(y.device)
    for name, bank in site.slots.items():
        tap = tap_of(site, bank, layer_input, site.block_input)
        if tap is None and bank.kind.tap != "chunk":
            continue
        slots = active.describe(site.owner_of(bank), *described, site.features, site.seeds)
        fit = fitting.fit(name, bank)
        if learns and bank.kind.tap == "chunk":
            _learn(site, name, bank, fit, y, slots, fitting.shared)
        elif due:
            hooks.append(_look(site, bank, fit, y, tap, slots))
    return hooks


def _learn(
    site: SeedSite, name: str, bank: SlotBank, fit: Fit, y: Tensor, slots: Slots, shared: bool
) -> None:
    """Let the seeds learn to give their chunk back: by kernels, or by gradients as a backward would add them up."""
    if fit.saved is None and not fit.summed and not shared:
        fit.saved = reconstructing.save(site, name, bank, y)
        if fit.saved is not None:
            return
    if fit.saved is not None:
        # Another forward before a step: from here on their gradients are summed.
        _reconstruct(bank, fit, reconstructing.by_slot(fit.saved, bank), slots)
        fit.saved = None
    _reconstruct(bank, fit, active.take(y.detach(), slots, site.feature_axis, bank.spatial), slots)
    fit.summed = True


def _reconstruct(bank: SlotBank, fit: Fit, x: Tensor, slots: Slots) -> None:
    """The gradient of giving the chunks x back, into the bank's buffer."""
    # Tensors of this graph are kept as they are: checkpoint's own hooks would wait for them to be computed again.
    as_is = torch.autograd.graph.saved_tensors_hooks(_itself, _itself)
    with torch.autocast(x.device.type, enabled=False), as_is:
        mask = slots.inside & slots.isolated.unsqueeze(1)
        mask = mask.view(*mask.shape[:1], 1, -1, *(1,) * (x.dim() - 3))
        loss, grads = _reconstruction(torch.where(mask, x, 0).to(torch.float32), slots, bank)
    for leaf, grad in zip(bank.leaves().values(), grads.values(), strict=True):
        own = torch.where(active.per_slot(slots.isolated, grad), grad, 0).to(leaf.dtype)
        leaf.grad = own if leaf.grad is None else leaf.grad.add_(own)
    fit.add({"loss": loss}, slots.isolated)


def _itself(tensor: Tensor) -> Tensor:
    return tensor


@torch.no_grad()
def step(site: SeedSite, name: str, bank: SlotBank, options: dict[str, Any]) -> None:
    """The step of what kernels have saved for it; nothing where gradients are in the bank's buffer instead."""
    fit = site.fitting.fits.get(name) if site.fitting is not None else None
    if fit is None:
        return
    saved, fit.saved, fit.summed = fit.saved, None, False
    if saved is not None and saved.versions == reconstructing.versions_of(site, bank):
        loss = reconstructing.step(bank, saved, options)
        fit.add({"loss": loss}, _isolated(site, bank))


def unscaled(site: SeedSite, bank: SlotBank) -> Tensor | None:
    """[K]: the slots whose gradients come from a loss of their own, which no scaler has multiplied; None for none."""
    return None if straight(site) else _isolated(site, bank)


def _isolated(site: SeedSite, bank: SlotBank) -> Tensor:
    states = site._states_on(bank.owner.device)
    return active.describe(site.owner_of(bank), *states, site.features, site.seeds).isolated


def _reconstruction(x: Tensor, slots: Slots, bank: SlotBank) -> tuple[Tensor, dict[str, Tensor]]:
    params = {name: leaf.detach() for name, leaf in bank.leaves().items()}
    if not bank.spatial:
        return reconstruct(x, slots.inside, params, bank.kind, bank.geometry)
    leaves = {name: param.requires_grad_() for name, param in params.items()}
    with torch.enable_grad():
        inside = slots.inside.view(*slots.inside.shape[:1], 1, -1, *(1,) * (x.dim() - 3))
        miss = torch.where(inside, bank.kind.apply(x, leaves, bank.geometry) - x, 0)
        positions = x.numel() // (x.shape[0] * x.shape[2])
        loss = miss.square().flatten(1).sum(1) / (positions * slots.inside.sum(1)).clamp(min=1)
        found = torch.autograd.grad(loss.sum(), list(leaves.values()), allow_unused=True)
    grads = {
        name: torch.zeros_like(leaf) if grad is None else grad
        for (name, leaf), grad in zip(leaves.items(), found, strict=True)
    }
    return loss.detach(), grads


def _look(
    site: SeedSite, bank: SlotBank, fit: Fit, y: Tensor, tap: Tensor | None, slots: Slots
) -> Callable[[Tensor], None]:
    """Keep s and h of this forward; with the gradient they make the sums."""
    axis, spatial, chosen = site.feature_axis, bank.spatial, slots.isolated
    kind, geometry = bank.kind, bank.geometry
    with torch.autocast(y.device.type, enabled=False):
        mask = active.per_slot(chosen, slots.inside)
        x = active.take(y.detach(), slots, axis, spatial).to(torch.float32)
        read = torch.where(active.per_slot(chosen, x), x, 0)
        if tap is not None:
            read = active.arrange(tap.detach().to(torch.float32), kind, geometry)
        params = {
            name: torch.where(active.per_slot(chosen, leaf), leaf.detach(), 0).to(torch.float32)
            for name, leaf in bank.leaves().items()
        }
        s = kind.apply(read, params, geometry)
        h = kind.basis(read, params, geometry) if kind.has_basis(geometry) else None
        inside = (slots.inside & mask).unsqueeze(1)
        if spatial:
            inside = inside.view(*inside.shape[:1], 1, -1, *(1,) * (s.dim() - 3))
        s = torch.where(inside, s, 0)
        xx = x.square().flatten(1).sum(1)

    def with_gradient(grad: Tensor) -> None:
        g = active.take(grad.detach(), slots, axis, spatial).to(torch.float32)
        g = torch.where(active.per_slot(chosen, g), g, 0)
        whole = grad.detach().to(torch.float32).square().sum()
        found = {
            "gs": (g * s).flatten(1).sum(1),
            "ss": s.square().flatten(1).sum(1),
            "gg": g.square().flatten(1).sum(1),
            "xx": xx,
            "site": whole.expand(chosen.shape[0]),
        }
        found["loss"] = found["gs"]
        if h is not None:
            found["gram"] = h.transpose(1, 2) @ h
            found["cross"] = h.transpose(1, 2) @ g
        fit.add(found, chosen)

    return with_gradient


@torch.no_grad()
def best_candidate(site: SeedSite, held: list[tuple[str, int]]) -> tuple[str, int]:
    """Of a seed's slots, the one whose refit lowers the loss most; the first where nothing was measured."""
    fitting = site.fitting
    if len(held) == 1 or fitting is None:
        return held[0]
    name = held[0][0]
    bank = site.slots.get(name)
    assert bank is not None
    fit = fitting.fit(name, bank)
    slots = [slot for _, slot in held]
    if straight(site):
        shares = fit.explained(slots)
    else:
        losses = fit.sums["loss"][slots].tolist()
        steps = fit.sums["steps"][slots].tolist()
        shares = [-loss if step else float("-inf") for loss, step in zip(losses, steps, strict=True)]
    order = sorted(
        range(len(slots)), key=lambda place: -shares[place] if shares[place] == shares[place] else 1.0
    )
    return held[order[0]]


@torch.no_grad()
def refit(site: SeedSite, name: str, slot: int, loss: float | None, share: float = 1.0) -> bool:
    """Give a slot's out-weights their least-squares size; whether that was possible.

    b = -(h'h)^-1 h'g / c, with the curvature of a squared loss, c = |g|^2 / (2 loss) over the whole site: so g / c is
    its residual, and for one unit b = -h'r / |h|^2. For other losses that is an estimate, which the Grower corrects by
    a line search (`morphc.grow.linesearch`). With blend `lerp` the seed replaces its chunk, and nothing is refitted.
    Without an h the seed's own output takes its place, and b is one
    factor on the out-weights. The result is at most `LARGEST` times as large as the chunk itself. share: part of the
    residual that this seed is to take, where several are grafted that explain the same. The slot's moments are
    cleared, and where the function between allows it (it must be homogeneous) in- and out-weights get equal norms.
    """
    fitting, bank = site.fitting, site.slots.get(name)
    if fitting is None or bank is None or name not in fitting.fits or not straight(site):
        return False
    if bank.blend == "lerp":
        return False
    sums = {key: value[slot].double() for key, value in fitting.fits[name].sums.items()}
    outs = bank.kind.outs(bank.geometry)
    if not outs or loss is None or not loss > 0 or not sums["steps"] > 0 or not sums["site"] > 0:
        return False
    curvature = sums["site"] / (2 * loss)
    params = {out: bank.get_parameter(out) for out in outs}
    if "gram" in sums:
        b = -solve(sums["gram"].unsqueeze(0), sums["cross"].unsqueeze(0))[0] / curvature * share
        size = (b * (sums["gram"] @ b)).sum()
        new = {out: param[slot] * 0 for out, param in params.items()}
        new[outs[0]] = b
    else:
        if not sums["ss"] > 0:
            return False
        factor = -sums["gs"] / (sums["ss"] * curvature) * share
        size = factor.square() * sums["ss"]
        new = {out: param[slot].double() * factor for out, param in params.items()}
    most = LARGEST**2 * sums["xx"]
    cap = torch.where(size > most, (most / size).sqrt(), 1.0)
    if not all(bool((value * cap).isfinite().all()) for value in new.values()):
        return False
    for out, value in new.items():
        params[out][slot] = (value * cap).to(params[out].dtype)
    balance(bank, slot)
    bank.forget_moments(slot)
    return True


@torch.no_grad()
def balance(bank: SlotBank, slot: int) -> None:
    """Equal norms of in- and out-weights where scaling one against the other changes nothing."""
    if not bank.kind.is_homogeneous(bank.geometry):
        return
    outs = bank.kind.outs(bank.geometry)
    ins = [name for name in bank.names if name.startswith("in_")]
    inner, outer = (
        torch.cat([bank.get_parameter(name)[slot].flatten() for name in group]).norm()
        for group in (ins, outs)
    )
    if not (inner > 0 and outer > 0):
        return
    # A power of two: only exponents change, so the product is the same to the last bit.
    factor = torch.exp2(torch.round(torch.log2(outer / inner) / 2))
    for name in ins:
        bank.get_parameter(name)[slot] *= factor
    for name in outs:
        bank.get_parameter(name)[slot] /= factor
