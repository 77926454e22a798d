"""The ladder: rewritten, matched, as written; each with the file:line that decided it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from compiler_hosts import (
    Branchy,
    Functional,
    Matched,
    Mlp,
    Nested,
    assert_same,
    compiled,
    line_of,
    misses_of,
    regions_of,
    rows,
    run,
    sites_of,
)
from torch import Tensor, nn

import morphc
from morphc.compiler import default_passes
from morphc.compiler import inspect as inspect_host
from morphc.config import Config
from morphc.errors import ExampleInputError, HostForwardError
from morphc.passes.capture import Capture
from morphc.passes.manager import run_passes
from morphc.passes.program import Program
from morphc.passes.verify import same_bits


def captured(host: nn.Module, *args: Any, **kwargs: Any) -> Program:
    program = Program(host, args or (rows(),), kwargs, Config(seeds_per_layer=2))
    run_passes(program, [Capture()])
    return program


class One(nn.Module):
    """A host with one layer and one parameter; subclasses write the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.weight = nn.Parameter(torch.randn(8, 8) / 3)


class TestLevels:
    def test_a_plain_forward_is_rewritten(self):
        region = captured(Mlp()).regions[""]
        assert (region.level, region.reason, sorted(region.graphs)) == ("rewritten", "", ["eval", "train"])
        assert region.source == line_of(Mlp.forward, "def forward")

    def test_a_branch_on_a_shape_is_matched_and_names_its_line(self):
        region = captured(Matched()).regions[""]
        assert (region.level, list(region.graphs)) == ("matched", ["recorded"])
        assert (
            region.reason == f"a branch depends on a traced value at {line_of(Matched.forward, 'if x.shape')}"
        )

    def test_a_branch_on_a_value_is_as_written_and_names_its_line(self):
        region = captured(Branchy()).regions[""]
        assert (region.level, region.graphs) == ("as_written", {})
        where = line_of(Branchy.forward, "if h.sum()")
        assert region.reason == f"control flow reads a tensor's value (__bool__) at {where}"

    def test_each_region_of_a_tree_has_its_own_level(self):
        levels = {path: r.level for path, r in captured(Nested()).regions.items()}
        assert levels == {"": "rewritten", "first": "rewritten", "second": "matched", "third.1": "as_written"}

    def test_layers_get_the_level_of_the_forward_that_calls_them(self):
        sites = sites_of(compiled(Nested()))
        assert {path: site.captured_as for path, site in sites.items()} == {
            "first.fc1": "rewritten",
            "first.fc2": "rewritten",
            "lift": "rewritten",
            "second.fc1": "matched",
            "second.fc2": "matched",
            "third.0": "rewritten",
            "third.1.fc1": "as_written",
            "third.1.fc2": "as_written",
            "third.1.spare": "as_written",
        }
        assert line_of(Branchy.forward, "if h.sum()") in sites["third.1.fc2"].why_not_better
        assert sites["third.1.fc2"].source == line_of(Branchy.forward, "self.fc2(h)")
        assert sites["first.fc1"].why_not_better == ""

    def test_a_layer_that_the_example_never_reached_gets_its_site_and_says_so(self):
        spare = sites_of(compiled(Branchy()))["spare"]
        assert not spare.executed
        assert spare.note == "not reached by the example input; watched from its type"

    def test_a_region_that_the_example_never_reached_is_as_written(self):
        class Skips(One):
            def __init__(self) -> None:
                super().__init__()
                self.other = Mlp()

            def forward(self, x: Tensor) -> Tensor:
                return self.fc(x)

        region = captured(Skips()).regions["other"]
        assert (region.level, region.reason) == ("as_written", "the example input never reached it")

    def test_symbolic_false_leaves_the_first_rung_out(self):
        result = compiled(Functional(), passes="capture{symbolic=false}")
        region = regions_of(result)[""]
        assert (region.level, region.runs) == ("matched", False)
        assert region.reason.startswith("symbolic tracing was turned off")
        assert set(sites_of(result)) == {"fc1", "weight"}

    def test_a_loop_over_values_is_as_written(self):
        class Halts(One):
            def forward(self, x: Tensor) -> Tensor:
                for _ in range(int(x.abs().max().item())):
                    x = self.fc(x)
                return x

        region = captured(Halts(), torch.full((2, 8), 3.0)).regions[""]
        assert region.level == "as_written"
        assert line_of(Halts.forward, "for _ in range") in region.reason

    def test_reading_a_value_that_is_no_input_keeps_the_level(self):
        class ReadsBuffer(One):
            def __init__(self) -> None:
                super().__init__()
                self.register_buffer("limit", torch.tensor(3.0))

            def forward(self, x: Tensor) -> Tensor:
                return self.fc(x) if self.limit.item() > 1 else x

        assert captured(ReadsBuffer()).regions[""].level == "rewritten"


class TestTwoGraphs:
    def test_train_and_eval_are_traced_apart(self):
        class Modal(One):
            def forward(self, x: Tensor) -> Tensor:
                h = F.linear(x, self.weight)
                if self.training:
                    h = torch.relu(h)
                return self.fc(h)

        result = compiled(Modal())
        text = result.report.graphs[""]
        assert "def forward_train(self, x):" in text
        train, evaluation = text.split("def forward_eval")
        assert "relu" in train
        assert "relu" not in evaluation
        host = Modal()
        assert_same(host, compiled(host).model, rows(5))

    def test_equal_graphs_are_shown_once(self):
        assert "def forward(self, x):" in compiled(Functional()).report.graphs[""]

    def test_dropout_follows_the_flag(self):
        host = Mlp()
        model = compiled(host).model
        assert same_bits(run(host, rows(), training=False)[0], run(model, rows(), training=False)[0])
        assert not torch.equal(run(model, rows(), training=True)[0], run(model, rows(), training=False)[0])


class TestWhatAGraphCannotSay:
    """Each of these traces without a value, and would be wrong as a graph."""

    def check(self, cls: type[One], words: str) -> None:
        host = cls()
        result = compiled(host, verify=False)
        region = regions_of(result)[""]
        assert (region.level, region.runs) == ("matched", False)
        assert words in region.reason
        assert "weight" in sites_of(result)
        assert_same(host, result.model, rows(4))

    def test_a_forward_that_keeps_its_last_value(self):
        class Stashes(One):
            def forward(self, x: Tensor) -> Tensor:
                self.last = torch.relu(F.linear(x, self.weight))
                return self.fc(self.last)

        self.check(Stashes, "keeps something in 'last'")
        host = Stashes()
        model = compiled(host, verify=False).model
        model(rows(4))
        assert model.last.shape == (4, 8)
        assert not hasattr(host, "last")

    def test_a_forward_that_counts_its_calls(self):
        class Counts(One):
            def __init__(self) -> None:
                super().__init__()
                self.calls = 0

            def forward(self, x: Tensor) -> Tensor:
                self.calls += 1
                return self.fc(torch.relu(F.linear(x, self.weight)))

        self.check(Counts, "keeps something in 'calls'")
        model = compiled(Counts(), verify=False).model
        model(rows())
        assert model.calls == 1

    def test_a_forward_that_appends_to_a_list(self):
        class Lists(One):
            def __init__(self) -> None:
                super().__init__()
                self.seen: list[Any] = []

            def forward(self, x: Tensor) -> Tensor:
                h = torch.relu(F.linear(x, self.weight))
                self.seen.append(h)
                return self.fc(h)

        self.check(Lists, "keeps something in 'seen'")

    def test_a_forward_that_updates_a_buffer(self):
        class Steps(One):
            def __init__(self) -> None:
                super().__init__()
                self.register_buffer("steps", torch.zeros(()))

            def forward(self, x: Tensor) -> Tensor:
                self.steps += 1
                return self.fc(torch.relu(F.linear(x, self.weight)))

        self.check(Steps, "keeps something in 'steps'")

    def test_a_forward_that_flips_pythons_coin(self):
        class Flips(One):
            def forward(self, x: Tensor) -> Tensor:
                h = torch.relu(F.linear(x, self.weight))
                return self.fc(h) if random.random() < 0.5 else h

        region = captured(Flips()).regions[""]
        assert region.level == "matched"
        assert "draws random numbers" in region.reason
        host = Flips()
        model = compiled(host).model
        for seed in range(4):
            random.seed(seed)
            expected = host(rows())
            random.seed(seed)
            assert same_bits(model(rows()), expected)

    def test_a_forward_that_draws_from_numpy(self):
        class Draws(One):
            def forward(self, x: Tensor) -> Tensor:
                return torch.relu(F.linear(x, self.weight)) * float(np.random.rand())

        assert "draws random numbers" in captured(Draws()).regions[""].reason

    def test_noise_of_a_constant_shape(self):
        class Noise(One):
            def forward(self, x: Tensor) -> Tensor:
                return self.fc(torch.relu(F.linear(x, self.weight)) + torch.randn(8))

        assert captured(Noise()).regions[""].level == "matched"
        host = Noise()
        assert_same(host, compiled(host).model, rows())

    def test_a_constant_tensor_made_in_the_forward(self):
        class Constant(One):
            def forward(self, x: Tensor) -> Tensor:
                return self.fc(torch.relu(F.linear(x, self.weight)) + torch.arange(8.0))

        self.check(Constant, "makes a tensor that does not depend on its inputs")

    def test_a_part_under_no_grad(self):
        class Half(One):
            def forward(self, x: Tensor) -> Tensor:
                with torch.no_grad():
                    h = torch.relu(F.linear(x, self.weight))
                return self.fc(h)

        self.check(Half, "runs under no_grad or autocast")
        reason = captured(Half()).regions[""].reason
        assert line_of(Half.forward, "torch.relu(F.linear") in reason

    def test_a_part_under_autocast(self):
        class Cast(One):
            def forward(self, x: Tensor) -> Tensor:
                with torch.autocast("cpu", torch.bfloat16):
                    h = torch.relu(F.linear(x, self.weight))
                return self.fc(h.float())

        self.check(Cast, "runs under no_grad or autocast")

    def test_a_branch_on_whether_gradients_are_on(self):
        class Asks(One):
            def forward(self, x: Tensor) -> Tensor:
                h = torch.relu(F.linear(x, self.weight))
                return self.fc(h) if torch.is_grad_enabled() else h

        self.check(Asks, "asks whether gradients are on")
        host = Asks()
        with torch.no_grad():
            assert same_bits(host(rows()), compiled(host).model(rows()))


class Signatures(One):
    """One positional argument, one with a default, two that only go by keyword."""

    def forward(
        self, x: Tensor, y: Tensor | None = None, *, gain: float = 1.0, bias: Tensor | None = None
    ) -> Tensor:
        h = torch.relu(F.linear(x, self.weight)) * gain
        if y is not None:
            h = h + y
        if bias is not None:
            h = h * bias
        return self.fc(h)


class TestArguments:
    @pytest.mark.parametrize("given", [(), ("y",), ("gain",), ("bias",), ("y", "gain", "bias")], ids="-".join)
    def test_every_way_to_call_equals_the_host_whatever_the_example_gave(self, given):
        values = {"y": rows(3), "gain": 0.5, "bias": torch.full((8,), 2.0)}
        host = Signatures()
        model = compiled(host, rows(), example_kwargs={name: values[name] for name in given}).model
        for names in [(), ("y",), ("gain",), ("bias",), ("y", "gain", "bias"), ("bias", "y")]:
            assert_same(host, model, rows(), **{name: values[name] for name in names})
        assert_same(host, model, rows(), None)
        assert_same(host, model, rows(), rows(3))
        assert_same(host, model, x=rows(), gain=3.0)

    def test_an_example_given_by_keyword_alone(self):
        host = Functional()
        model = compiled(host).model
        other = morphc.compile(host, example_kwargs={"x": rows()}, config=Config(seeds_per_layer=2))
        assert_same(host, model, x=rows())
        assert_same(host, other, rows())

    def test_star_args_are_matched_and_named(self):
        class Stars(One):
            def forward(self, *xs: Tensor) -> Tensor:
                return self.fc(torch.relu(F.linear(sum(xs), self.weight)))

        host = Stars()
        result = compiled(host, rows(), rows())
        region = regions_of(result)[""]
        assert region.level == "matched"
        assert region.reason == f"its forward takes *xs at {line_of(Stars.forward, 'def forward')}"
        assert_same(host, result.model, rows())
        assert_same(host, result.model, rows(), rows(), rows())

    def test_star_kwargs_are_matched(self):
        class Stars(One):
            def forward(self, x: Tensor, **extra: Tensor) -> Tensor:
                return self.fc(torch.relu(F.linear(x, self.weight)) + extra.get("y", 0))

        host = Stars()
        result = compiled(host, rows(), example_kwargs={"y": rows()})
        assert regions_of(result)[""].level == "matched"
        assert_same(host, result.model, rows())
        assert_same(host, result.model, rows(), y=rows())

    def test_none_for_an_argument_without_a_default_is_matched(self):
        class Needs(One):
            def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
                h = torch.relu(F.linear(x, self.weight))
                return self.fc(h if mask is None else h * mask)

        host = Needs()
        result = compiled(host, rows(), None)
        assert "argument 'mask' was None in the example" in regions_of(result)[""].reason
        assert_same(host, result.model, rows(), None)
        assert_same(host, result.model, rows(), torch.ones(8))

    def test_a_generator_forward(self):
        class Yields(One):
            def forward(self, x: Tensor) -> Iterator[Tensor]:
                for _ in range(2):
                    x = self.fc(x)
                    yield x

        host = Yields()
        result = compiled(host)
        assert "fc" in sites_of(result)
        for mine, theirs in zip(result.model(rows()), host(rows()), strict=True):
            assert same_bits(mine, theirs)


class TestExamples:
    def test_missing_example_inputs_say_what_to_give(self):
        with pytest.raises(ExampleInputError, match=r"no example inputs: pass example_inputs=\(x, \.\.\.\)"):
            morphc.compile(Mlp())

    def test_a_refused_example_names_the_line_of_the_host(self):
        with pytest.raises(HostForwardError) as caught:
            compiled(Mlp(), rows(3, 9))
        message = str(caught.value)
        assert message.startswith(
            f"Mlp's own forward fails on the example inputs at {line_of(Mlp.forward, 'fc1')}"
        )
        assert "inputs must be on the model's device" in message

    @pytest.mark.parametrize(
        ("example", "words"), [({"x": 1}, "example_kwargs"), (3, "a tuple"), ("x", "a tuple")]
    )
    def test_example_inputs_of_a_wrong_type_say_what_to_give(self, example, words):
        with pytest.raises(ExampleInputError, match=words):
            morphc.compile(Mlp(), example)

    def test_a_single_tensor_may_stand_alone(self):
        assert len(morphc.compile(Mlp(), rows(), config=Config(seeds_per_layer=2))(rows())) == 3

    def test_a_model_on_meta_is_captured_without_memory(self):
        with torch.device("meta"):
            host = nn.Sequential(nn.Linear(20_000, 20_000), nn.ReLU(), nn.Linear(20_000, 20_000))
        report = inspect_host(
            host, (torch.empty(4, 20_000, device="meta"),), config=Config(seeds_per_layer=64)
        )
        assert [(site.path, site.seeds) for site in report.plan.sites] == [("0", 64), ("2", 64)]
        assert all(p.is_meta for p in host.parameters())

    def test_a_host_that_refuses_fake_tensors_is_run_on_real_ones(self):
        class Numpy(One):
            def forward(self, x: Tensor) -> Tensor:
                return self.fc(torch.from_numpy(np.sort(x.detach().numpy())))

        result = compiled(Numpy())
        assert regions_of(result)[""].level == "as_written"
        assert "fc" in sites_of(result)

    def test_zero_rows_and_no_parameters_compile(self):
        assert set(sites_of(compiled(Mlp(), torch.randn(0, 8)))) == {"fc1", "fc2"}
        result = compiled(nn.Sequential(nn.ReLU(), nn.Flatten()), config=Config())
        assert sites_of(result) == {}
        assert {m.reason for m in misses_of(result).values()} >= {"it has no weights of its own"}


def test_capture_is_idempotent_and_keeps_its_graphs():
    program = captured(Functional())
    before = {path: region.graphs for path, region in program.regions.items()}
    run_passes(program, default_passes()[:2])
    assert {path: region.graphs for path, region in program.regions.items()} == before


def test_shapes_and_lines_of_every_node_of_a_rewritten_graph():
    program = Program(Functional(), (rows(),), {}, Config(seeds_per_layer=2))
    run_passes(program, default_passes()[:2])
    nodes = {n.name: n for n in program.regions[""].graphs["eval"].nodes}
    assert nodes["fc1"].meta["shape"] == (3, 16)
    assert nodes["linear"].meta["shape"] == (3, 4)
    assert nodes["linear"].meta["dtype"] is torch.float32
    assert nodes["linear"].meta["source"] == line_of(Functional.forward, "F.linear")
