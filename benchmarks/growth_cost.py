"""What growing costs a training step at about a tenth more parameters: its time over that of the plain model's step.

Plain and grown steps alternate, in one process and one thread, as in dormant_cost.py. A grown model has all its seeds
in one state: TRAINING (isolated, identity for the host), FINE_TUNING (blending, and trained on the task) or FOSSILIZED
(blending, trained no more). The rank is what makes the seeds a tenth of the host. Beside them the same parameters in
other ways: a host whose hidden layers are wider from the start, and PEFT's LoRA on every Linear, the host trained too.

    PYTHONPATH=. python benchmarks/growth_cost.py [--device cuda] [--quick] [--out benchmarks/results/growth_cost.json]

Exits with 1 where a fine-tuned or fossilized model costs more than 1.20 of the plain one.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from dormant_cost import Block, block, keep_freed_memory, mlp
from torch import Tensor, nn

import morphc
from morphc import Lifecycle

SHARE = 0.1
TARGET = 1.20
STEPS = 8
ROUNDS = 6
STATES = (Lifecycle.TRAINING, Lifecycle.FINE_TUNING, Lifecycle.FOSSILIZED)
SEEDS = 8
BLUEPRINTS = ("bottleneck", "lowrank", "widen")
WIDENED = {"mlp": ("0", "2"), "block": ("fc1", "fc2")}
WATCHED = {"mlp": ("0", "2"), "block": ("qkv", "out", "fc1", "fc2")}


def size(model: nn.Module) -> int:
    """Parameters that are the host's."""
    return sum(p.numel() for n, p in model.named_parameters() if "morphc" not in n.split("."))


def grown(
    name: str, host: nn.Module, x: Tensor, blueprint: str, state: Lifecycle
) -> tuple[nn.Module, int, int]:
    """The model, its rank, and the parameters that its seeds hold."""
    layers = (WIDENED if blueprint == "widen" else WATCHED)[name]

    def made(rank: int) -> nn.Module:
        config = morphc.Config(
            seeds_per_layer=SEEDS, slots=SEEDS, rank=rank, blueprint=blueprint, include=layers
        )
        model = morphc.compile(host, (x,), config=config, share=False, verify=False)
        for site in morphc.seeds(model).sites.values():
            if site.slots:
                site.assign(list(range(SEEDS)), state)
        return model

    def held(model: nn.Module) -> int:
        return sum(p.numel() for n, p in model.named_parameters() if ".slots." in n)

    small, more = held(made(4)), held(made(8))
    rank = max(1, round(4 + (SHARE * size(host) - small) / max(1, more - small) * 4))
    model = made(rank)
    return model, rank, held(model)


def wider(host: nn.Module) -> nn.Module:
    """The same net with hidden layers that make it a tenth larger."""
    goal = (1 + SHARE) * size(host)

    def made(hidden: int) -> nn.Module:
        if isinstance(host, Block):
            return Block(inner=hidden)
        first, second = nn.Linear(784, hidden), nn.Linear(hidden, hidden)
        return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Linear(hidden, 10))

    hidden = min(range(512, 2048, 2), key=lambda hidden: abs(size(made(hidden)) - goal))
    return made(hidden)


def lora(host: nn.Module) -> nn.Module:
    """LoRA on every Linear with a tenth of the host's parameters, the host trained as well."""
    from peft import LoraConfig, inject_adapter_in_model

    names = [name for name, layer in host.named_modules() if isinstance(layer, nn.Linear)]
    each = sum(
        layer.in_features + layer.out_features for layer in host.modules() if isinstance(layer, nn.Linear)
    )
    rank = max(1, round(SHARE * size(host) / each))
    model: nn.Module = inject_adapter_in_model(LoraConfig(r=rank, target_modules=names), copy.deepcopy(host))
    return model.requires_grad_(True)


def stepper(model: nn.Module, x: Tensor) -> Callable[[], float]:
    """One training step, the seeds' own included; returns its time in seconds."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    seeds = morphc.seeds(model) if any("morphc" in n for n, _ in model.named_modules()) else None

    def step() -> float:
        start = _now(x)
        optimizer.zero_grad(set_to_none=True)
        model(x).square().mean().backward()
        optimizer.step()
        if seeds is not None:
            seeds.step_optimizer(lr=1e-4)
        return _now(x) - start

    return step


def _now(x: Tensor) -> float:
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def ratio(host: nn.Module, model: nn.Module, x: Tensor, samples: int) -> dict[str, Any]:
    """Median and middle half of time(model) / time(host), each over `STEPS` alternating steps."""
    ratios, base = [], []
    for _ in range(ROUNDS):
        plain, other = stepper(copy.deepcopy(host), x), stepper(copy.deepcopy(model), x)
        for _ in range(4):
            plain()
            other()
        for _ in range(max(1, samples // ROUNDS)):
            pairs = [(plain(), other()) if turn % 2 else (other(), plain())[::-1] for turn in range(STEPS)]
            ratios.append(sum(pair[1] for pair in pairs) / sum(pair[0] for pair in pairs))
            base.append(sum(pair[0] for pair in pairs) / STEPS)
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {
        "ratio": round(middle, 4),
        "middle_half": [round(low, 4), round(high, 4)],
        "plain_step_ms": round(1e3 * statistics.median(base), 3),
        "samples": len(ratios),
    }


def main() -> int:
    """Run all, print the table, write the JSON; exit 1 if a target is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="a quarter of the samples")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "growth_cost.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    keep_freed_memory()
    rows: list[dict[str, Any]] = []
    for name, make, samples in (("mlp", mlp, 48), ("block", block, 24)):
        samples = samples // 4 if options.quick else samples
        host, x = make()
        host, x = host.to(options.device), x.to(options.device)
        contenders: list[tuple[str, nn.Module, float, float | None]] = [
            ("plain again", host, 0.0, None),
            ("wider from the start", wider(host).to(options.device), SHARE, None),
            ("PEFT LoRA", lora(host), SHARE, None),
        ]
        for blueprint in BLUEPRINTS:
            for state in STATES:
                model, rank, held = grown(name, host, x, blueprint, state)
                label = f"{blueprint} r{rank}, {state.name}"
                bound = None if state is Lifecycle.TRAINING else TARGET
                contenders.append((label, model, held / size(host), bound))
        for label, model, share, bound in contenders:
            row = {"model": name, "what": label, "more": round(share, 3), "target": bound}
            row |= ratio(host, model, x, samples)
            rows.append(row)
            note = "  above its target" if bound is not None and row["ratio"] > bound else ""
            low, high = row["middle_half"]
            figures = f"{row['ratio']:.3f}  [{low:.3f}, {high:.3f}]  plain {row['plain_step_ms']:.2f} ms"
            print(f"{name:6s} {label:28s} +{share:5.1%}  {figures}{note}", flush=True)
    machine = {"cpu": platform.processor() or platform.machine(), "torch": torch.__version__, "threads": 1}
    if options.device != "cpu":
        machine["device"] = torch.cuda.get_device_name(options.device)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"steps": rows, "machine": machine}, indent=1) + "\n")
    return 1 if any(row["target"] is not None and row["ratio"] > row["target"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
