"""Device descriptions: found by name, architecture or index; a measured CPU is plausible and harmless."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from morphc.errors import ConfigError, UnknownNameError
from morphc.kernels import devices


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("cpu", "cpu"),
        ("h200", "H200"),
        ("rtx4090", "RTX 4090"),
        ("cuda:80", "A100"),
        ("cuda:90", "H100"),
        ("cuda:100", "B200"),
        ("hip:gfx942", "MI300X"),
    ],
)
def test_parse_knows_names_and_architectures(text: str, name: str) -> None:
    assert devices.parse(text).name == name


def test_parse_suggests_what_may_have_been_meant() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown device 'cuda:91'\. Did you mean"):
        devices.parse("cuda:91")


def test_an_index_that_is_not_here_says_how_to_ask_for_another_machine() -> None:
    with pytest.raises(ConfigError, match=r"device cuda:29 is not on this machine.*cuda:90"):
        devices.parse("cuda:29")


def test_an_architecture_stands_for_its_card_with_the_least_bandwidth_per_flop() -> None:
    for device in devices.DEVICES.values():
        chosen = devices._BY_ARCH.get(device.arch, device)
        assert chosen.bandwidth / chosen.bf16 <= device.bandwidth / device.bf16


def test_peaks_by_dtype() -> None:
    assert devices.H200.peak("torch.bfloat16") == pytest.approx(790e12, rel=0.01)
    assert devices.H200.peak("float32") == pytest.approx(60e12, rel=0.01)
    assert devices.H200.bandwidth == pytest.approx(4.3e12, rel=0.01)


def test_the_measured_cpu_is_plausible_and_measured_once() -> None:
    state = torch.get_rng_state()
    cpu = devices.measure_cpu()
    assert devices.measure_cpu() is cpu
    assert cpu.measured
    assert 1e7 < cpu.bandwidth < 2e12
    assert 1e7 < cpu.fp32 < 1e14
    assert 0.1 < cpu.op_us < 1e5
    assert torch.equal(state, torch.get_rng_state())


def test_plans_use_the_nominal_cpu() -> None:
    assert devices.nominal(devices.measure_cpu()) is devices.CPU
    assert devices.nominal(devices.H200) is devices.H200


def test_nothing_is_timed_on_fake_tensors() -> None:
    with FakeTensorMode():
        assert devices.measure_cpu() is devices.CPU


def test_detect_finds_the_machine() -> None:
    assert devices.detect().kind == ("cuda" if torch.cuda.is_available() else "cpu")
