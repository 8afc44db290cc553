"""How a model calls the cache that it takes and gives: Transformers renamed it in 5.24."""

from typing import Any

from torch import nn

from hf_rfa.example_inputs import accepts
from hf_rfa.packing import CACHE_NAMES


def with_cache(model: nn.Module, cache: Any) -> dict[str, Any]:
    """Arguments with which `model` goes on from `cache` (None: begins) and keeps one, for `model(**inputs, ...)`."""
    unwrap: Any = getattr(model, "get_base_model", None)  # PEFT's forward takes anything
    base = model if unwrap is None else unwrap()
    name = next((name for name in CACHE_NAMES if accepts(base, name)), "past_key_values")
    return {name: cache, "use_cache": True}


def cache_of(output: Any) -> Any:
    """The cache in what a model gave back."""
    return next(output[name] for name in CACHE_NAMES if name in output)
