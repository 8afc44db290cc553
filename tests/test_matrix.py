"""Unlike families built from their config classes alone: converted, run, and given back bit for bit."""

import pytest
import torch
from families import SHORT
from tiny_models import Case, all_cases, tiny_model, token_ids

import hf_rfa

SAMPLE = [
    Case("causal_lm", "llama", "LlamaForCausalLM"),
    Case("causal_lm", "gpt2", "GPT2LMHeadModel"),
    Case("causal_lm", "granite", "GraniteForCausalLM"),
    Case("causal_lm", "olmoe", "OlmoeForCausalLM"),
    Case("causal_lm", "deepseek_v2", "DeepseekV2ForCausalLM"),
    Case("causal_lm", "diffllama", "DiffLlamaForCausalLM"),
    Case("causal_lm", "biogpt", "BioGptForCausalLM"),
    Case("causal_lm", "nemotron", "NemotronForCausalLM"),
    Case("masked_lm", "albert", "AlbertForMaskedLM"),
    Case("masked_lm", "distilbert", "DistilBertForMaskedLM"),
    Case("masked_lm", "eurobert", "EuroBertForMaskedLM"),
    Case("seq_to_seq_causal_lm", "m2m_100", "M2M100ForConditionalGeneration"),
]


@pytest.mark.parametrize("case", SAMPLE, ids=str)
def test_a_family_converts_and_reverts_bit_for_bit(case):
    assert case in all_cases()
    model = tiny_model(case)
    inputs = {"input_ids": token_ids()}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = token_ids(seed=1)
    with torch.no_grad():
        before = model(**inputs).logits
        after = hf_rfa.convert(model, SHORT, calibrate=False)(**inputs).logits
        again = hf_rfa.revert(model)(**inputs).logits
    assert torch.isfinite(after).all()
    assert (after - before).abs().max() > 1e-3
    assert torch.equal(again, before)
