"""Plan chunks: how many seeds and slots each site gets, what it will cost, and which kernels that takes.

The rules are in `chunking`; here they are asked about the program's host and device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import msgspec
from torch import nn

from morphc.config import Config
from morphc.kernels import devices
from morphc.kernels.backend import triton_problem
from morphc.kernels.blueprints.base import ConvGeometry
from morphc.kernels.cost import HostLayer
from morphc.passes import chunking
from morphc.passes.manager import register_pass
from morphc.passes.plan import Site
from morphc.passes.program import Program
from morphc.passes.updates import with_plan


@register_pass
@dataclass(frozen=True)
class PlanChunks:
    """Fill `seeds`, `slots`, `predicted` and the plan's specs. `seeds` and `device` override the config."""

    name: ClassVar[str] = "plan-chunks"
    seeds: int | Literal["auto"] | None = None
    device: str | None = None

    def apply(self, program: Program) -> None:
        if program.follow is not None or all(site.seeds for site in program.plan.sites):
            return
        config: Config = program.config
        if self.seeds is not None:
            config = msgspec.structs.replace(config, seeds_per_layer=self.seeds)
        device = devices.parse(self.device) if self.device else _device(program.host)
        modules = dict(program.host.named_modules())
        hosts = {
            site.path: layer
            for site in program.plan.sites
            if (layer := _host_layer(site, modules.get(site.path)))
        }
        running = msgspec.structs.replace(config, backend=_backend(config, device))
        sites = chunking.plan_chunks(
            program.plan.sites, running, device, host_bytes=_bytes(program.host), hosts=hosts
        )
        with_plan(program, sites=sites, specs=chunking.specs(sites, config, arch=device.arch, hosts=hosts))
        program.config = config

    def ensures(self, program: Program) -> str:
        empty = [site.path for site in program.plan.sites if not 1 <= site.seeds <= site.features]
        return f"sites without seeds: {empty[:3]}" if empty else ""


def _device(host: nn.Module) -> devices.Device:
    kinds = {parameter.device.type for parameter in host.parameters()}
    return devices.detect() if "cuda" in kinds or "meta" in kinds else devices.CPU


def _backend(config: Config, device: devices.Device) -> str:
    """The backend to predict for: the kernels wherever they could run on `device`, be it here or not."""
    return "torch" if not device.asynchronous or triton_problem() else config.backend


def _bytes(host: nn.Module) -> int:
    distinct = {id(t): t for t in (*host.parameters(), *host.buffers())}
    return sum(t.numel() * t.element_size() for t in distinct.values())


def _host_layer(site: Site, module: nn.Module | None) -> HostLayer | None:
    """A convolution's stride and kernel, which the site itself doesn't tell."""
    kernel: Any = getattr(module, "kernel_size", None)
    # Not `module.weight`: of a parametrized layer that is computed, and spectral norm's buffers move with it.
    weight = module._parameters.get("weight") if module is not None else None
    if module is None or weight is None or not isinstance(kernel, tuple):
        return None
    stride: Any = module.stride
    conv = ConvGeometry(
        kernel=tuple(kernel),
        stride=tuple(stride),
        padding=module.padding if isinstance(module.padding, str) else tuple(module.padding),  # type: ignore[arg-type]
        dilation=tuple(module.dilation),  # type: ignore[arg-type]
        groups=int(module.groups),  # type: ignore[arg-type]
    )
    return HostLayer(
        kind="conv",
        features=site.features,
        in_features=int(module.in_channels),  # type: ignore[arg-type]
        weights=weight.numel(),
        bias=module.bias is not None,
        dtype=site.dtype,
        stride=math.prod(stride),
        transposed="Transpose" in type(module).__name__,
        conv=conv,
    )
