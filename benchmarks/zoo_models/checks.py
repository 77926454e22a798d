"""Everything that is checked about one host."""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from . import compiler, extras
from .candidates import Candidate, executed
from .registry import Entry, seed_everything
from .runs import Record, kept_by, rng_state, run, tensor_names, trace
from .tree import differences, freeze

SEEDS = 64
SHOWN = 3
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Failures:
    """Collects what went wrong; an exception is one more failure, not the end."""

    def __init__(self) -> None:
        self.found: list[dict[str, str]] = []

    def add(self, check: str, message: str, where: str = "") -> None:
        """Note one failure."""
        self.found.append({"check": check, "message": message[:600], "traceback": where})

    @contextmanager
    def of(self, check: str) -> Iterator[None]:
        """A check; what it raises is noted under its name."""
        try:
            yield
        except Exception as error:  # every exception of foreign code is a result here, and is reported
            where = "".join(traceback.format_exception(error)[-6:])[-1800:]
            self.add(check, f"{type(error).__name__}: {error}", where)

    def expect(self, check: str, problems: list[str]) -> None:
        """Note the first few problems under one name."""
        if problems:
            more = f" (and {len(problems) - SHOWN} more)" if len(problems) > SHOWN else ""
            self.add(check, "; ".join(problems[:SHOWN]) + more)


def compare(expected: dict[str, Record], got: dict[str, Record]) -> list[str]:
    """One line for each run and kind of value that differs."""
    problems = []
    for label, record in expected.items():
        for kind, values in record.items():
            gaps = differences(values, got[label][kind]) if label in got else []
            if gaps:
                problems.append(f"[{label}] {kind}: {gaps[0]}" + (f" (+{len(gaps) - 1})" if gaps[1:] else ""))
    return problems


def state_of(host: nn.Module) -> dict[str, Any]:
    """All that compile has to leave alone."""
    modules = list(host.named_modules(remove_duplicate=False))
    return {
        "parameters": freeze(dict(host.named_parameters())),
        "requires_grad": {name: parameter.requires_grad for name, parameter in host.named_parameters()},
        "gradients": freeze({name: parameter.grad for name, parameter in host.named_parameters()}),
        "gradient objects": {name: id(parameter.grad) for name, parameter in host.named_parameters()},
        "buffers": freeze(dict(host.named_buffers())),
        "training flags": {name: module.training for name, module in modules},
        "modules": {name: (id(module), type(module)) for name, module in modules},
        "attributes": {name: sorted(vars(module)) for name, module in modules},
        "hooks": {
            name: [len(getattr(module, kind, ())) for kind in HOOKS]
            for name, module in modules
            if not isinstance(module, torch.jit.ScriptModule)
        },
        "tensor objects": {
            name: id(tensor) for name, tensor in [*host.named_parameters(), *host.named_buffers()]
        },
        "state_dict keys": list(host.state_dict()),
        "RNG state": freeze(rng_state()),
    }


def give_gradients(host: nn.Module) -> None:
    """Some gradient on each parameter, for compile to leave in place."""
    for parameter in host.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.full_like(parameter, 0.5)


def check(entry: Entry, plain: bool = False) -> dict[str, Any]:
    """Run all checks of one entry; `plain` compares two plain hosts, without morphc."""
    failures = Failures()
    result: dict[str, Any] = {"name": entry.name, "family": entry.family, "note": entry.note}
    started = time.perf_counter()
    with failures.of("host"):
        host = entry.build()
        names = tensor_names(host)
        result["class"] = type(host).__name__
        result["parameters"] = sum(parameter.numel() for parameter in host.parameters())
        expected = trace(host, entry, names, kept_by(host))
        again = entry.build()
        failures.expect(
            "host is deterministic", compare(expected, trace(again, entry, names, kept_by(again)))
        )
        if not any(expected[label]["gradients"] for label in expected) and result["parameters"]:
            failures.add("host", "no gradients at all")
        candidates, unregistered = executed(entry)
        result["unregistered"] = unregistered
        result["candidates_total"] = sum(candidate.counted for candidate in candidates)
        result["candidates_apart"] = sum(not candidate.counted for candidate in candidates)
        with failures.of("host extras"):
            extras.check_host(entry)
        if not plain and not failures.found:
            check_compiled(entry, expected, candidates, failures, result)
    result["failures"] = failures.found
    result["ok"] = not failures.found
    result["seconds"] = round(time.perf_counter() - started, 3)
    return result


def check_compiled(
    entry: Entry,
    expected: dict[str, Record],
    candidates: list[Candidate],
    failures: Failures,
    result: dict[str, Any],
) -> None:
    """The checks that need morphc."""
    seeds = seeds_for(candidates)
    result["seeds_per_layer"] = seeds
    for verify in (False, True):
        label = f"verify={verify}"
        with failures.of(f"compile, {label}"):
            host = entry.build()
            names = tensor_names(host)
            give_gradients(host)
            gc.collect()
            seed_everything(99)
            before = state_of(host)
            began = time.perf_counter()
            model = compiler.compiled(host, entry, seeds, verify)
            result["compile_verified_s" if verify else "compile_s"] = round(time.perf_counter() - began, 4)
            check_untouched(before, host, failures, label)
            check_surface(host, model, failures, label)
            with failures.of(f"run, {label}"):
                failures.expect(
                    f"same bits, {label}", compare(expected, trace(model, entry, names, kept_by(host)))
                )
            if verify:
                with failures.of("report"):
                    result.update(compiler.account(model, candidates))
                    silent = [
                        row["path"]
                        for row in result["candidates"]
                        if row["reason"] == "no reason given" and row["counted"]
                    ]
                    failures.expect("why-not", [f"{path}: no site and no reason" for path in silent])
                with failures.of("extras"):
                    extras.check_compiled(entry, model, failures.of)
    if "candidates" not in result:
        result["candidates"] = [
            compiler.no_site(candidate, "the host did not compile") for candidate in candidates
        ]
    with failures.of("telemetry in each forward"):
        silent = check_live(entry, candidates, seeds, expected, failures)
        for row in result.get("candidates", []):
            if row["path"] in silent:
                row.update(site=False, level=None, reason="has a site that the layer's value never passes")


def check_sites(entry: Entry) -> list[dict[str, Any]]:
    """For each executed candidate that counts: its path, and whether it got a site."""
    candidates, _ = executed(entry)
    model = compiler.compiled(entry.build(), entry, seeds_for(candidates), verify=False)
    return [row for row in compiler.account(model, candidates)["candidates"] if row["counted"]]


def seeds_for(candidates: list[Candidate]) -> int:
    """The usual number, or what the widest layer allows."""
    return min(SEEDS, max((each.features for each in candidates if each.counted), default=SEEDS))


def check_untouched(before: dict[str, Any], host: nn.Module, failures: Failures, label: str) -> None:
    """Compile left the host, its gradients and the RNG alone."""
    after = state_of(host)
    for what, value in before.items():
        was, now = (item if isinstance(item, dict) else {"": item} for item in (value, after[what]))
        failures.expect(f"host untouched ({what}), {label}", differences(was, now))


def check_surface(host: nn.Module, model: nn.Module, failures: Failures, label: str) -> None:
    """Class, names, flags, sharing and state-dict keys of the compiled model."""
    problems = []
    if type(model) is not type(host):
        problems.append(f"type {type(host).__name__} became {type(model).__name__}")
    if model is host:
        problems.append("compile returned the host itself")
    flags = {name: module.training for name, module in model.named_modules()}
    for name, module in host.named_modules():
        if flags.get(name) != module.training:
            problems.append(f"training flag of {name or 'root'} is {flags.get(name)}, was {module.training}")
    mine = dict(model.named_parameters())
    for name, parameter in host.named_parameters():
        other = mine.get(name)
        if other is None:
            problems.append(f"parameter {name} is gone")
        elif other.data_ptr() != parameter.data_ptr() or other.requires_grad != parameter.requires_grad:
            problems.append(f"parameter {name} is not the host's")
    if isinstance(host, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        if len(model) != len(host):
            problems.append(f"length {len(host)} became {len(model)}")
        if [name for name, _ in model.named_children()] != [name for name, _ in host.named_children()]:
            problems.append("children's names changed")
    extra = [name for name, parameter in mine.items() if "morphc" in name and parameter.requires_grad]
    problems += [f"{name} asks for a gradient" for name in extra]
    theirs, ours = host.state_dict(), model.state_dict()
    problems += [f"state-dict key {key} is gone" for key in theirs if key not in ours]
    problems += [
        f"new state-dict key {key}" for key in ours if key not in theirs and "morphc" not in key.split(".")
    ]
    missing, unexpected = model.load_state_dict(theirs, strict=False)
    problems += [f"host checkpoint lacks {key}" for key in missing if "morphc" not in key.split(".")]
    problems += [f"host checkpoint has unexpected {key}" for key in unexpected]
    missing, unexpected = model.load_state_dict(ours, strict=False)
    problems += [f"own checkpoint: {key}" for key in [*missing, *unexpected]]
    failures.expect(f"surface, {label}", problems)


def check_live(
    entry: Entry, candidates: list[Candidate], seeds: int, expected: dict[str, Record], failures: Failures
) -> list[str]:
    """With telemetry in each training forward: same bits; paths of the executed layers whose site saw nothing."""
    host = entry.build()
    model = compiler.compiled(host, entry, seeds, verify=False, telemetry_every=1)
    label = f"{entry.modes[0]}, example"
    if entry.modes[0] == "train":
        model.train()
    record = run(model, entry, entry.batch, entry.length, tensor_names(host), kept_by(host))
    failures.expect("same bits, telemetry_every=1", compare({label: expected[label]}, {label: record}))
    if entry.batch == 0 or not any(module.training for module in model.modules()):
        return []
    ran = [candidate for candidate in candidates if candidate.in_first_mode]
    silent = [path for path in compiler.silent_sites(model, ran) if path not in entry.unmeasured]
    failures.expect("sites are reached", [f"{path or 'root'}: no telemetry" for path in silent])
    return silent
