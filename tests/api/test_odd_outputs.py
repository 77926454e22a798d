"""Forwards that take gradients themselves, models without a site, outputs without a tensor."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

import morphc


class Force(nn.Module):
    """The gradient of an energy: a forward that needs gradients to run at all."""

    def __init__(self) -> None:
        super().__init__()
        self.energy = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        (grad,) = torch.autograd.grad(self.energy(x).tanh().sum(), x, create_graph=self.training)
        return -grad


class Says(nn.Module):
    def forward(self, x: Tensor) -> str:
        return f"{len(x)} rows"


def test_a_forward_that_takes_gradients_itself_is_compiled() -> None:
    host, x = Force(), torch.randn(4, 3)
    model = morphc.compile(host, (x,))
    assert torch.equal(model(x), host(x))
    assert [site.path for site in morphc.report(model).plan.sites] == ["energy"]
    assert "equal bit for bit (1 output, " in morphc.report(model).verification[0]


def test_a_model_without_a_site_has_a_plan_and_a_checkpoint(tmp_path: Path) -> None:
    model = morphc.compile(nn.ReLU(), (torch.randn(2, 3),))
    plan = morphc.report(model).plan
    assert len(morphc.seeds(morphc.compile(nn.ReLU(), plan=plan))) == 0
    morphc.save(model, tmp_path / "checkpoint")
    assert type(morphc.load(nn.ReLU(), tmp_path / "checkpoint")) is nn.ReLU


def test_nothing_is_called_equal_where_nothing_was_compared() -> None:
    lines = morphc.report(morphc.compile(Says(), (torch.randn(2, 3),))).verification
    assert len(lines) == 4
    assert all("nothing to compare" in line for line in lines)
