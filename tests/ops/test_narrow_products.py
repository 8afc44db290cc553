"""Products in bfloat16: how near outputs, gradients and states stay to the definition, and which calls have them."""

import pytest
import torch
from operator_inputs import random_inputs, tokens, with_gradients

from hf_rfa import rfa_attention, rfa_attention_reference
from hf_rfa.ops.causal import narrow_products

N, DIM = 300, 32
OPTIONS = {"feature_map": "hyperbolic", "window": 32, "sink_tokens": 4, "alpha": 0.4}
#: |got - want| / |want|. Rounding the output to bfloat16 is 1.7e-3 of it.
OUTPUT, GRADIENT = 2.5e-3, 8e-3
CASES = {
    "plain": {},
    "kept keys": {"kept_keys": 24},
    "many kept keys": {"kept_keys": 400},
    "sink logits": {"sink_logits": torch.tensor([0.5, -1.0, 2.0, 0.0])},
    "gate": {"gate_weight": torch.full((2, DIM), 0.02), "gate_bias": torch.full((2,), 3.0)},
    "padding": {"token_mask": torch.arange(N) >= torch.tensor([[0], [37]])},
    "centres and bounds": {
        "query_center": torch.full((2, DIM), 0.1), "key_center": torch.full((2, DIM), -0.2),
        "query_transform": 1.2 * torch.eye(DIM).repeat(2, 1, 1), "key_transform": torch.eye(DIM).repeat(2, 1, 1) / 1.2,
        "query_radius": 5.0, "key_radius": 6.0,
    },
    "large exponents": {"alpha": 2.5},
}  # fmt: skip


@pytest.fixture(autouse=True)
def fast_products(monkeypatch):
    """On every CPU, as if it had them."""
    monkeypatch.setattr(narrow_products, "multiplies_bfloat16", lambda: True)


def inputs_of(dtype=torch.bfloat16, size=1.0):
    return random_inputs(N, dim=DIM, value_dim=DIM, dtype=dtype, size=size)


def error(got, want):
    return float((got.detach().double() - want.detach().double()).norm() / want.detach().double().norm())


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_near_the_definition(case):
    inputs, options = inputs_of(), OPTIONS | CASES[case]
    wide = {n: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for n, x in options.items()}
    leaves = {name: x for name, x in inputs.items() if name != "omega"}  # what learns omega is float32
    doubles = {name: x.double() for name, x in leaves.items()}
    want, of_want = with_gradients(lambda **x: rfa_attention_reference(**x, omega=inputs["omega"]), doubles, **wide)
    got, of_got = with_gradients(lambda **x: rfa_attention(**x, omega=inputs["omega"]), leaves, **options)
    assert got.dtype == torch.bfloat16
    assert error(got, want) < OUTPUT
    assert torch.equal(rfa_attention(**inputs, **options), got)
    for name, gradient in of_want.items():
        assert of_got[name].dtype == torch.bfloat16
        assert error(of_got[name], gradient) < GRADIENT, name


@pytest.mark.parametrize("kept_keys", [0, 24])
def test_a_text_in_two_pieces(kept_keys):
    inputs, options = inputs_of(), {**OPTIONS, "kept_keys": kept_keys, "output_final_state": True}
    want, final = rfa_attention(**inputs, **options)
    first, state = rfa_attention(**tokens(inputs, slice(77)), **options)
    second, state = rfa_attention(**tokens(inputs, slice(77, None)), **options, initial_state=state)
    assert error(torch.cat([first, second], dim=2), want) < OUTPUT
    assert state.kv_state.dtype == torch.float32
    assert error(state.kv_state, final.kv_state) < OUTPUT


def state_of(**changes):
    inputs = inputs_of() | {n: changes.pop(n) for n in ("query", "key", "value", "omega") if n in changes}
    return rfa_attention(**inputs, **(OPTIONS | changes), output_final_state=True)[1].kv_state


def as_float32(monkeypatch, **changes):
    with monkeypatch.context() as context:
        context.setattr(narrow_products, "multiplies_bfloat16", lambda: False)
        return state_of(**changes)


def test_they_are_what_runs_where_the_cpu_has_them(monkeypatch):
    assert not torch.equal(state_of(), as_float32(monkeypatch))


OTHERS = {
    "a map with signs": {"feature_map": "trigonometric"},
    "a map with a maximum": {"feature_map": "positive"},
    "small windows": {"window": 16},
    "no window": {"window": 0},
    "float32": inputs_of(torch.float32),
    "float16": inputs_of(torch.float16),
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_calls_stay_float32(monkeypatch, case):
    assert torch.equal(state_of(**OTHERS[case]), as_float32(monkeypatch, **OTHERS[case]))


def test_a_learned_omega_stays_float32(monkeypatch):
    inputs = inputs_of()
    inputs["omega"].requires_grad_()
    got = rfa_attention(**inputs, **OPTIONS)
    monkeypatch.setattr(narrow_products, "multiplies_bfloat16", lambda: False)
    assert torch.equal(got, rfa_attention(**inputs, **OPTIONS))
