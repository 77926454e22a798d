"""Chunk arithmetic of `torch.tensor_split`: the first `features % seeds` chunks are one feature wider.

So any split is at most two runs of equally wide chunks, and segment sums are two reshapes; no index is
stored.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def widest(features: int, seeds: int) -> int:
    """Width of the widest chunk."""
    return -(-features // seeds)


def bounds(features: int, seeds: int) -> list[tuple[int, int]]:
    """[start, stop) of every chunk."""
    base, wider = divmod(features, seeds)
    starts = [seed * base + min(seed, wider) for seed in range(seeds + 1)]
    return list(itertools.pairwise(starts))


def chunk_starts(seed: Tensor, features: int, seeds: int) -> Tensor:
    """First feature of each seed in `seed` (any integer tensor)."""
    base, wider = divmod(features, seeds)
    return seed * base + seed.clamp(max=wider)


def chunk_widths(seed: Tensor, features: int, seeds: int) -> Tensor:
    """Width of the chunk of each seed in `seed`."""
    base, wider = divmod(features, seeds)
    return (seed < wider).to(seed.dtype) + base


def split(x: Tensor, dim: int, outer: int, inner: int) -> Tensor:
    """Axis `dim` (not negative) of size outer * inner as two axes; a view."""
    return x.view(*x.shape[:dim], outer, inner, *x.shape[dim + 1 :])


def chunk_sums(x: Tensor, seeds: int, dim: int = -1) -> Tensor:
    """Sum over the features of every chunk: [..., F, ...] -> [..., S, ...] along `dim`."""
    features = x.shape[dim]
    if seeds == features:
        return x
    if seeds == 1:
        return x.sum(dim, keepdim=True)
    dim = dim % x.dim()
    base, wider = divmod(features, seeds)
    if not wider:
        return split(x, dim, seeds, base).sum(dim + 1)
    cut = wider * (base + 1)
    first = split(x.narrow(dim, 0, cut), dim, wider, base + 1).sum(dim + 1)
    second = split(x.narrow(dim, cut, features - cut), dim, seeds - wider, base).sum(dim + 1)
    return torch.cat((first, second), dim)


def chunk_max(x: Tensor, seeds: int) -> Tensor:
    """Largest value of every chunk of a [F] vector; NaN where there is one."""
    base, wider = divmod(x.shape[0], seeds)
    cut = wider * (base + 1)
    second = x[cut:].view(-1, base).amax(1)
    return torch.cat((x[:cut].view(wider, base + 1).amax(1), second)) if wider else second


def spread(values: Tensor, features: int) -> Tensor:
    """One value a chunk to one value a feature: [S] -> [F]."""
    seeds = values.shape[0]
    base, wider = divmod(features, seeds)
    if not wider:
        return values if base == 1 else values.repeat_interleave(base, output_size=features)
    first = values[:wider].repeat_interleave(base + 1, output_size=wider * (base + 1))
    second = values[wider:].repeat_interleave(base, output_size=(seeds - wider) * base)
    return torch.cat((first, second))
