"""Decoding steps of a converted model get the newest column of the padding mask and position ids, and nothing else."""

import pytest
import torch
from conversions import converted
from decoding import CONFIGS, NEW, assistant_of, continue_greedily, generate, left_padded
from families import token_ids
from transformers import StoppingCriteria, StoppingCriteriaList

from hf_rfa.runtime.newest_tokens import running

ONE, WHOLE = {1}, set(range(71, 70 + NEW))
CASES = {  # family, conversion, options of generate, widths of the masks after the prefill
    "greedy": ("llama", "linear", {}, ONE),
    "sampling": ("llama", "linear", {"do_sample": True}, ONE),
    "several sequences": ("llama", "linear", {"do_sample": True, "num_return_sequences": 2}, ONE),
    "returned as a dictionary": ("llama", "kept keys", {"return_dict_in_generate": True, "output_scores": True}, ONE),
    "an exact head": ("llama", "exact head", {}, ONE),
    "beams": ("llama", "linear", {"num_beams": 2}, WHOLE),
    "sliding layers": ("gemma3", "linear", {}, WHOLE),
    "no cache": ("llama", "linear", {"use_cache": False}, WHOLE),
}


@pytest.mark.parametrize("case", CASES)
def test_masks_and_positions_of_steps(case):
    family, config, options, widths = CASES[case]
    model, (ids, mask) = converted(family, CONFIGS[config]), left_padded()
    seen = []

    def look(_, args, kwargs):
        seen.append((kwargs["attention_mask"].shape[1], kwargs["position_ids"][:, -1].tolist()))

    handle = model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        torch.manual_seed(0)
        tokens = generate(model, ids, attention_mask=mask, **options)
    finally:
        handle.remove()
    assert seen[0][0] == ids.shape[1]
    assert {width for width, _ in seen[1:]} == widths
    copies = len(seen[0][1]) // len(ids)
    last = (mask.sum(1) - 1).repeat_interleave(copies)
    assert [found for _, found in seen] == [(last + step).tolist() for step in range(NEW)]
    tokens = getattr(tokens, "sequences", tokens)
    if not options.get("do_sample") and "num_beams" not in options:
        assert torch.equal(tokens, continue_greedily(model, ids, mask=mask))


class SeesAll(StoppingCriteria):
    """Stops once this many tokens are there, all of which it must be shown."""

    def __init__(self, ids, count):
        self.ids, self.count = ids, count

    def __call__(self, input_ids, scores, **kwargs):
        assert torch.equal(input_ids[:, : self.ids.shape[1]], self.ids)
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.count)


def test_processors_and_stopping_criteria_see_all_ids():
    model, (ids, mask) = converted(), left_padded()
    plain = generate(model, ids, attention_mask=mask)
    lengths = []

    def note(input_ids, scores):
        assert torch.equal(input_ids[:, :70], ids)
        lengths.append(input_ids.shape[1])
        return scores

    stop = StoppingCriteriaList([SeesAll(ids, 80)])
    tokens = generate(model, ids, attention_mask=mask, logits_processor=[note], stopping_criteria=stop)
    assert lengths == list(range(70, 80))
    assert torch.equal(tokens, plain[:, :80])
    # They compare new tokens with all earlier ones.
    penalised, uncached = (
        generate(model, ids, attention_mask=mask, repetition_penalty=1.7, use_cache=use) for use in (True, False)
    )
    assert torch.equal(penalised, uncached)


@pytest.mark.parametrize("kind", ["itself", "unconverted"])
def test_assisted_decoding_keeps_whole_masks(kind):
    model, ids = converted(), token_ids(1)
    want = continue_greedily(model, ids)
    assert torch.equal(generate(model, ids, assistant_model=assistant_of(model, kind)), want)
    assert torch.equal(generate(model, ids, prompt_lookup_num_tokens=3), want)


def test_nothing_is_left_behind():
    model, ids = converted(), token_ids(1)
    generate(model, ids)
    assert running.get() is None
    updated = model._update_model_kwargs_for_generation(
        {}, {"attention_mask": torch.ones(1, 9), "position_ids": torch.arange(9)[None]}
    )
    assert [updated[name].shape[1] for name in ("attention_mask", "position_ids")] == [10, 10]
