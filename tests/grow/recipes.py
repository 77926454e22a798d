"""Ways to train that people have: precision, scaling, accumulation, checkpointing, clipping, optimizers, averages.

Each test takes a device, so that the same ones run on a GPU (tests/gpu/test_recipes_cuda.py).
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from growing import FAST, Task, host, same
from torch import Tensor, nn
from torch.optim import swa_utils
from torch.utils.checkpoint import checkpoint

import morphc
from morphc import Lifecycle
from morphc.grow.controllers import Controller, Germinate
from morphc.integrations.averaging import AveragedModel
from morphc.runtime.store import store_of

L = Lifecycle
PATH = [
    L.GERMINATED,
    L.TRAINING,
    L.GRAFTING,
    L.STABILIZATION,
    L.EVALUATING,
    L.FINE_TUNING,
    L.FOSSILIZED,
]
LOOSE = {
    "minimum_ticks": (4, 3, 2, 2, 4),
    "min_isolated_improvement": -1.0,
    "min_contribution": -10.0,
    "cull_contribution": -20.0,
    "min_improvement": -10.0,
    "min_stability": 0.0,
    "min_final_stability": 0.0,
}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, foreach=False),
    "sgd foreach": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, foreach=True),
    "sgd fused": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, fused=True),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "adamw fused amsgrad": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True, amsgrad=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
}


@dataclass(frozen=True)
class Recipe:
    """One way to train. recompute: `use_reentrant` of `checkpoint`, None without it."""

    autocast: torch.dtype | None = None
    scaled: bool = False
    accumulate: int = 1
    recompute: bool | None = None
    clip: float | None = None
    optimizer: str = "adam"
    set_to_none: bool = True

    def forward(self, model: nn.Module, x: Tensor) -> Tensor:
        """The model's output under autocast and checkpoint."""
        cast: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
        if self.autocast is not None:
            cast = torch.autocast(x.device.type, self.autocast)
        with cast:
            if self.recompute is None:
                return model(x)
            # The reentrant form has no gradients for a part whose inputs need none.
            x = x.requires_grad_() if self.recompute else x
            return checkpoint(model, x, use_reentrant=self.recompute)


RECIPES = {
    "plain": Recipe(),
    "bf16": Recipe(autocast=torch.bfloat16),
    "fp16 scaled": Recipe(autocast=torch.float16, scaled=True, clip=1.0),
    "accumulated": Recipe(accumulate=4, clip=1.0, set_to_none=False),
    "checkpoint reentrant": Recipe(recompute=True),
    "checkpoint": Recipe(recompute=False),
    "everything": Recipe(torch.float16, True, 2, False, 1.0, "adamw fused"),
    "everything reentrant": Recipe(torch.bfloat16, False, 2, True, 1.0, "adamw foreach", False),
    **{name: Recipe(optimizer=name) for name in OPTIMIZERS if name != "adam"},
}


class Run:
    """A model, its optimizer and what else the recipe needs; `step` is one step of the optimizer."""

    def __init__(self, recipe: Recipe, model: nn.Module, task: Task) -> None:
        self.recipe, self.model, self.task = recipe, model, task
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = OPTIMIZERS[recipe.optimizer](self.params)
        self.device = self.params[0].device
        self.scaler = (
            torch.amp.GradScaler(self.device.type, 2.0**12, growth_interval=20) if recipe.scaled else None
        )

    def step(self, number: int) -> Tensor:
        """Forward, backward, clipping and the optimizer's step; the loss as it was handed to `backward`."""
        recipe, scaler = self.recipe, self.scaler
        self.optimizer.zero_grad(set_to_none=recipe.set_to_none)
        x, y = (value[number % len(value)].to(self.device) for value in (self.task.x, self.task.y))
        for part, wanted in zip(x.chunk(recipe.accumulate), y.chunk(recipe.accumulate), strict=True):
            out = recipe.forward(self.model, part)
            loss = (out.float() - wanted).square().mean() / recipe.accumulate
            (loss if scaler is None else scaler.scale(loss)).backward()
        if scaler is not None:
            scaler.unscale_(self.optimizer)
        if recipe.clip is not None:
            nn.utils.clip_grad_norm_(self.params, recipe.clip)
        if scaler is None:
            self.optimizer.step()
        else:
            scaler.step(self.optimizer)
        return loss

    def grower(self, controller: Controller, **options: Any) -> morphc.Grower:
        """A Grower of the model that ticks every second step."""
        return morphc.Grower(
            self.model,
            self.optimizer,
            controller,
            self.validate,
            self.scaler,
            tick_every=2,
            **options,
        )

    def validate(self, model: nn.Module) -> float:
        """Validation loss on the model's device."""
        with torch.no_grad():
            away = model(self.task.vx.to(self.device)) - self.task.vy.to(self.device)
            return float(away.square().mean())


def made(recipe: Recipe, task: Task, device: str, **options: Any) -> tuple[Run, Run]:
    """(the host alone, the compiled model of a copy of it), both to be trained by the recipe."""
    plain = host().to(device)
    chosen: dict[str, Any] = {"seeds_per_layer": 1, "slots": 2, "rank": 3, "blueprint": "widen"}
    chosen |= {"backend": "torch" if device == "cpu" else "auto"}
    config = morphc.Config(**{**chosen, **FAST, **LOOSE, **options})
    model = morphc.compile(copy.deepcopy(plain), (torch.zeros(2, 6, device=device),), config=config)
    return Run(recipe, plain, task), Run(recipe, model, task)


def grow(
    recipe: Recipe, device: str, watch: Callable[[int, morphc.Grower], None] | None = None, **options: Any
):
    """Train through the whole lifecycle of one seed, a twin without seeds beside it: (twin, run, moves).

    Until the graft begins the twin and the host are compared bit for bit after every step.
    """
    task = Task()
    twin, run = made(recipe, task, device, **options)
    controller = morphc.ScheduleController([(6, Germinate("2", (0,), candidates=2))])
    grower = run.grower(controller)
    moves: list[Lifecycle] = []
    for number in range(80):
        twin.step(number)
        event = grower.step(run.step(number))
        moves += [t.target for t in event.transitions if t]
        for each in (twin, run):
            if each.scaler is not None:
                each.scaler.update()
        if L.GRAFTING not in moves:
            assert same(twin.model, run.model), f"step {number}"
        if watch is not None:
            watch(number, grower)
    return twin, run, moves


def check_growth(recipe: Recipe, device: str) -> None:
    """The whole way, the fold equals it, and it isn't worse than the host alone."""
    twin, run, moves = grow(recipe, device)
    assert moves == PATH
    before = run.validate(run.model)
    folded = morphc.fold(run.model)
    x = run.task.vx.to(device)
    torch.testing.assert_close(folded(x), run.model(x), rtol=1e-4, atol=1e-5)
    assert run.validate(folded) < 1.02 * twin.validate(twin.model)
    assert abs(run.validate(folded) - before) < 1e-4


def check_gradients(recipe: Recipe, state: Lifecycle, device: str, **options: Any) -> None:
    """Slots get the gradient that they get without the recipe, and nothing is measured twice."""
    found = []
    for each in (Recipe(), recipe):
        _, run = made(each, Task(), device, isolation_every=1, telemetry_every=1, **options)
        site = morphc.seeds(run.model)["2"]
        (name,) = site.slots
        site.assign([0], state, blueprint=name)
        run.step(0)
        grads = {key: grad.clone() for key, grad in site.slots[name].grads().items() if grad is not None}
        fitting = site.site.fitting
        # Kernels keep the chunks for the step, and make the gradient in it.
        assert grads or (fitting is not None and fitting.fits[name].saved is not None)
        host_grads = {key: p.grad.clone() for key, p in run.model.named_parameters() if p.grad is not None}
        morphc.seeds(run.model).step_optimizer(lr=0.01)
        # A first step of AdamW has the size of the rate: it would make much of what sums in another order differ in.
        kept = site.slots[name].named_parameters() if recipe.accumulate == 1 else ()
        slots = {key: param.detach().clone() for key, param in kept}
        sums = (
            {} if fitting is None else {key: value.clone() for key, value in fitting.fits[name].sums.items()}
        )
        rows = morphc.seeds(run.model).telemetry()["count"]
        found.append(
            ({f"grad of {key}": grad for key, grad in grads.items()} | slots, host_grads, sums, rows)
        )
    assert torch.equal(found[0][3], found[1][3])
    exact = recipe.recompute is not None
    # On a GPU sums over rows may be added up in another order, and torch's matmul chooses another way where its input
    # requires a gradient, as it does for the reentrant form.
    bitwise = recipe.recompute is False and device == "cpu"
    tolerance = {"rtol": 0.0, "atol": 0.0} if bitwise else {"rtol": 1e-4, "atol": 1e-6}
    # What is measured in isolation averages over forwards, and those of parts aren't those of the whole.
    for mine, theirs in zip(found[0][: 3 if exact else 2], found[1], strict=False):
        assert mine.keys() == theirs.keys()
        for key, value in mine.items():
            torch.testing.assert_close(theirs[key], value, **tolerance)


def check_average(recipe: Recipe, device: str, use_buffers: bool) -> None:
    """With a weight of one the copy is the model at every step; with less it is the mean of what blended in."""
    kept: list[AveragedModel] = []
    blended: list[Tensor] = []
    x = Task().vx.to(device)

    def watch(number: int, grower: morphc.Grower) -> None:
        model = grower.model
        if not kept:
            for weight in (1.0, 0.5):
                average = swa_utils.get_ema_multi_avg_fn(1 - weight)
                kept.append(AveragedModel(model, multi_avg_fn=average, use_buffers=use_buffers).eval())
        before = [value.clone() for value in weights(kept[1])]
        for averaged in kept:
            averaged.update_parameters(model)
            seeds = morphc.seeds(averaged)
            assert torch.equal(seeds.lifecycle, grower.seeds.lifecycle)
            assert torch.equal(seeds.alpha, grower.seeds.alpha)
            assert int(store_of(averaged).state.tick) == grower.ticks
        model.eval()
        assert torch.equal(kept[0](x), model(x)), f"step {number}"
        model.train()
        state = grower.seeds.lifecycle[1]
        if blended and state >= L.GRAFTING:
            for now, past, new in zip(weights(kept[1]), before, weights(model), strict=True):
                torch.testing.assert_close(now, (past + new) / 2)
        elif number:
            for now, new in zip(weights(kept[1]), weights(model), strict=True):
                assert torch.equal(now, new)
        blended[:] = [state] if state >= L.GRAFTING else []

    def weights(model: nn.Module) -> list[Tensor]:
        bank = morphc.seeds(model)["2"].slots["widen"]
        slot = bank.owner.tolist().index(0) if 0 in bank.owner.tolist() else 0
        return [param.detach()[slot] for param in bank.parameters()]

    _, _, moves = grow(recipe, device, watch)
    assert moves == PATH


def check_going_back(recipe: Recipe, device: str) -> None:
    """A snapshot taken in the middle of a graft brings everything back, and the steps after it are the same bits."""
    _, run = made(recipe, Task(), device)
    grower = run.grower(morphc.ScheduleController([(6, Germinate("2", (0,)))]))

    def train(numbers: range) -> None:
        for number in numbers:
            grower.step(run.step(number))
            if run.scaler is not None:
                run.scaler.update()

    train(range(22))
    assert grower.seeds.lifecycle[1] == L.GRAFTING
    snapshot = grower.snapshot()
    ends = []
    for _ in range(2):
        train(range(22, 44))
        ends.append({key: value.clone() for key, value in run.model.state_dict().items()})
        grower.restore(snapshot)
    assert grower.steps == 22
    measured = ("sums", "counts")
    for key, value in ends[0].items():
        assert key.endswith(measured) or torch.equal(value, ends[1][key]), key


def check_scaled_reconstruction(device: str) -> None:
    """The loss's scale doesn't reach the gradient of slots that learn to give their chunk back."""
    options = {
        "isolation": "reconstruction",
        "blueprint": "bottleneck",
        "blend": "lerp",
        "seeds_per_layer": 2,
    }
    found = []
    for scaled in (False, True):
        _, run = made(Recipe(scaled=scaled), Task(), device, **options)
        site = morphc.seeds(run.model)["2"]
        site.assign([0], L.TRAINING)
        site.assign([1], L.FINE_TUNING)
        grower = run.grower(morphc.ScheduleController([]))
        for number in range(3):
            grower.step(run.step(number))
            if run.scaler is not None:
                run.scaler.update()
        found.append([param.detach().clone() for param in site.slots["bottleneck"].parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
