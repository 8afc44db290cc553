"""How many far keys the heads of a converted model keep, changed afterwards."""

import dataclasses
from collections.abc import Mapping

from torch import nn

from hf_rfa.config import HeadIndex
from hf_rfa.errors import ConfigError
from hf_rfa.runtime.adapters import named_adapters
from hf_rfa.runtime.record import base_model, conversion_config, store_config


def set_kept_keys(model: nn.Module, kept_keys: int, head_kept_keys: Mapping[HeadIndex, int] | None = None) -> None:
    """Let each linear head keep `kept_keys` far keys, those of `head_kept_keys` other numbers; see `RFAConfig`.

    The far kernels stay as they were calibrated. Caches that were filled before are refused.

    Raises:
        UnsupportedModelError: The model is not converted.
        ConfigError: A negative number, a model without a window, or a head that there is not.

    Example:
        >>> import hf_rfa
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> size = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8, vocab_size=64)
        >>> model = hf_rfa.convert(LlamaForCausalLM(LlamaConfig(**size)), calibrate=False)
        >>> hf_rfa.set_kept_keys(model, 128, {(1, 0): 512})
        >>> [layer.self_attn.rfa.kept_keys for layer in model.model.layers]
        [128, (512, 128)]
    """
    base = base_model(model)
    config = dataclasses.replace(conversion_config(base), kept_keys=kept_keys, head_kept_keys=head_kept_keys)
    adapters = {adapter.layer: adapter for _, _, adapter in named_adapters(base) if adapter.converted}
    there = {(layer, head) for layer, adapter in adapters.items() for head in range(adapter.key_heads)}
    unknown = sorted({head for head, _ in config.head_kept_keys or ()} - there)
    if unknown:
        raise ConfigError(
            f"`head_kept_keys` names heads that are not converted: {unknown}. Got layers "
            f"{sorted(adapters)} converted. Correct it."
        )
    for adapter in adapters.values():
        adapter.set_kept_keys(config)
    store_config(base, config)
