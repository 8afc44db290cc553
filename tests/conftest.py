"""Fixtures that several test files share. Nothing here needs a network."""

import os

import pytest
import torch

# Without a GPU the Triton kernels are tested in its interpreter, which is chosen when anybody first imports triton.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from transformers import LlamaConfig, LlamaForCausalLM

# Tiny models gain nothing from a second thread, and lose a lot to waiting for it on a machine that does other things.
torch.set_num_threads(1)


@pytest.fixture
def tiny_llama() -> LlamaForCausalLM:
    """A Llama with grouped queries and random weights, float32, in evaluation mode; the same one every time."""
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()
