"""`lowrank` and `widen` on a GPU: no step waits for the device, and a captured step gives what an eager one does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import morphc
from morphc import Config, Lifecycle

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA device, and this machine has none"
)


class Gated(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(64, 96), nn.Linear(64, 96), nn.Linear(96, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


def compiled(dtype: torch.dtype, blend: str = "residual") -> nn.Module:
    torch.manual_seed(0)
    host = Gated().to("cuda", dtype)
    config = Config(
        seeds_per_layer=8, slots=4, rank=4, blueprint=("lowrank", "widen"), blend=blend, backend="triton"
    )
    model = morphc.compile(host, (torch.randn(2, 64, device="cuda", dtype=dtype),), config=config)
    site = morphc.seeds(model)["down"]
    site.assign([1, 5], Lifecycle.GRAFTING, blueprint="lowrank", alpha=0.5)
    site.assign([2], Lifecycle.TRAINING, blueprint="lowrank")
    site.assign([3], Lifecycle.FINE_TUNING, blueprint="widen", alpha=0.7)
    site.assign([7], Lifecycle.TRAINING, blueprint="widen")
    for _, bank in site.site.slots.items():
        for name in bank.names:
            bank.get_parameter(name).data.normal_(std=0.3)
    return model


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {}
    for kind, bank in morphc.seeds(model)["down"].site.slots.items():
        found |= {f"{kind}/{name}": grad for name, grad in bank.grads().items() if grad is not None}
    return found


def forget(model: nn.Module) -> None:
    model.zero_grad(set_to_none=True)
    for _, bank in morphc.seeds(model)["down"].site.slots.items():
        bank.zero_grads()


@pytest.mark.parametrize("blend", ["residual", "gate"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_captured_step_gives_what_an_eager_one_does(dtype: torch.dtype, blend: str) -> None:
    model = compiled(dtype, blend)
    x = torch.randn(128, 64, device="cuda", dtype=dtype, requires_grad=True)

    def step() -> Tensor:
        out: Tensor = model(x)
        out.float().square().mean().backward()
        return out.detach()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            forget(model)
            x.grad = None
            step()
    torch.cuda.current_stream().wait_stream(side)
    forget(model)
    x.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for scale in (1.0, 2.0):
        with torch.no_grad():
            x.mul_(scale)
        graph.replay()
        assert x.grad is not None
        found = {"out": out.clone(), "x": x.grad.clone()}
        found |= {name: grad.clone() for name, grad in gradients(model).items()}
        again = compiled(dtype, blend)
        y = x.detach().clone().requires_grad_()
        expected = again(y)
        expected.float().square().mean().backward()
        assert y.grad is not None
        wanted = {"out": expected.detach(), "x": y.grad} | gradients(again)
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_step_reads_the_device(dtype: torch.dtype) -> None:
    model = compiled(dtype)
    x = torch.randn(32, 64, device="cuda", dtype=dtype, requires_grad=True)

    def step() -> None:
        model(x).float().square().mean().backward()
        morphc.seeds(model).step_optimizer(lr=1e-3)

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
