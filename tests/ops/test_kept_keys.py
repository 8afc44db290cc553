"""Kept keys: the definition against a loop over tokens, every form against the definition, what a choice promises."""

import pytest
import torch
from operator_inputs import FEATURE_MAPS, assert_near, random_inputs, tokens, with_gradients
from operator_states import assert_equal_states, run_in_pieces
from test_operator_gate import gated_inputs

from hf_rfa import ConfigError, rfa_attention, rfa_attention_reference
from hf_rfa.ops.arguments import operator_arguments
from hf_rfa.ops.decode import Decoder
from hf_rfa.ops.kept_keys import NOTHING, number_kept, scores, split

N, WINDOW, SINKS = 60, 8, 3
OPTIONS = {"window": WINDOW, "sink_tokens": SINKS, "alpha": 0.6}
LOGITS = torch.tensor([0.5, -1.0, 2.0, 0.0])
#: Fewer than a chunk, as many, more than two chunks, more than there are.
KEPT = pytest.mark.parametrize("kept_keys", [3, 8, 20, 100])
EXTRAS = pytest.mark.parametrize(
    "extras", [{}, {"sink_logits": LOGITS}, {"softmax_heads": [1]}, {"sink_tokens": 0}],
    ids=["plain", "sink logits", "exact head", "no sinks"],
)  # fmt: skip
CUTS = {
    "inside": [13, 20, N - 33],
    "borders": [8, 8, 16, N - 32],
    "beside borders": [7, 2, 8, 15, N - 32],
    "tokens": [1] * N,
    "prompt and tokens": [37, *[1] * (N - 37)],
    "tokens then chunks": [*[1] * 19, 21, 20],
}


def kept_after(state) -> list[list[list[int]]]:
    """The positions that each row and head keeps."""
    return [[[p for p in head if p >= 0] for head in row] for row in state.kept_position.tolist()]


# --- the definition -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept_keys", [3, 8, 20])
def test_the_definition_is_a_loop_over_tokens(kept_keys):
    inputs = random_inputs(N, batch=1, heads=2, key_heads=1)
    query, key, value, omega = (inputs[name][0].double() for name in ("query", "key", "value", "omega"))
    key, value, scale = key[0], value[0], 8**-0.5

    def estimate(q, k):
        psi = [(0.6 * x @ omega.T - (0.6 * x).square().sum(-1, keepdim=True) / 2).exp() for x in (q, k)]
        return psi[0] @ psi[1] / len(omega)

    kept, mass, want = set(), torch.zeros(2, N, dtype=torch.float64), torch.zeros(2, N, 6, dtype=torch.float64)
    for i in range(N):
        for head in range(2):
            weights, exact = torch.zeros(2, N, dtype=torch.float64)
            for j in range(i + 1):
                if i // WINDOW - j // WINDOW <= 1 or j < SINKS or j in kept:
                    exact[j] = weights[j] = (scale * query[head, i] @ key[j]).exp()
                else:
                    weights[j] = estimate(scale**0.5 * query[head, i], scale**0.5 * key[j])
            want[head, i] = weights @ value / weights.sum()
            mass[head] += exact / exact.sum() * (torch.arange(N) <= i - 8)
        if (i + 1) % WINDOW == 0:
            chunk = i // WINDOW
            rivals = kept | {j for j in range((chunk - 1) * WINDOW, chunk * WINDOW) if j >= SINKS}
            score = {j: value[j].norm() * mass[:, j].max() / ((chunk + 1) * WINDOW - j - 8) for j in rivals}
            kept = set(sorted(rivals, key=score.get)[-kept_keys:])
    got, state = rfa_attention_reference(**inputs, **OPTIONS, kept_keys=kept_keys, output_final_state=True)
    assert_near(got[0], want, 1e-12)
    assert kept_after(state) == [[sorted(kept)]]
    assert len(kept) == min(kept_keys, number_kept(N, WINDOW, SINKS, kept_keys))


@KEPT
@EXTRAS
@pytest.mark.parametrize("length", [5, 8, 17, 24, N, 300])
def test_chunks_equal_the_definition(length, extras, kept_keys):
    inputs, options = random_inputs(length), {**OPTIONS, "kept_keys": kept_keys, **extras}
    got, state = rfa_attention(**inputs, **options, output_final_state=True)
    if "softmax_heads" in extras:  # which the definition does not have: the other head is the definition's
        bare = {**options, "softmax_heads": ()}
        want, final = rfa_attention(**inputs, **bare, output_final_state=True)
        assert_near(got[:, :2], want[:, :2], 1e-12)
        assert torch.equal(state.kept_position, final.kept_position[:, :1])
        return
    want, final = rfa_attention_reference(**inputs, **options, output_final_state=True)
    assert_near(got, want, 1e-11)
    assert_equal_states(state, final)


@KEPT
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_gradients_equal_the_definition(feature_map, kept_keys):
    inputs = random_inputs(N)
    inputs["sink_logits"] = LOGITS.double()
    options = {**OPTIONS, "kept_keys": kept_keys, "feature_map": feature_map}
    _, got = with_gradients(rfa_attention, inputs, **options)
    _, want = with_gradients(rfa_attention_reference, inputs, **options)
    for name, gradient in want.items():
        assert_near(got[name], gradient, 1e-10, name)


@pytest.mark.parametrize("kept_keys", [3, 20])
def test_value_dims_and_parameters_of_each_head(kept_keys):
    inputs = random_inputs(N, heads=6, key_heads=3)
    inputs["value"] = torch.cat([inputs["value"], inputs["value"][..., :3].sin()], dim=-1)
    options = {**OPTIONS, "kept_keys": kept_keys, "feature_map": "trigonometric"}
    options |= {"alpha": torch.tensor([0.3, 0.9, 0.5]).double(), "gamma": torch.tensor([0.4, 3.0, 0.0]).double()}
    got, got_gradients = with_gradients(rfa_attention, inputs, **options)
    want, want_gradients = with_gradients(rfa_attention_reference, inputs, **options)
    assert_near(got, want, 1e-11)
    for name, gradient in want_gradients.items():
        assert_near(got_gradients[name], gradient, 1e-10, name)


@pytest.mark.parametrize("kept_keys", [(3, 20, 3), (0, 8, 20), (5, 5, 0)])
@pytest.mark.parametrize("softmax_heads", [(), (1,)])
def test_each_head_may_keep_a_number_of_its_own(kept_keys, softmax_heads):
    inputs = random_inputs(N, heads=6, key_heads=3)
    options = {**OPTIONS, "kept_keys": kept_keys}
    want, want_gradients = with_gradients(rfa_attention_reference, inputs, **options)
    got, got_gradients = with_gradients(rfa_attention, inputs, **options)
    assert_near(got, want, 1e-11)
    for name, gradient in want_gradients.items():
        assert_near(got_gradients[name], gradient, 1e-10, name)
    whole, final = rfa_attention(**inputs, **options, softmax_heads=softmax_heads, output_final_state=True)
    linear = [head for head in range(6) if head // 2 not in softmax_heads]
    assert_near(whole[:, linear], want[:, linear], 1e-11)
    output, state = run_in_pieces(inputs, [37, *[1] * 23], **options, softmax_heads=softmax_heads)
    assert_near(output, whole, 1e-11)
    assert_equal_states(state, final)
    kernel, settings, _ = operator_arguments(**inputs, **options, softmax_heads=softmax_heads)
    _, state = rfa_attention(
        **tokens(inputs, slice(37)), **options, softmax_heads=softmax_heads, output_final_state=True
    )
    steps = [[inputs[n][:, :, i : i + 1] for n in ("query", "key", "value")] for i in range(37, N)]
    decoder = Decoder(*steps[0], kernel, settings, state)
    assert_near(torch.cat([decoder.step(*step) for step in steps], dim=2), whole[:, :, 37:], 1e-11)
    assert_equal_states(decoder.state(), final)
    # Bytes are those of what each head keeps: 8 + 6 numbers and the bookkeeping per key.
    held = [number for head, number in enumerate(kept_keys) if head not in softmax_heads]
    per_key = (8 + 6 + 1 + 1 + 2) * 8  # key, value, position, decay, mass of two query heads
    bare = rfa_attention(**inputs, **{**options, "kept_keys": 0}, softmax_heads=softmax_heads, output_final_state=True)
    kept = sum(number > 0 for number in held)
    assert final.nbytes - bare[1].nbytes == 2 * (per_key * sum(held) + kept * 2 * 2 * WINDOW * 8) + 16 * len(
        final.beside
    )


# --- where a sequence is split --------------------------------------------------------------------------------------


@KEPT
@EXTRAS
@pytest.mark.parametrize("cuts", CUTS)
def test_pieces_equal_the_whole(cuts, extras, kept_keys):
    inputs, options = random_inputs(N), {**OPTIONS, "kept_keys": kept_keys, **extras}
    whole, final = rfa_attention(**inputs, **options, output_final_state=True)
    output, state = run_in_pieces(inputs, CUTS[cuts], **options)
    assert_near(output, whole, 1e-11)
    assert_equal_states(state, final)


@pytest.mark.parametrize("first", range(1, 40))
def test_every_cut(first):
    inputs, options = random_inputs(40), {**OPTIONS, "window": 4, "kept_keys": 6}
    whole, final = rfa_attention(**inputs, **options, output_final_state=True)
    for function in (rfa_attention, rfa_attention_reference):
        output, state = run_in_pieces(inputs, [first, 40 - first], function=function, **options)
        assert_near(output, whole, 1e-11)
        assert_equal_states(state, final)


@pytest.mark.parametrize("cuts", ["inside", "prompt and tokens"])
def test_gradients_flow_through_the_state(cuts):
    inputs, options = random_inputs(N), {**OPTIONS, "kept_keys": 6}
    _, want = with_gradients(rfa_attention, inputs, **options)
    _, got = with_gradients(lambda **leaves: run_in_pieces(leaves, CUTS[cuts], **options)[0], inputs)
    for name, gradient in want.items():
        assert_near(got[name], gradient, 1e-10, name)


@KEPT
@pytest.mark.parametrize("cuts", CUTS)
def test_a_gate_forgets_an_evicted_key_from_its_own_place_on(cuts, kept_keys):
    inputs, options = gated_inputs(N), {**OPTIONS, "kept_keys": kept_keys}
    want, final = rfa_attention_reference(**inputs, **options, output_final_state=True)
    output, state = run_in_pieces(inputs, CUTS[cuts], **options)
    assert_near(output, want, 1e-11)
    assert_equal_states(state, final)


@pytest.mark.parametrize("cuts", [None, "inside", "prompt and tokens"])
def test_gradients_of_the_gate(cuts):
    inputs, options = gated_inputs(N), {**OPTIONS, "kept_keys": 6}
    _, want = with_gradients(rfa_attention_reference, inputs, **options)
    run = rfa_attention if cuts is None else lambda **leaves: run_in_pieces(leaves, CUTS[cuts], **options)[0]
    _, got = with_gradients(run, inputs, **({} if cuts else options))
    for name, gradient in want.items():
        assert_near(got[name], gradient, 1e-10, name)


@KEPT
def test_the_decoder(kept_keys):
    inputs, options = random_inputs(N), {**OPTIONS, "kept_keys": kept_keys, "softmax_heads": [1]}
    whole, final = rfa_attention(**inputs, **options, output_final_state=True)
    kernel, settings, _ = operator_arguments(**inputs, **options)
    _, state = rfa_attention(**tokens(inputs, slice(21)), **options, output_final_state=True)
    before = state.map(torch.clone)
    steps = [[inputs[n][:, :, i : i + 1] for n in ("query", "key", "value")] for i in range(21, N)]
    decoder = Decoder(*steps[0], kernel, settings, state)
    output = torch.cat([decoder.step(*step) for step in steps], dim=2)
    assert_near(output, whole[:, :, 21:], 1e-11)
    assert_equal_states(decoder.state(), final)
    assert_equal_states(state, before)  # what it began with stays as it was


# --- rows, documents, padding ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept_keys", [3, 20])
def test_a_row_does_not_depend_on_its_neighbours(kept_keys):
    inputs, options = random_inputs(N, batch=3), {**OPTIONS, "kept_keys": kept_keys}
    together, states = rfa_attention(**inputs, **options, output_final_state=True)
    for row in range(3):
        alone, state = rfa_attention(
            **tokens(inputs, slice(None), slice(row, row + 1)), **options, output_final_state=True
        )
        assert_near(alone, together[row : row + 1], 1e-12)
        assert_equal_states(state, states.select_rows(torch.tensor([row])))


@pytest.mark.parametrize("kept_keys", [3, 20])
@pytest.mark.parametrize("cuts", ["inside", "tokens", "prompt and tokens"])
def test_padding_competes_with_nobody(cuts, kept_keys):
    inputs, options = random_inputs(N), {**OPTIONS, "kept_keys": kept_keys}
    token_mask = torch.ones(2, N, dtype=torch.bool)
    token_mask[0, :11], token_mask[0, 30:33], token_mask[1, 40:] = False, False, False
    want, final = rfa_attention_reference(**inputs, **options, token_mask=token_mask, output_final_state=True)
    whole, state = rfa_attention(**inputs, **options, token_mask=token_mask, output_final_state=True)
    assert_near(whole, want, 1e-11)
    assert_equal_states(state, final)
    output, state = run_in_pieces(inputs, CUTS[cuts], **options, token_mask=token_mask)
    assert_near(output, want, 1e-11)
    assert_equal_states(state, final)
    for row in range(2):  # as the bare sequence
        real = token_mask[row].nonzero().flatten()
        bare = rfa_attention(**tokens(inputs, real, slice(row, row + 1)), **options)
        assert_near(whole[row : row + 1, :, real], bare, 1e-11)


@pytest.mark.parametrize("kept_keys", [3, 20])
@pytest.mark.parametrize("padded", [False, True])
def test_documents_keep_keys_of_their_own(padded, kept_keys):
    inputs, options = random_inputs(90), {**OPTIONS, "kept_keys": kept_keys}
    segment_ids = torch.zeros(2, 90, dtype=torch.int64)
    segment_ids[0, 35:], segment_ids[0, 41:], segment_ids[1, 50:] = 1, 2, 1
    options["segment_ids"] = segment_ids
    if padded:
        options["token_mask"] = torch.ones(2, 90, dtype=torch.bool)
        options["token_mask"][0, 60:66] = options["token_mask"][1, 85:] = False
    got, got_gradients = with_gradients(rfa_attention, inputs, **options)
    want, want_gradients = with_gradients(rfa_attention_reference, inputs, **options)
    assert_near(got, want, 1e-11)
    for name, gradient in want_gradients.items():
        assert_near(got_gradients[name], gradient, 1e-10, name)
    _, state = rfa_attention(**inputs, **options, output_final_state=True)
    _, final = rfa_attention_reference(**inputs, **options, output_final_state=True)
    assert_equal_states(state, final)


def test_a_document_that_goes_on_and_others_behind_it():
    inputs, options = random_inputs(90), {**OPTIONS, "kept_keys": 6}
    segment_ids = (torch.arange(90) >= 55).long().expand(2, -1)
    want, final = rfa_attention_reference(**inputs, **options, segment_ids=segment_ids, output_final_state=True)
    output, state = run_in_pieces(inputs, [33, 57], **options, segment_ids=segment_ids)
    assert_near(output, want, 1e-11)
    assert_equal_states(state, final)


# --- promises -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept_keys", [3, 8, 20])
@pytest.mark.parametrize("cuts", [[300], [133, 1, 1, 1, 164], [1] * 300])
def test_every_key_is_somewhere_exactly_once(cuts, kept_keys):
    # With alpha = 0 and no centres every far key adds psi = 1 / sqrt(m) per feature, whichever it is: z counts them.
    inputs = random_inputs(300, batch=1)
    options = {**OPTIONS, "alpha": 0.0, "kept_keys": kept_keys}
    _, state = run_in_pieces(inputs, cuts, **options)
    far = (state.kv_state[..., -1] * state.log_max.exp()[..., None]).sum(-1) / inputs["omega"].shape[1] ** 0.5
    held = (state.kept_position >= 0).sum(-1)
    near = 300 - (300 // WINDOW - 1) * WINDOW
    assert_near(far + held, torch.full_like(far, 300 - near - SINKS), 1e-9)
    total = inputs["value"].sum(2)  # the same of the values
    sums = (state.kv_state[..., :-1] * state.log_max.exp()[..., None, None]).sum(2) / inputs["omega"].shape[1] ** 0.5
    there = sums + state.kept_value.sum(2) + state.near_value.sum(2) + state.sink_value.sum(2)
    assert_near(there, total, 1e-9)


def test_keys_that_matter_are_kept():
    inputs = random_inputs(N, batch=1, heads=2, key_heads=2)
    loud = [5, 13, 26]
    inputs["query"][..., 0], inputs["key"][..., 0] = 3.0, 0.0
    inputs["key"][:, :, loud, 0] = 4.0
    _, state = rfa_attention(**inputs, **OPTIONS, kept_keys=3, output_final_state=True)
    assert kept_after(state) == [[loud, loud]]


def test_within_what_is_kept_it_is_softmax():
    inputs = random_inputs(N)
    got = rfa_attention(**inputs, **OPTIONS, kept_keys=N)
    keys = (x.repeat_interleave(2, 1) for x in (inputs["key"], inputs["value"]))
    want = torch.nn.functional.scaled_dot_product_attention(inputs["query"], *keys, is_causal=True)
    assert_near(got, want, 1e-12)


def test_ties_and_what_is_not_a_number():
    position = torch.tensor([-1, 0, 4, 2, 3, 6, 5])
    mass = torch.tensor([[9.0, 2.0, 0.0, torch.nan, 0.0, 1.0, 0.5], [0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0]])
    length = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 2.0, 1.5])
    score = scores(mass, length, position, 12, 4)  # queries from 4 tokens on: 8, 4, 6, 5, 2, 3
    assert score.tolist() == [NOTHING, 0.25, 0.25, -1.0, 0.0, 1.0, 0.5]
    going, staying = split(score, 3)
    assert sorted(going.tolist()) == [0, 1, 3, 4]  # of the equal ones, 1 and 2, the later one stays
    assert staying.tolist() == [2, 5, 6]


def test_a_key_that_is_not_a_number_is_not_kept():
    inputs = random_inputs(N, batch=1)
    inputs["key"][:, :, 10] = torch.nan
    _, state = rfa_attention(**inputs, **OPTIONS, kept_keys=8, output_final_state=True)
    assert all(10 not in head for row in kept_after(state) for head in row)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_choice_under_autocast_is_the_choice_without(dtype):
    inputs, options = random_inputs(300, dtype=dtype), {**OPTIONS, "kept_keys": 12}
    want, final = rfa_attention(**inputs, **options, output_final_state=True)
    with torch.autocast("cpu", torch.bfloat16):
        got, state = rfa_attention(**inputs, **options, output_final_state=True)
    assert torch.equal(got, want)
    assert torch.equal(state.kept_position, final.kept_position)
    assert state.mass.dtype == state.kept_decay.dtype == torch.float32
    assert state.kept_key.dtype == state.kept_value.dtype == dtype


def test_float32_is_near_the_definition():
    inputs, options = random_inputs(300, dtype=torch.float32), {**OPTIONS, "kept_keys": 12}
    got, got_gradients = with_gradients(rfa_attention, inputs, **options)
    want, want_gradients = with_gradients(rfa_attention_reference, inputs, **options)
    assert_near(got.double(), want, 1e-5)
    for name, gradient in want_gradients.items():
        assert_near(got_gradients[name].double(), gradient.double(), 1e-4, name)


def test_no_gradient_flows_through_a_choice():
    inputs, options = random_inputs(N), {**OPTIONS, "kept_keys": 6}
    leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    _, state = rfa_attention(**leaves, **options, output_final_state=True)
    assert not state.mass.requires_grad
    assert state.kept_key.requires_grad
    assert state.kept_value.requires_grad


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"window": 0, "sink_tokens": 0, "kept_keys": 4}, "where nothing is exact no key has a score"),
        ({"kept_keys": -1}, "kept_keys=-1"),
        ({"kept_keys": (1, 2, 3)}, "one per key head"),
    ],
)
def test_what_cannot_be(options, match):
    with pytest.raises(ConfigError, match=match):
        rfa_attention(**random_inputs(N), **{"window": WINDOW, **options})


@pytest.mark.parametrize("change", [0, 5])
def test_a_state_that_keeps_another_number_of_keys(change):
    inputs = random_inputs(N)
    _, state = rfa_attention(**inputs, **OPTIONS, kept_keys=6, output_final_state=True)
    with pytest.raises(ConfigError, match="another kind of call"):
        rfa_attention(**inputs, **OPTIONS, kept_keys=change, initial_state=state)
    with pytest.raises(ConfigError, match=r"different numbers of keys"):
        rfa_attention(**inputs, **OPTIONS, kept_keys=(6, 5), initial_state=state)
    _, state = rfa_attention(**inputs, **OPTIONS, output_final_state=True)
    with pytest.raises(ConfigError, match="another kind of call"):
        rfa_attention(**inputs, **OPTIONS, kept_keys=6, initial_state=state)
