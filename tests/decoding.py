"""Ways to decode a text, and the definition that they are held to."""

import copy
import dataclasses

import pytest
import torch
from families import CACHE, SHORT, outputs_of, token_ids

import hf_rfa
from hf_rfa.runtime.arguments import cache_of

NEW = 24  # tokens: three windows of 8
#: Conversions that decode in different ways.
CONFIGS = {
    "linear": SHORT,
    "exact head": dataclasses.replace(SHORT, softmax_heads=[(1, 0)]),
    "pure": dataclasses.replace(SHORT, window=0),
    "trigonometric": dataclasses.replace(SHORT, feature_map="trigonometric"),
    "kept keys": dataclasses.replace(SHORT, kept_keys=5),
}
CONFIG = pytest.mark.parametrize("config", CONFIGS)


def positions(mask):
    return (mask.cumsum(1) - 1).clamp_min(0)


def whole(model, ids):
    """The logits of all tokens, without a cache."""
    return outputs_of(model, {"input_ids": ids, "use_cache": False})


def prefilled(model, ids):
    """The cache of a forward over the tokens."""
    with torch.no_grad():
        return cache_of(model(ids, use_cache=True))


def one_by_one(model, cache, ids, start):
    """The logits of the tokens from `start` on, each in a forward of its own."""
    with torch.no_grad():
        steps = [model(ids[:, i : i + 1], use_cache=True, **{CACHE: cache}).logits for i in range(start, ids.shape[1])]
    return torch.cat(steps, dim=1)


def continue_greedily(model, ids, count=NEW, mask=None):
    """The definition: the whole text goes through the model for every new token, without a cache."""
    for _ in range(count):
        options = {} if mask is None else {"attention_mask": mask, "position_ids": positions(mask)}
        logits = outputs_of(model, {"input_ids": ids, "use_cache": False, **options})
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
        mask = None if mask is None else torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    return ids


def generate(model, ids, count=NEW, **options):
    return model.generate(ids, **{"do_sample": False, "max_new_tokens": count, **options})


def in_pieces(model, ids, lengths, cache=None, mask=None):
    """Logits of forwards over consecutive pieces of the text that share a cache, and the cache."""
    logits, start = [], 0
    for length in lengths:
        options = {}
        if mask is not None:
            seen = mask[:, : start + length]
            options = {"attention_mask": seen, "position_ids": positions(seen)[:, start:]}
        with torch.no_grad():
            output = model(ids[:, start : start + length], **{CACHE: cache}, use_cache=True, **options)
        logits.append(output.logits)
        cache, start = cache_of(output), start + length
    return torch.cat(logits, dim=1), cache


LEFT_PADDING = (23, 0, 9)  # tokens a row


def left_padded(length=70):
    ids = token_ids(len(LEFT_PADDING), length)
    mask = (torch.arange(length) >= torch.tensor(LEFT_PADDING)[:, None]).long()
    return ids.where(mask.bool(), 2), mask


def disturbed(model, seed=1):
    """A model that agrees with this one often, but not always."""
    twin = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(0.1 * parameter.std() * torch.randn(parameter.shape, generator=generator))
    return twin


def assistant_of(model, kind):
    """An assistant that always drafts as many tokens as it may.

    By default it stops where its confidence falls below a threshold, which Transformers moves if scikit-learn happens
    to be installed: the number of drafted tokens, and with it what is tested, would depend on the environment.
    """
    assert kind in ("itself", "converted", "unconverted")
    helper = copy.deepcopy(model) if kind == "itself" else disturbed(model)
    if kind == "unconverted":
        hf_rfa.revert(helper)
    helper.generation_config.assistant_confidence_threshold = 0
    return helper


def rest_of(model, cache, ids, seen):
    with torch.no_grad():
        return model(ids[:, seen:], **{CACHE: cache}).logits
