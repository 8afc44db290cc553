"""Kept keys of encoders: the definition against a loop over tokens, the chunks against the definition, the choice."""

import numpy as np
import pytest
import torch
from operator_inputs import FEATURE_MAPS, assert_near, random_inputs, tokens, with_gradients
from operator_states import assert_equal_states
from test_graph import compiled
from test_memory import LONG, SHORT, LargestTensor, largest

from hf_rfa import ConfigError, rfa_attention, rfa_attention_reference
from hf_rfa.ops import encoder_selection, kept_encoder_keys
from hf_rfa.ops.arguments import operator_arguments
from hf_rfa.ops.call import OperatorCall
from hf_rfa.ops.encoder_selection import choose_encoder_keys
from hf_rfa.ops.kept_encoder_keys import NOTHING, QUERIES, asked_ranks, best, scores

N, WINDOW, SINKS = 60, 8, 3
OPTIONS = {"window": WINDOW, "sink_tokens": SINKS, "alpha": 0.6, "causal": False}
LOGITS = torch.tensor([0.5, -1.0, 2.0, 0.0])
#: Fewer than a chunk, as many, more than two chunks, more than there are.
KEPT = pytest.mark.parametrize("kept_keys", [3, 8, 20, 400])
FEW = pytest.mark.parametrize("kept_keys", [3, 20])
EXTRAS = pytest.mark.parametrize(
    "extras", [{}, {"sink_logits": LOGITS}, {"sink_tokens": 0}], ids=["plain", "sink logits", "no sinks"]
)
#: A row that is padded on both sides and inside, and one that is shorter; four documents, and two.
MASK = torch.ones(2, 90, dtype=torch.bool)
MASK[0, :5] = MASK[0, 60:66] = MASK[1, 81:] = False
DOCUMENTS = torch.zeros(2, 90, dtype=torch.int64)
DOCUMENTS[0, 35:], DOCUMENTS[0, 41:], DOCUMENTS[0, 88:], DOCUMENTS[1, 50:] = 1, 2, 3, 1
LAYOUTS = {
    "padding": {"token_mask": MASK},
    "documents": {"segment_ids": DOCUMENTS},
    "both": {"token_mask": MASK, "segment_ids": DOCUMENTS},
    "long documents": {"segment_ids": (torch.arange(90) >= 40).long().expand(2, -1), "token_mask": MASK},
    "padding alone in a row": {"token_mask": MASK & torch.tensor([[True], [False]])},
}


@pytest.fixture
def few_at_once(monkeypatch):
    """Blocks of so few logits that documents, heads and queries are split, as those of long texts are."""
    monkeypatch.setattr(encoder_selection, "BLOCK_LOGITS", 1000)


SPLIT = pytest.mark.usefixtures("few_at_once")


def kept_tokens(inputs, **options) -> torch.Tensor:
    """(B, Hk, N) bool: what a call keeps."""
    arguments = operator_arguments(**inputs, **options)
    choice = choose_encoder_keys(OperatorCall.of(*(inputs[n] for n in ("query", "key", "value")), *arguments))
    assert choice is not None
    return choice.kept


def assert_is_the_definition(inputs, **options) -> None:
    """Outputs, states and all gradients."""
    got, got_gradients = with_gradients(rfa_attention, inputs, **options)
    want, want_gradients = with_gradients(rfa_attention_reference, inputs, **options)
    assert_near(got, want, 1e-11)
    for name, gradient in want_gradients.items():
        assert_near(got_gradients[name], gradient, 1e-10, name)
    got, state = rfa_attention(**inputs, **options, output_final_state=True)
    assert_near(got, want, 1e-11)
    assert_equal_states(state, rfa_attention_reference(**inputs, **options, output_final_state=True)[1])


# --- the definition -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "queries"), [(N, 128), (N, 7), (131, 128)])
@pytest.mark.parametrize("kept_keys", [3, 8, 20])
def test_the_definition_is_a_loop_over_tokens(kept_keys, length, queries, monkeypatch):
    monkeypatch.setattr(kept_encoder_keys, "QUERIES", queries)
    inputs = random_inputs(length, batch=1, heads=2, key_heads=1)
    query, key, value, omega = (inputs[name].double() for name in ("query", "key", "value", "omega"))
    query, key, value, scale = query[0], key[0, 0], value[0, 0], 8**-0.5

    def is_near(i, j):
        return abs(i // WINDOW - j // WINDOW) <= 1 or j < SINKS

    logits = scale * query @ key.T
    psi = [
        (0.6 * x @ omega[0].T - (0.6 * x).square().sum(-1, keepdim=True) / 2).exp()
        for x in (scale**0.5 * query, scale**0.5 * key)
    ]
    estimate = psi[0] @ psi[1].mT / omega.shape[1]
    parts = min(queries, length)
    asked = [int((part + 0.5) * length / parts) for part in range(parts)]
    share, score = logits.softmax(-1), {}
    for j in range(length):
        given = [share[:, i, j] for i in asked if not is_near(i, j)]
        if given:
            score[j] = value[j].norm() * max(sum(given)) / len(given)
    kept = sorted(score, key=score.get)[-kept_keys:]

    weights = estimate.clone()
    for i in range(length):
        exact = [j for j in range(length) if is_near(i, j) or j in kept]
        weights[:, i, exact] = logits[:, i, exact].exp()
    want = weights @ value / weights.sum(-1, keepdim=True)
    options = {**OPTIONS, "kept_keys": kept_keys}
    assert_near(rfa_attention_reference(**inputs, **options)[0], want, 1e-12)
    assert_near(rfa_attention(**inputs, **options)[0], want, 1e-12)
    assert kept_tokens(inputs, **options)[0, 0].nonzero().flatten().tolist() == sorted(kept)


@SPLIT
@KEPT
@EXTRAS
@pytest.mark.parametrize("length", [5, 16, 17, 24, N, 300])
def test_chunks_equal_the_definition(length, extras, kept_keys):
    inputs, options = random_inputs(length), {**OPTIONS, "kept_keys": kept_keys, **extras}
    got, state = rfa_attention(**inputs, **options, output_final_state=True)
    want, final = rfa_attention_reference(**inputs, **options, output_final_state=True)
    assert_near(got, want, 1e-11)
    assert_equal_states(state, final)
    assert_near(rfa_attention(**inputs, **options), want, 1e-11)


@KEPT
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_gradients_equal_the_definition(feature_map, kept_keys):
    inputs = random_inputs(N)
    inputs["sink_logits"], inputs["alpha"] = LOGITS.double(), torch.tensor([0.4, 0.7]).double()
    options = {**OPTIONS, "kept_keys": kept_keys, "feature_map": feature_map}
    del options["alpha"]
    assert_is_the_definition(inputs, **options)


@FEW
def test_value_dims_and_parameters_of_each_head(kept_keys):
    inputs = random_inputs(N, heads=6, key_heads=3)
    inputs["value"] = torch.cat([inputs["value"], inputs["value"][..., :3].sin()], dim=-1)
    inputs |= {"alpha": torch.tensor([0.3, 0.9, 0.5]).double(), "gamma": torch.tensor([0.4, 3.0, 1.0]).double()}
    options = {**OPTIONS, "kept_keys": kept_keys, "feature_map": "trigonometric"}
    del options["alpha"]
    assert_is_the_definition(inputs, **options)


def test_an_exact_head_beside_them():
    inputs, options = random_inputs(N), {**OPTIONS, "kept_keys": 6}
    got = rfa_attention(**inputs, **options, softmax_heads=[1])
    assert_near(got[:, :2], rfa_attention(**inputs, **options)[:, :2], 1e-12)
    keys = (inputs[name][:, 1:].expand(-1, 2, -1, -1) for name in ("key", "value"))
    want = torch.nn.functional.scaled_dot_product_attention(inputs["query"][:, 2:], *keys)
    assert_near(got[:, 2:], want, 1e-12)


def test_without_kept_keys_nothing_changes(monkeypatch):
    inputs = random_inputs(300)
    want = rfa_attention(**inputs, **OPTIONS)
    assert not torch.equal(rfa_attention(**inputs, **OPTIONS, kept_keys=1), want)
    monkeypatch.setattr(encoder_selection, "recomputing", None)  # nothing is asked
    assert torch.equal(rfa_attention(**inputs, **OPTIONS, kept_keys=0), want)


def test_within_what_is_kept_it_is_softmax():
    inputs = random_inputs(N)
    keys = (x.repeat_interleave(2, 1) for x in (inputs["key"], inputs["value"]))
    want = torch.nn.functional.scaled_dot_product_attention(inputs["query"], *keys)
    assert_near(rfa_attention(**inputs, **OPTIONS, kept_keys=N), want, 1e-12)


# --- rows, documents, padding ---------------------------------------------------------------------------------------


@SPLIT
@KEPT
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, kept_keys):
    inputs = random_inputs(90)
    inputs["sink_logits"] = LOGITS.double()
    assert_is_the_definition(inputs, **OPTIONS, kept_keys=kept_keys, **LAYOUTS[layout])


@SPLIT
@FEW
def test_a_document_keeps_what_it_keeps_alone(kept_keys):
    inputs, options = random_inputs(90), {**OPTIONS, "kept_keys": kept_keys}
    kept = kept_tokens(inputs, **options, **LAYOUTS["both"])
    output = rfa_attention(**inputs, **options, **LAYOUTS["both"])
    assert not kept.transpose(1, 2)[~MASK].any()
    for row in range(2):
        for document in DOCUMENTS[row].unique():
            real = ((DOCUMENTS[row] == document) & MASK[row]).nonzero().flatten()
            alone = tokens(inputs, real, slice(row, row + 1))
            assert_near(output[row : row + 1, :, real], rfa_attention(**alone, **options), 1e-12)
            if len(real) > 2 * WINDOW:
                assert torch.equal(kept[row : row + 1, :, real], kept_tokens(alone, **options))
            else:
                assert not kept[row, :, real].any()


@FEW
def test_a_row_does_not_depend_on_its_neighbours(kept_keys):
    inputs, options = random_inputs(N, batch=3), {**OPTIONS, "kept_keys": kept_keys}
    together, kept = rfa_attention(**inputs, **options), kept_tokens(inputs, **options)
    for row in range(3):
        alone = tokens(inputs, slice(None), slice(row, row + 1))
        assert_near(rfa_attention(**alone, **options), together[row : row + 1], 1e-12)
        assert torch.equal(kept_tokens(alone, **options), kept[row : row + 1])


@FEW
def test_what_stands_in_padding_does_not_matter(kept_keys):
    inputs, options = random_inputs(90), {**OPTIONS, "kept_keys": kept_keys, "token_mask": MASK}
    want = rfa_attention(**inputs, **options)
    for name in ("query", "key", "value"):
        inputs[name] = torch.where(MASK[:, None, :, None], inputs[name], 50.0)
    assert torch.equal(rfa_attention(**inputs, **options), want)


# --- states ---------------------------------------------------------------------------------------------------------


@FEW
@pytest.mark.parametrize("cut", [13, 24, 37])
def test_a_state_is_a_bag_of_far_keys(cut, kept_keys):
    inputs, options = random_inputs(N), {**OPTIONS, "kept_keys": kept_keys}
    first, rest = tokens(inputs, slice(cut)), tokens(inputs, slice(cut, N))
    results = []
    for function in (rfa_attention, rfa_attention_reference):
        _, state = function(**first, **options, output_final_state=True)
        results.append((state, *function(**rest, **options, initial_state=state, output_final_state=True)))
    for got, want in zip(*results, strict=True):
        (assert_near if isinstance(got, torch.Tensor) else assert_equal_states)(got, want, 1e-11)
    # What is kept is in its sums, as without kept keys.
    _, state = rfa_attention(**first, **OPTIONS, output_final_state=True)
    assert_equal_states(results[0][0], state)
    assert state.kept_key is None


def test_gradients_through_a_state():
    inputs, options = random_inputs(N), {**OPTIONS, "kept_keys": 6}

    def two_pieces(function):
        def run(**leaves):
            _, state = function(**tokens(leaves, slice(24)), **options, output_final_state=True)
            return function(**tokens(leaves, slice(24, N)), **options, initial_state=state)

        return run

    _, got = with_gradients(two_pieces(rfa_attention), inputs)
    _, want = with_gradients(two_pieces(rfa_attention_reference), inputs)
    for name, gradient in want.items():
        assert_near(got[name], gradient, 1e-10, name)


# --- the choice -----------------------------------------------------------------------------------------------------


def test_who_is_asked():
    ranks = asked_ranks(np.array([5, QUERIES, 2 * QUERIES, 100 * QUERIES + 1]))
    assert ranks[0].tolist() == [0, 1, 2, 3, 4, *[-1] * (QUERIES - 5)]
    assert ranks[1].tolist() == list(range(QUERIES))
    assert ranks[2].tolist() == list(range(1, 2 * QUERIES, 2))
    assert (ranks[3, 0], ranks[3, -1], len(set(ranks[3]))) == (50, 100 * QUERIES - 50, QUERIES)
    assert set(np.diff(ranks[3])) <= {100, 101}


def test_ties_and_what_is_not_a_number():
    mass = torch.tensor([9.0, 2.0, 1.0, torch.nan, 0.0, 4.0, torch.nan])
    length = torch.tensor([1.0, 0.5, 1.0, 1.0, 1.0, 1.0, torch.nan])
    count = torch.tensor([0, 2, 2, 2, 3, 4, 0])
    score = scores(torch.stack([mass / 2, mass]), length, count)
    assert score.tolist() == [NOTHING, 0.5, 0.5, -1.0, 0.0, 1.0, NOTHING]
    assert best(score, 2).tolist() == [2, 5]  # of the equal ones, 1 and 2, the later one stays
    assert best(score, 4).tolist() == [1, 2, 4, 5]
    assert best(score, 7).tolist() == [-1, -1, 1, 2, 3, 4, 5]
    assert best(score, 99).tolist() == [-1, -1, 1, 2, 3, 4, 5]


def test_a_value_that_is_not_a_number_is_not_kept():
    inputs = random_inputs(N, batch=1)
    inputs["value"][:, :, 30] = torch.nan
    kept = kept_tokens(inputs, **OPTIONS, kept_keys=8)
    assert not kept[:, :, 30].any()
    assert (kept.sum(-1) == 8).all()


def test_keys_that_matter_are_kept():
    inputs = random_inputs(N, batch=1, heads=2, key_heads=2)
    loud = [5, 13, 46]
    inputs["query"][..., 0], inputs["key"][..., 0] = 3.0, 0.0
    inputs["key"][:, :, [*loud, 1], 0] = 4.0  # one of them is a sink
    kept = kept_tokens(inputs, **OPTIONS, kept_keys=3)
    assert [head.nonzero().flatten().tolist() for head in kept[0]] == [loud, loud]


def test_of_several_query_heads_the_one_that_gives_most_decides():
    inputs = random_inputs(N, batch=1, heads=2, key_heads=1)
    inputs["query"][..., :2], inputs["key"][..., :2] = 0.0, 0.0
    inputs["query"][:, 0, :, 0] = inputs["query"][:, 1, :, 1] = 3.0
    inputs["key"][:, :, 5, 0], inputs["key"][:, :, 46, :2] = 3.6, 3.0  # in sum, 46 gets a third more
    inputs["key"][..., 2:] = 0.0
    inputs["value"] = torch.ones_like(inputs["value"])
    assert kept_tokens(inputs, **OPTIONS, kept_keys=1)[0, 0].nonzero().flatten().tolist() == [5]


def test_a_kept_key_counts_once():
    # Everything is estimated as 1 and nothing attends: outputs are means, in which each key has the same weight.
    inputs, options = random_inputs(N), {**OPTIONS, "kept_keys": 7, "alpha": 0.0}
    inputs["query"] = torch.zeros_like(inputs["query"])
    want = inputs["value"].mean(2, keepdim=True).repeat_interleave(2, 1).expand(-1, -1, N, -1)
    assert_near(rfa_attention(**inputs, **options), want, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_choice_under_autocast_is_the_choice_without(dtype):
    inputs, options = random_inputs(300, dtype=dtype), {**OPTIONS, "kept_keys": 12}
    want = rfa_attention(**inputs, **options)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(rfa_attention(**inputs, **options), want)


def test_float32_is_near_the_definition():
    inputs, options = random_inputs(300, dtype=torch.float32), {**OPTIONS, "kept_keys": 12}
    got, got_gradients = with_gradients(rfa_attention, inputs, **options)
    want, want_gradients = with_gradients(rfa_attention_reference, inputs, **options)
    assert_near(got.double(), want, 1e-5)
    for name, gradient in want_gradients.items():
        assert_near(got_gradients[name].double(), gradient.double(), 1e-4, name)


@pytest.mark.parametrize("layout", [None, "both"])
def test_large_logits(layout):
    inputs, options = random_inputs(90, dtype=torch.float32), {**OPTIONS, "kept_keys": 12, "feature_map": "hyperbolic"}
    inputs["query"] *= 30
    layout = LAYOUTS.get(layout, {})
    got, want = rfa_attention(**inputs, **options, **layout), rfa_attention_reference(**inputs, **options, **layout)
    assert_near(got.double(), want, 1e-4)


# --- transforms, graphs, memory -------------------------------------------------------------------------------------

CALLS = pytest.mark.parametrize("layout", [None, "padding", "long documents"])


def loss_of(layout):
    options = {**OPTIONS, "kept_keys": 6, **LAYOUTS.get(layout, {})}

    def loss(query, key, value, omega):
        return rfa_attention(query, key, value, omega=omega, **options).square().sum()

    return loss, list(random_inputs(90).values())


@CALLS
def test_transforms(layout):
    loss, inputs = loss_of(layout)
    leaves = [x.clone().requires_grad_() for x in inputs]
    wanted = torch.autograd.grad(loss(*leaves), leaves)
    found = torch.func.grad(loss, argnums=(0, 1, 2, 3))(*inputs)
    for got, want in zip(found, wanted, strict=True):
        assert_near(got, want, 1e-12)
    scaled = torch.stack([inputs[1], 0.5 * inputs[1]])
    each = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)), in_dims=(None, 0, None, None))
    found = each(inputs[0], scaled, *inputs[2:])
    for index, key in enumerate(scaled):
        wanted = torch.func.grad(loss, argnums=(0, 1))(inputs[0], key, *inputs[2:])
        for got, want in zip(found, wanted, strict=True):
            assert_near(got[index], want, 1e-12)


def test_second_derivatives():
    inputs, options = random_inputs(24, batch=1, heads=1, key_heads=1), {**OPTIONS, "window": 4, "kept_keys": 5}
    results = []
    for function in (rfa_attention, rfa_attention_reference):
        leaves = [x.clone().requires_grad_() for x in inputs.values()]
        output = function(**dict(zip(inputs, leaves, strict=True)), **options)
        first = torch.autograd.grad(output.square().sum(), leaves, create_graph=True)
        results.append(torch.autograd.grad(sum(x.square().sum() for x in first), leaves))
    for got, want in zip(*results, strict=True):
        assert_near(got, want, 1e-10)


@CALLS
def test_a_compiled_call(layout):
    loss, inputs = loss_of(layout)
    results = []
    for function in (loss, compiled(loss)):
        leaves = [x.clone().requires_grad_() for x in inputs]
        value = function(*leaves)
        results.append([value, *torch.autograd.grad(value, leaves)])
    for got, want in zip(*results, strict=True):
        assert_near(got, want, 1e-12)


@pytest.mark.parametrize("options", [{}, {"padded": True}, {"packed": True}], ids=["plain", "padded", "packed"])
def test_no_tensor_is_quadratic(options):
    options = {"window": 16, "kept_keys": 32, "causal": False, **options}
    for before, after in zip(largest(SHORT, **options), largest(LONG, **options), strict=True):
        assert after < 2.2 * before


@pytest.mark.parametrize("packed", [False, True])
def test_work_is_linear(packed):
    numbers = []
    for length in (2 * LONG, 4 * LONG):
        inputs = random_inputs(length, batch=1, heads=2, key_heads=1, dtype=torch.float32)
        leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
        options = {"segment_ids": torch.arange(length)[None] // 300} if packed else {}
        written = AllTensors()
        with written:
            rfa_attention(**leaves, **options, window=16, kept_keys=32, causal=False).sum().backward()
        numbers.append(written.total)
    assert numbers[1] < 2.2 * numbers[0]


class AllTensors(LargestTensor):
    """Adds up the numbers in all tensors that operations return."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = super().__torch_dispatch__(function, types, args, kwargs)
        self.total += result.numel() if isinstance(result, torch.Tensor) else 0
        return result


def test_what_cannot_be():
    with pytest.raises(ConfigError, match="where nothing is exact no key has a score"):
        rfa_attention(**random_inputs(N), window=0, sink_tokens=0, kept_keys=4, causal=False)
    _, state = rfa_attention(**random_inputs(N), window=8, kept_keys=4, output_final_state=True)
    with pytest.raises(ConfigError, match="another kind of call"):
        rfa_attention(**random_inputs(N), window=8, kept_keys=4, causal=False, initial_state=state)
