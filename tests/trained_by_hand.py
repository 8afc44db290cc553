"""Models whose weights are set by hand, so that it is known what calibration must find."""

import dataclasses

import torch
from families import SHORT, build
from transformers import LlamaConfig, LlamaForCausalLM

import hf_rfa


def harmful_and_helpful():
    """One layer, two heads of dim 16: q, k of head 0 are huge and constant (RoPE alone decides), of head 1 zero."""
    config = LlamaConfig(
        vocab_size=99, hidden_size=32, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, rope_parameters={"rope_type": "default", "rope_theta": 100.0},
    )  # fmt: skip
    model = build(lambda: LlamaForCausalLM(config))
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        constant = torch.zeros(99, 32)
        constant[:, 0] = 1.0  # the same for every token, what q and k read
        constant[:, 1:] = 0.3 * torch.randn(99, 31, generator=torch.Generator().manual_seed(0))
        model.model.embed_tokens.weight.copy_(constant)
        for projection in (attention.q_proj, attention.k_proj):
            projection.weight.zero_()
            projection.weight[:16, 0] = 3.0
    return hf_rfa.convert(model, dataclasses.replace(SHORT, sink_tokens=0), calibrate=False)
