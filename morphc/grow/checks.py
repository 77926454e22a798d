"""What a Grower and its controllers are given: refused where it can't be right, by the name that the user knows."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from morphc.errors import ConfigError, MorphcWarning


def whole(name: str, value: Any, least: int = 1) -> int:
    """`value`, a whole number of at least `least`. Raises ConfigError."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name}={value!r} is not a whole number of at least {least}")
    return value


def check_arguments(
    optimizer: Any, controller: Any, evaluate: Any, scaler: Any, scheduler: Any, tick_every: Any, better: Any
) -> None:
    """Raises ConfigError for what a Grower can't work with."""
    whole("tick_every", tick_every)
    if better not in ("lower", "higher"):
        raise ConfigError(f"better={better!r} must be 'lower' or 'higher'")
    if evaluate is not None and not callable(evaluate):
        raise ConfigError(
            f"evaluate={evaluate!r} is no function; give one of the model, that returns a metric"
        )
    if not hasattr(optimizer, "param_groups"):
        raise ConfigError(f"optimizer={optimizer!r} is no optimizer; give the one that trains the host")
    if controller is not None and (isinstance(controller, type) or not hasattr(controller, "decide")):
        raise ConfigError(
            f"controller={controller!r} has no method `decide` to call; give an object that has, such as "
            "PlateauController(), or CallbackController(function)"
        )
    for name, value, needed in (
        ("scaler", scaler, ("get_scale", "state_dict", "load_state_dict")),
        ("scheduler", scheduler, ("state_dict", "load_state_dict")),
    ):
        missing = [method for method in needed if not hasattr(value, method)]
        if value is not None and missing:
            raise ConfigError(f"{name}={value!r} has no method {missing[0]!r}; give the run's own, or None")


def warn_of_setup(model: nn.Module, optimizer: torch.optim.Optimizer, evaluated: bool) -> None:
    """Of an optimizer that trains something else, and of seeds that nobody will judge. Called by Grower.__init__."""
    own = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    if own and not any(id(each) in own for group in optimizer.param_groups for each in group["params"]):
        warnings.warn(
            "the optimizer has none of the model's parameters: it trains another module, and the host stays as it "
            "is; make it of model.parameters()",
            MorphcWarning,
            stacklevel=3,
        )
    if not evaluated:
        warnings.warn(
            "Grower without evaluate=: no seed's contribution is measured, so none passes EVALUATING and "
            "each is culled there in the end; give evaluate=, a function of the model",
            MorphcWarning,
            stacklevel=3,
        )
