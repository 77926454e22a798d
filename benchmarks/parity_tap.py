"""One spec whose blueprint reads the layer's or the block's input, through its kernels, beside float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from parity_check import Check, Memory, same_bits
from parity_reference import Group, gathered, groups, site
from torch import Tensor

from morphc.kernels.active import target_of
from morphc.kernels.tap import plan
from morphc.kernels.tap_join import TapSeeds, refuses, shape_of
from morphc.kernels.tuning import bucket


class TapCheck(Check):
    """The same site with a tap [rows, T]."""

    def __post_init__(self) -> None:
        super().__post_init__()
        spec = self.spec
        drawn = torch.randn(spec.rows, spec.tap, generator=self.generator, device=self.device)
        self.tap = (drawn * 0.7).to(self.dtype)

    def phases(self) -> tuple[Callable[[], object], ...]:
        """See Check.phases."""
        return self.telemetry, self.tapped

    def groups(self) -> list[Group]:
        """See Check.groups."""
        return groups(self.x.rows, self.spec.seeds, self.spec.rank, self.known, self.spec.tap)

    def tapped(self) -> None:
        """Forward and backward, each twice."""
        kernel_spec = self.kernel_spec("forward")
        if reason := refuses(kernel_spec, self.bank.geometry):
            self.skipped.append(reason)
            return
        parts = shape_of(kernel_spec, self.bank.geometry).parts
        tiles = plan(kernel_spec, bucket(self.spec.rows), parts, target_of(self.device))
        seeds = TapSeeds(kernel_spec, self.bank.geometry, self.device, plan=tiles)
        first, second = self._once(seeds), self._once(seeds)
        for name in first:
            self.expect(same_bits(first[name], second[name]), f"{name}: other bits a second time")
        out, dx = self.x.clone(), self.dy.clone()
        out.storage, dx.storage = first.pop("forward"), first.pop("dx")
        columns = self.columns(self.known.blends)
        self.expect(
            out.differs_only_in(columns, self.x), "forward: something that no seed blends into changed"
        )
        self.expect(dx.differs_only_in(columns, self.dy), "dx: something that no seed blends into changed")
        free = torch.ones(self.spec.slots, dtype=torch.bool, device=self.device)
        free[self.known.slot[self.known.trains]] = False
        for name, grad in first.items():
            if name != "d_tap":
                self.expect(not grad[free].any(), f"{name}: not zero where nothing trains")
        self._compare(out, dx, first)

    def _once(self, seeds: TapSeeds) -> dict[str, Tensor]:
        """All that comes out, in fresh memory."""
        params = self.bank.params
        out = self.x.clone()
        stash = None
        if seeds.stashes:
            shape = (self.spec.slots, self.spec.rows, self.spec.chunk)
            stash = torch.full(shape, 5.0, dtype=self.dtype, device=self.device)
        z, packed = seeds.project(self.tap, self.listed, params)
        seeds.join(out.tensor, self.view, self.listed, params, z, stash)
        dy, dx = self.dy.clone(), self.dy.clone()
        dz, grads = seeds.backward(
            dy.tensor,
            dy.view,
            self.listed,
            params,
            z,
            stash,
            None if self.spec.blend == "residual" else dx.tensor,
        )
        self.expect(same_bits(dy.storage, self.dy.storage), "backward: grad_output was written")
        grads |= seeds.weight_gradients(self.tap, dz, self.listed, params)
        d_tap = seeds.tap_gradient(dz, self.listed, params, packed)
        return {"forward": out.storage, "dx": dx.storage, "d_tap": d_tap} | {
            f"grad {name}": grad for name, grad in grads.items()
        }

    def _compare(self, out: Memory, dx: Memory, grads: Mapping[str, Tensor]) -> None:
        tap = self.tap.double()
        d_tap = torch.zeros_like(tap)
        # What the kernels multiply the tap by is rounded to its type, as autocast does; behind a ReLU a hidden unit
        # that is about zero is on one side of it or on the other.
        params = {
            name: value.to(self.dtype).float() if name.endswith("in_weight") else value
            for name, value in self.bank.params.items()
        }
        rows, dx_rows, dy_rows = out.rows, dx.rows, self.dy.rows
        for group in self.groups():
            dy = gathered(dy_rows, group.columns, group.inside)
            result = site(
                group, self.known, params, self.spec.blueprint, self.spec.blend, self.bank.geometry, dy, tap
            )
            got = gathered(rows, group.columns, group.inside)
            self.errors.add("tap forward", got, self._own(group, result.y), group.spoilt_rows)
            got = gathered(dx_rows, group.columns, group.inside)
            self.errors.add("tap dx", got, self._own(group, result.dx), group.spoilt_rows)
            for name, grad in result.grads.items():
                got = grads[f"grad {name}"][self.known.slot[group.part]]
                self.errors.add(f"tap grad {name}", got, grad, group.spoilt_slots(grad))
            if result.d_tap is not None:
                d_tap += result.d_tap
        self.errors.add("tap d_tap", grads["d_tap"], d_tap, self._spoilt_tap())

    def _spoilt_tap(self) -> Tensor:
        """[rows, 1]: where the site's own values are not finite; what flows to the tap passes through them."""
        return ~self.x.rows.isfinite().all(1, keepdim=True)
