"""The embedded default model: small, loadable without a network, and able to use what lies beyond the window."""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_rfa
from hf_rfa import evaluation
from hf_rfa.data import load_documents, tokenize_documents
from hf_rfa.evaluation.compare import default_model


def held_out():
    documents = load_documents("stdlib", "validation", max_documents=1)
    tokens, _ = tokenize_documents(AutoTokenizer.from_pretrained(default_model()), documents)
    return tokens[0]


def test_it_is_a_small_llama_with_grouped_queries_and_long_context():
    from pathlib import Path

    folder = Path(default_model())
    assert sum(path.stat().st_size for path in folder.iterdir()) < 8_000_000
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float32
    assert model.config.max_position_embeddings >= 2048
    assert model.config.num_key_value_heads < model.config.num_attention_heads


def test_its_tokenizer_gives_source_code_back():
    tokenizer = AutoTokenizer.from_pretrained(default_model())
    text = "class A:\n    def f(self, x):\n\treturn {'ä': x}  # \u20ac\n\n\n"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_it_copies_from_beyond_the_window_and_its_window_alone_does_not():
    tokens = held_out()
    model = AutoModelForCausalLM.from_pretrained(default_model()).eval()
    original = evaluation.copy_perplexity(model, tokens, 300, samples=3)
    hf_rfa.convert(model, hf_rfa.RFAConfig(gamma=0.0), calibrate=False)
    window_only = evaluation.copy_perplexity(model, tokens, 300, samples=3)
    assert original < 4
    assert window_only > 3 * original


def test_far_context_helps_it():
    tokens = held_out()[: 2 * 2048]
    model = AutoModelForCausalLM.from_pretrained(default_model()).eval()
    original = evaluation.token_nll(model, tokens, 2048).mean()
    hf_rfa.convert(model, hf_rfa.RFAConfig(gamma=0.0), calibrate=False)
    window_only = evaluation.token_nll(model, tokens, 2048).mean()
    assert (window_only - original).exp() > 1.05
