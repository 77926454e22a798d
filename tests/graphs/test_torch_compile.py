"""A morphed model under `torch.compile`: one graph that holds in every mode of every site, and equals eager mode."""

from __future__ import annotations

import copy
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table

import morphc
from morphc import Config, Lifecycle
from morphc.errors import SeedError
from morphc.loading import load_model
from morphc.runtime.cells import site_of

EXAMPLES = Path(__file__).parents[2] / "examples"
SWITCHED = (Lifecycle.TRAINING, Lifecycle.GRAFTING, Lifecycle.FINE_TUNING)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


class Block(nn.Module):
    """Two layers around a pointwise function, on a residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.fc1 = nn.Linear(16, 32)
        self.fc2 = nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(nn.functional.gelu(self.fc1(self.norm(x))))


def rows() -> Tensor:
    return torch.randn(4, 5, 16, generator=torch.Generator().manual_seed(1))


def morphed(blocks: int = 1, **options: object) -> nn.Sequential:
    torch.manual_seed(0)
    host = nn.Sequential(*(Block() for _ in range(blocks)))
    settings = {
        "seeds_per_layer": 4,
        "slots": 2,
        "rank": 2,
        "telemetry_every": 2,
        "backend": "torch",
        **options,
    }
    return morphc.compile(host, (rows(),), config=Config(**settings), verify=False)


def put(model: nn.Module, path: str, state: Lifecycle) -> None:
    """Set one seed of a site, with weights that do something."""
    site = morphc.seeds(model)[path]
    site.assign([1], state)
    site.alpha[1] = 0.5
    with torch.no_grad():
        for _, bank in site.site.slots.items():
            for param in bank.parameters():
                param.copy_(torch.linspace(-0.3, 0.3, param.numel()).view(param.shape))


def step(model: nn.Module, run: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output and all gradients of one step of `run`, which runs `model`; the gradients are cleared."""
    x = x.clone().requires_grad_()
    out = run(x)
    out.square().mean().backward()
    assert x.grad is not None
    found = {"out": out.detach(), "x": x.grad}
    found |= {name: param.grad for name, param in model.named_parameters() if param.grad is not None}
    for path, site in morphc.seeds(model).sites.items():
        for kind, bank in site.site.slots.items():
            found |= {f"{path}/{kind}/{n}": g.clone() for n, g in bank.grads().items() if g is not None}
            bank.zero_grads()
    model.zero_grad()
    return found


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=1e-5, atol=1e-7), name


@pytest.mark.parametrize("blueprint", ["bottleneck", "lowrank", "widen"])
def test_twelve_sites_switched_in_turn_compile_once(blueprint: str) -> None:
    model = morphed(6, blueprint=(blueprint, "affine"))
    eager = copy.deepcopy(model)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    fast = torch.compile(model, fullgraph=True, backend=counter)
    assert_same(step(model, fast, rows()), step(eager, eager, rows()))
    assert len(morphc.seeds(model).sites) == 12
    for number, path in enumerate(morphc.seeds(model).sites):
        for each in (model, eager):
            put(each, path, SWITCHED[number % 3])
        found = step(model, fast, rows())
        assert_same(found, step(eager, eager, rows()))
        assert any(name.startswith(f"{path}/") and value.any() for name, value in found.items())
    for each in (model, eager):
        morphc.seeds(each).alpha.mul_(0.5)
        morphc.seeds(each).tick()
    assert_same(step(model, fast, rows()), step(eager, eager, rows()))
    for path in morphc.seeds(model).sites:
        for each in (model, eager):
            morphc.seeds(each)[path].assign([1], Lifecycle.CULLED)
    assert_same(step(model, fast, rows()), step(eager, eager, rows()))
    assert counter.frame_count == 1
    measured, wanted = morphc.seeds(model).telemetry(), morphc.seeds(eager).telemetry()
    assert measured["count"].all()
    for key, value in wanted.items():
        torch.testing.assert_close(measured[key], value, rtol=1e-4, atol=1e-6, equal_nan=True)


def test_blocks_compiled_one_by_one_are_compiled_once_each() -> None:
    model = morphed(10)
    eager = copy.deepcopy(model)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    for block in model:
        block.compile(backend=counter, fullgraph=True)
    with torch._dynamo.config.patch(recompile_limit=10):
        assert_same(step(model, model, rows()), step(eager, eager, rows()))
        assert counter.frame_count == 10
        # All blocks have the same text, so that the caches of the compiler compile it once.
        assert len({site.site.key for path, site in morphc.seeds(model).sites.items() if "fc1" in path}) == 1
        for number, path in enumerate(("0.fc1", "3.fc2", "9.fc1")):
            for each in (model, eager):
                put(each, path, SWITCHED[number])
        assert_same(step(model, model, rows()), step(eager, eager, rows()))
        assert counter.frame_count == 10


def test_a_dormant_graph_is_the_hosts_own_bit_for_bit() -> None:
    model = morphed(2)
    host = morphc.detach(model)
    expected = torch.compile(host, fullgraph=True, backend="aot_eager")
    fast = torch.compile(model, fullgraph=True, backend="aot_eager")
    x, y = rows().requires_grad_(), rows().requires_grad_()
    mine, theirs = fast(x), expected(y)
    assert torch.equal(mine, theirs)
    mine.square().sum().backward()
    theirs.square().sum().backward()
    assert torch.equal(x.grad, y.grad)


def kept_for_the_backward(model: nn.Module) -> list[str]:
    """What makes the values that a compiled forward of 512 classes keeps, of those with a number for each class."""
    found: list[torch.fx.Node] = []

    def forward(graph: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        (out,) = (node for node in graph.graph.nodes if node.op == "output")
        found.extend(node for node in out.args[0] if isinstance(node, torch.fx.Node))
        return make_boxed_func(graph.forward)

    backend = aot_autograd(
        fw_compiler=forward,
        bw_compiler=lambda graph, _: make_boxed_func(graph.forward),
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table(),
    )

    def loss(x: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(model(x), target)

    torch.compile(loss, fullgraph=True, backend=backend)(torch.randn(8, 16), torch.arange(8)).backward()
    wide = [node for node in found if 512 in node.meta["val"].shape and 8 in node.meta["val"].shape]
    return [str(node.target) for node in wide]


def test_a_graph_keeps_the_sites_value_and_nothing_made_of_it() -> None:
    host = nn.Sequential(nn.Linear(16, 512, bias=False))
    model = morphc.compile(host, (torch.randn(8, 16),), config=Config(seeds_per_layer=4), verify=False)
    assert kept_for_the_backward(host) == ["aten.mm.default"]
    (kept,) = kept_for_the_backward(model)
    assert kept == "<built-in function getitem>"


@pytest.mark.parametrize("name", ["mlp", "vit", "resnet", "gpt2", "grow_mlp"])
def test_examples_are_one_graph_forward_and_backward(name: str) -> None:
    given = load_model(str(EXAMPLES / f"{name}.py"))
    host, args, how = given.host, given.args or (), given.kwargs or {}
    model = morphc.compile(host, args, how, config=Config(seeds_per_layer=6), verify=False).train()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    fast = torch.compile(model, fullgraph=True, backend=counter)
    path = next(iter(morphc.seeds(model).sites))
    for state in (Lifecycle.DORMANT, Lifecycle.TRAINING, Lifecycle.FOSSILIZED):
        if state is not Lifecycle.DORMANT:
            morphc.seeds(model)[path].assign([0], state)
        out = fast(*args, **how)
        value = out if isinstance(out, Tensor) else out.logits
        value.float().square().mean().backward()
    assert counter.frame_count == 1
    assert all(param.grad is not None for param in host.parameters() if param.requires_grad)
    assert morphc.seeds(model).telemetry()["count"].any()


def test_gradient_telemetry_is_taken_in_a_graph() -> None:
    model = morphed(gradient_telemetry=True)
    eager = copy.deepcopy(model)
    fast = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        step(model, fast, rows())
        step(eager, eager, rows())
    measured, wanted = morphc.seeds(model).telemetry(), morphc.seeds(eager).telemetry()
    for key in ("gradient_norm", "saliency"):
        assert wanted[key].all()
        torch.testing.assert_close(measured[key], wanted[key], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("isolation", ["straight_through", "reconstruction"])
def test_what_isolated_seeds_measure_and_learn_is_the_same(isolation: str) -> None:
    blend = "lerp" if isolation == "reconstruction" else "residual"
    model = morphed(isolation=isolation, isolation_every=2, blend=blend)
    put(model, "0.fc1", Lifecycle.TRAINING)
    eager = copy.deepcopy(model)
    fast = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(4):
        assert_same(step(model, fast, rows()), step(eager, eager, rows()))
    fits = [morphc.seeds(each)["0.fc1"].site.fitting.fits["bottleneck"].summary() for each in (model, eager)]
    assert fits[0][2].any()
    torch.testing.assert_close(*fits, equal_nan=True)


def test_a_frozen_host_trains_its_seeds_in_a_graph() -> None:
    model = morphed().requires_grad_(False)
    put(model, "0.fc1", Lifecycle.FINE_TUNING)
    eager = copy.deepcopy(model)
    for run in (torch.compile(model, fullgraph=True, backend="aot_eager"), eager):
        run(rows()).square().mean().backward()
    for name, grad in morphc.seeds(eager)["0.fc1"].slots["bottleneck"].grads().items():
        assert grad.any(), name
        torch.testing.assert_close(morphc.seeds(model)["0.fc1"].slots["bottleneck"].grads()[name], grad)


def test_a_checkpointed_block_in_a_graph_counts_once() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Block()

        def forward(self, x: Tensor) -> Tensor:
            return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False)

    torch.manual_seed(0)
    config = Config(seeds_per_layer=4, slots=2, rank=2, telemetry_every=1, backend="torch")
    model = morphc.compile(Checkpointed(), (rows(),), config=config, verify=False)
    put(model, "inner.fc1", Lifecycle.FOSSILIZED)
    eager = copy.deepcopy(model)
    fast = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same(step(model, fast, rows()), step(eager, eager, rows()))
    counts = [morphc.seeds(each).telemetry()["count"] for each in (model, eager)]
    assert torch.equal(*counts)


def test_a_graph_without_gradients_joins_too() -> None:
    model = morphed().eval()
    put(model, "0.fc1", Lifecycle.FOSSILIZED)
    fast = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.allclose(fast(rows()), model(rows()), atol=1e-6)
        assert not torch.equal(fast(rows()), morphc.detach(copy.deepcopy(model))(rows()))


def test_rows_may_vary_in_one_graph() -> None:
    model = morphed()
    put(model, "0.fc2", Lifecycle.GRAFTING)
    eager = copy.deepcopy(model)
    fast = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for many in (3, 5, 8):
        x = torch.randn(many, 5, 16)
        assert_same(step(model, fast, x), step(eager, eager, x))


def test_a_transform_traced_into_a_graph_is_refused() -> None:
    """torch refuses it, since an autograd function has no rule there; in eager mode the same call works."""
    model = morphed()
    x = rows()
    params = {name: param.detach() for name, param in model.named_parameters()}

    def loss(given: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, given, (x,)).square().mean()

    assert torch.func.grad(loss)(params).keys() == params.keys()
    with pytest.raises(Exception, match="setup_context"):
        torch.compile(torch.func.grad(loss), backend="aot_eager")(params)


def test_functional_call_in_a_graph_takes_the_hosts_parameters() -> None:
    model, x = morphed(), rows()
    put(model, "0.fc1", Lifecycle.FOSSILIZED)
    other = {name: param.detach() * 1.5 for name, param in nn.Sequential(Block()).named_parameters()}

    def run(given: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, given, (x,))

    fast = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.allclose(fast(other), run(other), atol=1e-6)
    assert not torch.allclose(fast(other), model(x))


def test_the_ops_pass_opcheck() -> None:
    site = morphc.seeds(morphed())["0.fc1"].site
    y, anchor = torch.randn(6, 32), torch.zeros(1, requires_grad=True)
    # Not aot_dispatch: it compares values, and what a dormant site keeps is one byte that nobody writes or reads. Nor
    # does anybody read the number that its backward returns.
    tests = ("test_schema", "test_faketensor")
    given = (y, None, None, site.cell, site.key, True, True)
    torch.library.opcheck(torch.ops.morphc.join.default, given, test_utils=tests)
    given = (y.requires_grad_(), None, None, anchor, site.cell, site.key, False)
    torch.library.opcheck(torch.ops.morphc.site.default, given, test_utils=tests)
    kept = torch.ops.morphc.join(y.detach().clone(), None, None, site.cell, site.key, False, True)
    torch.library.opcheck(torch.ops.morphc.mark.default, (y.detach(),), test_utils=tests)
    grad, mark = torch.randn(6, 32), torch.ops.morphc.mark(y.detach())
    given = (grad, kept, mark, None, None, site.cell, site.key, [32, 1], False, False)
    torch.library.opcheck(torch.ops.morphc.join_backward.default, given, test_utils=tests)


def test_a_graph_whose_model_is_gone_says_so() -> None:
    model = morphed()
    cell = morphc.seeds(model)["0.fc1"].site.cell
    assert site_of(cell)[0].path == "0.fc1"
    del model
    gc.collect()
    with pytest.raises(SeedError, match=r"torch\.compile the model at hand"):
        site_of(cell.clone())


SECOND = """
import json, sys, torch
from torch import nn
from torch._dynamo.utils import counters
import morphc
torch.manual_seed(0)
# Matrix products only, for which inductor needs no compiler.
host = nn.Sequential(nn.Linear(8, 16, bias=False), nn.Linear(16, 8, bias=False))
config = morphc.Config(seeds_per_layer=4, slots=2, rank=2, backend="torch")
x = torch.ones(4, 8)
model = morphc.compile(host, (x,), config=config, verify=False)
fast = torch.compile(model, fullgraph=True)
fast(x).backward(x)
found = {"aot": dict(counters["aot_autograd"]), "inductor": dict(counters["inductor"])}
site = morphc.seeds(model)["0"]
site.assign([1], morphc.Lifecycle.FOSSILIZED)
site.alpha[1] = 1
site.slots["bottleneck"].out_bias.data.fill_(1)
found["out"], found["eager"] = fast(x).tolist(), model(x).tolist()
print(json.dumps(found))
"""


def test_a_second_process_takes_the_graphs_from_the_caches(tmp_path: Path) -> None:
    # One thread, and no trials of the processor: nothing is left to compile, and to wait for.
    settings = {"CACHE_DIR": str(tmp_path), "COMPILE_THREADS": "1", "VEC_ISA_OK": "0"}
    environment = os.environ | {f"TORCHINDUCTOR_{name}": value for name, value in settings.items()}
    found = []
    for _ in range(2):
        arguments = [sys.executable, "-c", SECOND]
        run = subprocess.run(arguments, capture_output=True, text=True, env=environment, check=False)
        assert run.returncode == 0, run.stderr
        found.append(json.loads(run.stdout.splitlines()[-1]))
    first, second = found
    assert first["aot"]["autograd_cache_miss"] == 1
    assert not first["aot"].get("autograd_cache_hit")
    assert second["aot"]["autograd_cache_hit"] == 1
    assert not second["aot"].get("autograd_cache_miss")
    assert not second["inductor"].get("fxgraph_cache_miss")
    for each in found:
        torch.testing.assert_close(torch.tensor(each["out"]), torch.tensor(each["eager"]))
