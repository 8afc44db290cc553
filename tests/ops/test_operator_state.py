"""The state: split a sequence anywhere, continue, and nothing tells it from the whole."""

import dataclasses

import pytest
import torch
from operator_inputs import FEATURE_MAPS, assert_near, random_inputs, tokens, with_gradients
from operator_states import assert_equal_states, run_in_pieces, true_sums

from hf_rfa import ConfigError, rfa_attention, rfa_attention_reference
from hf_rfa.ops.state import accumulation_dtype

N = 60
WINDOW = pytest.mark.parametrize("window", [0, 8])
SINKS = torch.tensor([0.5, -1.0, 2.0, 0.0])
EXTRAS = pytest.mark.parametrize(
    "extras", [{}, {"softmax_heads": [1]}, {"softmax_heads": [0, 1]}, {"sink_logits": SINKS}],
    ids=["plain", "softmax_heads", "all_softmax", "sink_logits"],
)  # fmt: skip
# Lengths of the pieces. The window of 8 fills a chunk at 8, 16, ...; 64 tokens at once are one block.
CUTS = {
    "first": [1, N - 1],
    "last": [N - 1, 1],
    "inside": [13, 20, N - 33],
    "borders": [8, 8, 16, N - 32],
    "beside_borders": [7, 2, 8, 15, N - 32],
    "tokens": [1] * N,
    "prompt_and_tokens": [37, *[1] * (N - 37)],
    "tokens_then_chunks": [*[1] * 19, 21, 20],
    "threes": [3] * (N // 3),
}


# --- splitting ------------------------------------------------------------------------------------------------------


@WINDOW
@EXTRAS
@pytest.mark.parametrize("cuts", CUTS)
def test_pieces_equal_the_whole(cuts, extras, window):
    inputs = random_inputs(N)
    options = {"window": window, "alpha": 0.6, "sink_tokens": 3, **extras}
    whole, final = rfa_attention(**inputs, **options, output_final_state=True)
    output, state = run_in_pieces(inputs, CUTS[cuts], **options)
    assert_near(output, whole, 1e-11)
    assert_equal_states(state, final)
    assert_near(state.log_max, final.log_max, 1e-12, "log_max")  # the same maximum, however it was reached


@WINDOW
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize("first", range(1, 30))
def test_every_cut(first, feature_map, window):
    inputs = random_inputs(30, size=1.0 if window else 0.5)
    options = {"window": min(window, 4), "alpha": 0.8, "sink_tokens": 2, "feature_map": feature_map}
    whole = rfa_attention(**inputs, **options)
    output, _ = run_in_pieces(inputs, [first, 30 - first] if first < 30 else [30], **options)
    assert_near(output, whole, 1e-10)


@WINDOW
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize("cuts", ["inside", "tokens", "prompt_and_tokens"])
def test_pieces_with_parameters_of_each_head(cuts, feature_map, window):
    inputs = random_inputs(N, heads=6, key_heads=3, size=1.0 if window else 0.5)
    options = {"window": window, "feature_map": feature_map, "scaling": 0.5}
    options["alpha"] = torch.tensor([0.3, 0.9, 0.5], dtype=torch.float64)
    options["gamma"] = torch.tensor([0.4, 3.0, 0.0], dtype=torch.float64)
    options["proposal"] = torch.tensor([-0.3, 0.05, 0.0], dtype=torch.float64)
    options["query_center"], options["key_center"] = 0.5 * torch.randn(
        2, 3, 8, generator=torch.Generator().manual_seed(7), dtype=torch.float64
    )
    change = torch.eye(8, dtype=torch.float64) + 0.1 * torch.ones(8, 8, dtype=torch.float64)
    options["query_transform"] = change.repeat(3, 1, 1)
    options["key_transform"] = torch.linalg.inv(change).mT.repeat(3, 1, 1)
    options["query_radius"], options["key_radius"] = 2.0, torch.tensor([1.0, 0.0, 3.0], dtype=torch.float64)
    whole, final = rfa_attention(**inputs, **options, output_final_state=True)
    output, state = run_in_pieces(inputs, CUTS[cuts], **options)
    assert_near(output, whole, 1e-10)
    assert_equal_states(state, final, 1e-10)


@pytest.mark.parametrize("sinks", [0, 1, 8])
@pytest.mark.parametrize("cuts", CUTS)
def test_numbers_of_sinks(cuts, sinks):
    inputs = random_inputs(N)
    options = {"window": 8, "sink_tokens": sinks, "alpha": 0.6}
    whole, final = rfa_attention(**inputs, **options, output_final_state=True)
    output, state = run_in_pieces(inputs, CUTS[cuts], **options)
    assert_near(output, whole, 1e-11)
    assert_equal_states(state, final)


@WINDOW
@pytest.mark.parametrize("cuts", [[200, 1, 1, 99], [64, 64, 128, 44], [63, 65, 172], [129, 171]])
def test_pieces_of_several_blocks(cuts, window):
    inputs = random_inputs(300, batch=1)
    whole, final = rfa_attention(**inputs, window=window, alpha=0.6, output_final_state=True)
    output, state = run_in_pieces(inputs, cuts, window=window, alpha=0.6)
    assert_near(output, whole, 1e-11)
    assert_equal_states(state, final)


@WINDOW
@pytest.mark.parametrize("cuts", ["inside", "tokens", "beside_borders"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pieces_in_other_dtypes(dtype, cuts, window):
    inputs = random_inputs(N, dtype=dtype)
    whole, final = rfa_attention(**inputs, window=window, alpha=0.6, output_final_state=True)
    output, state = run_in_pieces(inputs, CUTS[cuts], window=window, alpha=0.6)
    # Near keys come back exactly as they were; the sums are float32. The output is rounded to bfloat16 once.
    assert_near(output.float(), whole.float(), 1e-5 if dtype == torch.float32 else 2**-7)
    assert_equal_states(state, final, 1e-5)
    assert state.near_key.dtype == state.sink_value.dtype == dtype
    assert state.kv_state.dtype == state.log_max.dtype == torch.float32


@WINDOW
@pytest.mark.parametrize("cuts", ["inside", "tokens", "prompt_and_tokens"])
def test_gradients_flow_through_the_state(cuts, window):
    inputs = random_inputs(N)
    options = {"window": window, "alpha": 0.6}
    _, want = with_gradients(rfa_attention, inputs, **options)
    _, got = with_gradients(lambda **leaves: run_in_pieces(leaves, CUTS[cuts], **options)[0], inputs)
    for name, gradient in want.items():
        assert_near(got[name], gradient, 1e-10, name)


def test_detach_cuts_the_gradient():
    inputs = random_inputs(N)
    leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    _, state = rfa_attention(**tokens(leaves, slice(40)), window=8, output_final_state=True)
    assert state.kv_state.requires_grad
    assert state.near_key.requires_grad
    output = rfa_attention(**tokens(leaves, slice(40, N)), window=8, initial_state=state.detach())
    (gradient,) = torch.autograd.grad(output.sum(), leaves["key"])
    assert bool((gradient[:, :, :40] == 0).all())
    assert bool((gradient[:, :, 40:] != 0).any())


# --- one token at a time --------------------------------------------------------------------------------------------


@WINDOW
@EXTRAS
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_the_recurrent_step_equals_the_definition(feature_map, extras, window):
    inputs = random_inputs(40, size=1.0 if window else 0.5)
    options = {"window": window, "alpha": 0.6, "sink_tokens": 3, "feature_map": feature_map}
    output, state = run_in_pieces(inputs, [1] * 40, **options, **extras)
    softmax_heads = extras.get("softmax_heads", [])
    definition = {name: value for name, value in extras.items() if name != "softmax_heads"}
    want, final = rfa_attention_reference(**inputs, **options, **definition, output_final_state=True)
    linear = [head for head in range(2) if head not in softmax_heads]
    query_heads = [2 * head + g for head in linear for g in range(2)]
    assert_near(output[:, query_heads], want[:, query_heads], 1e-10)
    if linear:
        assert_near(true_sums(state), true_sums(final)[:, linear], 1e-10)


def test_a_single_first_token_needs_no_state():
    inputs = random_inputs(1)
    output = rfa_attention(**inputs, window=8)
    assert_near(output, inputs["value"].repeat_interleave(2, dim=1), 1e-13)


# --- padding and packing in pieces ----------------------------------------------------------------------------------


@WINDOW
@EXTRAS
@pytest.mark.parametrize("prompt", [17, 24, 33])
@pytest.mark.parametrize("step", [1, 3, 8])
def test_left_padded_prompts_continue_with_counts_of_their_own(step, prompt, extras, window):
    # As `generate` does: a padded prompt, then tokens without padding, rows at different places in their chunks.
    padding = torch.tensor([0, 1, 5, 16])
    inputs = random_inputs(N, batch=4)
    token_mask = torch.arange(N) >= padding[:, None]
    options = {"window": window, "alpha": 0.6, "sink_tokens": 3, **extras}
    first, state = rfa_attention(
        **tokens(inputs, slice(prompt)), token_mask=token_mask[:, :prompt], **options, output_final_state=True
    )
    assert state.count.tolist() == (prompt - padding).tolist()
    rest = (N - prompt) // step * step
    output, state = run_in_pieces(
        tokens(inputs, slice(prompt, prompt + rest)), [step] * (rest // step), state=state, **options
    )
    output = torch.cat([first, output], dim=2)
    for row, pad in enumerate(padding.tolist()):
        bare = tokens(inputs, slice(pad, prompt + rest), slice(row, row + 1))
        assert_near(output[row : row + 1, :, pad:], rfa_attention(**bare, **options), 1e-11, f"row {row}")
    assert state.count.tolist() == (prompt + rest - padding).tolist()


@WINDOW
@EXTRAS
@pytest.mark.parametrize("cuts", CUTS)
def test_padding_in_every_piece(cuts, extras, window):
    generator = torch.Generator().manual_seed(3)
    token_mask = torch.rand(3, N, generator=generator) < torch.tensor([0.9, 0.5, 0.1])[:, None]
    token_mask[:, 0] = torch.tensor([True, False, False])
    inputs = random_inputs(N, batch=3)
    options = {"window": window, "alpha": 0.6, "sink_tokens": 3, "token_mask": token_mask, **extras}
    whole, final = rfa_attention(**inputs, **options, output_final_state=True)
    output, state = run_in_pieces(inputs, CUTS[cuts], **options)
    assert_near(output, whole, 1e-11)
    assert_equal_states(state, final)
    for row in range(3):
        bare = tokens(inputs, token_mask[row].nonzero()[:, 0], slice(row, row + 1))
        bare_options = {name: value for name, value in options.items() if name != "token_mask"}
        alone, state_alone = rfa_attention(**bare, **bare_options, output_final_state=True)
        assert_near(output[row : row + 1, :, token_mask[row]], alone, 1e-11, f"row {row}")
        linear = dataclasses.replace(final, exact_key=None, exact_value=None, exact_mask=None)
        linear_alone = dataclasses.replace(state_alone, exact_key=None, exact_value=None, exact_mask=None)
        assert_equal_states(linear.select_rows(torch.tensor([row])), linear_alone)


@WINDOW
@pytest.mark.parametrize("softmax_heads", [(), (1,), (0, 1)])
@pytest.mark.parametrize("cut", [10, 20, 25, 44])
def test_the_first_document_of_a_piece_continues_the_state(cut, softmax_heads, window):
    # Documents end at 20 and 33; the cut lies inside one, or between two.
    segment_ids = torch.repeat_interleave(torch.tensor([0, 1, 2]), torch.tensor([20, 13, N - 33])).expand(2, -1)
    inputs = random_inputs(N)
    options = {"window": window, "alpha": 0.6, "softmax_heads": softmax_heads}
    whole, final = rfa_attention(**inputs, **options, segment_ids=segment_ids, output_final_state=True)
    pieces = [cut, N - cut] if cut != 20 else [cut - 5, N - cut + 5]
    output, state = run_in_pieces(inputs, pieces, **options, segment_ids=segment_ids)
    assert_near(output, whole, 1e-11)
    if len(softmax_heads) < 2:
        assert_near(true_sums(state), true_sums(final), 1e-11)
    assert torch.equal(state.count, final.count)
    # The next token belongs to the last document and sees nothing of the others.
    more = random_inputs(5, seed=1)
    after = rfa_attention(**more, **options, initial_state=state)
    last = tokens(inputs, slice(33, N))
    joined = {name: t if name == "omega" else torch.cat([last[name], more[name]], dim=2) for name, t in inputs.items()}
    assert_near(after, rfa_attention(**joined, **options)[:, :, -5:], 1e-11)


@pytest.mark.parametrize("softmax_heads", [(), (1,), (0, 1)])
def test_count_is_that_of_the_last_document(softmax_heads):
    segment_ids = torch.tensor([[0] * 20 + [1] * 40, [0] * 50 + [1] * 10])
    _, state = rfa_attention(
        **random_inputs(N), window=8, segment_ids=segment_ids, softmax_heads=softmax_heads, output_final_state=True
    )
    assert state.count.tolist() == [40, 10]


@pytest.mark.parametrize("number", [0, 1, 5])
@pytest.mark.parametrize("softmax_heads", [(), (1,)])
def test_padding_behind_the_last_document_does_not_end_it(softmax_heads, number):
    # The document number of padding means nothing, in the state neither.
    inputs, more = random_inputs(N), random_inputs(5, seed=1)
    token_mask = (torch.arange(N) < N - 7).expand(2, -1)
    segment_ids = torch.where(token_mask, (torch.arange(N) >= 30).long(), number)
    options = {"window": 8, "alpha": 0.6, "softmax_heads": softmax_heads}
    _, state = rfa_attention(
        **inputs, **options, token_mask=token_mask, segment_ids=segment_ids, output_final_state=True
    )
    after = rfa_attention(**more, **options, initial_state=state)
    last = tokens(inputs, slice(30, N - 7))
    joined = {name: t if name == "omega" else torch.cat([last[name], more[name]], dim=2) for name, t in inputs.items()}
    assert_near(after, rfa_attention(**joined, **options)[:, :, -5:], 1e-11)


# --- what the state is ----------------------------------------------------------------------------------------------


@WINDOW
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize("length", [1, 7, 8, 15, 16, 17, 23, 24, 25, 60, 130])
def test_the_state_is_that_of_the_definition(length, feature_map, window):
    inputs = random_inputs(length)
    options = {
        "window": window,
        "alpha": 0.6,
        "sink_tokens": 3,
        "feature_map": feature_map,
        "output_final_state": True,
    }
    _, got = rfa_attention(**inputs, **options)
    _, want = rfa_attention_reference(**inputs, **options)
    assert_equal_states(got, want, 1e-10)
    assert torch.equal(got.log_max == -torch.inf, want.log_max == -torch.inf)
    assert bool((got.log_max > -torch.inf).any()) == (not window or length >= 16)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (rfa_attention, rfa_attention_reference),
        (rfa_attention_reference, rfa_attention),
        (rfa_attention_reference, rfa_attention_reference),
    ],
)
@WINDOW
@pytest.mark.parametrize("cut", [1, 8, 13, 31])
def test_states_of_the_definition_and_the_operator_are_exchangeable(cut, window, first, second):
    inputs = random_inputs(N)
    options = {"window": window, "alpha": 0.6, "output_final_state": True}
    whole, final = rfa_attention_reference(**inputs, **options)
    _, state = first(**tokens(inputs, slice(cut)), **options)
    output, state = second(**tokens(inputs, slice(cut, N)), **options, initial_state=state)
    assert_near(output, whole[:, :, cut:], 1e-10)
    assert_equal_states(state, final, 1e-10)


@WINDOW
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_its_size_does_not_depend_on_the_length(dtype, window):
    sizes = set()
    for length in (1, 8, 50, 500):
        inputs = random_inputs(length, dtype=dtype)
        _, state = rfa_attention(**inputs, window=window, output_final_state=True)
        sizes.add(state.nbytes)
        _, state = rfa_attention(
            **tokens(inputs, slice(1)), window=window, initial_state=state, output_final_state=True
        )
        sizes.add(state.nbytes)
    wide = accumulation_dtype(dtype).itemsize
    sums = 2 * 2 * (16 * (6 + 1) + 1) * wide  # B, Hk, F (M + 1) and log_max
    near = 2 * 2 * (2 * window + (4 if window else 0)) * (8 + 6) * dtype.itemsize
    assert sizes == {sums + near + 2 * 8}


@WINDOW
@pytest.mark.parametrize("softmax_heads", [(), (1,)])
@pytest.mark.parametrize("more", [1, 2, 20])
def test_a_call_does_not_change_the_state_that_it_got(more, softmax_heads, window):
    inputs = random_inputs(N)
    options = {"window": window, "softmax_heads": softmax_heads, "output_final_state": True}
    _, state = rfa_attention(**tokens(inputs, slice(23)), **options)
    copy = state.map(torch.clone)
    one = rfa_attention(**tokens(inputs, slice(23, 23 + more)), **options, initial_state=state)
    before, after = copy.to_dict(), state.to_dict()
    assert before.pop("beside") == after.pop("beside") == []
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    two = rfa_attention(**tokens(inputs, slice(23, 23 + more)), **options, initial_state=state)
    assert torch.equal(one[0], two[0])


def test_a_state_is_frozen():
    _, state = rfa_attention(**random_inputs(5), output_final_state=True)
    with pytest.raises(dataclasses.FrozenInstanceError):
        state.count = torch.zeros(2)


@WINDOW
@pytest.mark.parametrize("softmax_heads", [(), (1,), (0, 1)])
@pytest.mark.parametrize("rows", [[0], [2, 0], [1, 1, 2, 0, 0]])
def test_select_rows(rows, softmax_heads, window):
    # Beams of generation: rows in another order, some twice, some dropped; here with different counts.
    inputs, more = random_inputs(N, batch=3), random_inputs(12, batch=len(rows), seed=1)
    token_mask = torch.arange(N) >= torch.tensor([0, 3, 11])[:, None]
    options = {"window": window, "softmax_heads": softmax_heads, "output_final_state": True}
    _, state = rfa_attention(**inputs, **options, token_mask=token_mask)
    chosen = state.select_rows(torch.tensor(rows))
    assert chosen.count.tolist() == state.count[rows].tolist()
    output, _ = run_in_pieces(more, [1, 1, 10], state=chosen, window=window, softmax_heads=softmax_heads)
    for index, row in enumerate(rows):
        begin = tokens(inputs, token_mask[row].nonzero()[:, 0], slice(row, row + 1))
        end = tokens(more, slice(None), slice(index, index + 1))
        joined = {n: t if n == "omega" else torch.cat([t, end[n]], dim=2) for n, t in begin.items()}
        want = rfa_attention(**joined, window=window, softmax_heads=softmax_heads)[:, :, -12:]
        assert_near(output[index : index + 1], want, 1e-11, f"row {row}")


def test_to_keeps_the_count_on_the_cpu():
    _, state = rfa_attention(**random_inputs(5), output_final_state=True)
    moved = state.to(torch.device("meta"))
    assert moved.kv_state.device.type == moved.near_key.device.type == "meta"
    assert moved.count.device.type == "cpu"


# --- exact heads ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("softmax_heads", [(1,), (0, 1)])
@pytest.mark.parametrize("cuts", ["inside", "tokens"])
def test_exact_heads_cache_all_keys(cuts, softmax_heads):
    inputs = random_inputs(N)
    _, state = run_in_pieces(inputs, CUTS[cuts], window=8, softmax_heads=softmax_heads)
    assert torch.equal(state.exact_key, inputs["key"][:, list(softmax_heads)])
    assert torch.equal(state.exact_value, inputs["value"][:, list(softmax_heads)])
    assert state.exact_mask is None
    assert state.near_key.shape[1] == state.kv_state.shape[1] == 2 - len(softmax_heads)


def test_exact_heads_remember_which_slots_hold_tokens():
    inputs = random_inputs(N)
    token_mask = torch.arange(N) >= torch.tensor([0, 9])[:, None]
    _, state = run_in_pieces(inputs, [20, 1, N - 21], window=8, softmax_heads=[1], token_mask=token_mask)
    assert torch.equal(state.exact_mask, token_mask)
    # Tokens without a mask follow: all of them hold tokens.
    _, state = rfa_attention(
        **random_inputs(3, seed=1), window=8, softmax_heads=[1], initial_state=state, output_final_state=True
    )
    assert torch.equal(state.exact_mask, torch.cat([token_mask, torch.ones(2, 3, dtype=torch.bool)], dim=1))


def test_exact_heads_are_the_only_part_that_grows():
    def sizes(length):
        _, state = rfa_attention(**random_inputs(length), window=8, softmax_heads=[1], output_final_state=True)
        exact = state.exact_key.nbytes + state.exact_value.nbytes
        return exact, state.nbytes - exact

    (short, rest), (long, rest_long) = sizes(50), sizes(100)
    assert long == 2 * short == 2 * 100 * (8 + 6) * 8
    assert rest == rest_long


@pytest.mark.parametrize("width", [1, 5, 16, 59, 100])
@pytest.mark.parametrize("cuts", CUTS)
def test_sliding_windows_in_pieces(cuts, width):
    inputs = random_inputs(N)
    options = {"softmax_heads": [0, 1], "sliding_window": width}
    output, state = run_in_pieces(inputs, CUTS[cuts], **options)
    assert_near(output, rfa_attention(**inputs, **options), 1e-12)
    kept = min(width - 1, N)  # no later token sees more
    assert torch.equal(state.exact_key, inputs["key"][:, :, N - kept :])
    assert state.count.tolist() == [N, N]


@pytest.mark.parametrize("width", [5, 16])
@pytest.mark.parametrize("cuts", ["first", "inside", "prompt_and_tokens"])
def test_sliding_windows_after_left_padding(cuts, width):
    inputs = random_inputs(N, batch=3)
    padding = [0, 3, 30]
    token_mask = torch.arange(N) >= torch.tensor(padding)[:, None]
    options = {"softmax_heads": [0, 1], "sliding_window": width}
    output, state = run_in_pieces(inputs, CUTS[cuts], **options, token_mask=token_mask)
    for row, pad in enumerate(padding):
        bare = rfa_attention(**tokens(inputs, slice(pad, N), slice(row, row + 1)), **options)
        assert_near(output[row : row + 1, :, pad:], bare, 1e-12, f"row {row}")
    assert state.exact_mask.shape == (3, width - 1)


# --- bidirectional --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("window", "sinks", "cut"),
    [
        *((0, 0, cut) for cut in (1, 8, 13, 31)),
        *((8, 0, cut) for cut in (8, 16)),
        *((8, sinks, cut) for sinks, cut in ((0, 1), (0, 13), (4, 8), (4, 13))),
    ],
)
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_bidirectional_states_are_those_of_the_definition(feature_map, window, sinks, cut):
    # Its keys are far to all queries of the next piece, so that pieces do not equal the whole.
    inputs = random_inputs(N, size=1.0 if window else 0.5)
    options = {"window": window, "sink_tokens": sinks, "alpha": 0.6, "feature_map": feature_map, "causal": False}
    results = []
    for function in (rfa_attention, rfa_attention_reference):
        _, state = function(**tokens(inputs, slice(cut)), **options, output_final_state=True)
        output, final = function(
            **tokens(inputs, slice(cut, N)), **options, initial_state=state, output_final_state=True
        )
        results.append((output, state, final))
    (got, got_state, got_final), (want, want_state, want_final) = results
    assert_equal_states(got_state, want_state, 1e-10)
    assert_near(got, want, 1e-10)
    assert_equal_states(got_final, want_final, 1e-10)
    assert got_final.count.tolist() == [N, N]


@WINDOW
def test_a_bidirectional_state_with_padding_and_documents(window):
    inputs, more = random_inputs(N), random_inputs(25, seed=1)
    token_mask = torch.stack([torch.arange(N) >= 7, torch.arange(N) < 41])
    segment_ids = torch.stack([torch.arange(N) >= 30, torch.arange(N) >= 20]).long()
    options = {"window": window, "alpha": 0.6, "causal": False, "output_final_state": True}
    results = []
    for function in (rfa_attention, rfa_attention_reference):
        first, state = function(**inputs, **options, token_mask=token_mask, segment_ids=segment_ids)
        numbers = torch.tensor([[0] * 10 + [1] * 15, [0] * 25])
        second, final = function(**more, **options, initial_state=state, segment_ids=numbers)
        results.append((first, state, second, final))
    (first, state, second, final), want = results
    assert_near(first, want[0], 1e-10)
    assert_equal_states(state, want[1], 1e-10)
    assert_near(second, want[2], 1e-10)
    assert_equal_states(final, want[3], 1e-10)


@WINDOW
def test_gradients_through_a_bidirectional_state(window):
    inputs = random_inputs(N)
    options = {"window": window, "sink_tokens": 0, "alpha": 0.6, "causal": False}

    def two_pieces(function):
        return lambda **leaves: run_in_pieces(leaves, [24, 36], function=function, **options)[0]

    _, got = with_gradients(two_pieces(rfa_attention), inputs)
    _, want = with_gradients(two_pieces(rfa_attention_reference), inputs)
    for name, gradient in want.items():
        assert_near(got[name], gradient, 1e-10, name)


def test_a_causal_state_is_refused_by_the_bidirectional_form():
    inputs = random_inputs(N)
    _, state = rfa_attention(**inputs, window=8, output_final_state=True)
    with pytest.raises(
        ConfigError, match=r"`initial_state` .*`near_key` has shape \(2, 2, 16, 8\).*needs \(2, 2, 0, 8\)"
    ):
        rfa_attention(**inputs, window=8, causal=False, initial_state=state)


@pytest.mark.parametrize(
    "change", [{"window": 4}, {"window": 16}, {"window": 0}, {"sink_tokens": 2}, {"causal_before": False}]
)
@pytest.mark.parametrize("length", [1, 20])
def test_a_state_of_another_call_is_refused(length, change):
    inputs, more = random_inputs(N), random_inputs(length, seed=1)
    options = {"window": 8, "sink_tokens": 4}
    causal_before = change.get("causal_before", True)
    _, state = rfa_attention(**inputs, **options, causal=causal_before, output_final_state=True)
    change = {name: value for name, value in change.items() if name != "causal_before"}
    with pytest.raises(ConfigError, match="`initial_state`"):
        rfa_attention(**more, **(options | change), initial_state=state)
