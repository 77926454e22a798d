"""save and load: bitwise there and back, and one clear error for everything that doesn't fit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import morphc
from morphc import Config, Lifecycle, checkpointfile
from morphc.errors import AlreadyMorphedError, CheckpointError, NotMorphedError

MANIFEST, WEIGHTS = "morphc.json", "model.safetensors"


class Host(nn.Module):
    """Tied weights, buffers of several types, a parameter that isn't contiguous, a functional layer."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, width)
        self.up = nn.Linear(width, 22)
        self.norm = nn.BatchNorm1d(22)
        self.down = nn.Linear(22, width)
        self.head = nn.Linear(width, 9, bias=False)
        self.head.weight = self.embed.weight
        self.mix = nn.Parameter(torch.randn(width, width).t())
        self.register_buffer("scale", torch.tensor(1.5))
        self.register_buffer("codes", torch.arange(5, dtype=torch.int8))
        self.register_buffer("floats16", torch.randn(3).half())
        self.register_buffer("view", self.codes[1:4])
        self.register_buffer("empty", torch.zeros(0))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = nn.functional.linear(self.embed(ids), self.mix) * self.scale
        return self.head(x + self.down(torch.relu(self.norm(self.up(x)))))


IDS = torch.tensor([1, 2, 8, 0])


def host_of(dtype: torch.dtype = torch.float32, seed: int = 0, width: int = 12) -> Host:
    torch.manual_seed(seed)
    return Host(width) if dtype == torch.float32 else Host(width).to(dtype)


def grown(host: nn.Module, *inputs: torch.Tensor, **options: Any) -> nn.Module:
    """Seeds in all eleven states, slots trained for two steps so that moments aren't zero."""
    config = Config(
        seeds_per_layer=11, slots=11, rank=2, blueprint=("bottleneck", "affine"), telemetry_every=1, **options
    )
    model = morphc.compile(host, inputs, config=config, verify=False)
    for handle in morphc.seeds(model).sites.values():
        for seed in range(len(handle)):
            state = Lifecycle(seed)
            holds = 1 <= seed <= 7
            handle.assign([seed], state, blueprint="affine" if holds and seed % 2 else None)
        handle.assign([3], Lifecycle.GRAFTING, alpha=0.3)
    for _ in range(2):
        model(*inputs).square().sum().backward()
        morphc.seeds(model).step_optimizer(lr=0.01)
    return model


def assert_same(a: nn.Module, b: nn.Module) -> None:
    left, right = a.state_dict(), b.state_dict()
    assert list(left) == list(right)
    for name, value in left.items():
        assert value.dtype == right[name].dtype, name
        assert value.shape == right[name].shape, name
        bits, others = (v.detach().contiguous().view(-1).view(torch.uint8) for v in (value, right[name]))
        assert torch.equal(bits, others), name


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    directory = tmp_path / "a checkpoint, größer"
    morphc.save(grown(host_of(), IDS), directory)
    return directory


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_round_trip_is_bitwise_with_seeds_in_every_state(dtype: torch.dtype, tmp_path: Path) -> None:
    model = grown(host_of(dtype), IDS)
    moments = [value for name, value in model.state_dict().items() if "exp_avg" in name]
    assert any(value.abs().sum() > 0 for value in moments)
    assert set(morphc.seeds(model).lifecycle.tolist()) == set(range(11))
    morphc.save(model, tmp_path / "c")
    other = host_of(dtype, seed=1)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    loaded = morphc.load(other, tmp_path / "c")
    assert type(loaded) is Host
    assert_same(model, loaded)
    assert loaded.head.weight is loaded.embed.weight
    assert torch.equal(model.eval()(IDS), loaded.eval()(IDS))
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
    a, b = morphc.seeds(model), morphc.seeds(loaded)
    assert [x.site.mode for x in a.sites.values()] == [x.site.mode for x in b.sites.values()]
    assert a.history("up", 3) == b.history("up", 3)
    assert {k: v.tolist() for k, v in a.telemetry().items() if k == "count"} == {
        k: v.tolist() for k, v in b.telemetry().items() if k == "count"
    }


def test_training_goes_on_as_if_it_had_not_been_saved(tmp_path: Path) -> None:
    model = grown(host_of(), IDS)
    morphc.save(model, tmp_path / "c")
    loaded = morphc.load(host_of(seed=1), tmp_path / "c")
    for each in (model, loaded):
        each.zero_grad()
        for site in morphc.seeds(each).sites.values():
            for bank in site.slots.values():
                bank.zero_grads()
        each.train()(IDS).square().sum().backward()
        morphc.seeds(each).step_optimizer(lr=0.01)
    assert_same(model, loaded)
    assert torch.equal(model.mix.grad, loaded.mix.grad)


@pytest.mark.parametrize(
    ("host", "shape"),
    [
        (lambda: nn.Sequential(nn.Linear(12, 22), nn.GELU(), nn.Linear(22, 12)), (3, 12)),
        (lambda: nn.Linear(12, 22), (3, 12)),
        (lambda: nn.Sequential(nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.ReLU()), (2, 3, 5, 5)),
    ],
    ids=["sequential", "root is a layer", "convolution"],
)
def test_other_roots(host: Callable[[], nn.Module], shape: tuple[int, ...], tmp_path: Path) -> None:
    x = torch.randn(shape)
    model = grown(host(), x)
    morphc.save(model, tmp_path / "c")
    loaded = morphc.load(host(), tmp_path / "c")
    assert_same(model, loaded)
    assert torch.equal(model.eval()(x), loaded.eval()(x))


def test_an_enlarged_model_keeps_its_slots(tmp_path: Path) -> None:
    host, x = nn.Sequential(nn.Linear(12, 22), nn.ReLU()), torch.randn(3, 12)
    model = morphc.compile(host, (x,), config=Config(seeds_per_layer=11, slots=2), verify=False)
    morphc.enlarge(model, slots=5)
    morphc.seeds(model)["0"].assign([0, 4, 8, 9], Lifecycle.FOSSILIZED)
    morphc.save(model, tmp_path / "c")
    assert_same(model, morphc.load(nn.Sequential(nn.Linear(12, 22), nn.ReLU()), tmp_path / "c"))


def test_host_on_meta_gets_its_values_from_the_checkpoint(saved: Path) -> None:
    with torch.device("meta"):
        host = Host()
    loaded = morphc.load(host, saved)
    assert not any(value.is_meta for value in (*loaded.parameters(), *loaded.buffers()))
    assert_same(morphc.load(host_of(), saved), loaded)
    assert loaded.head.weight is loaded.embed.weight
    assert host.mix.is_meta
    loaded(IDS).sum().backward()
    morphc.seeds(loaded).telemetry()


def test_buffer_without_values_is_named(tmp_path: Path) -> None:
    class Rotary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(12, 12)
            self.register_buffer("frequency", torch.ones(12), persistent=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x * self.frequency)

    morphc.save(grown(Rotary(), torch.randn(2, 12)), tmp_path / "c")
    with torch.device("meta"):
        host = Rotary()
    with pytest.raises(CheckpointError, match=r"'frequency' is on the meta device and not persistent"):
        morphc.load(host, tmp_path / "c")


def test_on_disk_are_two_files_without_pickle_and_tied_tensors_once(saved: Path) -> None:
    assert sorted(path.name for path in saved.iterdir()) == [WEIGHTS, MANIFEST]
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]
    manifest = json.loads((saved / MANIFEST).read_text())
    assert manifest["tied"] == {"head.weight": "embed.weight"}
    tensors = load_file(saved / WEIGHTS)
    assert "head.weight" not in tensors
    assert manifest["weights"]["sha256"] == hashlib.sha256((saved / WEIGHTS).read_bytes()).hexdigest()
    assert "morphc.seeds.lifecycle" in tensors


def test_equal_models_give_equal_bytes(saved: Path, tmp_path: Path) -> None:
    morphc.save(morphc.load(host_of(seed=2), saved), tmp_path / "again")
    for name in (WEIGHTS, MANIFEST):
        assert (tmp_path / "again" / name).read_bytes() == (saved / name).read_bytes()


def test_plain_and_morphed_models_are_refused_where_the_other_is_meant(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(NotMorphedError):
        morphc.save(host_of(), tmp_path / "x")
    assert not (tmp_path / "x").exists()
    with pytest.raises((AlreadyMorphedError, CheckpointError)):
        morphc.load(morphc.load(host_of(), saved), saved)


# -- writing -------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_replaced_and_anything_else_is_not(saved: Path, tmp_path: Path) -> None:
    model = grown(host_of(seed=3), IDS)
    morphc.save(model, saved)
    assert_same(morphc.load(host_of(), saved), model)
    link = tmp_path / "link"
    link.symlink_to(saved)
    morphc.save(model, link)
    assert link.is_symlink()
    (tmp_path / "empty").mkdir()
    morphc.save(model, tmp_path / "empty")

    (saved / "notes.txt").write_text("mine")
    file = tmp_path / "file"
    file.write_text("mine")
    other = tmp_path / "other"
    other.mkdir()
    (other / MANIFEST).write_text("{}")
    for target, what in ((saved, "notes.txt"), (file, "is a file"), (other, "something else")):
        with pytest.raises(CheckpointError, match=what):
            morphc.save(model, target)
    assert (saved / "notes.txt").read_text() == "mine"
    assert file.read_text() == "mine"


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "ctrl-c"]
)
def test_a_failed_save_leaves_the_old_checkpoint_and_nothing_else(
    saved: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    model = grown(host_of(seed=3), IDS)

    def fail(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(checkpointfile, "save_file", fail)
    with pytest.raises(CheckpointError if isinstance(error, OSError) else KeyboardInterrupt) as caught:
        morphc.save(model, saved)
    if isinstance(error, OSError):
        assert "No space left on device" in str(caught.value)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_a_rename_that_fails_puts_the_old_checkpoint_back(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    model = grown(host_of(seed=3), IDS)
    rename = Path.rename

    def refuse(self: Path, target: Any) -> Path:
        if self.suffix == ".part":
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(CheckpointError, match="Input/output error"):
        morphc.save(model, saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_values_that_a_checkpoint_can_t_hold_are_named(tmp_path: Path) -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> object:
            return {"a": 1}

        def set_extra_state(self, state: object) -> None:
            pass

    model = morphc.compile(Extra(4, 4), (torch.randn(2, 4),), verify=False)
    with pytest.raises(CheckpointError, match=r"'_extra_state' is a dict.*get_extra_state return a tensor"):
        morphc.save(model, tmp_path / "c")
    with torch.device("meta"):
        model = morphc.compile(nn.Linear(4, 4), (torch.randn(2, 4),), verify=False)
    with pytest.raises(CheckpointError, match="on the meta device and has no values"):
        morphc.save(model, tmp_path / "c")
    assert list(tmp_path.iterdir()) == []


# -- bad input -----------------------------------------------------------------------------------------------


def edit(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    manifest = json.loads((directory / MANIFEST).read_text())
    change(manifest)
    manifest["sha256"] = checkpointfile.seal(json.dumps(manifest).encode())
    (directory / MANIFEST).write_text(json.dumps(manifest))


def reweigh(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the tensors, with a manifest that vouches for them."""
    tensors = load_file(directory / WEIGHTS)
    change(tensors)
    save_file(tensors, directory / WEIGHTS)
    data = (directory / WEIGHTS).read_bytes()
    edit(directory, lambda m: m["weights"].update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest()))


def truncate(path: Path, keep: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def no_safetensors(directory: Path) -> None:
    data = b"\x80\x04K\x01." * 9
    (directory / WEIGHTS).write_bytes(data)
    edit(directory, lambda m: m["weights"].update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest()))


BAD = {
    "truncated weights": (
        lambda d: truncate(d / WEIGHTS, 0.7),
        r"model\.safetensors is truncated: \d+ bytes",
    ),
    "flipped bit": (lambda d: flip(d / WEIGHTS), r"model\.safetensors is damaged: its sha256"),
    "no weights": (
        lambda d: (d / WEIGHTS).unlink(),
        r"model\.safetensors is missing, and morphc\.json names it",
    ),
    "a pickle": (no_safetensors, r"model\.safetensors is no safetensors file"),
    "no manifest": (lambda d: (d / MANIFEST).unlink(), r"morphc\.json is missing"),
    "truncated manifest": (lambda d: truncate(d / MANIFEST, 0.5), r"morphc\.json is truncated or damaged"),
    "foreign manifest": (
        lambda d: (d / MANIFEST).write_text('{"a": 1}'),
        r"format='', not 'morphc checkpoint'",
    ),
    "newer schema": (
        lambda d: edit(d, lambda m: m.update(schema_version=2, more=1)),
        r"schema_version=2, this morphc .* reads 1; load it with morphc 0\.1\.0 or a newer one\. .*load_state_dict",
    ),
    "newer plan": (
        lambda d: edit(d, lambda m: m["plan"].update(schema_version=9)),
        r"plan\.schema_version=9.*a newer one",
    ),
    "unknown field": (lambda d: edit(d, lambda m: m.update(more=1)), r"morphc\.json: .*unknown field.*more"),
    "wrong type": (lambda d: edit(d, lambda m: m.update(tied=3)), r"morphc\.json: .*\$\.tied"),
    "outside": (
        lambda d: edit(d, lambda m: m["weights"].update(file="../x")),
        r"weights\.file='\.\./x', which is no plain",
    ),
    "bad tie": (
        lambda d: edit(d, lambda m: m["tied"].update(a="b")),
        r"tied\['a'\] is 'b', which .* has not",
    ),
    "extra key": (
        lambda d: reweigh(d, lambda t: t.update(more=torch.ones(1))),
        r"has 'more' that this host has not",
    ),
    "missing key": (lambda d: reweigh(d, lambda t: t.pop("up.bias")), r"lacks 'up\.bias' of this host"),
    "missing seeds": (
        lambda d: reweigh(d, lambda t: t.pop("morphc.seeds.alpha")),
        r"lacks 'morphc\.seeds\.alpha' of this model",
    ),
    "extra slot": (
        lambda d: reweigh(d, lambda t: t.update({"up.morphc.slots.odd.w": torch.ones(1)})),
        r"has 'up\.morphc\.slots\.odd\.w' that this model has not",
    ),
    "other dtype": (
        lambda d: reweigh(d, lambda t: t.update({"up.bias": t["up.bias"].half()})),
        r"'up\.bias' is torch\.float16, in this host it is torch\.float32",
    ),
    "untied": (
        lambda d: (
            edit(d, lambda m: m.update(tied={})),
            reweigh(d, lambda t: t.update({"head.weight": t["embed.weight"] + 1})),
        ),
        r"different values for 'embed\.weight' and 'head\.weight', which this model ties",
    ),
}


def test_a_checkpoint_of_another_version_with_the_same_schema_is_loaded(saved: Path) -> None:
    expected = morphc.load(host_of(), saved)
    edit(saved, lambda m: (m.update(morphc_version="0.9.3"), m["plan"].update(morphc_version="0.9.3")))
    loaded = morphc.load(host_of(), saved)
    assert_same(loaded, expected)
    assert any("made by morphc 0.9.3" in line for line in morphc.report(loaded).verification)


def test_an_unknown_field_names_the_version_that_wrote_it(saved: Path) -> None:
    edit(saved, lambda m: m.update(morphc_version="0.9.3", more=1))
    with pytest.raises(CheckpointError, match=r"unknown field `more`; it was written by morphc 0\.9\.3"):
        morphc.load(host_of(), saved)


@pytest.mark.parametrize("what", BAD, ids=list(BAD))
def test_a_damaged_checkpoint_is_refused(what: str, saved: Path) -> None:
    damage, message = BAD[what]
    damage(saved)
    host = host_of(seed=5)
    before = {name: value.clone() for name, value in host.state_dict().items()}
    with pytest.raises(CheckpointError, match=message) as caught:
        morphc.load(host, saved)
    assert str(saved) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in host.state_dict().items())
    assert not any("morphc" in module._modules for module in host.modules())


def test_a_flipped_bit_of_a_number_is_refused_and_an_older_file_without_a_sum_is_not(saved: Path) -> None:
    path = saved / MANIFEST
    whole = path.read_bytes()
    data = bytearray(whole)
    data[data.index(b",", data.index(b'"seeds": ')) - 1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"morphc\.json is damaged"):
        morphc.load(host_of(), saved)
    fields = json.loads(whole)
    del fields["sha256"]
    path.write_text(json.dumps(fields))
    assert_same(morphc.load(host_of(), saved), morphc.load(host_of(), saved))


def test_another_model_is_refused_by_class_and_by_layer(saved: Path) -> None:
    with pytest.raises(CheckpointError, match=r"of a 'Host' \(plan\.model_class\), the host is a 'Linear'"):
        morphc.load(nn.Linear(2, 2), saved)
    shapes = r"'mix' has shape \[12, 12\], in this host it is \[16, 16\]"
    with pytest.raises(CheckpointError, match=shapes):
        morphc.load(host_of(width=16), saved)
    with pytest.raises(CheckpointError, match=r"takes an nn\.Module"):
        morphc.load("model", saved)  # type: ignore[type-var]
    with pytest.raises(CheckpointError, match=r"is no directory; give the one that morphc\.save wrote"):
        morphc.load(host_of(), saved / "nowhere")


def test_what_the_system_refuses_is_reported(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    model = morphc.load(host_of(), saved)
    with pytest.raises(CheckpointError, match=r"can't be written: .*File exists: '.*file'"):
        morphc.save(model, tmp_path / "file" / "c")
    (saved / MANIFEST).unlink()
    (saved / MANIFEST).mkdir()
    with pytest.raises(CheckpointError, match="can't be read: Is a directory"):
        morphc.load(host_of(), saved)
