"""A cache belongs to the conversion that filled it; recording of its past ends with the call that asked for it."""

import copy

import pytest
import torch
from conversions import converted
from decoding import prefilled
from families import CACHE, build, llama, outputs_of, token_ids
from torch.testing import assert_close
from transformers import DynamicCache

import hf_rfa
from hf_rfa import StaleStateError
from hf_rfa.runtime.adapters import named_adapters

FAMILY = pytest.mark.parametrize("family", ["llama", "gemma3", "deepseek_v3", "gpt_oss"])


def filled(model):
    return prefilled(model, token_ids()[:, :50])


def go_on(model, cache, start=50, stop=51):
    with torch.no_grad():
        return model(token_ids()[:, start:stop], **{CACHE: cache}).logits


def recalibrated(model):
    return hf_rfa.calibrate(model, token_ids(2, 120, seed=5)) and model


def changed_in_place(model):
    for _, _, adapter in named_adapters(model):
        adapter.set_kernel(adapter.feature_maps, alpha=adapter.alpha / 2)
    return model


def with_other_heads(model):
    hf_rfa.set_softmax_heads(model, [(1, 1)])
    return model


#: How the model came to be that gets the cache of `converted(softmax_heads=[(1, 0)])`.
OTHERS = {
    "reverted": hf_rfa.revert,
    "never converted": lambda model: build("llama"),
    "another seed": lambda model: converted(seed=7, softmax_heads=[(1, 0)]),
    "another alpha": lambda model: converted(alpha=1.0, softmax_heads=[(1, 0)]),
    "another map": lambda model: converted(feature_map="positive", softmax_heads=[(1, 0)]),
    "other exact heads": lambda model: converted(softmax_heads=[(1, 1)]),
    "other exact heads later": with_other_heads,
    "another window": lambda model: converted(window=16, softmax_heads=[(1, 0)]),
    "other sinks": lambda model: converted(sink_tokens=1, softmax_heads=[(1, 0)]),
    "other layers": lambda model: converted(layers=[1], softmax_heads=[(1, 0)]),
    "calibrated since": recalibrated,
    "tempered since": changed_in_place,
}


#: What the errors advise.
NEW_ONE = r"Start (a new sequence|with a new cache)"


@pytest.mark.parametrize("stop", [51, 70], ids=["one token", "many tokens"])
@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_the_cache_of_another_conversion_is_refused(other, stop):
    first = converted(softmax_heads=[(1, 0)])
    cache = filled(first)
    model = other(first)
    with pytest.raises(StaleStateError, match=NEW_ONE):
        go_on(model, cache, stop=stop)
    with pytest.raises(StaleStateError, match=NEW_ONE):
        model.generate(token_ids(), **{CACHE: cache}, max_new_tokens=3, do_sample=False)
    fresh = filled(model)
    want = outputs_of(model, {"input_ids": token_ids()[:, :stop], "use_cache": False})[:, 50:]
    assert_close(go_on(model, fresh, stop=stop), want, atol=2e-5, rtol=0)


@FAMILY
def test_the_cache_of_the_same_conversion_goes_on(family, tmp_path):
    """Of a copy, of the same model loaded again, of one built again: whatever would have filled it the same."""
    first = converted(family)
    want = outputs_of(first, {"input_ids": token_ids(), "use_cache": False})[:, 50:]
    hf_rfa.save_pretrained(first, tmp_path)
    for model in (first, copy.deepcopy(first), converted(family), hf_rfa.from_pretrained(tmp_path)):
        assert_close(go_on(model, filled(first), stop=70), want, atol=2e-5, rtol=0)


def test_what_has_learned_since_is_another_conversion():
    """An optimiser's step into omega is seen too, unless the cache is handed on, as in truncated backpropagation."""
    model = converted(omega="learned")
    cache, again = filled(model), filled(model)
    for _, _, adapter in named_adapters(model):
        with torch.no_grad():
            adapter.omega.add_(0.1)
    with pytest.raises(StaleStateError):
        go_on(model, cache)
    for layer in again.layers:
        layer.hand_on()
    assert go_on(model, again).isfinite().all()


# --- recording -------------------------------------------------------------------------------------------------------


def recorded(cache):
    return sum(len(layer._steps) for layer in cache.layers if hasattr(layer, "_steps"))


DRAFTS = {"prompt lookup": {"prompt_lookup_num_tokens": 3}, "assistant": {}}


@pytest.mark.parametrize("draft", DRAFTS)
@FAMILY
def test_recording_ends_with_the_call_that_asked_for_it(family, draft):
    model, ids = converted(family), token_ids(1)
    options = {"assistant_model": llama(num_hidden_layers=1)} if draft == "assistant" else DRAFTS[draft]
    cache = DynamicCache(config=model.config)
    common = {"do_sample": False, "return_dict_in_generate": True}
    out = model.generate(ids, **{CACHE: cache}, max_new_tokens=12, **common, **options)
    assert recorded(cache) == 0
    size = hf_rfa.cache_bytes(cache)
    plain = model.generate(out.sequences, **{CACHE: cache}, max_new_tokens=12, **common)
    assert recorded(cache) == 0
    if family not in (
        "gemma3",
        "gpt_oss",
    ):  # whose sliding layer keeps what it needs for taking steps back, until it is cropped
        assert hf_rfa.cache_bytes(cache) == size
    want = model.generate(ids, max_new_tokens=24, do_sample=False, use_cache=False)
    assert torch.equal(plain.sequences, want)


def test_recording_ends_after_an_error_too():
    model = converted()
    cache = DynamicCache(config=model.config)

    def fails(*args):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        model.generate(
            token_ids(1), **{CACHE: cache}, prompt_lookup_num_tokens=3, max_new_tokens=5, stopping_criteria=[fails]
        )
    assert recorded(cache) == 0
    with torch.no_grad():
        model(token_ids(1)[:, :9], **{CACHE: cache})
    assert recorded(cache) == 0


@pytest.mark.parametrize("make", [lambda model: DynamicCache(config=model.config), lambda model: DynamicCache()])
@FAMILY
def test_a_cache_that_is_asked_to_record_before_its_first_forward(family, make):
    """The order of Transformers' documentation: activate, forward, crop."""
    model, ids = converted(family), token_ids()
    cache = make(model)
    cache.activate_past_recording()
    with torch.no_grad():
        model(ids[:, :45], **{CACHE: cache})
        cache.crop(-5)
        rest = model(ids[:, 40:], **{CACHE: cache}).logits
        cache.crop(-30)
        again = model(ids[:, 40:], **{CACHE: cache}).logits
    want = outputs_of(model, {"input_ids": ids, "use_cache": False})[:, 40:]
    assert_close(rest, want, atol=2e-5, rtol=0)
    assert_close(again, want, atol=2e-5, rtol=0)


def test_a_cache_that_nobody_asked_to_record_says_what_to_do():
    cache = filled(converted())
    with pytest.raises(RuntimeError, match="activate_past_recording"):
        cache.crop(-5)


# --- early exit ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma", "cohere"])
def test_drafting_with_the_first_layers_is_greedy_decoding(family):
    model, ids = converted(family), token_ids(1)
    config = model.config
    want = model.generate(ids, max_new_tokens=20, do_sample=False)
    layers = config.num_hidden_layers
    got = model.generate(ids, max_new_tokens=20, do_sample=False, assistant_early_exit=1)
    assert torch.equal(got, want)
    assert config.num_hidden_layers == layers
    assert torch.equal(model.generate(ids, max_new_tokens=20, do_sample=False), want)


def test_a_draft_that_fails_leaves_the_model_whole():
    model, ids = converted(), token_ids(1)
    original = model.lm_head.forward

    def fails_in_the_draft(hidden):
        if model.config.num_hidden_layers == 1:
            raise ZeroDivisionError
        return original(hidden)

    model.lm_head.forward = fails_in_the_draft
    with pytest.raises(ZeroDivisionError):
        model.generate(ids, max_new_tokens=5, do_sample=False, assistant_early_exit=1)
    assert model.config.num_hidden_layers == 2
    assert model.generate(ids, max_new_tokens=5, do_sample=False).shape == (1, 75)
