"""Lazy access to transformers, and one-line entries for its classes."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from .registry import Entry, Inputs, add, token_ids

SMALL = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GENERATES = ("generate", "save_pretrained")


@functools.cache
def transformers() -> ModuleType:
    """The package, imported while the repository's root is off `sys.path`.

    transformers looks for a package named `kernels`, and would find this repository's room of that name.
    """
    root = Path(__file__).resolve().parents[2]
    kept = list(sys.path)
    sys.path[:] = [entry for entry in kept if Path(entry or ".").resolve() != root]
    try:
        package = importlib.import_module("transformers")
        importlib.import_module("transformers.modeling_utils")
        package.logging.set_verbosity_error()
        return package
    finally:
        sys.path[:] = kept


def config(class_name: str, **options: Any) -> Any:
    """A transformers config by name."""
    return getattr(transformers(), class_name)(**options)


def model(class_name: str, settings: Any) -> nn.Module:
    """A transformers model with random weights."""
    return getattr(transformers(), class_name)(settings)


def entry(
    name: str,
    family: str,
    model_class: str,
    config_class: str,
    inputs: Callable[[int, int], Inputs] = token_ids,
    *,
    options: dict[str, Any],
    **rest: Any,
) -> None:
    """Register `model_class(config_class(**options))`."""

    def make() -> nn.Module:
        return model(model_class, config(config_class, **options))

    rest.setdefault("note", f"transformers.{model_class}")
    add(Entry(name, family, make, inputs, **rest))
