"""Growth inside the ways to train that people have, on a GPU: the tests of tests/grow/test_recipes.py once more."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "grow"))

import recipes
from recipes import RECIPES, L, Recipe

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA device, and this machine has none"
)


@pytest.mark.parametrize("name", RECIPES)
def test_a_seed_goes_all_the_way(name: str) -> None:
    recipes.check_growth(RECIPES[name], "cuda")


@pytest.mark.parametrize("isolation", ["straight_through", "reconstruction"])
@pytest.mark.parametrize("state", [L.TRAINING, L.GRAFTING, L.FINE_TUNING])
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_gives_slots_their_gradient_once(reentrant: bool, state: L, isolation: str) -> None:
    blend = {"isolation": isolation, "blueprint": "bottleneck", "blend": "lerp"}
    options = blend if isolation == "reconstruction" else {}
    recipes.check_gradients(Recipe(recompute=reentrant), state, "cuda", **options)


@pytest.mark.parametrize("state", [L.TRAINING, L.GRAFTING, L.FINE_TUNING])
def test_accumulated_gradients_of_slots_are_those_of_the_whole_batch(state: L) -> None:
    recipes.check_gradients(Recipe(accumulate=4), state, "cuda")


@pytest.mark.parametrize("name", ["everything", "sgd fused", "adamw fused amsgrad", "adamw foreach"])
def test_a_snapshot_brings_the_run_back_bit_for_bit(name: str) -> None:
    recipes.check_going_back(RECIPES[name], "cuda")


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("name", ["plain", "everything"])
def test_an_averaged_copy_follows_the_seeds(name: str, use_buffers: bool) -> None:
    recipes.check_average(RECIPES[name], "cuda", use_buffers)


def test_a_scaler_leaves_reconstruction_alone() -> None:
    recipes.check_scaled_reconstruction("cuda")
