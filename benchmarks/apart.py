"""Parts of the kernels' benchmark that belong to no shape of the table."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch
from bench import ALPHA, Buffers, Entry, Plan, Setting, Watched
from figures import CASES, TINY, Case, Goal, Record
from timing import Variant, latency
from torch import nn
from torch.nn import functional

import morphc
from morphc.kernels import lifecycle
from morphc.kernels.reference.lifecycle import policy
from morphc.lifecycle import Lifecycle
from morphc.runtime.site import SeedSite
from morphc.runtime.state import SeedState

SEEDS = 1_000_000


def fused(setting: Setting) -> Plan:
    """Activation and telemetry in one pass, against the activation alone."""
    entries: list[Entry] = []
    goals: dict[str, list[Goal]] = {}
    cases = (TINY["t8"],) if setting.tiny else (CASES["c64"], CASES["c16"], CASES["c4"])
    written = {}
    for case in cases:
        shape = (case.rows, case.features)
        if shape not in written:
            written[shape] = Buffers(setting, *shape), Buffers(setting, *shape, fill=False)
        x, y = written[shape]
        moved = 2.0 * case.rows * case.features * setting.dtype.itemsize
        for name, alone in ALONE.items():
            both = Watched(case, setting, writes=name)
            plain = f"{name} alone {case.rows}"
            if not any(entry.variant.name == plain for entry in entries):
                call = functools.partial(_alone, alone, x, y)
                entries.append(Entry("fused", Variant(plain, call, calls=x.count), moved))
            what = f"{name} and telemetry {case.title}"
            call = functools.partial(_both, both, x, y)
            entries.append(Entry("fused", Variant(what, call, calls=x.count), moved))
            goals[what] = [Goal(plain, 1.06)]
    return Plan(entries, goals=goals)


def _gelu_tanh(x: torch.Tensor, y: torch.Tensor) -> None:
    torch.ops.aten.gelu.out(x, approximate="tanh", out=y)


def _gelu(x: torch.Tensor, y: torch.Tensor) -> None:
    torch.ops.aten.gelu.out(x, out=y)


def _relu(x: torch.Tensor, y: torch.Tensor) -> None:
    torch.ops.aten.relu.out(x, out=y)


def _silu(x: torch.Tensor, y: torch.Tensor) -> None:
    torch.ops.aten.silu.out(x, out=y)


ALONE: Mapping[str, Callable[[torch.Tensor, torch.Tensor], None]] = {
    "gelu_tanh": _gelu_tanh,
    "gelu": _gelu,
    "relu": _relu,
    "silu": _silu,
}


def _alone(function: Callable[[torch.Tensor, torch.Tensor], None], x: Buffers, y: Buffers, i: int) -> None:
    function(x[i], y[i])


def _both(watched: Watched, x: Buffers, y: Buffers, i: int) -> None:
    watched.sample(x[i], y[i])


def flat(setting: Setting) -> Plan:
    """A dormant site of 4096 x 4096 with 64 to 4096 seeds."""
    rows, features = (16, 64) if setting.tiny else (4096, 4096)
    x = Buffers(setting, rows, features)
    counts = (4, 8, 64) if setting.tiny else (64, 128, 256, 512, 1024, 2048, 4096)
    entries, goals = [], {}
    for seeds in counts:
        watched = Watched(Case("flat", rows, features, seeds), setting)

        def sample(i: int, watched: Watched = watched) -> None:
            watched.sample(x[i])

        moved = float(rows * features * setting.dtype.itemsize)
        entries.append(Entry("flat", Variant(f"dormant {seeds}", sample, calls=x.count), moved))
        goals[f"dormant {seeds}"] = [Goal(f"dormant {counts[0]}", 1.1)]
    return Plan(entries, goals=goals)


def insitu(setting: Setting) -> Plan:
    """16 times a Linear, 4096 to 4096 features, 4096 rows; then with telemetry behind one of them, and behind all."""
    rows, features, seeds = (16, 64, 8) if setting.tiny else (4096, 4096, 1024)
    device, dtype = setting.device, setting.dtype
    x = Buffers(setting, rows, features)
    weight = torch.randn(features, features, device=device).to(dtype) * features**-0.5
    bias = torch.zeros(features, device=device, dtype=dtype)
    watched = Watched(Case("insitu", rows, features, seeds), setting)

    def steps(i: int, every: int) -> None:
        for step in range(16):
            y = functional.linear(x[i + step], weight, bias)
            if every and step % every == 0:
                watched.sample(y)

    def variant(name: str, every: int) -> Entry:
        return Entry("insitu", Variant(name, lambda i: steps(i, every), calls=1))

    found = [
        variant("16 linears", 0),
        variant("telemetry every 16th", 16),
        variant("telemetry every time", 1),
    ]
    return Plan(found, goals={"telemetry every 16th": [Goal("16 linears", 1.005)]})


def seeds_of_a_device(setting: Setting) -> Plan:
    """One tick, and a report, of a million seeds in all eleven states."""
    count = 1000 if setting.tiny else SEEDS
    device = setting.device
    models = [SeedState([4] * count, device=device) for _ in range(2 if setting.tiny or setting.warm else 12)]
    for model in models:
        model.lifecycle.copy_(torch.randint(0, len(Lifecycle), (count,), dtype=torch.int32, device=device))
        model.alpha.copy_(torch.rand(count, device=device))
        model.sums.copy_(torch.rand(8, count, device=device) + 1)
        model.counts.fill_(128)
    request = torch.full((count,), -1, dtype=torch.int32, device=device)
    asked = torch.rand(count, device=device) < 0.01
    request[asked] = torch.randint(0, len(Lifecycle), (count,), dtype=torch.int32, device=device)[asked]
    ticker = lifecycle.Ticker(policy(device, embargo=4))

    def tick(i: int) -> None:
        ticker.advance(models[i % len(models)])

    def requests(i: int) -> None:
        ticker.advance(models[i % len(models)], request)

    def report(i: int) -> None:
        model = models[i % len(models)]
        lifecycle.report(model.sums, model.counts, model.widths)

    return Plan(
        [
            Entry("lifecycle", Variant("tick", tick, calls=24), 16.0 * count),
            Entry("lifecycle", Variant("tick with requests", requests, calls=24), 21.0 * count),
            Entry("lifecycle", Variant("report", report, calls=24), (8 * 8 + 3 * 8 + 4 + 9 * 8.0) * count),
        ],
        goals={"tick": [Goal("", 20)], "tick with requests": [Goal("", 20)]},
    )


def host(setting: Setting) -> Plan:
    """What a site costs Python, through the modules of a compiled model: 128 x 2048, 1024 seeds, 10 % active."""
    rows, features, seeds = (8, 32, 8) if setting.tiny else (128, 2048, 1024)
    device, dtype = setting.device, setting.dtype
    sites = many_sites(2 if setting.tiny else 16, features, seeds, device, dtype)
    idle = many_sites(1, features, seeds, device, dtype, active=False)[0]
    values = [torch.randn(rows, features, device=device, dtype=dtype) for _ in range(16)]
    leaf = values[0].clone().requires_grad_()

    def all_sites(i: int) -> None:
        with torch.no_grad():
            for site in sites:
                site.join(values[i % 16], None, True)

    def free(i: int) -> torch.Tensor:
        return values[i % 16]

    def grown(i: int) -> torch.Tensor:
        return leaf.clone()

    ways = (
        ("without grad", sites[0], False, False, free, HOST_GOALS[0]),
        ("without grad, in training", sites[0], True, False, free, HOST_GOALS[0]),
        ("with grad", sites[0], True, True, grown, HOST_GOALS[1]),
        ("dormant, in training", idle, True, True, grown, {}),
    )

    def extra() -> list[Record]:
        counts = {"samples": 3, "warm": 1} if setting.tiny else {}
        found = []
        for what, site, training, graded, prepare, bounds in ways:
            site.train(training)
            with torch.set_grad_enabled(graded):
                times = latency(functools.partial(through, site), device, prepare, **counts)
            note = " ".join(f"{name} {times[name]:.1f} ({bounds.get(name, '-')})" for name in MEASURED)
            ok = all(times[name] <= bound for name, bound in bounds.items())
            found.append({"what": what, "note": note, "ok": ok, **times})
        return found

    entry = Entry("host", Variant(f"graph of {len(sites)} sites", all_sites, calls=1))
    return Plan([entry], goals={entry.variant.name: [Goal("", 7.0 * len(sites))]}, extra=extra)


def through(site: SeedSite, y: torch.Tensor) -> torch.Tensor:
    """What `SiteForward` does behind the layer's own forward."""
    measured = site.training and site.watch(y)
    if not site.mode:
        return y
    joined = site.join_ready(y, True, measured)
    return site.join(y, None, True, measured) if joined is None else joined


MEASURED = ("issue_p50", "issue_p99", "sync_p50", "sync_p99")
HOST_GOALS = (
    {"issue_p50": 10, "issue_p99": 20, "sync_p99": 40},
    {"issue_p50": 25, "issue_p99": 50, "sync_p99": 75},
)


class Layers(nn.Module):
    """Some layers side by side."""

    def __init__(self, count: int, features: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, features) for _ in range(count))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([layer(x) for layer in self.layers]).sum(0)


def many_sites(
    count: int, features: int, seeds: int, device: torch.device, dtype: torch.dtype, *, active: bool = True
) -> list[SeedSite]:
    """The sites of a compiled model; with `active` a tenth of the seeds of each is fine-tuned."""
    host = Layers(count, features).to(device, dtype)
    config = morphc.Config(seeds_per_layer=seeds, slots=max(4, seeds // 10 + 1), rank=16, backend="triton")
    example = torch.randn(4, 8, device=device, dtype=dtype)
    model = morphc.compile(host, example_inputs=(example,), config=config, verify=False)
    view = morphc.seeds(model)
    for path in view.sites if active else ():
        view[path].assign(list(range(0, seeds, 10)), Lifecycle.FINE_TUNING, alpha=ALPHA)
    return [module for module in model.modules() if isinstance(module, SeedSite)]


PARTS: Mapping[str, Callable[[Setting], Plan]] = {
    "fused": fused,
    "flat": flat,
    "insitu": insitu,
    "lifecycle": seeds_of_a_device,
    "host": host,
}
BY_DTYPE = ("fused", "flat", "insitu")
"""Parts that are done in every dtype."""
