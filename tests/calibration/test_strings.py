"""Texts to calibrate on as strings, for language models and plain encoders."""

import pytest
import torch
from families import build
from sentence_encoders import save_encoder, words
from tokenizers_of_tests import word_tokenizer
from transformers import AutoModel, LlamaForCausalLM

import hf_rfa
from hf_rfa import ConfigError, RFAConfig

CONFIG = RFAConfig(num_features=16, window=16, sink_tokens=2, softmax_heads=0.25)
TEXTS = [words(90, 0), words(70, 1)]


def heads(model):
    return [(h.layer, h.key_head, h.alpha, h.gamma, h.cost, h.softmax) for h in hf_rfa.calibration_report(model).heads]


@pytest.fixture
def folder(tmp_path):
    build("llama").save_pretrained(tmp_path)
    word_tokenizer(90).save_pretrained(tmp_path)
    return tmp_path


def test_the_tokenizer_beside_a_language_model_reads_them(folder):
    ids = [word_tokenizer(90)(text)["input_ids"] for text in TEXTS]
    want = heads(hf_rfa.convert(build("llama"), CONFIG, calibrate=ids))
    model = hf_rfa.convert(LlamaForCausalLM.from_pretrained(folder), CONFIG, calibrate=TEXTS)
    assert heads(model) == want
    assert hf_rfa.calibration_report(model).tokens == 160
    given = hf_rfa.convert(build("llama"), CONFIG, calibrate=tuple(TEXTS), tokenizer=word_tokenizer(90))
    assert heads(given) == want
    later = hf_rfa.convert(LlamaForCausalLM.from_pretrained(folder), CONFIG, calibrate=False)
    hf_rfa.calibrate(later, TEXTS)
    assert heads(later) == want


def test_a_text_beyond_the_context_becomes_several(folder):
    model = LlamaForCausalLM.from_pretrained(folder)
    model.config.max_position_embeddings = 64
    hf_rfa.convert(model, CONFIG, calibrate=TEXTS)
    assert hf_rfa.calibration_report(model).tokens == 160
    ids = [row for text in TEXTS for row in torch.tensor(word_tokenizer(90)(text)["input_ids"]).split(64)]
    assert heads(model) == heads(hf_rfa.convert(build("llama"), CONFIG, calibrate=ids))


def test_an_encoder_gets_its_arguments_and_no_planted_repeats(tmp_path):
    save_encoder(tmp_path)
    model = hf_rfa.convert(AutoModel.from_pretrained(tmp_path), CONFIG, calibrate=TEXTS)
    inputs = [dict(word_tokenizer(90)(text, return_tensors="pt")) for text in TEXTS]
    assert heads(model) == heads(hf_rfa.convert(build("bert").bert, CONFIG, calibrate=inputs))


def test_what_cannot_be_read_is_refused_before_anything_is_changed(tmp_path):
    model = build("llama")
    with pytest.raises(ConfigError, match=r"not loaded from anywhere that has a tokenizer. Got a text: 'w\d+ .*'"):
        hf_rfa.convert(model, CONFIG, calibrate=TEXTS)
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"there is no tokenizer at .* Pass `tokenizer=...`"):
        hf_rfa.convert(LlamaForCausalLM.from_pretrained(tmp_path), CONFIG, calibrate=TEXTS)
    for unread in (True, torch.ones(1, 90, dtype=torch.long)):
        with pytest.raises(ConfigError, match=r"`tokenizer` reads texts. Got calibrate=(bool|Tensor)"):
            hf_rfa.convert(model, CONFIG, calibrate=unread, tokenizer=word_tokenizer(90))
    with pytest.raises(ConfigError, match=r"does not take text alone. Got a text: 'w\d+"):
        hf_rfa.convert(build("bart"), CONFIG, calibrate=TEXTS, tokenizer=word_tokenizer(90))
    assert model.config._attn_implementation != "rfa"
