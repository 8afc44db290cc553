"""How many far estimates a converted model dropped."""

from torch import nn

from hf_rfa.runtime.adapters import require_adapters


def far_statistics(model: nn.Module) -> dict[int, float]:
    """Per converted layer, the share of far estimates that were not positive and so were dropped (since conversion).

    Only the trigonometric map can drop any; the positive maps always answer 0.

    Example:
        >>> import hf_rfa
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> size = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=64)
        >>> model = hf_rfa.convert(LlamaForCausalLM(LlamaConfig(**size)), calibrate=False)
        >>> hf_rfa.far_statistics(model)
        {0: 0.0}
    """
    return {a.layer: a.statistics.dropped_fraction for a in require_adapters(model) if a.converted}
