"""Which layers a run executes: measured with forward hooks and a torch-function mode, without morphc.

A candidate is
1. a module `nn.Linear`, `nn.Conv*` (subclasses too) whose forward ran;
2. a look-alike: a module of a class from outside torch.nn called `*Linear` or `*Conv1D`, without a
   candidate below it and with one matrix of its own at most (a quantized one has none), whose forward ran;
3. a parameter, or a view of one, that is an operand of `linear`, `conv*`, `matmul`, `mm`, `addmm`, `bmm`,
   `baddbmm` or `einsum` outside of such a module. So are the weights of `nn.MultiheadAttention`, which
   bypasses `out_proj`: a weight is named after its module if that is a Linear.

Grouped matrix products over a stack of experts' weights (`torch._grouped_mm`) are counted apart.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .registry import Entry
from .runs import run, tensor_names

CONVOLUTIONS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
PRODUCTS = re.compile(r"linear|conv(_transpose)?[123]d|(__r?)?matmul(__)?|mm|bmm|add(b?)mm|baddbmm|einsum")
GROUPED = re.compile(r"_?grouped_mm|_scaled_grouped_mm")


@dataclass(frozen=True)
class Candidate:
    """One executed layer. `names` are all the paths it goes by; not `counted`: counted apart.

    `in_first_mode`: it ran in the first of the entry's modes (layer drop may skip it there).
    """

    path: str
    kind: str
    features: int
    names: frozenset[str]
    counted: bool = True
    in_first_mode: bool = True


def looks_like_a_layer(module: nn.Module) -> bool:
    """Case 1 and, by its name alone, case 2."""
    if isinstance(module, (nn.Linear, *CONVOLUTIONS)):
        return True
    cls = type(module)
    outside = not cls.__module__.startswith("torch.nn.")
    return outside and re.fullmatch(r".*(Linear|Conv1D)", cls.__name__) is not None


def is_candidate(module: nn.Module) -> bool:
    """Cases 1 and 2: a wrapper around another candidate (an adapter) is none itself."""
    if not looks_like_a_layer(module):
        return False
    if any(looks_like_a_layer(child) for child in module.modules() if child is not module):
        return False
    return matrices(module) < 2


def matrices(module: nn.Module) -> int:
    """How many parameters of its own have two axes or more."""
    return sum(parameter.ndim > 1 for parameter in module._parameters.values() if parameter is not None)


def single_matrix(module: nn.Module) -> bool:
    """A layer of somebody's own (a router, a `Dense`): a site on it is a site on its one matrix."""
    return not type(module).__module__.startswith("torch.nn.") and matrices(module) == 1


def width(module: nn.Module) -> int:
    """Features that the layer puts out."""
    for name in ("out_features", "out_channels", "nf"):
        if isinstance(getattr(module, name, None), int):
            return int(getattr(module, name))
    weight = getattr(module, "weight", None)
    return int(weight.shape[0]) if isinstance(weight, Tensor) else 0


class ParameterUse(TorchFunctionMode):
    """Notes each product that has a parameter as operand, outside of candidate modules."""

    def __init__(self, parameters: dict[int, str]) -> None:
        self.parameters = parameters
        self.depth = 0
        self.used: dict[str, tuple[str, int, bool]] = {}
        self.unregistered: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "").split(".")[0]
        result = func(*args, **(kwargs or {}))
        grouped = GROUPED.fullmatch(name) is not None
        if self.depth == 0 and (grouped or PRODUCTS.fullmatch(name)):
            for operand in weights(name, args, kwargs or {}):
                self.note(name, operand, result, not grouped)
        return result

    def note(self, function: str, operand: Tensor, result: Any, counted: bool) -> None:
        """Remember the parameter behind an operand."""
        base = operand if isinstance(operand, nn.Parameter) else operand._base
        if not isinstance(base, nn.Parameter):
            return
        path = self.parameters.get(id(base))
        if path is None:
            self.unregistered.add(function)
            return
        axis = 1 if function.startswith("conv") else -1
        features = int(result.shape[axis]) if isinstance(result, Tensor) and result.dim() else 0
        self.used.setdefault(path, (function, features, counted))


def weights(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The operands of a product that are multiplied (a bias is not)."""
    operands = [*args, *kwargs.values()]
    if name in ("linear", "addmm", "baddbmm", "addbmm") or name.startswith("conv"):
        given = kwargs.get("weight", kwargs.get("mat2", args[1] if len(args) > 1 else None))
        operands = [given] if name == "linear" or name.startswith("conv") else operands[1:3]
    if name == "einsum":
        operands = [
            tensor for item in operands for tensor in (item if isinstance(item, list | tuple) else [item])
        ]
    return [operand for operand in operands if isinstance(operand, Tensor)]


@contextmanager
def transparent_functional() -> Iterator[None]:
    """Let the mode see inside the Python functions of torch.nn.functional, not the call of them."""
    with ExitStack() as stack:
        for name in ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic"):
            stack.enter_context(mock.patch.object(torch.nn.functional, name, return_value=False))
        yield


def aliases(host: nn.Module) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
    """All names of every module, and of every parameter, by id."""
    modules: dict[int, list[str]] = {}
    parameters: dict[int, list[str]] = {}
    for name, module in host.named_modules(remove_duplicate=False):
        modules.setdefault(id(module), []).append(name)
        for key, parameter in module._parameters.items():
            if parameter is not None:
                parameters.setdefault(id(parameter), []).append(f"{name}.{key}" if name else key)
    return modules, parameters


def executed(entry: Entry) -> tuple[list[Candidate], list[str]]:
    """Candidates that run with the example input, in train or eval mode; and parameters nobody registered."""
    host = entry.build()
    modules, parameters = aliases(host)
    first = {key: names[0] for key, names in parameters.items()}
    mode = ParameterUse(first)
    ran: dict[int, nn.Module] = {}
    first_ran: set[int] | None = None
    first_used: set[str] = set()

    def enter(*_: Any) -> None:
        mode.depth += 1

    def leave(module: nn.Module, *_: Any) -> None:
        mode.depth -= 1
        ran[id(module)] = module

    def fail() -> None:
        mode.depth -= 1

    for module in list(host.modules()):
        if is_candidate(module):
            watch(module, enter, leave, fail)
    with transparent_functional():
        for number, flag in enumerate(entry.modes):
            if number == 1:
                first_ran, first_used = set(ran), set(mode.used)
            if flag != "as_built":
                host.train(flag == "train")
            mode.depth = 0
            with mode:
                run(host, entry, entry.batch, entry.length, tensor_names(host), backward=False)
    found = {
        modules[key][0]: Candidate(
            modules[key][0],
            type(module).__name__,
            width(module),
            frozenset(modules[key]),
            in_first_mode=first_ran is None or key in first_ran,
        )
        for key, module in ran.items()
    }
    by_name = {name: names for names in parameters.values() for name in names}
    for path, (function, features, counted) in mode.used.items():
        early = first_ran is None or path in first_used
        owners = [host.get_submodule(name.rpartition(".")[0]) for name in by_name[path]]
        linear = next((owner for owner in owners if is_candidate(owner)), None)
        names = set(by_name[path])
        for owner in owners:
            if single_matrix(owner):
                names |= set(modules[id(owner)])
        if linear is not None:
            names |= set(modules[id(linear)])
            path = modules[id(linear)][0]
        kind = type(linear).__name__ + " bypassed" if linear is not None else function
        found.setdefault(path, Candidate(path, kind, features, frozenset(names), counted, early))
    return list(found.values()), sorted(mode.unregistered)


def watch(module: nn.Module, enter: Any, leave: Any, fail: Any) -> None:
    """Bracket the module's forward, called or not; a ScriptModule takes hooks only."""
    if isinstance(module, torch.jit.ScriptModule):
        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)
        return
    inner = module.forward

    @functools.wraps(inner)
    def forward(*args: Any, **kwargs: Any) -> Any:
        enter()
        try:
            result = inner(*args, **kwargs)
        except BaseException:
            fail()
            raise
        leave(module)
        return result

    module.__dict__["forward"] = forward
