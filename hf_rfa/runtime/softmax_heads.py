"""Which key heads of a converted model stay exact softmax."""

import dataclasses

from torch import nn

from hf_rfa.config import RFAConfig
from hf_rfa.errors import ConfigError
from hf_rfa.runtime.adapters import named_adapters
from hf_rfa.runtime.record import base_model, conversion_config, store_config


def set_softmax_heads(model: nn.Module, heads: list[tuple[int, int]]) -> None:
    """Keep exactly these (layer, key_head) pairs of the converted layers as exact softmax.

    Example:
        >>> import hf_rfa
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> size = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8, vocab_size=64)
        >>> model = hf_rfa.convert(LlamaForCausalLM(LlamaConfig(**size)), calibrate=False)
        >>> hf_rfa.set_softmax_heads(model, [(1, 0)])
        >>> model.model.layers[1].self_attn.rfa.softmax_heads
        (0,)
    """
    base = base_model(model)
    config = dataclasses.replace(conversion_config(base), softmax_heads=heads)
    apply_softmax_heads(base, config)
    store_config(base, config)


def apply_softmax_heads(model: nn.Module, config: RFAConfig) -> None:
    """Set the exact heads that the config lists; 'auto' and a fraction wait for `calibrate`."""
    if not isinstance(config.softmax_heads, tuple):
        return
    adapters = {a.layer: a for _, _, a in named_adapters(model) if a.converted}
    unknown = sorted({layer for layer, _ in config.softmax_heads} - set(adapters))
    if unknown:
        raise ConfigError(
            f"`softmax_heads` names layers that are not converted: {unknown}. Converted ones: {sorted(adapters)}. "
            "Correct it."
        )
    for layer, adapter in adapters.items():
        adapter.set_softmax_heads(tuple(head for number, head in config.softmax_heads if number == layer))
