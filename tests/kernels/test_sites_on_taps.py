"""The value and the gradients of sites with `lowrank` and `widen`, which read an input, on kernels."""

from __future__ import annotations

import pytest
import torch
from tap_helpers import (
    BLENDINGS,
    BOUNDS,
    DEVICE,
    DTYPES,
    KINDS,
    Values,
    assert_equal,
    compiled,
    distance,
    kernels_of,
)

import morphc
from morphc import Lifecycle
from morphc.kernels.site import TapBankKernels
from morphc.lifecycle import Mode


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("blend", BLENDINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_value_and_every_gradient_equal_float64(kind: str, blend: str, dtype: torch.dtype) -> None:
    model = compiled(kind, blend=blend)
    values = Values(morphc.seeds(model)["fc2"].site, (48,), dtype)
    assert values.bank.geometry.gated == ("gated" in kind)
    found = values.found()
    (kernels,) = kernels_of(model)
    assert isinstance(kernels, TapBankKernels)
    assert_equal(found, values.expected(), BOUNDS[dtype])
    with torch.no_grad():
        # Another kernel than the one that keeps what backward needs: on a GPU the last bit may differ.
        assert distance(values.join(values.y.clone(), values.tap), found["y"]) <= BOUNDS[dtype]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("lead", "gap"), [((1,), 1), ((0,), 1), ((5, 3), 1), ((7,), 2), ((4, 2), 3), ((1, 1), 2)]
)
def test_rows_of_any_number_and_layout(kind: str, lead: tuple[int, ...], gap: int) -> None:
    """No row, one row, several axes, and rows that lie apart: in the value, the tap and the gradient."""
    site = morphc.seeds(compiled(kind, blend="lerp"))["fc2"].site
    values = Values(site, lead, gap=gap)
    found = values.found()
    if 0 in lead:
        assert found["y"].shape == (0, 23)
        assert not any(value.any() for value in found.values())
    else:
        assert_equal(found, values.expected(), 1e-5)


def test_a_tap_whose_features_lie_apart_and_one_that_is_expanded() -> None:
    site = morphc.seeds(compiled("lowrank"))["fc2"].site
    values = Values(site, (6,))
    across = torch.randn(14, 6, generator=torch.Generator().manual_seed(5)).to(DEVICE).T
    for tap in (across, across[:1].expand(6, 14)):
        values.tap = tap
        assert_equal(values.found(), values.expected(), 1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("blend", ["residual", "gate"])
def test_seeds_in_isolation_change_nothing_and_learn(kind: str, blend: str) -> None:
    model = compiled(kind, blend=blend, states=(Lifecycle.TRAINING, Lifecycle.TRAINING))
    values = Values(morphc.seeds(model)["fc2"].site)
    assert values.site.mode is Mode.TRAINING
    found = values.found()
    assert torch.equal(found["y"], values.y)
    assert torch.equal(found["dy"], values.dy)
    assert not found["d_tap"].any()
    assert found["in_weight"][:2].any(dim=(1, 2)).all()
    assert not found["in_weight"][2:].any()
    assert_equal(found, values.expected(), 1e-5)
    with torch.no_grad():
        assert values.join(values.y, values.tap) is values.y


def test_an_input_of_another_type_gets_its_gradient_in_it() -> None:
    """As under autocast: the layer's value has 16 bits, what it reads has 32."""
    values = Values(morphc.seeds(compiled("lowrank"))["fc2"].site, (48,), torch.float16)
    values.tap = values.tap.float() * 1.01
    found = values.found()
    assert found["d_tap"].dtype == torch.float32
    assert_equal(found, values.expected(), 5e-3)


def test_an_input_of_another_width_or_length_is_refused() -> None:
    values = Values(morphc.seeds(compiled("lowrank"))["fc2"].site)
    with pytest.raises(morphc.errors.SeedError, match="reads 14 features, its tap now has 13"):
        values.join(values.y, values.tap[:, 1:])
    with pytest.raises(RuntimeError):
        values.join(values.y, values.tap[1:])
