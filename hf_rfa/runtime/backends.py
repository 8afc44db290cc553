"""Backends of the linear heads of a converted model: PyTorch in chunks, or fused Triton kernels."""

import torch
from torch import nn

from hf_rfa.ops.call import OperatorCall, check_backend
from hf_rfa.ops.dispatch import causal_form, require_triton
from hf_rfa.ops.layout import TokenLayout
from hf_rfa.ops.settings import AttentionSettings
from hf_rfa.runtime.adapter import RFAAdapter
from hf_rfa.runtime.adapters import named_adapters, require_adapters

#: Tokens of the text for which `backend` answers where 'auto' decides.
USUAL_LENGTH = 4096


def set_backend(model: nn.Module, name: str) -> None:
    """Choose the backend of the causal layers of a converted model.

    Encoders have one form. The choice depends on the machine and is not saved.

    Args:
        model: A converted model, where it is to run: the kernels need a GPU.
        name: 'chunked', 'triton', or 'auto' (see `hf_rfa.ops.dispatch`).

    Raises:
        ConfigError: There is no such backend, or 'triton' cannot run a layer; the message says why. Nothing is
            changed then.

    Example:
        >>> import hf_rfa
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> size = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8, vocab_size=64)
        >>> model = hf_rfa.convert(LlamaForCausalLM(LlamaConfig(**size)), calibrate=False)
        >>> hf_rfa.set_backend(model, "chunked")
        >>> hf_rfa.backend(model)
        {0: 'chunked', 1: 'chunked'}
    """
    require_adapters(model)
    check_backend(name)
    layers = [(module, adapter) for _, module, adapter in named_adapters(model)]
    if name == "triton":
        for module, adapter in layers:
            if adapter.converted and getattr(module, "is_causal", True):
                require_triton(adapter.kernel, adapter.omega.device, *_tokens(module, adapter), adapter.config.window)
    for _, adapter in layers:
        adapter.backend = name


def backend(model: nn.Module) -> dict[int, str]:
    """The backend of each layer: 'triton', 'chunked', 'bidirectional' (encoders), or 'softmax' (not converted).

    Where 'auto' decides it is the answer for a text of `USUAL_LENGTH` tokens; on a GPU that has not been asked before
    the kernels are checked for it, which takes some seconds.

    Raises:
        UnsupportedModelError: The model is not converted.
        ConfigError: 'triton' was asked for and can no longer run, for example since the model was moved to the CPU.

    Example:
        >>> import hf_rfa
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> size = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8, vocab_size=64)
        >>> config = hf_rfa.RFAConfig(layers=[1])
        >>> model = hf_rfa.convert(LlamaForCausalLM(LlamaConfig(**size)), config, calibrate=False)
        >>> hf_rfa.backend(model)
        {0: 'softmax', 1: 'chunked'}
    """
    require_adapters(model)
    return {adapter.layer: _form(module, adapter) for _, module, adapter in named_adapters(model)}


def _form(module: nn.Module, adapter: RFAAdapter) -> str:
    if not adapter.converted:
        return "softmax"
    if not getattr(module, "is_causal", True):
        return "bidirectional"
    config, (dtype, dim) = adapter.config, _tokens(module, adapter)
    if adapter.backend == "triton":
        require_triton(adapter.kernel, adapter.omega.device, dtype, dim, config.window)
    if adapter.backend != "auto":
        return adapter.backend
    sinks = getattr(module, "sinks", None)
    settings = AttentionSettings(
        window=config.window, sink_tokens=config.sink_tokens, kept_keys=adapter.kept_keys, scaling=dim**-0.5,
        softmax_heads=adapter.softmax_heads, sink_logits=sinks if isinstance(sinks, torch.Tensor) else None,
    )  # fmt: skip
    heads = adapter.key_heads * int(getattr(module, "num_key_value_groups", 1))
    # Shapes are all that is asked of these: no memory is behind them.
    query, key = (
        torch.zeros((), dtype=dtype, device=adapter.omega.device).expand(1, count, USUAL_LENGTH, dim)
        for count in (heads, adapter.key_heads)
    )
    call = OperatorCall.of(query, key, key, adapter.kernel, settings, TokenLayout())
    return causal_form(call)


def _tokens(module: nn.Module, adapter: RFAAdapter) -> tuple[torch.dtype, int]:
    """The dtype of a layer's tokens, and their dim: that of keys, which values share but in a few families."""
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    return dtype, adapter.omega.shape[2]
