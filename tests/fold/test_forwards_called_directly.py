"""Layers that a host calls by their forward, past `__call__` and so past hooks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import morphc
from morphc import Lifecycle


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc.forward(x)


class Kept(nn.Module):
    """Keeps the bound method in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.steps = [self.fc.forward]

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.steps[0](x)
        return result


class Both(nn.Module):
    """Calls it both ways."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) + self.fc.forward(x)


HOSTS = (Named, Kept, Both)
X = torch.linspace(-1, 1, 18).view(3, 6)


def grown(host: nn.Module, blueprint: str) -> Any:
    torch.manual_seed(0)
    model = morphc.compile(host, (X,), config=morphc.Config(seeds_per_layer=2, blueprint=blueprint)).eval()
    morphc.seeds(model)["fc"].assign([0], Lifecycle.FOSSILIZED)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".slots." in name:
                parameter.normal_()
    return model


@pytest.mark.parametrize("make", HOSTS)
class TestForwardsCalledDirectly:
    def test_a_seed_acts_and_detach_takes_it_out(self, make: Any) -> None:
        host = make().eval()
        model = grown(host, "bottleneck")
        plain = morphc.detach(model)
        assert not torch.equal(model(X), host(X))
        assert torch.equal(plain(X), host(X))

    def test_weights_fold(self, make: Any) -> None:
        model = grown(make(), "affine")
        torch.testing.assert_close(morphc.fold(model)(X), model(X))

    def test_what_would_hang_in_a_hook_is_refused_and_told_at_compile_time(self, make: Any) -> None:
        model = grown(make(), "bottleneck")
        with pytest.raises(morphc.errors.FoldError, match="calls this layer's forward past its hooks"):
            morphc.fold(model)
        (site,) = morphc.report(model).plan.sites
        assert "fold doesn't take back bottleneck" in site.note


def test_nothing_of_morphc_stays_in_what_a_host_keeps() -> None:
    for plain in (morphc.detach(grown(Kept(), "affine")), morphc.fold(grown(Kept(), "affine"))):
        (step,) = plain.steps
        assert step.__self__ is plain.fc
        assert step.__func__ is nn.Linear.forward
