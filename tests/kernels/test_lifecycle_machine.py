"""Random sequences of commands and ticks against a state machine written out in plain Python, on both ticks."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from torch import nn
from where import DEVICE

import morphc
from morphc import Config, Lifecycle
from morphc.lifecycle import Mode

L = Lifecycle
SEEDS, SLOTS, RAMP, EMBARGO = 4, 3, 2, 2
LEAST = {L.TRAINING: 2, L.GRAFTING: 3, L.STABILIZATION: 1, L.EVALUATING: 2, L.FINE_TUNING: 1}
MAY = {
    "DORMANT": "GERMINATED",
    "GERMINATED": "TRAINING CANCELLED",
    "TRAINING": "GRAFTING CULLED CANCELLED ROLLED_BACK",
    "GRAFTING": "STABILIZATION CULLED ROLLED_BACK",
    "STABILIZATION": "EVALUATING ROLLED_BACK",
    "EVALUATING": "FINE_TUNING CULLED ROLLED_BACK",
    "FINE_TUNING": "FOSSILIZED CULLED ROLLED_BACK",
    "FOSSILIZED": "CULLED",
    "CULLED": "DORMANT",
    "CANCELLED": "DORMANT",
    "ROLLED_BACK": "DORMANT",
}
SEEN = (L.GRAFTING, L.STABILIZATION, L.EVALUATING, L.FINE_TUNING, L.FOSSILIZED)
HOLDS = (L.GERMINATED, L.TRAINING, *SEEN)

METRICS = st.fixed_dictionaries(
    {},
    optional={
        "isolated_improvement": st.sampled_from((0.004, 0.005)),
        "finite_gradients": st.sampled_from((0.89, 0.9)),
        "contribution": st.sampled_from((-0.1, -0.05, 0.0, 0.1, float("nan"))),
        "stability": st.sampled_from((0.7, 0.8, 0.95)),
        "improvement": st.sampled_from((0.0, 0.01)),
        "error_rate": st.sampled_from((0.1, 0.2)),
    },
)
GOOD = {
    "isolated_improvement": 0.5,
    "finite_gradients": 1.0,
    "contribution": 0.1,
    "stability": 1.0,
    "improvement": 0.1,
}
METRICS = st.one_of(st.just(GOOD), METRICS)


class Seed:
    """One seed as the docs describe it."""

    def __init__(self):
        self.state, self.age, self.embargo, self.errors = L.DORMANT, 0, 0, 0
        self.alpha, self.slots, self.history, self.moves = 0.0, 0, [], 0

    def enter(self, target, tick):
        self.history = [*self.history, (tick, self.state, target)][-10:]
        self.state, self.age, self.moves = target, 0, self.moves + 1
        self.alpha = self.alpha if target is L.GRAFTING else float(target in SEEN)
        if target not in HOLDS:
            self.slots = 0
        elif target is L.GRAFTING:
            self.slots = 1
        if target in (L.CULLED, L.ROLLED_BACK):
            self.embargo = max(self.embargo, EMBARGO)
        self.errors += target is L.ROLLED_BACK

    def legal(self, target, age):
        if target.name not in MAY[self.state.name].split():
            return False
        if (target is L.GERMINATED or self.state is L.CULLED) and self.embargo > 0:
            return False
        return target is L.ROLLED_BACK or age >= LEAST.get(self.state, 0)

    def gates(self, target, told):
        known = lambda name, low: told.get(name, float("-inf")) >= low  # noqa: E731
        pair = (self.state, target)
        if pair == (L.TRAINING, L.GRAFTING):
            return known("isolated_improvement", 0.005) and known("finite_gradients", 0.9)
        if pair == (L.GRAFTING, L.STABILIZATION):
            return self.alpha >= 1.0
        if pair == (L.EVALUATING, L.FINE_TUNING):
            return told.get("contribution", -1) > 0 and known("stability", 0.8)
        if pair == (L.EVALUATING, L.CULLED):
            bad = told.get("contribution", 0) < -0.05 or told.get("error_rate", 0) > 0.1
            return bad or self.errors > 5
        if pair == (L.FINE_TUNING, L.FOSSILIZED):
            return known("improvement", 0.01) and known("stability", 0.95)
        return True

    def tick(self, told, number):
        self.age, self.embargo = self.age + 1, max(0, self.embargo - 1)
        onward = {
            L.GERMINATED: (L.TRAINING,),
            L.TRAINING: (L.GRAFTING,),
            L.GRAFTING: (L.STABILIZATION,),
            L.STABILIZATION: (L.EVALUATING,),
            L.EVALUATING: (L.CULLED, L.FINE_TUNING),
            L.FINE_TUNING: (L.FOSSILIZED,),
        }
        if self.state is L.CANCELLED or (self.state is L.CULLED and not self.embargo):
            self.enter(L.DORMANT, number)
            return
        for target in onward.get(self.state, ()):
            if self.legal(target, self.age) and self.gates(target, told):
                self.enter(target, number)
                return
        if self.state is L.GRAFTING:
            self.alpha = min(1.0, self.age / RAMP)


class Machine(RuleBasedStateMachine):
    backend = "torch"

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.host = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 4)).to(DEVICE)
        self.x = torch.randn(3, 5, device=DEVICE)
        config = Config(
            seeds_per_layer=SEEDS,
            slots=SLOTS,
            rank=2,
            blueprint="bottleneck",
            backend=self.backend,
            minimum_ticks=tuple(LEAST.values()),
            graft_ticks=RAMP,
            embargo_ticks=EMBARGO,
        )
        self.model = morphc.compile(self.host, (self.x,), config=config, verify=False)
        self.seeds = morphc.seeds(self.model)
        self.expected = {path: [Seed() for _ in range(SEEDS)] for path in self.seeds.sites}
        self.ticks = 0

    def told(self, done, path, chosen, moves):
        """What was reported is what happened."""
        assert [(t.path, t.seed, t.ok) for t in done] == [
            (path, i, ok) for i, ok in zip(chosen, moves, strict=True)
        ]
        assert all(bool(t.reason) != t.ok for t in done)

    @rule(
        path=st.sampled_from(("0", "2")),
        chosen=st.lists(st.integers(0, SEEDS - 1), unique=True, min_size=1),
        candidates=st.integers(1, 2),
    )
    def germinate(self, path, chosen, candidates):
        done = self.seeds[path].germinate(chosen, candidates=candidates)
        moves = []
        for i in chosen:
            seed = self.expected[path][i]
            room = SLOTS - sum(other.slots for other in self.expected[path])
            ok = seed.legal(L.GERMINATED, seed.age) and room >= candidates
            moves.append(ok)
            if ok:
                seed.enter(L.GERMINATED, self.ticks)
                seed.slots = candidates
        self.told(done, path, chosen, moves)
        self.mark(path)

    def mark(self, path):
        """Let every slot in use say something, so that a seed which the host should not see would be seen."""
        bank = self.seeds[path].slots["bottleneck"]
        with torch.no_grad():
            for slot, owner in enumerate(bank.owner.tolist()):
                bank.out_bias[slot] += float(owner >= 0)

    @rule(
        path=st.sampled_from(("0", "2")),
        chosen=st.lists(st.integers(0, SEEDS - 1), unique=True, min_size=1),
        goal=st.sampled_from([state for state in L if state is not L.GERMINATED]),
        told=METRICS,
    )
    def advance(self, path, chosen, goal, told):
        target = goal
        done = self.seeds[path].advance(chosen, to=target, metrics=told)
        moves = []
        for i in chosen:
            seed = self.expected[path][i]
            moves.append(seed.legal(target, seed.age) and seed.gates(target, told))
            if moves[-1]:
                seed.enter(target, self.ticks)
        self.told(done, path, chosen, moves)

    @rule(
        path=st.sampled_from(("0", "2")),
        chosen=st.lists(st.integers(0, SEEDS - 1), unique=True, min_size=1),
        what=st.sampled_from(("cancel", "prune", "rollback", "reset")),
    )
    def command(self, path, chosen, what):
        target = {"cancel": L.CANCELLED, "prune": L.CULLED, "rollback": L.ROLLED_BACK, "reset": L.DORMANT}[
            what
        ]
        done = getattr(self.seeds[path], what)(chosen)
        moves = []
        for i in chosen:
            seed = self.expected[path][i]
            moves.append(seed.legal(target, seed.age))
            if moves[-1]:
                seed.enter(target, self.ticks)
        self.told(done, path, chosen, moves)

    @rule(
        path=st.sampled_from(("0", "2")),
        chosen=st.lists(st.integers(0, SEEDS - 1), unique=True, min_size=1),
        goal=st.sampled_from(list(L)),
    )
    def force(self, path, chosen, goal):
        """Without gates and ages: through all states on the way, or by one move of the table; the embargo holds."""
        target = goal
        done = self.seeds[path].advance(chosen, to=target, gates=False)
        moves = []
        for i in chosen:
            seed = self.expected[path][i]
            way = [state for state in (L.DORMANT, *HOLDS) if seed.state < state <= target <= L.FOSSILIZED]
            if target.name in MAY[seed.state.name].split():
                way = [target]
            barred = way and seed.embargo > 0 and (way[0] is L.GERMINATED or seed.state is L.CULLED)
            room = SLOTS - sum(other.slots for other in self.expected[path])
            full = way and way[0] is L.GERMINATED and not room
            moves.append(bool(way) and not barred and not full)
            for state in way if moves[-1] else ():
                seed.enter(state, self.ticks)
                seed.slots = seed.slots or int(state is L.GERMINATED)
        self.told(done, path, chosen, moves)
        self.mark(path)

    @rule(
        path=st.sampled_from(("0", "2")), chosen=st.lists(st.integers(0, SEEDS - 1), unique=True, min_size=1)
    )
    def recycle(self, path, chosen):
        """Changes the host's units of dormant seeds, and no seed; the last layer's have nobody who reads them."""
        done = self.seeds[path].recycle(chosen)
        self.told(
            done, path, chosen, [path == "0" and self.expected[path][i].state is L.DORMANT for i in chosen]
        )

    @rule(told=METRICS, times=st.integers(1, 6))
    def tick(self, told, times):
        for _ in range(times):
            before = [
                (path, i, seed.state) for path, own in self.expected.items() for i, seed in enumerate(own)
            ]
            done = self.seeds.tick(told)
            self.ticks += 1
            for own in self.expected.values():
                for seed in own:
                    seed.tick(told, self.ticks)
            moved = [
                (path, i, source, self.expected[path][i].state)
                for path, i, source in before
                if self.expected[path][i].state is not source
            ]
            assert [(t.path, t.seed, t.source, t.target) for t in done if t.ok] == moved

    @invariant()
    def arrays_are_as_expected(self):
        state = self.model.morphc.seeds if hasattr(self.model, "morphc") else self.seeds._store.state
        flat = [seed for own in self.expected.values() for seed in own]
        assert state.lifecycle.tolist() == [seed.state for seed in flat]
        assert state.ticks_in_state.tolist() == [seed.age for seed in flat]
        assert state.embargo.tolist() == [seed.embargo for seed in flat]
        assert state.error_count.tolist() == [seed.errors for seed in flat]
        assert state.transitions.tolist() == [seed.moves for seed in flat]
        assert state.alpha.tolist() == [seed.alpha for seed in flat]
        assert int(state.tick) == self.ticks
        for path, own in self.expected.items():
            for i, seed in enumerate(own):
                assert [tuple(entry) for entry in self.seeds.history(path, i)] == seed.history

    @invariant()
    def no_slot_is_leaked_shared_or_dirty(self):
        for path, own in self.expected.items():
            handle = self.seeds[path]
            bank = handle.slots["bottleneck"]
            owners = bank.owner.tolist()
            assert Counter(o for o in owners if o >= 0) == Counter(
                {i: s.slots for i, s in enumerate(own) if s.slots}
            )
            numbers = self.seeds._store.state.slot[handle.rows].tolist()
            for i, seed in enumerate(own):
                assert (numbers[i] >= 0) == (seed.state in HOLDS)
                assert numbers[i] < 0 or owners[numbers[i]] == i
            for name in bank.names:
                free = bank.get_parameter(name)[bank.owner < 0]
                assert not free.any()

    @invariant()
    def modes_follow_and_inactive_states_are_the_identity(self):
        for path, own in self.expected.items():
            states = {seed.state for seed in own}
            blends, trains = bool(states & set(SEEN)), L.TRAINING in states
            assert self.seeds[path].mode is (
                Mode.ACTIVE if blends else Mode.TRAINING if trains else Mode.DORMANT
            )
        with torch.no_grad():
            # Both layers' own: nobody reads what a unit says that was recycled.
            mine, theirs = (
                torch.cat([net[0](self.x), net(self.x)], 1).view(torch.int32)
                for net in (self.model, self.host)
            )
            same = torch.equal(mine, theirs)
        assert same == all(seed.alpha == 0 for own in self.expected.values() for seed in own)


class OnKernels(Machine):
    backend = "triton"


MACHINES = settings(max_examples=40, stateful_step_count=30, deadline=None, derandomize=True)


@pytest.mark.parametrize("machine", [Machine, OnKernels], ids=["torch", "triton"])
def test_random_commands_and_ticks(machine):
    case = machine.TestCase
    case.settings = settings(MACHINES, max_examples=40 if machine is Machine else 8)
    case().runTest()
