"""A folded model needs no morphc: it pickles, copies, trains and compiles like any module."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from growth import check, distance, grow, morph
from torch import nn
from torch.utils.hooks import RemovableHandle

import morphc
from morphc.errors import FoldError
from morphc.kernels.blueprints import base

WITHOUT_MORPHC = """
import pickle, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "morphc":
            raise ImportError("morphc is not there")
sys.meta_path.insert(0, Refuse())
sys.path[:] = [p for p in sys.path if p not in ("", ".")]
import torch
with open(sys.argv[1], "rb") as file:
    model, x, expected = pickle.load(file)
assert torch.equal(model(x), expected), (model(x) - expected).abs().max()
seen = []
for module in model.modules():
    for _ in range(50):
        module.register_forward_hook(lambda *args: seen.append(1))
assert torch.equal(model(x), expected), "a new hook took the place of a grown module"
assert seen
try:
    import morphc
except ImportError:
    print("plain")
"""


def grown_model() -> tuple[nn.Module, nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    host = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Flatten())
    host.append(nn.Linear(96, 10)).double().eval()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    blueprints = ("affine", "lowrank", "bottleneck", "depthwise", "widen")
    model = morph(host, x, blueprint=blueprints)
    for path, seed, blueprint in [
        ("0", 0, "affine"), ("0", 1, "bottleneck"), ("0", 2, "depthwise"), ("3", 0, "widen"), ("3", 1, "lowrank"),
        ("5", 2, "bottleneck"), ("5", 3, "affine"),
    ]:  # fmt: skip
        grow(model, path, [seed], blueprint)
    return host, model, x


def test_pickles_into_a_process_without_morphc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host, model, x = grown_model()
    # A number that a hook on the same layer would get in the new process, were it not told which are taken.
    monkeypatch.setattr(RemovableHandle, "next_id", 50)
    folded = check(model, host, x)
    data = pickle.dumps((folded, x, folded(x).detach()))
    assert b"morphc" not in data
    file = tmp_path / "folded model.pkl"
    file.write_bytes(data)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_MORPHC, str(file)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
    )
    assert done.stdout.strip() == "plain", done.stderr


def test_nothing_of_morphc_is_left() -> None:
    _, model, _ = grown_model()
    folded = morphc.fold(model)
    for module in folded.modules():
        assert not type(module).__module__.startswith("morphc")
        assert "forward" not in vars(module)
        assert "morphc" not in module._modules
        assert not any(name.startswith("_morphc") for name in vars(module))
    assert type(folded) is nn.Sequential
    assert len(folded) == 6


def test_state_dict_keys_are_the_host_s() -> None:
    host, model, _ = grown_model()
    folded = morphc.fold(model)
    keys, before = set(folded.state_dict()), set(host.state_dict())
    assert before <= keys
    assert {key.split(".")[1] for key in keys - before} == {"grown"}
    morphc.fold(model).load_state_dict(folded.state_dict(), strict=True)


def shared(model: nn.Module) -> set[int]:
    return {parameter.data_ptr() for parameter in model.parameters()}


def test_the_morphed_model_stays_as_it_is() -> None:
    _, model, x = grown_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    output = model(x).detach().clone()
    folded = morphc.fold(model)
    with torch.no_grad():
        own = [p for p in folded.parameters() if p.data_ptr() not in shared(model)]
        assert len(own) >= 8
        for parameter in own:
            parameter.add_(1.0)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(model(x), output)
    assert morphc.fold(model)(x).shape == output.shape


def test_copies_and_casts() -> None:
    host, model, x = grown_model()
    folded = check(model, host, x)
    twin = copy.deepcopy(folded)
    assert torch.equal(twin(x), folded(x))
    with torch.no_grad():
        twin[5].grown.bottleneck.out_bias.add_(1.0)
    assert not torch.equal(twin(x), folded(x))
    assert distance(folded(x), copy.deepcopy(folded).float()(x.float())) < 1e-5
    buffer = io.BytesIO()
    torch.save(folded, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), folded(x))


def test_trains_on() -> None:
    _, model, x = grown_model()
    folded = morphc.fold(model).train()
    folded(x).square().sum().backward()
    assert all(parameter.grad is not None for parameter in folded.parameters())
    assert folded[5].grown.bottleneck.in_weight.grad.abs().sum() > 0


def test_outputs_and_gradients_in_training_equal_the_grown_model_s() -> None:
    host = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 4)).double()
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    model = morph(host, x.detach(), blend="gate")
    grow(model, "0", [0, 1], "bottleneck")
    folded = check(model, host, x.detach())
    with torch.random.fork_rng():
        torch.manual_seed(1)
        (a,) = torch.autograd.grad(model.train()(x).square().sum(), x)
        torch.manual_seed(1)
        (b,) = torch.autograd.grad(folded.train()(x).square().sum(), x)
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_folds_of_folds_and_torch_compile() -> None:
    host, model, x = grown_model()
    folded = check(model, host, x)
    again = morph(folded, x, blueprint=("affine", "bottleneck"))
    assert torch.equal(again.eval()(x), folded(x))
    grow(again, "5", [0], "bottleneck")
    check(again, folded, x)
    compiled = torch.compile(folded, backend="eager")
    assert distance(folded(x), compiled(x)) < 1e-12


def test_user_hooks_see_what_they_saw() -> None:
    seen: list[torch.Tensor] = []
    host = nn.Sequential(nn.Linear(6, 8), nn.ReLU()).double()
    host[0].register_forward_hook(lambda module, args, output: seen.append(output.detach()))
    x = torch.randn(3, 6, dtype=torch.float64)
    model = morph(host, x)
    grow(model, "0", [1], "bottleneck")
    model.eval()
    folded = morphc.fold(model)
    seen.clear()
    model(x)
    folded(x)
    assert len(seen) == 2
    torch.testing.assert_close(seen[0], seen[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rows", [0, 1, 7])
def test_any_number_of_rows(rows: int) -> None:
    host = nn.Sequential(nn.Linear(6, 9), nn.ReLU()).double()
    model = morph(host, torch.randn(3, 6, dtype=torch.float64))
    grow(model, "0", [0, 3], "bottleneck")
    folded = morphc.fold(model.eval())
    for x in (torch.randn(rows, 6), torch.randn(2, rows, 6), torch.randn(6)):
        torch.testing.assert_close(folded(x.double()), model(x.double()), rtol=1e-12, atol=1e-12)


class Sine(base.Blueprint):
    name = "sine_of_fold_test"
    tap = "chunk"

    def shapes(self, geometry: base.Geometry) -> dict[str, tuple[int, ...]]:
        return {"frequency": (geometry.chunk,)}

    def init(
        self, geometry: base.Geometry, slots: int, generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        return {"frequency": torch.zeros(slots, geometry.chunk)}

    def apply(self, x: torch.Tensor, params: Any, geometry: base.Geometry) -> torch.Tensor:
        slots, rows, width = x.shape
        assert x.dim() == 3
        return torch.sin(x.reshape(slots, rows, width) * params["frequency"].unsqueeze(1))

    def flops(self, geometry: base.Geometry, rows: Any) -> Any:
        return 2 * geometry.chunk * rows


class Branchy(Sine):
    name = "branchy_of_fold_test"

    def apply(self, x: torch.Tensor, params: Any, geometry: base.Geometry) -> torch.Tensor:
        return super().apply(x, params, geometry) if x.sum() > 0 else x * 0


def test_blueprints_of_the_user() -> None:
    base.register(Sine(), replace=True)
    base.register(Branchy(), replace=True)
    host = nn.Sequential(nn.Linear(6, 8)).double()
    x = torch.randn(3, 6, dtype=torch.float64)
    model = morph(host, x, blueprint=(Sine.name, Branchy.name))
    grow(model, "0", [0, 2], Sine.name)
    folded = check(model, host, x)
    assert b"morphc" not in pickle.dumps(folded)
    grow(model, "0", [1], Branchy.name)
    with pytest.raises(FoldError, match=r"'0': the forward of blueprint .*'branchy_of_fold_test'"):
        morphc.fold(model)
