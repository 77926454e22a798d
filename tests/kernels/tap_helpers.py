"""Models with sites whose blueprints read an input, and what they give."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from where import DEVICE

import morphc
from morphc import Config, Lifecycle
from morphc.kernels.site import TapBankKernels
from morphc.lifecycle import Mode
from morphc.runtime import active

BOUNDS = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 5e-3}
DTYPES = tuple(BOUNDS)
BLENDINGS = ("residual", "lerp", "multiply", "gate")
KINDS = ("lowrank", "widen", "widen, gated")


class Plain(nn.Module):
    """fc2(gelu(fc1(x)))."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(9, 14), nn.GELU(), nn.Linear(14, 23)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Gated(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.fc2 = nn.Linear(9, 14), nn.Linear(9, 14), nn.Linear(14, 23)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(nn.functional.silu(self.gate(x)) * self.up(x))


class Convs(nn.Module):
    """conv2(relu(conv1(x)))."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.act = nn.Conv2d(3, 6, 3, padding=1), nn.ReLU()
        self.fc2 = nn.Conv2d(6, 10, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.conv1(x)))


def compiled(
    kind: str = "lowrank",
    backend: str = "triton",
    dtype: torch.dtype = torch.float32,
    host: type[nn.Module] | None = None,
    states: tuple[Lifecycle, ...] = (Lifecycle.GRAFTING, Lifecycle.TRAINING, Lifecycle.FOSSILIZED),
    **options: object,
) -> nn.Module:
    """Seeds 0 to 2 of the last layer in `states`; parameters that are nowhere zero."""
    torch.manual_seed(0)
    made = (host or (Gated if "gated" in kind else Plain))()
    x = torch.randn(2, 3, 4, 4) if host is Convs else torch.randn(2, 9)
    settings = {"seeds_per_layer": 5, "slots": 4, "rank": 3, "backend": backend}
    settings["blueprint"] = kind.partition(",")[0]
    config = Config(**settings | options)  # type: ignore[arg-type]
    model = morphc.compile(made.to(dtype).to(DEVICE), (x.to(dtype).to(DEVICE),), config=config)
    site = morphc.seeds(model)["fc2"]
    for seed, state in enumerate(states):
        site.assign([seed], state, **{"alpha": 0.5} if state is Lifecycle.GRAFTING else {})
    generator = torch.Generator().manual_seed(1)
    for bank in site.slots.values():
        for name in bank.names:
            values = bank.get_parameter(name).data
            values.copy_(torch.randn(values.shape, generator=generator) * 0.4)
    return model


def example(rows: int = 6) -> Tensor:
    return torch.randn(rows, 9, generator=torch.Generator().manual_seed(rows)).to(DEVICE)


def distance(one: Tensor, other: Tensor) -> float:
    one, other = one.detach().double().cpu(), other.detach().double().cpu()
    return ((one - other).norm() / other.norm().clamp(min=1e-12)).item()


def kernels_of(model: nn.Module) -> list[TapBankKernels]:
    made = morphc.seeds(model)["fc2"].site.engine.kernels.values()
    return [kernels for kernels in made if kernels is not None]


class Values:
    """A site's value, its tap and its gradient, in a type; [*lead, features], with every `gap`-th row taken."""

    def __init__(self, site, lead=(6,), dtype=torch.float32, gap=1) -> None:  # type: ignore[no-untyped-def]
        (self.bank,) = [bank for _, bank in site.slots.items()]
        generator = torch.Generator().manual_seed(3)

        def normal(features: int) -> Tensor:
            whole = torch.randn(lead[0] * gap, *lead[1:], features, generator=generator)
            return whole.to(dtype).to(DEVICE)[::gap]

        self.site = site
        self.y, self.dy, self.tap = normal(23), normal(23), normal(self.bank.geometry.tap_features)

    def join(self, y: Tensor, tap: Tensor) -> Tensor:
        self.site.block_input = tap
        joined: Tensor = self.site.join(y, tap)
        return joined

    def found(self) -> dict[str, Tensor]:
        """From the site itself."""
        y, tap = self.y.detach().requires_grad_(), self.tap.detach().requires_grad_()
        self.bank.zero_grads()
        out = self.join(y, tap)
        out.backward(self.dy)
        grads = {name: grad for name, grad in self.bank.grads().items() if grad is not None}
        assert y.grad is not None
        return {
            "y": out.detach(),
            "dy": y.grad,
            "d_tap": torch.zeros_like(tap) if tap.grad is None else tap.grad,
        } | {name: grad.clone() for name, grad in grads.items()}

    def expected(self) -> dict[str, Tensor]:
        """From torch operations in float64."""
        site, bank = self.site, self.bank
        y, tap = self.y.double().requires_grad_(), self.tap.double().requires_grad_()
        params = {name: bank.get_parameter(name).double().requires_grad_() for name in bank.names}
        slots = active.describe(bank.owner, *site._states_on(y.device), site.features, site.seeds)
        out = active.through_bank(
            y, y, tap, params, slots, bank.kind, bank.geometry, bank.blend, -1,
            isolated_only=site.mode is Mode.TRAINING,
        )  # fmt: skip
        out.backward(self.dy.double())
        assert y.grad is not None
        found = {
            "y": out.detach(),
            "dy": y.grad,
            "d_tap": torch.zeros_like(tap) if tap.grad is None else tap.grad,
        }
        return found | {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in params.items()}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor], bound: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        mine = found[name]
        if name == "gate_bias":  # a number a slot, in which most of what is added up cancels
            mine = torch.cat([found["gate_weight"], mine], 1)
            value = torch.cat([expected["gate_weight"], value], 1)
        assert distance(mine, value) <= bound, name


def everything(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output, and the gradients of input, host and slots."""
    return everything_of(model, model, x)


def everything_of(traced, model: nn.Module, x: Tensor) -> dict[str, Tensor]:  # type: ignore[no-untyped-def]
    """The same of a module that runs `model`."""
    x = x.clone().requires_grad_()
    for param in model.parameters():
        param.grad = None
    out = traced(x)
    out.float().square().mean().backward()
    assert x.grad is not None
    found = {"out": out.detach(), "input": x.grad}
    found |= {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for kind, bank in morphc.seeds(model)["fc2"].site.slots.items():
        found |= {f"{kind}/{n}": g.clone() for n, g in bank.grads().items() if g is not None}
    return found
