"""What follows a layer and what it belongs to: epilogues, blocks, residual branches, bottlenecks, dominators."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compiler_hosts import compiled, rows, sites_of
from torch import Tensor, nn

from morphc.passes.plan import Block, Site


def watched(forward: Callable[..., Any], *args: Any, **children: Any) -> dict[str, Site]:
    """Sites of a host with these children and this forward."""

    class Host(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, child in children.items():
                setattr(self, name, child)

        def forward(self, *xs: Tensor) -> Any:
            return forward(self, *xs)

    return sites_of(compiled(Host(), *args, verify=False))


def linears(*widths: int) -> dict[str, nn.Module]:
    """fc0, fc1, ... with these widths between them."""
    return {f"fc{i}": nn.Linear(a, b) for i, (a, b) in enumerate(itertools.pairwise(widths))}


class TestEpilogue:
    @pytest.mark.parametrize(
        ("act", "name"),
        [
            (nn.ReLU(), "relu"),
            (nn.ReLU(inplace=True), "relu"),
            (nn.GELU(), "gelu"),
            (nn.GELU(approximate="tanh"), "gelu_tanh"),
            (nn.SiLU(), "silu"),
        ],
        ids=lambda value: str(value),
    )
    def test_an_activation_module_that_is_the_sole_consumer(self, act, name):
        sites = watched(lambda m, x: m.fc1(m.act(m.fc0(x))), rows(), act=act, **linears(8, 16, 4))
        assert (sites["fc0"].epilogue, sites["fc1"].epilogue) == (name, None)

    @pytest.mark.parametrize(
        ("act", "name"),
        [
            (torch.relu, "relu"),
            (F.relu, "relu"),
            (torch.relu_, "relu"),
            (lambda x: x.relu(), "relu"),
            (F.gelu, "gelu"),
            (lambda x: F.gelu(x, approximate="tanh"), "gelu_tanh"),
            (F.silu, "silu"),
            (lambda x: F.silu(x, inplace=True), "silu"),
        ],
        ids=["torch.relu", "F.relu", "relu_", "method", "gelu", "gelu tanh", "silu", "silu inplace"],
    )
    def test_an_activation_function_that_is_the_sole_consumer(self, act, name):
        sites = watched(lambda m, x: m.fc1(act(m.fc0(x))), rows(), **linears(8, 16, 4))
        assert sites["fc0"].epilogue == name

    def test_not_with_a_second_consumer(self):
        def forward(m: nn.Module, x: Tensor) -> Tensor:
            h = m.fc0(x)
            return m.fc1(torch.relu(h)) + h.sum()

        assert watched(forward, rows(), **linears(8, 16, 4))["fc0"].epilogue is None

    def test_not_through_a_dropout(self):
        sites = watched(
            lambda m, x: torch.relu(m.drop(m.fc0(x))), rows(), drop=nn.Dropout(), **linears(8, 16)
        )
        assert sites["fc0"].epilogue is None

    def test_not_one_that_a_site_cannot_apply(self):
        assert watched(lambda m, x: F.softplus(m.fc0(x)), rows(), **linears(8, 16))["fc0"].epilogue is None

    def test_behind_a_functional_layer(self):
        weight = nn.Parameter(torch.randn(4, 8))
        sites = watched(lambda m, x: torch.relu(F.linear(x, m.weight)) * 2, rows(), weight=weight)
        assert sites["weight"].epilogue == "relu"

    def test_behind_a_convolution(self):
        sites = watched(lambda m, x: torch.relu(m.conv(x)), torch.randn(2, 3, 6, 6), conv=nn.Conv2d(3, 4, 3))
        assert sites["conv"].epilogue == "relu"

    def test_of_one_activation_module_used_behind_two_layers(self):
        act = nn.ReLU()
        sites = watched(lambda m, x: m.act(m.fc1(m.act(m.fc0(x)))), rows(), act=act, **linears(8, 16, 4))
        assert {site.epilogue for site in sites.values()} <= {"relu", None}


class TestBlocks:
    def test_a_linear_block(self):
        sites = watched(lambda m, x: m.fc1(torch.relu(m.fc0(x))), rows(), **linears(8, 16, 4))
        assert sites["fc1"].block == Block(("fc0",), "fc1", "relu", "linear", 16)
        assert sites["fc0"].block is None

    def test_dropouts_and_identities_are_looked_through(self):
        sites = watched(
            lambda m, x: m.fc1(m.d(torch.relu(m.i(m.fc0(x))))),
            rows(),
            d=nn.Dropout(0.1),
            i=nn.Identity(),
            **linears(8, 16, 4),
        )
        assert sites["fc1"].block == Block(("fc0",), "fc1", "relu", "linear", 16)

    def test_a_gated_block(self):
        def forward(m: nn.Module, x: Tensor) -> Tensor:
            return m.down(F.silu(m.gate(x)) * m.up(x))

        layers = {"gate": nn.Linear(8, 16), "up": nn.Linear(8, 16), "down": nn.Linear(16, 8)}
        sites = watched(forward, rows(), **layers)
        assert sites["down"].block == Block(("gate", "up"), "down", "silu", "gated", 16)

    def test_a_gate_whose_branches_read_different_values_is_an_obstacle(self):
        def forward(m: nn.Module, x: Tensor) -> Tensor:
            return m.down(F.silu(m.gate(x)) * m.up(x * 2))

        layers = {"gate": nn.Linear(8, 16), "up": nn.Linear(8, 16), "down": nn.Linear(16, 8)}
        block = watched(forward, rows(), **layers)["down"].block
        assert block is not None
        assert block.obstacle == "the two branches of the gate read different values"

    @pytest.mark.parametrize("norm", [None, "bn"])
    def test_a_convolution_block_with_and_without_batch_norm(self, norm):
        def forward(m: nn.Module, x: Tensor) -> Tensor:
            h = m.c1(x)
            return m.c2(torch.relu(h if norm is None else m.bn(h)))

        layers = {"c1": nn.Conv2d(3, 6, 3), "bn": nn.BatchNorm2d(6), "c2": nn.Conv2d(6, 4, 3)}
        sites = watched(forward, torch.randn(2, 3, 8, 8), **layers)
        assert sites["c2"].block == Block(("c1",), "c2", "relu", "conv", 6, norm)

    def test_a_second_consumer_of_the_hidden_value_is_an_obstacle(self):
        def forward(m: nn.Module, x: Tensor) -> Tensor:
            h = torch.relu(m.fc0(x))
            return m.fc1(h) + h.mean()

        block = watched(forward, rows(), **linears(8, 16, 4))["fc1"].block
        assert block is not None
        assert block.obstacle.endswith("has a second consumer")

    def test_a_member_that_is_called_twice_is_an_obstacle(self):
        def forward(m: nn.Module, x: Tensor) -> Tensor:
            return m.fc1(torch.relu(m.fc0(x))) + m.fc1(x)

        block = watched(forward, rows(), fc0=nn.Linear(8, 8), fc1=nn.Linear(8, 8))["fc1"].block
        assert block is None or "is called 2 times" in block.obstacle

    @pytest.mark.parametrize(
        "between",
        [
            lambda h: h,
            lambda h: torch.relu(h) + 1,
            lambda h: F.layer_norm(torch.relu(h), (16,)),
            lambda h: h * 2,
        ],
        ids=["nothing", "add", "norm", "scale"],
    )
    def test_no_block_without_an_activation_right_between(self, between):
        sites = watched(lambda m, x: m.fc1(between(m.fc0(x))), rows(), **linears(8, 16, 4))
        assert sites["fc1"].block is None

    def test_no_block_between_a_convolution_and_a_linear(self):
        sites = watched(
            lambda m, x: m.fc(torch.relu(m.conv(x))),
            torch.randn(2, 3, 6),
            conv=nn.Conv1d(3, 4, 1),
            fc=nn.Linear(6, 2),
        )
        assert sites["fc"].block is None


class TestRoles:
    def test_a_residual_branch_is_the_one_that_is_added_to_the_stream(self):
        def forward(m: nn.Module, x: Tensor) -> Tensor:
            x = x + m.drop(m.fc1(torch.relu(m.fc0(x))))
            return m.head(x)

        layers = {"drop": nn.Dropout(0.1), "head": nn.Linear(8, 3), **linears(8, 16, 8)}
        sites = watched(forward, rows(), **layers)
        assert {path: site.residual_branch for path, site in sites.items()} == {
            "fc0": False,
            "fc1": True,
            "head": False,
        }

    def test_two_branches_of_one_value_are_no_residual(self):
        sites = watched(lambda m, x: m.fc0(x) + m.fc1(x), rows(), fc0=nn.Linear(8, 8), fc1=nn.Linear(8, 8))
        assert not any(site.residual_branch for site in sites.values())

    def test_a_bottleneck_is_narrower_than_what_comes_and_what_follows(self):
        sites = watched(
            lambda m, x: m.fc2(torch.relu(m.fc1(torch.relu(m.fc0(x))))), rows(), **linears(8, 16, 2, 16)
        )
        assert {path: site.bottleneck for path, site in sites.items()} == {
            "fc0": False,
            "fc1": True,
            "fc2": False,
        }

    def test_a_layer_dominates_what_can_only_be_reached_through_it(self):
        def forward(m: nn.Module, x: Tensor) -> Tensor:
            h = m.fc0(x)
            return torch.relu(m.fc1(h)) + torch.tanh(m.fc2(h))

        layers = {"fc0": nn.Linear(8, 8), "fc1": nn.Linear(8, 8), "fc2": nn.Linear(8, 8)}
        sites = watched(forward, rows(), **layers)
        assert {path: site.dominates for path, site in sites.items()} == {"fc0": 5, "fc1": 1, "fc2": 1}

    def test_a_layer_called_twice_makes_a_cycle_and_no_roles_break(self):
        sites = watched(lambda m, x: m.fc0(torch.relu(m.fc0(x))) + x, rows(), fc0=nn.Linear(8, 8))
        assert sites["fc0"].calls == 2
        assert not sites["fc0"].residual_branch

    def test_a_site_owns_its_input_where_nobody_else_reads_it(self):
        assert watched(lambda m, x: m.fc1(torch.relu(m.fc0(x))), rows(), **linears(8, 16, 4))[
            "fc0"
        ].owns_input

    def test_a_site_does_not_own_its_input_where_another_reads_it(self):
        def forward(m: nn.Module, x: Tensor) -> Tensor:
            h = m.fc0(x)
            return m.fc1(torch.relu(h)) + h.mean()

        assert not watched(forward, rows(), **linears(8, 16, 4))["fc0"].owns_input

    def test_a_site_behind_a_hooked_layer_does_not_own_its_input(self):
        layers = linears(8, 16, 4)
        layers["fc0"].register_forward_hook(lambda *_: None)
        assert not watched(lambda m, x: m.fc1(torch.relu(m.fc0(x))), rows(), **layers)["fc0"].owns_input
