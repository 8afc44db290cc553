"""A decoder: one token after the other in place, and nothing tells it from the operator."""

import dataclasses

import pytest
import torch
from operator_inputs import FEATURE_MAPS, assert_near, random_inputs
from operator_states import assert_equal_states

from hf_rfa import ConfigError, rfa_attention
from hf_rfa.ops.arguments import operator_arguments
from hf_rfa.ops.decode import Decoder
from hf_rfa.ops.layout import TokenLayout
from hf_rfa.ops.state import RFAState

# A window of 8 fills a chunk at 8, 16, ...: every kind of step comes up.
N = 43
CHANGE = torch.eye(8, dtype=torch.float64) + 0.1
KERNELS = {
    "plain": {},
    "softmax_heads": {"softmax_heads": (1,)},
    "sink_logits": {"sink_logits": torch.tensor([0.5, -1.0, 2.0, 0.0])},
    "calibrated": {
        "alpha": torch.tensor([0.3, 0.9], dtype=torch.float64),
        "gamma": torch.tensor([0.4, 3.0], dtype=torch.float64),
        "query_center": torch.linspace(-1, 1, 16, dtype=torch.float64).view(2, 8),
        "key_center": torch.linspace(1, 0, 16, dtype=torch.float64).view(2, 8),
        "query_transform": CHANGE.repeat(2, 1, 1),
        "key_transform": torch.linalg.inv(CHANGE).mT.repeat(2, 1, 1),
        "query_radius": torch.tensor([2.0, 0.0], dtype=torch.float64),
        "key_radius": torch.tensor([1.0, 3.0], dtype=torch.float64),
    },
    "dead_head": {"gamma": torch.tensor([0.0, 1.0], dtype=torch.float64)},
    "gate": {
        "gate_weight": torch.linspace(-0.3, 0.3, 16, dtype=torch.float64).view(2, 8),
        "gate_bias": torch.tensor([2.0, 5.0], dtype=torch.float64),
    },
    "two_maps": {"feature_map": ("trigonometric", "hyperbolic")},
}
KERNEL = pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
WINDOW = pytest.mark.parametrize("window", [0, 8])


def qkv(inputs, part):
    return [inputs[name][:, :, part] for name in ("query", "key", "value")]


def options_of(inputs, window=8, **kernel):
    return {"omega": inputs["omega"], "alpha": 0.6, "window": window, "sink_tokens": 3, **kernel}


def prefilled(inputs, options, length, token_mask=None):
    """The state after the first tokens; None before the first."""
    part = slice(length)
    if not length:
        return None
    token_mask = None if token_mask is None else token_mask[:, part]
    return rfa_attention(*qkv(inputs, part), **options, token_mask=token_mask, output_final_state=True)[1]


def decode(decoder, inputs, start, stop=N, token_mask=None):
    """The output of the tokens from `start` to `stop`."""
    outputs = []
    for step in range(start, stop):
        part = slice(step, step + 1)
        layout = TokenLayout(None if token_mask is None else token_mask[:, part])
        outputs.append(decoder.step(*qkv(inputs, part), layout))
    return torch.cat(outputs, dim=2)


def decoder_at(inputs, options, start, **more):
    return made(inputs, options, start, prefilled(inputs, options, start, **more))


def objects(inputs, options):
    """The far kernel and the settings."""
    return operator_arguments(*qkv(inputs, slice(N)), **options)[:2]


def made(inputs, options, start, state):
    return Decoder(*qkv(inputs, slice(start, start + 1)), *objects(inputs, options), state)


@WINDOW
@KERNEL
@pytest.mark.parametrize("start", [0, 21])
def test_its_steps_are_those_of_the_operator(start, kernel, window):
    inputs = random_inputs(N, size=1.0 if window else 0.5)
    options = options_of(inputs, window, **kernel)
    whole, final = rfa_attention(*qkv(inputs, slice(N)), **options, output_final_state=True)
    decoder = decoder_at(inputs, options, start)
    assert_near(decode(decoder, inputs, start), whole[:, :, start:], 1e-10)
    assert_equal_states(decoder.state(), final, 1e-10)


@WINDOW
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_every_feature_map(feature_map, window):
    inputs = random_inputs(N, size=1.0 if window else 0.5)
    options = options_of(inputs, window, **KERNELS["calibrated"], feature_map=feature_map)
    whole = rfa_attention(*qkv(inputs, slice(N)), **options)
    assert_near(decode(decoder_at(inputs, options, 10), inputs, 10), whole[:, :, 10:], 1e-10)


@WINDOW
@pytest.mark.parametrize("name", ["plain", "softmax_heads", "gate"])
def test_rows_with_padding_of_their_own(name, window):
    """Rows at different places in their chunks, and tokens of padding between the others."""
    inputs = random_inputs(N, batch=3)
    options = options_of(inputs, window, **KERNELS[name])
    token_mask = torch.rand(3, N, generator=torch.Generator().manual_seed(1)) < torch.tensor([[1.0], [0.8], [0.3]])
    whole, final = rfa_attention(*qkv(inputs, slice(N)), **options, token_mask=token_mask, output_final_state=True)
    decoder = decoder_at(inputs, options, 19, token_mask=token_mask)
    assert_near(decode(decoder, inputs, 19, token_mask=token_mask), whole[:, :, 19:], 1e-10)
    assert_equal_states(decoder.state(), final, 1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_other_dtypes(dtype):
    inputs = random_inputs(N, dtype=dtype)
    options = options_of(inputs)
    decoder = decoder_at(inputs, options, 21)
    whole, final = rfa_attention(*qkv(inputs, slice(N)), **options, output_final_state=True)
    output = decode(decoder, inputs, 21)
    assert output.dtype == dtype
    assert_near(output.float(), whole[:, :, 21:].float(), 1e-2 if dtype == torch.bfloat16 else 1e-5)
    assert decoder.state().near_key.dtype == final.near_key.dtype == dtype


def copied(state: RFAState) -> RFAState:
    return state.map(torch.clone)


def same(one: RFAState, two: RFAState) -> bool:
    one, two = one.to_dict(), two.to_dict()
    assert one.pop("beside") == two.pop("beside") == []
    return one.keys() == two.keys() and all(torch.equal(tensor, two[name]) for name, tensor in one.items())


@WINDOW
@pytest.mark.parametrize("name", ["plain", "softmax_heads"])
def test_no_step_changes_a_state_that_somebody_holds(name, window):
    inputs = random_inputs(N)
    options = options_of(inputs, window, **KERNELS[name])
    given = prefilled(inputs, options, 17)
    decoder, before = made(inputs, options, 17, given), copied(given)
    decode(decoder, inputs, 17, 30)
    between = decoder.state()
    held = copied(between)
    decode(decoder, inputs, 30)
    assert same(given, before)
    assert same(between, held)
    # And the operator goes on from there.
    again = rfa_attention(*qkv(inputs, slice(30, N)), **options, initial_state=between)
    assert_near(again, rfa_attention(*qkv(inputs, slice(N)), **options)[:, :, 30:], 1e-10)


@pytest.mark.parametrize("name", ["plain", "softmax_heads"])
def test_select_rows(name):
    inputs, rows = random_inputs(N, batch=3), torch.tensor([2, 0, 2, 1])
    options = options_of(inputs, **KERNELS[name])
    token_mask = torch.arange(N) >= torch.tensor([0, 3, 11])[:, None]
    decoder = decoder_at(inputs, options, 20, token_mask=token_mask)
    decode(decoder, inputs, 20, 29)
    decoder.select_rows(rows)
    chosen = {n: t if n == "omega" else t[rows] for n, t in inputs.items()}
    whole = rfa_attention(*qkv(chosen, slice(N)), **options, token_mask=token_mask[rows])
    assert_near(decode(decoder, chosen, 29), whole[:, :, 29:], 1e-10)


def test_it_goes_on_only_with_what_it_was_made_for():
    inputs = random_inputs(N)
    options = options_of(inputs, **KERNELS["calibrated"], sink_logits=torch.zeros(4))
    kernel, settings = objects(inputs, options)
    new = qkv(inputs, slice(5, 6))
    decoder = Decoder(*new, kernel, settings, prefilled(inputs, options, 5))
    assert decoder.continues(*new, kernel, settings.replace())
    assert not decoder.continues(*(t[:1] for t in new), kernel, settings)
    assert not decoder.continues(*(t.float() for t in new), kernel, settings)
    assert not decoder.continues(*new, kernel, settings.replace(window=4))
    assert not decoder.continues(*new, kernel, settings.replace(sink_logits=torch.zeros(4)))
    assert not decoder.continues(*new, dataclasses.replace(kernel), settings)  # another object


def test_a_state_of_another_call_is_refused():
    inputs = random_inputs(N)
    state = prefilled(inputs, options_of(inputs), 10)
    with pytest.raises(ConfigError, match="`initial_state` comes from another kind of call"):
        made(inputs, options_of(inputs, window=4), 10, state)
