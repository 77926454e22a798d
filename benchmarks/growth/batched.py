"""Many small ReLU networks trained side by side in one tensor program.

R networks of equal shape live in one flat tensor [R, N]; gradients are written out by hand, so a step costs a
dozen batched matrix products whatever R is. The baselines run on this, independently of morphc: one row per
(method, seed), and row r sees only its own data.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional


def draw_rows(generator: torch.Generator, rows: int, fan_in: int) -> Tensor:
    """[rows, fan_in] as `nn.Linear` draws its weight: U(-1, 1) / sqrt(fan_in)."""
    return (torch.rand(rows, fan_in, generator=generator) * 2 - 1) / fan_in**0.5


def draw_network(sizes: Sequence[int], generator: torch.Generator) -> Tensor:
    """[N]: one network's weights and biases, as `nn.Linear` draws both."""
    parts = []
    for fan_in, fan_out in itertools.pairwise(sizes):
        parts.append(draw_rows(generator, fan_out, fan_in).flatten())
        parts.append((torch.rand(fan_out, generator=generator) * 2 - 1) / fan_in**0.5)
    return torch.cat(parts)


class Networks:
    """R ReLU MLPs of `sizes`, their Adam moments, and an anchor for L2-init.

    weight[l]: [R, out, in], bias[l]: [R, out]; both are views of `flat` [R, N]. `layers` views any other tensor
    of that shape the same way.
    """

    def __init__(self, flat: Tensor, sizes: Sequence[int]) -> None:
        self.sizes = tuple(sizes)
        self.flat = flat.clone()
        self.gradient = torch.zeros_like(flat)
        self.first = torch.zeros_like(flat)
        self.second = torch.zeros_like(flat)
        self.steps = torch.zeros(len(flat), 1)
        self.anchor = flat.clone()
        self.weight, self.bias = self.layers(self.flat)
        self.weight_gradient, self.bias_gradient = self.layers(self.gradient)
        self.open: list[Tensor | None] = [None] * (len(sizes) - 2)

    def layers(self, flat: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Views of `flat` as weights and biases."""
        weights, biases, start = [], [], 0
        for fan_in, fan_out in zip(self.sizes, self.sizes[1:], strict=False):
            stop = start + fan_in * fan_out
            weights.append(flat[:, start:stop].view(-1, fan_out, fan_in))
            biases.append(flat[:, stop : stop + fan_out])
            start = stop + fan_out
        return weights, biases

    def forward(self, x: Tensor) -> list[Tensor]:
        """[R, B, in] to the input, every hidden activation, and the output."""
        values = [x]
        last = len(self.weight) - 1
        for number, (weight, bias) in enumerate(zip(self.weight, self.bias, strict=True)):
            x = torch.baddbmm(bias.unsqueeze(1), x, weight.transpose(1, 2))
            values.append(x if number == last else x.relu_())
        return values

    def backward(self, values: list[Tensor], delta: Tensor) -> list[Tensor]:
        """Fills `gradient`; returns the loss's gradient at each hidden pre-activation, [R, B, H].

        ReLU has gradient 0 at 0, but 1 in the units of `open[layer]` [R, 1, H] (GradMax's newborn ones).
        """
        deltas: list[Tensor] = []
        for number in reversed(range(len(self.weight))):
            self.weight_gradient[number].copy_(torch.bmm(delta.transpose(1, 2), values[number]))
            self.bias_gradient[number].copy_(delta.sum(1))
            if number:
                passes = values[number] > 0
                newborn = self.open[number - 1]
                if newborn is not None:
                    passes |= newborn
                delta = torch.bmm(delta, self.weight[number]).mul_(passes)
                deltas.append(delta)
        return deltas[::-1]

    def adam(self, lr: float, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8) -> None:
        """One step of Adam; each network has its own step number, so that it can start anew."""
        self.steps += 1
        self.first.lerp_(self.gradient, 1 - beta1)
        self.second.mul_(beta2).addcmul_(self.gradient, self.gradient, value=1 - beta2)
        root = self.second.sqrt().div_((1 - beta2**self.steps).sqrt_()).add_(eps)
        self.flat.sub_((self.first / root).mul_(lr / (1 - beta1**self.steps)))

    def reset_moments(self, rows: Tensor) -> None:
        """Adam starts anew in the networks `rows` (mask or indices)."""
        for tensor in (self.first, self.second, self.steps):
            tensor[rows] = 0.0

    def recycle(
        self, layer: int, mask: Tensor, fresh: Tensor, moments: bool = True, anchor: bool = True
    ) -> None:
        """Units of hidden `layer` in `mask` [R, H] get the incoming weights `fresh` [R, H, in], zero bias and
        zero outgoing weights; `moments` clears theirs, `anchor` moves L2-init's anchor along."""
        targets = [(self.flat, True)]
        targets += [(self.anchor, True)] if anchor else []
        targets += [(self.first, False), (self.second, False)] if moments else []
        for flat, values in targets:
            weights, biases = self.layers(flat)
            weights[layer][mask] = fresh[mask] if values else 0.0
            biases[layer][mask] = 0.0
            weights[layer + 1].masked_fill_(mask.unsqueeze(1), 0.0)


def cross_entropy_delta(logits: Tensor, labels: Tensor) -> Tensor:
    """Gradient at the logits [R, B, C] of each network's mean cross-entropy with `labels` [R, B]."""
    delta = logits.softmax(-1)
    delta.sub_(functional.one_hot(labels, logits.shape[-1]))
    return delta.div_(logits.shape[1])
