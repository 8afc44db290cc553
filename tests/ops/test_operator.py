"""The chunked operator against its float64 definition, against softmax where they must agree, and against the clock's
arrow: nothing that comes later may change what came before."""

import math

import pytest
import torch
import torch.nn.functional as F
from operator_inputs import (
    FEATURE_MAPS,
    assert_equals_the_definition,
    assert_near,
    random_inputs,
    tokens,
    with_gradients,
)
from torch.testing import assert_close

from hf_rfa import ConfigError, rfa_attention, rfa_attention_reference
from hf_rfa.ops.causal.passes import BLOCK_CHUNKS
from hf_rfa.ops.combine import FarStatistics

CAUSAL = pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])


def far_matters(inputs, **options) -> bool:
    """Whether the far part changes the output at all, so that a test of it is able to fail."""
    with_far = rfa_attention(**inputs, **options)
    without = rfa_attention(**inputs, **(options | {"gamma": 0.0}))
    return float((with_far - without).abs().max()) > 1e-3


# --- the definition -------------------------------------------------------------------------------------------------


@CAUSAL
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize("length", [1, 63, 64, 65, 100])
def test_window_64(length, feature_map, causal):
    inputs = random_inputs(length)
    assert_equals_the_definition(inputs, feature_map=feature_map, alpha=0.5, causal=causal)


@CAUSAL
@pytest.mark.parametrize("feature_map", ["trigonometric", "positive"])
def test_window_64_with_far_keys(feature_map, causal):
    # Far keys begin at token 128 (192 with keys behind), and 64 * BLOCK_CHUNKS tokens are handled at once.
    inputs = random_inputs(1000, batch=1, heads=2, key_heads=1)
    assert 64 * BLOCK_CHUNKS < 1000
    options = {"feature_map": feature_map, "alpha": 0.5, "causal": causal}
    assert_equals_the_definition(inputs, **options)
    assert far_matters(inputs, **options)


@pytest.mark.parametrize("feature_map", ["trigonometric", "optimal_positive"])
def test_no_window_1000(feature_map):
    inputs = random_inputs(1000, batch=1, heads=2, key_heads=1)
    assert_equals_the_definition(inputs, feature_map=feature_map, alpha=0.3, window=0)


@CAUSAL
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize("length", [1, 7, 8, 9, 15, 16, 17, 24, 25, 63, 64, 65, 66, 100, 129])
def test_window_8(length, feature_map, causal):
    inputs = random_inputs(length)
    options = {"feature_map": feature_map, "window": 8, "sink_tokens": 3, "alpha": 0.5, "causal": causal}
    assert_equals_the_definition(inputs, **options)
    assert far_matters(inputs, **options) == (length > 16)


@CAUSAL
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize("length", [1, 63, 64, 65, 100, 129])
def test_no_window(length, feature_map, causal):
    # Short vectors: no trigonometric denominator is negative. Those that are have tests of their own.
    inputs = random_inputs(length, size=0.5)
    assert_equals_the_definition(inputs, feature_map=feature_map, window=0, alpha=0.5, causal=causal)


@CAUSAL
@pytest.mark.parametrize("window", [1, 2, 3, 8])
@pytest.mark.parametrize("sinks", [0, 1, 2, 3, 4])
def test_sinks_and_odd_windows(sinks, window, causal):
    inputs = random_inputs(41)
    options = {"window": window, "sink_tokens": min(sinks, window), "alpha": 0.7, "causal": causal}
    assert_equals_the_definition(inputs, **options)
    assert far_matters(inputs, **options)


@CAUSAL
@pytest.mark.parametrize("window", [0, 8])
@pytest.mark.parametrize(("heads", "key_heads"), [(1, 1), (3, 3), (6, 2), (4, 1)], ids=["one", "mha", "gqa", "mqa"])
def test_groups_of_heads(heads, key_heads, window, causal):
    inputs = random_inputs(50, heads=heads, key_heads=key_heads)
    assert_equals_the_definition(inputs, window=window, alpha=0.5, causal=causal)


@CAUSAL
@pytest.mark.parametrize("window", [0, 8])
@pytest.mark.parametrize(("dim", "value_dim", "features"), [(8, 3, 16), (5, 12, 7), (16, 1, 1)])
def test_dimensions(dim, value_dim, features, window, causal):
    inputs = random_inputs(50, dim=dim, value_dim=value_dim, num_features=features)
    assert_equals_the_definition(inputs, window=window, alpha=0.5, causal=causal)


@CAUSAL
@pytest.mark.parametrize("window", [0, 8])
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_parameters_of_each_head_and_their_gradients(feature_map, window, causal):
    inputs = random_inputs(50, size=1.0 if window else 0.5)
    inputs["alpha"] = torch.tensor([0.3, 0.8], dtype=torch.float64)
    inputs["gamma"] = torch.tensor([0.5, 2.0], dtype=torch.float64)
    options = {"feature_map": feature_map, "window": window, "causal": causal, "sink_tokens": 2}
    if feature_map == "optimal_positive":
        inputs["proposal"] = torch.tensor([-0.2, 0.03], dtype=torch.float64)
    gradients = assert_equals_the_definition(inputs, **options)
    assert bool((gradients["alpha"].abs() > 1e-6).all())
    if window:  # without a window gamma cancels
        assert bool((gradients["gamma"].abs() > 1e-6).all())


def balanced_and_bounded(inputs):
    """The inputs with a change of variable A, A^-T of each key head and bounds that about half of all tokens meet."""
    generator = torch.Generator().manual_seed(11)
    change = torch.eye(8, dtype=torch.float64) + 0.2 * torch.randn(2, 8, 8, generator=generator, dtype=torch.float64)
    inputs["query_transform"], inputs["key_transform"] = change, torch.linalg.inv(change).mT.contiguous()
    inputs["query_radius"] = torch.tensor([1.2, 2.5], dtype=torch.float64)
    inputs["key_radius"] = torch.tensor([2.5, 1.2], dtype=torch.float64)
    return inputs


@CAUSAL
@pytest.mark.parametrize("window", [0, 8])
@pytest.mark.parametrize("feature_map", [*FEATURE_MAPS, ("hyperbolic", "trigonometric")])
def test_changes_of_variable_bounds_and_their_gradients(feature_map, window, causal):
    inputs = balanced_and_bounded(random_inputs(50, size=1.0 if window else 0.5))
    options = {"feature_map": feature_map, "window": window, "causal": causal, "alpha": 0.5, "sink_tokens": 2}
    gradients = assert_equals_the_definition(inputs, **options)
    for name in ("query_transform", "key_transform"):
        assert bool((gradients[name].abs() > 1e-7).any())
    plain = {name: tensor for name, tensor in inputs.items() if "transform" not in name and "radius" not in name}
    assert (rfa_attention(**inputs, **options) - rfa_attention(**plain, **options)).abs().max() > 1e-5


def test_a_bound_pulls_in_what_lies_outside_and_nothing_else():
    inputs = random_inputs(50)
    options = {"window": 8, "alpha": 0.5}
    plain = rfa_attention(**inputs, **options)
    wide = rfa_attention(**inputs, **options, query_radius=100.0, key_radius=0.0)  # 0 = none
    assert torch.equal(wide, plain)
    narrow = rfa_attention(**inputs, **options, key_radius=1.0)
    size = inputs["key"].norm(dim=-1, keepdim=True)
    assert (size > 1).all()
    # At alpha = 1 / |k| the kernel sees keys of length 1 in either case.
    inside = {**inputs, "key": inputs["key"] / size}
    far = rfa_attention(**inputs, window=0, alpha=0.5, key_radius=1.0)
    assert_near(far, rfa_attention(**inside, window=0, alpha=0.5), 1e-12)
    assert (narrow - plain).abs().max() > 1e-4


def test_heads_with_maps_of_their_own_are_what_they_are_alone():
    inputs = random_inputs(60)
    names = ("trigonometric", "hyperbolic")
    options = {"window": 8, "alpha": 0.4, "sink_tokens": 2}
    both = rfa_attention(**inputs, **options, feature_map=names)
    for head, name in enumerate(names):
        alone = rfa_attention(**inputs, **options, feature_map=name)
        queries = slice(2 * head, 2 * head + 2)
        assert_near(both[:, queries], alone[:, queries], 1e-13)
    with pytest.raises(ConfigError, match="equally many components"):
        rfa_attention(**inputs, feature_map=("positive", "hyperbolic"))
    with pytest.raises(ConfigError, match=r"one for each of 2 key heads\. Got 3 names"):
        rfa_attention(**inputs, feature_map=("positive",) * 3)


@CAUSAL
@pytest.mark.parametrize("window", [0, 8])
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_centres_and_their_gradients(feature_map, window, causal):
    inputs = random_inputs(50, size=1.0 if window else 0.5)
    generator = torch.Generator().manual_seed(7)
    for name in ("query_center", "key_center"):
        inputs[name] = 0.5 * torch.randn(2, 8, generator=generator, dtype=torch.float64)
    gradients = assert_equals_the_definition(inputs, feature_map=feature_map, window=window, alpha=0.5, causal=causal)
    assert bool((gradients["key_center"].abs() > 1e-6).any())
    plain = {name: tensor for name, tensor in inputs.items() if "center" not in name}
    options = {"feature_map": feature_map, "window": window, "alpha": 0.5, "causal": causal}
    assert (rfa_attention(**inputs, **options) - rfa_attention(**plain, **options)).abs().max() > 1e-4


@CAUSAL
@pytest.mark.parametrize("window", [0, 8])
def test_gradients_of_sink_logits(window, causal):
    inputs = random_inputs(50)
    inputs["sink_logits"] = torch.tensor([-1.0, 0.5, 2.0, 4.0], dtype=torch.float64)
    gradients = assert_equals_the_definition(inputs, window=window, alpha=0.5, causal=causal)
    assert bool((gradients["sink_logits"].abs() > 1e-6).all())


@CAUSAL
@pytest.mark.parametrize("scaling", [1.0, 0.1])
def test_scaling_is_the_one_that_is_passed(scaling, causal):
    inputs = random_inputs(50, size=0.7)
    assert_equals_the_definition(inputs, window=8, alpha=0.5, causal=causal, scaling=scaling)
    default = rfa_attention(**inputs, window=8, alpha=0.5, causal=causal)
    assert (
        float((rfa_attention(**inputs, window=8, alpha=0.5, causal=causal, scaling=scaling) - default).abs().max())
        > 0.01
    )
    explicit = rfa_attention(**inputs, window=8, alpha=0.5, causal=causal, scaling=8**-0.5)
    assert_close(explicit, default, rtol=0, atol=0)


@CAUSAL
def test_derivatives_are_those_of_finite_differences(causal):
    inputs = random_inputs(11, batch=1, heads=1, key_heads=1, dim=3, value_dim=2, num_features=4)
    leaves = [inputs[name].requires_grad_() for name in ("query", "key", "value", "omega")]

    def operator(q, k, v, w):
        return rfa_attention(q, k, v, omega=w, window=2, sink_tokens=1, alpha=0.5, causal=causal)

    assert torch.autograd.gradcheck(operator, leaves)
    if not causal:
        assert torch.autograd.gradgradcheck(operator, leaves)


def test_second_derivatives_of_the_causal_form_are_refused():
    inputs = random_inputs(11)
    query = inputs["query"].requires_grad_()
    (gradient,) = torch.autograd.grad(rfa_attention(**inputs).square().sum(), query, create_graph=True)
    with pytest.raises(NotImplementedError, match="no derivative of the second order"):
        gradient.sum().backward()


# --- softmax --------------------------------------------------------------------------------------------------------


def dense_softmax(inputs, visible: torch.Tensor) -> torch.Tensor:
    """Attention written out, over the keys that `visible` (N, N) allows."""
    groups = inputs["query"].shape[1] // inputs["key"].shape[1]
    key, value = (inputs[name].repeat_interleave(groups, dim=1) for name in ("key", "value"))
    scores = inputs["query"] @ key.mT / math.sqrt(key.shape[-1])
    return scores.masked_fill(~visible, -torch.inf).softmax(-1) @ value


def near_mask(length: int, window: int, sinks: int, causal: bool) -> torch.Tensor:
    """Which keys are exact: own chunk, the one before (and behind), the first `sinks`; token by token."""
    mask = torch.zeros(length, length, dtype=torch.bool)
    for i in range(length):
        for j in range(length):
            near = j < sinks or abs(i // window - j // window) <= 1
            mask[i, j] = near and (j <= i or not causal)
    return mask


@CAUSAL
@pytest.mark.parametrize("sinks", [0, 3])
@pytest.mark.parametrize("length", [5, 16, 17, 70])
def test_gamma_zero_is_a_window_of_softmax(length, sinks, causal):
    inputs = random_inputs(length)
    mask = near_mask(length, 8, sinks, causal)
    got = rfa_attention(**inputs, window=8, sink_tokens=sinks, gamma=0.0, causal=causal)
    assert_near(got, dense_softmax(inputs, mask), 1e-12)


def test_gamma_zero_in_some_heads():
    inputs = random_inputs(70)
    both = rfa_attention(**inputs, window=8, gamma=torch.tensor([0.0, 1.0]))
    window_only = dense_softmax(inputs, near_mask(70, 8, 4, True))
    assert_near(both[:, :2], window_only[:, :2], 1e-12)
    assert_close(both[:, 2:], rfa_attention(**inputs, window=8)[:, 2:], rtol=0, atol=0)
    assert float((both[:, 2:] - window_only[:, 2:]).abs().max()) > 1e-3


@CAUSAL
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize(("length", "window"), [(63, 64), (100, 200), (128, 64), (16, 8)])
def test_sequences_without_far_keys_are_plain_softmax(length, window, feature_map, causal):
    inputs = random_inputs(length, size=2.0)
    got = rfa_attention(**inputs, feature_map=feature_map, window=window, causal=causal)
    want = F.scaled_dot_product_attention(
        inputs["query"], inputs["key"], inputs["value"], is_causal=causal, enable_gqa=True
    )
    assert_near(got, want, 1e-12)


@CAUSAL
@pytest.mark.parametrize("feature_map", [name for name in FEATURE_MAPS if name != "clustered"])
def test_many_features_come_close_to_softmax(feature_map, causal):
    # The one test in which the far part itself has to be right and not only equal to the definition.
    inputs = random_inputs(64, batch=1, heads=2, key_heads=2, size=0.5, num_features=4096)
    options = {"window": 8, "sink_tokens": 0, "causal": causal}
    want = F.scaled_dot_product_attention(inputs["query"], inputs["key"], inputs["value"], is_causal=causal)
    error = (rfa_attention(**inputs, feature_map=feature_map, **options) - want).norm() / want.norm()
    without = (rfa_attention(**inputs, gamma=0.0, **options) - want).norm() / want.norm()
    assert error < 0.05 < 0.5 < without


@CAUSAL
def test_alpha_zero_is_the_plain_mean_of_the_far_values(causal):
    inputs = random_inputs(40, batch=1, heads=1, key_heads=1)
    got = rfa_attention(**inputs, window=8, sink_tokens=2, alpha=0.0, gamma=0.3, causal=causal)
    near = near_mask(40, 8, 2, causal)
    far = (torch.ones(40, 40, dtype=torch.bool).tril() if causal else torch.ones(40, 40, dtype=torch.bool)) & ~near
    scores = (inputs["query"] @ inputs["key"].mT / math.sqrt(8)).exp()
    weights = torch.where(near, scores, 0.0) + 0.3 * far.double()
    assert_near(got, weights @ inputs["value"] / weights.sum(-1, keepdim=True), 1e-12)


@CAUSAL
@pytest.mark.parametrize("window", [0, 8])
def test_the_estimate_lies_between_the_values_with_positive_features(window, causal):
    inputs = random_inputs(60, size=2.0)
    output = rfa_attention(**inputs, window=window, causal=causal)
    values = inputs["value"].repeat_interleave(2, dim=1)
    assert bool((output <= values.amax(2, keepdim=True) + 1e-12).all())
    assert bool((output >= values.amin(2, keepdim=True) - 1e-12).all())


@CAUSAL
def test_softmax_heads_are_softmax_and_leave_the_others_alone(causal):
    inputs = random_inputs(70, heads=6, key_heads=3)
    options = {"window": 8, "alpha": 0.5, "causal": causal}
    linear = rfa_attention(**inputs, **options)
    exact = dense_softmax(inputs, torch.ones(70, 70, dtype=torch.bool).tril() if causal else torch.ones(70, 70).bool())
    got = rfa_attention(**inputs, **options, softmax_heads=[1])
    assert_near(got[:, 2:4], exact[:, 2:4], 1e-12)
    assert_near(got[:, [0, 1, 4, 5]], linear[:, [0, 1, 4, 5]], 1e-12)
    assert_near(rfa_attention(**inputs, **options, softmax_heads=[2, 0, 1, 1]), exact, 1e-12)


@CAUSAL
def test_gradients_with_softmax_heads(causal):
    inputs = random_inputs(50)
    options = {"window": 8, "alpha": 0.5, "causal": causal}
    _, mixed = with_gradients(rfa_attention, inputs, **options, softmax_heads=[1])
    _, linear = with_gradients(rfa_attention, inputs, **options)
    for name in ("query", "key", "value", "omega"):
        half = mixed[name].shape[0 if name == "omega" else 1] // 2
        part = (slice(half),) if name == "omega" else (slice(None), slice(half))
        rest = (slice(half, None),) if name == "omega" else (slice(None), slice(half, None))
        assert_near(mixed[name][part], linear[name][part], 1e-10, name)
        assert bool((mixed[name][rest] == 0).all()) == (name == "omega")


@pytest.mark.parametrize("sinks", [None, torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)], ids=["", "sink"])
@pytest.mark.parametrize("width", [1, 2, 64, 299, 300, 1000])
def test_sliding_windows_of_exact_heads(width, sinks):
    # 300 tokens: more than the block of queries that one mask is made for.
    inputs = random_inputs(300, batch=1)
    options = {"sliding_window": width, "softmax_heads": [0, 1], "sink_logits": sinks}
    distance = torch.arange(300)[:, None] - torch.arange(300)
    visible = (distance >= 0) & (distance < width)

    def dense(query, key, value, omega):
        groups = query.shape[1] // key.shape[1]
        key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
        scores = (query @ key.mT / math.sqrt(8)).masked_fill(~visible, -torch.inf)
        weights = scores.exp()
        total = weights.sum(-1) + (0.0 if sinks is None else sinks.exp()[:, None])
        return weights @ value / total.unsqueeze(-1) + 0 * omega.sum()

    got, want = rfa_attention(**inputs, **options), dense(**inputs)
    assert_near(got, want, 1e-12)
    no_omega = {name: tensor for name, tensor in inputs.items() if name != "omega"}
    _, got_gradients = with_gradients(rfa_attention, no_omega, omega=inputs["omega"], **options)
    _, want_gradients = with_gradients(dense, no_omega, omega=inputs["omega"])
    for name, gradient in want_gradients.items():
        assert_near(got_gradients[name], gradient, 1e-10, name)


# --- dtypes ---------------------------------------------------------------------------------------------------------


@CAUSAL
@pytest.mark.parametrize("window", [0, 8, 64])
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_float32(feature_map, window, causal):
    inputs = random_inputs(200, dtype=torch.float32, size=1.0 if window else 0.5)
    options = {"feature_map": feature_map, "window": window, "alpha": 0.5, "causal": causal}
    got, got_gradients = with_gradients(rfa_attention, inputs, **options)
    want, want_gradients = with_gradients(rfa_attention_reference, inputs, **options)
    assert got.dtype == torch.float32
    assert_near(got, want, 1e-4)
    for name, gradient in want_gradients.items():
        assert got_gradients[name].dtype == torch.float32
        assert_near(got_gradients[name], gradient, 1e-4, f"gradient of {name}")


@CAUSAL
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [0, 8])
@pytest.mark.parametrize("feature_map", ["trigonometric", "positive"])
def test_half_precision_is_float32_rounded_once(feature_map, window, dtype, causal):
    inputs = random_inputs(150, dtype=dtype)
    wide = {name: tensor.float() for name, tensor in inputs.items()}
    options = {"feature_map": feature_map, "window": window, "alpha": 0.5, "causal": causal}
    got = rfa_attention(**inputs, **options)
    assert got.dtype == dtype
    assert torch.equal(got, rfa_attention(**wide, **options).to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_in_half_precision(dtype):
    inputs = random_inputs(150, dtype=dtype)
    _, got = with_gradients(rfa_attention, inputs, window=8, alpha=0.5)
    _, want = with_gradients(rfa_attention, {n: t.float() for n, t in inputs.items()}, window=8, alpha=0.5)
    for name, gradient in want.items():
        assert got[name].dtype == inputs[name].dtype
        assert_near(got[name], gradient, 0.05 if dtype == torch.bfloat16 else 0.01, name)


def test_omega_in_half_precision_is_cast_up():
    # `model.to(torch.bfloat16)` casts buffers too; the features are computed in float32 all the same.
    inputs = random_inputs(150, dtype=torch.bfloat16)
    rounded = inputs | {"omega": inputs["omega"].bfloat16()}
    assert torch.equal(
        rfa_attention(**rounded, window=8), rfa_attention(**(inputs | {"omega": rounded["omega"].float()}), window=8)
    )


@CAUSAL
@pytest.mark.parametrize("softmax_heads", [(), (1,)])
@pytest.mark.parametrize("length", [1, 150])
def test_autocast_changes_nothing(length, softmax_heads, causal):
    inputs = random_inputs(length, dtype=torch.float32)
    options = {"window": 8, "alpha": 0.5, "causal": causal, "softmax_heads": softmax_heads}

    def under_autocast(**arguments):  # the backward pass is meant to run outside
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.ones(2, 2).mm(torch.ones(2, 2)).dtype == torch.bfloat16
            return rfa_attention(**arguments)

    want, want_gradients = with_gradients(rfa_attention, inputs, **options)
    got, got_gradients = with_gradients(under_autocast, inputs, **options)
    assert torch.equal(got, want)
    for name, gradient in want_gradients.items():
        assert torch.equal(got_gradients[name], gradient), name


# --- large numbers --------------------------------------------------------------------------------------------------


@CAUSAL
@pytest.mark.parametrize("window", [0, 8])
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_long_keys_stay_finite_and_right(feature_map, window, causal):
    inputs = random_inputs(100, num_features=64)
    inputs["key"] = 50 * inputs["key"] / inputs["key"].norm(dim=-1, keepdim=True)
    narrow = {name: tensor.float() for name, tensor in inputs.items()}
    exact = {name: tensor.double() for name, tensor in narrow.items()}
    options = {"feature_map": feature_map, "window": window, "causal": causal}
    got, gradients = with_gradients(rfa_attention, narrow, **options)
    want = rfa_attention_reference(**exact, **options)
    assert all(bool(t.isfinite().all()) for t in (got, want, *gradients.values()))
    if feature_map == "trigonometric":
        # |psi|^2 = exp(884) is beyond float32: rounding of the far sum moves the sign of some denominators.
        close = ((got - want).abs() < 1e-2 * want.abs().max()).double().mean()
        assert close > 0.95
    else:
        assert_near(got, want, 2e-3)


@pytest.mark.parametrize("size", [10.0, 50.0, 1e2, 1e4])
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize("window", [0, 8])
def test_absurd_norms_give_finite_outputs(window, feature_map, size):
    inputs = random_inputs(100, dtype=torch.float32, size=size)
    output = rfa_attention(**inputs, feature_map=feature_map, window=window)
    assert bool(output.isfinite().all())
    if feature_map != "trigonometric":
        # A weighted mean of the values, whatever the weights.
        assert float(output.abs().max()) <= float(inputs["value"].abs().max()) * (1 + 1e-5)


@pytest.mark.parametrize("size", [10.0, 20.0, 25.0, 30.0, 40.0, 50.0, 60.0, 80.0, 1e2, 150.0, 200.0, 1e4])
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize("window", [0, 8])
def test_absurd_norms_give_finite_gradients(window, feature_map, size):
    # Estimates near the smallest number that float32 holds: their reciprocals are near the largest.
    inputs = random_inputs(100, dtype=torch.float32, size=size)
    _, gradients = with_gradients(rfa_attention, inputs, feature_map=feature_map, window=window)
    assert all(bool(gradient.isfinite().all()) for gradient in gradients.values())


@pytest.mark.parametrize("window", [0, 8])
def test_growing_norms_do_not_lose_the_early_keys(window):
    # A maximum that is not rescaled would let the first keys vanish or the last ones overflow.
    inputs = random_inputs(300)
    inputs["key"] = inputs["key"] * torch.linspace(0.1, 6, 300, dtype=torch.float64)[:, None]
    narrow = {name: tensor.float() for name, tensor in inputs.items()}
    for reverse in (False, True):
        case = {n: t if n == "omega" or not reverse else t.flip(2) for n, t in narrow.items()}
        want = rfa_attention_reference(**case, window=window)
        assert_near(rfa_attention(**case, window=window), want, 1e-4)


# --- causality ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize("window", [0, 8])
def test_a_late_token_changes_no_earlier_output(window, feature_map, dtype):
    inputs = random_inputs(150, dtype=dtype)
    options = {"feature_map": feature_map, "window": window, "alpha": 0.5}
    before = rfa_attention(**inputs, **options)
    for token in (1, 2, 5, 7, 8, 63, 64, 65, 100, 127, 128, 149):
        changed = {name: tensor.clone() for name, tensor in inputs.items()}
        # A huge norm: a maximum over the whole sequence, or over the chunk, would underflow everybody else.
        for name in ("query", "key", "value"):
            changed[name][:, :, token] = 1000.0
        after = rfa_attention(**changed, **options)
        assert torch.equal(after[:, :, :token], before[:, :, :token]), token
        assert not torch.equal(after[:, :, token], before[:, :, token]), token


@pytest.mark.parametrize("window", [0, 8])
def test_gradients_do_not_reach_into_the_future(window):
    inputs = random_inputs(100)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
    for token in (0, 7, 8, 20, 64, 99):
        output = rfa_attention(**leaves, window=window, alpha=0.5)
        for name in ("query", "key", "value"):
            (gradient,) = torch.autograd.grad(output[:, :, token].sum(), leaves[name], retain_graph=True)
            assert bool((gradient[:, :, token + 1 :] == 0).all()), (name, token)
            assert bool((gradient[:, :, : token + 1] != 0).any()) or (name, token) != ("value", token)


@CAUSAL
@pytest.mark.parametrize("window", [0, 8])
def test_rows_of_the_batch_do_not_meet(window, causal):
    inputs = random_inputs(100, batch=3)
    whole = rfa_attention(**inputs, window=window, causal=causal)
    for row in range(3):
        alone = rfa_attention(**tokens(inputs, slice(None), slice(row, row + 1)), window=window, causal=causal)
        assert_near(whole[row : row + 1], alone, 1e-12)


@pytest.mark.parametrize("window", [0, 8])
def test_a_prefix_gives_the_prefix_of_the_output(window):
    inputs = random_inputs(150)
    whole = rfa_attention(**inputs, window=window, alpha=0.5)
    for length in (1, 8, 20, 64, 65, 149):
        assert_near(
            rfa_attention(**tokens(inputs, slice(length)), window=window, alpha=0.5), whole[:, :, :length], 1e-12
        )


# --- the call -------------------------------------------------------------------------------------------------------


@CAUSAL
@pytest.mark.parametrize("softmax_heads", [(), (0,), (0, 1)])
def test_inputs_are_left_as_they_were(softmax_heads, causal):
    inputs = random_inputs(70)
    copies = {name: tensor.clone() for name, tensor in inputs.items()}
    statistics = FarStatistics()
    rfa_attention(**inputs, window=8, causal=causal, softmax_heads=softmax_heads, statistics=statistics)
    assert all(torch.equal(inputs[name], copies[name]) for name in inputs)


@CAUSAL
def test_memory_layout_does_not_matter(causal):
    # Transformers hands over transposed views of (B, N, H, D).
    inputs = random_inputs(70)
    views = {n: t if n == "omega" else t.transpose(1, 2).contiguous().transpose(1, 2) for n, t in inputs.items()}
    assert not views["query"].is_contiguous()
    assert_near(
        rfa_attention(**views, window=8, causal=causal), rfa_attention(**inputs, window=8, causal=causal), 1e-13
    )


@CAUSAL
def test_the_answer_is_the_same_twice_and_reads_no_global_generator(causal):
    inputs = random_inputs(100, dtype=torch.float32)
    state = torch.get_rng_state()
    first = rfa_attention(**inputs, window=8, causal=causal)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(rfa_attention(**inputs, window=8, causal=causal), first)
