"""Generation from a state of constant size: every way to use the cache equals the forward without one."""

import copy
import dataclasses
import functools

import pytest
import torch
from conversions import converted
from decoding import (
    CONFIG,
    CONFIGS,
    LEFT_PADDING,
    NEW,
    assistant_of,
    continue_greedily,
    disturbed,
    generate,
    in_pieces,
    left_padded,
    positions,
)
from families import CACHE, CAUSAL, SHORT, attention_modules, build, outputs_of, token_ids
from torch.testing import assert_close
from transformers import DynamicCache, StaticCache

import hf_rfa
from hf_rfa import StaleStateError, UnsupportedModelError
from hf_rfa.runtime.adapters import named_adapters
from hf_rfa.runtime.arguments import cache_of
from hf_rfa.runtime.cache import RFACacheLayer
from hf_rfa.runtime.generation import adopt_cache
from hf_rfa.runtime.mask import RFAMask

# GPT-NeoX calls its cache `layer_past`, Gemma 3 has a sliding window of its own, DeepSeek values of another dim.
FOUR_FAMILIES = ["llama", "gpt_neox", "gemma3", "deepseek_v3"]
GRID = pytest.mark.parametrize(
    ("family", "config"), [(family, config) for family in FOUR_FAMILIES for config in CONFIGS]
)
FAMILY = pytest.mark.parametrize("family", FOUR_FAMILIES)


@functools.cache
def expected_greedy(family: str, config: str, batch: int = 2):
    """What every way of decoding `token_ids(batch)` greedily must give."""
    return continue_greedily(converted(family, CONFIGS[config]), token_ids(batch))


def rfa_layers(cache):
    return [layer for layer in cache.layers if isinstance(layer, RFACacheLayer)]


# --- plain generate --------------------------------------------------------------------------------------------------


@GRID
def test_greedy(family, config):
    model, ids = converted(family, CONFIGS[config]), token_ids()
    tokens = generate(model, ids)
    assert torch.equal(tokens, expected_greedy(family, config))
    assert len(tokens[:, 70:].unique()) > 3  # not one token for ever


@pytest.mark.parametrize("family", [family for family in CAUSAL if family not in FOUR_FAMILIES])
def test_greedy_of_the_other_families(family):
    model, ids = converted(family, CONFIGS["exact head" if family != "jamba" else "linear"]), token_ids()
    assert torch.equal(generate(model, ids), continue_greedily(model, ids))


def test_greedy_of_an_encoder_decoder():
    model, ids = converted("bart"), token_ids()
    cached = generate(model, ids)
    assert cached.shape == (2, NEW + 1)
    assert torch.equal(cached, generate(model, ids, use_cache=False))
    assert torch.equal(generate(model, ids, num_beams=3), generate(model, ids, num_beams=3, use_cache=False))


def test_greedy_differs_from_softmax():
    ids = token_ids()
    assert not torch.equal(generate(build("llama"), ids), generate(converted(), ids))


@pytest.mark.parametrize("layers", [[0], [1], "every 2nd stays softmax"])
def test_greedy_with_layers_that_stay_softmax(layers):
    model, ids = (
        converted(layers=layers),
        token_ids(),
    )
    assert torch.equal(generate(model, ids), continue_greedily(model, ids))


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 15, 16, 17])
@CONFIG
def test_greedy_from_prompts_shorter_than_two_windows(config, length):
    model, ids = converted(config=CONFIGS[config]), token_ids(2, length)
    assert torch.equal(generate(model, ids), continue_greedily(model, ids))


@CONFIG
def test_bfloat16_generates_from_a_cache_of_its_own_dtype(config):
    model = converted(config=CONFIGS[config]).bfloat16()
    out = generate(model, token_ids(), return_dict_in_generate=True)
    state = rfa_layers(cache_of(out))[0].state
    assert state.kv_state.dtype == torch.float32
    assert state.near_key.dtype == torch.bfloat16
    assert out.sequences.shape == (2, 70 + NEW)


@CONFIG
def test_autocast_with_a_cache_is_autocast_without(config):
    """RoPE leaves float32 queries and keys beside bfloat16 values."""
    model, ids = converted(config=CONFIGS[config]), token_ids()
    with torch.autocast("cpu", torch.bfloat16):
        whole = outputs_of(model, {"input_ids": ids, "use_cache": False})
        logits, _ = in_pieces(model, ids, [30, 1, 1, 20, 1, 17])
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - whole.float()).norm() < 0.02 * whole.float().norm()


@GRID
def test_sampling(family, config):
    model, ids = converted(family, CONFIGS[config]), token_ids()
    drawn = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        drawn.append(generate(model, ids, do_sample=True, top_k=0, use_cache=use_cache))
    torch.manual_seed(4)
    assert torch.equal(*drawn)
    assert not torch.equal(drawn[0], generate(model, ids, do_sample=True, top_k=0))


@GRID
def test_beams(family, config):
    model, ids = converted(family, CONFIGS[config]), token_ids()
    cached, uncached = (generate(model, ids, num_beams=3, use_cache=use) for use in (True, False))
    assert torch.equal(cached, uncached)
    assert not torch.equal(cached, generate(model, ids))


def test_beam_sampling_and_several_sequences():
    model, ids = converted(config=CONFIGS["exact head"]), token_ids()
    drawn = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        drawn.append(generate(model, ids, do_sample=True, num_beams=4, num_return_sequences=3, use_cache=use_cache))
    assert drawn[0].shape == (6, 70 + NEW)
    assert torch.equal(*drawn)


@GRID
def test_a_left_padded_batch(family, config):
    model = converted(family, CONFIGS[config])
    ids, mask = left_padded()
    tokens = generate(model, ids, attention_mask=mask)
    assert torch.equal(tokens, continue_greedily(model, ids, mask=mask))
    for row, padding in enumerate(LEFT_PADDING):
        assert torch.equal(tokens[row, 70:], generate(model, ids[row : row + 1, padding:])[0, 70 - padding :])


@pytest.mark.parametrize("family", ["gpt2", "opt", "gpt_oss", "phi", "cohere"])
def test_a_left_padded_batch_of_other_families(family):
    model = converted(family)
    ids, mask = left_padded()
    tokens = generate(model, ids, attention_mask=mask)
    for row, padding in enumerate(LEFT_PADDING):
        assert torch.equal(tokens[row, 70:], generate(model, ids[row : row + 1, padding:])[0, 70 - padding :])


@CONFIG
def test_a_decoding_step_looks_at_its_own_column_of_the_padding_mask_only(config, monkeypatch):
    model = converted(config=CONFIGS[config])
    ids, mask = left_padded()
    expected = generate(model, ids, attention_mask=mask)
    asked, layout = [], RFAMask.layout
    monkeypatch.setattr(RFAMask, "token_mask", property(lambda mask: pytest.fail("looked through the whole mask")))
    monkeypatch.setattr(RFAMask, "layout", lambda mask, length: (asked.append(length), layout(mask, length))[1])
    assert torch.equal(generate(model, ids, attention_mask=mask), expected)
    assert set(asked) == {ids.shape[1], 1}


def test_beams_of_a_left_padded_batch():
    model = converted(config=CONFIGS["exact head"])
    ids, mask = left_padded()
    cached, uncached = (generate(model, ids, attention_mask=mask, num_beams=3, use_cache=use) for use in (True, False))
    assert torch.equal(cached, uncached)


@pytest.mark.parametrize(
    ("family", "config"), [*(("llama", config) for config in CONFIGS), *((f, "linear") for f in FOUR_FAMILIES[1:])]
)
def test_a_conversation_of_three_turns(family, config):
    model, ids, cache = converted(family, CONFIGS[config]), token_ids(1), None
    for turn in range(3):
        out = generate(model, ids, 11, **{CACHE: cache}, return_dict_in_generate=True)
        assert torch.equal(out.sequences, continue_greedily(model, ids, 11)), f"turn {turn}"
        cache = cache_of(out)
        ids = torch.cat([out.sequences, token_ids(1, 13, seed=10 + turn)], dim=1)


def test_a_conversation_continues_a_left_padded_batch():
    model = converted(config=CONFIGS["exact head"])
    ids, mask = left_padded()
    out = generate(model, ids, 11, attention_mask=mask, return_dict_in_generate=True)
    ids = torch.cat([out.sequences, token_ids(3, 13, seed=10)], dim=1)
    mask = torch.cat([mask, mask.new_ones(3, 24)], dim=1)
    again = generate(model, ids, 11, attention_mask=mask, **{CACHE: cache_of(out)})
    assert torch.equal(again, continue_greedily(model, ids, 11, mask))


@pytest.mark.parametrize("size", [1, 8, 13, 37, 69, 70])
@CONFIG
def test_chunked_prefill(config, size):
    model, ids = converted(config=CONFIGS[config]), token_ids()
    assert torch.equal(generate(model, ids, prefill_chunk_size=size), expected_greedy("llama", config))


@pytest.mark.parametrize("family", FOUR_FAMILIES[1:])
def test_chunked_prefill_of_other_families(family):
    model, ids = converted(family), token_ids()
    assert torch.equal(generate(model, ids, prefill_chunk_size=13), expected_greedy(family, "linear"))


# --- assisted decoding -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "config", "assistant"),
    [
        *((family, "exact head", "converted") for family in FOUR_FAMILIES),
        *(("llama", config, kind) for config in CONFIGS for kind in ("itself", "converted", "unconverted")
          if (config, kind) != ("exact head", "converted")),
    ],
)  # fmt: skip
def test_assisted(family, config, assistant):
    model, ids = converted(family, CONFIGS[config]), token_ids(1)
    helper = assistant_of(model, assistant)
    helper.generation_config.num_assistant_tokens = 5
    assert torch.equal(generate(model, ids, assistant_model=helper), expected_greedy(family, config, 1))


def test_a_converted_assistant_helps_an_unconverted_model():
    model, ids = build("llama"), token_ids(1)
    helper = hf_rfa.convert(disturbed(model), CONFIGS["exact head"], calibrate=False)
    assert torch.equal(generate(model, ids, assistant_model=helper), generate(model, ids))


def test_an_assistant_is_really_asked(monkeypatch):
    """Else the tests above would compare greedy decoding with itself."""
    model, ids, removed = converted(), token_ids(1), []
    crop = RFACacheLayer.crop
    monkeypatch.setattr(RFACacheLayer, "crop", lambda self, n: (removed.append(n), crop(self, n))[1])
    generate(model, ids, assistant_model=assistant_of(model, "converted"))
    assert any(n < 0 for n in removed)


@GRID
def test_prompt_lookup(family, config):
    model, span = converted(family, CONFIGS[config]), token_ids(1, 20)
    ids = torch.cat([span, token_ids(1, 15, seed=1), span, span], dim=1)
    tokens = generate(model, ids, prompt_lookup_num_tokens=6)
    assert torch.equal(tokens, continue_greedily(model, ids))


def test_plain_generate_after_assisted_and_the_other_way_round():
    model, ids = converted(), token_ids(1)
    for options in ({}, {"prompt_lookup_num_tokens": 4}, {"assistant_model": copy.deepcopy(model)}, {}):
        assert torch.equal(generate(model, ids, **options), expected_greedy("llama", "linear", 1))


# --- forward(use_cache=True) by hand ---------------------------------------------------------------------------------

PIECES = {
    "prompt and tokens": [37, *[1] * 33],
    "tokens": [1] * 70,
    "odd": [30, 1, 1, 20, 1, 17],
    "chunks": [8, 16, 8, 32, 6],
    "beside chunks": [7, 2, 15, 17, 29],
}


@pytest.mark.parametrize(
    ("family", "config", "pieces"),
    [
        *(("llama", config, pieces) for config in CONFIGS for pieces in PIECES),
        *((family, config, "odd") for family in FOUR_FAMILIES[1:] for config in CONFIGS),
    ],
)
def test_a_forward_in_pieces(family, config, pieces):
    model, ids = converted(family, CONFIGS[config]), token_ids()
    whole = outputs_of(model, {"input_ids": ids, "use_cache": False})
    logits, cache = in_pieces(model, ids, PIECES[pieces])
    # A trigonometric sum that almost cancels magnifies rounding.
    assert_close(logits, whole, atol=1e-3 if config == "trigonometric" else 2e-5, rtol=0)
    assert cache.get_seq_length() == 70


# Jamba's recurrent layers themselves forget their state when a second piece is longer than one token.
@pytest.mark.parametrize(
    ("family", "pieces"), [("gpt2", "odd"), ("opt", "odd"), ("gpt_oss", "odd"), ("jamba", "prompt and tokens")]
)
def test_a_forward_in_pieces_of_other_families(family, pieces):
    model, ids = converted(family), token_ids()
    whole = outputs_of(model, {"input_ids": ids, "use_cache": False})
    assert_close(in_pieces(model, ids, PIECES[pieces])[0], whole, atol=2e-5, rtol=0)


@pytest.mark.parametrize("lengths", PIECES.values(), ids=PIECES)
@CONFIG
def test_a_padded_forward_in_pieces(config, lengths):
    model = converted(config=CONFIGS[config])
    ids, mask = left_padded()
    whole = outputs_of(
        model, {"input_ids": ids, "attention_mask": mask, "position_ids": positions(mask), "use_cache": False}
    )
    logits, _ = in_pieces(model, ids, lengths, mask=mask)
    kept = mask.bool()
    assert_close(logits[kept], whole[kept], atol=1e-3 if config == "trigonometric" else 2e-5, rtol=0)


@pytest.mark.parametrize("with_config", [True, False])
@FAMILY
def test_a_dynamic_cache_of_the_users_own(family, with_config):
    model, ids = converted(family), token_ids()
    cache = DynamicCache(config=model.config) if with_config else DynamicCache()
    whole = outputs_of(model, {"input_ids": ids, "use_cache": False})
    logits, returned = in_pieces(model, ids, PIECES["odd"], cache)
    assert returned is cache
    assert_close(logits, whole, atol=2e-5, rtol=0)


def test_the_caches_of_two_models_do_not_mix():
    """What a forward leaves in the adapters must not reach the next one."""
    model, ids = converted(), token_ids()
    whole = outputs_of(model, {"input_ids": ids, "use_cache": False})
    _, cache = in_pieces(model, ids, [40])
    assert_close(outputs_of(model, {"input_ids": ids, "use_cache": False}), whole, atol=0, rtol=0)
    with torch.no_grad():
        rest = model(ids[:, 40:], **{CACHE: cache}).logits
    assert_close(rest, whole[:, 40:], atol=2e-5, rtol=0)


def test_a_forward_that_fails_leaves_no_cache_behind():
    model, ids = converted(), token_ids()
    whole = outputs_of(model, {"input_ids": ids, "use_cache": False})

    def interrupt(module, args):
        raise KeyboardInterrupt

    hook = model.model.layers[0].self_attn.q_proj.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(ids, **{CACHE: DynamicCache()}, use_cache=True)
    hook.remove()
    assert torch.equal(outputs_of(model, {"input_ids": ids, "use_cache": False}), whole)


def test_gradients_flow_through_a_cache():
    """Truncated backpropagation is the user's choice (`state.detach()`), not an accident."""
    model, ids = converted(), token_ids()
    first = model(ids[:, :40], use_cache=True)
    model(ids[:, 40:], **{CACHE: cache_of(first)}).logits.sum().backward()
    in_two = model.model.embed_tokens.weight.grad.clone()
    model.zero_grad()
    model(ids, use_cache=False).logits[:, 40:].sum().backward()
    assert_close(in_two, model.model.embed_tokens.weight.grad, atol=1e-4, rtol=1e-3)


# --- caches that are refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["static", "offloaded_static", "offloaded", "quantized"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_other_cache_implementations_are_refused(family, name):
    model, ids = converted(family), token_ids(1)
    with pytest.raises(UnsupportedModelError, match=f"cache_implementation='{name}'"):
        generate(model, ids, cache_implementation=name)
    assert torch.equal(generate(model, ids), expected_greedy(family, "linear", 1))


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_static_cache_object_is_refused(family):
    model, ids = converted(family), token_ids(1)
    cache = StaticCache(config=model.config, max_cache_len=128)
    with pytest.raises(UnsupportedModelError, match="Static"):
        model(ids, **{CACHE: cache})
    with pytest.raises(UnsupportedModelError, match="Static"):
        generate(model, ids, **{CACHE: cache})


def test_an_offloaded_cache_object_is_refused():
    model, ids = converted(), token_ids(1)
    with pytest.raises(UnsupportedModelError, match="offload"):
        model(ids, **{CACHE: DynamicCache(config=model.config, offloading=True)})


# --- caches that hold keys and values already ------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss", "gpt_neox"])
def test_a_cache_that_was_filled_as_softmax_goes_on_as_a_state(family):
    """A window over everything shows that no key is lost; Gemma 3's sliding layers keep the last 15 of 40 tokens."""
    model = build(family)
    ids, mask = left_padded()
    want = outputs_of(model, {"input_ids": ids, "attention_mask": mask, "position_ids": positions(mask)})[:, 40:]
    caches = [in_pieces(model, ids[:, :40], [40], mask=mask[:, :40])[1] for _ in range(2)]

    def rest(cache, start, stop):
        options = {"attention_mask": mask[:, :stop], "position_ids": positions(mask)[:, start:stop]}
        with torch.no_grad():
            return model(ids[:, start:stop], **{CACHE: cache}, **options).logits

    hf_rfa.convert(model, dataclasses.replace(SHORT, window=70), calibrate=False)
    assert_close(torch.cat([rest(caches[0], 40, 50), rest(caches[0], 50, 70)], dim=1), want, atol=2e-5, rtol=0)
    assert caches[0].get_seq_length() == 70
    hf_rfa.convert(hf_rfa.revert(model), SHORT, calibrate=False)
    assert (rest(caches[1], 40, 70) - want).abs().max() > 1e-3


def test_a_cache_of_compressed_keys_is_refused():
    model, ids = build("deepseek_v3"), token_ids()
    with torch.no_grad():
        cache = cache_of(model(ids, use_cache=True))
    hf_rfa.convert(model, SHORT, calibrate=False)
    with pytest.raises(UnsupportedModelError, match="not as the keys"):
        model(ids[:, :1], **{CACHE: cache})


def test_a_cache_that_was_filled_as_softmax_follows_its_rows():
    model, ids, rows = build("llama"), token_ids(), torch.tensor([3, 0, 0, 1])
    want = outputs_of(model, {"input_ids": ids, "use_cache": False})[:, 40:]
    with torch.no_grad():
        cache = cache_of(model(ids[:, :40], use_cache=True))
    before = hf_rfa.cache_bytes(cache)
    hf_rfa.convert(model, dataclasses.replace(SHORT, window=70), calibrate=False)
    adopt_cache(model, cache)
    assert hf_rfa.cache_bytes(cache) == before
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(rows)
    with torch.no_grad():
        logits = model(ids[rows // 2, 40:], **{CACHE: cache}).logits
    assert_close(logits, want[rows // 2], atol=2e-5, rtol=0)


# --- draws -----------------------------------------------------------------------------------------------------------


def change_by_resample(model):
    hf_rfa.resample(model)


def change_by_loading(model):
    twin = copy.deepcopy(model)
    hf_rfa.resample(twin)
    model.load_state_dict(twin.state_dict())


@pytest.mark.parametrize("change", [change_by_resample, change_by_loading])
@FAMILY
def test_another_draw_in_the_middle_of_a_sequence_is_an_error(family, change):
    model, ids = converted(family), token_ids()
    _, cache = in_pieces(model, ids, [40])
    change(model)
    with pytest.raises(StaleStateError, match="draw 0"), torch.no_grad():
        model(ids[:, 40:], **{CACHE: cache})
    cache.reset()
    logits, _ = in_pieces(model, ids, [40, 30], cache)
    assert_close(logits, outputs_of(model, {"input_ids": ids, "use_cache": False}), atol=2e-5, rtol=0)


def test_generate_refuses_the_cache_of_another_draw_too():
    model, ids = converted(), token_ids()
    out = generate(model, ids, return_dict_in_generate=True)
    hf_rfa.resample(model)
    with pytest.raises(StaleStateError, match="new sequence"):
        generate(model, out.sequences, **{CACHE: cache_of(out)})


def test_the_same_draw_again_is_no_error():
    model, ids = converted(), token_ids()
    whole = outputs_of(model, {"input_ids": ids, "use_cache": False})
    _, cache = in_pieces(model, ids, [40])
    hf_rfa.resample(model)
    hf_rfa.resample(model, draw=0)
    with torch.no_grad():
        rest = model(ids[:, 40:], **{CACHE: cache}).logits
    assert_close(rest, whole[:, 40:], atol=2e-5, rtol=0)


def with_another_kernel(adapter):
    adapter.set_kernel(adapter.feature_maps, gamma=adapter.gamma * 0.2)


def with_another_draw(adapter):
    adapter.redraw(1)


def with_other_exact_heads(adapter):
    adapter.set_softmax_heads((1,))


@pytest.mark.parametrize("change", [with_another_kernel, with_another_draw, with_other_exact_heads])
@pytest.mark.parametrize("config", ["linear", "exact head"])
def test_a_change_of_the_kernel_between_two_tokens_is_refused(config, change):
    """The state means nothing to the new kernel, and what decoding worked out from the old one is not used."""
    ids = token_ids()
    model = converted("llama", CONFIGS[config])
    _, cache = in_pieces(model, ids, [33, 1, 1])
    before = outputs_of(model, {"input_ids": ids, "use_cache": False})
    for _, _, adapter in named_adapters(model):
        kernel = adapter.kernel
        assert adapter.kernel is kernel
        change(adapter)
        assert adapter.kernel is not kernel
    with pytest.raises(StaleStateError, match="new sequence"):
        model(ids[:, 35:36], **{CACHE: cache})
    after = outputs_of(model, {"input_ids": ids, "use_cache": False})
    assert not torch.allclose(after, before, atol=2e-4)  # it makes a difference
    logits, _ = in_pieces(model, ids, [33, *[1] * 17])
    assert_close(logits, after[:, :50], atol=2e-5, rtol=0)


@pytest.mark.parametrize("handed_on", [False, True])
@pytest.mark.parametrize("settings", [{"omega": "learned"}, {"gate": True}, {"omega": "learned", "gate": True}])
def test_an_optimisers_step_between_two_tokens_is_no_secret_to_the_decoder(settings, handed_on):
    """It changes Parameters where they are: what was prepared from them before is not used again."""
    ids, logits = token_ids(), []
    for without_gradients in (True, False):  # with them, every step goes through the operator
        model = converted(**settings)
        _, cache = in_pieces(model, ids, [33, 1, 1])
        learned = {p: name for _, _, adapter in named_adapters(model) for name, p in adapter.named_parameters()}
        for parameter, name in learned.items():
            parameter.grad = torch.full_like(parameter, 20.0 if name == "gate_bias" else 1.0)  # it begins at 8
        torch.optim.SGD(learned, lr=0.3).step()
        if not handed_on:
            with torch.no_grad(), pytest.raises(StaleStateError, match="new cache"):
                model(ids[:, 35:36], **{CACHE: cache})
            return
        for layer in rfa_layers(cache):
            layer.hand_on()
        with torch.set_grad_enabled(not without_gradients):
            steps = [model(ids[:, i : i + 1], **{CACHE: cache}).logits for i in range(35, 50)]
        logits.append(torch.cat(steps, dim=1).detach())
    assert_close(*logits, atol=1e-5, rtol=0)
    unchanged = converted(**settings)
    whole = outputs_of(unchanged, {"input_ids": ids, "use_cache": False})
    assert not torch.allclose(logits[0], whole[:, 35:50], atol=1e-3)  # it makes a difference


# --- padding and packing without a cache -----------------------------------------------------------------------------

# OPT and GPT-OSS do not take document borders from `position_ids`, nor do Jamba's recurrent layers.
PACKS = [family for family in CAUSAL if family not in ("opt", "gpt_oss", "jamba")]
DOCUMENTS = [30, 3, 25, 12]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("family", PACKS)
def test_packed_documents_are_separate_documents(family, config):
    model, ids = converted(family, CONFIGS[config]), token_ids(1)
    packed = outputs_of(
        model,
        {"input_ids": ids, "position_ids": torch.cat([torch.arange(n) for n in DOCUMENTS])[None], "use_cache": False},
    )
    alone = [outputs_of(model, {"input_ids": part, "use_cache": False}) for part in ids.split(DOCUMENTS, dim=1)]
    assert_close(packed, torch.cat(alone, dim=1), atol=1e-3 if config == "trigonometric" else 2e-5, rtol=0)


def test_packed_documents_of_several_rows():
    model, ids = converted(), token_ids(2)
    splits = [[30, 40], [11, 59]]
    position = torch.stack([torch.cat([torch.arange(n) for n in lengths]) for lengths in splits])
    packed = outputs_of(model, {"input_ids": ids, "position_ids": position, "use_cache": False})
    for row, lengths in enumerate(splits):
        parts = ids[row : row + 1].split(lengths, dim=1)
        alone = torch.cat([outputs_of(model, {"input_ids": part, "use_cache": False}) for part in parts], dim=1)
        assert_close(packed[row], alone[0], atol=2e-5, rtol=0)


def test_packed_documents_by_their_lengths():
    """What a padding-free data collator hands over."""
    model, ids = converted(), token_ids(1)
    ends = torch.tensor([0, *DOCUMENTS]).cumsum(0).to(torch.int32)
    lengths = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 30, "max_length_k": 30}
    position = torch.cat([torch.arange(n) for n in DOCUMENTS])[None]
    packed = outputs_of(model, {"input_ids": ids, "position_ids": position, "use_cache": False, **lengths})
    alone = [outputs_of(model, {"input_ids": part, "use_cache": False}) for part in ids.split(DOCUMENTS, dim=1)]
    assert_close(packed, torch.cat(alone, dim=1), atol=2e-5, rtol=0)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_packed_documents_by_their_numbers(family):
    """`seq_idx` alone, while the positions run on: what the first document says changes nothing in the second."""
    model, ids = converted(family), token_ids(1)
    number = (torch.arange(70) >= 30).to(torch.int32)[None]
    other = torch.cat([ids[:, :30].flip(1), ids[:, 30:]], dim=1)
    one, two = (outputs_of(model, {"input_ids": x, "use_cache": False, "seq_idx": number}) for x in (ids, other))
    together = outputs_of(model, {"input_ids": other, "use_cache": False})
    assert_close(one[:, 30:], two[:, 30:], atol=2e-5, rtol=0)
    assert (together - two)[:, 30:].abs().max() > 1e-3


def padding_mask(side, length=70):
    slots, padding = torch.arange(length), torch.tensor([23, 0])[:, None]
    return (slots >= padding).long() if side == "left" else (slots < length - padding).long()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", [*CAUSAL, "bert"])
def test_a_padded_row_gives_what_the_bare_row_gives(family, side):
    model = converted(family)
    mask = padding_mask(side)
    inputs = {"input_ids": token_ids().where(mask.bool(), 2), "attention_mask": mask}
    # OPT counts positions from the mask itself, Jamba has none, BERT would number them from the padding on.
    if family not in ("opt", "jamba"):
        inputs["position_ids"] = positions(mask)
    padded = outputs_of(model, inputs)
    for row in range(2):
        kept = mask[row].bool()
        bare = outputs_of(model, {"input_ids": token_ids()[row, kept][None]})
        assert_close(padded[row, kept], bare[0], atol=2e-5, rtol=0)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_what_stands_in_the_padding_does_not_matter(family, config):
    model = converted(family, CONFIGS[config])
    mask = padding_mask("left")
    one, two = (
        outputs_of(model, {"input_ids": token_ids().where(mask.bool(), filler), "attention_mask": mask})
        for filler in (2, 77)
    )
    assert torch.equal(one[mask.bool()], two[mask.bool()])
    assert torch.isfinite(one).all()


def test_a_mask_of_ones_is_no_mask():
    model, ids = converted(), token_ids()
    masked = outputs_of(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    assert torch.equal(masked, outputs_of(model, {"input_ids": ids}))


def test_padding_in_an_encoder_reaches_cross_attention():
    model = converted("bart")
    ids, decoder, mask = token_ids(), token_ids(2, 40, seed=1), padding_mask("right")
    padded = outputs_of(model, {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": decoder})
    bare = outputs_of(model, {"input_ids": ids[:1, :47], "decoder_input_ids": decoder[:1]})
    assert_close(padded[:1], bare, atol=2e-5, rtol=0)


# --- revert ----------------------------------------------------------------------------------------------------------


def test_generate_after_revert_is_softmax_with_a_plain_cache():
    model, ids = build("llama"), token_ids()
    before = generate(model, ids)
    hf_rfa.convert(model, SHORT, calibrate=False)
    generate(model, ids)
    hf_rfa.revert(model)
    out = generate(model, ids, return_dict_in_generate=True)
    assert torch.equal(out.sequences, before)
    assert not rfa_layers(cache_of(out))


def test_the_cache_of_generate_is_ours_in_every_converted_layer():
    for family in ("llama", "gpt2", "gemma3"):
        model = converted(family)
        out = generate(model, token_ids(), 2, return_dict_in_generate=True)
        assert len(rfa_layers(cache_of(out))) == len(attention_modules(model))
    out = generate(converted("jamba"), token_ids(), 2, return_dict_in_generate=True)
    assert [isinstance(layer, RFACacheLayer) for layer in cache_of(out).layers] == [False, True]
