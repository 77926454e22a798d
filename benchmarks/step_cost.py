"""What seeds cost in a whole training step: its time and peak memory over those of the same model without seeds.

Three hosts of own code in bfloat16, trained by fused AdamW: a GPT-2-small-sized one (12 x 768, 16 x 1024 tokens), a
stack of Llama-style blocks (4 x 4096, 4 x 2048 tokens), and a ResNet-50-sized one (channels-last, 128 x 224 x 224).
1024 seeds (or one for each channel) on every Linear and Conv. The same in eager mode and through torch.compile, beside
PEFT's LoRA (r = 16, same layers, host trained too) and the torch backend. All variants share the host's weights and its
optimizer. They take turns: a round runs every variant for some steps, a figure is the median over the rounds of a
variant's time over the plain model's in the same round, with the range of the middle half. "plain again" is the noise.
The torch backend, which takes many times as long, runs in the first round only, for fewer steps with active seeds.

    python benchmarks/step_cost.py [--seconds 250] [--hosts gpt2,llama,resnet] [--parts eager,compiled] [--tiny]
                                   [--without "torch backend"] [--out FILE]

What is known is written to FILE after every round, and the most important comes first: eager before compiled. The
time is shared out evenly among what is left. The table comes last, on standard output.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent))

from timing import machine, write_json

import morphc
from morphc.ahead import compile_kernels, target_of_this_machine

TARGETS = {
    "eager": {
        "dormant, telemetry every 16": 1.01,
        "dormant, telemetry every step": 1.03,
        "1 % active": 1.05,
        "10 % active": 1.15,
    },
    "compiled": {"dormant, telemetry every 16": 1.02, "1 % active": 1.05, "10 % active": 1.15},
}
MEMORY_TARGET = 1.02
STEPS = 16
"""A multiple of the telemetry's period: every block holds its share of samples."""


class Attention(nn.Module):
    """Causal self-attention with one projection in and one out."""

    def __init__(self, width: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.out = nn.Linear(width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, width = x.shape
        q, k, v = self.qkv(x).view(rows, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        projected: Tensor = self.out(mixed.transpose(1, 2).reshape(rows, length, width))
        return projected


class GptBlock(nn.Module):
    """LayerNorm before, GELU between."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, bias=True)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        grown: Tensor = x + self.fc2(F.gelu(self.fc1(self.norm2(x)), approximate="tanh"))
        return grown


class LlamaBlock(nn.Module):
    """RMSNorm before, a gated MLP without biases."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.attention = Attention(width, heads, bias=False)
        self.gate, self.up = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        y = self.norm2(x)
        grown: Tensor = x + self.down(F.silu(self.gate(y)) * self.up(y))
        return grown


class Gpt(nn.Module):
    """Tokens [rows, length] to the mean loss of the logits, as it is compiled together with them in practice."""

    def __init__(self, tokens: int, length: int, layers: int, width: int, heads: int) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(tokens, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(GptBlock(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, tokens, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.token(ids[:, :-1]) + self.place.weight[: ids.shape[1] - 1]
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3, 1 x 1, each with BatchNorm."""

    def __init__(self, given: int, inner: int, stride: int) -> None:
        super().__init__()
        made = 4 * inner
        self.conv1, self.norm1 = nn.Conv2d(given, inner, 1, bias=False), nn.BatchNorm2d(inner)
        self.conv2, self.norm2 = (
            nn.Conv2d(inner, inner, 3, stride, 1, bias=False),
            nn.BatchNorm2d(inner),
        )
        self.conv3, self.norm3 = nn.Conv2d(inner, made, 1, bias=False), nn.BatchNorm2d(made)
        self.act = nn.ReLU(inplace=True)
        self.shortcut = nn.Identity()
        if stride != 1 or given != made:
            self.shortcut = nn.Sequential(nn.Conv2d(given, made, 1, stride, bias=False), nn.BatchNorm2d(made))

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.norm1(self.conv1(x)))
        y = self.act(self.norm2(self.conv2(y)))
        joined: Tensor = self.act(self.norm3(self.conv3(y)) + self.shortcut(x))
        return joined


def resnet(depths: tuple[int, ...], width: int, classes: int) -> nn.Sequential:
    """ResNet-50 for depths (3, 4, 6, 3) and width 64."""
    stem = [nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
    layers: list[nn.Module] = [*stem, nn.MaxPool2d(3, 2, 1)]
    given = width
    for stage, depth in enumerate(depths):
        inner = width * 2**stage
        for block in range(depth):
            layers.append(Bottleneck(given, inner, 2 if block == 0 and stage else 1))
            given = 4 * inner
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(given, classes))


Host = tuple[nn.Module, Tensor, Callable[[Tensor], Tensor]]


def host_of(name: str, tiny: bool, device: torch.device) -> Host:
    """The model, an input, and the loss of an output."""
    torch.manual_seed(0)
    with torch.device(device):
        if name == "gpt2":
            tokens, length = (128, 16) if tiny else (50304, 1024)
            model: nn.Module = Gpt(tokens, length, *((2, 32, 2) if tiny else (12, 768, 12)))
            x = torch.randint(tokens, (2 if tiny else 16, length + 1))
            return model.bfloat16(), x, lambda loss: loss
        if name == "llama":
            width, inner, heads = (32, 64, 2) if tiny else (4096, 11008, 32)
            model = nn.Sequential(*(LlamaBlock(width, heads, inner) for _ in range(2 if tiny else 4)))
            x = torch.randn(*((2, 16) if tiny else (4, 2048)), width, dtype=torch.bfloat16)
            return model.bfloat16(), x, lambda out: out.float().square().mean()
        model = resnet((1, 1) if tiny else (3, 4, 6, 3), 8 if tiny else 64, 10 if tiny else 1000)
        x = torch.randn(2 if tiny else 128, 3, *((32, 32) if tiny else (224, 224)), dtype=torch.bfloat16)
        target = torch.randint(10, (x.shape[0],))
        model = model.bfloat16().to(memory_format=torch.channels_last)
        x = x.contiguous(memory_format=torch.channels_last)
        return model, x, lambda out: F.cross_entropy(out, target)


def with_seeds(host: nn.Module, x: Tensor, share: float, every: int, backend: str) -> nn.Module:
    """The host with seeds, a share of them in FINE_TUNING, which blends and trains."""
    widths = [
        m.out_features if isinstance(m, nn.Linear) else m.out_channels
        for m in host.modules()
        if isinstance(m, nn.Linear | nn.Conv2d)
    ]
    config = morphc.Config(seeds_per_layer=min(1024, max(widths)), telemetry_every=every, backend=backend)
    model = morphc.compile(host, (x,), config=config, verify=False).train()
    if x.is_cuda and backend != "torch":
        # All at once, in parallel processes; the first step would compile one after the other.
        compile_kernels(model, morphc.report(model).plan, target_of_this_machine())
    for site in morphc.seeds(model).sites.values():
        slots = min((bank.slots for _, bank in site.site.slots.items()), default=0)
        count = min(round(share * site.site.seeds), slots)
        if count:
            chosen = [round(n * site.site.seeds / count) for n in range(count)]
            site.assign(chosen, morphc.Lifecycle.FINE_TUNING)
            site.alpha[chosen] = 0.5
    return model


def with_lora(host: nn.Module) -> nn.Module:
    """LoRA with r = 16 on the same layers; the host is trained too."""
    from peft import LoraConfig, inject_adapter_in_model

    held = {id(p): p for p in host.parameters()}
    twin = copy.deepcopy(host, dict(held))
    names = [name for name, layer in twin.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    model: nn.Module = inject_adapter_in_model(LoraConfig(r=16, target_modules=names), twin)
    return model.requires_grad_(True).to(next(host.parameters()).dtype).train()


class Variant:
    """One way to run the step: `run` is what is called, `model` what it runs."""

    def __init__(self, name: str, model: nn.Module, host: nn.Module, compiled: bool) -> None:
        self.name, self.model = name, model
        self.run = torch.compile(model, fullgraph=True) if compiled else model
        self.seeds = morphc.seeds(model) if "active" in name else None
        known = {id(param) for param in host.parameters()}
        self.extra = [p for p in model.parameters() if id(p) not in known and p.requires_grad]
        owned = [*model.parameters(), *model.buffers()]
        theirs = {t.data_ptr() for t in (*host.parameters(), *host.buffers())}
        self.own_bytes = sum(t.nbytes for t in owned if t.data_ptr() not in theirs)
        fused = bool(self.extra) and self.extra[0].is_cuda
        self.optimizer = torch.optim.AdamW(self.extra, lr=1e-5, fused=fused) if self.extra else None
        self.seconds: list[float] = []
        self.peak_bytes = 0
        self.once = name.startswith("torch backend")
        self.steps = 4 if self.once and self.seeds is not None else STEPS


class Contest:
    """All variants of one host in one part, taking turns."""

    def __init__(self, name: str, part: str, tiny: bool, device: torch.device) -> None:
        self.device, self.compiled = device, part == "compiled"
        self.host, self.x, self.loss = host_of(name, tiny, device)
        self.host.train()
        self.optimizer = torch.optim.AdamW(self.host.parameters(), lr=1e-5, fused=device.type == "cuda")
        self.variants: list[Variant] = []
        self.failed: dict[str, str] = {}

    def prepare(self, until: float, without: str = "") -> None:
        """Make the variants, the most important first, and warm each up."""
        makers: dict[str, Callable[[], nn.Module]] = {
            "plain": lambda: self.host,
            "dormant, telemetry every 16": lambda: with_seeds(self.host, self.x, 0.0, 16, "auto"),
            "1 % active": lambda: with_seeds(self.host, self.x, 0.01, 16, "auto"),
            "10 % active": lambda: with_seeds(self.host, self.x, 0.1, 16, "auto"),
        }
        if not self.compiled:
            makers |= {
                "plain again": lambda: self.host,
                "dormant, telemetry every step": lambda: with_seeds(self.host, self.x, 0.0, 1, "auto"),
            }
        makers["LoRA r=16 (PEFT)"] = lambda: with_lora(self.host)
        makers["torch backend, dormant"] = lambda: with_seeds(self.host, self.x, 0.0, 16, "torch")
        makers["torch backend, 1 % active"] = lambda: with_seeds(self.host, self.x, 0.01, 16, "torch")
        for name, make in makers.items():
            if without and name.startswith(without):
                continue
            if time.monotonic() > until:
                self.failed[name] = "no time was left to prepare it"
                continue
            print(f"  preparing {name}", file=sys.stderr, flush=True)
            try:
                variant = Variant(name, make(), self.host, self.compiled)
                for _ in range(1 if variant.once else 3):
                    self.step(variant)
                variant.peak_bytes = self.peak(variant)
            except (RuntimeError, ImportError, ValueError, TypeError, morphc.errors.MorphcError) as error:
                self.failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
                print(f"  {name}: {self.failed[name]}", file=sys.stderr, flush=True)
                continue
            self.variants.append(variant)

    def step(self, variant: Variant, marks: list[float] | None = None) -> None:
        """One training step; `marks` gets the host's clock after the forward, the backward and the optimizers."""
        told = [].append if marks is None else marks.append
        loss = self.loss(variant.run(self.x))
        told(time.perf_counter())
        loss.backward()
        told(time.perf_counter())
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if variant.optimizer is not None:
            variant.optimizer.step()
            variant.optimizer.zero_grad(set_to_none=True)
        if variant.seeds is not None:
            variant.seeds.step_optimizer(lr=1e-5)
        told(time.perf_counter())

    def peak(self, variant: Variant) -> int:
        """Bytes at a step's highest point: what it allocates, the host and its optimizer, and the variant's own."""
        if self.device.type != "cuda":
            return 0
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        for _ in range(variant.steps):  # one of them measures
            self.step(variant)
        resident = [*self.host.parameters(), *self.host.buffers()]
        moments = [t for s in self.optimizer.state.values() for t in s.values() if isinstance(t, Tensor)]
        held = sum(t.nbytes for t in (*resident, *moments)) + variant.own_bytes
        if variant.optimizer is not None:
            held += 2 * sum(p.nbytes for p in variant.extra)
        return torch.cuda.max_memory_allocated() - before + held

    def turn(self, variant: Variant, steps: int) -> None:
        """Time `steps` steps of one variant."""
        if self.device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            begin.record()
            for _ in range(steps):
                self.step(variant)
            end.record()
            end.synchronize()
            variant.seconds.append(begin.elapsed_time(end) / 1e3 / steps)
            return
        begun = time.perf_counter()
        for _ in range(steps):
            self.step(variant)
        variant.seconds.append((time.perf_counter() - begun) / steps)

    def rows(self, part: str) -> list[dict[str, Any]]:
        """What is known so far."""
        found: list[dict[str, Any]] = [{"variant": name, "failed": why} for name, why in self.failed.items()]
        plain = next((v for v in self.variants if v.name == "plain"), None)
        if plain is None:
            return found
        for variant in self.variants:
            ratios = sorted(a / b for a, b in zip(variant.seconds, plain.seconds, strict=False))
            if not ratios:
                continue
            row: dict[str, Any] = {
                "variant": variant.name,
                "ms": statistics.median(variant.seconds) * 1e3,
                "ratio": statistics.median(ratios),
                "middle_half": [ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]],
                "rounds": len(ratios),
                "target": TARGETS[part].get(variant.name),
            }
            if plain.peak_bytes:
                row |= {"peak_gb": variant.peak_bytes / 1e9, "memory": variant.peak_bytes / plain.peak_bytes}
            if variant.seeds is not None:
                row["seeds_active"] = int((variant.seeds.lifecycle > 0).sum()) / len(variant.seeds)
            found.append(row)
        return found


def table(results: dict[str, Any]) -> str:
    """The results for people; targets in brackets."""
    lines = [f"{'host':7} {'part':9} {'variant':31} {'ms':>8} {'ratio':>7} {'middle half':>15} {'memory':>7}"]
    for key, rows in results["rows"].items():
        host, part = key.split("/")
        for row in rows:
            head = f"{host:7} {part:9} {row['variant']:31}"
            if "failed" in row:
                lines.append(f"{head} {row['failed']}")
                continue
            low, high = row["middle_half"]
            memory = f"{row['memory']:7.3f}" if "memory" in row else "      -"
            target = f"  (target {row['target']})" if row["target"] else ""
            lines.append(
                f"{head} {row['ms']:8.2f} {row['ratio']:7.3f} {low:7.3f}-{high:.3f} {memory}{target}"
            )
    return "\n".join(lines)


def main() -> None:
    """Runs what was asked for, as far as the time allows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=float, default=250.0)
    parser.add_argument("--hosts", default="gpt2,llama,resnet")
    parser.add_argument("--parts", default="eager,compiled")
    parser.add_argument("--tiny", action="store_true", help="small hosts, to try the script on a CPU")
    parser.add_argument("--without", default="", help="leave out variants whose names begin so")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch._dynamo.config.cache_size_limit = 64
    deadline = time.monotonic() + options.seconds
    contests = [(host, part) for part in options.parts.split(",") for host in options.hosts.split(",")]
    results: dict[str, Any] = {"machine": machine(device), "tiny": options.tiny, "rows": {}}
    for number, (name, part) in enumerate(contests):
        begun = time.monotonic()
        left = deadline - begun
        if left <= 0:
            results["rows"][f"{name}/{part}"] = [{"variant": "all", "failed": "no time was left"}]
            continue
        until = begun + left / (len(contests) - number)
        print(f"{name}, {part}: {until - begun:.0f} s", file=sys.stderr, flush=True)
        contest = Contest(name, part, options.tiny, device)
        contest.prepare(begun + 0.7 * (until - begun), options.without)
        steps = 2 if options.tiny else STEPS
        while contest.variants:
            before = time.monotonic()
            for variant in contest.variants:
                if not (variant.once and variant.seconds):
                    contest.turn(variant, min(steps, variant.steps))
            results["rows"][f"{name}/{part}"] = contest.rows(part)
            if options.out is not None:
                write_json(options.out, results)
            now = time.monotonic()
            if now + (now - before) > until:
                break
        del contest
        torch._dynamo.reset()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if options.out is None:
        print(json.dumps(results["rows"]), file=sys.stderr)
    else:
        write_json(options.out, results)
    print(table(results))


if __name__ == "__main__":
    main()
