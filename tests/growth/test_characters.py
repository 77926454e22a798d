"""The character experiment: its text, its account of compute, and growth that keeps what the model has learned."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.growth import f_chars
from benchmarks.growth.decoder import Decoder, grow_by_seeds, grow_by_zeros, loss_of, make_optimizer, seeded
from benchmarks.growth.f_chars import METHODS, TINY, Cost, Method, corpus, train


def trained() -> tuple[Decoder, torch.optim.Optimizer, torch.Tensor, torch.Tensor]:
    """A narrow model that has made three steps, its optimizer, and a batch."""
    torch.manual_seed(0)
    model = Decoder(len(corpus()[2]), TINY, TINY.narrow)
    optimizer = make_optimizer(model.parameters(), 1e-3)
    x = torch.randint(len(corpus()[2]), (4, TINY.context))
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(model, x, x.roll(-1, 1)).backward()
        optimizer.step()
    return model, optimizer, x, x.roll(-1, 1)


def test_no_paragraph_is_both_trained_on_and_held_out() -> None:
    train_text, held, alphabet = corpus()
    texts = ["".join(alphabet[at] for at in part.tolist()) for part in (train_text, held)]
    first, second = (set(text.split("\n\n")) for text in texts)
    assert not first & second
    assert len(held) > 20_000


def test_equal_compute_is_equal() -> None:
    cost = Cost(TINY)
    wide = cost.of(Method(wide=True), TINY.steps)
    for name, how in METHODS.items():
        if how.equal:
            assert cost.of(how, cost.steps(how)) == pytest.approx(wide, rel=0.02), name
    assert cost.of(Method(grow="zeros"), TINY.steps) < cost.of(Method(grow="seeds"), TINY.steps) < wide


def test_units_that_write_nothing_change_nothing_and_moments_are_carried() -> None:
    model, optimizer, x, _ = trained()
    wider, carried = grow_by_zeros(model, optimizer, 8)
    model.eval(), wider.eval()
    torch.testing.assert_close(wider(x), model(x))
    old, new = model.blocks[0].up.weight, wider.blocks[0].up.weight
    assert new.shape[0] == old.shape[0] + 8
    assert torch.equal(carried.state[new]["exp_avg"][: old.shape[0]], optimizer.state[old]["exp_avg"])
    assert not carried.state[new]["exp_avg"][old.shape[0] :].any()


@pytest.mark.parametrize("most", [None, 1])
def test_seeds_become_units_where_they_were_grafted(most: int | None) -> None:
    model, optimizer, x, y = trained()
    grown, grower = seeded(model, optimizer, x, 8)
    for _ in range(4):
        optimizer.zero_grad()
        loss = loss_of(grown, x, y)
        loss.backward()
        optimizer.step()
        grower.step(loss)
    wider, _, alpha = grow_by_seeds(grower, model, x, y, (0.01, 1.0), most)
    widths = [block.up.out_features - TINY.narrow for block in wider.blocks]
    assert sum(widths) == 8 * (most or TINY.blocks)
    assert set(widths) <= {0, 8}
    assert alpha in (0.01, 1.0)


def test_a_run_ends_at_the_width_of_the_wide_one() -> None:
    setting = replace(TINY, steps=25, isolated=2, evaluations=1, batch=2)
    run = train(METHODS["morphc: grown, equal steps"], setting, 0, "cpu")
    assert run["widths"] == [TINY.wide] * TINY.blocks
    assert len(run["alphas"]) == len(f_chars.EVENTS)
    assert 0 < run["value"] < 12
