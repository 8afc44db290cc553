"""Texts of different lengths as the rows of one cache: they join and leave a batch between two steps."""

import copy

import pytest
import torch
from conversions import converted
from decoding import CONFIG, CONFIGS, whole
from families import CACHE, SHORT, build, token_ids
from torch.testing import assert_close
from transformers import DynamicCache

import hf_rfa
from hf_rfa import StaleStateError, UnsupportedModelError
from hf_rfa.runtime.stacking import keep_rows, stack_caches

TEXTS = [token_ids(1, length + 30, seed=length) for length in (3, 41, 17, 70)]
LENGTHS = [text.shape[1] - 30 for text in TEXTS]


def prefilled(model, text, length):
    cache = DynamicCache()
    with torch.no_grad():
        model(text[:, :length], use_cache=True, position_ids=torch.arange(length)[None], **{CACHE: cache})
    return cache


class Batch:
    """Rows that each go on with their own text; every step is compared with the forward over the whole text."""

    def __init__(self, model):
        self.model, self.rows, self.cache = model, [], None
        self.expected = [whole(model, text)[0] for text in TEXTS]

    def join(self, *texts):
        caches = [prefilled(self.model, TEXTS[text], LENGTHS[text]) for text in texts]
        self.cache = stack_caches(caches if self.cache is None else [self.cache, *caches])
        self.rows += [(text, LENGTHS[text]) for text in texts]

    def leave(self, *texts):
        stay = [row for row, (text, _) in enumerate(self.rows) if text not in texts]
        self.rows = [self.rows[row] for row in stay]
        keep_rows(self.cache, stay, max(seen for _, seen in self.rows))

    def step(self, count=1):
        for _ in range(count):
            seen = torch.tensor([seen for _, seen in self.rows])
            width = int(seen.max())
            ids = torch.stack([TEXTS[text][0, seen : seen + 1] for text, seen in self.rows])
            mask = (torch.arange(width + 1) >= width - seen[:, None]).long()
            with torch.no_grad():
                logits = self.model(
                    ids, use_cache=True, attention_mask=mask, position_ids=seen[:, None], **{CACHE: self.cache}
                ).logits[:, 0]
            expected = torch.stack([self.expected[text][seen] for text, seen in self.rows])
            assert_close(logits, expected, atol=2e-4, rtol=2e-4)
            self.rows = [(text, seen + 1) for text, seen in self.rows]


def go_through(model):
    batch = Batch(model)
    batch.join(0, 1)
    batch.step(3)
    batch.join(2)
    batch.step(9)  # over a chunk's end in every row
    batch.leave(1)
    batch.step()
    batch.join(3)
    batch.step()
    batch.leave(0, 3)
    batch.step(5)
    return batch


@CONFIG
def test_each_row_goes_on_as_if_it_were_alone(config):
    go_through(converted("llama", CONFIGS[config]))


HEADS_OF_THEIR_OWN = {(0, 0): 0, (0, 1): 5, (1, 0): 9, (1, 1): 3}


def test_heads_that_keep_different_numbers_of_keys():
    config = hf_rfa.RFAConfig(window=8, num_features=16, sink_tokens=2, head_kept_keys=HEADS_OF_THEIR_OWN)
    go_through(converted("llama", config))


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "opt", "gemma3", "gpt_oss", "deepseek_v3", "qwen3"])
@pytest.mark.parametrize("exact", [False, True], ids=["linear", "exact head"])
def test_families(family, exact):
    config = hf_rfa.RFAConfig(window=8, num_features=16, sink_tokens=2, softmax_heads=[(1, 0)] if exact else None)
    go_through(converted(family, config))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "gpt_oss"])
def test_models_that_are_not_converted(family):
    batch = go_through(build(family))
    assert batch.cache.layers[0].keys.shape[2] == batch.rows[0][1]  # nothing is left of the rows that have gone


def test_a_row_that_leaves_takes_its_memory_with_it():
    model = converted("llama", CONFIGS["exact head"])
    batch = go_through(model)
    ((text, seen),) = batch.rows
    alone = prefilled(model, TEXTS[text], seen)
    assert hf_rfa.cache_bytes(batch.cache) == hf_rfa.cache_bytes(alone)


def test_what_was_stacked_is_not_changed():
    model = converted("llama", SHORT)
    caches = [prefilled(model, TEXTS[text], LENGTHS[text]) for text in (0, 1)]
    before = copy.deepcopy([cache.layers[0].state for cache in caches])
    batch = Batch(model)
    batch.cache, batch.rows = stack_caches(caches), [(text, LENGTHS[text]) for text in (0, 1)]
    batch.step(10)
    for cache, state in zip(caches, before, strict=True):
        assert torch.equal(cache.layers[0].state.near_key, state.near_key)
        assert cache.layers[0].state.count.tolist() == state.count.tolist()


def test_recurrent_layers_are_refused():
    model = converted("jamba", SHORT)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(TEXTS[0], use_cache=True, **{CACHE: cache})
    with pytest.raises(UnsupportedModelError, match="Texts of different lengths cannot share a batch in cache layers"):
        stack_caches([cache, cache])


def test_states_of_two_conversions_do_not_share_a_batch():
    one, two = (converted("llama", hf_rfa.RFAConfig(window=8, num_features=16, seed=seed)) for seed in (0, 1))
    with pytest.raises(StaleStateError, match="filled by different conversions"):
        stack_caches([prefilled(model, TEXTS[0], 3) for model in (one, two)])


def test_a_cache_that_records_its_past_is_refused():
    cache = prefilled(converted("llama", SHORT), TEXTS[0], 3)
    cache.activate_past_recording()
    with pytest.raises(UnsupportedModelError, match="records its past"):
        stack_caches([cache, cache])
