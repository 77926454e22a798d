"""What `morphc compile --target` and `--require-cached` do and say."""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TextIO

import msgspec
import torch

from morphc.ahead import Ahead, compile_kernels, look, missing, target_of_this_machine
from morphc.cli.cachetext import counted
from morphc.cli.progress import ProgressBar
from morphc.cli.targets import TARGETS
from morphc.compiler import Compiled
from morphc.errors import ConfigError
from morphc.kernels.backend import unavailable
from morphc.kernels.cache import bundle
from morphc.kernels.cache.counters import Count
from morphc.kernels.cache.prune import told_size
from morphc.output import OutputFolder
from morphc.plantuned import with_tuned
from morphc.tuneup import Tuning, tasks_of, tune_sites

BUNDLE = "kernels.tar.gz"
_MOST_REASONS = 8


@dataclass
class Kernels:
    """Of one compile. lacking: target -> (kernels in all, those not in the cache with why), where only looked up.

    here: target -> what the cache has for the GPU that the model lies on.
    """

    made: list[Ahead] = field(default_factory=list)
    here: dict[str, Count] = field(default_factory=dict)
    lacking: dict[str, tuple[int, Mapping[str, tuple[str, ...]]]] = field(default_factory=dict)
    written: str = ""

    def write(self, folder: OutputFolder) -> None:
        """One bundle for all targets, and what is in it."""
        if not self.made:
            return
        names = [kernel.folder for one in self.made for kernel in one.kernels if not kernel.failed]
        keys = {kernel.key for one in self.made for kernel in one.kernels if not kernel.failed}
        index, data = bundle.pack(self.made[0].root_path, names, only=keys)
        folder.write(BUNDLE, data)
        folder.write("kernels.json", msgspec.json.format(msgspec.json.encode(self.json()), indent=2))
        self.written = f"{folder.target / BUNDLE}: {counted(index.files)}, {told_size(len(data))}"

    def json(self) -> list[dict[str, Any]]:
        """For --json, and for kernels.json."""
        told = [msgspec.to_builtins(one) for one in self.made]
        for one in told:
            del one["root"]
        looked = [
            {"target": target, "kernels": total, "missing": {name: list(why) for name, why in found.items()}}
            for target, (total, found) in self.lacking.items()
        ]
        known = [
            {
                "target": target,
                "hits": count.hits,
                "saved": count.saved,
                "misses": msgspec.to_builtins(count.misses),
            }
            for target, count in self.here.items()
        ]
        return told + looked + known

    def present(self, out: TextIO) -> int:
        """Say it; the exit status: 1 where a kernel is missing, or can't be compiled."""
        for one in self.made:
            print("\n".join(["", *_table(one)]), file=out)
        for target, (total, found) in self.lacking.items():
            print("\n".join(["", *_lookup(target, total, found)]), file=out)
        for target, count in self.here.items():
            print("\n".join(["", *_known(target, count)]), file=out)
        if self.written:
            print(f"\nbundle {self.written}", file=out)
        failed = any(kernel.failed for one in self.made for kernel in one.kernels)
        return 1 if failed or any(found for _, found in self.lacking.values()) else 0


def for_targets(
    program: Compiled,
    targets: Sequence[str],
    require_cached: bool,
    progress: Callable[[str, int, int], None],
) -> Kernels:
    """Compile the model's kernels for the targets, or with `require_cached` only look them up.

    Without either, what the cache has for the GPU that the model lies on is said.
    """
    kernels = Kernels()
    plan = program.report.plan
    if require_cached:
        for target in targets or (target_of_this_machine(),):
            kernels.lacking[target] = missing(program.model, plan, target)
    else:
        kernels.made = [compile_kernels(program.model, plan, target, progress) for target in targets]
        if not targets and on_gpu(program.model) and not unavailable(torch.device("cuda")):
            here = target_of_this_machine()
            if here in TARGETS:
                kernels.here[here] = look(program.model, plan, here)
    return kernels


def on_gpu(model: torch.nn.Module) -> bool:
    """Whether some of it lies on one."""
    return any(parameter.is_cuda for parameter in model.parameters())


def check_gpu() -> None:
    """Raises ConfigError where there is no GPU to tune for."""
    if reason := unavailable(torch.device("cuda")):
        raise ConfigError(f"--tune times kernels on a GPU, and there is none: {reason}")


def tune_here(program: Compiled, mode: str) -> Tuning:
    """Time the model's kernels on this machine's GPU; the report's plan has the answers then."""
    plan = program.report.plan
    try:
        with ProgressBar(remaining=True) as bar:
            found = tune_sites(tasks_of(program.model, plan), mode, "cuda", bar)
    except KeyboardInterrupt:
        print("morphc: what was timed is kept; the same command goes on from there", file=sys.stderr)
        raise
    program.report = dataclasses.replace(program.report, plan=with_tuned(plan))
    return found


def _table(made: Ahead) -> Iterator[str]:
    count = Count(made.hits, list(made.misses), made.compiled, made.saved, made.spent)
    yield f"kernels for {made.target}: {count}"
    yield from _reasons(Counter("; ".join(miss.reasons) for miss in made.misses))
    wide = max((len(f"{one.name}.{one.function}") for one in made.kernels), default=0)
    yield f"  {'kernel':{wide}}  {'regs':>4} {'spills':>6} {'shared':>9} {'size':>9}  layers"
    for one in made.kernels:
        layers = (one.layers[0] or "(root)") if one.layers else "every model"
        more = f" +{len(one.layers) - 1}" if len(one.layers) > 1 else ""
        problem = f"  {one.problem}" if one.problem else ""
        yield (
            f"  {f'{one.name}.{one.function}':{wide}}  {one.registers:4} {one.spills:6} {told_size(one.shared):>9} "
            f"{told_size(one.size):>9}  {layers}{more}{problem}"
        )


def _known(target: str, count: Count) -> Iterator[str]:
    later = "; the misses are compiled when they are first launched" if count.misses else ""
    yield f"kernels for {target}: {count}{later}"
    yield from _reasons(Counter("; ".join(miss.reasons) for miss in count.misses))


def _reasons(found: Counter[str]) -> Iterator[str]:
    for reason, times in found.most_common(_MOST_REASONS):
        yield f"  {times} missed: {reason}"
    if len(found) > _MOST_REASONS:
        yield f"  and {sum(found.values()) - sum(n for _, n in found.most_common(_MOST_REASONS))} for other reasons"


def _lookup(target: str, total: int, found: Mapping[str, tuple[str, ...]]) -> Iterator[str]:
    if not found:
        yield f"kernels for {target}: all {total} are in the cache; nothing will be compiled"
        return
    yield f"kernels for {target}: {len(found)} of {total} are not in the cache"
    for name, reasons in found.items():
        yield f"  {name}: {'; '.join(reasons)}"
    yield "  import a bundle that has them (morphc cache import), or compile without --require-cached"
