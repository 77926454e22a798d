"""Growth inside the ways to train that people have, on the CPU."""

from __future__ import annotations

import copy
import pickle

import pytest
import recipes
import torch
from growing import Task
from recipes import RECIPES, L, Recipe
from torch import nn

from morphc.errors import NotMorphedError
from morphc.grow.probes import Activity
from morphc.integrations.averaging import AveragedModel
from morphc.runtime.store import store_of


@pytest.mark.parametrize("name", RECIPES)
def test_a_seed_goes_all_the_way(name):
    recipes.check_growth(RECIPES[name], "cpu")


@pytest.mark.parametrize("isolation", ["straight_through", "reconstruction"])
@pytest.mark.parametrize("state", [L.TRAINING, L.GRAFTING, L.FINE_TUNING])
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_gives_slots_their_gradient_once(reentrant, state, isolation):
    blend = {"isolation": isolation, "blueprint": "bottleneck", "blend": "lerp"}
    options = blend if isolation == "reconstruction" else {}
    recipes.check_gradients(Recipe(recompute=reentrant), state, "cpu", **options)


@pytest.mark.parametrize("state", [L.TRAINING, L.GRAFTING, L.FINE_TUNING])
def test_accumulated_gradients_of_slots_are_those_of_the_whole_batch(state):
    recipes.check_gradients(Recipe(accumulate=4), state, "cpu")


@pytest.mark.parametrize("name", ["everything", "sgd fused", "adamw fused amsgrad", "adamw foreach"])
def test_a_snapshot_brings_the_run_back_bit_for_bit(name):
    recipes.check_going_back(RECIPES[name], "cpu")


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("name", ["plain", "everything"])
def test_an_averaged_copy_follows_the_seeds(name, use_buffers):
    recipes.check_average(RECIPES[name], "cpu", use_buffers)


def test_an_average_of_a_model_without_seeds_is_refused():
    with pytest.raises(NotMorphedError, match=r"morphc\.compile"):
        AveragedModel(nn.Linear(2, 2))


def test_a_scaler_leaves_reconstruction_alone():
    recipes.check_scaled_reconstruction("cpu")


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_model_whose_grower_has_a_scaler_is_copied_without_it(copied):
    _, run = recipes.made(RECIPES["fp16 scaled"], Task(), "cpu")
    grower = run.grower(recipes.morphc.ScheduleController([]))
    grower.step(run.step(0))
    twin = copied(run.model).train()
    noted = grower.rates.noted.value
    x = run.task.vx
    assert torch.equal(twin(x), run.model.eval()(x))
    assert grower.rates.noted.value is noted


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_counts_the_activity_of_units_once(reentrant):
    _, run = recipes.made(Recipe(recompute=reentrant), Task(), "cpu")
    activity = Activity(store_of(run.model), 1)
    run.step(0)
    assert activity.forwards == {"0": 1}
