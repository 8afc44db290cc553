"""The mask function: what it makes of the masks that Transformers composes, and what it hands to the layers."""

import pytest
import torch
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    packed_sequence_mask_function,
    sdpa_mask,
    sliding_window_causal_mask_function,
)

from hf_rfa import UnsupportedModelError
from hf_rfa.ops.softmax import QUERY_BLOCK
from hf_rfa.runtime.calls import ForwardCall, Interception, forward_call
from hf_rfa.runtime.mask import RFAMask, padding_of, rfa_mask

DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 2], [0, 1, 1, 1, 1, 1]])
LEFT_PADDED = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])


def mask_of(function=causal_mask_function, length=6, keys=None, **options):
    keys = length if keys is None else keys
    return rfa_mask(2, length, keys, q_offset=keys - length, mask_function=function, **options)


def whole(rows, queries, keys):
    """All blocks of a mask in one (B, queries, keys)."""
    mask = torch.zeros(2, queries, keys, dtype=torch.bool)
    for block in rows.blocks():
        visible = block.visible.expand(2, -1, -1, -1)[:, 0]
        mask[:, block.start : block.stop, block.low : block.high] = visible
    return mask


def expected_rows(function, queries, keys, padding=None):
    visible = sdpa_mask(
        batch_size=2, q_length=queries, kv_length=keys, q_offset=keys - queries, kv_offset=0, mask_function=function,
        attention_mask=padding, allow_is_causal_skip=False,
    )  # fmt: skip
    return visible.expand(2, -1, -1, -1)[:, 0]


# --- what is made ----------------------------------------------------------------------------------------------------


def test_causality_alone():
    mask = mask_of()
    assert mask.causal
    assert mask.keys == 6
    assert (mask.padding, mask.segment_ids, mask.rows, mask.token_mask) == (None,) * 4
    assert mask.layout(6).is_plain


def test_a_bidirectional_layer_without_padding_needs_no_mask():
    assert mask_of(bidirectional_mask_function) is None
    assert mask_of(bidirectional_mask_function, attention_mask=torch.ones(2, 6)) is None


def test_a_bidirectional_layer_with_padding():
    mask = mask_of(bidirectional_mask_function, attention_mask=LEFT_PADDED)
    assert not mask.causal
    assert torch.equal(mask.token_mask, LEFT_PADDED.bool())


def test_packing_is_found_in_the_composed_function():
    mask = mask_of(and_masks(causal_mask_function, packed_sequence_mask_function(DOCUMENTS)))
    assert mask.causal
    assert mask.rows is None
    assert torch.equal(mask.segment_ids, DOCUMENTS)
    assert torch.equal(mask.layout(6).segment_ids, DOCUMENTS)


def test_one_document_a_row_is_no_packing():
    mask = mask_of(and_masks(causal_mask_function, packed_sequence_mask_function(DOCUMENTS * 0)))
    assert mask.causal
    assert mask.segment_ids is None


@pytest.mark.parametrize("keys", [6, 9])
def test_a_sliding_window_is_kept_as_rows(keys):
    function = sliding_window_causal_mask_function(3)
    mask = mask_of(function, keys=keys, local_size=3)
    assert mask.rows.sliding
    assert torch.equal(whole(mask.rows, 6, keys), expected_rows(function, 6, keys))


def test_a_window_wider_than_the_text_hides_nothing():
    assert mask_of(sliding_window_causal_mask_function(100)).rows is None


def test_a_function_of_neither_kind_is_kept_as_rows():
    def image_tokens_see_each_other(batch, head, query, key):
        return (key <= query) | ((query < 3) & (key < 3))

    mask = mask_of(image_tokens_see_each_other)
    assert not mask.causal
    assert not mask.rows.sliding
    assert torch.equal(whole(mask.rows, 6, 6), expected_rows(image_tokens_see_each_other, 6, 6))


def test_rows_with_padding_in_several_blocks():
    length = QUERY_BLOCK + 5
    function, padding = sliding_window_causal_mask_function(3), torch.ones(2, length, dtype=torch.bool)
    padding[0, : QUERY_BLOCK + 2] = False
    rows = mask_of(function, length, local_size=3, attention_mask=padding).rows
    blocks = rows.blocks()
    assert [(block.start, block.stop) for block in blocks] == [(0, QUERY_BLOCK), (QUERY_BLOCK, length)]
    assert blocks[1].low == QUERY_BLOCK - 2  # columns that none of its rows sees are left out
    assert torch.equal(whole(rows, length, length), expected_rows(function, length, length, padding))
    assert rows.blocks() is blocks  # made once for all layers


def test_other_masks_than_2d_are_refused():
    with pytest.raises(UnsupportedModelError, match=r"2-D attention masks .* Got shape \(2, 1, 6, 6\)"):
        mask_of(attention_mask=torch.ones(2, 1, 6, 6))


def test_the_mask_of_an_outer_model_is_handed_through():
    mask = mask_of()
    assert mask_of(attention_mask=mask) is mask


def test_a_mask_carries_the_forward_that_layers_must_know_of_in_the_backward_pass():
    call = ForwardCall(1, 7, Interception())
    with forward_call(call):
        assert mask_of().call is call
        assert mask_of(bidirectional_mask_function).call is call  # which alone is worth a mask
    assert mask_of().call is None


# --- what layers ask of it -------------------------------------------------------------------------------------------


def test_old_tokens_are_in_the_mask_but_not_in_the_layout():
    mask = mask_of(length=2, keys=6, attention_mask=LEFT_PADDED)
    assert torch.equal(mask.token_mask, LEFT_PADDED.bool())
    assert mask.layout(2).token_mask is None  # no padding among the new ones
    assert torch.equal(mask.layout(5).token_mask, LEFT_PADDED[:, 1:].bool())
    assert mask.layout(5) is mask.layout(5)  # one object for all layers


def test_a_longer_padding_mask_than_there_are_keys_is_cut():
    right_padded = LEFT_PADDED.flip(1)
    mask = mask_of(length=2, keys=4, attention_mask=right_padded)
    assert torch.equal(mask.token_mask, right_padded[:, 2:].bool())


def test_the_rows_of_the_last_queries():
    function = sliding_window_causal_mask_function(3)
    mask = mask_of(function, local_size=3)
    last = mask[:, :, -2:, :]
    assert torch.equal(whole(last.rows, 2, 6), expected_rows(function, 6, 6)[:, -2:])
    assert mask[:, :, 0:, :] is mask
    assert mask_of()[:, :, -1:, :].causal


@pytest.mark.parametrize(
    "index", [0, (slice(None),) * 4, (0, slice(None), slice(-1, None), slice(None)), (slice(None),) * 2]
)
def test_a_mask_cannot_be_taken_apart_otherwise(index):
    with pytest.raises(UnsupportedModelError, match="takes its attention mask apart"):
        mask_of()[index]


def test_a_mask_looks_like_no_tensor_that_transformers_knows():
    mask = mask_of(length=2, keys=6)
    assert mask.ndim == 1
    assert mask.shape == (6,)


# --- 4-D masks that say padding only ---------------------------------------------------------------------------------


@pytest.mark.parametrize("additive", [False, True])
def test_the_same_keys_for_all_queries_are_padding(additive):
    seen = LEFT_PADDED.bool()[:, None, None]
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min) if additive else seen
    found = padding_of(mask)
    assert isinstance(found, RFAMask)
    assert not found.causal
    assert torch.equal(found.token_mask, LEFT_PADDED.bool())


@pytest.mark.parametrize(
    "mask",
    [torch.ones(2, 6), torch.ones(2, 1, 6, 6), torch.ones(2, 4, 1, 6), torch.full((2, 1, 1, 6), -0.5)],
    ids=["2-D", "of queries", "of heads", "a bias"],
)
def test_other_masks_are_not_padding(mask):
    assert padding_of(mask) is None
