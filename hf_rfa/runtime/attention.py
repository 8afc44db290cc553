"""The attention function that Transformers calls for `attn_implementation="rfa"`."""

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, EncoderDecoderCache

from hf_rfa.errors import UnsupportedModelError
from hf_rfa.features.far_kernel import FarKernel
from hf_rfa.ops.arguments import far_kernel
from hf_rfa.ops.attention import attend
from hf_rfa.ops.combine import FarStatistics
from hf_rfa.ops.layout import TokenLayout
from hf_rfa.ops.settings import AttentionSettings
from hf_rfa.ops.softmax import cross_attention, exact_attention, masked_attention
from hf_rfa.runtime.adapter import ADAPTER_NAME, RFAAdapter
from hf_rfa.runtime.adopted_cache import adopt_cache_layer
from hf_rfa.runtime.cache import RFACacheLayer
from hf_rfa.runtime.calls import (
    ForwardCall,
    Interception,
    TracedLayerCall,
    begin_layer,
    current_forward,
    current_interception,
    in_backward_pass,
    layer_call,
)
from hf_rfa.runtime.mask import MaskRows, RFAMask, padding_of, rfa_mask
from hf_rfa.runtime.refusals import check_inputs

#: The name of the implementation in Transformers.
IMPLEMENTATION = "rfa"


def register() -> None:
    """Register the attention and the mask function under "rfa"; doing it again changes nothing."""
    AttentionInterface.register(IMPLEMENTATION, rfa_attention_forward)
    AttentionMaskInterface.register(IMPLEMENTATION, rfa_mask)


def rfa_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: RFAMask | torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of a converted module: q (B, H, N, D), k (B, Hk, N, D), v (B, Hk, N, M) -> (B, N, H, M)."""
    if isinstance(attention_mask, torch.Tensor) and not getattr(module, "is_causal", False):
        attention_mask = padding_of(attention_mask) or attention_mask
    call = _forward_call(attention_mask)
    watch = _interception(call).recorder
    with nullcontext() if watch is None else watch.call(module, query, key, attention_mask, kwargs):
        output = _attend(module, query, key, value, attention_mask, scaling, dropout, is_causal, kwargs, call)
    return output[:, :, -query.shape[2] :].transpose(1, 2).contiguous(), None


def _forward_call(mask: Any) -> ForwardCall | None:
    """The forward that a layer belongs to: the one whose mask it got, else the one that this thread is in."""
    return (mask.call if isinstance(mask, RFAMask) else None) or current_forward()


def _interception(call: ForwardCall | None) -> Interception:
    return current_interception() if call is None else call.interception


def _attend(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any,
    scaling: float | None, dropout: float, is_causal: bool | None, kwargs: dict[str, Any], call: ForwardCall | None,
) -> torch.Tensor:  # fmt: skip
    """Output (B, H, N, M) of a module: converted, kept as softmax, or not yet converted in the dry run."""
    interception, draw = _interception(call), None if call is None else call.draw
    adapter = module._modules.get(ADAPTER_NAME)
    watched = interception.recorder is not None and interception.recorder.exact
    if not isinstance(adapter, RFAAdapter) and not watched:
        raise UnsupportedModelError(
            f"{type(module).__name__} has no random features: attn_implementation='rfa' alone does not convert a "
            "model. Load it without that argument and call `hf_rfa.convert(model)`, or `hf_rfa.from_pretrained` for "
            "a saved one."
        )
    check_inputs(module, attention_mask, kwargs)
    mask = attention_mask if isinstance(attention_mask, RFAMask) else None
    scaling = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    if isinstance(adapter, RFAAdapter):
        if adapter.omega.is_meta:
            raise UnsupportedModelError(
                f"The adapter of {type(module).__name__} was offloaded (offload_buffers=True), but nothing brings it "
                "back: offload without buffers. Adapters take a few kB a layer."
            )
        if draw is None and adapter.config.resample == "forward" and _runs_again(module):
            raise UnsupportedModelError(
                f"{type(module).__name__} runs again in the backward pass, and does not know with which draw of omega "
                'its forward was (the model hands its layers no mask that could tell). With resample="forward" this '
                "model cannot be checkpointed: use RFAConfig(resample=k) with `hf_rfa.ResampleCallback`."
            )
    sliding = kwargs.get("sliding_window")
    rows = mask_of_its_own(mask, kwargs)
    # A tracer cannot ask whether a mask is nothing but a window; the dry run did.
    if torch.compiler.is_compiling() and mask is not None and isinstance(adapter, RFAAdapter) and adapter.masked:
        rows = mask.rows
    if rows is not None:
        # A sliding layer would answer exactly, but its state would go without these tokens.
        if isinstance(adapter, RFAAdapter) and (adapter.converted or layer_call(adapter).cache_layer is not None):
            raise UnsupportedModelError(
                f"{type(module).__name__} combines its mask with something that it did not have when it was converted "
                "(for example image tokens that see each other), which random features cannot follow. Call the model "
                "without it, or pass `example_inputs` that have it to `convert`: the layer then stays softmax."
            )
        return masked_attention(
            query, key, value, rows.blocks(), scaling=scaling, sink_logits=kwargs.get("s_aux"),
            dropout=dropout if module.training else 0.0,
        )  # fmt: skip
    if isinstance(adapter, RFAAdapter) and adapter.masked:
        past = None if mask is None or mask.token_mask is None else mask.token_mask[:, : -query.shape[2]]
        return exact_attention(
            query, key, value, scaling=scaling, causal=_is_causal(module, is_causal) if mask is None else mask.causal,
            layout=_layout(mask, kwargs, query.shape[2], query.device), past_mask=past,
            sliding_window=sliding, sink_logits=kwargs.get("s_aux"),
        )  # fmt: skip
    if key.shape[2] > query.shape[2] and shares_keys(module):
        # Such layers may be asked for the last tokens alone: `rfa_attention_forward` leaves the others out again.
        query = F.pad(query, (0, 0, key.shape[2] - query.shape[2], 0))
    if key.shape[2] != query.shape[2] or (isinstance(adapter, RFAAdapter) and adapter.cross):
        return _cross(module, query, key, value, mask, scaling, dropout)
    causal = mask.causal if mask is not None else _is_causal(module, is_causal)
    if sliding is not None and not causal:
        raise UnsupportedModelError(
            f"{type(module).__name__} has a sliding window on both sides and no mask that says so. Keep softmax for "
            "this model."
        )
    layout = _layout(mask, kwargs, query.shape[2], query.device)
    sinks = kwargs.get("s_aux")
    settings = AttentionSettings(scaling=scaling, causal=causal, sink_logits=sinks, sliding_window=sliding)
    observer = interception.observers.get(adapter) if isinstance(adapter, RFAAdapter) else None
    if not isinstance(adapter, RFAAdapter) or observer is not None:
        settings = settings.replace(softmax_heads=tuple(range(key.shape[1])))
        output, _ = attend(query, key, value, _unused_kernel(key), settings, layout)
        if observer is not None:
            observer(adapter, module, query, key, value, layout, settings, output)
        return output
    kernel = adapter.kernel_of(draw)
    settings = settings.replace(
        window=adapter.config.window, sink_tokens=adapter.config.sink_tokens, softmax_heads=adapter.softmax_heads,
        backend=adapter.backend,
    )  # fmt: skip
    counts = adapter.statistics if "trigonometric" in adapter.feature_maps else None
    turn = layer_call(adapter)
    turn.turns += 1
    # Called past its pre-hook (`module.forward`), a module would find its last call here, and that one's cache.
    cache_layer = turn.cache_layer if turn.turns <= 1 + adapter.attends_twice else None
    if cache_layer is not None and adapter.attends_twice:
        if turn.turns == 1:
            adapter.traced_call = turn if isinstance(turn, TracedLayerCall) else None
        else:
            cache_layer = cache_layer.companion("twin")
    shard = interception.shards.get(adapter)
    if shard is not None:
        return shard(query, key, value, kernel, settings, layout, counts, cache_layer)
    if cache_layer is None:
        return attend(query, key, value, kernel, settings, layout, statistics=counts)[0]
    if cache_layer.given is not None:
        if adapter.attends_twice:
            raise UnsupportedModelError(
                f"{type(module).__name__} attends twice in a forward and got a cache that it did not fill itself. "
                "Start with an empty cache."
            )
        if not causal:
            raise UnsupportedModelError(
                f"{type(module).__name__} sees both sides and got keys from before its first token (prefix tuning), "
                "which is not supported. Use LoRA or prompt tuning."
            )
        past = mask.token_mask[:, : -query.shape[2]] if mask is not None and mask.token_mask is not None else None
        cache_layer.absorb(key, value, past, kernel, settings)
    return _cached(adapter, cache_layer, query, key, value, kernel, settings, layout, counts)


def mask_of_its_own(mask: Any, extras: dict[str, Any]) -> MaskRows | None:
    """A layer's mask, if it is more than causality, padding, packing and a sliding window that the layer names."""
    rows = mask.rows if isinstance(mask, RFAMask) else None
    named = rows is not None and rows.sliding and extras.get("sliding_window") is not None
    return None if named else rows


def _unused_kernel(key: torch.Tensor) -> FarKernel:
    """A far kernel for calls in which every key head is exact softmax."""
    heads = key.shape[1]
    return far_kernel(key, heads, omega=key.new_zeros(heads, 1, key.shape[-1], dtype=torch.float32))


def _cached(
    adapter: RFAAdapter, cache_layer: RFACacheLayer, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    kernel: FarKernel, settings: AttentionSettings, layout: TokenLayout, counts: FarStatistics | None,
) -> torch.Tensor:  # fmt: skip
    cache_layer.check(adapter.fingerprint, adapter.draw_number)
    if _in_place(cache_layer, key, layout, settings):
        return cache_layer.decode(query, key, value, kernel, settings, layout, counts)
    output, state = attend(
        query, key, value, kernel, settings, layout, cache_layer.state, statistics=counts, output_final_state=True
    )
    assert state is not None
    cache_layer.advance(state, key, value, kernel, settings, layout)
    return output


def _in_place(cache_layer: RFACacheLayer, key: torch.Tensor, layout: TokenLayout, settings: AttentionSettings) -> bool:
    """Whether a call is a decoding step after which nobody needs the state before it."""
    return (
        key.shape[2] == 1
        and settings.causal
        and len(settings.softmax_heads) < key.shape[1]
        and layout.segment_ids is None
        and not cache_layer.record_past
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
    )


def _runs_again(module: nn.Module) -> bool:
    return module.training and torch.is_grad_enabled() and not torch.compiler.is_compiling() and in_backward_pass()


def stash_cache(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of a converted attention module: note the cache, which the function is not handed."""
    adapter = module._modules[ADAPTER_NAME]
    assert isinstance(adapter, RFAAdapter)
    interception = current_interception()
    cache = next((value for value in (*kwargs.values(), *args) if isinstance(value, Cache)), None)
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    if (
        cache is None
        or not attends_here(module)
        or adapter.cross
        or adapter.masked
        or interception.recorder is not None
        or adapter in interception.observers
    ):
        begin_layer(adapter, None)
        return
    # A module that several layers share is told which one it is; one that runs in a loop, which turn it is.
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


def shares_keys(module: nn.Module) -> bool:
    """Whether a module attends to the keys and values of an earlier one (Gemma 3n, Gemma 4)."""
    return bool(getattr(module, "is_kv_shared_layer", False))


def _is_causal(module: nn.Module, is_causal: bool | None) -> bool:
    # The convention of Transformers' own sdpa function.
    return bool(is_causal) if is_causal is not None else bool(getattr(module, "is_causal", True))


def _cross(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: RFAMask | None,
    scaling: float,
    dropout: float,
) -> torch.Tensor:
    """Attention over another sequence stays softmax: near and far have no meaning there."""
    if mask is not None and (mask.causal or mask.segment_ids is not None):
        raise UnsupportedModelError(
            f"{type(module).__name__} got {key.shape[2]} keys for {query.shape[2]} queries under a causal mask "
            "(compressed keys, prefix tuning, or a cache of its own), which is not supported. Keep softmax attention."
        )
    if mask is None and getattr(module, "is_causal", False) and query.shape[2] > 1:
        raise UnsupportedModelError(
            f"{type(module).__name__} got {key.shape[2]} keys for {query.shape[2]} causal queries (compressed "
            "keys, prefix tuning, or a cache of its own), which is not supported. Keep softmax attention."
        )
    token_mask = None if mask is None or mask.token_mask is None else mask.token_mask
    return cross_attention(
        query, key, value, scaling=scaling, key_mask=token_mask, dropout=dropout if module.training else 0.0
    )


def _layout(mask: RFAMask | None, extras: dict[str, Any], length: int, device: torch.device) -> TokenLayout:
    """Documents come from the mask (`position_ids`), else from what padding-free collators hand over."""
    lengths, segment_ids = extras.get("cu_seq_lens_q"), extras.get("seq_idx")
    if segment_ids is None and lengths is not None:
        slots = torch.arange(length, device=device)
        segment_ids = torch.searchsorted(lengths.to(device, torch.int64), slots, right=True)[None]
    if segment_ids is not None and (mask is None or mask.segment_ids is None):
        token_mask = None if mask is None or mask.token_mask is None else mask.token_mask[:, -length:]
        return TokenLayout(token_mask, segment_ids.to(device))
    return TokenLayout() if mask is None else mask.layout(length)
