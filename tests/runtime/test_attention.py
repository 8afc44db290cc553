"""The attention function alone: one answer per kind of layer, and the calls that each refuses."""

import copy

import pytest
import torch
from families import SHORT
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.testing import assert_close
from transformers.masking_utils import sliding_window_causal_mask_function

import hf_rfa
from hf_rfa import UnsupportedModelError
from hf_rfa.runtime.adapter import ADAPTER_NAME, RFAAdapter
from hf_rfa.runtime.attention import rfa_attention_forward
from hf_rfa.runtime.attention_call import mask_of_its_own
from hf_rfa.runtime.cache import RFACacheLayer
from hf_rfa.runtime.calls import Interception, begin_layer, intercept
from hf_rfa.runtime.layer_cache import cache_layer_of
from hf_rfa.runtime.mask import RFAMask, rfa_mask

HEADS, KEY_HEADS, DIM, SCALING = 4, 2, 8, 0.3


class Attention(nn.Module):
    """All that the function knows of a module."""

    is_causal = True


def layer(**kind):
    module = Attention().eval()
    adapter = RFAAdapter(SHORT, 0, KEY_HEADS, DIM, **{"converted": not kind, **kind})
    module.add_module(ADAPTER_NAME, adapter)
    return module, adapter


def tokens(length=40, keys=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = (length, length, length) if keys is None else (length, keys, keys)
    shapes = zip((HEADS, KEY_HEADS, KEY_HEADS), lengths, strict=True)
    return [torch.randn(2, heads, n, DIM, generator=generator) for heads, n in shapes]


def attention(module, qkv, mask=None, **options):
    """(B, H, N, M), as the operator has it."""
    output, weights = rfa_attention_forward(module, *qkv, mask, scaling=SCALING, **options)
    assert weights is None
    return output.transpose(1, 2)


def softmax(qkv, **options):
    return scaled_dot_product_attention(*qkv, scale=SCALING, enable_gqa=True, **options)


def operator(adapter, qkv, **options):
    """The public operator with the adapter's tensors."""
    return hf_rfa.rfa_attention(
        *qkv, omega=adapter.omega, feature_map=adapter.feature_maps[0], window=SHORT.window,
        sink_tokens=SHORT.sink_tokens, alpha=adapter.alpha, gamma=adapter.gamma, scaling=SCALING, **options,
    )  # fmt: skip


def close(one, two):
    assert_close(one, two, atol=1e-5, rtol=1e-5)


# --- the kind of a layer ---------------------------------------------------------------------------------------------


def test_the_kind_of_a_layer_follows_its_exact_heads():
    _, adapter = layer()
    kinds = [adapter.kind]
    for heads in ([0], [0, 1], []):
        adapter.set_softmax_heads(tuple(heads))
        kinds.append(adapter.kind)
    assert kinds == ["linear", "linear", "softmax", "linear"]


@pytest.mark.parametrize(
    ("kind", "expected"), [({"converted": False}, "softmax"), ({"masked": True}, "masked"), ({"cross": True}, "cross")]
)
def test_the_kind_of_a_layer_that_is_not_converted(kind, expected):
    _, adapter = layer(**{"converted": False, **kind})
    assert adapter.kind == expected
    assert copy.deepcopy(adapter).kind == expected


def test_a_state_dict_brings_its_kind_along():
    _, exact = layer()
    exact.set_softmax_heads((0, 1))
    _, other = layer()
    assert other.kind == "linear"
    other.load_state_dict(exact.state_dict())
    assert other.kind == "softmax"


# --- linear ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [(), (1,)])
def test_a_linear_layer_is_the_operator(heads):
    module, adapter = layer()
    adapter.set_softmax_heads(heads)
    qkv = tokens()
    close(attention(module, qkv), operator(adapter, qkv, softmax_heads=heads))
    assert (attention(module, qkv) - softmax(qkv, is_causal=True)).abs().max() > 1e-2


def test_the_scaling_that_is_not_passed_is_that_of_the_head_dim():
    module, _ = layer()
    qkv = tokens()
    expected, _ = rfa_attention_forward(module, *qkv, None, scaling=DIM**-0.5)
    assert torch.equal(rfa_attention_forward(module, *qkv, None)[0], expected)


@pytest.mark.parametrize("told", ["module", "argument", "mask"])
def test_a_layer_that_sees_both_sides(told):
    module, adapter = layer()
    module.is_causal = told != "module"
    qkv, options = tokens(), {"is_causal": False} if told == "argument" else {}
    mask = RFAMask(causal=False) if told == "mask" else None
    close(attention(module, qkv, mask, **options), operator(adapter, qkv, causal=False))


def test_padding_and_packing_of_a_mask():
    module, adapter = layer()
    padding, segment_ids = torch.ones(2, 40, dtype=torch.bool), torch.arange(40).expand(2, -1) // 25
    padding[0, :7] = False
    mask = RFAMask(True, padding, segment_ids, keys=40)
    qkv = tokens()
    close(attention(module, qkv, mask), operator(adapter, qkv, token_mask=padding, segment_ids=segment_ids))


@pytest.mark.parametrize(
    "packing",
    [{"cu_seq_lens_q": torch.tensor([0, 13, 40], dtype=torch.int32)}, {"seq_idx": (torch.arange(40) >= 13)[None] + 0}],
    ids=["cu_seq_lens_q", "seq_idx"],
)
def test_packing_of_a_padding_free_collator(packing):
    module, _ = layer()
    query, key, value = (tensor[:1] for tensor in tokens())
    parts = [attention(module, [t[:, :, part] for t in (query, key, value)]) for part in (slice(13), slice(13, 40))]
    close(attention(module, (query, key, value), **packing), torch.cat(parts, dim=2))


def test_a_layer_with_a_cache_goes_on_from_it():
    module, adapter = layer()
    qkv, cache_layer, outputs = tokens(), RFACacheLayer(), []
    with torch.no_grad():
        for start, stop in [(0, 20), (20, 21), (21, 22), (22, 40)]:
            begin_layer(adapter, cache_layer)
            outputs.append(attention(module, [t[:, :, start:stop] for t in qkv]))
    close(torch.cat(outputs, dim=2), operator(adapter, qkv))
    assert cache_layer.seen == 40
    begin_layer(adapter, None)


def test_a_module_that_attends_twice_has_a_second_place_in_the_cache():
    _, adapter = layer()
    adapter.attends_twice, cache_layer = True, RFACacheLayer()
    begin_layer(adapter, cache_layer)
    found = [cache_layer_of(adapter) for _ in range(3)]
    assert found == [cache_layer, cache_layer.companion("twin"), None]
    begin_layer(adapter, None)


def test_a_layer_that_shares_keys_answers_for_the_last_tokens_alone():
    module, _ = layer()
    module.is_kv_shared_layer = True
    query, key, value = tokens()
    whole = attention(module, (query, key, value))
    last = attention(module, (query[:, :, -3:], key, value))
    assert last.shape == (2, HEADS, 3, DIM)
    close(last, whole[:, :, -3:])


# --- softmax, masked, cross ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cached", [False, True])
def test_a_softmax_layer_is_exact(cached):
    module, adapter = layer(converted=False)
    qkv, cache_layer = tokens(), RFACacheLayer() if cached else None
    begin_layer(adapter, cache_layer)
    first = attention(module, [t[:, :, :30] for t in qkv])
    if cached:
        begin_layer(adapter, cache_layer)
        rest = attention(module, [t[:, :, 30:] for t in qkv])
        close(torch.cat([first, rest], dim=2), softmax(qkv, is_causal=True))
    close(first, softmax([t[:, :, :30] for t in qkv], is_causal=True))
    begin_layer(adapter, None)


def windowed(length=40, window=5):
    """The mask of a local layer, as it comes and as a tensor."""
    function = sliding_window_causal_mask_function(window)
    mask = rfa_mask(2, length, length, mask_function=function, local_size=window)
    distance = torch.arange(length)[:, None] - torch.arange(length)
    return mask, (distance >= 0) & (distance < window)


@pytest.mark.parametrize("kind", [{}, {"masked": True}], ids=["softmax", "masked"])
@pytest.mark.parametrize("named", [False, True])
def test_layers_that_stay_softmax_follow_a_mask_of_their_own(kind, named):
    module, _ = layer(converted=False, **kind)
    (mask, visible), qkv = windowed(), tokens()
    options = {"sliding_window": 5} if named else {}
    close(attention(module, qkv, mask, **options), softmax(qkv, attn_mask=visible))


def test_a_window_that_the_layer_names_is_no_mask_of_its_own():
    mask, _ = windowed()
    assert mask_of_its_own(mask, {"sliding_window": 5}) is None
    assert mask_of_its_own(mask, {}) is mask.rows
    assert mask_of_its_own(None, {}) is None


def test_cross_attention_is_exact():
    module, _ = layer(converted=False, cross=True)
    module.is_causal = False
    qkv, padding = tokens(7, keys=30), torch.ones(2, 30, dtype=torch.bool)
    padding[1, 20:] = False
    close(attention(module, qkv), softmax(qkv))
    mask = RFAMask(causal=False, padding=padding, keys=30)
    close(attention(module, qkv, mask), softmax(qkv, attn_mask=padding[:, None, None]))


# --- interceptions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [(), (0, 1)], ids=["linear", "softmax"])
def test_an_observer_sees_what_the_layer_answers_exactly(heads):
    module, adapter = layer()
    adapter.set_softmax_heads(heads)
    qkv, seen = tokens(), []
    with intercept(Interception(observers={adapter: lambda *call: seen.append(call)})):
        output = attention(module, qkv)
    close(output, softmax(qkv, is_causal=True))
    ((observed, of, *arguments),) = seen
    assert (observed, of) == (adapter, module)
    assert all(given is expected for given, expected in zip(arguments, qkv, strict=False))
    assert arguments[4].softmax_heads == (0, 1)
    close(arguments[5], output)


@pytest.mark.parametrize("heads", [(), (0, 1)], ids=["linear", "softmax"])
def test_a_shard_answers_in_place_of_the_layer(heads):
    module, adapter = layer()
    adapter.set_softmax_heads(heads)
    qkv, seen = tokens(), []

    def shard(query, key, value, kernel, settings, layout, statistics, cache_layer):
        seen.append((kernel, settings.softmax_heads, layout.is_plain, cache_layer))
        return query * 2

    with intercept(Interception(shards={adapter: shard})):
        assert torch.equal(attention(module, qkv), qkv[0] * 2)
    assert seen == [(adapter.kernel, heads, True, None)]


# --- refusals --------------------------------------------------------------------------------------------------------


def test_a_module_without_an_adapter_says_what_to_call():
    with pytest.raises(UnsupportedModelError, match=r"no random features.*hf_rfa\.convert"):
        attention(Attention(), tokens())


@pytest.mark.parametrize("heads", [(), (0, 1)], ids=["linear", "softmax"])
def test_a_converted_layer_refuses_a_mask_that_it_did_not_have(heads):
    module, adapter = layer()
    adapter.set_softmax_heads(heads)
    with pytest.raises(UnsupportedModelError, match="did not have when it was converted"):
        attention(module, tokens(), windowed()[0])


def test_a_softmax_layer_with_a_cache_refuses_a_mask_of_its_own():
    module, adapter = layer(converted=False)
    begin_layer(adapter, cache_layer := RFACacheLayer())
    with pytest.raises(UnsupportedModelError, match="did not have when it was converted"):
        attention(module, tokens(), windowed()[0])
    assert cache_layer.seen == 0
    begin_layer(adapter, None)


@pytest.mark.parametrize("mask", [None, RFAMask(causal=True, keys=30)], ids=["no mask", "a causal mask"])
def test_more_keys_than_queries_are_refused_in_a_causal_layer(mask):
    module, _ = layer()
    with pytest.raises(UnsupportedModelError, match="30 keys for 7"):
        attention(module, tokens(7, keys=30), mask)


def test_a_sliding_window_on_both_sides_is_refused():
    module, _ = layer(converted=False)
    with pytest.raises(UnsupportedModelError, match="sliding window on both sides"):
        attention(module, tokens(), is_causal=False, sliding_window=5)


def test_an_offloaded_adapter_is_refused():
    module, adapter = layer()
    adapter.to("meta")
    with pytest.raises(UnsupportedModelError, match="offload"):
        attention(module, tokens())


def test_keys_from_before_the_first_token_are_refused_where_they_have_no_meaning():
    module, adapter = layer()
    query, key, value = tokens()
    for attends_twice, causal, words in [(True, True, "attends twice"), (False, False, "sees both sides")]:
        cache_layer = RFACacheLayer()
        cache_layer.given, cache_layer.seen = (key, value), 40
        adapter.attends_twice = attends_twice
        begin_layer(adapter, cache_layer)
        with pytest.raises(UnsupportedModelError, match=words):
            attention(module, (query, key, value), is_causal=causal)
    begin_layer(adapter, None)
