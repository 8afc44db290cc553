"""The softmax weight of far keys, held to a dense computation."""

import pytest
import torch
from operator_inputs import operator_call, random_inputs
from torch.testing import assert_close

from hf_rfa.calibration.far_mass import far_masses
from hf_rfa.ops.reference import reference_exact_keys


def dense(query, key, token_mask, segment_ids, *, window, sinks, scaling, causal, sink_logits):
    """Row by row, pair by pair."""
    batch, heads, groups, length, _ = query.shape
    given, taken = torch.zeros(batch, heads, groups, length), torch.zeros(batch, heads, length)
    for row in range(batch):
        rank, seen = [], {}
        for slot in range(length):
            name = int(segment_ids[row, slot])
            rank.append(seen.get(name, 0))
            seen[name] = seen.get(name, 0) + int(token_mask[row, slot])
        for i in range(length):
            if not token_mask[row, i]:
                continue
            keys = [
                j for j in range(length)
                if token_mask[row, j] and segment_ids[row, i] == segment_ids[row, j] and (j <= i or not causal)
            ]  # fmt: skip
            far = [
                j for j in keys
                if not window or (abs(rank[i] // window - rank[j] // window) > 1 and rank[j] >= sinks)
            ]  # fmt: skip
            for head in range(heads):
                for group in range(groups):
                    scores = key[row, head, keys] @ query[row, head, group, i] * scaling
                    if sink_logits is not None:
                        scores = torch.cat([scores, sink_logits.view(heads, groups)[head, group][None]])
                    weights = dict(zip(keys, scores.softmax(0).tolist(), strict=False))
                    for j in far:
                        given[row, head, group, i] += weights[j]
                        taken[row, head, j] += weights[j]
    return given, taken


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [0, 4])
@pytest.mark.parametrize("layout", ["plain", "padded", "packed", "both"])
def test_the_masses_are_those_of_a_dense_computation(layout, window, causal):
    length = 26
    inputs = random_inputs(length, dtype=torch.float32)
    query, key = inputs["query"].unflatten(1, (2, 2)), inputs["key"]
    token_mask = torch.ones(2, length, dtype=torch.bool)
    segment_ids = torch.zeros(2, length, dtype=torch.int64)
    if layout in ("padded", "both"):
        token_mask[0, :3], token_mask[1, 10:12], token_mask[1, -2:] = False, False, False
    if layout in ("packed", "both"):
        segment_ids[0, 12:], segment_ids[1, 5:], segment_ids[1, 21:] = 1, 1, 2
    settings = {"window": window, "sink_tokens": 2, "scaling": 0.4, "causal": causal}
    given, taken = far_masses(operator_call(inputs, token_mask=token_mask, segment_ids=segment_ids, **settings))
    options = {"window": window, "sinks": 2, "scaling": 0.4, "causal": causal, "sink_logits": None}
    want_given, want_taken = dense(query, key, token_mask, segment_ids, **options)
    assert_close(given, want_given, atol=1e-5, rtol=1e-5)
    assert_close(taken, want_taken, atol=1e-5, rtol=1e-5)
    assert (want_given > 0.01).any()


def test_sink_logits_take_weight():
    inputs = random_inputs(20, dtype=torch.float32, batch=1)
    query, key, logits = inputs["query"].unflatten(1, (2, 2)), inputs["key"], torch.tensor([-1.0, 0.0, 1.0, 3.0])
    got = far_masses(operator_call(inputs, window=4, sink_tokens=0, scaling=0.4, sink_logits=logits))
    plain = torch.ones(1, 20, dtype=torch.bool), torch.zeros(1, 20, dtype=torch.int64)
    want = dense(query, key, *plain, window=4, sinks=0, scaling=0.4, causal=True, sink_logits=logits)
    assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_without_a_window_a_query_gives_all_it_has():
    """More rows than are scored at once."""
    inputs = random_inputs(600, dtype=torch.float32, batch=1)
    given, taken = far_masses(operator_call(inputs, window=0, sink_tokens=0, scaling=0.4))
    assert_close(given, torch.ones_like(given), atol=1e-5, rtol=0)
    assert_close(taken.sum(-1), given.sum((2, 3)), atol=0, rtol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kept_keys", [5, [3, 0]])
@pytest.mark.parametrize("layout", ["plain", "both"])
def test_kept_keys_are_not_far(layout, kept_keys, causal):
    """Against the weights in float64 under the mask of the definition."""
    length = 90
    inputs = random_inputs(length)
    token_mask, segment_ids = torch.ones(2, length, dtype=torch.bool), torch.zeros(2, length, dtype=torch.int64)
    if layout == "both":
        token_mask[0, :3] = token_mask[1, 10:12] = token_mask[1, -2:] = False
        segment_ids[0, 42:], segment_ids[1, 5:], segment_ids[1, 71:] = 1, 1, 2
    logits = torch.tensor([-1.0, 0.0, 1.0, 3.0])
    options = {
        "window": 4, "sink_tokens": 2, "scaling": 0.4, "causal": causal, "sink_logits": logits,
        "token_mask": token_mask, "segment_ids": segment_ids,
    }  # fmt: skip
    call = operator_call(inputs, **options, kept_keys=kept_keys)
    exact = torch.zeros(2, 2, length, length, dtype=torch.bool)
    for heads, group in call.groups():
        exact[:, heads] = reference_exact_keys(group)
    visible = (segment_ids[:, :, None] == segment_ids[:, None]) & token_mask[:, None] & token_mask[:, :, None]
    visible = (visible.tril() if causal else visible)[:, None, None]
    scores = (call.query @ call.key.unsqueeze(2).mT * 0.4).masked_fill(~visible, -torch.inf)
    total = torch.logaddexp(scores.logsumexp(-1), logits.view(2, 2, 1).double())
    weights = (scores - total.unsqueeze(-1)).exp() * (visible & ~exact[:, :, None])
    given, taken = far_masses(call)
    assert_close(given, weights.sum(-1).float(), atol=1e-6, rtol=1e-5)
    assert_close(taken, weights.sum((2, 3)).float(), atol=1e-6, rtol=1e-5)
    none = far_masses(operator_call(inputs, **options))[0]
    assert (given <= none + 1e-6).all()
    assert given[:, 0].sum() < 0.95 * none[:, 0].sum()
