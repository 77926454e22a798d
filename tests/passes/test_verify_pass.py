"""Verify: what differs goes down the ladder, never to a wrong answer; a nondeterministic host is told apart."""

from __future__ import annotations

import dataclasses
import types
import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from compiler_hosts import (
    HOSTS,
    Functional,
    Matched,
    Mlp,
    assert_same,
    compiled,
    misses_of,
    regions_of,
    rows,
    run,
    sites_of,
)
from torch import Tensor, fx, nn

import morphc
from morphc.compiler import bisect
from morphc.config import Config
from morphc.errors import VerificationError
from morphc.passes.manager import register_pass
from morphc.passes.program import Program
from morphc.passes.verify import Verify, doubled, same_bits
from morphc.runtime.store import store_of


def rewriting(
    change: Callable[[fx.Graph, fx.Node], fx.Node], name: str = "rewrites", only: str | None = None
) -> Any:
    """A pass that replaces each torch.relu, in the region `only` or in all."""

    def apply(self: Any, program: Program) -> None:
        for label, graph in program.graphs():
            if only is not None and not label.startswith(f"{only} "):
                continue
            for node in [n for n in graph.nodes if n.target is torch.relu]:
                with graph.inserting_before(node):
                    fresh = change(graph, node)
                node.replace_all_uses_with(fresh)
                graph.erase_node(node)

    body = {"name": name, "__annotations__": {"name": ClassVar[str]}, "apply": apply}
    return register_pass(dataclasses.dataclass(frozen=True)(type("Rewrites", (), body)))()


def clamp(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """The same function of finite values, and the same gradient but at 0."""
    return graph.call_method("clamp_min", (node.args[0], 0))


def sigmoid(graph: fx.Graph, node: fx.Node) -> fx.Node:
    return graph.call_function(torch.sigmoid, (node.args[0],))


def fails(graph: fx.Graph, node: fx.Node) -> fx.Node:
    return graph.call_function(torch.reshape, (node.args[0], (7, 7)))


def shifted_relu(graph: fx.Graph, node: fx.Node) -> fx.Node:
    relu = graph.call_function(torch.relu, (node.args[0],))
    return graph.call_function(torch.add, (relu, 1e-12))


class Two(nn.Module):
    """Two functional regions side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Functional(), Functional()

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x)


class TestDemotion:
    @pytest.mark.parametrize("change", [sigmoid, fails], ids=["wrong", "raises"])
    def test_a_region_that_a_pass_broke_runs_as_written(self, change):
        host = Functional()
        result = compiled(host, passes=[rewriting(change)])
        region = regions_of(result)[""]
        assert (region.level, region.runs) == ("matched", False)
        assert region.reason.startswith(
            "its graph did not compute what its forward does: the example, train mode: "
        )
        assert "region root runs as written" in result.report.verification[-1]
        assert_same(host, result.model, rows())

    def test_its_functional_layers_keep_their_sites(self):
        result = compiled(Functional(), passes=[rewriting(sigmoid)])
        assert set(sites_of(result)) == {"fc1", "weight"}
        assert misses_of(result).keys() == misses_of(compiled(Functional())).keys()

    def test_only_the_broken_one_of_two_regions_is_demoted(self):
        host = Two()
        result = compiled(host, passes=[rewriting(sigmoid, only="b")])
        assert {path: r.runs for path, r in regions_of(result).items()} == {"": False, "a": True, "b": False}
        assert_same(host, result.model, rows())

    def test_two_broken_regions_are_both_demoted(self):
        host = Two()
        result = compiled(host, passes=[rewriting(sigmoid)])
        assert not any(region.runs for region in regions_of(result).values())
        assert_same(host, result.model, rows())

    def test_a_difference_in_the_last_bits_is_a_difference(self):
        host = Mlp().double()
        x = rows().double()
        result = compiled(host, x, passes=[rewriting(shifted_relu)])
        assert not regions_of(result)[""].runs
        assert_same(host, result.model, x)

    def test_a_difference_in_gradients_alone_is_a_difference(self):
        def detached(graph: fx.Graph, node: fx.Node) -> fx.Node:
            return graph.call_method("detach", (graph.call_function(torch.relu, (node.args[0],)),))

        host = Mlp()
        result = compiled(host, passes=[rewriting(detached)])
        assert not regions_of(result)[""].runs
        assert "gradient of" in regions_of(result)[""].reason
        assert_same(host, result.model, rows())

    def test_a_difference_on_another_batch_size_alone_is_a_difference(self):
        def burnt_in(graph: fx.Graph, node: fx.Node) -> fx.Node:
            relu = graph.call_function(torch.relu, (node.args[0],))
            return graph.call_method("expand", (relu, 1, -1))

        host = Mlp()
        result = compiled(host, rows(1), passes=[rewriting(burnt_in)])
        assert not regions_of(result)[""].runs
        assert "a doubled batch" in regions_of(result)[""].reason
        assert_same(host, result.model, rows(4))

    def test_a_difference_in_train_mode_alone_is_a_difference(self):
        @register_pass
        @dataclasses.dataclass(frozen=True)
        class BreaksTraining:
            name: ClassVar[str] = "breaks-training"

            def apply(self, program: Program) -> None:
                graph = program.regions[""].graphs["train"]
                for node in [n for n in graph.nodes if n.target is torch.relu]:
                    node.target = torch.sigmoid

        host = Mlp()
        result = compiled(host, passes="breaks-training")
        assert "train mode" in regions_of(result)[""].reason
        assert_same(host, result.model, rows())

    def test_strict_raises_instead(self):
        with pytest.raises(
            VerificationError, match="the compiled model differs from its host: the example, train"
        ):
            compiled(Functional(), passes=[rewriting(sigmoid), Verify(strict=True)])

    def test_without_verification_the_broken_graph_runs_and_the_report_says_so(self):
        result = compiled(Functional(), passes=[rewriting(sigmoid)], verify=False)
        assert regions_of(result)[""].runs
        assert result.report.verification == ("not verified: verify=False",)
        assert not torch.equal(run(result.model, rows())[0], run(Functional(), rows())[0])


class TestKept:
    def test_a_pass_that_keeps_the_meaning_is_kept_and_its_graph_runs(self):
        host = Mlp()
        result = compiled(host, passes=[rewriting(clamp)])
        region = regions_of(result)[""]
        assert (region.level, region.runs) == ("rewritten", True)
        assert "fc1_morphc.clamp_min(0)" in result.report.graphs[""]
        assert all("equal bit for bit" in note for note in result.report.verification)
        assert_same(host, result.model, rows(6))

    def test_the_layers_inside_of_it_keep_their_sites(self):
        import morphc

        config = Config(seeds_per_layer=1, telemetry_every=1)
        model = compiled(Mlp(), passes=[rewriting(clamp)], config=config).model.train()
        model(rows())
        assert morphc.seeds(model).telemetry()["count"].tolist() == [48, 12]

    def test_a_pass_on_a_graph_for_reading_changes_nothing_and_is_told(self):
        host = Matched()
        result = compiled(host, passes=[rewriting(sigmoid)])
        assert_same(host, result.model, rows())
        assert any("only for reading" in note for note in result.report.verification)


class Noisy(nn.Module):
    """Its forward depends on how often it was called, in a place that nobody can put back."""

    ticks = 0

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.weight = nn.Parameter(torch.randn(4, 8))

    def forward(self, x: Tensor) -> Tensor:
        Noisy.ticks += 1
        return F.linear(torch.relu(self.fc(x)), self.weight) + Noisy.ticks


class TestHostsThatVary:
    def test_a_nondeterministic_host_is_reported_and_not_demoted(self):
        result = compiled(Noisy())
        assert "it is nondeterministic, nothing was demoted" in result.report.verification[-1]
        assert set(sites_of(result)) == {"fc", "weight"}

    def test_a_host_that_varies_is_no_verification_error_even_when_strict(self):
        assert compiled(Noisy(), passes=[Verify(strict=True)]).model is not None

    def test_dropout_under_the_same_seed_is_no_variation(self):
        assert all("equal bit for bit" in note for note in compiled(Mlp()).report.verification)

    def test_a_host_that_refuses_a_doubled_batch_is_skipped_and_said(self):
        class One(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.fc = nn.Linear(8, 8)

            def forward(self, x: Tensor) -> Tensor:
                return self.fc(x.view(3, 8))

        notes = compiled(One()).report.verification
        assert [note.split(":")[0] for note in notes] == [
            "the example, train mode",
            "the example, eval mode",
            "a doubled batch, train mode",
            "a doubled batch, eval mode",
        ]
        assert all("skipped, the host refuses it" in note for note in notes[2:])

    def test_a_host_without_a_gradient_to_compare(self):
        class Counts(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.fc = nn.Linear(8, 8)

            def forward(self, x: Tensor) -> Tensor:
                return self.fc(x).argmax(-1)

        assert all(
            "equal bit for bit (1 output, 0 gradients)" in n for n in compiled(Counts()).report.verification
        )

    def test_outputs_in_containers_are_compared(self):
        @dataclasses.dataclass
        class Out:
            value: Tensor
            extra: dict[str, Any]

        class Packs(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.fc = nn.Linear(8, 8)

            def forward(self, x: Tensor) -> Out:
                h = self.fc(x)
                return Out(h, {"all": [h, (h * 2,)], "none": None, "n": 3})

        assert all("3 outputs" in note for note in compiled(Packs()).report.verification)

    def test_values_that_are_not_finite_are_compared_by_their_bits(self):
        class Breaks(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.fc = nn.Linear(8, 8)

            def forward(self, x: Tensor) -> Tensor:
                return torch.log(self.fc(x)) / 0.0

        assert all("equal bit for bit" in note for note in compiled(Breaks()).report.verification)


class TestBisect:
    def test_the_pass_that_broke_it_is_named(self):
        passes = [rewriting(clamp, "harmless"), rewriting(sigmoid, "guilty"), rewriting(clamp, "later")]

        @register_pass
        @dataclasses.dataclass(frozen=True)
        class BreaksClamp:
            name: ClassVar[str] = "guilty"

            def apply(self, program: Program) -> None:
                for _, graph in program.graphs():
                    for node in [n for n in graph.nodes if n.target == "clamp_min"]:
                        node.args = (node.args[0], 0.5)

        found = bisect(
            Mlp(), (rows(),), config=Config(seeds_per_layer=2), passes=[passes[0], BreaksClamp(), passes[2]]
        )
        assert found.culprit == "guilty"
        assert found.lines[-1].startswith("guilty: BROKEN: the compiled model differs from its host")
        assert "harmless: equal" in found.lines
        assert not any("later" in line for line in found.lines)

    def test_a_pass_that_raises_is_the_culprit(self):
        @register_pass
        @dataclasses.dataclass(frozen=True)
        class Raises:
            name: ClassVar[str] = "raises"

            def apply(self, program: Program) -> None:
                raise RuntimeError("boom")

        found = bisect(Mlp(), (rows(),), config=Config(seeds_per_layer=2), passes="raises")
        assert found.culprit == "raises"
        assert "boom" in found.lines[-1]

    @pytest.mark.parametrize("host", [Mlp, Functional, Matched])
    def test_a_sound_pipeline_has_no_culprit(self, host):
        found = bisect(host(), (rows(),), config=Config(seeds_per_layer=2))
        assert found.culprit is None
        assert [line.split(":")[0] for line in found.lines] == [
            "capture",
            "propagate-shapes",
            "find-candidates",
            "plan-chunks",
            "insert-sites",
            "fuse-epilogues",
        ]
        assert all(line.endswith("equal") for line in found.lines)


class TestSameBits:
    @pytest.mark.parametrize(
        ("x", "y", "same"),
        [
            (torch.tensor([0.0]), torch.tensor([-0.0]), False),
            (torch.tensor([float("nan")]), torch.tensor([float("nan")]), True),
            (torch.tensor([1.0]), torch.tensor([1.0 + 1e-7]), False),
            (torch.tensor([1.0]), torch.tensor([1.0], dtype=torch.float64), False),
            (torch.tensor([[1.0]]), torch.tensor([1.0]), False),
            (torch.tensor([1, 2]), torch.tensor([1, 2]), True),
            (torch.tensor([1 + 2j]), torch.tensor([1 + 2j]), True),
            (torch.tensor([1 + 2j]), torch.tensor([1 - 2j]), False),
            (torch.ones(2, dtype=torch.bfloat16), torch.ones(2, dtype=torch.bfloat16), True),
            (torch.zeros(0, 3), torch.zeros(0, 3), True),
            (torch.tensor(True), torch.tensor(True), True),
            (torch.ones(2, 3).T, torch.ones(3, 2), True),
            (torch.eye(2).to_sparse(), torch.eye(2).to_sparse(), True),
            (torch.eye(2).to_sparse(), torch.eye(2), False),
        ],
    )
    def test_bit_patterns_shapes_and_dtypes(self, x, y, same):
        assert same_bits(x, y) is same

    def test_doubling_reaches_into_containers_and_leaves_scalars(self):
        (args, kwargs) = doubled(([torch.ones(2, 3)], 4), {"s": torch.tensor(5.0), "n": None})
        assert args[0][0].shape == (4, 3)
        assert (args[1], kwargs["s"].shape, kwargs["n"]) == (4, (), None)


TABLE: dict[str, nn.Module] = {}


class ThroughATable(nn.Module):
    """Calls one of its layers through a global table, where no clone can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(8, 8)
        self.fc2 = nn.Linear(8, 8)
        TABLE["fc2"] = self.fc2

    def forward(self, x: Tensor) -> Tensor:
        return TABLE["fc2"](torch.relu(self.fc1(x)))


class TestBypassed:
    def test_a_site_whose_layer_is_called_past_the_model_is_said(self):
        report = compiled(ThroughATable()).report
        assert all("equal bit for bit" in note for note in report.verification)
        (warning,) = report.warnings
        assert warning.startswith("site 'fc2' was bypassed: the model calls the host's own 'fc2'")
        assert "seeds there would see nothing" in str(report)

    def test_without_a_call_of_a_host_module_it_is_said_too(self):
        class Unbound(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.fc = nn.Linear(8, 8)
                self.keep = [weakref.WeakMethod(self.fc.forward)]

            def forward(self, x: Tensor) -> Tensor:
                return self.keep[0]()(x)

        (warning,) = compiled(Unbound()).report.warnings
        assert warning == "site 'fc' was bypassed: nothing called its layer; seeds there would see nothing"

    def test_a_copy_that_still_calls_the_host_names_what(self):
        with pytest.raises(VerificationError, match=r"it calls the host's own 'fc2', through a reference"):
            compiled(ThroughATable(), share=False)

    @pytest.mark.parametrize("name", HOSTS)
    def test_sites_that_are_reached_are_not_said(self, name):
        assert compiled(HOSTS[name]()).report.warnings == ()

    @pytest.mark.parametrize("frozen", [False, True])
    def test_fused_paths_do_not_hide_a_site(self, frozen):
        layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
        host = nn.TransformerEncoder(layer, 2).requires_grad_(not frozen)
        assert compiled(host, torch.randn(2, 3, 8)).report.warnings == ()

    def test_a_layer_that_only_train_mode_reaches_is_not_said(self):
        class Auxiliary(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.fc = nn.Linear(8, 8)
                self.extra = nn.Linear(8, 8)

            def forward(self, x: Tensor) -> Tensor:
                return self.fc(x) + (self.extra(x) if self.training else 0)

        assert compiled(Auxiliary()).report.warnings == ()

    def test_counting_leaves_nothing_behind(self):
        model = compiled(Functional()).model
        for site in morphc.seeds(model).sites.values():
            assert "forward" not in vars(site.site)
        for wrapper in store_of(model).wrapped:
            assert isinstance(wrapper.inner, types.MethodType)
