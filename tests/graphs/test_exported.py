"""What leaves the process: exports, AOTInductor, ONNX, models sent to spawned processes, state dicts."""

from __future__ import annotations

import importlib.util
import io
import shutil
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

import morphc
from morphc import Config, Lifecycle


class Host(nn.Module):
    """A convolution, a norm and two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.fc1 = nn.Linear(8, 12)
        self.fc2 = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(x))).mean((2, 3))
        return self.fc2(torch.relu(self.fc1(x)))


def images() -> Tensor:
    return torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def grown(*paths: str, blueprint: str = "bottleneck") -> nn.Module:
    """The host in eval mode, with one seed of each path for good."""
    torch.manual_seed(0)
    config = Config(seeds_per_layer=4, slots=2, rank=2, blueprint=blueprint, backend="torch")
    model = morphc.compile(Host(), (images(),), config=config, verify=False).eval()
    for path in paths:
        site = morphc.seeds(model)[path]
        site.assign([1], Lifecycle.FOSSILIZED)
        site.alpha[1] = 0.7
        with torch.no_grad():
            for param in site.slots[blueprint].parameters():
                param.copy_(torch.linspace(-0.5, 0.5, param.numel()).view(param.shape))
    return model


def names_of(program: torch.export.ExportedProgram) -> set[str]:
    return {str(node.target) for node in program.graph.nodes if node.op == "call_function"}


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
@pytest.mark.parametrize("paths", [(), ("conv", "fc1")], ids=["dormant", "grown"])
def test_a_morphed_model_exports_as_plain_torch(strict: bool, paths: tuple[str, ...]) -> None:
    model, x = grown(*paths), images()
    if paths:
        assert not torch.equal(model(x), morphc.detach(grown(*paths))(x))
    program = torch.export.export(model, (x,), strict=strict)
    assert not any("morphc" in name for name in names_of(program))
    torch.testing.assert_close(program.module()(x), model(x))


def test_an_exported_program_is_saved_and_loaded() -> None:
    x = images()
    folded = morphc.fold(grown("conv", "fc1"))
    many = torch.export.Dim("many", min=2)
    program = torch.export.export(folded, (x,), dynamic_shapes=({0: many},))
    kept = io.BytesIO()
    torch.export.save(program, kept)
    kept.seek(0)
    loaded = torch.export.load(kept).module()
    more = torch.cat([x, x, x])
    torch.testing.assert_close(loaded(more), folded(more))
    torch.testing.assert_close(loaded(more), grown("conv", "fc1")(more))


@pytest.mark.skipif(
    shutil.which("g++") is None, reason="AOTInductor builds for the CPU with g++, and there is none"
)
def test_a_folded_model_goes_through_aot_inductor(tmp_path: Path) -> None:
    x = torch.randn(3, 8)
    host = nn.Sequential(nn.Linear(8, 8))
    config = Config(seeds_per_layer=4, slots=2, rank=2, blueprint="affine", backend="torch")
    model = morphc.compile(host, (x,), config=config, verify=False).eval()
    site = morphc.seeds(model)["0"]
    site.assign([1], Lifecycle.FOSSILIZED)
    site.alpha[1] = 1
    site.slots["affine"].shift.data.fill_(0.5)
    folded = morphc.fold(model)
    program = torch.export.export(folded, (x,))
    # What is built is to be right, not fast.
    quick = {"aot_inductor.compile_wrapper_opt_level": "O0", "cpp.vec_isa_ok": False}
    package = torch._inductor.aoti_compile_and_package(
        program, package_path=str(tmp_path / "folded.pt2"), inductor_configs=quick
    )
    ran = torch._inductor.aoti_load_package(package)(x)
    torch.testing.assert_close(ran, model(x))
    assert not torch.equal(ran, host(x))


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnxscript", "onnx")),
    reason="torch.onnx needs onnxscript and onnx, which are not installed",
)
def test_a_folded_model_goes_to_onnx(tmp_path: Path) -> None:
    from onnx.reference import ReferenceEvaluator

    x = images()
    folded = morphc.fold(grown("conv", "fc1"))
    file = tmp_path / "folded.onnx"
    torch.onnx.export(folded, (x,), str(file), dynamo=True, verbose=False)
    session = ReferenceEvaluator(str(file))
    (out,) = session.run(None, {session.input_names[0]: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(out), folded(x), rtol=1e-4, atol=1e-5)


def _work(model: nn.Module, x: Tensor, answers: object) -> None:
    """What a spawned process does with a model that it was sent."""
    model.train()
    out = model(x)
    out.square().mean().backward()
    fast = torch.compile(model, backend="aot_eager", fullgraph=True)
    site = morphc.seeds(model)["fc1"]
    same = torch.allclose(fast(x), model(x), atol=1e-6)
    # As lists: a tensor would be shared through a file that dies with this process.
    answers.put((model.eval()(x).tolist(), site.lifecycle.tolist(), same))  # type: ignore[attr-defined]


def test_a_spawned_process_takes_the_model() -> None:
    model, x = grown("conv", "fc1"), images()
    expected = model(x).detach()
    context = mp.get_context("spawn")
    answers = context.SimpleQueue()
    worker = context.Process(target=_work, args=(model.requires_grad_(True), x, answers))
    worker.start()
    worker.join(120)
    assert worker.exitcode == 0
    out, states, same = answers.get()
    # In training mode BatchNorm's statistics moved over there, and, since the memory is shared, here too.
    assert len(out) == len(expected)
    torch.testing.assert_close(torch.tensor(out), model(x).detach())
    assert states == morphc.seeds(model)["fc1"].lifecycle.tolist()
    assert same


def test_a_saved_state_dict_is_loaded_with_weights_only() -> None:
    model, x = grown("conv", "fc1"), images()
    kept = io.BytesIO()
    torch.save(model.state_dict(), kept)
    kept.seek(0)
    fresh = grown()
    assert not torch.equal(fresh(x), model(x))
    fresh.load_state_dict(torch.load(kept, weights_only=True), strict=True)
    assert torch.equal(fresh(x), model(x))
    # A graph that was made before sees what was loaded, too.
    late = grown()
    fast = torch.compile(late, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        before = fast(x)
        late.load_state_dict(model.state_dict())
        with torch._dynamo.config.patch(error_on_recompile=True):
            torch.testing.assert_close(fast(x), model(x))
    assert not torch.allclose(before, model(x))
