"""The layers of a plain Transformers cache that are replaced by those of a converted model."""

from typing import Any

import torch
from transformers.cache_utils import (
    Cache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

from hf_rfa.cache import RFACacheLayer
from hf_rfa.errors import UnsupportedModelError

#: What the recurrent part of a cache layer consists of.
_RECURRENT = (
    "conv_states", "recurrent_states", "is_conv_states_initialized", "is_recurrent_states_initialized",
    "has_previous_state", "conv_kernel_size", "device", "dtype",
)  # fmt: skip
#: The layers of Transformers' own that are replaced.
_DYNAMIC = (
    DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
)  # fmt: skip


class RFAHybridCacheLayer(LinearAttentionLayer, RFACacheLayer):  # type: ignore[misc, override]
    """The same for a layer that runs a recurrence beside its attention, whose state lies in the same cache layer."""

    is_compileable = False

    def __init__(self, recurrent: LinearAttentionLayer) -> None:
        RFACacheLayer.__init__(self)
        LinearAttentionLayer.__init__(self, number_of_states=recurrent.number_of_states)
        vars(self).update({name: vars(recurrent)[name] for name in _RECURRENT})

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        part = RFACacheLayer if args else LinearAttentionLayer  # keys and values come by position, states by name
        part.lazy_initialization(self, *args, **kwargs)

    def reset(self) -> None:
        LinearAttentionLayer.reset(self)
        RFACacheLayer.reset(self)

    def activate_past_recording(self) -> None:
        LinearAttentionLayer.activate_past_recording(self)
        RFACacheLayer.activate_past_recording(self)

    def crop(self, tokens_to_remove: int) -> None:
        LinearAttentionLayer.crop(self, tokens_to_remove)
        RFACacheLayer.crop(self, tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        LinearAttentionLayer.reorder_cache(self, beam_idx)
        RFACacheLayer.reorder_cache(self, beam_idx)

    def offload(self) -> None:
        RFACacheLayer.offload(self)


def adopt_cache_layer(cache: Cache, index: int) -> RFACacheLayer:
    """The `RFACacheLayer` number `index` of `cache`, put there in place of a dynamic layer.

    Keys and values that the dynamic layer holds already (a learned prefix of PEFT; what the model saw as softmax
    before it was converted) become the layer's state.
    """
    while len(cache.layers) <= index and cache.layer_class_to_replicate is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    layer = cache.layers[index]
    if isinstance(layer, RFACacheLayer):
        return layer
    if type(layer) not in _DYNAMIC:
        raise UnsupportedModelError(
            f"A converted layer keeps its own state of constant size. Got a cache with a {type(layer).__name__}. "
            "Leave `cache_implementation` unset, or pass a `DynamicCache`."
        )
    if cache.offloading:
        raise UnsupportedModelError(
            "The RFA cache is not offloaded: it has constant size. Got an offloaded cache. Pass a `DynamicCache()`."
        )
    new = RFAHybridCacheLayer(layer) if isinstance(layer, LinearAttentionLayer) else RFACacheLayer()
    new.record_past = getattr(layer, "record_past", False)
    new.seen = cache.get_seq_length(index)
    if new.seen:
        assert isinstance(layer, DynamicLayer)
        assert layer.keys is not None
        assert layer.values is not None
        new.given = layer.keys, layer.values
    cache.layers[index] = new
    return new
