"""Which keys are exact: the operator's own choice as a mask, held to the definition and to what the operator does."""

import pytest
import torch
from operator_inputs import assert_near, operator_call, random_inputs

from hf_rfa import rfa_attention
from hf_rfa.ops.exact_keys import ExactKeys
from hf_rfa.ops.reference import reference_exact_keys

N = 90
MASK, DOCUMENTS = torch.ones(2, N, dtype=torch.bool), torch.zeros(2, N, dtype=torch.int64)
MASK[0, :5] = MASK[0, 60:66] = MASK[1, 81:] = False
DOCUMENTS[0, 35:], DOCUMENTS[0, 41:], DOCUMENTS[0, 88:], DOCUMENTS[1, 50:] = 1, 2, 3, 1
LAYOUTS = {
    "plain": {}, "padding": {"token_mask": MASK}, "documents": {"segment_ids": DOCUMENTS},
    "both": {"token_mask": MASK, "segment_ids": DOCUMENTS},
}  # fmt: skip
CAUSAL = pytest.mark.parametrize("causal", [True, False])
LAYOUT = pytest.mark.parametrize("layout", LAYOUTS)


def pairs(call, queries=None, rows=slice(None)):
    """Visible and exact pairs, without those of padding."""
    exact_keys = ExactKeys.of(call)
    queries = torch.arange(N) if queries is None else queries
    asking = exact_keys.token_mask[rows][:, queries, None].unsqueeze(1)
    return [(mask & asking).expand(-1, 2, -1, -1) for mask in exact_keys.pairs(queries, rows)]


@CAUSAL
@LAYOUT
@pytest.mark.parametrize("kept_keys", [0, 3, 8, 20, 400])
@pytest.mark.parametrize("extras", [{}, {"sink_logits": torch.tensor([0.5, -1.0, 2.0, 0.0])}, {"sink_tokens": 0}])
def test_the_mask_is_that_of_the_definition(extras, kept_keys, layout, causal):
    options = {"window": 8, "sink_tokens": 3, "kept_keys": kept_keys, "causal": causal, **extras, **LAYOUTS[layout]}
    call = operator_call(random_inputs(N), **options)
    visible, exact = pairs(call)
    assert torch.equal(exact, reference_exact_keys(call))
    assert (visible & ~exact).any() == (kept_keys < 400)


@CAUSAL
@LAYOUT
def test_heads_that_keep_different_numbers(layout, causal):
    options = {"window": 8, "sink_tokens": 3, "kept_keys": [12, 0], "causal": causal, **LAYOUTS[layout]}
    call = operator_call(random_inputs(N), **options)
    _, exact = pairs(call)
    for head in range(2):
        assert torch.equal(exact[:, head : head + 1], reference_exact_keys(call.heads([head])))
    some, queries = slice(1, 2), torch.tensor([3, 40, 77])
    assert torch.equal(pairs(call, queries, some)[1], exact[some][:, :, queries])


@CAUSAL
@LAYOUT
def test_it_is_what_the_operator_sees_exactly(layout, causal):
    """Without a far part the operator is softmax under the mask."""
    inputs = random_inputs(N, dtype=torch.bfloat16)
    options = {"window": 8, "sink_tokens": 3, "kept_keys": 6, "causal": causal, "gamma": 0.0, **LAYOUTS[layout]}
    _, exact = pairs(operator_call(inputs, **options))
    q, k, v = (inputs[name].double() for name in ("query", "key", "value"))
    scores = (q.unflatten(1, (2, 2)) @ k.unsqueeze(2).mT * 8**-0.5).masked_fill(~exact.unsqueeze(2), -torch.inf)
    want = torch.nan_to_num(scores.softmax(-1)) @ v.unsqueeze(2)  # padding sees nothing
    assert_near(rfa_attention(**inputs, **options).unflatten(1, (2, 2)), want, 0.01)


@CAUSAL
def test_without_kept_keys_nothing_is_chosen(causal, monkeypatch):
    for name in ("align", "choose_encoder_keys"):
        monkeypatch.setattr(f"hf_rfa.ops.exact_keys.{name}", None)
    call = operator_call(random_inputs(N), window=8, sink_tokens=3, causal=causal)
    slots = torch.arange(N)
    near = (slots[:, None] // 8 - slots // 8).abs() <= 1
    visible = (slots <= slots[:, None]) | (not causal)
    assert torch.equal(pairs(call)[1], (visible & (near | (slots < 3))).expand(2, 2, N, N))
    with pytest.raises(TypeError):
        ExactKeys.of(operator_call(random_inputs(N), window=8, kept_keys=1, causal=causal))
