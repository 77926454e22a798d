"""Where other ways to grow a network cut: optimizers, copies, ranks of activations, clipping, files, global state."""

from __future__ import annotations

import ast
import copy
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from growing import FAST, Never, Task, grown, host, same
from torch import Tensor, nn

import morphc
from morphc import Config, Lifecycle
from morphc.errors import ConfigError, MorphcWarning
from morphc.grow.controllers import Germinate
from morphc.grow.recycler import RecycleController

L = Lifecycle
PACKAGE = Path(morphc.__file__).parent
LOOSE = {
    "min_isolated_improvement": -1.0,
    "min_contribution": -10.0,
    "cull_contribution": -20.0,
    "min_improvement": -10.0,
    "min_stability": 0.0,
    "min_final_stability": 0.0,
}
MEASURED = ("seeds.sums", "seeds.counts", "seeds.score")


class Run:
    """A model with the optimizer that it is given, and a Grower that ticks every fourth step."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, controller: Any = None, task: Any = None
    ) -> None:
        self.model, self.optimizer, self.task = model, optimizer, task or Task()
        self.grower = morphc.Grower(model, optimizer, controller or Never(), self.task.validate, tick_every=4)
        self.moves: list[Lifecycle] = []

    def step(self, number: int, *, set_to_none: bool = True, clip: float | None = None) -> Tensor:
        self.optimizer.zero_grad(set_to_none=set_to_none)
        loss: Tensor = self.task.loss(self.model, number)
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), clip)
        self.optimizer.step()
        event = self.grower.step(loss)
        self.moves += [moved.target for moved in event.transitions if moved]
        return loss.detach()


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items() if not name.endswith(MEASURED)}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    assert one.keys() == other.keys()
    return all(torch.equal(value, other[name]) for name, value in one.items())


def test_an_optimizer_made_before_compile_trains_the_host_through_the_whole_lifecycle() -> None:
    plain = host()
    optimizer = adamw(plain)
    known = {id(param) for group in optimizer.param_groups for param in group["params"]}
    config = Config(seeds_per_layer=1, rank=3, blueprint="widen", backend="torch", **FAST, **LOOSE)
    model = morphc.compile(plain, (torch.zeros(2, 6),), config=config)
    run = Run(model, optimizer, morphc.ScheduleController([(4, Germinate("2", (0,)))]))
    started = values(model)
    for number in range(140):
        run.step(number)
    assert run.moves[-1] == L.FOSSILIZED
    now = values(model)
    assert all(not torch.equal(started[name], now[name]) for name, _ in host().named_parameters())
    assert {id(param) for group in optimizer.param_groups for param in group["params"]} == known
    assert set(map(id, optimizer.state)) == known
    torch.testing.assert_close(morphc.fold(model)(run.task.vx), model(run.task.vx), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("state", L, ids=lambda state: state.name)
def test_a_deep_copy_in_any_state_goes_on_as_the_original_would(state: Lifecycle) -> None:
    _, model = grown(**LOOSE)
    morphc.seeds(model)["2"].assign([0], state, alpha=0.3 if state is L.GRAFTING else None)
    first = Run(model, torch.optim.SGD(model.parameters(), lr=0.01))
    for number in range(6):
        first.step(number)
    twin = copy.deepcopy(model)
    kept = values(twin)
    ends = []
    for net in (model, twin):
        run = Run(net, torch.optim.SGD(net.parameters(), lr=0.01))
        for number in range(24):
            run.step(number)
        ends.append(values(net))
        if net is model:
            assert equal(values(twin), kept)
    assert equal(*ends)
    assert not equal(ends[0], kept)


class Mixed(nn.Module):
    """A Linear that sees [B, T, F] once and [B, F] once in a forward, and one after a mean over T."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.head = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        once = torch.relu(self.both(x))
        pooled = once.mean(1) if once.dim() == 3 else once
        return self.head(torch.relu(self.both(pooled)))


@pytest.mark.parametrize("state", [L.TRAINING, L.GRAFTING, L.FINE_TUNING, L.FOSSILIZED], ids=lambda s: s.name)
@pytest.mark.parametrize("blueprint", ["bottleneck", "lowrank"])
def test_activations_of_two_and_three_dimensions_in_one_forward(blueprint: str, state: Lifecycle) -> None:
    torch.manual_seed(0)
    plain = Mixed()
    x = torch.randn(5, 3, 6)
    config = Config(seeds_per_layer=2, rank=2, blueprint=blueprint, backend="torch", isolation_every=1)
    model = morphc.compile(copy.deepcopy(plain), (x,), config=config, verify=False)
    site = morphc.seeds(model)["both"]
    site.assign([0], state, alpha=0.5 if state is L.GRAFTING else None)
    bank = site.slots[blueprint]
    with torch.no_grad():
        for param in bank.parameters():
            param.copy_(torch.randn(param.shape) / 3)
    for _ in range(2):
        for rows in (x, x[:, 0], x[:2]):
            whole = rows if rows.dim() == 3 else rows[:, None]
            assert torch.allclose(model(rows), model(whole), atol=1e-6)
            out = model(rows)
            wanted = plain(rows)
            assert torch.equal(out, wanted) == (state is L.TRAINING)
            plain.zero_grad()
            model.zero_grad()
            out.square().sum().backward()
            wanted.square().sum().backward()
            if state is L.TRAINING:
                assert same_gradients(plain, model)
            if state is not L.FOSSILIZED:
                assert all(grad is not None and grad.isfinite().all() for grad in bank.grads().values())
            morphc.seeds(model).step_optimizer(lr=0.0)


def same_gradients(plain: nn.Module, model: nn.Module) -> bool:
    found = dict(model.named_parameters())
    return all(torch.equal(param.grad, found[name].grad) for name, param in plain.named_parameters())


@pytest.mark.parametrize("state", [L.TRAINING, L.GRAFTING, L.FINE_TUNING], ids=lambda state: state.name)
def test_either_way_to_clear_gradients_gives_the_same_bits(state: Lifecycle) -> None:
    ends = []
    for set_to_none in (True, False):
        _, model = grown()
        morphc.seeds(model)["2"].assign([0, 1], state, alpha=0.4 if state is L.GRAFTING else None)
        run = Run(model, adamw(model))
        for number in range(10):
            run.step(number, set_to_none=set_to_none)
        ends.append(values(model))
    assert equal(*ends)


def test_clipping_all_parameters_sees_the_hosts_gradients_only() -> None:
    plain, model = grown()
    morphc.seeds(model)["2"].assign([0, 1], L.TRAINING)
    run = Run(model, adamw(model))
    optimizer = adamw(plain)
    for number in range(12):
        optimizer.zero_grad()
        run.task.loss(plain, number).backward()
        norm = nn.utils.clip_grad_norm_(plain.parameters(), 0.05)
        assert norm > 0.05
        optimizer.step()
        run.step(number, clip=0.05)
        assert same(plain, model), number


FILES = (
    "config.json", "morphc.json", "morphc.toml", "plan.json", "manifest.json", "snapshot.safetensors",
    "state.safetensors", "model.safetensors", "best.pt", "checkpoint.pt", ".morphc", ".morphcrc", "graft.pt",
)  # fmt: skip

IN_A_FOLDER = """
import hashlib, os, sys
sys.path.insert(0, sys.argv[1])
import torch
from growing import Task, grown
import morphc
from morphc.grow.controllers import Germinate

torch.set_num_threads(1)
places = [os.path.realpath(place) for place in sys.argv[2:]]
touched = []
def watch(event, args):
    if event in ("open", "os.listdir", "os.scandir", "os.mkdir", "os.rename", "os.remove"):
        place = args[0] if args else None
        if isinstance(place, (str, bytes)) or place is None:
            full = os.path.realpath(os.fsdecode(place) if place is not None else ".")
            if any(full == folder or full.startswith(folder + os.sep) for folder in places):
                touched.append((event, full))
sys.addaudithook(watch)
for place in places:
    os.chdir(place)
    _, model = grown(seeds_per_layer=1, blueprint="widen", min_isolated_improvement=-1.0, min_contribution=-9.0)
    task, optimizer = Task(), torch.optim.Adam(model.parameters(), lr=0.01)
    controller = morphc.ScheduleController([(2, Germinate("2", (0,)))])
    grower = morphc.Grower(model, optimizer, controller, task.validate, tick_every=2)
    for number in range(40):
        optimizer.zero_grad()
        loss = task.loss(model, number)
        loss.backward()
        optimizer.step()
        grower.step(loss)
    folded = morphc.fold(model)
    told = [value.numpy().tobytes() for value in [*model.state_dict().values(), *folded.state_dict().values()]]
    print(hashlib.sha256(b"".join(told)).hexdigest(), max(grower.seeds.lifecycle.tolist()))
print(touched)
"""


def test_what_lies_in_the_working_directory_is_neither_read_nor_written(tmp_path: Path) -> None:
    empty, stale = tmp_path / "empty", tmp_path / "stale"
    empty.mkdir()
    stale.mkdir()
    for name in FILES:
        (stale / name).write_bytes(b'{"seeds_per_layer": 7, "schema_version": 1}')
    done = subprocess.run(
        [sys.executable, "-P", "-c", IN_A_FOLDER, str(Path(__file__).parent), str(empty), str(stale)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "MORPHC_CACHE": str(tmp_path / "cache")},
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    in_empty, in_stale, touched = done.stdout.splitlines()
    assert in_empty == in_stale
    assert int(in_empty.split()[1]) >= L.GRAFTING
    assert touched == "[]"
    assert sorted(os.listdir(stale)) == sorted(FILES)
    assert os.listdir(empty) == []


def calls(tree: ast.AST) -> set[str]:
    """Names of what is called or raised, `sys.exit` and the like with its module."""
    found = set()
    for node in ast.walk(tree):
        named = node.func if isinstance(node, ast.Call) else node.exc if isinstance(node, ast.Raise) else None
        if isinstance(named, ast.Name | ast.Attribute):
            found.add(ast.unparse(named))
    return found


ENDS_OR_ASKS = {
    "sys.exit",
    "exit",
    "quit",
    "os._exit",
    "os.abort",
    "SystemExit",
    "input",
    "getpass.getpass",
    "breakpoint",
}


def test_only_the_command_line_ends_a_process_or_asks() -> None:
    # Some of the package's folders are links.
    files = [Path(top) / name for top, _, names in os.walk(PACKAGE, followlinks=True) for name in names]
    files = [path for path in files if path.suffix == ".py" and path.name != "__main__.py"]
    assert len(files) > 100
    for path in files:
        assert not calls(ast.parse(path.read_text())) & ENDS_OR_ASKS, path


def surroundings() -> tuple[Any, ...]:
    """What belongs to the process and not to a model."""
    return (
        dict(os.environ), os.getcwd(), list(sys.path), sys.excepthook, sys.displayhook, list(warnings.filters),
        torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(), torch.get_rng_state().tolist(),
        torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision(),
        torch.is_autocast_enabled("cpu"), torch.is_anomaly_enabled(),
    )  # fmt: skip


def growing_run(shift: int, blueprint: str) -> Run:
    _, model = grown(seeds_per_layer=1, blueprint=blueprint, **LOOSE)
    return Run(
        model,
        adamw(model),
        morphc.ScheduleController([(4 + shift, Germinate("2", (0,), candidates=1))]),
    )


def test_two_models_and_two_growers_in_one_process_do_not_touch_each_other() -> None:
    wanted = []
    for options in ((0, "widen"), (9, "bottleneck")):
        run = growing_run(*options)
        for number in range(120):
            run.step(number)
        assert run.moves[-1] == L.FOSSILIZED
        wanted.append((values(run.model), run.moves))
    one, other = growing_run(0, "widen"), growing_run(9, "bottleneck")
    for number in range(120):
        one.step(number)
        other.step(number)
    assert [one.moves, other.moves] == [moves for _, moves in wanted]
    assert equal(values(one.model), wanted[0][0])
    assert equal(values(other.model), wanted[1][0])


def test_growing_leaves_the_process_as_it_was() -> None:
    growing_run(0, "widen").step(0)  # what is imported on first use is imported
    before = surroundings()
    run = growing_run(0, "widen")
    for number in range(100):
        run.step(number)
    snapshot = run.grower.snapshot()
    morphc.fold(copy.deepcopy(run.model))
    run.grower.restore(snapshot)
    assert surroundings() == before
    assert L.FINE_TUNING in run.moves


def test_an_optimizer_of_another_module_is_told() -> None:
    plain, model = grown()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    with pytest.warns(MorphcWarning, match="none of the model's parameters"):
        morphc.Grower(model, optimizer, Never(), lambda net: 1.0)


def test_a_plateau_controller_that_can_germinate_nowhere_is_refused():
    model = compiled_for_controllers(slots=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with pytest.raises(
        ConfigError, match=r"candidates=3\): .* no site has more than 2; .*enlarge\(model, slots=3\)"
    ):
        morphc.Grower(model, optimizer, morphc.PlateauController(candidates=3), evaluate=lambda net: 0.0)
    with pytest.raises(
        ConfigError, match=r"blueprint='widen'\): no site has a bank .*there are banks of bottleneck"
    ):
        morphc.Grower(model, optimizer, morphc.PlateauController(blueprint="widen"), evaluate=lambda net: 0.0)
    morphc.enlarge(model, slots=3)  # the last layer has two features, and so two seeds
    with pytest.warns(
        MorphcWarning, match=r"candidates=3\): .* and '2' have fewer: nothing germinates there"
    ):
        morphc.Grower(model, optimizer, morphc.PlateauController(candidates=3), evaluate=lambda net: 0.0)


def test_a_recycle_controller_with_nothing_to_recycle_says_so():
    host = torch.nn.Sequential(torch.nn.Linear(4, 8))
    model = morphc.compile(host, (torch.zeros(2, 4),), config=morphc.Config(seeds_per_layer=4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with pytest.warns(
        MorphcWarning, match=r"nothing .* can be recycled; of 1 of its 1 sites: no layer is known that"
    ):
        morphc.Grower(model, optimizer, RecycleController())


@pytest.mark.parametrize("state", [Lifecycle.GRAFTING, Lifecycle.FOSSILIZED])
def test_a_seed_with_candidates_that_is_put_further_keeps_one_slot(state):
    site = morphc.seeds(compiled_for_controllers(slots=3))["0"]
    site.germinate([1], candidates=3)
    site.assign([1], Lifecycle.TRAINING)
    assert site.slots["bottleneck"].owner.tolist() == [1, 1, 1]
    site.assign([1], state)
    assert site.slots["bottleneck"].owner.tolist() == [1, -1, -1]


def compiled_for_controllers(slots):
    host = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    config = morphc.Config(seeds_per_layer=4, slots=slots, blueprint="bottleneck")
    return morphc.compile(host, (torch.zeros(2, 4),), config=config)


@pytest.mark.parametrize("leave", [morphc.fold, morphc.detach])
def test_what_a_grower_watches_with_stays_out_of_plain_modules(leave: Any) -> None:
    _, model = grown(width=4, telemetry_every=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    controller = morphc.RecycleController(by="activation", every=2, candidates=3)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    grower = morphc.Grower(model, optimizer, controller, scaler=scaler, tick_every=1)
    seen: list[int] = []
    model[0].register_forward_pre_hook(lambda *_: seen.append(1))
    plain = leave(model)
    assert b"morphc" not in pickle.dumps(nn.ModuleList([plain[2]]))
    for module in plain.modules():
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        assert len(hooks) == (module is plain[0])
    plain(torch.ones(2, 6)).sum().backward()
    assert seen == [1]
    assert controller.activity is not None
    assert not controller.activity.sums
    assert grower.rates.scale is None
    assert len(model[2]._forward_pre_hooks) == 1
