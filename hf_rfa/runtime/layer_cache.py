"""Which layer of a cache an attention module fills: its pre-hook notes it, its attention function looks it up."""

from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, EncoderDecoderCache

from hf_rfa.errors import UnsupportedModelError
from hf_rfa.runtime.adapter import RFAAdapter
from hf_rfa.runtime.adapters import adapter_of
from hf_rfa.runtime.adopted_cache import adopt_cache_layer
from hf_rfa.runtime.attention_call import AttendInputs, AttentionCall, shares_keys
from hf_rfa.runtime.cache import RFACacheLayer
from hf_rfa.runtime.calls import TracedLayerCall, begin_layer, current_interception, layer_call
from hf_rfa.runtime.record import IMPLEMENTATION


def stash_cache(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of a converted attention module: note its cache layer for the attention function."""
    adapter = adapter_of(module)
    assert adapter is not None
    if adapter.kind in ("masked", "cross"):
        if not torch.compiler.is_compiling():  # else the call would stay in the adapter: such layers never look it up
            begin_layer(adapter, None)
        return
    interception = current_interception()
    cache = next((value for value in (*kwargs.values(), *args) if isinstance(value, Cache)), None)
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    if (
        cache is None
        or not attends_here(module)
        or interception.recorder is not None
        or adapter in interception.observers
    ):
        begin_layer(adapter, None)
        return
    # A module that several layers share is told which layer it is; one that runs in a loop, which turn.
    index = kwargs.get("layer_idx", getattr(module, "layer_idx", None))
    if index is None:
        raise UnsupportedModelError(
            f"{type(module).__name__} has no `layer_idx`, so that its place in the cache is unknown. Call the model "
            "with use_cache=False."
        )
    if "cache_offset" in kwargs and kwargs.get("shared_kv_states") is not None:
        raise UnsupportedModelError(
            f"{type(module).__name__} runs in a loop whose turns read the keys and values of its last turn from the "
            'cache (recurrent_kv_cache_mode="last_loop"), which a state of constant size does not hold. Call it with '
            'use_cache=False, or set that option of its config to "per_loop".'
        )
    index += kwargs.get("cycle_offset", 0) + kwargs.get("cache_offset", 0)
    layer = adopt_cache_layer(cache, index, shares=shares_keys(module))
    layer.expected = "traced" if torch.compiler.is_compiling() else "called"
    begin_layer(adapter, layer)


def attends_here(module: nn.Module) -> bool:
    """Whether a converted module's attention is ours: `model.set_attn_implementation` may name another one."""
    return bool(getattr(getattr(module, "config", None), "_attn_implementation", IMPLEMENTATION) == IMPLEMENTATION)


def cache_layer_of(adapter: RFAAdapter) -> RFACacheLayer | None:
    """The cache layer that the module fills now; None without a cache. A second call in a forward has its own."""
    turn = layer_call(adapter)
    turn.turns += 1
    # Called past its pre-hook (`module.forward`), a module would find its last call here, and that one's cache.
    cache_layer = turn.cache_layer if turn.turns <= 1 + adapter.attends_twice else None
    if cache_layer is None or not adapter.attends_twice:
        return cache_layer
    if turn.turns > 1:
        return cache_layer.companion("twin")
    adapter.traced_call = turn if isinstance(turn, TracedLayerCall) else None
    return cache_layer


def prepare_cache_layer(
    cache_layer: RFACacheLayer, adapter: RFAAdapter, call: AttentionCall, inputs: AttendInputs
) -> None:
    """Turn keys of a plain cache into a state, and refuse a state that is not this adapter's."""
    name = type(call.module).__name__
    if cache_layer.given is not None:
        if adapter.attends_twice:
            raise UnsupportedModelError(
                f"{name} attends twice in a forward and got a cache that it did not fill itself. Start with an empty "
                "cache."
            )
        if not call.causal:
            raise UnsupportedModelError(
                f"{name} sees both sides and got keys from before its first token (prefix tuning), which is not "
                "supported. Use LoRA or prompt tuning."
            )
        cache_layer.absorb(inputs, call.past_mask)
    cache_layer.check(adapter)
