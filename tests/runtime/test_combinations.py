"""Everything with everything, at random: padding, packing, exact heads, kept keys, caches, redraws, checkpointing.

Each seed is one combination. What a document comes to does not depend on what is beside it, on how it is cut into
forwards, or on whether layers run once or twice.
"""

import random

import pytest
import torch
from conversions import converted
from families import CACHE, checkpoint_activations, outputs_of, token_ids
from torch.testing import assert_close
from transformers import DynamicCache

import hf_rfa
from hf_rfa import RFAConfig
from hf_rfa.runtime.adapters import named_adapters

SEEDS = range(20)
FAMILIES = ["llama", "gemma3", "gpt_oss", "deepseek_v3", "gpt2"]
PACKED = [family for family in FAMILIES if family != "gpt_oss"]  # in which Transformers packs nothing
#: Key heads of each layer; of Gemma 3 and gpt-oss the first layer has a sliding window and is not converted.
LOCAL = ("gemma3", "gpt_oss")
HEADS = {"llama": 2, "gemma3": 2, "gpt_oss": 2, "deepseek_v3": 4, "gpt2": 4}


def random_config(rng, family, **settings):
    window = rng.choice([4, 8, 12])
    first = 1 if family in LOCAL else 0
    heads = [(layer, head) for layer in range(first, 2) for head in range(HEADS[family])]
    values = {
        "feature_map": rng.choice(["hyperbolic", "positive", "trigonometric", "optimal_positive"]),
        "num_features": rng.choice([4, 16]),
        "window": window,
        "sink_tokens": rng.choice([0, 1, window]),
        "softmax_heads": rng.choice([None, rng.sample(heads, 1), rng.sample(heads, len(heads) // 2), heads]),
        "alpha": rng.choice([0.0, 0.25, 1.0]),
        "gamma": rng.choice([0.5, 1.0]),
        "seed": rng.randrange(9),
        "kept_keys": rng.choice([0, 3, 20]),
    }
    return RFAConfig(**{**values, **settings})


def random_padding(rng, rows, length, inside=True):
    """Rows of all kinds: whole, padded on the left, on the right, or at random places inside."""
    mask = torch.ones(rows, length, dtype=torch.int64)
    for row in mask:
        cut, kind = rng.randrange(1, length - 2), rng.choice(["none", "left", "right", *["inside"] * inside])
        if kind == "left":
            row[:cut] = 0
        elif kind == "right":
            row[cut:] = 0
        elif kind == "inside":
            row[rng.sample(range(length - 1), length // 3)] = 0
    return mask


def alone(model, ids, mask):
    """Each row without its padding, by itself; at the places that it has in the row."""
    found = None
    for number, (row, kept) in enumerate(zip(ids, mask.bool(), strict=True)):
        logits = outputs_of(model, {"input_ids": row[kept][None], "use_cache": False})[0]
        found = logits.new_zeros(*ids.shape, logits.shape[-1]) if found is None else found
        found[number, kept] = logits
    return found


def in_random_pieces(rng, model, ids, mask):
    """Forwards over pieces of one and of many tokens that share a cache, some of them taken back and done again."""
    cache, start, logits = DynamicCache(config=model.config), 0, []
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    recording = rng.random() < 0.5
    if recording:
        cache.activate_past_recording()
    while start < ids.shape[1]:
        stop = min(ids.shape[1], start + rng.choice([1, 1, 2, 7, 20]))
        options = {CACHE: cache, "attention_mask": mask[:, :stop], "position_ids": positions[:, start:stop]}
        for again in range(rng.choice([1, 2]) if recording else 1):
            if again:
                cache.crop(start - stop)
            output = outputs_of(model, {"input_ids": ids[:, start:stop], **options})
        if recording:
            cache.crop(0)
        logits.append(output)
        start = stop
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_row_does_not_depend_on_its_neighbours_or_on_how_it_is_cut(seed):
    rng = random.Random(seed)
    family = rng.choice(FAMILIES)
    model = converted(family, random_config(rng, family))
    ids = token_ids(3, rng.choice([9, 40, 61]), seed=seed)
    mask = random_padding(rng, *ids.shape, inside=family not in LOCAL)  # whose windows count padding, too
    want, seen = alone(model, ids, mask), mask.bool()
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    whole = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "use_cache": False}
    assert_close(outputs_of(model, whole)[seen], want[seen], atol=5e-5, rtol=1e-4)
    # A row whose first tokens are padding has no key at all in a piece of them: what such tokens say is nobody's.
    assert_close(in_random_pieces(rng, model, ids, mask)[seen], want[seen], atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_document_does_not_depend_on_those_packed_with_it(seed):
    rng = random.Random(100 + seed)
    family = rng.choice(PACKED)
    model = converted(family, random_config(rng, family))
    lengths = [rng.choice([1, 2, 3, 5, 8, 17, 33]) for _ in range(6)]
    documents = [token_ids(2, length, seed=number) for number, length in enumerate(lengths)]
    positions = torch.cat([torch.arange(length) for length in lengths]).expand(2, -1)
    packed = outputs_of(
        model, {"input_ids": torch.cat(documents, dim=1), "position_ids": positions, "use_cache": False}
    )
    want = torch.cat([outputs_of(model, {"input_ids": one, "use_cache": False}) for one in documents], dim=1)
    assert_close(packed, want, atol=5e-5, rtol=1e-4)


def training_run(rng, family, config, reentrant, draws):
    """Two forwards, one backward, a redraw on schedule; losses and gradients."""
    model = converted(family, config).train()
    if reentrant is not None:
        checkpoint_activations(model, use_reentrant=reentrant)
        model.enable_input_require_grads()
    callback, losses = hf_rfa.ResampleCallback(), []
    for step in range(2):
        for number in range(2):
            ids = token_ids(2, 40, seed=10 * step + number)
            options = {"attention_mask": random_padding(random.Random(number), *ids.shape)}
            if number and family in PACKED:
                options = {"position_ids": (torch.arange(40) % 11).expand(2, -1)}
            losses.append(model(ids, labels=ids, use_cache=False, **options).loss)
        sum(losses[-2:]).backward()
        callback.step(model)
        draws.append(next(adapter.draw_number for _, _, adapter in named_adapters(model)))
    return torch.stack(losses).detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("seed", SEEDS)
def test_layers_that_run_again_in_the_backward_pass_change_nothing(seed):
    rng = random.Random(200 + seed)
    family, reentrant = rng.choice(FAMILIES), rng.random() < 0.5
    resample = rng.choice(["never", "forward", 1])
    config = random_config(rng, family, resample=resample)
    first, second = [], []
    losses, want = training_run(rng, family, config, None, first)
    losses_again, got = training_run(rng, family, config, reentrant, second)
    assert first == second == {"never": [0, 0], "forward": [2, 4], 1: [1, 2]}[resample]
    assert torch.equal(losses_again, losses)
    assert got.keys() == want.keys()
    for name, gradient in want.items():
        assert_close(got[name], gradient, atol=1e-5 * float(gradient.abs().max()) + 1e-8, rtol=1e-4)
