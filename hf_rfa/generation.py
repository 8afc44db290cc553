"""The constant-size cache in plain `model.generate`."""

from typing import Any

from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.generation.utils import GenerationMixin

from hf_rfa.adapter import named_adapters
from hf_rfa.adopted_cache import adopt_cache_layer
from hf_rfa.errors import UnsupportedModelError


class CachePreparer:
    """Stands in for a model's `_prepare_cache_for_generation`; an object, not a closure, so that the model pickles.

    The model's own method makes the cache; the layers of converted attention modules are then replaced in it, before
    assisted decoding asks them to record their past.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        refuse_cache_implementation(generation_config.cache_implementation)
        original = type(self.model)._prepare_cache_for_generation
        result = original(self.model, generation_config, model_kwargs, *args, **kwargs)
        cache = model_kwargs.get("past_key_values")
        if isinstance(cache, Cache):
            adopt_cache(self.model, cache)
            if generation_config.is_assistant:  # asked of the layers that were just replaced
                cache.activate_past_recording()
        return result


def adopt_cache(model: GenerationMixin, cache: Cache) -> None:
    """Put an `RFACacheLayer` into `cache` for every self-attention module of a converted model."""
    own = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    for _, module, adapter in named_adapters(model):  # type: ignore[arg-type]
        index = getattr(module, "layer_idx", None)
        if adapter.cross or adapter.masked or not getattr(module, "is_causal", True):
            continue
        if index is not None and index >= 0:  # modules that several layers share are told which one they are
            adopt_cache_layer(own, index)


def refuse_cache_implementation(name: str | None) -> None:
    """Raise `UnsupportedModelError` for caches that hold keys and values of every token."""
    if name not in (None, "dynamic"):
        raise UnsupportedModelError(
            f"A converted model generates with its own cache of constant size. Got cache_implementation={name!r}. "
            "Leave it unset."
        )
