"""Copies: a model through `torch.save`, a cache in the middle of a text through deepcopy, pickle and `torch.save`."""

import copy
import io
import pickle

import pytest
import torch
from conversions import converted
from families import CACHE, build, inputs_for, outputs_of, token_ids
from torch.testing import assert_close

import hf_rfa
from hf_rfa.runtime.arguments import cache_of


def through_torch_save(thing):
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda x: pickle.loads(pickle.dumps(x)), "save": through_torch_save}
COPY = pytest.mark.parametrize("make", COPIES.values(), ids=COPIES)


@COPY
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss", "deepseek_v3", "jamba", "gpt2"])
def test_a_cache_in_the_middle_of_a_text(family, make):
    model, ids = converted(family), token_ids()
    with torch.no_grad():
        cache = cache_of(model(ids[:, :40], use_cache=True))
        twin = make(cache)
        other = model(ids[:, 50:51], **{CACHE: make(cache)}).logits  # a third one goes its own way
        rest = [model(ids[:, 40:41], **{CACHE: one}).logits for one in (cache, twin)]
    want = outputs_of(model, {"input_ids": ids, "use_cache": False})[:, 40:41]
    for logits in rest:
        assert_close(logits, want, atol=2e-5, rtol=0)
    assert (other - want).abs().max() > 1e-3
    assert cache.get_seq_length() == twin.get_seq_length() == 41


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_whole_model_through_torch_save(family):
    model = converted(family)
    hf_rfa.resample(model, 5)
    loaded = through_torch_save(model)
    assert torch.equal(outputs_of(loaded, inputs_for(model)), outputs_of(model, inputs_for(model)))
    assert hf_rfa.resample(loaded) == 6
    softmax = outputs_of(build(family), inputs_for(model))
    assert torch.equal(outputs_of(hf_rfa.revert(loaded), inputs_for(model)), softmax)


def test_a_state_dict_loaded_in_place_of_the_tensors():
    """`assign=True` puts other tensors there: what the adapter keeps of the old ones must not stay."""
    model = converted()
    other = converted()
    hf_rfa.resample(other, 3)
    hf_rfa.set_softmax_heads(other, [(0, 1)])
    model.load_state_dict(other.state_dict(), assign=True)
    ids = {"input_ids": token_ids()}
    assert torch.equal(outputs_of(model, ids), outputs_of(other, ids))
    assert hf_rfa.resample(model) == 4
