"""F. Characters: a transformer whose layers grow while it learns Python's documentation, letter by letter.

The text is that of `pydoc_data.topics`; every tenth topic is held out, and no paragraph of those is trained on. The
model is a decoder of 4 blocks, 128 features and 4 heads under AdamW with a cosine schedule; its feed-forward layers
are 128 wide (narrow) or 512 (wide). A grown one starts narrow and gets a quarter of the difference at each of four
events. Reported is the loss on the held-out text at the end, in bits per character, and the training multiply-adds
over those of the wide one.

    python -m benchmarks.growth.f_chars [--seconds 270] [--workers 4]     # a GPU, if there is one
    python -m benchmarks.growth.f_chars --small --seconds 6000            # ten minutes a seed on a CPU's core
    python -m benchmarks.growth.f_chars --tiny                            # a minute on a CPU
"""

from __future__ import annotations

import argparse
import math
import queue
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import torch.multiprocessing as processes
from torch import Tensor, nn

from benchmarks.growth.common import Results
from benchmarks.growth.decoder import Decoder, grow_by_seeds, grow_by_zeros, loss_of, make_optimizer, seeded

EVENTS = (0.2, 0.32, 0.44, 0.56)


@dataclass(frozen=True)
class Setting:
    """Sizes of the model and of its training. isolated: steps that seeds train beside the host before an event."""

    features: int = 128
    blocks: int = 4
    heads: int = 4
    context: int = 128
    narrow: int = 128
    wide: int = 512
    batch: int = 64
    steps: int = 1200
    isolated: int = 60
    lr: float = 2e-3
    dropout: float = 0.1
    evaluations: int = 30

    @property
    def units(self) -> int:
        """Units that an event adds to every feed-forward layer, or to as many as it comes to."""
        return (self.wide - self.narrow) // len(EVENTS)


SMALL = Setting(64, 4, 4, 64, narrow=64, wide=256, batch=32, steps=900, isolated=60, evaluations=30)
TINY = Setting(32, 2, 2, 32, narrow=32, wide=64, batch=8, steps=150, isolated=10, evaluations=10)


@dataclass(frozen=True)
class Method:
    """wide: from the start. grow: `seeds` behind every feed-forward layer, `placed` (twice as large, and only the
    better half is grafted), `zeros` (random incoming and zero outgoing weights, no seeds) or None. equal: as many
    more steps as bring the training's multiply-adds to those of the wide one."""

    wide: bool = False
    grow: str | None = None
    equal: bool = False


METHODS = {
    "static, narrow": Method(),
    "static, wide": Method(wide=True),
    "widened by zeros, equal compute": Method(grow="zeros", equal=True),
    "morphc: grown, equal steps": Method(grow="seeds"),
    "morphc: grown, equal compute": Method(grow="seeds", equal=True),
    "morphc: grown where it helps most, equal compute": Method(grow="placed", equal=True),
}


class Cost:
    """Multiply-adds of training, per position of a batch; a backward counts twice its forward."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting

    def step(self, hidden: float, extra: int = 0) -> float:
        """One step at a feed-forward width; extra: units of seeds that train beside it."""
        own, vocabulary = self.setting, len(corpus()[2])
        block = 4 * own.features**2 + 2 * own.features * (hidden + extra) + 2 * own.context * own.features
        return 3 * (own.blocks * block + own.features * vocabulary)

    def of(self, how: Method, steps: int) -> float:
        """A whole run, with the isolated steps of seeds and the forwards that size their grafts."""
        own = self.setting
        if how.grow is None:
            return steps * self.step(own.wide if how.wide else own.narrow)
        total, events = 0.0, event_steps(steps)
        seeds = {"seeds": own.units, "placed": 2 * own.units, "zeros": 0}[how.grow]
        for step in range(steps):
            width = own.narrow + own.units * sum(step >= event for event in events)
            training = any(0 < event - step <= own.isolated for event in events)
            total += self.step(width, seeds if training else 0)
        if seeds:
            grown = [own.narrow + own.units * (at + 1) for at in range(len(events))]
            total += sum(self.step(width) / 3 * len(ALPHAS) for width in grown)
        return total

    def steps(self, how: Method) -> int:
        """How many steps a run has."""
        steps, wide = self.setting.steps, self.of(Method(wide=True), self.setting.steps)
        return round(steps * wide / self.of(how, steps)) if how.equal else steps


ALPHAS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)


def event_steps(steps: int) -> list[int]:
    """The steps before which units are added."""
    return [round(share * steps) for share in EVENTS]


@cache
def corpus() -> tuple[Tensor, Tensor, str]:
    """Characters to train on, held-out ones (both int64), and the alphabet."""
    pages = [[part.strip("\n") for part in topics[name].split("\n\n")] for name in sorted(topics)]
    held = {paragraph for page in pages[5::10] for paragraph in page}
    train, test, seen = [], [], {""}
    for at, page in enumerate(pages):
        for paragraph in page:
            if paragraph in seen:
                continue
            seen.add(paragraph)
            if at % 10 == 5:
                test.append(paragraph)
            elif paragraph not in held:
                train.append(paragraph)
    texts = ["\n\n".join(part) for part in (train, test)]
    alphabet = "".join(sorted(set("".join(texts))))
    place = {letter: at for at, letter in enumerate(alphabet)}
    first, second = (torch.tensor([place[letter] for letter in text]) for text in texts)
    return first, second, alphabet


def windows(text: Tensor, starts: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Characters and the ones that follow them, both [len(starts), length]."""
    index = starts.unsqueeze(1) + torch.arange(length + 1, device=text.device)
    found = text[index]
    return found[:, :-1], found[:, 1:]


def batches(setting: Setting, seed: int, steps: int, text: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of a seed: the same for every method, as far as its steps go."""
    draw = torch.Generator().manual_seed(7000 + seed)
    starts = torch.randint(len(text) - setting.context, (2 * setting.steps, setting.batch), generator=draw)
    for row in starts[:steps].to(text.device):
        yield windows(text, row, setting.context)


@torch.no_grad()
def held_out_bits(model: nn.Module, setting: Setting, text: Tensor) -> float:
    """Mean bits per character over the held-out text, in windows that don't overlap."""
    model.eval()
    starts = torch.arange(0, len(text) - setting.context, setting.context, device=text.device)
    total = sum(
        float(loss_of(model, *windows(text, part, setting.context))) * len(part) for part in starts.split(256)
    )
    model.train()
    return total / len(starts) / math.log(2)


def train(how: Method, setting: Setting, seed: int, device: str) -> dict[str, Any]:
    """One run: bits at the end, their curve, and its multiply-adds."""
    text, held, alphabet = (part.to(device) if isinstance(part, Tensor) else part for part in corpus())
    steps = Cost(setting).steps(how)
    width = setting.wide if how.wide else setting.narrow
    placed = how.grow == "placed"
    torch.manual_seed(seed)
    model: nn.Module = Decoder(len(alphabet), setting, width).to(device)
    optimizer = make_optimizer(model.parameters(), setting.lr)
    events, grower, curve, host, grafts = event_steps(steps), None, [], model, []
    looks = {round(steps * (at + 1) / setting.evaluations) for at in range(setting.evaluations)}
    for step, (x, y) in enumerate(batches(setting, seed, steps, text)):
        if how.grow in ("seeds", "placed") and step + setting.isolated in events:
            model, grower = seeded(host, optimizer, x, setting.units * (1 + placed))
        if step in events and grower is not None:
            most = setting.blocks // 2 if placed else None
            host, optimizer, alpha = grow_by_seeds(grower, host, x, y, ALPHAS, most)
            model, grower = host, None
            grafts.append(alpha)
        elif step in events and how.grow == "zeros":
            host, optimizer = grow_by_zeros(host, optimizer, setting.units)
            model = host
        lr = setting.lr * min(1.0, (step + 1) / 100) * (0.55 + 0.45 * math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(model, x, y)
        loss.backward()
        nn.utils.clip_grad_norm_(host.parameters(), 1.0)
        optimizer.step()
        if grower is not None:
            grower.step(loss)
        if step + 1 in looks:
            curve.append(held_out_bits(model, setting, held))
    macs = Cost(setting).of(how, steps) / Cost(setting).of(Method(True), setting.steps)
    parameters = sum(parameter.numel() for parameter in host.parameters())
    widths = [block.up.out_features for block in host.blocks]
    return {
        "value": curve[-1],
        "curve": curve,
        "macs": macs,
        "parameters": parameters,
        "alphas": grafts,
        "widths": widths,
    }


def work(seeds: Any, done: Any, setting: Setting, device: str, until: float) -> None:
    """One worker: whole seeds, as long as another one fits in the time that is left."""
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")
    longest = 0.0
    while time.time() + longest < until:
        try:
            seed = seeds.get(timeout=5)
        except queue.Empty:
            break
        start = time.time()
        for name, how in METHODS.items():
            begun = time.time()
            done.put((seed, name, {**train(how, setting, seed, device), "seconds": time.time() - begun}))
        longest = time.time() - start
    done.put(None)


def store(results: Results, found: dict[int, dict[str, dict[str, Any]]], machine: str) -> None:
    """Write every method with the seeds that all of them have finished."""
    seeds = sorted(seed for seed, runs in found.items() if len(runs) == len(METHODS))
    for name in METHODS if seeds else ():
        runs = [found[seed][name] for seed in seeds]
        results.add(
            name,
            [run["value"] for run in runs],
            sum(run["seconds"] for run in runs),
            curve=torch.tensor([run["curve"] for run in runs]).mean(0),
            macs=runs[0]["macs"],
            parameters=runs[0]["parameters"],
            alphas=[run["alphas"] for run in runs],
            widths=[run["widths"] for run in runs],
            seeds=seeds,
            machine=machine,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="a model and a run that a CPU does in a minute")
    parser.add_argument("--small", action="store_true", help="a model that a CPU trains in some minutes")
    parser.add_argument("--seeds", type=int, default=12, help="at most so many")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=270.0, help="when to stop; whole seeds count")
    parser.add_argument("--workers", type=int, default=4, help="processes that share the device")
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--out", type=Path, default=None, help="JSON to write")
    parser.set_defaults(full_seeds=1)
    arguments = parser.parse_args()
    until = time.time() + arguments.seconds
    device = "cuda" if torch.cuda.is_available() else "cpu"
    setting = TINY if arguments.tiny else SMALL if arguments.small else Setting()
    setting = replace(setting, steps=arguments.steps or setting.steps)
    name = "f_chars_small" if arguments.small else "f_chars"
    results = Results(name, arguments, steps=setting.steps, batch=setting.batch, context=setting.context)
    hardware = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    machine = f"torch {torch.__version__}, {hardware}"
    context = processes.get_context("spawn")
    seeds, done = context.Queue(), context.Queue()
    for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
        seeds.put(seed)
    told = (seeds, done, setting, device, until)
    workers = [context.Process(target=work, args=told, daemon=True) for _ in range(arguments.workers)]
    for worker in workers:
        worker.start()
    found: dict[int, dict[str, dict[str, Any]]] = {}
    running = len(workers)
    while running and time.time() < until:
        try:
            message = done.get(timeout=1.0)
        except queue.Empty:
            running = sum(worker.is_alive() for worker in workers)
            continue
        if message is None:
            running -= 1
            continue
        seed, method, run = message
        found.setdefault(seed, {})[method] = run
        print(f"seed {seed:3d}  {method:40s} {run['value']:.4f} bits  {run['seconds']:.0f} s", flush=True)
        if len(found[seed]) == len(METHODS):
            store(results, found, machine)
    for worker in workers:
        worker.terminate()


if __name__ == "__main__":
    main()
