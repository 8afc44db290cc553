"""What Transformers asks of every model that generates, in our own words and beyond test_generation.py."""

import copy

import pytest
import torch
from conversions import converted
from families import CACHE, outputs_of, token_ids
from torch.testing import assert_close

from hf_rfa import UnsupportedModelError
from hf_rfa.runtime.arguments import cache_of

# Grouped queries; learned positions; sliding layers; sinks and experts; values of another dim; a recurrent hybrid.
FAMILIES = ["llama", "gpt2", "gemma3", "gpt_oss", "deepseek_v3", "jamba"]
SIX = pytest.mark.parametrize("family", FAMILIES)
CROPPABLE = pytest.mark.parametrize("family", [family for family in FAMILIES if family != "jamba"])
NEW = 12


def generate(model, **options):
    return model.generate(**{"do_sample": False, "max_new_tokens": NEW, **options})


@SIX
def test_generation_from_embeddings_is_generation_from_tokens(family):
    model, ids = converted(family), token_ids()
    embeddings = model.get_input_embeddings()(ids)
    from_tokens = generate(model, input_ids=ids)
    assert torch.equal(generate(model, inputs_embeds=embeddings), from_tokens[:, 70:])
    assert torch.equal(generate(model, input_ids=ids, inputs_embeds=embeddings), from_tokens)
    other = generate(model, inputs_embeds=embeddings.flip(1))
    assert not torch.equal(other, from_tokens[:, 70:])


@SIX
def test_embeddings_of_a_left_padded_batch(family):
    model, ids = converted(family), token_ids()
    mask = (torch.arange(70) >= torch.tensor([[23], [0]])).long()
    got = generate(model, inputs_embeds=model.get_input_embeddings()(ids), attention_mask=mask)
    for row, padding in enumerate((23, 0)):
        assert torch.equal(got[row], generate(model, input_ids=ids[row : row + 1, padding:])[0, 70 - padding :])


@SIX
def test_the_scores_of_beams_are_those_without_a_cache(family):
    model, ids = converted(family), token_ids()
    options = {"num_beams": 3, "return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    cached, uncached = (generate(model, input_ids=ids, use_cache=use, **options) for use in (True, False))
    assert torch.equal(cached.sequences, uncached.sequences)
    assert torch.equal(cached.beam_indices, uncached.beam_indices)
    assert_close(cached.sequences_scores, uncached.sequences_scores, atol=1e-5, rtol=0)
    assert_close(torch.stack(cached.logits), torch.stack(uncached.logits), atol=1e-4, rtol=0)
    transitions = model.compute_transition_scores(cached.sequences, cached.scores, cached.beam_indices)
    assert_close(transitions.sum(1) / NEW, cached.sequences_scores, atol=1e-5, rtol=0)


@CROPPABLE
def test_assisted_and_prompt_lookup_are_greedy(family):
    model, span = converted(family), token_ids(1, 20)
    ids = torch.cat([span, token_ids(1, 15, seed=1), span, span], dim=1)
    want = generate(model, input_ids=ids)
    assert torch.equal(generate(model, input_ids=ids, prompt_lookup_num_tokens=4), want)
    assert torch.equal(generate(model, input_ids=ids, assistant_model=copy.deepcopy(model)), want)


@SIX
def test_generation_in_two_goes_is_generation_in_one(family):
    """The second go is handed the cache of the first, its tokens and nothing more."""
    model, ids = converted(family), token_ids()
    options = {"return_dict_in_generate": True, "output_logits": True}
    whole = generate(model, input_ids=ids, **options)
    first = generate(model, input_ids=ids, max_new_tokens=5, **options)
    assert cache_of(first).get_seq_length() == 74  # the last token has not been seen
    second = generate(model, input_ids=first.sequences, **{CACHE: cache_of(first)}, max_new_tokens=NEW - 5, **options)
    assert torch.equal(second.sequences, whole.sequences)
    assert_close(torch.stack(first.logits + second.logits), torch.stack(whole.logits), atol=1e-4, rtol=0)


@CROPPABLE
def test_several_tokens_on_a_cache_are_the_same_tokens_one_by_one(family):
    model, ids = converted(family), token_ids()
    with torch.no_grad():
        caches = [cache_of(model(ids[:, :40], use_cache=True)) for _ in range(2)]
        at_once = model(ids[:, 40:], **{CACHE: caches[0]}).logits
        singly = [model(ids[:, i : i + 1], **{CACHE: caches[1]}).logits for i in range(40, 70)]
    assert_close(at_once, torch.cat(singly, dim=1), atol=2e-5, rtol=0)
    assert caches[0].get_seq_length() == caches[1].get_seq_length() == 70


@SIX
def test_logits_of_the_last_tokens_alone(family):
    model, ids = converted(family), token_ids()
    whole = outputs_of(model, {"input_ids": ids, "use_cache": False})
    for kept in (1, 3, torch.tensor([5, 60])):
        some = outputs_of(model, {"input_ids": ids, "use_cache": False, "logits_to_keep": kept})
        assert_close(some, whole[:, kept] if isinstance(kept, torch.Tensor) else whole[:, -kept:], atol=1e-5, rtol=0)


@SIX
def test_hidden_states_of_generated_tokens_are_those_of_the_whole_text(family):
    model, ids = converted(family), token_ids()
    out = generate(model, input_ids=ids, return_dict_in_generate=True, output_hidden_states=True)
    with torch.no_grad():
        whole = model(out.sequences, use_cache=False, output_hidden_states=True).hidden_states
    for layer, want in enumerate(whole):
        got = torch.cat([step[layer] for step in out.hidden_states], dim=1)
        assert_close(got, want[:, :-1], atol=1e-4, rtol=0, msg=f"layer {layer}")


@SIX
def test_generated_attention_weights_are_refused(family):
    model = converted(family)
    with pytest.raises(UnsupportedModelError, match="output_attentions"):
        generate(model, input_ids=token_ids(), output_attentions=True, return_dict_in_generate=True)
    assert generate(model, input_ids=token_ids()).shape == (2, 70 + NEW)


def test_a_stop_string_and_a_streamer_see_the_same_tokens():
    class Collector:
        def __init__(self):
            self.tokens = []

        def put(self, value):
            self.tokens.extend(value.flatten().tolist())

        def end(self):
            self.tokens.append(None)

    model, ids, collector = converted(), token_ids(1), Collector()
    want = generate(model, input_ids=ids)
    assert torch.equal(generate(model, input_ids=ids, streamer=collector), want)
    assert collector.tokens == [*want[0].tolist(), None]
    eos = int(want[0, 75])
    stopped = generate(model, input_ids=ids, eos_token_id=eos)
    assert torch.equal(stopped, want[:, : 71 + want[0, 70:].tolist().index(eos)])
