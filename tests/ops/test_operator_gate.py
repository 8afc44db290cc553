"""The forget gate: every path against the float64 definition, the definition against a loop, and open = no gate."""

import pytest
import torch
from operator_inputs import (
    FEATURE_MAPS,
    Tensors,
    assert_equals_the_definition,
    assert_near,
    random_inputs,
    tokens,
    with_gradients,
)
from operator_states import run_in_pieces

from hf_rfa import ConfigError, rfa_attention, rfa_attention_reference
from hf_rfa.ops.causal.passes import BLOCK_CHUNKS

N = 60
WINDOW = pytest.mark.parametrize("window", [0, 8])


def gated_inputs(length: int, *, bias: float = 1.0, **sizes) -> Tensors:
    """Inputs with a gate whose values spread over (0, 1)."""
    inputs = random_inputs(length, **sizes)
    heads, dim = inputs["key"].shape[1], inputs["key"].shape[3]
    weight = torch.randn(heads, dim, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    inputs["gate_weight"] = 0.5 * weight.to(inputs["omega"].dtype)
    inputs["gate_bias"] = torch.linspace(bias - 1, bias + 2, heads, dtype=inputs["omega"].dtype)
    return inputs


# --- the definition -------------------------------------------------------------------------------------------------


@WINDOW
def test_the_definition_is_a_product_of_gates(window):
    inputs = gated_inputs(30, batch=1, heads=1, key_heads=1)
    gate = (inputs["key"][0, 0] @ inputs["gate_weight"][0] + inputs["gate_bias"][0]).sigmoid()
    options = {"window": window, "sink_tokens": min(2, window), "alpha": 0.5}
    got = rfa_attention_reference(**inputs, **options)[0, 0]
    query, key, value = (inputs[name][0, 0] for name in ("query", "key", "value"))
    query, key = query * 8**-0.25, key * 8**-0.25
    psi = [
        (0.5 * x @ inputs["omega"][0].T - (0.5 * x).square().sum(-1, keepdim=True) / 2).exp() / 16**0.5
        for x in (query, key)
    ]
    for i in range(30):
        weights = torch.zeros(30, dtype=torch.float64)
        for j in range(i + 1):
            if window and (i // window - j // window <= 1 or j < 2):
                weights[j] = (query[i] @ key[j]).exp()
            else:
                weights[j] = psi[0][i] @ psi[1][j] * gate[j + 1 : i + 1].prod()
        assert_near(got[i], weights @ value / weights.sum(), 1e-12)


def test_the_gate_matters_and_learns():
    inputs = gated_inputs(N)
    gradients = assert_equals_the_definition(inputs, window=8, alpha=0.5)
    assert bool((gradients["gate_weight"].abs() > 1e-6).all())
    assert bool((gradients["gate_bias"].abs() > 1e-6).all())
    bare = {name: x for name, x in inputs.items() if not name.startswith("gate")}
    options = {"window": 8, "alpha": 0.5}
    assert float((rfa_attention(**inputs, **options) - rfa_attention(**bare, **options)).abs().max()) > 1e-2


@WINDOW
def test_an_open_gate_is_no_gate(window):
    inputs = gated_inputs(N)
    inputs["gate_weight"], inputs["gate_bias"] = torch.zeros(2, 8), torch.full((2,), 60.0, dtype=torch.float64)
    bare = {name: x for name, x in inputs.items() if not name.startswith("gate")}
    for function in (rfa_attention, rfa_attention_reference):
        assert_near(function(**inputs, window=window), function(**bare, window=window), 1e-13)


def test_a_closed_gate_is_the_window_alone():
    inputs = gated_inputs(N)
    inputs["gate_bias"] = torch.full((2,), -80.0, dtype=torch.float64)
    options = {"window": 8, "alpha": 0.5}
    bare = {name: x for name, x in inputs.items() if not name.startswith("gate")}
    assert_near(rfa_attention(**inputs, **options), rfa_attention(**bare, **options, gamma=0.0), 1e-12)


# --- every path against it ------------------------------------------------------------------------------------------


@WINDOW
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize("length", [1, 16, 17, 65, 129])
def test_chunks(length, feature_map, window):
    inputs = gated_inputs(length, size=1.0 if window else 0.5)
    options = {"window": window, "sink_tokens": 3 if window else 0, "alpha": 0.5}
    assert_equals_the_definition(inputs, feature_map=feature_map, **options)


@pytest.mark.parametrize(("window", "length"), [(0, 700), (8, 8 * BLOCK_CHUNKS * 3 + 5)])
def test_several_blocks(window, length):
    inputs = gated_inputs(length, batch=1, heads=2, key_heads=1, bias=5.0)
    assert_equals_the_definition(inputs, window=window, alpha=0.5)


@WINDOW
def test_groups_centres_and_sink_logits(window):
    inputs = gated_inputs(50, heads=6, key_heads=3)
    inputs["query_center"], inputs["key_center"] = 0.5 * torch.randn(
        2, 3, 8, generator=torch.Generator().manual_seed(7), dtype=torch.float64
    )
    inputs["sink_logits"] = torch.linspace(-1, 1, 6, dtype=torch.float64)
    assert_equals_the_definition(inputs, window=window, alpha=0.5, gamma=torch.tensor([0.5, 2.0, 0.0]).double())


@WINDOW
@pytest.mark.parametrize("lengths", [[13, 20, 27], [1] * N, [37, *[1] * 23], [16, 16, 28], [*[1] * 19, 41]])
def test_pieces_and_steps_equal_the_whole(lengths, window):
    inputs = gated_inputs(N)
    options = {"window": window, "alpha": 0.6, "sink_tokens": 3 if window else 0}
    whole, want = rfa_attention_reference(**inputs, **options, output_final_state=True)
    for function in (rfa_attention, rfa_attention_reference):
        output, state = run_in_pieces(inputs, lengths, function, **options)
        assert_near(output, whole, 1e-11)
        sums = [s.kv_state * s.log_max.exp()[..., None, None] for s in (state, want)]
        assert_near(*sums, 1e-11)


@WINDOW
def test_gradients_flow_through_the_state(window):
    inputs = gated_inputs(N)
    options = {"window": window, "alpha": 0.6, "sink_tokens": 3 if window else 0}

    def pieces(**leaves: torch.Tensor) -> torch.Tensor:
        return run_in_pieces(leaves, [21, 1, 1, 20, *[1] * 17], **options)[0]

    got, got_gradients = with_gradients(pieces, inputs)
    want, want_gradients = with_gradients(rfa_attention_reference, inputs, **options)
    assert_near(got, want, 1e-11)
    for name, gradient in want_gradients.items():
        assert_near(got_gradients[name], gradient, 1e-10, name)


# --- padding and packing --------------------------------------------------------------------------------------------


@WINDOW
@pytest.mark.parametrize("lengths", [[N], [25, *[1] * 10, 25]])
def test_padding_forgets_nothing(lengths, window):
    inputs = gated_inputs(N)
    options = {"window": window, "alpha": 0.6, "sink_tokens": 3 if window else 0}
    token_mask = torch.ones(2, N, dtype=torch.bool)
    token_mask[0, :11] = False
    token_mask[1, 5::7] = False
    output, _ = run_in_pieces(inputs, lengths, token_mask=token_mask, **options)
    for row in range(2):
        slots = token_mask[row].nonzero()[:, 0]
        bare = rfa_attention_reference(**tokens(inputs, slots, slice(row, row + 1)), **options)
        assert_near(output[row : row + 1, :, slots], bare, 1e-11)


@WINDOW
def test_documents_forget_on_their_own(window):
    inputs = gated_inputs(N)
    segment_ids = torch.stack([torch.arange(N) // 27, torch.arange(N) // 40])
    assert_equals_the_definition(inputs, window=window, alpha=0.6, segment_ids=segment_ids)
    options = {"window": window, "alpha": 0.6}
    _, state = rfa_attention(**tokens(inputs, slice(0, 30)), **options, output_final_state=True)
    rest = tokens(inputs, slice(30, N))
    got, _ = rfa_attention(
        **rest, **options, segment_ids=segment_ids[:, 30:], initial_state=state, output_final_state=True
    )
    for row, end in ((0, 54), (1, 40)):  # the first document of the piece goes on, the second begins anew
        one = slice(row, row + 1)
        first = rfa_attention_reference(**tokens(inputs, slice(0, end), one), **options)
        second = rfa_attention_reference(**tokens(inputs, slice(end, N), one), **options)
        assert_near(got[one], torch.cat([first[:, :, 30:], second], dim=2), 1e-11)


# --- numbers and errors ---------------------------------------------------------------------------------------------


@WINDOW
@pytest.mark.parametrize("bias", [-3.0, 0.0, 6.0])
def test_float32(bias, window):
    inputs = gated_inputs(1500, batch=1, heads=2, key_heads=1, bias=bias, dtype=torch.float32)
    wide = {name: tensor.double() for name, tensor in inputs.items()}
    options = {"window": window, "alpha": 0.5}
    got, gradients = with_gradients(rfa_attention, inputs, **options)
    want, want_gradients = with_gradients(rfa_attention_reference, wide, **options)
    assert got.dtype == torch.float32
    assert_near(got, want, 2e-5)
    for name, gradient in want_gradients.items():
        assert_near(gradients[name], gradient, 2e-4, name)


def test_wrong_gates_are_refused():
    inputs = gated_inputs(10)
    for change, message in (
        ({"causal": False}, "order of time"),
        ({"gate_bias": None}, "only one of them"),
        ({"gate_bias": torch.zeros(3)}, "`gate_bias` must have shape"),
        ({"gate_weight": torch.zeros(2, 7)}, "`gate_weight` must have shape"),
    ):
        with pytest.raises(ConfigError, match=message):
            rfa_attention(**(inputs | change))
