"""Whether a plan that is given back fits the model: each refusal names the field and what the model has."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import msgspec
import torch
from msgspec.structs import replace
from torch import nn

from morphc.config import KINDS, Config
from morphc.config import SCHEMA_VERSION as CONFIG_SCHEMA
from morphc.errors import PlanError
from morphc.passes.layers import classify, tap_width
from morphc.passes.plan import Plan, Site, check_schema


def model_digest(host: nn.Module) -> str:
    """sha256 over the names, classes and parameter shapes of the model: what a plan must fit."""
    text = "\n".join(
        f"{name}:{type(module).__name__}:"
        + ",".join(f"{n}{list(p.shape)}{p.dtype}" for n, p in module.named_parameters(recurse=False))
        for name, module in host.named_modules()
    )
    return hashlib.sha256(text.encode()).hexdigest()


def check_plan(plan: Plan, host: nn.Module, config: Config | None) -> None:
    """Raises PlanError naming the field that can't be of this model, or that `config` contradicts."""
    check_schema(plan.schema_version, plan.morphc_version)
    if plan.model_class != type(host).__qualname__:
        raise PlanError(
            f"the plan's model_class is {plan.model_class!r}, this model is a {type(host).__qualname__!r}"
        )
    modules = dict(host.named_modules())
    seen: set[str] = set()
    for site in plan.sites:
        wrong = f"path={site.path!r} is listed twice" if site.path in seen else _misfit(site, modules)
        if wrong:
            raise PlanError(f"the plan's site {site.path!r} does not fit this model: {wrong}")
        seen.add(site.path)
    if plan.model_digest != model_digest(host):
        raise PlanError(
            "the plan's model_digest differs: the model has other layers or shapes than the plan's"
        )
    if config is not None:
        mine = replace(config)
        for field in mine.__struct_fields__:
            if field in plan.config and _plain(getattr(mine, field)) != _plain(plan.config[field]):
                raise PlanError(
                    f"the plan was made with {field}={plan.config[field]!r}, the config given has "
                    f"{getattr(mine, field)!r}: leave config out, or compile without the plan"
                )


def config_of(plan: Plan) -> Config:
    """The config that a plan was made with. Raises PlanError, or ConfigError for a value that can't be used."""
    try:
        config = msgspec.convert(plan.config, Config, strict=False)
    except msgspec.ValidationError as error:
        raise PlanError(f"the plan's config is no config of this morphc: {error}") from error
    if config.schema_version != CONFIG_SCHEMA:
        raise PlanError(
            f"the plan's config has schema_version {config.schema_version}, this morphc reads {CONFIG_SCHEMA}"
        )
    return config


def _misfit(site: Site, modules: Mapping[str, nn.Module]) -> str:
    """Which field of the site can't be of this model, or an empty string."""
    return next(filter(None, (check(site, modules) for check in _CHECKS)), "")


def _misfit_of_place(site: Site, modules: Mapping[str, nn.Module]) -> str:
    owner = _owner(site)
    if owner not in modules:
        return f"path={site.path!r} names no module of it"
    if site.parameter is not None:
        # Not getattr: a parametrized weight would be computed on the host.
        tables = (modules[owner]._parameters, modules[owner]._buffers)
        if site.parameter != site.path.rpartition(".")[2] or not any(site.parameter in t for t in tables):
            return f"parameter={site.parameter!r} is none of {owner!r}"
    for field, path in (("owner", site.owner), ("region", site.region)):
        if path is not None and path not in modules:
            return f"{field}={path!r} names no module of it"
    if site.block is not None:
        norms = () if site.block.norm is None else (site.block.norm,)
        for path in (*site.block.inputs, site.block.output, *norms):
            if path not in modules and path.rpartition(".")[0] not in modules:
                return f"block names {path!r}, no layer of it"
    return ""


def _misfit_of_shape(site: Site, modules: Mapping[str, nn.Module]) -> str:
    module = modules[_owner(site)]
    known = None if site.parameter else classify(module)
    if known is not None and known.feature_axis != site.feature_axis:
        return f"feature_axis={site.feature_axis}, this layer's is {known.feature_axis}"
    for name in ("out_features", "out_channels"):
        width = getattr(module, name, site.features)
        if not site.parameter and isinstance(width, int) and width != site.features:
            return f"features={site.features}, this model's {name}={width}"
    if known is not None and known.features != site.features:
        return f"features={site.features}, this layer has {known.features}"
    width = _tap_width(site, module)
    if site.tap_features < 0 or (width and site.tap_features != width):
        return f"tap_features={site.tap_features}, the input of this layer has {width or '0 or more'}"
    return _misfit_of_output(site, modules)


def _tap_width(site: Site, module: nn.Module) -> int:
    """Width of the layer's input; 0 where that is only known from a run."""
    if site.parameter is None:
        return tap_width(module)
    weight = module._parameters.get(site.parameter)
    inside = isinstance(module, nn.MultiheadAttention) and weight is not None
    return int(weight.shape[1]) if inside and weight is not None else 0


def _misfit_of_output(site: Site, modules: Mapping[str, nn.Module]) -> str:
    index = site.output_index
    if index not in (None, 0):
        return f"output_index={index}: a site watches an output itself (null) or its first element (0)"
    called = modules[site.owner if site.owner is not None else _owner(site)]
    if site.parameter is not None:
        return "" if index is None else f"output_index={index}, a functional layer's value is no container"
    known = classify(called)
    # A class of somebody's own may return what it likes.
    torchs = type(called).__module__.startswith("torch.nn.") and "forward" not in vars(called)
    if known is not None and torchs and known.output_index != index:
        what = "is itself watched (null)" if known.output_index is None else "has it as first element (0)"
        return f"output_index={index}, the output of a {type(called).__name__} {what}"
    return ""


def _misfit_of_values(site: Site, modules: Mapping[str, nn.Module]) -> str:
    if not 1 <= site.seeds <= site.features:
        return f"seeds={site.seeds}, its features allow 1 to {site.features}"
    if site.slots < 0:
        return f"slots={site.slots} is negative"
    if not isinstance(getattr(torch, site.dtype, None), torch.dtype):
        return f"dtype={site.dtype!r} is no dtype of torch"
    if site.layer_kind not in KINDS:
        return f"layer_kind={site.layer_kind!r} is none of {', '.join(KINDS)}"
    return ""


def _owner(site: Site) -> str:
    """The module that the site's layer is, or that owns its parameter."""
    return site.path.rpartition(".")[0] if site.parameter else site.path


_CHECKS = (_misfit_of_place, _misfit_of_shape, _misfit_of_values)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
