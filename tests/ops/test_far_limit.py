"""The limit of the far part's weight: what it does, and that every form does what the definition does."""

import pytest
import torch
from operator_inputs import assert_near, random_inputs, with_gradients
from operator_states import run_in_pieces

import hf_rfa
from hf_rfa import rfa_attention, rfa_attention_reference

OPTIONS = {"window": 8, "sink_tokens": 2, "feature_map": "hyperbolic"}
LIMIT = torch.tensor([0.02, 0.3, 0.0], dtype=torch.float64)


def inputs_of(length=70, dtype=torch.float64, **sizes):
    return random_inputs(
        length, batch=2, heads=6, key_heads=3, dim=16, value_dim=8, num_features=8, dtype=dtype, **sizes
    ) | {"gamma": torch.full((3,), 2.0, dtype=dtype)}


def far_share(limit, length=70, **options):
    """The share of each query's weight that the far part has, (B, H, N): values are 1 where keys are far, else 0."""
    inputs = inputs_of(length)
    place = torch.arange(length)
    values = []
    for i in range(length):  # what is far depends on the query, so each is asked alone
        far = (place < (i // 8 - 1) * 8) & (place >= 2)
        value = far.double().view(1, 1, length, 1).expand(2, 3, length, 8)
        out = rfa_attention(**inputs | {"value": value}, **OPTIONS, far_limit=limit, **options)
        values.append(out[:, :, i, 0])
    return torch.stack(values, 2)


def test_the_far_part_never_weighs_more_than_its_limit():
    free, limited = far_share(None), far_share(LIMIT)
    ratio = (limited / (1 - limited)).unflatten(1, (3, 2))
    assert (ratio[:, :2] <= LIMIT[:2].view(1, 2, 1, 1) * (1 + 1e-9)).all()
    assert ((free / (1 - free)).unflatten(1, (3, 2))[:, :2] > LIMIT[:2].view(1, 2, 1, 1)).float().mean() > 0.5
    assert torch.equal(limited.unflatten(1, (3, 2))[:, 2], free.unflatten(1, (3, 2))[:, 2])  # 0 is no limit


def test_estimates_below_the_limit_stay_as_they_are():
    inputs = inputs_of()
    assert torch.equal(rfa_attention(**inputs, **OPTIONS, far_limit=1e6), rfa_attention(**inputs, **OPTIONS))


@pytest.mark.parametrize("kept_keys", [0, 5])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("sinks", [False, True])
def test_outputs_and_gradients_equal_the_definition(kept_keys, causal, sinks):
    inputs = inputs_of()
    if sinks:
        inputs["sink_logits"] = torch.linspace(-1, 2, 6, dtype=torch.float64)
    options = OPTIONS | {"kept_keys": kept_keys, "causal": causal, "far_limit": LIMIT}
    want = with_gradients(rfa_attention_reference, inputs, **options)
    got = with_gradients(rfa_attention, inputs, **options)
    assert_near(got[0], want[0], 1e-10)
    for name, gradient in want[1].items():
        assert_near(got[1][name], gradient, 1e-9, name)
    free = rfa_attention(**inputs, **options | {"far_limit": None})
    assert (free - got[0]).abs().max() > 1e-3


@pytest.mark.parametrize("kept_keys", [0, 5])
def test_decoding_equals_the_definition(kept_keys):
    inputs, options = inputs_of(), OPTIONS | {"kept_keys": kept_keys, "far_limit": LIMIT}
    want = rfa_attention_reference(**inputs, **options)
    got, _ = run_in_pieces(inputs, [30, *[1] * 25, 15], **options)
    assert_near(got, want, 1e-10)


@pytest.mark.parametrize("kept_keys", [0, 5])
@pytest.mark.parametrize("sinks", [False, True])
def test_triton_equals_the_definition(kept_keys, sinks):
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs = inputs_of(length=50, dtype=torch.float32)
    if sinks:
        inputs["sink_logits"] = torch.linspace(-1, 2, 6)
    options = OPTIONS | {"window": 16, "kept_keys": kept_keys, "far_limit": LIMIT.float()}
    want = with_gradients(rfa_attention_reference, inputs, **options)
    here = {name: tensor.to(device) for name, tensor in inputs.items()}
    got = with_gradients(rfa_attention, here, **options, backend="triton")
    assert_near(got[0].cpu(), want[0], 2e-5)
    for name, gradient in want[1].items():
        assert_near(got[1][name].cpu(), gradient, 5e-5, name)


def test_without_a_window_there_is_no_limit():
    inputs = inputs_of()
    options = {"window": 0, "feature_map": "hyperbolic"}
    assert torch.equal(rfa_attention(**inputs, **options, far_limit=0.01), rfa_attention(**inputs, **options))


def test_a_wrong_shape_is_refused():
    with pytest.raises(hf_rfa.ConfigError, match="far_limit"):
        rfa_attention(**inputs_of(), **OPTIONS, far_limit=torch.ones(2, dtype=torch.float64))
