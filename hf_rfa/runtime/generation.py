"""The constant-size cache in plain `model.generate`."""

import weakref
from collections.abc import Callable
from typing import Any

from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.generation.utils import GenerationMixin

from hf_rfa.errors import UnsupportedModelError
from hf_rfa.runtime.adapters import named_adapters
from hf_rfa.runtime.adopted_cache import adopt_cache_layer, has_place
from hf_rfa.runtime.arguments import CACHE_NAMES
from hf_rfa.runtime.attention_call import shares_keys
from hf_rfa.runtime.cache import RFACacheLayer
from hf_rfa.runtime.layer_cache import attends_here
from hf_rfa.runtime.newest_tokens import Generation, needs_newest_only, running
from hf_rfa.runtime.record import INSIDE


def prepare_cache(
    model: Any,
    own: Callable[..., Any],
    generation_config: Any,
    model_kwargs: dict[str, Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """`_prepare_cache_for_generation` of a converted model: its own, then converted modules get their cache layers.

    That is before assisted decoding asks the layers to record their past.
    """
    if INSIDE not in model.__dict__:
        return own(generation_config, model_kwargs, *args, **kwargs)
    refuse_cache_implementation(generation_config.cache_implementation)
    result = own(generation_config, model_kwargs, *args, **kwargs)
    cache = next((model_kwargs[name] for name in CACHE_NAMES if isinstance(model_kwargs.get(name), Cache)), None)
    if cache is not None:
        records = adopt_cache(model, cache)
        generation = running.get()
        if generation is not None and generation.plain:
            generation.newest_only = needs_newest_only(model, generation_config, cache)
        if generation_config.is_assistant:  # Transformers asked the layers that were just replaced
            cache.activate_past_recording()
        elif generation is not None and not records:  # if it records already, the caller decides when that ends
            generation.caches.append(weakref.ref(cache))
    return result


def generate(model: Any, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`generate` of a converted model: its own, then clean-up.

    Assisted decoding makes the cache record its past, for which a state of constant size keeps every earlier state:
    recording ends with the call. A model that drafts with its first layers (`assistant_early_exit`) sets its config to
    that number of layers; an error would leave it so.
    """
    config = model.config.get_text_config(decoder=True)
    layers = getattr(config, "num_hidden_layers", None)
    others = ("assistant_model", "custom_generate")
    # `inputs` and `generation_config` may come by place; what else does so is not looked through.
    plain = len(args) <= 2 and not any(kwargs.get(name) is not None for name in others)
    generation = Generation(plain)
    token = running.set(generation)
    try:
        return own(*args, **kwargs)
    finally:
        running.reset(token)
        for cache in (reference() for reference in generation.caches):
            if cache is not None:
                stop_recording(cache)
        if layers is not None and config.num_hidden_layers != layers:
            config.num_hidden_layers = layers


def adopt_cache(model: GenerationMixin, cache: Cache) -> bool:
    """Put an `RFACacheLayer` into `cache` for every self-attention module of a converted model.

    Returns:
        Whether one of them records its past already.
    """
    own = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    records = False
    for _, module, adapter in named_adapters(model):  # type: ignore[arg-type]
        index = getattr(module, "layer_idx", None)
        if adapter.cross or adapter.masked or not attends_here(module) or not getattr(module, "is_causal", True):
            continue
        # Modules that several layers share are told which one they are; a model that drafts with its first layers
        # makes a cache of these alone.
        if index is not None and index >= 0 and has_place(own, index):
            layer = adopt_cache_layer(own, index, shares=shares_keys(module))
            layer.check(adapter)
            records = records or layer.record_past
    return records


def stop_recording(cache: Cache) -> None:
    """Forget the past states of a cache; from here on its tokens cannot be taken back."""
    own = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    own.records_past = False  # type: ignore[attr-defined]
    for layer in own.layers:
        if isinstance(layer, RFACacheLayer):
            layer.stop_recording()


def refuse_cache_implementation(name: str | None) -> None:
    """Raise `UnsupportedModelError` for caches that hold keys and values of every token."""
    if name not in (None, "dynamic"):
        raise UnsupportedModelError(
            f"A converted model generates with its own cache of constant size. Got cache_implementation={name!r}. "
            "Leave it unset."
        )
