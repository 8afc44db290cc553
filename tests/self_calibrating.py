"""A model that calibrates itself on short texts."""

from families import build
from transformers import LlamaConfig, LlamaForCausalLM

import hf_rfa

CONFIG = hf_rfa.RFAConfig(num_features=16, window=8, sink_tokens=2)


LONGEST = 120


def short_llama():
    """A Llama that calibrates itself on 120 tokens a row, so that the tests are fast."""
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(**shape, vocab_size=99, num_key_value_heads=2, max_position_embeddings=LONGEST)
    return build(lambda: LlamaForCausalLM(config))
