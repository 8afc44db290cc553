"""Backends of the linear heads of a converted model: PyTorch in chunks, or fused Triton kernels."""

import torch
from torch import nn

from hf_rfa.ops.call import check_backend
from hf_rfa.ops.dispatch import pick
from hf_rfa.runtime.adapter import RFAAdapter
from hf_rfa.runtime.adapters import named_adapters, require_adapters


def set_backend(model: nn.Module, name: str) -> None:
    """Choose the backend of the causal layers of a converted model, for more than one token at a time.

    Single tokens (decoding) and encoders have one form each. The choice depends on the machine and is not saved.

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
    for module, adapter in layers:
        _form(module, adapter, name)
    for _, adapter in layers:
        adapter.backend = name


def backend(model: nn.Module) -> dict[int, str]:
    """The backend of each layer: 'triton', 'chunked', 'bidirectional' (encoders), or 'softmax' (not converted).

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
    return {adapter.layer: _form(module, adapter, adapter.backend) for _, module, adapter in named_adapters(model)}


def _form(module: nn.Module, adapter: RFAAdapter, name: str) -> str:
    if not adapter.converted:
        return "softmax"
    if not getattr(module, "is_causal", True):
        return "bidirectional"
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    # Value dims are those of the keys but in a few families, whose calls are checked again when they come.
    tokens, config = (adapter.omega.device, dtype, adapter.omega.shape[2]), adapter.config
    return pick(name, adapter.kernel, *tokens, config.window)
