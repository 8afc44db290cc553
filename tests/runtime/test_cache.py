"""The cache layer of a converted module: its state, its bytes, and the methods that Transformers calls."""

import pytest
import torch
from conversions import adapters, converted
from decoding import CONFIG, CONFIGS, LEFT_PADDING, in_pieces, left_padded, positions, rest_of, whole
from families import CACHE, build, token_ids
from torch.testing import assert_close

import hf_rfa
from hf_rfa import StaleStateError, UnsupportedModelError
from hf_rfa.ops.layout import TokenLayout
from hf_rfa.ops.settings import AttentionSettings
from hf_rfa.runtime.arguments import cache_of
from hf_rfa.runtime.attention_call import AttendInputs
from hf_rfa.runtime.cache import RFACacheLayer
from hf_rfa.runtime.calls import begin_layer

# --- a layer alone ---------------------------------------------------------------------------------------------------

SETTINGS = AttentionSettings(window=8, sink_tokens=2, scaling=8**-0.5)


@pytest.fixture(scope="module")
def adapter():
    return adapters(converted("llama"))[0]


def new_tokens(adapter, length, **settings):
    """Queries of four heads, keys and values of two, head_dim 8."""
    tokens = random_tokens(length)
    return AttendInputs(*tokens, adapter.kernel, SETTINGS.replace(**settings), TokenLayout())


def random_tokens(length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, heads, length, 8, generator=generator) for heads in (4, 2, 2)]


def part_of(new, start, stop):
    query, key, value = (tensor[:, :, start:stop] for tensor in new.tokens)
    return AttendInputs(query, key, value, new.kernel, new.settings, new.layout)


def assert_same_future(layer, state, new):
    """Tokens to come see the same in both: a state's sums have any scale, beside its `log_max`."""
    later = AttendInputs(*random_tokens(20, seed=9), new.kernel, new.settings, new.layout)
    assert torch.equal(layer.state.count, state.count)
    assert_close(later.attend(layer.state)[0], later.attend(state)[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("softmax_heads", [(), (1,)])
@torch.no_grad()
def test_extending_and_decoding_give_the_attention_of_all_tokens_at_once(adapter, softmax_heads):
    new = new_tokens(adapter, 30, softmax_heads=softmax_heads)
    expected, state = new.attend(output_final_state=True)
    layer = RFACacheLayer()
    outputs = [layer.extend(part_of(new, 0, 21))]
    outputs += [layer.decode(part_of(new, i, i + 1)) for i in range(21, 26)]
    outputs.append(layer.extend(part_of(new, 26, 30)))
    assert_close(torch.cat(outputs, dim=2), expected, atol=1e-5, rtol=1e-5)
    assert layer.get_seq_length() == 30
    assert layer.get_mask_sizes(5) == (35, 0)
    assert_same_future(layer, state, new)


def test_a_layer_extends_with_gradients(adapter):
    new = new_tokens(adapter, 20)
    new.value.requires_grad_()
    layer = RFACacheLayer()
    layer.extend(part_of(new, 0, 12))
    layer.extend(part_of(new, 12, 20)).sum().backward()
    assert new.value.grad[:, :, :12].abs().sum() > 0


@pytest.mark.parametrize("removed", [1, 7, 8, 20])
@torch.no_grad()
def test_a_layer_takes_recorded_tokens_back(adapter, removed):
    new = new_tokens(adapter, 40)
    layer = RFACacheLayer()
    layer.extend(part_of(new, 0, 15))
    layer.activate_past_recording()
    layer.extend(part_of(new, 15, 33))
    layer.extend(part_of(new, 33, 40))
    layer.crop(-removed)
    _, expected = part_of(new, 0, 40 - removed).attend(output_final_state=True)
    assert layer.get_seq_length() == 40 - removed
    assert_same_future(layer, expected, new)


@torch.no_grad()
def test_recording_reaches_companions_and_ends_with_them(adapter):
    layer = RFACacheLayer()
    early = layer.companion("early")
    layer.activate_past_recording()
    for one in (layer, early, layer.companion("late")):
        one.extend(new_tokens(adapter, 9))
    layer.crop(-4)
    assert [one.seen for one in (layer, early, layer.companion("late"))] == [5, 5, 5]
    layer.stop_recording()
    assert not any(one.record_past for one in (layer, early, layer.companion("late")))


def test_a_layer_hands_new_keys_through_to_the_module_that_was_called_with_it_alone(adapter):
    new, layer = new_tokens(adapter, 3), RFACacheLayer()
    with pytest.raises(StaleStateError, match="no keys"):
        layer.update(new.key, new.value)
    layer.expected = "called"
    begin_layer(adapter, RFACacheLayer())
    with pytest.raises(StaleStateError, match="no keys"):  # another layer's turn
        layer.update(new.key, new.value)
    begin_layer(adapter, layer)
    key, value = layer.update(new.key, new.value)
    assert key is new.key
    assert value is new.value
    assert layer.keys.shape == (2, 2, 0, 8)  # models that ask are told that it holds none
    with pytest.raises(StaleStateError, match="no keys"):  # each update is announced
        layer.update(new.key, new.value)
    begin_layer(adapter, None)


@torch.no_grad()
def test_a_layer_belongs_to_the_conversion_that_filled_it(adapter):
    layer, other = RFACacheLayer(), adapters(converted(seed=7, softmax_heads=[(0, 1)]))[0]
    layer.check(other)
    assert layer.linear_heads == ((0, 0),)
    layer.check(adapter)  # still empty
    assert layer.linear_heads == ((0, 0), (0, 1))
    layer.extend(new_tokens(adapter, 3))
    layer.check(adapter)
    with pytest.raises(StaleStateError, match="another conversion"):
        layer.check(other)
    other.redraw(1)
    with pytest.raises(StaleStateError, match="draw 0 of omega; the model now has draw 1"):
        layer.check(other)
    layer.hand_on()
    layer.check(other)


@torch.no_grad()
def test_keys_of_a_plain_cache_become_the_state(adapter):
    new, token_mask = new_tokens(adapter, 30), torch.ones(2, 30, dtype=torch.bool)
    token_mask[0, :5] = False
    layout = TokenLayout(token_mask)
    expected, _ = AttendInputs(*new.tokens, new.kernel, new.settings, layout).attend()
    layer = RFACacheLayer()
    layer.given, layer.seen = (new.key[:, :, :20], new.value[:, :, :20]), 20
    rest = part_of(new, 20, 30)
    layer.absorb(rest, token_mask[:, :20])
    assert layer.given is None
    assert_close(layer.extend(rest), expected[:, :, 20:], atol=1e-5, rtol=1e-5)
    assert layer.seen == 30


def test_keys_of_another_shape_are_not_taken_over(adapter):
    new, layer = new_tokens(adapter, 3), RFACacheLayer()
    layer.given, layer.seen = (new.key[..., :4], new.value), 3
    with pytest.raises(UnsupportedModelError, match=r"not as the keys .*\(2, 2, 3, 4\)"):
        layer.absorb(new, None)
    assert layer.given is not None


@torch.no_grad()
def test_rows_of_a_layer_follow_while_it_decodes(adapter):
    new, rows = new_tokens(adapter, 20), torch.tensor([1, 1, 0])
    layer = RFACacheLayer()
    layer.extend(part_of(new, 0, 10))
    layer.decode(part_of(new, 10, 11))
    layer.reorder_cache(rows)
    rest = part_of(new, 11, 20)
    output = layer.extend(AttendInputs(*(t[rows] for t in rest.tokens), rest.kernel, rest.settings, rest.layout))
    assert_close(output, new.attend()[0][rows, :, 11:], atol=1e-5, rtol=1e-5)


def test_a_layer_is_not_offloaded():
    with pytest.raises(UnsupportedModelError, match="constant size"):
        RFACacheLayer().offload()


# --- bytes -----------------------------------------------------------------------------------------------------------


def long_context(family="llama", config="linear"):
    model = build(family)
    model.config.max_position_embeddings = 1_000_000
    return hf_rfa.convert(model, CONFIGS[config], calibrate=False)


def bytes_after(model, *lengths, piece=500):
    """Cache bytes after each of some increasing numbers of tokens."""
    cache, seen, result = None, 0, []
    for length in lengths:
        while seen < length:
            with torch.no_grad():
                out = model.model(token_ids(1, piece, seed=seen), **{CACHE: cache}, use_cache=True)
            cache, seen = cache_of(out), seen + piece
        assert cache.get_seq_length() == length
        result.append(hf_rfa.cache_bytes(cache))
    return result


@pytest.mark.parametrize(("family", "config"), [("llama", "linear"), ("llama", "pure"), ("gemma3", "linear")])
def test_the_cache_has_the_same_bytes_after_1k_and_after_20k_tokens(family, config):
    short, long = bytes_after(long_context(family, config), 1_000, 20_000)
    assert short == long > 0


@pytest.mark.slow
def test_the_cache_has_the_same_bytes_after_1k_and_after_100k_tokens():
    short, long = bytes_after(long_context(), 1_000, 100_000)
    assert short == long > 0


def test_the_bytes_of_the_cache_are_those_of_its_definition():
    """Layer: kv (2, 32, 9) float32, log_max (2,), near 2 x (2, 16, 8), sinks 2 x (2, 2, 8), count int64."""
    (measured,) = bytes_after(long_context(), 1_000)
    assert measured == 2 * (4 * (2 * 32 * 9 + 2 + 2 * 2 * 16 * 8 + 2 * 2 * 2 * 8) + 8)


def test_exact_heads_pay_for_their_own_keys_and_values_only():
    linear, exact = (bytes_after(long_context(config=config), 1_000, 2_000) for config in ("linear", "exact head"))
    assert linear[1] == linear[0]
    assert exact[1] - exact[0] == 1_000 * 2 * 8 * 4  # tokens x (key + value) x head_dim x float32


def test_bytes_of_an_unconverted_model():
    model = build("llama")
    with torch.no_grad():
        cache = cache_of(model(token_ids(2, 50), use_cache=True))
    assert hf_rfa.cache_bytes(cache) == 2 * 2 * (2 * 2 * 50 * 8) * 4


# --- the methods of the cache ----------------------------------------------------------------------------------------


def filled(config, ids, lengths=(33,), family="llama", mask=None):
    """A converted model, and its cache of the first tokens."""
    model = converted(family, CONFIGS[config])
    return model, in_pieces(model, ids, lengths, mask=mask)[1]


@CONFIG
def test_reorder_cache(config):
    ids, order = token_ids(3), torch.tensor([2, 0, 2])
    model, cache = filled(config, ids)
    cache.reorder_cache(order)
    assert_close(rest_of(model, cache, ids[order], 33), whole(model, ids[order])[:, 33:], atol=1e-4, rtol=0)


@CONFIG
def test_batch_repeat_interleave(config):
    ids = token_ids(2)
    model, cache = filled(config, ids)
    cache.batch_repeat_interleave(3)
    repeated = ids.repeat_interleave(3, dim=0)
    assert_close(rest_of(model, cache, repeated, 33), whole(model, repeated)[:, 33:], atol=1e-4, rtol=0)


@pytest.mark.parametrize("rows", [torch.tensor([2, 0]), torch.tensor([True, False, True])], ids=["indices", "mask"])
@CONFIG
def test_batch_select_indices(config, rows):
    ids = token_ids(3)
    model, cache = filled(config, ids)
    cache.batch_select_indices(rows)
    assert_close(rest_of(model, cache, ids[rows], 33), whole(model, ids[rows])[:, 33:], atol=1e-4, rtol=0)


def test_rows_of_different_lengths_keep_their_own_counts():
    ids, mask = left_padded(33)
    model, cache = filled("exact head", ids, [20, 13], mask=mask)
    order = torch.tensor([1, 2, 0])
    cache.reorder_cache(order)
    new = token_ids(3, 9, seed=5)
    grown = torch.cat([mask[order], mask.new_ones(3, 9)], dim=1)
    with torch.no_grad():
        logits = model(new, **{CACHE: cache}, attention_mask=grown, position_ids=positions(grown)[:, 33:]).logits
    for row in range(3):
        bare = torch.cat([ids[order][row][mask[order][row].bool()], new[row]])[None]
        assert_close(logits[row], whole(model, bare)[0, -9:], atol=2e-5, rtol=0)


@CONFIG
def test_reset(config):
    ids = token_ids()
    model, cache = filled(config, ids)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert hf_rfa.cache_bytes(cache) == 0
    logits, _ = in_pieces(model, ids, [40, 30], cache)
    assert_close(logits, whole(model, ids), atol=1e-4, rtol=0)


def test_crop_0_confirms_everything():
    ids = token_ids()
    model, cache = filled("linear", ids)
    cache.activate_past_recording()
    in_pieces(model, ids[:, 33:40], [7], cache)
    cache.crop(0)
    assert cache.get_seq_length() == 40
    assert_close(rest_of(model, cache, ids, 40), whole(model, ids)[:, 40:], atol=2e-5, rtol=0)
    with pytest.raises(RuntimeError, match="recorded"):
        cache.crop(-31)  # 30 tokens came since, but those before are confirmed


@pytest.mark.parametrize("removed", [1, 2, 9, 10, 14, 15, 16, 17, 25, 29])
@pytest.mark.parametrize(
    ("family", "config"), [*(("llama", config) for config in CONFIGS), ("gemma3", "linear"), ("gpt_oss", "linear")]
)
def test_crop_takes_back_tokens_across_chunks_and_steps(family, config, removed):
    """Steps of 13, 1, 1 and 14 tokens after 20; the chunks of 8 end at 24, 32, 40 and 48."""
    ids = token_ids(2, 60)
    model, cache = filled(config, ids, [20], family)
    cache.activate_past_recording()
    in_pieces(model, ids[:, 20:49], [13, 1, 1, 14], cache)
    cache.crop(-removed)
    kept = 49 - removed
    assert cache.get_seq_length() == kept
    other = torch.cat([ids[:, :kept], token_ids(2, 60 - kept, seed=7)], dim=1)
    tolerance = 1e-3 if config == "trigonometric" else 2e-5
    assert_close(rest_of(model, cache, other, kept), whole(model, other)[:, kept:], atol=tolerance, rtol=0)


def test_crop_of_padded_rows():
    ids, mask = left_padded(33)
    model = converted(config=CONFIGS["exact head"])
    _, cache = in_pieces(model, ids, [15], mask=mask[:, :15])
    cache.activate_past_recording()
    with torch.no_grad():
        model(ids[:, 15:], **{CACHE: cache}, attention_mask=mask, position_ids=positions(mask)[:, 15:])
    cache.crop(-7)
    with torch.no_grad():
        again = model(ids[:, 26:], **{CACHE: cache}, attention_mask=mask, position_ids=positions(mask)[:, 26:]).logits
    for row, padding in enumerate(LEFT_PADDING):
        bare = whole(model, ids[row : row + 1, padding:])[0, max(26 - padding, 0) :]
        assert_close(again[row], bare, atol=2e-5, rtol=0)


def test_crop_of_more_than_was_recorded_is_an_error_and_changes_nothing():
    ids = token_ids()
    model, cache = filled("linear", ids, [30])
    with pytest.raises(RuntimeError, match="activate_past_recording"):
        cache.crop(-1)
    cache.activate_past_recording()
    in_pieces(model, ids[:, 30:40], [10], cache)
    with pytest.raises(RuntimeError, match="10 tokens"):
        cache.crop(-11)
    assert cache.get_seq_length() == 40
    assert_close(rest_of(model, cache, ids, 40), whole(model, ids)[:, 40:], atol=2e-5, rtol=0)


def test_crop_of_everything_is_a_reset():
    ids = token_ids()
    model, cache = filled("linear", ids, [30])
    cache.crop(-30)
    assert cache.get_seq_length() == 0
    assert_close(rest_of(model, cache, ids, 0), whole(model, ids), atol=2e-5, rtol=0)


def test_crop_takes_a_negative_number():
    _, cache = filled("linear", token_ids())
    with pytest.raises(ValueError, match="negative"):
        cache.crop(5)
