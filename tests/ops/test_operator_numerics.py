"""What the operator does where the estimate fails, what it counts, and what it refuses."""

import math

import pytest
import torch
from operator_inputs import FEATURE_MAPS, Tensors, assert_near, random_inputs, tokens, with_gradients

from hf_rfa import ConfigError, rfa_attention, rfa_attention_reference
from hf_rfa.ops.combine import FarStatistics
from hf_rfa.ops.layout import TokenLayout

N = 100
CAUSAL = pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])


def dense_parts(inputs: Tensors, *, window: int, sinks: int, causal: bool, alpha: float = 1.0, token_mask=None):
    """Trigonometric RFA written out with N x N kernels, float64.

    Returns the near kernel, the far kernel (both (B, H, N, N), zero where a key is not seen), the values (B, H, N, M),
    and which queries have far keys (B, N).
    """
    groups = inputs["query"].shape[1] // inputs["key"].shape[1]
    query = inputs["query"].double()
    key, value = (inputs[name].double().repeat_interleave(groups, dim=1) for name in ("key", "value"))
    omega = inputs["omega"].double().repeat_interleave(groups, dim=0)
    batch, _, length, dim = query.shape
    token_mask = torch.ones(batch, length, dtype=torch.bool) if token_mask is None else token_mask
    rank = token_mask.long().cumsum(1) - 1  # padding is not counted
    query_rank, key_rank = rank[:, :, None], rank[:, None, :]
    seen = token_mask[:, :, None] & token_mask[:, None, :]
    if causal:
        seen = seen & (key_rank <= query_rank)
    if window:
        near = seen & (((query_rank // window - key_rank // window).abs() <= 1) | (key_rank < sinks))
    else:
        near = torch.zeros_like(seen)
    exact = (query @ key.mT / math.sqrt(dim)).exp()
    query, key = (alpha * x / dim**0.25 for x in (query, key))
    # cos(w.q - w.k) = cos cos + sin sin: the estimate is a mean of cosines.
    difference = torch.einsum("bhnd,hmd->bhnm", query, omega)[:, :, :, None] - torch.einsum(
        "bhnd,hmd->bhnm", key, omega
    ).unsqueeze(2)
    norms = query.square().sum(-1)[..., :, None] + key.square().sum(-1)[..., None, :]
    estimate = difference.cos().mean(-1) * (norms / 2).exp()
    far = seen & ~near
    return exact * near[:, None], estimate * far[:, None], value, far.any(-1)


# --- estimates that are not positive --------------------------------------------------------------------------------


@CAUSAL
@pytest.mark.parametrize("size", [1.0, 2.0])
def test_far_parts_that_are_not_positive_are_dropped(size, causal):
    inputs = random_inputs(N, size=size)
    near, far, value, has_far = dense_parts(inputs, window=8, sinks=4, causal=causal)
    dropped = has_far[:, None] & (far.sum(-1) <= 0)
    assert 0.01 < float(dropped.double().mean()) < 0.7  # some are, some are not
    options = {"feature_map": "trigonometric", "window": 8, "causal": causal}
    output = rfa_attention(**inputs, **options)
    window_only = rfa_attention(**inputs, **options, gamma=0.0)
    assert_near(output[dropped], window_only[dropped], 1e-10)
    both = (near + far) @ value / (near + far).sum(-1, keepdim=True)
    assert_near(output[~dropped], both[~dropped], 1e-9)
    assert_near(output, rfa_attention_reference(**inputs, **options), 1e-9)


@CAUSAL
@pytest.mark.parametrize("window", [0, 8])
def test_statistics_count_what_a_dense_computation_counts(window, causal):
    inputs = random_inputs(N, size=2.0)
    _, far, _, has_far = dense_parts(inputs, window=window, sinks=4, causal=causal)
    statistics = FarStatistics()
    rfa_attention(**inputs, feature_map="trigonometric", window=window, causal=causal, statistics=statistics)
    heads = inputs["query"].shape[1]
    assert int(statistics.queries) == int(has_far.sum()) * heads
    expected = int((has_far[:, None] & (far.sum(-1) <= 0)).sum())
    assert 0 < expected < int(statistics.queries)
    assert int(statistics.dropped) == expected
    assert statistics.dropped_fraction == expected / int(statistics.queries)


@CAUSAL
@pytest.mark.parametrize("window", [0, 8])
def test_statistics_leave_padding_out(window, causal):
    inputs = random_inputs(N, size=2.0)
    token_mask = torch.stack([torch.arange(N) >= 30, torch.arange(N) < 83])
    token_mask[:, 40:47] = False
    _, far, _, has_far = dense_parts(inputs, window=window, sinks=4, causal=causal, token_mask=token_mask)
    statistics = FarStatistics()
    options = {"feature_map": "trigonometric", "window": window, "causal": causal}
    rfa_attention(**inputs, **options, token_mask=token_mask, statistics=statistics)
    assert int(statistics.queries) == int(has_far.sum()) * 4
    assert int(statistics.dropped) == int((has_far[:, None] & (far.sum(-1) <= 0)).sum())


@pytest.mark.parametrize("window", [0, 8])
def test_statistics_of_decoding_are_those_of_the_whole(window):
    inputs = random_inputs(N, size=2.0)
    options = {"feature_map": "trigonometric", "window": window}
    whole, pieces = FarStatistics(), FarStatistics()
    rfa_attention(**inputs, **options, statistics=whole)
    state = None
    for part in [slice(0, 37), *(slice(i, i + 1) for i in range(37, N - 20)), slice(N - 20, N)]:
        _, state = rfa_attention(
            **tokens(inputs, part), **options, initial_state=state, output_final_state=True, statistics=pieces
        )
    assert int(pieces.queries) == int(whole.queries)
    assert int(pieces.dropped) == int(whole.dropped) > 0


def test_statistics_add_up_and_begin_at_zero():
    statistics = FarStatistics()
    assert statistics.dropped_fraction == 0.0
    inputs = random_inputs(N, size=2.0)
    counts = []
    for _ in range(2):  # as the layers of a model do
        rfa_attention(**inputs, feature_map="trigonometric", window=8, statistics=statistics)
        counts.append((int(statistics.dropped), int(statistics.queries)))
    assert counts[1] == (2 * counts[0][0], 2 * counts[0][1])


@pytest.mark.parametrize("feature_map", ["positive", "hyperbolic", "optimal_positive"])
@pytest.mark.parametrize("window", [0, 8])
def test_positive_maps_drop_nothing(window, feature_map):
    statistics = FarStatistics()
    rfa_attention(**random_inputs(N, size=2.0), feature_map=feature_map, window=window, statistics=statistics)
    assert int(statistics.dropped) == 0
    assert int(statistics.queries) == 2 * 4 * (N if not window else N - 16)


def test_heads_without_a_far_part_are_not_counted():
    statistics = FarStatistics()
    gamma = torch.tensor([0.0, 1.0])
    rfa_attention(**random_inputs(N), window=8, gamma=gamma, statistics=statistics)
    assert int(statistics.queries) == 2 * 2 * (N - 16)
    statistics = FarStatistics()
    rfa_attention(**random_inputs(N), window=8, softmax_heads=[0], statistics=statistics)
    assert int(statistics.queries) == 2 * 2 * (N - 16)


@CAUSAL
@pytest.mark.parametrize("length", [1, N])
def test_without_a_window_nothing_answers_a_dropped_query(length, causal):
    inputs = random_inputs(length, size=2.0, batch=8)
    _, far, value, _ = dense_parts(inputs, window=0, sinks=0, causal=causal)
    dropped = far.sum(-1) <= 0
    # A query's own key alone can be estimated below zero, too.
    assert 0.02 < float(dropped.double().mean()) < 0.9
    options = {"feature_map": "trigonometric", "window": 0, "causal": causal}
    output, gradients = with_gradients(rfa_attention, inputs, **options)
    assert bool((output[dropped] == 0).all())
    assert_near(output[~dropped], (far @ value / far.sum(-1, keepdim=True))[~dropped], 1e-8)
    assert all(bool(gradient.isfinite().all()) for gradient in gradients.values())
    assert bool((gradients["query"][dropped] == 0).all())
    assert bool((gradients["query"][~dropped] != 0).any())


@CAUSAL
@pytest.mark.parametrize("window", [0, 8])
def test_gradients_of_dropped_far_parts_are_those_of_the_definition(window, causal):
    inputs = random_inputs(N)
    _, far, _, has_far = dense_parts(inputs, window=window, sinks=4, causal=causal)
    assert int((has_far[:, None] & (far.sum(-1) <= 0)).sum()) > 5
    options = {"feature_map": "trigonometric", "window": window, "causal": causal}
    got, got_gradients = with_gradients(rfa_attention, inputs, **options)
    want, want_gradients = with_gradients(rfa_attention_reference, inputs, **options)
    assert_near(got, want, 1e-9)
    for name, gradient in want_gradients.items():
        assert bool(gradient.isfinite().all())
        assert_near(got_gradients[name], gradient, 1e-9, name)


@pytest.mark.parametrize("window", [0, 8])
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize("size", [0.0, 3.0])
def test_gradients_are_finite_in_float32(size, feature_map, window):
    inputs = random_inputs(N, size=size, dtype=torch.float32)
    output, gradients = with_gradients(rfa_attention, inputs, feature_map=feature_map, window=window)
    assert bool(output.isfinite().all())
    assert all(bool(gradient.isfinite().all()) for gradient in gradients.values())


# --- learned sinks --------------------------------------------------------------------------------------------------


@CAUSAL
@pytest.mark.parametrize("window", [0, 8])
@pytest.mark.parametrize("softmax_heads", [(), (1,)])
def test_sink_logits_add_to_the_denominator_only(softmax_heads, window, causal):
    inputs = random_inputs(N, size=0.7)
    logits = torch.tensor([-2.0, 0.0, 1.5, 4.0], dtype=torch.float64)
    options = {"feature_map": "trigonometric", "window": window, "causal": causal}
    near, far, value, _ = dense_parts(inputs, window=window, sinks=4, causal=causal)
    far = far * (far.sum(-1, keepdim=True) > 0)
    if softmax_heads:  # query heads 2 and 3 belong to key head 1
        everything, nothing, _, _ = dense_parts(inputs, window=N, sinks=0, causal=causal)
        near[:, 2:], far[:, 2:] = everything[:, 2:], nothing[:, 2:]
    kernel = near + far
    want = kernel @ value / (kernel.sum(-1) + logits.exp()[:, None]).unsqueeze(-1)
    got = rfa_attention(**inputs, **options, sink_logits=logits, softmax_heads=softmax_heads)
    assert_near(got, want, 1e-10)
    without = rfa_attention(**inputs, **options, softmax_heads=softmax_heads)
    assert float((got - without).abs().max()) > 0.1


@pytest.mark.parametrize("window", [0, 8])
@pytest.mark.parametrize("softmax_heads", [(), (0, 1)])
def test_a_large_sink_takes_everything_and_a_small_one_nothing(softmax_heads, window):
    inputs = random_inputs(N, dtype=torch.float32)
    options = {"window": window, "softmax_heads": softmax_heads}
    large = rfa_attention(**inputs, **options, sink_logits=torch.full((4,), 200.0))  # exp(200) overflows float32
    assert float(large.abs().max()) < 1e-30
    small = rfa_attention(**inputs, **options, sink_logits=torch.full((4,), -200.0))
    assert_near(small, rfa_attention(**inputs, **options), 1e-5)


# --- what is refused ------------------------------------------------------------------------------------------------

BASE = random_inputs(20)


def of_shape(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.float64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"feature_map": "cosine"}, r"`feature_map` must be one of .*Got 'cosine'\."),
        ({"query": of_shape(2, 20, 8)}, r"`query` must be a floating-point tensor.*Got torch.float64 \(2, 20, 8\)\."),
        ({"query": [1.0]}, r"`query` must be a floating-point tensor.*Got list\."),
        (
            {"key": of_shape(2, 2, 20, 8).long()},
            r"`key` must be a floating-point tensor.*Got torch.int64 \(2, 2, 20, 8\)\.",
        ),
        ({"value": None}, r"`value` must be a floating-point tensor.*Got NoneType\."),
        ({"key": of_shape(2, 2, 19, 8)}, r"`key` must have shape .*= \(2, 2, 20, 8\)\. Got \(2, 2, 19, 8\)\."),
        ({"key": of_shape(1, 2, 20, 8)}, r"`key` must have shape .*= \(2, 2, 20, 8\)\. Got \(1, 2, 20, 8\)\."),
        ({"key": of_shape(2, 2, 20, 7)}, r"`key` must have shape .*= \(2, 2, 20, 8\)\. Got \(2, 2, 20, 7\)\."),
        ({"value": of_shape(2, 4, 20, 6)}, r"`value` must have shape .*= \(2, 2, 20, 6\)\. Got \(2, 4, 20, 6\)\."),
        ({"value": of_shape(2, 2, 21, 6)}, r"`value` must have shape .*= \(2, 2, 20, 6\)\. Got \(2, 2, 21, 6\)\."),
        (
            {"key": of_shape(2, 3, 20, 8), "value": of_shape(2, 3, 20, 6)},
            r"key heads divide\. Got 4 query heads, 3 key heads\.",
        ),
        (
            {"query": of_shape(2, 4, 0, 8), "key": of_shape(2, 2, 0, 8), "value": of_shape(2, 2, 0, 6)},
            r"one row with one token\. Got 2 rows of 0 tokens\.",
        ),
        (
            {"query": of_shape(0, 4, 20, 8), "key": of_shape(0, 2, 20, 8), "value": of_shape(0, 2, 20, 6)},
            r"one row with one token\. Got 0 rows of 20 tokens\.",
        ),
        ({"omega": of_shape(3, 16, 8)}, r"`omega` must have shape .*= \(2, m, 8\)\. Got \(3, 16, 8\)\."),
        ({"omega": of_shape(2, 16, 7)}, r"`omega` must have shape .*= \(2, m, 8\)\. Got \(2, 16, 7\)\."),
        ({"omega": of_shape(16, 8)}, r"`omega` must have shape .*Got \(16, 8\)\."),
        ({"window": -1}, r"`window` must be >= 0.*Got window=-1, sink_tokens=4\."),
        ({"sink_tokens": -1}, r"`sink_tokens` between 0 and `window`\. Got window=64, sink_tokens=-1\."),
        ({"window": 3}, r"`sink_tokens` between 0 and `window`\. Got window=3, sink_tokens=4\."),
        ({"alpha": torch.ones(4)}, r"`alpha` must have shape .*= \(2,\)\. Got \(4,\)\."),
        ({"gamma": torch.ones(2, 1)}, r"`gamma` must have shape .*= \(2,\)\. Got \(2, 1\)\."),
        ({"query_center": torch.zeros(3, 8)}, r"`query_center` must have shape .*= \(2, 8\)\. Got \(3, 8\)\."),
        ({"key_center": torch.zeros(2)}, r"`key_center` must have shape .*= \(2, 8\)\. Got \(2,\)\."),
        ({"proposal": torch.zeros(3)}, r"`proposal` must have shape .*= \(2,\)\. Got \(3,\)\."),
        ({"scaling": 0.0}, r"`scaling` must be positive\. Got 0\.0\."),
        ({"scaling": -1}, r"`scaling` must be positive\. Got -1\.0\."),
        ({"token_mask": torch.ones(2, 19)}, r"`token_mask` must have shape .*= \(2, 20\)\. Got \(2, 19\)\."),
        ({"token_mask": torch.ones(2, 1, 20, 20)}, r"`token_mask` must have shape .*Got \(2, 1, 20, 20\)\."),
        ({"segment_ids": torch.zeros(1, 20)}, r"`segment_ids` must have shape .*= \(2, 20\)\. Got \(1, 20\)\."),
        (
            {"layout": TokenLayout(torch.ones(2, 20).bool()), "segment_ids": torch.zeros(2, 20)},
            r"`layout` already holds `token_mask` and `segment_ids`\. Got both\.",
        ),
        (
            {"layout": TokenLayout(torch.ones(2, 5).bool())},
            r"`token_mask` must have shape .*= \(2, 20\)\. Got \(2, 5\)\.",
        ),
        ({"softmax_heads": [2]}, r"`softmax_heads` must be key heads 0\.\.1\. Got \[2\]\."),
        ({"softmax_heads": [0, -1]}, r"`softmax_heads` must be key heads 0\.\.1\. Got \[-1, 0\]\."),
        (
            {"sliding_window": 8},
            r"`sliding_window` belongs to causal layers whose key heads are all exact\. Got 8, .*softmax_heads=\[\]\.",
        ),
        ({"sliding_window": 8, "softmax_heads": [0]}, r"`sliding_window` .*Got 8, .*softmax_heads=\[0\]\."),
        ({"sliding_window": 0, "softmax_heads": [0, 1]}, r"`sliding_window` .*Got 0,"),
        (
            {"sliding_window": 8, "softmax_heads": [0, 1], "causal": False},
            r"`sliding_window` .*Got 8, causal=False, softmax_heads=\[0, 1\]\.",
        ),
        ({"sink_logits": torch.zeros(2)}, r"`sink_logits` must have shape .*= \(4,\)\. Got \(2,\)\."),
    ],
)
def test_wrong_arguments_are_named_with_what_was_got(change, message):
    with pytest.raises(ConfigError, match=message) as error:
        rfa_attention(**(BASE | change))
    assert str(error.value).endswith(".")


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"key": of_shape(2, 2, 19, 8)}, "key"),
        ({"omega": of_shape(3, 16, 8)}, "omega"),
        ({"window": -1}, "window"),
        ({"alpha": torch.ones(4)}, "alpha"),
        ({"token_mask": torch.ones(2, 19)}, "token_mask"),
        ({"scaling": 0.0}, "scaling"),
    ],
)
def test_the_definition_refuses_the_same(change, name):
    with pytest.raises(ConfigError, match=f"`{name}`"):
        rfa_attention_reference(**(BASE | change))


def test_a_state_of_another_batch_is_refused():
    _, state = rfa_attention(**random_inputs(20, batch=3), output_final_state=True)
    with pytest.raises(ConfigError, match=r"`initial_state` must have as many rows as query\. Got 3 instead of 2\."):
        rfa_attention(**BASE, initial_state=state)


@pytest.mark.parametrize("name", ["token_mask", "segment_ids"])
def test_a_layout_of_another_shape_is_refused(name):
    with pytest.raises(ConfigError, match=rf"`{name}` must have shape \(batch, tokens\)\. Got \(20,\)\."):
        TokenLayout(**{name: torch.ones(20)})


# --- narrow types ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [0, 8])
@pytest.mark.parametrize("key_heads", [2, 4])
@pytest.mark.parametrize("length", [1, 40, 200])
def test_narrow_tensors_are_computed_with_in_float32_and_rounded_once(length, key_heads, window, dtype):
    """Block by block without gradients, as a whole with them: the same numbers."""
    narrow = random_inputs(length, key_heads=key_heads, dtype=dtype)
    wide = {name: tensor.float() for name, tensor in narrow.items()}
    token_mask = torch.rand(2, length, generator=torch.Generator().manual_seed(0)) < 0.9
    gate = {"gate_weight": torch.full((key_heads, 8), 0.1), "gate_bias": torch.full((key_heads,), 3.0)}
    for more in ({}, {"token_mask": token_mask}, gate, {"sink_logits": torch.linspace(-1, 1, 4)}):
        options = {"window": window, "sink_tokens": min(window, 3), "alpha": 0.6, "output_final_state": True, **more}
        want, state_of_wide = rfa_attention(**wide, **options)
        output, state = rfa_attention(**narrow, **options)
        leaves = {name: t.clone().requires_grad_() if t.dtype == dtype else t for name, t in narrow.items()}
        with_gradients, _ = rfa_attention(**leaves, **options)
        for got in (output, with_gradients):
            assert got.dtype == dtype
            assert torch.equal(got, want.to(dtype))
        assert torch.equal(state.kv_state, state_of_wide.kv_state)
        assert torch.equal(state.near_value, state_of_wide.near_value.to(dtype))
