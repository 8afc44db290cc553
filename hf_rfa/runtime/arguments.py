"""How models call their cache: `cache` since Transformers 5.24, `past_key_values` until 5.23, some `cache_params`."""

import inspect
from typing import Any

from torch import nn

#: As an argument of a model's forward, and as a field of its output.
CACHE_NAMES = ("cache", "past_key_values", "cache_params")


def cache_argument(model: nn.Module) -> str:
    """The name of the cache among the arguments of the model's forward."""
    arguments = inspect.signature(model.forward).parameters
    return next((name for name in CACHE_NAMES if name in arguments), CACHE_NAMES[1])


def cache_of(output: Any) -> Any:
    """The cache in a model's output; None if it was called without one."""
    return next((output[name] for name in CACHE_NAMES if name in output), None)


def accepts(model: nn.Module, argument: str) -> bool:
    """Whether the model's forward names the argument."""
    return argument in inspect.signature(model.forward).parameters
