"""Where a site's gradient is somebody else's as well: kernels write gradients in place, and nobody may see it.

Each model has sites whose seeds blend and learn; outputs, every gradient and whatever hooks saw are compared with the
torch backend's, which writes nothing in place.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import morphc
from morphc import Config, Lifecycle

WIDE = 24


class Two(nn.Module):
    """Two biased layers on [batch, tokens, features], and what a test does with their outputs."""

    def __init__(self, use: Callable[[Two, Tensor], Tensor]) -> None:
        super().__init__()
        self.one = nn.Linear(WIDE, WIDE)
        self.other = nn.Linear(WIDE, WIDE)
        self.use = use
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self, x)


def in_place_relu(net: Two, x: Tensor) -> Tensor:
    return net.other(net.one(x).relu_())


def in_place_sum(net: Two, x: Tensor) -> Tensor:
    y = net.one(x)
    y += net.other(x)
    return y


def parallel(net: Two, x: Tensor) -> Tensor:
    """Autograd hands one gradient to both."""
    return net.one(x) + net.other(x)


def parallel_views(net: Two, x: Tensor) -> Tensor:
    return net.one(x).flatten(1) + net.other(x).flatten(1)


def difference(net: Two, x: Tensor) -> Tensor:
    return net.one(x) - net.other(x)


def residual(net: Two, x: Tensor) -> Tensor:
    x = x + net.one(x)
    return x + net.other(x)


def split(net: Two, x: Tensor) -> Tensor:
    q, k, v = net.one(x).chunk(3, dim=-1)
    return net.other(torch.cat([v, q * k, k], dim=-1))


def used_twice(net: Two, x: Tensor) -> Tensor:
    return net.one(net.one(x)) + net.other(x)


def expanded(net: Two, x: Tensor) -> Tensor:
    """The gradient is one row that stands for all."""
    return net.one(x).sum(0) + net.other(x).sum(0)


def joined(net: Two, x: Tensor) -> Tensor:
    return torch.cat([net.one(x), net.other(x)], dim=0)


def stacked(net: Two, x: Tensor) -> Tensor:
    return torch.stack([net.one(x), net.other(x)])


def tensor_hooks(net: Two, x: Tensor) -> Tensor:
    one, other = net.one(x), net.other(x)
    for out in (one, other):
        if out.requires_grad:
            out.register_hook(net.seen.append)
    return one + other


def hooks_that_change(net: Two, x: Tensor) -> Tensor:
    one = net.one(x)
    if one.requires_grad:
        one.register_hook(lambda grad: grad * 2.0)
    return one + net.other(x)


def retained(net: Two, x: Tensor) -> Tensor:
    one = net.one(x)
    if one.requires_grad:
        one.retain_grad()
        net.seen.append(one)
    return one * 2.0 + net.other(x)


def module_hooks(net: Two, x: Tensor) -> Tensor:
    if not net.one._backward_hooks:
        net.one.register_full_backward_hook(lambda module, given, got: net.seen.extend((*given, *got)))
        net.one.register_full_backward_pre_hook(lambda module, got: net.seen.extend(got))
    return net.one(x) + net.other(x)


def recomputed(net: Two, x: Tensor) -> Tensor:
    return checkpoint(net.one, x, use_reentrant=False) + net.other(x)


def recomputed_reentrant(net: Two, x: Tensor) -> Tensor:
    return checkpoint(net.one, x, use_reentrant=True) + net.other(x)


def transposed(net: Two, x: Tensor) -> Tensor:
    return net.one(x).transpose(1, 2).contiguous().transpose(1, 2) + net.other(x).transpose(1, 2).transpose(
        1, 2
    )


def normed(net: Two, x: Tensor) -> Tensor:
    return F.layer_norm(net.one(x) + x, (WIDE,)) + F.gelu(net.other(x))


USES = [
    value
    for name, value in dict(globals()).items()
    if getattr(value, "__annotations__", {}).get("net") == "Two"
]


def compiled(use: Callable[[Two, Tensor], Tensor], backend: str) -> Two:
    torch.manual_seed(0)
    config = Config(seeds_per_layer=6, slots=5, rank=3, backend=backend)
    model: Two = morphc.compile(Two(use), (torch.randn(2, 5, WIDE),), config=config)
    generator = torch.Generator().manual_seed(1)
    for site in morphc.seeds(model).sites.values():
        site.assign([0, 3, 4], Lifecycle.FINE_TUNING, alpha=0.5)
        site.assign([1], Lifecycle.TRAINING)
        for bank in site.slots.values():
            for name in bank.names:
                values = bank.get_parameter(name).data
                values.copy_(torch.randn(values.shape, generator=generator) * 0.3)
    model.seen.clear()
    return model


def inputs() -> Tensor:
    return torch.randn(2, 5, WIDE, generator=torch.Generator().manual_seed(3), requires_grad=True)


def gradients(model: Two) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    for path, site in morphc.seeds(model).sites.items():
        for kind, bank in site.slots.items():
            found |= {f"{path}/{kind}/{n}": g.clone() for n, g in bank.grads().items() if g is not None}
    return found


def by_loss(model: Two, x: Tensor) -> None:
    model(x).square().sum().backward()


def by_a_given_gradient(model: Two, x: Tensor) -> None:
    """The caller keeps what it hands over."""
    out = model(x)
    given = torch.randn(out.shape, generator=torch.Generator().manual_seed(4))
    kept = given.clone()
    out.backward(given)
    assert torch.equal(given, kept)


def twice(model: Two, x: Tensor) -> None:
    loss = model(x).square().sum()
    loss.backward(retain_graph=True)
    loss.backward()


def accumulated(model: Two, x: Tensor) -> None:
    for part in (x, x * 0.5):
        model(part).square().sum().backward()


def everything(model: Two, backward: Callable[[Two, Tensor], None]) -> dict[str, Tensor]:
    x = inputs()
    backward(model, x)
    assert x.grad is not None
    found = gradients(model) | {"input": x.grad}
    seen = [tensor.grad if tensor.grad_fn is not None else tensor for tensor in model.seen]
    return found | {f"seen {at}": tensor for at, tensor in enumerate(seen) if tensor is not None}


@pytest.mark.parametrize("backward", [by_loss, by_a_given_gradient, twice, accumulated])
@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)
def test_nobody_sees_a_gradient_that_was_written(
    use: Callable[[Two, Tensor], Tensor], backward: Callable[[Two, Tensor], None]
) -> None:
    expected = everything(compiled(use, "torch"), backward)
    model = compiled(use, "triton")
    found = everything(model, backward)
    kernels = [
        one for site in morphc.seeds(model).sites.values() for one in site.site.engine.kernels.values()
    ]
    assert len(kernels) == 2
    assert None not in kernels
    assert found.keys() == expected.keys()
    assert any(name.endswith("/in_weight") for name in found)
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=2e-5, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
