"""The cost model: exact where it is arithmetic, near the measurements where it predicts time."""

from __future__ import annotations

import subprocess
import sys
from fractions import Fraction
from statistics import median

import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st

import morphc.kernels.blueprints  # noqa: F401  (registers the built-in blueprints)
from morphc.errors import UnknownNameError
from morphc.kernels import cost, cost_site, devices
from morphc.kernels.cost import Cost, HostLayer, SiteShape, divides, rows_symbol

rows = rows_symbol()
LINEAR = HostLayer(kind="linear", features=4096, in_features=4096, weights=4096**2, dtype="bfloat16")
C64 = SiteShape(features=4096, seeds=64, dtype="bfloat16", owns_input=True)


def test_a_dormant_site_that_is_not_due_costs_nothing() -> None:
    for backend in ("torch", "triton"):
        assert cost_site.dormant(C64, rows, backend, due=False) == Cost()


def test_telemetry_off_costs_nothing_even_when_due() -> None:
    off = SiteShape(features=64, seeds=8, telemetry_every=0)
    assert cost_site.dormant(off, rows, "torch", due=True) == Cost()
    assert cost_site.amortised(off, rows, "torch", Fraction(0)) == Cost()


def test_triton_telemetry_is_one_read_and_its_partials() -> None:
    due = cost_site.dormant(C64, rows, "triton", due=True).at(4096)
    partials = 32 * 64 * 8 * 4  # 4096 rows in splits of 128, 64 chunks, 8 fields of 4 bytes
    totals = 64 * 8 * 4
    assert due.read == 4096 * 4096 * 2 + partials + totals
    assert due.written == partials + totals
    assert due.flops == 11 * 4096 * 4096 + 2 * 4096 * 64
    assert due.launches == 2


def test_a_fused_activation_saves_the_read() -> None:
    fused = SiteShape(features=4096, seeds=64, dtype="bfloat16", fused=True)
    apart, together = (cost_site.telemetry(s, 4096, "triton") for s in (C64, fused))
    assert apart.read - together.read == 4096 * 4096 * 2


def test_torch_telemetry_bytes_by_hand() -> None:
    shape = SiteShape(features=512, seeds=32)
    due = cost_site.telemetry(shape, rows, "torch").at(128)
    assert due.bytes == 4 * (29 * 128 * 512 + 111 * 128 * 32)
    assert due.launches == 18


def test_active_bottleneck_by_hand() -> None:
    # 10 % of 64 seeds are 7; each is 64 -> 16 -> 64 and touches 128 bytes a row, in place.
    work = cost_site.active(C64, rows, "triton", Fraction(1, 10)).at(1000)
    parameters = 7 * (64 * 16 + 16 + 16 * 64 + 64) * 4
    assert work.read == parameters + 1000 * 7 * 128
    assert work.written == 1000 * 7 * 128
    assert work.matmul == 7 * 4 * 64 * 16 * 1000
    assert work.vector == 30 * 7 * 16 * 1000 + 2 * 1000 * 7 * 64


def test_small_chunks_are_charged_whole_memory_granules() -> None:
    narrow = SiteShape(features=4096, seeds=1024, dtype="bfloat16", owns_input=True)
    work = cost_site.active(narrow, 1, "triton", Fraction(1, 100))
    assert work.written == 11 * 64  # 11 chunks of 8 bytes


def test_active_bytes_never_exceed_the_activation() -> None:
    narrow = SiteShape(features=4096, seeds=1024, dtype="bfloat16", owns_input=True)
    assert cost_site.active(narrow, 10, "triton", Fraction(1)).written == 10 * 4096 * 2


def test_a_value_that_the_site_does_not_own_is_copied_whole() -> None:
    shared = SiteShape(features=4096, seeds=64, dtype="bfloat16")
    assert cost_site.active(shared, 10, "triton", Fraction(1, 64)).written == 10 * 4096 * 2


def test_the_torch_backend_computes_all_slots_and_rebuilds_the_whole_value() -> None:
    few = SiteShape(features=256, seeds=16, slots=8)
    one, all_of_them = (cost_site.active(few, 64, "torch", Fraction(n, 16)) for n in (1, 8))
    assert one == all_of_them
    parameters = 8 * (2 * 16 * 16 + 32) * 4
    assert one.bytes == parameters + 4 * 64 * (121 * 128 + 99 * 128 + 30 * 256)


def test_no_more_seeds_are_active_than_there_are_slots() -> None:
    assert SiteShape(features=256, seeds=64, slots=4).active_seeds(Fraction(1, 2)) == 4
    assert SiteShape(features=256, seeds=64).active_seeds(Fraction(1, 100)) == 1
    assert SiteShape(features=256, seeds=64).active_seeds(Fraction(0)) == 0


def test_amortised_is_exact() -> None:
    shape = SiteShape(features=7, seeds=3, telemetry_every=16)
    spread = cost_site.amortised(shape, rows, "torch", Fraction(0)).at(5)
    assert spread.bytes == Fraction(4 * (29 * 35 + 111 * 15), 16)


@pytest.mark.parametrize(
    ("layer", "count", "read", "written", "flops"),
    [
        pytest.param(
            HostLayer(kind="linear", features=10, in_features=512, weights=5120),
            128, 4 * (128 * 512 + 5120 + 10), 4 * 1280, 2 * 5120 * 128 + 1280, id="linear",
        ),
        pytest.param(
            HostLayer(kind="conv", features=64, in_features=3, weights=64 * 3 * 49, bias=False, stride=4),
            100, 4 * (400 * 3 + 9408), 4 * 6400, 2 * 9408 * 100, id="conv7x7-stride2",
        ),
        pytest.param(
            HostLayer(
                kind="conv", features=8, in_features=16, weights=512, bias=False, stride=4, transposed=True
            ),
            100, 4 * (25 * 16 + 512), 4 * 800, 2 * 512 * 25, id="transposed-conv2x2-stride2",
        ),
        pytest.param(
            HostLayer(kind="norm", features=32, in_features=32, weights=32),
            10, 4 * (320 + 64), 4 * 320, 8 * 320, id="norm",
        ),
        pytest.param(
            HostLayer(kind="embedding", features=32, in_features=1000, weights=32000, dtype="float16"),
            10, 2 * 320 + 80, 2 * 320, 0, id="embedding",
        ),
    ],
)  # fmt: skip
def test_host_layer_by_hand(layer: HostLayer, count: int, read: int, written: int, flops: int) -> None:
    forward = cost_site.host_forward(layer, rows).at(count)
    assert (forward.read, forward.written, forward.flops) == (read, written, flops)
    step = cost_site.host_step(layer, rows).at(count)
    assert (step.bytes, step.flops) == (3 * (read + written), 3 * flops)


@settings(max_examples=60, deadline=None)
@given(
    features=st.integers(1, 4096),
    cut=st.integers(1, 4096),
    count=st.integers(1, 100_000),
    slots=st.integers(0, 64),
    backend=st.sampled_from(["torch", "triton"]),
    blueprint=st.sampled_from(["affine", "lowrank", "bottleneck"]),
    blend=st.sampled_from(["residual", "lerp", "multiply", "gate"]),
    dtype=st.sampled_from(["float32", "bfloat16", "float64"]),
)
def test_symbolic_and_plain_rows_agree(
    features: int, cut: int, count: int, slots: int, backend: str, blueprint: str, blend: str, dtype: str
) -> None:
    shape = SiteShape(
        features=features,
        seeds=min(cut, features),
        slots=slots,
        blueprint=blueprint,
        blend=blend,
        dtype=dtype,
        tap_features=features,
    )
    symbolic = cost_site.amortised(shape, rows, backend, Fraction(1, 10)).at(count)  # type: ignore[arg-type]
    plain = cost_site.amortised(shape, count, backend, Fraction(1, 10))  # type: ignore[arg-type]
    assert symbolic == plain
    assert symbolic.bytes > 0


def test_expressions_read_back_as_the_numbers() -> None:
    texts = cost.expressions(C64, LINEAR, "triton")
    assert texts["host_flops"] == "33558528*rows"  # 2 * 4096**2 + 4096 a row
    for name, text in texts.items():
        value = sympy.sympify(text, locals={"rows": rows}).subs({rows: 384})
        assert value.is_Rational, name
    due = sympy.sympify(texts["dormant_bytes"], locals={"rows": rows}).subs({rows: 384})
    assert due == cost_site.telemetry(C64, 384, "triton").bytes


@pytest.mark.parametrize("seeds", [1, 3, 64])
def test_blueprint_flops_and_slot_bytes_come_from_the_blueprint(seeds: int) -> None:
    shape = SiteShape(features=192, seeds=seeds, rank=8)
    chunk = 192 // seeds
    assert cost.slot_bytes(shape, ("bottleneck",)) == 4 * (2 * chunk * 8 + 8 + chunk)
    both = cost.slot_bytes(shape, ("bottleneck", "affine"), training_state=True)
    assert both == 16 * (2 * chunk * 8 + 8 + chunk + 2 * chunk) + 8


class TestDivides:
    n = sympy.Symbol("n", integer=True, positive=True)

    def test_a_symbolic_multiple_is_proved(self) -> None:
        assert divides(16, 64 * self.n)
        assert divides(8, 64 * self.n + 16)
        assert divides(self.n, self.n * rows)

    def test_what_is_not_known_is_not_claimed(self) -> None:
        assert not divides(8, rows)
        assert not divides(128, 64 * self.n)
        assert not divides(16, 64 * self.n + 8)
        assert not divides(7, 16)

    @given(st.integers(1, 512), st.integers(0, 100_000))
    @settings(max_examples=50, deadline=None)
    def test_numbers_are_decided_both_ways(self, divisor: int, value: int) -> None:
        assert divides(divisor, value) == (value % divisor == 0)


# rows, features, seeds, us measured on an H200 in bf16 with bottleneck at rank 16: one telemetry pass with
# its final reduction, active seeds alone at 10 % and at 100 %, the host's Linear.
H200_TABLE = [
    (4096, 4096, 64, 12.1, 4.1, 21.2, 173),
    (4096, 4096, 1024, 12.5, 15.5, 38.9, 173),
    (16384, 4096, 256, 35.3, 23.4, 79.5, 682),
    (8192, 8192, 4096, 37.5, 73.5, 260.7, 1345),
]


def test_h200_predictions_are_near_the_measurements() -> None:
    ratios = []
    for count, features, seeds, due, tenth, whole, linear in H200_TABLE:
        shape = SiteShape(features=features, seeds=seeds, dtype="bfloat16", owns_input=True)
        layer = HostLayer(
            kind="linear", features=features, in_features=features, weights=features**2, dtype="bfloat16"
        )
        said = [
            cost_site.telemetry(shape, count, "triton"),
            cost_site.active(shape, count, "triton", Fraction(1, 10)),
            cost_site.active(shape, count, "triton", Fraction(1)),
            cost_site.host_forward(layer, count),
        ]
        for work, measured in zip(said, (due, tenth, whole, linear), strict=True):
            ratios.append(cost.roofline(work, devices.H200, "bfloat16").device_us / measured)
    assert 0.85 < median(ratios) < 1.15
    assert min(ratios) > 0.5
    assert max(ratios) < 1.5


def test_copy_and_read_on_the_h200_follow_one_line() -> None:
    size = 4096 * 4096 * 2
    for work, measured in (
        (Cost(read=size), 10.1 - 1.8),
        (Cost(size, size), 17.4 - 1.8),
        (Cost(4 * size), 32.1 - 1.8),
    ):
        assert cost.roofline(work, devices.H200, "bfloat16").device_us == pytest.approx(measured, rel=0.1)


def test_dormant_overhead_of_a_wide_linear_is_below_half_a_percent() -> None:
    found = cost.predict(C64, LINEAR, devices.H200, 4096, "triton")
    assert found.overhead < 0.005
    assert found.due_us == pytest.approx(12.1, rel=0.2)
    assert found.dormant_us < found.due_us < found.active10_us + found.due_us
    assert found.host_us == pytest.approx(3 * found.host_forward_us)


def test_on_a_cpu_host_and_device_time_add_up_and_on_a_gpu_they_overlap() -> None:
    time = cost.Time(10.0, 4.0)
    assert time.total_us(devices.CPU) == 14.0
    assert time.total_us(devices.H200) == 10.0


def test_rarer_telemetry_is_never_dearer() -> None:
    last = float("inf")
    for every in (1, 2, 16, 100):
        shape = SiteShape(features=512, seeds=32, telemetry_every=every)
        layer = HostLayer(kind="linear", features=512, in_features=512, weights=512**2)
        now = cost.overhead(shape, layer, devices.CPU, 128, "torch")
        assert now < last
        last = now


def test_a_sample_that_takes_fewer_rows_is_cheaper_and_costs_no_less_a_row() -> None:
    found = {}
    for values in (0, 1 << 30, 1 << 23, 1 << 20):
        shape = SiteShape(features=4096, seeds=64, telemetry_values=values)
        layer = HostLayer(kind="linear", features=4096, in_features=4096, weights=4096**2)
        found[values] = cost.predict(shape, layer, devices.H200, 16384, "triton")
    assert found[0] == found[1 << 30]
    assert found[1 << 20].overhead < found[1 << 23].overhead < found[0].overhead
    assert found[1 << 23].bytes_per_row == pytest.approx(found[0].bytes_per_row, rel=0.05)


def test_numbers_are_plain_and_short() -> None:
    numbers = cost.predict(C64, LINEAR, devices.H200, 4096, "triton").numbers()
    assert all(type(value) is float for value in numbers.values())
    assert numbers["rows"] == 4096.0


def test_auto_backend_is_triton_on_gpus_only() -> None:
    assert cost.backend_for("auto", devices.MI300X) == "triton"
    assert cost.backend_for("auto", devices.CPU) == "torch"
    assert cost.backend_for("torch", devices.H200) == "torch"


def test_an_unknown_dtype_is_named() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown dtype 'float31'\. Did you mean 'float32'"):
        cost_site.telemetry(SiteShape(features=8, seeds=1, dtype="float31"), 1, "triton")


def test_numbers_need_no_sympy() -> None:
    code = (
        "import sys, morphc.passes.chunking as c, morphc.kernels.cost as k, morphc.kernels.devices as d\n"
        "before = 'sympy' in sys.modules\n"
        "k.predict(k.SiteShape(features=64, seeds=4), "
        "k.HostLayer(kind='linear', features=64, in_features=64, weights=4096), d.CPU, 8, 'torch')\n"
        "print(before, 'sympy' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False", "False"]
