"""Layers that attend to the keys and values of an earlier layer (Gemma 3n, Gemma 4), in every way of using a cache.

Transformers hands such a layer the keys of the earlier one and gives it no place in the cache; converted, it has a
state of its own. Gemma 4 asks these layers for the last tokens alone where no other logits are wanted (since 5.24).
"""

import copy
import dataclasses

import pytest
import torch
import transformers
from conversions import converted
from decoding import assistant_of, continue_greedily, generate, in_pieces, left_padded, positions, rest_of, whole
from families import CACHE, SHORT, attention_modules, checkpoint_activations, outputs_of
from packaging.version import Version
from tiny_models import Case, all_cases, ordinary_ids, tiny_model
from torch.testing import assert_close
from transformers import DynamicCache

import hf_rfa
from hf_rfa import RFAConfig, StaleStateError, UnsupportedModelError
from hf_rfa.runtime.arguments import cache_of
from hf_rfa.runtime.attention_call import shares_keys
from hf_rfa.training.loss import LossModule

MODELS = {
    "gemma3n": Case("causal_lm", "gemma3n_text", "Gemma3nForCausalLM"),
    "gemma4": Case("causal_lm", "gemma4_text", "Gemma4ForCausalLM"),
}
#: Layers 0 to 5 are sliding, full, sliding, full, sliding, full; 4 and 5 attend to the keys of 2 and 3.
LENDER, SHARER = 3, 5
CONFIGS = {
    "linear": SHORT,
    "exact heads": dataclasses.replace(SHORT, softmax_heads=[(LENDER, 0), (SHARER, 0)]),
    "exact sharer": dataclasses.replace(SHORT, layers=[1, LENDER]),
    "exact lender": dataclasses.replace(SHORT, layers=[1, SHARER]),
}
FAMILY = pytest.mark.parametrize("family", MODELS)
GRID = pytest.mark.parametrize(("family", "config"), [(family, config) for family in MODELS for config in CONFIGS])
CACHES = pytest.mark.parametrize(
    ("family", "config", "with_config"),
    [(family, config, with_config) for family in MODELS for config in CONFIGS for with_config in (True, False)
     if with_config or config == "linear"],
)  # fmt: skip
NEW = 20


def sharing(family, config="linear"):
    return converted(tiny_model(MODELS[family]), CONFIGS[config])


def empty_cache(model, with_config):
    return DynamicCache(config=model.config) if with_config else DynamicCache()


# --- without a cache -------------------------------------------------------------------------------------------------


@FAMILY
def test_the_tiny_models_share_keys_as_the_tests_say(family):
    shared = [module.layer_idx for module in attention_modules(sharing(family)) if shares_keys(module)]
    assert shared == [4, SHARER]


@FAMILY
def test_within_the_window_it_is_softmax(family):
    model, ids = tiny_model(MODELS[family]), ordinary_ids(2)
    before = whole(model, ids)
    hf_rfa.convert(model, RFAConfig(window=64, num_features=16), calibrate=False)
    assert_close(whole(model, ids), before, atol=2e-4, rtol=0)


@GRID
def test_beyond_the_window_the_sharer_estimates_too(family, config):
    after = whole(sharing(family, config), ordinary_ids(2))
    assert torch.isfinite(after).all()
    assert not torch.allclose(after, whole(tiny_model(MODELS[family]), ordinary_ids(2)), atol=1e-3)


@FAMILY
def test_a_sharer_that_is_converted_answers_otherwise_than_one_that_is_not(family):
    assert not torch.allclose(
        whole(sharing(family), ordinary_ids()), whole(sharing(family, "exact sharer"), ordinary_ids()), atol=1e-3
    )


@pytest.mark.parametrize("keep", [1, 7])
@GRID
def test_the_last_logits_alone(family, config, keep):
    model, ids = sharing(family, config), ordinary_ids(2)
    with torch.no_grad():
        last = model(ids, use_cache=False, logits_to_keep=keep).logits
    assert_close(last, whole(model, ids)[:, -keep:], atol=1e-5, rtol=0)


@FAMILY
def test_the_dry_run_may_ask_for_the_last_logits_alone(family):
    ids = ordinary_ids()
    model = tiny_model(MODELS[family])
    hf_rfa.convert(model, SHORT, calibrate=False, example_inputs={"input_ids": ids, "logits_to_keep": 1})
    assert_close(whole(model, ids), whole(sharing(family), ids), atol=1e-5, rtol=0)


@FAMILY
def test_calibration_fits_every_layer(family):
    model = hf_rfa.convert(tiny_model(MODELS[family]), SHORT, calibrate=ordinary_ids(2, 60))
    assert {head.layer for head in hf_rfa.calibration_report(model).heads} == {1, LENDER, SHARER}
    ids = ordinary_ids()
    assert torch.equal(generate(model, ids, NEW), continue_greedily(model, ids, NEW))


@FAMILY
def test_the_fused_loss_sees_every_position(family):
    """Its forward asks for the last logits alone."""
    model = sharing(family)
    model.config.final_logit_softcapping = 1e6  # the fused loss refuses logits that are changed after the head
    ids = ordinary_ids(2)
    targets = torch.cat([ids[:, 1:], ids[:, :1]], dim=1)
    fused, plain = (LossModule(model, fused=fused)(ids, targets) for fused in (True, False))
    assert_close(fused, plain, atol=1e-3, rtol=1e-4)


@FAMILY
def test_distilled(family):
    model = hf_rfa.convert(tiny_model(MODELS[family]), dataclasses.replace(SHORT, omega="learned"), calibrate=False)
    hf_rfa.distill(model, [ordinary_ids(2, 60, seed=seed) for seed in range(3)], hf_rfa.DistillConfig(steps=3))
    ids = ordinary_ids()
    assert torch.equal(generate(model.eval(), ids, 10), continue_greedily(model, ids, 10))


@pytest.mark.parametrize("together", [True, False])
@FAMILY
def test_packed_documents(family, together):
    model, ids = sharing(family, "exact heads"), ordinary_ids()
    positions_of_two = torch.cat([torch.arange(30), torch.arange(20)])[None]
    options = {"position_ids": positions_of_two} if together else {}
    packed = outputs_of(model, {"input_ids": ids, "use_cache": False, **options})
    alone = torch.cat([whole(model, ids[:, :30]), whole(model, ids[:, 30:])], dim=1)
    assert torch.allclose(packed, alone, atol=1e-4) == together


@FAMILY
def test_exported(family):
    model, ids = sharing(family), ordinary_ids()
    exported = torch.export.export(model, (ids,), {"use_cache": False}).module()
    assert_close(exported(ids, use_cache=False).logits, whole(model, ids), atol=1e-5, rtol=0)


@FAMILY
def test_activation_checkpointing_gives_the_same_gradients(family):
    gradients = []
    for checkpointed in (False, True):
        model = sharing(family).train()
        if checkpointed:
            checkpoint_activations(model, use_reentrant=False)
        model(ordinary_ids(), use_cache=False).logits.square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert_close(gradients[1][name], gradient, atol=1e-5, rtol=1e-3)


# --- generation ------------------------------------------------------------------------------------------------------


@GRID
def test_greedy(family, config):
    model, ids = sharing(family, config), ordinary_ids(2)
    tokens = generate(model, ids, NEW)
    assert torch.equal(tokens, continue_greedily(model, ids, NEW))
    assert len(tokens[:, 50:].unique()) > 3


@pytest.mark.parametrize("size", [1, 13, 49])
@FAMILY
def test_chunked_prefill(family, size):
    model, ids = sharing(family, "exact heads"), ordinary_ids(2)
    assert torch.equal(generate(model, ids, NEW, prefill_chunk_size=size), continue_greedily(model, ids, NEW))


@FAMILY
def test_beams(family):
    model, ids = sharing(family, "exact heads"), ordinary_ids(2)
    cached, uncached = (generate(model, ids, 10, num_beams=3, use_cache=use_cache) for use_cache in (True, False))
    assert torch.equal(cached, uncached)


@GRID
def test_a_left_padded_batch(family, config):
    model = sharing(family, config)
    ids, mask = left_padded(50)
    ids = ids.clamp_max(59)
    tokens = generate(model, ids, NEW, attention_mask=mask)
    assert torch.equal(tokens, continue_greedily(model, ids, NEW, mask))
    for row, token_mask in enumerate(mask.bool()):
        bare = generate(model, ids[row][token_mask][None], NEW)
        assert torch.equal(tokens[row, -NEW:], bare[0, -NEW:]), f"row {row}"


@GRID
def test_prompt_lookup(family, config):
    model, span = sharing(family, config), ordinary_ids(1, 15)
    ids = torch.cat([span, ordinary_ids(1, 10, seed=1), span, span], dim=1)
    assert torch.equal(generate(model, ids, NEW, prompt_lookup_num_tokens=6), continue_greedily(model, ids, NEW))


@pytest.mark.parametrize("kind", ["converted", "unconverted"])
@FAMILY
def test_assisted(family, kind):
    if kind == "unconverted" and Version(transformers.__version__) < Version("5.24"):
        pytest.skip("Transformers 5.17's own sliding layers cannot draft several tokens (5.24's can)")
    model, ids = sharing(family, "exact heads"), ordinary_ids()
    helper = assistant_of(model, kind)
    helper.generation_config.num_assistant_tokens = 5
    assert torch.equal(generate(model, ids, NEW, assistant_model=helper), continue_greedily(model, ids, NEW))


@FAMILY
def test_a_conversation(family):
    model, ids, cache = sharing(family, "exact heads"), ordinary_ids(), None
    for turn in range(3):
        out = generate(model, ids, 7, **{CACHE: cache}, return_dict_in_generate=True)
        assert torch.equal(out.sequences, continue_greedily(model, ids, 7)), f"turn {turn}"
        cache, ids = cache_of(out), torch.cat([out.sequences, ordinary_ids(1, 9, seed=turn + 1)], dim=1)


# --- the cache by hand -----------------------------------------------------------------------------------------------


@CACHES
def test_a_dynamic_cache_of_the_users_own(family, config, with_config):
    model, ids = sharing(family, config), ordinary_ids(2)
    cache = empty_cache(model, with_config)
    logits, same = in_pieces(model, ids, [23, 1, 1, 9, 16], cache)
    assert same is cache
    assert_close(logits, whole(model, ids), atol=1e-4, rtol=0)


@CACHES
def test_rows_of_the_cache(family, config, with_config):
    model, ids = sharing(family, config), ordinary_ids(3)
    changes = {
        "reorder": (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 2])), torch.tensor([2, 0, 2])),
        "select": (lambda cache: cache.batch_select_indices(torch.tensor([1, 0])), torch.tensor([1, 0])),
        "repeat": (lambda cache: cache.batch_repeat_interleave(2), torch.arange(3).repeat_interleave(2)),
    }
    for name, (change, rows) in changes.items():
        cache = empty_cache(model, with_config)
        in_pieces(model, ids, [33], cache)
        change(cache)
        want = whole(model, ids[rows])[:, 33:]
        assert_close(rest_of(model, cache, ids[rows], 33), want, atol=1e-4, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("removed", [1, 9, 15])
@CACHES
def test_crop(family, config, with_config, removed):
    model, ids = sharing(family, config), ordinary_ids(2)
    cache = empty_cache(model, with_config)
    if removed == 9:
        cache.activate_past_recording()  # before its first forward, as documented
    in_pieces(model, ids, [20], cache)
    cache.activate_past_recording()
    in_pieces(model, ids[:, 20:41], [13, 1, 7], cache)
    cache.crop(-removed)
    assert cache.get_seq_length() == 41 - removed
    other = torch.cat([ids[:, : 41 - removed], ordinary_ids(2, 9 + removed, seed=7)], dim=1)
    assert_close(rest_of(model, cache, other, 41 - removed), whole(model, other)[:, 41 - removed :], atol=1e-4, rtol=0)


@FAMILY
def test_the_cache_keeps_its_bytes(family):
    model = sharing(family)
    sizes = [hf_rfa.cache_bytes(in_pieces(model, ordinary_ids(1, n), [n])[1]) for n in (60, 300)]
    assert sizes[0] == sizes[1]


@FAMILY
def test_reset(family):
    model, ids = sharing(family), ordinary_ids(2)
    _, cache = in_pieces(model, ids, [33])
    cache.reset()
    assert_close(in_pieces(model, ids, [40, 10], cache)[0], whole(model, ids), atol=1e-4, rtol=0)


@FAMILY
def test_a_padded_text_in_pieces(family):
    model = sharing(family, "exact heads")
    ids, mask = left_padded(50)
    ids = ids.clamp_max(59)
    pieces, _ = in_pieces(model, ids, [21, 1, 28], mask=mask)
    at_once = outputs_of(
        model, {"input_ids": ids, "attention_mask": mask, "position_ids": positions(mask), "use_cache": False}
    )
    assert_close(pieces[mask.bool()], at_once[mask.bool()], atol=1e-4, rtol=0)


@pytest.mark.parametrize("by_hand", [True, False])
@FAMILY
def test_a_cache_that_was_filled_as_softmax_is_refused(family, by_hand):
    """It holds no keys for the layers that share them."""
    model, ids = tiny_model(MODELS[family]), ordinary_ids()
    _, cache = in_pieces(model, ids, [30])
    hf_rfa.convert(model, SHORT, calibrate=False)
    with pytest.raises(UnsupportedModelError, match="filled before the model was converted"):
        rest_of(model, cache, ids, 30) if by_hand else generate(model, ids, 3, **{CACHE: cache})


@FAMILY
def test_a_cache_of_another_conversion_is_refused(family):
    model, ids = sharing(family), ordinary_ids()
    _, cache = in_pieces(model, ids, [30])
    hf_rfa.revert(model)
    with pytest.raises(StaleStateError):
        rest_of(model, cache, ids, 30)
    hf_rfa.convert(model, dataclasses.replace(SHORT, seed=5), calibrate=False)
    with pytest.raises(StaleStateError):
        rest_of(model, cache, ids, 30)


@FAMILY
def test_keys_are_not_handed_out(family):
    """For an assistant that attends to its target's keys: the state holds none but the newest."""
    with pytest.raises(UnsupportedModelError, match="return_shared_kv_states"):
        sharing(family)(ordinary_ids(), return_shared_kv_states=True)


# --- a model that runs its layers in a loop --------------------------------------------------------------------------

DORY = Case("causal_lm", "dory", "DoryForCausalLM")
SINCE_5_24 = pytest.mark.skipif(DORY not in all_cases(), reason="this Transformers has no such class")


@SINCE_5_24
def test_each_turn_of_a_loop_has_a_state_of_its_own():
    model, ids = hf_rfa.convert(tiny_model(DORY), SHORT, calibrate=False), ordinary_ids(2)
    pieces, cache = in_pieces(model, ids, [23, 1, 1, 25])
    assert len(cache.layers) == 6  # two of the four layers run twice
    assert_close(pieces, whole(model, ids), atol=1e-4, rtol=0)


@SINCE_5_24
def test_turns_that_read_the_keys_of_the_last_one_are_refused_beside_a_cache():
    model = hf_rfa.convert(tiny_model(DORY, recurrent_kv_cache_mode="last_loop"), SHORT, calibrate=False)
    assert torch.isfinite(whole(model, ordinary_ids())).all()
    with pytest.raises(UnsupportedModelError, match="last_loop"):
        generate(model, ordinary_ids(), 3)


# --- images, whose tokens see each other in the sliding layers of the larger Gemma 4 ---------------------------------


def seeing(with_examples):
    """The model, converted with or without having seen image tokens, a text, and which of it are image tokens."""
    model, ids = tiny_model(Case("", "gemma4", "Gemma4ForConditionalGeneration")), ordinary_ids()
    model.config.text_config.use_bidirectional_attention = "vision"
    kinds = {"mm_token_type_ids": ((torch.arange(50) >= 5) & (torch.arange(50) < 15)).long()[None]}
    examples = {"input_ids": ids, "use_cache": False, **kinds} if with_examples else None
    return hf_rfa.convert(model, SHORT, calibrate=False, example_inputs=examples), ids, kinds


@pytest.mark.parametrize("keep", [0, 1, 7])
@pytest.mark.parametrize("with_examples", [True, False])
def test_image_tokens_and_the_last_logits(with_examples, keep):
    model, ids, kinds = seeing(with_examples)
    with torch.no_grad():
        last, every = (
            model(ids, use_cache=False, **kinds, **options).logits
            for options in ({"logits_to_keep": keep}, {"logits_to_keep": torch.arange(50)})
        )
    assert not torch.allclose(every, whole(model, ids), atol=1e-3)
    assert_close(last, every[:, -keep:], atol=1e-5, rtol=0)


def test_image_tokens_and_a_cache():
    model, ids, kinds = seeing(True)
    with torch.no_grad():
        first = model(ids[:, :30], use_cache=True, mm_token_type_ids=kinds["mm_token_type_ids"][:, :30])
        rest = model(ids[:, 30:], **{CACHE: cache_of(first)}).logits
        every = model(ids, use_cache=False, **kinds).logits
    assert_close(rest, every[:, 30:], atol=1e-4, rtol=0)


def test_image_tokens_that_the_conversion_did_not_see_are_refused_beside_a_cache():
    """The sliding layers would answer exactly, and their states go without those tokens."""
    model, ids, kinds = seeing(False)
    with pytest.raises(UnsupportedModelError, match="example_inputs"):
        model(ids, use_cache=True, **kinds)


# --- the whole model -------------------------------------------------------------------------------------------------


@FAMILY
def test_saved_and_loaded(family, tmp_path):
    model, ids = sharing(family, "exact heads"), ordinary_ids()
    hf_rfa.save_pretrained(model, tmp_path)
    again = hf_rfa.from_pretrained(tmp_path).eval()
    assert torch.equal(whole(again, ids), whole(model, ids))
    again.generation_config.eos_token_id = None
    assert torch.equal(generate(again, ids, NEW), generate(model, ids, NEW))


@FAMILY
def test_a_copy_and_the_original_after_reverting(family):
    model, ids = tiny_model(MODELS[family]), ordinary_ids()
    before, tokens = whole(model, ids), generate(model, ids, 5)
    hf_rfa.convert(model, SHORT, calibrate=False)
    twin = copy.deepcopy(model)
    hf_rfa.revert(model)
    assert torch.equal(whole(model, ids), before)
    assert torch.equal(generate(model, ids, 5), tokens)
    assert torch.equal(generate(twin, ids, NEW), continue_greedily(twin, ids, NEW))
