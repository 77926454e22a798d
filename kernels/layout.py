"""How an activation lies in memory, as the kernels walk it: rows of features, or features of positions."""

from __future__ import annotations

from typing import Final, Literal, NamedTuple

import torch
from torch import Tensor

Walk = Literal["last", "channels_first"]


FURTHEST: Final = {"last": 1 << 22, "channels_first": 1 << 30}
"""Elements between rows, or samples, that `thinned` takes. Kernels multiply those of rows by a block's, in 32 bits."""


class View(NamedTuple):
    """An activation of any shape as `rows` rows of features.

    walk `last`: element (r, f) lies at r * stride + f. walk `channels_first`: row r is position l of sample n with
    r = n * inner + l, and its element f lies at n * stride + f * inner + l. inner is 1 for `last`.
    """

    walk: Walk
    rows: int
    stride: int
    inner: int


def view_of(y: Tensor, axis: int) -> View | None:
    """How the kernels can walk `y` with its features along `axis`; None where its strides don't allow it.

    Cases: contiguous memory, with the features last or not; channels-last memory of a convolution's output; rows
    with a gap between them (a slice of something wider).
    """
    shape = y.shape
    dims = len(shape)
    at = axis % dims
    features = shape[at]
    total = y.numel()
    if total == 0 or features == 0:
        return None
    rows = total // features
    if y.is_contiguous():
        if at == dims - 1:
            return View("last", rows, features, 1)
        inner = 1
        for size in shape[at + 1 :]:
            inner *= size
        if inner == 1:
            return View("last", rows, features, 1)
        return View("channels_first", rows, features * inner, inner)
    strides = y.stride()
    if strides[at] != 1:
        return None
    # The other axes must fold into one with a single stride, from the last to the first.
    step, expected = None, 0
    for dim in range(dims - 1, -1, -1):
        if dim == at or shape[dim] == 1:
            continue
        if step is None:
            step = strides[dim]
            expected = step * shape[dim]
        elif strides[dim] != expected:
            return None
        else:
            expected = strides[dim] * shape[dim]
    if step is None:
        return View("last", rows, features, 1)
    return View("last", rows, step, 1) if step >= features else None


def thinned(view: View, features: int, values: int) -> View:
    """Each n-th row of an activation of more than `values` values (0: any number), or where features aren't last
    each n-th sample: about so many of them. n is odd, and so in step with no batch or sequence of even length.
    """
    total = view.rows * features
    if not values or total <= values:
        return view
    samples = view.rows // view.inner  # of one row each, where features are last
    step, most = -(-total // values) | 1, min(samples, FURTHEST[view.walk] // max(1, view.stride))
    if step > most:
        step = max(1, most - 1 | 1)
    return view._replace(rows=-(-samples // step) * view.inner, stride=view.stride * step)


def is_dense(y: Tensor) -> bool:
    """Whether a clone of `y` has its strides."""
    return y.is_contiguous() or (y.dim() == 4 and y.is_contiguous(memory_format=torch.channels_last))


def walkable(tap: Tensor) -> Tensor:
    """`tap` [rows, T], or a copy whose features lie side by side."""
    return tap if tap.stride(1) == 1 or tap.shape[1] == 1 else tap.contiguous()
