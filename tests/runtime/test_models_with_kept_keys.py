"""Converted models that keep far keys: every way to use them equals the forward without a cache."""

import copy
import dataclasses
import functools
import inspect
import json
import pickle

import pytest
import torch
from conversions import converted, same_outputs
from decoding import (
    LEFT_PADDING,
    assistant_of,
    continue_greedily,
    generate,
    in_pieces,
    left_padded,
    one_by_one,
    positions,
    prefilled,
    rest_of,
    whole,
)
from families import (
    CACHE,
    SHORT,
    attention_modules,
    build,
    checkpoint_activations,
    llama,
    outputs_of,
    token_ids,
)
from tiny_models import Case, tiny_model
from torch.testing import assert_close
from transformers import DynamicCache

import hf_rfa
from hf_rfa import StaleStateError, UnsupportedModelError
from hf_rfa.runtime.arguments import cache_of
from hf_rfa.runtime.attention_call import shares_keys
from hf_rfa.runtime.record import original_class

LENGTH, NEW = 70, 18
#: Fewer and more kept keys than a window has tokens.
CONFIGS = {
    "3": dataclasses.replace(SHORT, kept_keys=3),
    "20": dataclasses.replace(SHORT, kept_keys=20),
    "3 and an exact head": dataclasses.replace(SHORT, kept_keys=3, softmax_heads=[(1, 0)]),
    "20, window 16": dataclasses.replace(SHORT, kept_keys=20, window=16, feature_map="trigonometric"),
    "other numbers": dataclasses.replace(SHORT, kept_keys=3, head_kept_keys={(0, 1): 20, (1, 0): 0}),
    "3 with a gate": dataclasses.replace(SHORT, kept_keys=3, gate=True),
}
#: Grouped queries, two norms of queries and keys, a sliding layer, learned sink logits, values of another dim.
FAMILIES = ["llama", "qwen3", "gemma3", "gpt_oss", "deepseek_v3"]
#: Their last layers attend to the keys of earlier ones, whose queries are others.
SHARING = {
    "gemma3n": Case("causal_lm", "gemma3n_text", "Gemma3nForCausalLM"),
    "gemma4": Case("causal_lm", "gemma4_text", "Gemma4ForCausalLM"),
}
GRID = pytest.mark.parametrize(
    ("family", "config"),
    [
        *(("llama", config) for config in CONFIGS),
        *((f, c) for f in FAMILIES[1:] for c in ("3 and an exact head", "20")),
    ],
)
CONFIG = pytest.mark.parametrize("config", CONFIGS)
FAMILY = pytest.mark.parametrize("family", FAMILIES)
KEEPING = CONFIGS["3 and an exact head"]


@functools.cache
def keeping(family="llama", config="3 and an exact head"):
    """One that no test changes."""
    return converted(family, CONFIGS[config])


@functools.cache
def expected_greedy(family, config, batch=2):
    return continue_greedily(keeping(family, config), token_ids(batch, LENGTH), NEW)


def kept_positions(cache):
    return [head.positions for head in hf_rfa.kept_tokens(cache).heads]


# --- one answer for every split --------------------------------------------------------------------------------------


@GRID
def test_prefill_and_single_tokens_equal_the_whole(family, config):
    model, ids = keeping(family, config), token_ids(2, LENGTH)
    expected = whole(model, ids)
    cache = prefilled(model, ids[:, :13])
    assert_close(one_by_one(model, cache, ids, 13), expected[:, 13:], atol=5e-5, rtol=0)
    assert kept_positions(cache) == kept_positions(prefilled(model, ids))


@GRID
def test_chunked_prefill(family, config):
    model, ids = keeping(family, config), token_ids(2, LENGTH)
    logits, _ = in_pieces(model, ids, [19, 1, 13, 8, 24, 5])
    assert_close(logits, whole(model, ids), atol=5e-5, rtol=0)


@GRID
def test_greedy(family, config):
    tokens = generate(keeping(family, config), token_ids(2, LENGTH), NEW)
    assert torch.equal(tokens, expected_greedy(family, config))
    assert len(tokens[:, LENGTH:].unique()) > 2  # not one token for ever


@FAMILY
def test_kept_keys_matter(family):
    ids = token_ids(2, LENGTH)
    without = whole(converted(family, softmax_heads=KEEPING.softmax_heads), ids)
    assert not torch.allclose(whole(keeping(family), ids), without, atol=1e-3)


def test_enough_kept_keys_are_softmax():
    ids = token_ids(2, LENGTH)
    model = converted(kept_keys=LENGTH)
    assert_close(whole(model, ids), whole(build("llama"), ids), atol=2e-4, rtol=0)
    assert_close(in_pieces(model, ids, [33, 1, 1, 35])[0], whole(build("llama"), ids), atol=2e-4, rtol=0)


@pytest.mark.parametrize("size", [1, 13])
def test_generation_with_chunked_prefill(size):
    tokens = generate(keeping(), token_ids(2, LENGTH), NEW, prefill_chunk_size=size)
    assert torch.equal(tokens, expected_greedy("llama", "3 and an exact head"))


def test_a_conversation():
    model, ids, cache = keeping(), token_ids(1, 30), None
    for turn in range(3):
        out = generate(model, ids, 11, **{CACHE: cache}, return_dict_in_generate=True)
        assert torch.equal(out.sequences, continue_greedily(model, ids, 11)), f"turn {turn}"
        cache = cache_of(out)
        ids = torch.cat([out.sequences, token_ids(1, 13, seed=10 + turn)], dim=1)


# --- batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", ["20", "3 and an exact head", "other numbers", "3 with a gate"])
def test_a_left_padded_batch_equals_its_rows(config):
    model = keeping("llama", config)
    ids, mask = left_padded()
    tokens = generate(model, ids, NEW, attention_mask=mask)
    assert torch.equal(tokens, continue_greedily(model, ids, NEW, mask=mask))
    logits = outputs_of(model, {"input_ids": ids, "attention_mask": mask, "position_ids": positions(mask)})
    for row, padding in enumerate(LEFT_PADDING):
        alone = ids[row : row + 1, padding:]
        assert_close(logits[row : row + 1, padding:], whole(model, alone), atol=5e-5, rtol=0)
        assert torch.equal(tokens[row, 70:], generate(model, alone, NEW)[0, 70 - padding :])


@FAMILY
def test_beams(family):
    model, ids = keeping(family), token_ids(2, 40)
    cached, uncached = (generate(model, ids, NEW, num_beams=3, use_cache=use) for use in (True, False))
    assert torch.equal(cached, uncached)
    assert not torch.equal(cached, generate(model, ids, NEW))


REARRANGEMENTS = {
    "select": (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
    "repeat": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1]),
    "reorder": (lambda cache: cache.reorder_cache(torch.tensor([1, 1])), [1, 1]),
}


@pytest.mark.parametrize("config", ["3 and an exact head", "other numbers"])
@pytest.mark.parametrize("decoding", [False, True], ids=["prefilled", "decoding"])
@pytest.mark.parametrize(("rearrange", "rows"), REARRANGEMENTS.values(), ids=REARRANGEMENTS)
def test_a_cache_whose_rows_are_rearranged(rearrange, rows, decoding, config):
    model, ids = keeping("llama", config), token_ids(2, LENGTH)
    expected = whole(model, ids[rows])[:, 53:]
    cache = prefilled(model, ids[:, : 50 if decoding else 53])
    if decoding:
        one_by_one(model, cache, ids[:, :53], 50)
    rearrange(cache)
    assert_close(one_by_one(model, cache, ids[rows], 53), expected, atol=5e-5, rtol=0)


@pytest.mark.parametrize("config", ["3", "20", "other numbers", "3 with a gate"])
def test_packed_documents_keep_keys_of_their_own(config):
    model, parts = keeping("llama", config), [token_ids(1, n, seed=n) for n in (45, 9, 50)]
    packed = torch.cat([torch.arange(part.shape[1]) for part in parts])[None]
    logits = outputs_of(model, {"input_ids": torch.cat(parts, 1), "position_ids": packed, "use_cache": False})
    assert_close(logits, torch.cat([whole(model, part) for part in parts], dim=1), atol=5e-5, rtol=0)


# --- taking tokens back ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["itself", "converted", "unconverted"])
def test_assisted(kind):
    model, ids = keeping(), token_ids(1, LENGTH)
    helper = assistant_of(converted(config=KEEPING), kind)
    helper.generation_config.num_assistant_tokens = 5
    want = expected_greedy("llama", "3 and an exact head", 1)
    assert torch.equal(generate(model, ids, NEW, assistant_model=helper), want)


@pytest.mark.parametrize("config", ["3", "20", "20, window 16"])
def test_prompt_lookup(config):
    model, ids = keeping("llama", config), token_ids(1, 24).repeat(1, 3)
    looked_up = generate(model, ids, NEW, prompt_lookup_num_tokens=5)
    assert torch.equal(looked_up, generate(model, ids, NEW))


@pytest.mark.parametrize("config", ["3 and an exact head", "other numbers"])
@pytest.mark.parametrize("taken_back", [1, 9, 17, 20])
def test_crop(taken_back, config):
    model, ids = keeping("llama", config), token_ids(2, LENGTH)
    cache = prefilled(model, ids[:, :40])
    cache.activate_past_recording()
    for start, stop in ((40, 55), (55, 60)):
        with torch.no_grad():
            model(token_ids(2, LENGTH, seed=1)[:, start:stop], **{CACHE: cache})
    cache.crop(-20)
    rest_of(model, cache, ids[:, :60], 40)
    cache.crop(-taken_back)
    assert_close(
        rest_of(model, cache, ids, 60 - taken_back), whole(model, ids)[:, 60 - taken_back :], atol=5e-5, rtol=0
    )


# --- layers that share keys ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", ["3", "20"])
@pytest.mark.parametrize("family", SHARING)
def test_layers_that_attend_to_earlier_keys(family, config):
    """Their own queries decide what they keep, so that they need those of all tokens, whichever logits are wanted."""
    model, ids = converted(tiny_model(SHARING[family]), CONFIGS[config]), token_ids(2, LENGTH, vocabulary=60)
    assert any(shares_keys(module) for module in attention_modules(model))
    expected = whole(model, ids)
    cache = prefilled(model, ids[:, :40])
    assert_close(one_by_one(model, cache, ids, 40), expected[:, 40:], atol=5e-5, rtol=0)
    with torch.no_grad():
        last = model(ids, use_cache=True, logits_to_keep=1)
    assert_close(last.logits, expected[:, -1:], atol=5e-5, rtol=0)
    assert kept_positions(cache_of(last)) == kept_positions(cache)
    assert torch.equal(generate(model, ids, NEW), continue_greedily(model, ids, NEW))


def test_a_layer_that_is_asked_for_the_last_tokens_alone_is_refused():
    """As it would be by a forward that does not know of the conversion; the model's own asks for all."""
    model, ids = converted(tiny_model(SHARING["gemma4"]), CONFIGS["3"]).model, token_ids(2, LENGTH, vocabulary=60)
    options = {"input_ids": ids, "use_cache": False, "logits_to_keep": 1}
    assert outputs_of(model, options).shape[1] == LENGTH
    if "logits_to_keep" in inspect.signature(original_class(model).forward).parameters:  # since Transformers 5.24
        with pytest.raises(UnsupportedModelError, match=r"Got those of the last 1 of 70"), torch.no_grad():
            original_class(model).forward(model, **options)


# --- the cache -------------------------------------------------------------------------------------------------------


def test_bytes_do_not_depend_on_the_length():
    model = converted(config=CONFIGS["20"])
    short, long = (hf_rfa.cache_bytes(prefilled(model, token_ids(2, n))) for n in (70, 200))
    assert short == long
    without = hf_rfa.cache_bytes(prefilled(converted(), token_ids(2, 70)))
    layers, rows, heads, groups, dim, kept, window = 2, 2, 2, 2, 8, 20, 8
    keys_and_values, places, decays, mass = 2 * kept * dim * 4, kept * 8, kept * 4, groups * (kept + 2 * window) * 4
    assert short - without == layers * rows * heads * (keys_and_values + places + decays + mass)


def test_a_decoding_cache_has_the_bytes_of_a_prefilled_one():
    model, ids = converted(config=CONFIGS["20"]), token_ids(2, LENGTH)
    cache = prefilled(model, ids[:, :50])
    one_by_one(model, cache, ids, 50)
    assert hf_rfa.cache_bytes(cache) == hf_rfa.cache_bytes(prefilled(model, ids))


@pytest.mark.parametrize(
    "changes", [{"kept_keys": 0}, {"kept_keys": 20}, {"kept_keys": 3, "head_kept_keys": {(0, 1): 20}}], ids=str
)
def test_a_cache_of_another_number_of_kept_keys_is_refused(changes):
    cache, ids = prefilled(keeping("llama", "3"), token_ids(2, 50)), token_ids(2, LENGTH)
    for stop in (51, LENGTH):
        with pytest.raises(StaleStateError, match="kept keys"):
            rest_of(converted(**changes), cache, ids[:, :stop], 50)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
@pytest.mark.parametrize("decoding", [False, True], ids=["prefilled", "decoding"])
def test_a_copy_of_a_cache_goes_on(copied, decoding):
    model, ids = keeping(), token_ids(2, LENGTH)
    cache = prefilled(model, ids[:, : 48 if decoding else 50])
    if decoding:
        one_by_one(model, cache, ids[:, :50], 48)
    twin = copied(cache)
    assert hf_rfa.kept_tokens(twin) == hf_rfa.kept_tokens(cache)
    rest_of(model, cache, token_ids(2, 90, seed=3), 50)  # what the original does next is no business of the copy
    assert_close(one_by_one(model, twin, ids, 50), whole(model, ids)[:, 50:], atol=5e-5, rtol=0)


def test_a_filled_plain_cache_is_refused_for_it_has_no_queries():
    cache = prefilled(build("llama"), token_ids(2, 50))
    assert type(cache) is DynamicCache
    with pytest.raises(UnsupportedModelError, match=r"not their queries.*kept_keys=0"):
        rest_of(keeping(), cache, token_ids(2, LENGTH), 50)


# --- saving, changing ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", ["3 and an exact head", "other numbers"])
def test_a_saved_model_keeps_the_same_keys(tmp_path, config):
    model = converted(config=CONFIGS[config])
    hf_rfa.save_pretrained(model, tmp_path)
    loaded = hf_rfa.from_pretrained(tmp_path)
    assert loaded.config.rfa_config["kept_keys"] == 3
    assert loaded.config.rfa_config["head_kept_keys"] == model.config.rfa_config["head_kept_keys"]
    assert same_outputs(loaded, model)
    ids = token_ids(2, LENGTH)
    cache = prefilled(model, ids[:, :50])
    assert_close(rest_of(loaded, cache, ids, 50), whole(model, ids)[:, 50:], atol=5e-5, rtol=0)


@pytest.mark.default_kept_keys
def test_a_folder_from_before_kept_keys_loads(tmp_path):
    model = converted(kept_keys=0, softmax_heads=[(1, 0)], calibrate=token_ids(2, 120))
    hf_rfa.save_pretrained(model, tmp_path)
    removed = []
    for path in tmp_path.glob("*.json"):
        values = json.loads(path.read_text())
        for part in (values, *(value for value in values.values() if isinstance(value, dict))):
            if part.pop("kept_keys", None) is not None:
                removed.append(path.name)
        path.write_text(json.dumps(values))
    assert set(removed) == {"config.json", "rfa_config.json"}
    loaded = hf_rfa.from_pretrained(tmp_path)
    assert same_outputs(loaded, model)
    assert hf_rfa.calibration_report(loaded) == hf_rfa.calibration_report(model)


def test_softmax_heads_that_are_set_afterwards():
    model, ids = converted(config=CONFIGS["3"]), token_ids(2, LENGTH)
    hf_rfa.set_softmax_heads(model, [(0, 1), (1, 0), (1, 1)])
    assert_close(whole(model, ids), whole(converted(config=CONFIGS["3"], softmax_heads=[(0, 1), (1, 0), (1, 1)]), ids))
    assert_close(in_pieces(model, ids, [30, 1, 1, 38])[0], whole(model, ids), atol=5e-5, rtol=0)
    hf_rfa.set_softmax_heads(model, [(0, 0), (0, 1), (1, 0), (1, 1)])
    assert_close(whole(model, ids), whole(build("llama"), ids), atol=2e-4, rtol=0)


def test_numbers_that_are_set_afterwards():
    model, ids = converted(config=CONFIGS["20"]), token_ids(2, LENGTH)
    cache = prefilled(model, ids[:, :50])
    hf_rfa.set_kept_keys(model, 3, {(0, 1): 20, (1, 0): 0})
    assert_close(whole(model, ids), whole(keeping("llama", "other numbers"), ids))
    with pytest.raises(StaleStateError, match="kept keys"):
        rest_of(model, cache, ids, 50)
    hf_rfa.set_kept_keys(model, 0)
    assert_close(whole(model, ids), whole(converted(), ids))


def test_a_redrawn_model_refuses_its_old_cache_and_keeps_the_same_keys_in_its_first_layer():
    """A choice needs no features."""
    model, ids = converted(config=CONFIGS["3"]), token_ids(2, LENGTH)
    cache, before = prefilled(model, ids[:, :50]), whole(model, ids)
    old = [head for head in hf_rfa.kept_tokens(cache).heads if head.layer == 0]
    hf_rfa.resample(model, draw=3)
    with pytest.raises(StaleStateError, match="draw 0"):
        rest_of(model, cache, ids, 50)
    assert not torch.equal(whole(model, ids), before)
    assert [head for head in hf_rfa.kept_tokens(prefilled(model, ids[:, :50])).heads if head.layer == 0] == old


# --- calibration and training ----------------------------------------------------------------------------------------


def test_calibration_is_never_worse_than_window_and_kept_keys_alone():
    ids = token_ids(2, 120)
    model = converted("llama", kept_keys=8, calibrate=ids)
    report = hf_rfa.calibration_report(model)
    assert report.divergence <= report.window_divergence
    assert "with the window and the kept keys alone" in str(report)
    assert "and up to 8 kept far keys" in str(report)
    near = converted("llama", kept_keys=8, gamma=0.0)
    texts = torch.cat([ids[:, :-15], ids[:, 30:45]], dim=1)  # as calibration plants repeats
    original = whole(build("llama"), texts).log_softmax(-1)
    for one, divergence in ((model, report.divergence), (near, report.window_divergence)):
        got = (original.exp() * (original - whole(one, texts).log_softmax(-1))).sum(-1).mean()
        assert_close(got.item(), divergence, rtol=1e-3, atol=1e-6)
    assert report.divergence < hf_rfa.calibration_report(converted("llama", calibrate=ids)).window_divergence


def test_distillation_with_kept_keys_lowers_the_loss():
    ids = token_ids(4, 96)
    model = converted("llama", KEEPING, omega="learned")
    losses = hf_rfa.distill(
        model, [ids] * 12, hf_rfa.DistillConfig(steps=12, learning_rate=3e-2, progress=False)
    ).losses
    for layer in (0, 1):
        assert losses[-1][layer] < 0.8 * losses[0][layer]
    assert_close(in_pieces(model, ids, [60, 1, 35])[0], whole(model, ids), atol=1e-4, rtol=0)


def gradients(model, ids):
    model.train()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("config", [KEEPING, CONFIGS["3 with a gate"]], ids=["exact head", "gate"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_repeats_the_choice(config, use_reentrant):
    config = dataclasses.replace(config, omega="learned")
    plain, checkpointed = (converted(llama(), config) for _ in range(2))
    checkpoint_activations(checkpointed, use_reentrant=use_reentrant)
    want, got = (gradients(model, token_ids(2, LENGTH)) for model in (plain, checkpointed))
    assert all(gradient is not None for gradient in want.values())  # an unused one would be an error to DDP
    for name, gradient in want.items():
        assert_close(got[name], gradient, atol=1e-6, rtol=1e-5)


def test_a_step_of_the_trainer_follows_the_loss(tmp_path):
    from transformers import Trainer, TrainingArguments

    model = converted(config=dataclasses.replace(KEEPING, omega="learned"))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    checkpoint_activations(model, use_reentrant=False)
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True, learning_rate=1e-3
    )
    rows = [{"input_ids": ids, "labels": ids} for ids in token_ids(4, LENGTH)]
    result = Trainer(model, arguments, train_dataset=rows).train()
    assert 0 < result.training_loss < 20
    still = [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])]
    assert not still
