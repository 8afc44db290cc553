"""RFAConfig(gate=True): a forget gate that begins open, is trained, saved, and decoded with."""

import dataclasses
import math

import pytest
import torch
from conversions import converted
from families import SHORT, build, token_ids

import hf_rfa
from hf_rfa.runtime.adapter import GATE, OPEN_GATE
from hf_rfa.runtime.adapters import require_adapters
from hf_rfa.training import FinetuneConfig, finetune

GATED = dataclasses.replace(SHORT, gate=True)


def gates(model):
    return {(a.layer, name): getattr(a, name).detach().clone() for a in require_adapters(model) for name in GATE}


def closed(model):
    """The same model, forgetting half in about seven tokens."""
    with torch.no_grad():
        for adapter in require_adapters(model):
            adapter.gate_bias.fill_(2.2)
    return model


def test_it_begins_open():
    ids = token_ids()
    gated = converted("llama", GATED)(ids).logits
    plain = converted()(ids).logits
    forgotten = 1 - torch.sigmoid(torch.tensor(OPEN_GATE)).item() ** ids.shape[1]
    assert forgotten < 0.05
    assert 0 < (gated - plain).abs().max() < forgotten * plain.abs().max()


def test_a_closed_gate_is_the_window_alone():
    ids = token_ids()
    model = converted("llama", GATED)
    with torch.no_grad():
        for adapter in require_adapters(model):
            adapter.gate_bias.fill_(-40.0)
    window = converted("llama", gamma=0.0)
    torch.testing.assert_close(model(ids).logits, window(ids).logits)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_decoding_is_the_uncached_forward(family):
    model = closed(converted(family, GATED))
    ids = token_ids(batch=2, length=50)
    cached = model.generate(ids, max_new_tokens=8, do_sample=False, use_cache=True)
    assert torch.equal(cached, model.generate(ids, max_new_tokens=8, do_sample=False, use_cache=False))


def test_attention_transfer_and_fine_tuning_train_it():
    model = hf_rfa.convert(build("llama"), GATED, calibrate=token_ids())
    before = gates(model)
    hf_rfa.distill(model, [token_ids()] * 3, hf_rfa.DistillConfig(steps=3, omega="random", progress=False))
    transferred = gates(model)
    assert all((transferred[key] - before[key]).abs().max() > 1e-4 for key in before)
    finetune(model, [token_ids()] * 2, FinetuneConfig(steps=2, learning_rate=1e-3, warmup_steps=0, progress=False))
    assert all((gates(model)[key] - transferred[key]).abs().max() > 1e-4 for key in before)


def test_it_is_saved_and_loaded(tmp_path):
    model = closed(converted("llama", GATED))
    hf_rfa.save_pretrained(model, tmp_path)
    again = hf_rfa.from_pretrained(tmp_path)
    assert again.model.layers[0].self_attn.rfa.gate_bias[0].item() == pytest.approx(2.2)
    assert torch.equal(again.eval()(token_ids()).logits, model.eval()(token_ids()).logits)


def test_layers_that_see_both_sides_refuse_it():
    with pytest.raises(hf_rfa.ConfigError, match="order of time"):
        converted("bert", GATED)


def test_what_is_no_switch_is_named():
    with pytest.raises(hf_rfa.ConfigError, match="`gate` must be True or False"):
        dataclasses.replace(SHORT, gate=1)
    assert math.isclose(torch.sigmoid(torch.tensor(OPEN_GATE)).item() ** 1000, 0.715, rel_tol=1e-2)
