"""Online runs that share one compiled host, against the same runs in plain torch; and how they grow."""

from __future__ import annotations

import pytest
import torch

from benchmarks.growth.online import BITS, Learners, Method, Source
from benchmarks.growth.side_by_side import ISOLATED, Ours, SideBySide

RUNS = range(3)


def examples(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x [count, 3, 20] and y [count, 3] of the first runs."""
    x, y = Source(RUNS).hold()
    return x[:count], y[:count]


def test_a_shared_host_learns_as_each_run_does_alone() -> None:
    x, y = examples(150)
    alone, shared = Learners([Method(4)], RUNS), SideBySide(Ours(4, every=1000), RUNS)
    with_bias = torch.cat((x, torch.ones(*x.shape[:2], 1)), 2)
    for at in range(len(x)):
        expected = alone.learn(with_bias[at], y[at])
        found = shared.learn(x[at].reshape(1, -1), y[at].reshape(1, -1))
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    own = shared.owner.unsqueeze(1) == torch.arange(len(RUNS))
    assert not shared.outer.weight.T[~own].any()


def test_a_run_recycles_by_its_own_mean_and_reads_its_own_bits() -> None:
    x, y = examples(100)
    shared = SideBySide(Ours(4, tau=0.05, every=100, sampled=1), RUNS)
    with torch.no_grad():  # Unit 2 of run 1 writes nothing much, so hardly any gradient reaches it.
        unit = int((shared.owner == 1).nonzero()[2])
        shared.outer.weight[1, unit] = 1e-6
        shared.inner.bias[unit] = -50.0
    for at in range(100):
        shared.learn(x[at].reshape(1, -1), y[at].reshape(1, -1))
    assert shared.recycled[1] >= 1
    assert shared.born[unit] == 100
    reads = shared.inner.weight[unit].view(len(RUNS), BITS).abs().sum(1) > 0
    assert reads.tolist() == [False, True, False]
    assert not shared.outer.weight[:, unit].any()


def test_every_run_grows_by_a_unit_of_its_own() -> None:
    x, y = examples(ISOLATED + 10)
    shared = SideBySide(Ours(2, grow_to=3, grow_every=ISOLATED + 10, every=5000, candidates=2), RUNS)
    for at in range(len(x)):
        if at == 10:  # Run 1's candidates never fire.
            bank = shared.seeds["2"].slots["widen"]
            bank.in_weight.data[bank.owner == 1] = -1.0
            bank.in_bias.data[bank.owner == 1] = -9.0
            shared.keep_apart()
        shared.learn(x[at].reshape(1, -1), y[at].reshape(1, -1))
    assert shared.units == 3
    assert not shared.grows
    own = shared.owner.unsqueeze(1) == torch.arange(len(RUNS))
    assert own.sum(0).tolist() == [3, 3, 3]
    assert not shared.inner.weight.view(-1, len(RUNS), BITS)[~own].any()
    assert not shared.outer.weight.T[~own].any()
    written = shared.outer.weight.sum(0)[-len(RUNS) :]
    assert (written[shared.owner[-len(RUNS) :] != 1] != 0).all()
    assert written[shared.owner[-len(RUNS) :] == 1] == 0


def test_the_target_fires_as_often_as_the_published_one() -> None:
    """Of 20 random bits: P(matches >= 14) where the bias is +1, P(matches >= 17) where it is -1."""
    source = Source(range(20))
    matches = torch.arange(BITS + 1.0)
    ways = torch.tensor([torch.exp(_log_ways(int(m))) for m in matches]) / 2**BITS
    rates = {}
    for bias in (1.0, -1.0):
        chosen = source.weights[..., -1] == bias
        negative = (source.weights[..., :-1] < 0).sum(2)[chosen]
        least = (
            source.thresholds[chosen] - bias + negative
        )  # fires where the matching bits are more than this
        rates[bias] = float(ways[matches > least[0]].sum())
        assert torch.allclose(least, least[0])
    assert rates[1.0] == pytest.approx(0.0577, abs=1e-3)
    assert rates[-1.0] == pytest.approx(0.0013, abs=1e-3)


def _log_ways(chosen: int) -> torch.Tensor:
    whole, part, rest = (torch.tensor(n + 1.0).lgamma() for n in (BITS, chosen, BITS - chosen))
    return whole - part - rest
