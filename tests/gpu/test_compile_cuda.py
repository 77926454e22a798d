"""A morphed model under torch.compile on a GPU: inductor's graphs in every mode, and CUDA graphs between switches."""

from __future__ import annotations

import copy

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn

import morphc
from morphc import Config, Lifecycle
from morphc.errors import SeedError

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA device, and this machine has none"
)
SWITCHED = (Lifecycle.TRAINING, Lifecycle.GRAFTING, Lifecycle.FINE_TUNING)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


class Block(nn.Module):
    """Two layers around a pointwise function, on a residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(64)
        self.fc1 = nn.Linear(64, 128)
        self.fc2 = nn.Linear(128, 64)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(nn.functional.gelu(self.fc1(self.norm(x))))


def rows() -> Tensor:
    return torch.randn(8, 32, 64, generator=torch.Generator().manual_seed(1)).cuda()


def morphed(blocks: int, **options: object) -> nn.Module:
    torch.manual_seed(0)
    host = nn.Sequential(*(Block() for _ in range(blocks))).cuda()
    settings = {"seeds_per_layer": 16, "slots": 4, "rank": 16, "telemetry_every": 2, **options}
    return morphc.compile(host, (rows(),), config=Config(**settings), verify=False)


def put(model: nn.Module, path: str, state: Lifecycle) -> None:
    site = morphc.seeds(model)[path]
    site.assign([1, 5], state)
    site.alpha[[1, 5]] = 0.5
    with torch.no_grad():
        for _, bank in site.site.slots.items():
            for param in bank.parameters():
                param.copy_(torch.linspace(-0.3, 0.3, param.numel(), device="cuda").view(param.shape))


def step(model: nn.Module, run: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output and all gradients of one step, copied out of what a CUDA graph will write to again."""
    torch.compiler.cudagraph_mark_step_begin()
    x = x.clone().requires_grad_()
    out = run(x)
    out.square().mean().backward()
    assert x.grad is not None
    found = {"out": out.detach().clone(), "x": x.grad.clone()}
    found |= {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    for path, site in morphc.seeds(model).sites.items():
        for kind, bank in site.site.slots.items():
            for name, grad in bank.grads().items():
                found[f"{path}/{kind}/{name}"] = torch.zeros(1) if grad is None else grad.clone()
            bank.zero_grads()
    model.zero_grad(set_to_none=True)
    return found


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], what: str) -> None:
    for name, value in expected.items():
        mine = found[name]
        if not value.any():
            assert not mine.any(), (what, name)
        else:
            torch.testing.assert_close(mine, value, rtol=2e-3, atol=2e-5, msg=f"{what}: {name}")


@pytest.mark.parametrize("blueprint", ["bottleneck", "lowrank"])
def test_sites_switched_in_turn_compile_once(blueprint: str) -> None:
    model = morphed(6, blueprint=blueprint)
    eager = copy.deepcopy(model)
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    fast = torch.compile(model, fullgraph=True, backend=counter)
    assert_same(step(model, fast, rows()), step(eager, eager, rows()), "dormant")
    for number, path in enumerate(morphc.seeds(model).sites):
        for each in (model, eager):
            put(each, path, SWITCHED[number % 3])
        # The second step takes the kernels that the first has made ready.
        for _ in range(2):
            assert_same(step(model, fast, rows()), step(eager, eager, rows()), path)
    assert counter.frame_count == 1
    measured, wanted = morphc.seeds(model).telemetry(), morphc.seeds(eager).telemetry()
    for key in ("count", "mean", "variance"):
        torch.testing.assert_close(measured[key], wanted[key], rtol=1e-2, atol=1e-4)


def recordings() -> int:
    """CUDA graphs that torch has recorded for the current device so far."""
    from torch._inductor import cudagraph_trees

    manager = cudagraph_trees.get_manager(torch.cuda.current_device(), create_if_none_exists=False)
    return 0 if manager is None else manager.new_graph_id().id


def test_growth_between_replays_records_nothing_anew() -> None:
    """alpha, ticks and states change between replays; what a replay reads is what they are then."""
    model = morphed(2)
    for path in ("0.fc1", "1.fc2"):
        put(model, path, Lifecycle.FINE_TUNING)
    eager = copy.deepcopy(model)
    fast = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    for _ in range(4):
        step(model, fast, rows())
    before = recordings()
    assert before > 0
    seen = []
    for alpha in (0.1, 0.7, 0.0):
        for each in (model, eager):
            morphc.seeds(each)["0.fc1"].alpha[1] = alpha
            morphc.seeds(each).tick()
        found = step(model, fast, rows())
        assert_same(found, step(eager, eager, rows()), f"alpha {alpha}")
        seen.append(found["out"])
    assert not torch.equal(seen[0], seen[1])
    # Another seed joins, and one leaves, while the site stays active.
    for each in (model, eager):
        morphc.seeds(each)["0.fc1"].assign([9], Lifecycle.FINE_TUNING)
        morphc.seeds(each)["0.fc1"].assign([5], Lifecycle.CULLED)
    assert_same(step(model, fast, rows()), step(eager, eager, rows()), "another seed")
    # `recordings` itself takes a number each time that it is asked.
    assert recordings() == before + 1
    assert morphc.seeds(model).telemetry()["count"].all()


def test_a_switch_between_replays_is_recorded_and_one_back_is_not() -> None:
    model = morphed(2)
    eager = copy.deepcopy(model)
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    fast = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    for state in (Lifecycle.DORMANT, Lifecycle.FINE_TUNING, Lifecycle.TRAINING, Lifecycle.DORMANT):
        for each in (model, eager):
            if state is Lifecycle.DORMANT:
                morphc.seeds(each)["0.fc1"].assign([1, 5], Lifecycle.CULLED)
            else:
                put(each, "0.fc1", state)
        with torch._dynamo.config.patch(error_on_recompile=counter.frame_count > 0):
            for _ in range(4):
                assert_same(step(model, fast, rows()), step(eager, eager, rows()), state.name)
        counter.frame_count = 1
    before = recordings()
    for _ in range(3):
        step(model, fast, rows())
    assert recordings() == before + 1


def test_a_switch_while_a_graph_is_captured_is_refused() -> None:
    model = morphed(1).eval()
    x = rows()
    with torch.no_grad():
        model(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        site = morphc.seeds(model)["0.fc1"].site
        store = site.state.store
        with torch.cuda.graph(graph):
            model(x)
            with pytest.raises(SeedError, match="while a CUDA graph is being captured"):
                store.set_mode(site, type(site.mode).ACTIVE)
    assert site.mode == 0


def test_a_dormant_model_keeps_nothing_for_the_backward() -> None:
    """Peak memory of a compiled step stays the host's: what a dormant site keeps is one byte."""
    peaks = []
    for model in (morphed(4), morphc.detach(morphed(4))):
        torch._dynamo.reset()
        fast = torch.compile(model, fullgraph=True)
        x = torch.randn(64, 512, 64, device="cuda")
        for _ in range(2):
            fast(x).square().mean().backward()
        model.zero_grad()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        for _ in range(2):
            fast(x).square().mean().backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del model, fast, x
    assert peaks[0] <= 1.02 * peaks[1]
