"""What a whole training run has grown, of each blueprint, folds into plain modules that need no morphc."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from growth import BOUNDS, DTYPES, distance
from torch import nn

import morphc
from morphc import Config, Lifecycle
from morphc.grow.controllers import Germinate

BLUEPRINTS = ("affine", "lowrank", "bottleneck", "depthwise", "widen")
ANY_GATE = {
    "min_isolated_improvement": -1.0,
    "min_contribution": -10.0,
    "cull_contribution": -20.0,
    "min_improvement": -10.0,
    "min_stability": 0.0,
    "min_final_stability": 0.0,
}
IN_A_PROCESS_OF_ITS_OWN = """
import pickle, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "morphc":
            raise ImportError("morphc is not there")
sys.meta_path.insert(0, Refuse())
import torch
with open(sys.argv[1], "rb") as file:
    runs = pickle.load(file)
for blueprint, (model, x, expected) in runs.items():
    assert torch.equal(model(x), expected), blueprint
    model.train()(x).sum().backward()
    print(blueprint)
assert not any(name.split(".")[0] == "morphc" for name in sys.modules)
"""


def trained(blueprint: str) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    """(the host as it was, the model with one seed that went from DORMANT to FOSSILIZED, held-out images)."""
    torch.manual_seed(0)
    host = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3, padding=1),
        nn.Flatten(),
        nn.Linear(4 * 25, 5),
    )
    draw = torch.Generator().manual_seed(1)
    x, held_out = torch.randn(64, 2, 5, 5, generator=draw), torch.randn(32, 2, 5, 5, generator=draw)
    y = torch.randn(64, 5, generator=draw)
    config = Config(
        include=("0", "3"),
        seeds_per_layer=2,
        slots=2,
        rank=2,
        blueprint=blueprint,
        backend="torch",
        minimum_ticks=(4, 2, 1, 1, 2),
        graft_ticks=2,
        **ANY_GATE,
    )
    model = morphc.compile(copy.deepcopy(host), (x[:8],), config=config)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)

    def loss_of(net: nn.Module, start: int) -> torch.Tensor:
        return (net(x[start : start + 16]) - y[start : start + 16]).square().mean()

    controller = morphc.ScheduleController([(2, Germinate("3", (1,), blueprint))])
    grower = morphc.Grower(model, optimizer, controller, lambda net: float(loss_of(net, 0)), tick_every=2)
    for number in range(60):
        optimizer.zero_grad()
        loss = loss_of(model, number % 4 * 16)
        loss.backward()
        optimizer.step()
        grower.step(loss)
    assert morphc.seeds(model)["3"].lifecycle.tolist() == [Lifecycle.DORMANT, Lifecycle.FOSSILIZED]
    return host, model.eval(), held_out


@pytest.fixture(scope="module")
def runs() -> dict[str, tuple[nn.Module, nn.Module, torch.Tensor]]:
    torch.set_num_threads(1)
    return {blueprint: trained(blueprint) for blueprint in BLUEPRINTS}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("blueprint", BLUEPRINTS)
def test_outputs_are_within_the_bound(runs: Any, blueprint: str, dtype: torch.dtype) -> None:
    _, model, x = runs[blueprint]
    grown, x = copy.deepcopy(model).to(dtype), x.to(dtype)
    folded = morphc.fold(grown)
    with torch.no_grad():
        assert folded(x).dtype == dtype
        assert distance(grown(x), folded(x)) <= BOUNDS[dtype]
        # What was grown matters: without it the outputs are others.
        assert distance(grown(x), morphc.detach(grown)(x)) > 2 * BOUNDS[dtype]


def test_no_import_of_morphc_is_left(runs: Any, tmp_path: Path) -> None:
    kept = {}
    for blueprint, (_, model, x) in runs.items():
        folded = morphc.fold(model)
        kept[blueprint] = (folded, x, folded(x).detach())
    file = tmp_path / "folded.pkl"
    file.write_bytes(pickle.dumps(kept))
    done = subprocess.run(
        [sys.executable, "-P", "-c", IN_A_PROCESS_OF_ITS_OWN, str(file)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == list(BLUEPRINTS)


def test_what_each_blueprint_becomes(runs: Any) -> None:
    layers = {blueprint: morphc.fold(model) for blueprint, (_, model, _) in runs.items()}
    shapes = {name: [tuple(p.shape) for p in net.parameters()] for name, net in layers.items()}
    host = [tuple(param.shape) for param in runs["affine"][0].parameters()]
    assert shapes["affine"] == host  # merged into weights
    assert layers["widen"][0].out_channels == layers["widen"][3].in_channels == 6 + 2
    assert layers["widen"][1].num_features == 6 + 2
    for name in ("bottleneck", "depthwise"):
        assert shapes[name][:6] == host[:6]
        assert len(shapes[name]) > len(host)
