"""Verify: the compiled model against its host, bit for bit, and the way down where they differ.

Both run on the example and on a doubled batch, in train and in eval mode, under the same RNG seed; outputs and the
gradients of every parameter and floating-point input are compared by their bit patterns. Both are put back as
they were: buffers, attributes, `.grad`, RNG, flags; users' hooks don't see these runs.

When they differ: the host is run again. If it differs from itself it is nondeterministic, which is reported and
no reason to demote. Otherwise the seeds' state is hidden from the root's children, then graphs stop running in
place of forwards (one region at a time, then all), then functional layers lose their sites, then every layer
does: never a wrong answer.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils._pytree import tree_map

from morphc.errors import VerificationError
from morphc.passes.isolation import KeptParameters, held_by, is_users_object, private_copy
from morphc.passes.lower import Lower
from morphc.passes.manager import register_pass
from morphc.passes.program import Program
from morphc.passes.quiet import isolated
from morphc.passes.reach import bypassed, calls_of_the_host, own_modules, reached, some
from morphc.passes.recorder import tensor_leaves
from morphc.passes.sources import describe_error
from morphc.runtime.store import store_of

_REPEATS = 8
_INT_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@register_pass
@dataclass(frozen=True)
class Verify:
    """Compare, and demote what differs. `strict=true` raises instead of demoting."""

    name: ClassVar[str] = "verify"
    strict: bool = False

    def apply(self, program: Program) -> None:
        if program.model is None or program.args is None:
            return
        runner = _Runner(program)
        difference = runner.first_difference()
        program.verification = runner.notes
        if not difference:
            _warn_of_bypassed(program, runner)
            return
        if runner.host_differs_from_itself():
            program.verification.append(
                f"the host differs from itself ({difference}): it is nondeterministic, nothing was demoted"
            )
            return
        if self.strict:
            raise VerificationError(f"the compiled model differs from its host: {difference}")
        self._demote(program, difference)

    def _demote(self, program: Program, difference: str) -> None:
        program.hidden_root = True
        Lower().apply(program)
        if _equal(program):
            program.verification.append(
                f"{difference}: the root looks at its own children, so the seeds' state is kept out of them; "
                "with that, host and model are equal"
            )
            return
        program.hidden_root = False
        running = [path for path, region in program.regions.items() if region.runs]
        # Calls nested too deeply are nobody's alone.
        deep = "RecursionError" in difference
        attempts: list[tuple[list[str], list[str]]] = [] if deep else [([path], []) for path in running]
        if len(running) > 1:
            attempts.append((running, []))
        functional = [site.path for site in program.plan.sites if site.parameter]
        if functional:
            attempts.append((running, functional))
        attempts.append((running, [site.path for site in program.plan.sites]))
        for regions, sites in attempts:
            program.hidden_root = len(sites) == len(program.plan.sites)
            program.demoted = dict.fromkeys(
                regions, f"its graph did not compute what its forward does: {difference}"
            )
            program.unwatched = dict.fromkeys(
                sites, f"with it the model differed from its host: {difference}"
            )
            Lower().apply(program)
            if _equal(program):
                program.verification.append(_account(regions, sites, difference))
                return
        called = _Runner(program).calls_of_the_host()
        why = f" (it calls {own_modules(called)})" if called else ""
        raise VerificationError(
            f"the clone of {type(program.host).__name__} differs from it even without a site: {difference}{why}. "
            "Compile with verify=False to use it all the same"
        )


def _equal(program: Program) -> bool:
    runner = _Runner(program)
    if runner.first_difference():
        return False
    _warn_of_bypassed(program, runner)
    return True


def _warn_of_bypassed(program: Program, runner: _Runner) -> None:
    """Sites that no run here reached, although the recorded example did, or the host's own layer was called instead."""
    if program.recording is None or not runner.saw_the_example:
        return
    watched = [site for site in program.plan.sites if site.path not in program.unwatched]
    missed = [site for site in watched if site.path not in runner.reached]
    called = runner.calls_of_the_host() if missed else []
    paths = [s.path for s in missed if s.executed or (s.owner or s.path) in called]
    if paths:
        program.warn(bypassed(paths, called))


def _account(regions: list[str], sites: list[str], difference: str) -> str:
    one = len(regions) == 1
    what = f"region{'s' * (not one)} {some(regions)} run{'s' * one} as written" if regions else ""
    lost = f"{len(sites)} sites were left out" if sites else ""
    return f"{difference}: {' and '.join(filter(None, (what, lost)))}; with that, host and model are equal"


@contextlib.contextmanager
def silent_telemetry(model: nn.Module) -> Iterator[None]:
    """Runs made here are no samples."""
    pulses = [(site.pulse, site.pulse.every) for site in store_of(model).sites.values()]
    try:
        for pulse, _ in pulses:
            pulse.every = 0
        yield
    finally:
        for pulse, every in pulses:
            pulse.every = every


def doubled(args: Any, kwargs: Any) -> Any:
    """The same inputs with every tensor concatenated to itself along its first axis."""

    def twice(x: Any) -> Any:
        return torch.cat([x, x]) if isinstance(x, torch.Tensor) and x.ndim > 0 else x

    return tree_map(twice, (args, kwargs))


class _Runner:
    def __init__(self, program: Program) -> None:
        assert program.model is not None
        assert program.args is not None
        self.host, self.model = program.host, program.model
        self.example = (program.args, program.kwargs)
        self.parameters = KeptParameters(self.host, self.model)
        self.notes: list[str] = []
        self.failed_on: tuple[Any, bool] | None = None
        self.keep_hooks = False
        self.input_gradients = True
        self.by_backward = False
        self.reached: set[str] = set()
        self.saw_the_example = False

    def first_difference(self) -> str:
        """Where host and model differ first, in words; empty when nowhere."""
        self.notes = []
        with silent_telemetry(self.model):
            for inputs, name in ((self.example, "the example"), (None, "a doubled batch")):
                if inputs is None:
                    try:
                        inputs = doubled(*self.example)
                    except RuntimeError as error:
                        self.notes.append(f"a doubled batch can't be made: {describe_error(error)[0]}")
                        continue
                for training in (True, False):
                    mode = "train" if training else "eval"
                    found = self._compare(inputs, training, f"{name}, {mode} mode")
                    if found:
                        return found
        return ""

    def _compare(self, inputs: Any, training: bool, name: str) -> str:
        expected, error = self._attempt(self.host, inputs, training)
        # A host may refuse inputs that ask for gradients or `autograd.grad` (reentrant checkpoints do), and may need
        # its own hooks to run at all.
        for attribute, value in (("input_gradients", False), ("by_backward", True), ("keep_hooks", True)):
            if error and getattr(self, attribute) is not value:
                setattr(self, attribute, value)
                expected, error = self._attempt(self.host, inputs, training)
                if error:
                    setattr(self, attribute, not value)
        got, other = self._attempt(self.model, inputs, training)
        if error or other:
            if bool(error) == bool(other):
                self.notes.append(f"{name}: skipped, the host refuses it ({error})")
                return ""
            return f"{name}: only the {'host' if error else 'compiled model'} fails ({error or other})"
        found = _differ(expected, got)
        if found:
            self.failed_on = (inputs, training)
            return f"{name}: {found}"
        if not expected["outputs"]:
            self.notes.append(f"{name}: nothing to compare, the output holds no tensor")
            return ""
        self.notes.append(f"{name}: equal bit for bit ({_count(expected)})")
        # The example was recorded in eval mode: what it reached there has to be reached again.
        self.saw_the_example = self.saw_the_example or (inputs is self.example and not training)
        return ""

    def calls_of_the_host(self) -> list[str]:
        """The modules of the host that the model calls on the example in eval mode."""
        seen: list[str] = []
        with silent_telemetry(self.model), calls_of_the_host(self.host, self.model, seen):
            self._attempt(self.model, self.example, False)
        return seen

    def host_differs_from_itself(self) -> bool:
        """Whether the host is nondeterministic there: atomic sums on a GPU differ in one run out of several."""
        if self.failed_on is None:
            return False
        inputs, training = self.failed_on
        first, _ = self._attempt(self.host, inputs, training)
        return any(_differ(first, self._attempt(self.host, inputs, training)[0]) for _ in range(_REPEATS))

    def _attempt(self, module: nn.Module, inputs: Any, training: bool) -> tuple[dict[str, Any], str]:
        try:
            watching = contextlib.nullcontext() if module is self.host else reached(module, self.reached)
            with warnings.catch_warnings(action="ignore"), watching:
                return self._run(module, inputs, training), ""
        except Exception as error:  # the host's own code may raise anything; the caller compares who raised
            return {}, describe_error(error)[0]
        finally:
            self.parameters.restore()

    def _run(self, module: nn.Module, inputs: Any, training: bool) -> dict[str, Any]:
        parameters = {n: p for n, p in self.host.named_parameters() if p.requires_grad}
        own = dict(module.named_parameters()) if module is not self.host else parameters
        watched = {name: own.get(name, parameter) for name, parameter in parameters.items()}

        memo: dict[int, Any] = {}

        def fresh(x: Any) -> Any:
            if not isinstance(x, torch.Tensor):
                return private_copy(x, memo)
            copied = x.detach().clone()
            return copied.requires_grad_(self.input_gradients) if copied.is_floating_point() else copied

        args, kwargs = tree_map(fresh, inputs)
        leaves = [x for x in tensor_leaves((args, kwargs)) if isinstance(x, torch.Tensor) and x.requires_grad]
        with contextlib.ExitStack() as stack:
            if self.keep_hooks and module is not self.host:
                # A hook of the user's that is over the host writes there, also when the model runs.
                stack.enter_context(isolated(self.host, training=training, keep_hooks=True))
            stack.enter_context(isolated(module, training=training, keep_hooks=self.keep_hooks))
            stack.enter_context(torch.enable_grad())
            output = module(*args, **kwargs)
            values = _tensors(output)
            seeds = [x for x in values if x.requires_grad and x.is_floating_point()]
            grads: list[torch.Tensor | None] = []
            if seeds:
                targets = [*watched.values(), *leaves]
                weights = [_pattern(x) for x in seeds]
                grads = (
                    _backward(seeds, targets, weights) if self.by_backward else _grad(seeds, targets, weights)
                )
            names = [*watched, *(f"input {i}" for i in range(len(leaves)))]
            return {
                "outputs": [x.detach().clone() for x in values],
                "grads": dict(zip(names, grads, strict=False)),
                "buffers": {
                    name: b.detach().clone()
                    for name, b in module.named_buffers()
                    if ".morphc." not in f".{name}"
                },
            }


def _tensors(output: Any) -> list[torch.Tensor]:
    """Every tensor of an output: in containers, and in the attributes of objects of the user's own classes."""
    leaves = []
    for leaf in tensor_leaves(output):
        leaves += tensor_leaves(list(held_by(leaf).values())) if is_users_object(leaf) else [leaf]
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def _grad(
    seeds: list[torch.Tensor], targets: list[torch.Tensor], weights: list[torch.Tensor]
) -> list[torch.Tensor | None]:
    return list(torch.autograd.grad(seeds, targets, weights, allow_unused=True)) if targets else []


def _backward(
    seeds: list[torch.Tensor], targets: list[torch.Tensor], weights: list[torch.Tensor]
) -> list[torch.Tensor | None]:
    """The same by `backward`, with `.grad` put back. Refuses where a hook of the user's would act on it."""
    if any(getattr(target, "_post_accumulate_grad_hooks", None) for target in targets):
        raise RuntimeError(
            "a parameter has a post-accumulate-grad hook, which a backward of the compiler's would call"
        )
    before = [target.grad for target in targets]
    try:
        for target in targets:
            target.grad = None
        torch.autograd.backward(seeds, weights)
        return [target.grad for target in targets]
    finally:
        for target, grad in zip(targets, before, strict=True):
            target.grad = grad


def _pattern(x: torch.Tensor) -> torch.Tensor:
    """A fixed, asymmetric cotangent."""
    flat = torch.arange(x.numel(), device=x.device, dtype=torch.float32)
    return torch.sin(flat * 0.7 + 0.3).to(x.dtype).reshape(x.shape)


def _count(run: dict[str, Any]) -> str:
    grads = sum(1 for g in run["grads"].values() if g is not None)
    outputs = len(run["outputs"])
    return f"{outputs} output{'s' * (outputs != 1)}, {grads} gradient{'s' * (grads != 1)}"


def _differ(a: dict[str, Any], b: dict[str, Any]) -> str:
    if len(a["outputs"]) != len(b["outputs"]):
        return f"{len(a['outputs'])} and {len(b['outputs'])} output tensors"
    for index, (x, y) in enumerate(zip(a["outputs"], b["outputs"], strict=True)):
        if not same_bits(x, y):
            return f"output {index} differs{_how_much(x, y)}"
    for kind in ("grads", "buffers"):
        for name, x in a[kind].items():
            y = b[kind].get(name)
            if (x is None) != (y is None) or (x is not None and not same_bits(x, y)):
                word = "gradient of" if kind == "grads" else "buffer"
                return f"{word} {name!r} differs{_how_much(x, y)}"
    return ""


def _how_much(x: torch.Tensor | None, y: torch.Tensor | None) -> str:
    if x is None or y is None or x.shape != y.shape or not x.is_floating_point():
        return ""
    return f" by up to {(x.double() - y.double()).abs().max().item():.3g}" if x.numel() else ""


def same_bits(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Equal shape, dtype and bit patterns: -0.0 is not 0.0, and a NaN equals itself."""
    if x.shape != y.shape or x.dtype != y.dtype or x.layout != y.layout:
        return False
    if x.layout != torch.strided or x.is_quantized:
        return x is y or torch.equal(_dense(x), _dense(y))
    if x.is_complex():
        x, y = torch.view_as_real(x), torch.view_as_real(y)
    if x.is_floating_point():
        kind = _INT_OF_SIZE[x.element_size()]
        x, y = x.contiguous().view(kind), y.contiguous().view(kind)
    return torch.equal(x, y)


def _dense(x: torch.Tensor) -> torch.Tensor:
    return x.dequantize() if x.is_quantized else x.to_dense()
