"""What only shows on a GPU: bit-for-bit equality there, no host sync between ticks, state that lives on the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

import morphc
from morphc import Config, Lifecycle
from morphc.passes.verify import same_bits

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA device, and this machine has none"
)


class Block(nn.Module):
    """Convolution, BatchNorm, in-place ReLU, attention and a gated MLP: one of each."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 32, 3, 2, 1)
        self.norm = nn.BatchNorm2d(32)
        self.act = nn.ReLU(inplace=True)
        self.attention = nn.MultiheadAttention(32, 4, dropout=0.1, batch_first=True)
        self.gate = nn.Linear(32, 64)
        self.up = nn.Linear(32, 64)
        self.down = nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.conv(x))).flatten(2).transpose(1, 2)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return x + self.down(nn.functional.silu(self.gate(x)) * self.up(x))


@pytest.fixture(params=["float32", "bfloat16"])
def host(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return Block().to("cuda", getattr(torch, request.param))


def example(host: nn.Module, batch: int = 4) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(batch)
    like = next(host.parameters())
    return torch.randn(batch, 3, 16, 16, device="cuda", generator=generator).to(like.dtype)


@contextmanager
def no_sync() -> Iterator[None]:
    """Any read of the device from Python raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(1)
    model.zero_grad(set_to_none=True)
    out = model(x)
    out.float().square().mean().backward()
    found = {"out": out.detach()}
    return found | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_a_dormant_model_equals_its_host_bit_for_bit_on_the_gpu(host: nn.Module) -> None:
    model = morphc.compile(host, (example(host),), config=Config(seeds_per_layer=8, telemetry_every=1))
    assert any("equal bit for bit" in line for line in morphc.report(model).verification)
    for batch in (4, 7):
        host.train(), model.train()
        buffers = {n: b.clone() for n, b in host.named_buffers()}
        expected = step(host, example(host, batch))
        with torch.no_grad():
            for name, buffer in host.named_buffers():
                buffer.copy_(buffers[name])
        got = step(model, example(host, batch))
        for name, value in expected.items():
            assert same_bits(value, got[name]), name


def test_no_step_reads_the_device(host: nn.Module) -> None:
    x = example(host)
    config = Config(seeds_per_layer=8, slots=4, telemetry_every=1, blueprint=("bottleneck", "affine"))
    model = morphc.compile(host, (x,), config=config)
    seeds = morphc.seeds(model)
    step(model, x)
    with no_sync():
        step(model, x)
    seeds["down"].assign([1, 2], Lifecycle.TRAINING, blueprint="bottleneck")
    seeds["conv"].assign([0, 5], Lifecycle.FINE_TUNING, blueprint="affine", alpha=0.5)
    step(model, x)
    with no_sync():
        step(model, x)


def test_the_state_lives_on_the_device_and_follows_moves(host: nn.Module) -> None:
    x = example(host)
    model = morphc.compile(host, (x,), config=Config(seeds_per_layer=8), share=False)
    seeds = morphc.seeds(model)
    assert seeds.lifecycle.is_cuda
    assert seeds.alpha.dtype == torch.float32
    model.to("cpu")
    assert not morphc.seeds(model).lifecycle.is_cuda
    model.to("cuda")
    assert morphc.seeds(model).lifecycle.is_cuda
    assert torch.equal(model.eval()(x), host.eval()(x))


def test_telemetry_on_the_gpu_equals_that_of_the_same_values_in_float64() -> None:
    torch.manual_seed(0)
    host = nn.Sequential(nn.Linear(64, 103)).cuda()
    x = torch.randn(257, 64, device="cuda")
    model = morphc.compile(host, (x,), config=Config(seeds_per_layer=10, telemetry_every=1))
    model.train()(x)
    health = morphc.seeds(model).telemetry()
    values = host(x).double().cpu().tensor_split(10, dim=1)
    mean = torch.stack([chunk.mean() for chunk in values])
    variance = torch.stack([chunk.var(unbiased=False) for chunk in values])
    torch.testing.assert_close(health["mean"].double().cpu(), mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(health["variance"].double().cpu(), variance, rtol=1e-5, atol=1e-6)
