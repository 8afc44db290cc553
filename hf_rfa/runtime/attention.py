"""The attention function that Transformers calls for `attn_implementation="rfa"`: one function per kind of layer."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface

from hf_rfa.errors import UnsupportedModelError
from hf_rfa.ops.arguments import far_kernel
from hf_rfa.ops.softmax import cross_attention, exact_attention, masked_attention
from hf_rfa.runtime.adapter import LayerKind, RFAAdapter
from hf_rfa.runtime.adapters import adapter_of
from hf_rfa.runtime.attention_call import AttendInputs, AttentionCall
from hf_rfa.runtime.cache import RFACacheLayer
from hf_rfa.runtime.calls import current_forward, current_interception, in_backward_pass, layer_call
from hf_rfa.runtime.layer_cache import cache_layer_of, prepare_cache_layer
from hf_rfa.runtime.mask import MaskRows, RFAMask, padding_of, rfa_mask
from hf_rfa.runtime.record import IMPLEMENTATION
from hf_rfa.runtime.refusals import check_inputs


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
    mask = attention_mask if isinstance(attention_mask, RFAMask) else None
    # A layer belongs to the forward whose mask it got, else to the one that this thread is in.
    forward = (None if mask is None else mask.call) or current_forward()
    interception = current_interception() if forward is None else forward.interception
    call = AttentionCall(
        module, adapter_of(module), query, key, value, mask,
        scaling=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        dropout=dropout if module.training else 0.0,
        is_causal=is_causal, extras=kwargs, draw=None if forward is None else forward.draw, interception=interception,
    )  # fmt: skip
    attend_layer = _function_for(call)
    check_inputs(module, attention_mask, kwargs)
    recorder = interception.recorder
    with nullcontext() if recorder is None else recorder.call(module, query, key, attention_mask, kwargs):
        output = attend_layer(call)
    return output[:, :, -query.shape[2] :].transpose(1, 2).contiguous(), None


def _function_for(call: AttentionCall) -> Callable[[AttentionCall], torch.Tensor]:
    """The function for this kind of layer; an adapter that cannot be used is refused."""
    name, adapter = type(call.module).__name__, call.adapter
    if adapter is None:
        if call.interception.recorder is not None and call.interception.recorder.exact:
            return _attend_as_before
        raise UnsupportedModelError(
            f"{name} has no random features: attn_implementation='rfa' alone does not convert a model. Load it "
            "without that argument and call `hf_rfa.convert(model)`, or `hf_rfa.from_pretrained` for a saved one."
        )
    if adapter.omega.is_meta:
        raise UnsupportedModelError(
            f"The adapter of {name} was offloaded (offload_buffers=True), but nothing brings it back: offload without "
            "buffers. Adapters take a few kB per layer."
        )
    if call.draw is None and adapter.config.resample == "forward" and _runs_again(call.module):
        raise UnsupportedModelError(
            f"{name} runs again in the backward pass, and does not know with which draw of omega its forward was (the "
            'model hands its layers no mask that could tell). With resample="forward" this model cannot be '
            "checkpointed: use RFAConfig(resample=k) with `hf_rfa.ResampleCallback`."
        )
    return _FUNCTIONS[adapter.kind]


def _attend_linear(call: AttentionCall) -> torch.Tensor:
    """A converted layer (B, H, N, M): random features in its linear heads, exact softmax in the others."""
    if call.rows is not None:
        raise _unforeseen_mask(call.module)
    return _attend_by_operator(call)


def _attend_softmax(call: AttentionCall) -> torch.Tensor:
    """A layer (B, H, N, M) of exact heads only: not converted, local, or all of its heads kept exact."""
    adapter = call.adapter
    assert adapter is not None
    rows = call.rows
    if rows is not None:
        # A sliding layer would be exact, but its state would lack these tokens.
        if adapter.converted or layer_call(adapter).cache_layer is not None:
            raise _unforeseen_mask(call.module)
        return _under_mask(call, rows)
    return _attend_by_operator(call)


def _attend_by_operator(call: AttentionCall) -> torch.Tensor:
    """A layer (B, H, N, M) whose heads the operator computes, with the cache's state, unless something intercepts."""
    call, adapter = call.with_all_queries(), call.adapter
    assert adapter is not None
    if call.over_another_sequence:
        return _attend_cross(call)
    observer = call.interception.observers.get(adapter)
    if observer is not None:
        return _observed(observer, call)
    inputs, cache_layer = _inputs(adapter, call), cache_layer_of(adapter)
    shard = call.interception.shards.get(adapter)
    if shard is not None:
        return shard(*inputs.tokens, inputs.kernel, inputs.settings, inputs.layout, inputs.statistics, cache_layer)
    if cache_layer is None:
        return inputs.attend()[0]
    prepare_cache_layer(cache_layer, adapter, call, inputs)
    if adapter.kind == "linear" and _decodes_in_place(cache_layer, inputs):
        return cache_layer.decode(inputs)
    return cache_layer.extend(inputs)


def _attend_masked(call: AttentionCall) -> torch.Tensor:
    """A layer (B, H, N, M) with a mask of its own in the dry run: softmax, with Transformers' own cache layer."""
    # A tracer cannot ask whether the mask is nothing but a window; the dry run did.
    rows = call.mask.rows if call.mask is not None and torch.compiler.is_compiling() else call.rows
    if rows is not None:
        return _under_mask(call, rows)
    return exact_attention(
        call.query, call.key, call.value, scaling=call.scaling, causal=call.causal, layout=call.layout(),
        past_mask=call.past_mask, sliding_window=call.extras.get("sliding_window"), sink_logits=call.sink_logits,
    )  # fmt: skip


def _attend_cross(call: AttentionCall) -> torch.Tensor:
    """Attention (B, H, N, M) over another sequence stays softmax: near and far have no meaning there."""
    module, mask, queries, keys = call.module, call.mask, call.query.shape[2], call.key.shape[2]
    if call.rows is not None:
        return _under_mask(call, call.rows)
    if mask is not None and (mask.causal or mask.segment_ids is not None):
        raise UnsupportedModelError(
            f"{type(module).__name__} got {keys} keys for {queries} queries under a causal mask (compressed keys, "
            "prefix tuning, or a cache of its own), which is not supported. Keep softmax attention."
        )
    if mask is None and getattr(module, "is_causal", False) and queries > 1:
        raise UnsupportedModelError(
            f"{type(module).__name__} got {keys} keys for {queries} causal queries (compressed keys, prefix tuning, "
            "or a cache of its own), which is not supported. Keep softmax attention."
        )
    return cross_attention(
        call.query, call.key, call.value, scaling=call.scaling, key_mask=None if mask is None else mask.token_mask,
        dropout=call.dropout,
    )  # fmt: skip


def _attend_as_before(call: AttentionCall) -> torch.Tensor:
    """Any layer (B, H, N, M) in the dry run of `convert`, before it has an adapter: exact softmax."""
    rows = call.rows
    if rows is not None:
        return _under_mask(call, rows)
    call = call.with_all_queries()
    return _attend_cross(call) if call.over_another_sequence else _exact_inputs(call).attend()[0]


#: By kind of layer, see `RFAAdapter.kind`.
_FUNCTIONS: dict[LayerKind, Callable[[AttentionCall], torch.Tensor]] = {
    "linear": _attend_linear,
    "softmax": _attend_softmax,
    "masked": _attend_masked,
    "cross": _attend_cross,
}


def _under_mask(call: AttentionCall, rows: MaskRows) -> torch.Tensor:
    """Softmax (B, H, N, M) under a mask made in blocks of rows."""
    return masked_attention(
        call.query, call.key, call.value, rows.blocks(), scaling=call.scaling, sink_logits=call.sink_logits,
        dropout=call.dropout,
    )  # fmt: skip


def _unforeseen_mask(module: nn.Module) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{type(module).__name__} combines its mask with something that it did not have when it was converted (for "
        "example image tokens that see each other), which random features cannot follow. Call the model without it, "
        "or pass `example_inputs` that have it to `convert`: the layer then stays softmax."
    )


def _inputs(adapter: RFAAdapter, call: AttentionCall) -> AttendInputs:
    config = adapter.config
    settings = call.settings(
        window=config.window, sink_tokens=config.sink_tokens, kept_keys=adapter.kept_keys,
        softmax_heads=adapter.softmax_heads, backend=adapter.backend,
    )  # fmt: skip
    statistics = adapter.statistics if adapter.signed else None
    kernel = adapter.kernel_of(call.draw)
    return AttendInputs(call.query, call.key, call.value, kernel, settings, call.layout(), statistics)


def _exact_inputs(call: AttentionCall) -> AttendInputs:
    """The same with every key head exact; the far kernel is never used."""
    heads = call.key.shape[1]
    unused = far_kernel(
        call.key, heads, omega=call.key.new_zeros(heads, 1, call.key.shape[-1], dtype=torch.float32)
    )  # fmt: skip
    settings = call.settings(softmax_heads=tuple(range(heads)))
    return AttendInputs(call.query, call.key, call.value, unused, settings, call.layout())


def _observed(observer: Callable[..., None], call: AttentionCall) -> torch.Tensor:
    """Exact attention (B, H, N, M), shown to an observer (calibration, distillation)."""
    inputs = _exact_inputs(call)
    output, _ = inputs.attend()
    observer(call.adapter, call.module, *inputs.tokens, inputs.layout, inputs.settings, output)
    return output


def _decodes_in_place(cache_layer: RFACacheLayer, inputs: AttendInputs) -> bool:
    """Whether the call is a decoding step and the state before it is not needed any more."""
    return (
        inputs.key.shape[2] == 1
        and inputs.settings.causal
        and inputs.layout.segment_ids is None
        and not cache_layer.record_past
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
    )


def _runs_again(module: nn.Module) -> bool:
    return module.training and torch.is_grad_enabled() and not torch.compiler.is_compiling() and in_backward_pass()
