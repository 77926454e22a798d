"""Chunk arithmetic against `torch.tensor_split`."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from morphc.kernels.reference.chunks import bounds, chunk_max, chunk_starts, chunk_sums, chunk_widths, spread
from morphc.runtime import active


@st.composite
def splits(draw):
    features = draw(st.integers(1, 40))
    return features, draw(st.integers(1, features))


@given(splits())
def test_chunks_are_those_of_tensor_split(split):
    features, seeds = split
    parts = torch.arange(features).tensor_split(seeds)
    assert [(int(p[0]), int(p[-1]) + 1) for p in parts] == bounds(features, seeds)
    index = torch.arange(seeds)
    assert chunk_starts(index, features, seeds).tolist() == [int(p[0]) for p in parts]
    assert chunk_widths(index, features, seeds).tolist() == [len(p) for p in parts]


@given(splits())
def test_segment_sums_maxima_and_spread_agree_with_a_loop(split):
    features, seeds = split
    x = torch.randn(features, dtype=torch.float64)
    parts = x.tensor_split(seeds)
    torch.testing.assert_close(chunk_sums(x, seeds), torch.stack([p.sum() for p in parts]))
    assert torch.equal(chunk_max(x, seeds), torch.stack([p.max() for p in parts]))
    values = torch.arange(seeds)
    assert torch.equal(
        spread(values, features), torch.cat([torch.full_like(p, i) for i, p in enumerate(parts)]).long()
    )


@given(
    splits(),
    st.sampled_from([-1, 1]),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    st.integers(0, 3),
    st.booleans(),
)
def test_take_then_put_is_lossless(split, axis, dtype, rows, strided):
    features, seeds = split
    shape = (rows, 2, features) if axis == -1 else (rows, features, 2, 3)
    y = (
        torch.randn(*shape[:-1], shape[-1] * 2).to(dtype)[..., ::2]
        if strided
        else torch.randn(shape).to(dtype)
    )
    owner = torch.randperm(seeds)
    lifecycle, alpha = torch.full((seeds,), 4, dtype=torch.int32), torch.ones(seeds)
    slots = active.describe(owner, lifecycle, alpha, features)
    chunks = active.take(y, slots, axis, False)
    assert torch.equal(active.put(torch.zeros_like(y), chunks, slots, axis, False), y)
    if axis == 1:
        spatial = active.take(y, slots, axis, True)
        assert torch.equal(active.put(torch.zeros_like(y), spatial, slots, axis, True), y)
