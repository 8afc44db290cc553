"""Learned features are parameters of the model: cast, trained, frozen and saved as such, at a rate of their own."""

import copy

import pytest
import torch
from conversions import converted
from families import SHORT, build, token_ids

import hf_rfa
from hf_rfa.runtime.adapter import LEARNED
from hf_rfa.runtime.adapters import require_adapters
from hf_rfa.training import FinetuneConfig, finetune


def learned(heads=None):
    model = build("llama")
    hf_rfa.convert(model, hf_rfa.RFAConfig(**{**vars(SHORT), "softmax_heads": heads}), calibrate=token_ids())
    hf_rfa.distill(model, [token_ids()] * 3, hf_rfa.DistillConfig(steps=3, progress=False))
    return model


def features(model):
    return {(a.layer, name): p.detach().clone() for a in require_adapters(model) for name, p in a.named_parameters()}


def test_random_features_are_buffers_and_learned_ones_parameters():
    model = converted()
    assert not features(model)
    found = features(learned())
    assert {name for _, name in found} == set(LEARNED)


def test_fine_tuning_trains_them_with_the_model():
    model = learned()
    before, weights = features(model), {n: p.detach().clone() for n, p in model.named_parameters()}
    finetune(
        model,
        [token_ids(seed=s) for s in range(3)],
        FinetuneConfig(steps=3, learning_rate=1e-3, warmup_steps=0, progress=False),
    )
    after = features(model)
    assert all((after[key] - before[key]).abs().max() > 1e-4 for key in before)
    head = model.get_output_embeddings().weight
    assert (head - weights["lm_head.weight"]).abs().max() > 1e-4


@pytest.mark.parametrize("ratio", [0.1, 10.0])
def test_their_rate_is_their_own_and_they_do_not_decay(ratio):
    rate = 1e-3
    model = learned()
    plain = copy.deepcopy(model)
    arguments = {"steps": 1, "learning_rate": rate, "warmup_steps": 0, "progress": False, "weight_decay": 0.5}
    before = features(model)
    finetune(plain, [token_ids()], FinetuneConfig(**arguments))
    finetune(model, [token_ids()], FinetuneConfig(feature_learning_rate=ratio * rate, **arguments))
    moved, plainly = features(model), features(plain)
    for key in before:  # Adam's first step is the rate in each entry, whatever the gradient
        assert (plainly[key] - before[key]).abs().max() == pytest.approx(rate, rel=1e-2)
        assert (moved[key] - before[key]).abs().max() == pytest.approx(ratio * rate, rel=1e-2)
    assert torch.equal(model.lm_head.weight, plain.lm_head.weight)


def test_a_rate_that_is_none_is_named():
    with pytest.raises(hf_rfa.ConfigError, match="feature_learning_rate"):
        finetune(learned(), [token_ids()], FinetuneConfig(steps=1, feature_learning_rate=0.0))


def test_a_cast_model_keeps_them_in_float32():
    model = learned()
    before = features(model)
    model.to(torch.bfloat16)
    after = features(model)
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_they_are_saved_and_loaded(tmp_path):
    model = learned()
    finetune(model, [token_ids()] * 2, FinetuneConfig(steps=2, learning_rate=1e-3, progress=False))
    hf_rfa.save_pretrained(model, tmp_path)
    again = hf_rfa.from_pretrained(tmp_path)
    assert all(torch.equal(value, features(again)[key]) for key, value in features(model).items())
    assert torch.equal(again.eval()(token_ids()).logits, model.eval()(token_ids()).logits)


def test_revert_takes_them_away():
    model = learned()
    names = {name for name, _ in build("llama").named_parameters()}
    hf_rfa.revert(model)
    assert {name for name, _ in model.named_parameters()} == names
