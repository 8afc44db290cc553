"""The softmax weight of far keys, held to a dense computation."""

import pytest
import torch
from operator_inputs import random_inputs
from torch.testing import assert_close

from hf_rfa.calibration.far_mass import far_masses
from hf_rfa.ops.layout import TokenLayout


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
    given, taken = far_masses(
        query, key, layout=TokenLayout(token_mask, segment_ids), window=window, sink_tokens=2, scaling=0.4,
        causal=causal, sink_logits=None,
    )  # fmt: skip
    options = {"window": window, "sinks": 2, "scaling": 0.4, "causal": causal, "sink_logits": None}
    want_given, want_taken = dense(query, key, token_mask, segment_ids, **options)
    assert_close(given, want_given, atol=1e-5, rtol=1e-5)
    assert_close(taken, want_taken, atol=1e-5, rtol=1e-5)
    assert (want_given > 0.01).any()


def test_sink_logits_take_weight():
    inputs = random_inputs(20, dtype=torch.float32, batch=1)
    query, key, logits = inputs["query"].unflatten(1, (2, 2)), inputs["key"], torch.tensor([-1.0, 0.0, 1.0, 3.0])
    got = far_masses(
        query, key, layout=TokenLayout(), window=4, sink_tokens=0, scaling=0.4, causal=True, sink_logits=logits
    )
    plain = torch.ones(1, 20, dtype=torch.bool), torch.zeros(1, 20, dtype=torch.int64)
    want = dense(query, key, *plain, window=4, sinks=0, scaling=0.4, causal=True, sink_logits=logits)
    assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_without_a_window_a_query_gives_all_it_has():
    """More rows than are scored at once."""
    inputs = random_inputs(600, dtype=torch.float32, batch=1)
    query = inputs["query"].unflatten(1, (2, 2))
    given, taken = far_masses(
        query, inputs["key"], layout=TokenLayout(), window=0, sink_tokens=0, scaling=0.4, causal=True,
        sink_logits=None,
    )  # fmt: skip
    assert_close(given, torch.ones_like(given), atol=1e-5, rtol=0)
    assert_close(taken.sum(-1), given.sum((2, 3)), atol=0, rtol=1e-5)
