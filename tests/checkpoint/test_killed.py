"""kill -9 in the middle of a save: what is under the name is whole, and at most one save old."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import morphc
from morphc import Config, publishing

SCRIPT = r"""
import os, random, signal, sys, time
from pathlib import Path
import torch
from torch import nn
import morphc

what, folder, kills = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(1)
host = lambda: nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
model = morphc.compile(host(), (torch.zeros(2, 64),), config=morphc.Config(seeds_per_layer=2, slots=2), verify=False)
grower = morphc.Grower(model, torch.optim.SGD(model.parameters(), lr=0.1), evaluate=lambda net: 0.0)

def save(number):
    with torch.no_grad():
        for param in model.parameters():
            param.fill_(float(number))
    if what == "model":
        morphc.save(model, folder)
    else:
        grower.snapshot().save(folder)

def number_of():
    if what == "model":
        tensors = dict(morphc.load(host(), folder).named_parameters())
    else:
        tensors = morphc.Snapshot.load(folder).tree["model"]["tensors"]
        tensors = {name: tensor for name, tensor in tensors.items() if name.startswith("host/")}
    (value,) = {float(value) for tensor in tensors.values() for value in (tensor.min(), tensor.max())}
    return int(value)

save(0)
last, chance, hit = 0, random.Random(0), 0
for kill in range(kills):
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        for number in range(last + 1, last + 1000):
            save(number)
            os.write(write, number.to_bytes(4, "little"))
        os._exit(0)
    os.close(write)
    first = os.read(read, 4)  # so that every child is killed at work, and not while it starts
    time.sleep(chance.random() * 0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    data = first + os.read(read, 4000)
    os.close(read)
    done = int.from_bytes(data[-4:], "little")
    hit += any(path.suffix in (".part", ".old") for path in folder.parent.iterdir())
    found = number_of()
    assert done <= found <= done + 1, (done, found)
    last = found
save(last + 1)
assert sorted(path.name for path in folder.parent.iterdir()) == [folder.name], list(folder.parent.iterdir())
print("hit", hit)
"""


NO_FORK = pytest.mark.skipif(
    not hasattr(os, "fork"), reason="a child that is killed is a fork of this process"
)


@NO_FORK
@pytest.mark.parametrize("what", ["model", "snapshot"])
def test_a_save_that_is_killed_loses_at_most_itself(what: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", SCRIPT, what, str(tmp_path / "saved"), "12"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) > 0, "no kill came in the middle of a save"


@pytest.fixture
def model() -> nn.Module:
    host = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    return morphc.compile(host, (torch.zeros(2, 4),), config=Config(seeds_per_layer=2), verify=False)


@NO_FORK
def test_a_kill_between_the_two_renames_gives_the_old_one_back(model: nn.Module, tmp_path: Path) -> None:
    """The moment in which nothing is under the name."""
    target = tmp_path / "saved"
    morphc.save(model, target)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    child = os.fork()
    if child == 0:
        rename = Path.rename

        def die(self: Path, to: Path) -> Path:
            if self.suffix == ".part":
                os.kill(os.getpid(), signal.SIGKILL)
            return rename(self, to)

        Path.rename = die  # type: ignore[method-assign,assignment]
        with torch.no_grad():
            model[0].weight.add_(1.0)
        morphc.save(model, target)
        os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    assert not target.exists()
    loaded = morphc.load(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)), target)
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_what_another_process_is_writing_is_left_alone(model: nn.Module, tmp_path: Path) -> None:
    parent = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        busy = tmp_path / f".saved.{publishing._host()}-{parent.pid}-abc.part"
        elsewhere = tmp_path / ".saved.00000000-1-abc.part"
        stranger = tmp_path / ".saved.backup.old"
        for path in (busy, elsewhere, stranger):
            path.mkdir()
        morphc.save(model, tmp_path / "saved")
        assert busy.is_dir()
        assert elsewhere.is_dir()
        assert stranger.is_dir()
    finally:
        parent.kill()
        parent.wait()
    morphc.save(model, tmp_path / "saved")
    assert not busy.exists()
