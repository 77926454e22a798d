"""Growth on a GPU: as on the CPU, with no read of the device between ticks, and one launch a tick."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import morphc
from morphc import Config, Lifecycle
from morphc.grow.controllers import Germinate

sys.path.append(str(Path(__file__).parents[1] / "grow"))

from growing import FAST, Task, host

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA device, and this machine has none"
)

GATES = {
    "min_isolated_improvement": -1.0,
    "min_contribution": -10.0,
    "cull_contribution": -20.0,
    "min_improvement": -10.0,
    "min_stability": 0.0,
    "min_final_stability": 0.0,
}
TICK = 4
ALL_THE_WAY = {
    Lifecycle.GERMINATED,
    Lifecycle.TRAINING,
    Lifecycle.GRAFTING,
    Lifecycle.STABILIZATION,
    Lifecycle.EVALUATING,
    Lifecycle.FINE_TUNING,
    Lifecycle.FOSSILIZED,
}


class Run:
    """One training run with one seed, which passes every gate, on one device and backend."""

    def __init__(self, device: str, backend: str, blueprint: str, plain: nn.Module) -> None:
        self.task = Task()
        for name in ("x", "y", "vx", "vy"):
            setattr(self.task, name, getattr(self.task, name).to(device))
        config = Config(
            seeds_per_layer=2, slots=2, rank=4, blueprint=blueprint, backend=backend, telemetry_every=1,
            **{**FAST, **GATES},
        )  # fmt: skip
        fresh = copy.deepcopy(plain).to(device)
        self.model = morphc.compile(fresh, (self.task.x[0],), config=config)
        own = [p for name, p in self.model.named_parameters() if "morphc" not in name.split(".")]
        self.optimizer = torch.optim.SGD(own, lr=0.02)
        controller = morphc.ScheduleController([(1, Germinate("0", (1,), blueprint=blueprint))])
        self.grower = morphc.Grower(
            self.model, self.optimizer, controller=controller, evaluate=self.task.validate, tick_every=TICK
        )
        self.losses: list[float] = []
        self.seen: set[Lifecycle] = set()

    def step(self, number: int) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.task.loss(self.model, number)
        loss.backward()
        self.optimizer.step()
        self.grower.step(loss)
        return loss.detach()

    def run(self, steps: int, careful: bool = False) -> None:
        """careful: reading the device raises in every step that has no tick."""
        for number in range(steps):
            ticks = (number + 1) % TICK == 0
            if careful and number >= TICK and not ticks:
                torch.cuda.synchronize()
                torch.cuda.set_sync_debug_mode("error")
            try:
                loss = self.step(number)
            finally:
                if careful:
                    torch.cuda.set_sync_debug_mode("default")
            self.losses.append(float(loss))
            self.seen.add(Lifecycle(int(morphc.seeds(self.model).lifecycle[1])))


@pytest.mark.parametrize("blueprint", ["bottleneck", "affine", "lowrank"])
def test_it_grows_as_on_the_cpu(blueprint: str) -> None:
    plain = host(8)
    runs = [
        Run(*where, blueprint, plain) for where in (("cpu", "torch"), ("cuda", "torch"), ("cuda", "triton"))
    ]
    for run in runs:
        run.run(140)
        assert run.seen >= ALL_THE_WAY, run.seen
    reference, *others = runs
    for run in others:
        # The same sums in another order, for 140 steps.
        torch.testing.assert_close(
            torch.tensor(run.losses), torch.tensor(reference.losses), rtol=2e-2, atol=1e-4
        )


@pytest.mark.parametrize("blueprint", ["bottleneck", "affine", "lowrank"])
def test_no_step_between_ticks_reads_the_device(blueprint: str) -> None:
    run = Run("cuda", "triton", blueprint, host(8))
    run.run(140, careful=True)
    assert run.seen >= ALL_THE_WAY, run.seen


def test_a_tick_is_one_launch_for_all_sites() -> None:
    layers = nn.Sequential(*(nn.Linear(16, 16) for _ in range(12))).cuda()
    config = Config(seeds_per_layer=8, slots=2)
    model = morphc.compile(layers, (torch.zeros(2, 16, device="cuda"),), config=config)
    seeds = morphc.seeds(model)
    for site in seeds.sites.values():
        site.assign([0, 3], Lifecycle.TRAINING)
    seeds.tick()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as told:
        seeds.tick()
        torch.cuda.synchronize()
    kernels: list[Any] = [
        event for event in told.events() if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    ticks = [event.name for event in kernels if "lifecycle" in event.name]
    assert len(ticks) == 1, [event.name for event in kernels]
