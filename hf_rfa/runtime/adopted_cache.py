"""Replacing the layers of a plain Transformers cache by those of a converted model."""

import functools
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

from hf_rfa.errors import UnsupportedModelError
from hf_rfa.runtime.cache import RFACacheLayer

#: The attributes of the recurrent part of a cache layer.
_RECURRENT = (
    "conv_states", "recurrent_states", "is_conv_states_initialized", "is_recurrent_states_initialized",
    "has_previous_state", "conv_kernel_size", "device", "dtype",
)  # fmt: skip
#: Transformers' own layers that are replaced.
_DYNAMIC = (
    DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
)  # fmt: skip


class RFAHybridCacheLayer(LinearAttentionLayer, RFACacheLayer):  # type: ignore[misc, override]
    """An `RFACacheLayer` that also holds the state of a recurrence which runs beside the attention."""

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


def remember_recording() -> None:
    """Let a cache remember that it was asked to record its past before it had a converted layer.

    Transformers only tells the layers that exist at that time: none in a fresh `DynamicCache`, or plain ones, which
    keep everything. The method is otherwise unchanged, and other models never read the note.
    """
    plain = Cache.activate_past_recording
    if getattr(plain, "remembers", False):
        return

    @functools.wraps(plain)
    def activate_past_recording(self: Any) -> None:
        self.records_past = True
        plain(self)

    activate_past_recording.remembers = True  # type: ignore[attr-defined]
    Cache.activate_past_recording = activate_past_recording  # type: ignore[method-assign]


def has_place(cache: Cache, index: int) -> bool:
    """Whether the cache has a layer of that number, or will make one."""
    return index < len(cache.layers) or cache.layer_class_to_replicate is not None


def adopt_cache_layer(cache: Cache, index: int, *, shares: bool = False) -> RFACacheLayer:
    """The `RFACacheLayer` number `index` of `cache`, put there in place of a dynamic layer.

    Keys and values that the dynamic layer holds already (a learned prefix of PEFT; tokens from before the conversion)
    become the layer's state. A module that `shares` the keys of an earlier one has no layer
    in a cache of Transformers; here it has a state of its own, beside that of the layer before it.
    """
    if shares:
        return _beside_earlier(cache, index)
    while len(cache.layers) <= index and cache.layer_class_to_replicate is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    if index >= len(cache.layers):
        raise UnsupportedModelError(
            f"Layer {index} got a cache with {len(cache.layers)} layers. Pass a cache made for this model: "
            "`DynamicCache(config=model.config)`."
        )
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
    new.record_past = getattr(layer, "record_past", False) or getattr(cache, "records_past", False)
    new.seen = cache.get_seq_length(index)
    if new.seen:
        assert isinstance(layer, DynamicLayer)
        assert layer.keys is not None
        assert layer.values is not None
        new.given = layer.keys, layer.values
        new.took_over = True
    cache.layers[index] = new
    return new


def _beside_earlier(cache: Cache, index: int) -> RFACacheLayer:
    """The cache layer of a module that attends to earlier keys: a companion of the last converted layer before it."""
    earlier = [layer for layer in cache.layers[:index] if isinstance(layer, RFACacheLayer)]
    if not earlier:
        raise UnsupportedModelError(
            f"Layer {index} attends to the keys of an earlier layer, but no layer before it has random features. "
            "Convert both, or neither: RFAConfig(layers=...)."
        )
    if any(layer.took_over for layer in earlier):
        raise UnsupportedModelError(
            f"Layer {index} attends to the keys of an earlier layer, and the cache was filled before the model was "
            "converted. Start with an empty cache."
        )
    return earlier[-1].companion(index)
