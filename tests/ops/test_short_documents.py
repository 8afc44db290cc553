"""Packed documents of every mixture of lengths: short ones share tiles, and nothing but the time tells."""

import random
from functools import partial

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
from operator_states import assert_equal_states, run_in_pieces

from hf_rfa import rfa_attention, rfa_attention_reference
from hf_rfa.ops import linear, softmax, tiles
from hf_rfa.ops.combine import FarStatistics
from hf_rfa.ops.documents import Documents
from hf_rfa.ops.layout import PlanSpec, TokenLayout
from hf_rfa.ops.tiles import ShortRule, short_plan

ROWS, N = 3, 170
CPU = torch.device("cpu")


def random_layout(draw: random.Random, length: int = N) -> Tensors:
    """Rows of documents, each row of another mixture of lengths, and padding on the left, the right and inside."""
    segment_ids, token_mask = torch.empty(ROWS, length, dtype=torch.int64), torch.ones(ROWS, length, dtype=torch.bool)
    for row in range(ROWS):
        longest, number, slot = draw.choice([2, 5, 16, 17, 40, 70, length]), 0, 0
        while slot < length:
            size = draw.randint(1, longest)
            segment_ids[row, slot : slot + size] = number
            number, slot = number + draw.choice([1, 2]), slot + size
        left, right = draw.choice([0, 0, 3, 30]), draw.choice([0, 0, 1, 50])
        token_mask[row, :left] = False
        token_mask[row, length - right :] = False
        holes = draw.choice([0.0, 0.0, 0.1, 0.6])
        token_mask[row] &= torch.tensor([draw.random() >= holes for _ in range(length)])
    if draw.random() < 0.2:
        token_mask[draw.randrange(ROWS)] = False
    layout = {"segment_ids": segment_ids, "token_mask": token_mask}
    for name in draw.choice([(), (), ("segment_ids",), ("token_mask",), ("segment_ids", "token_mask")]):
        del layout[name]
    return layout


def random_call(seed: int, causal: bool, length: int = N) -> tuple[Tensors, dict]:
    draw = random.Random(seed)
    window = draw.choice([0, 4, 8, 16, 64])
    inputs = random_inputs(length, batch=ROWS, size=1.0 if window else 0.5, seed=seed)
    if draw.random() < 0.3:
        inputs["sink_logits"] = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)
    if causal and draw.random() < 0.3:
        inputs["gate_weight"] = 0.3 * torch.ones(2, 8, dtype=torch.float64)
        inputs["gate_bias"] = torch.tensor([1.0, 3.0], dtype=torch.float64)
    options = {
        "window": window, "sink_tokens": draw.choice([0, 3]), "alpha": 0.6, "causal": causal,
        "gamma": torch.tensor([0.7, draw.choice([1.0, 0.0])]) if window else 0.7,
        "feature_map": draw.choice(FEATURE_MAPS), **random_layout(draw, length),
    }  # fmt: skip
    return inputs, options


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("seed", range(60))
def test_every_mixture_equals_the_definition_in_outputs_and_gradients(seed, causal):
    inputs, options = random_call(seed, causal)
    assert_equals_the_definition(inputs, 1e-10, 1e-9, **options)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("seed", range(40))
def test_a_state_goes_before_and_comes_after_every_mixture(seed, causal):
    before, options = random_call(1000 + seed, causal, 50)
    inputs = {**before, **random_inputs(N, batch=ROWS, size=1.0 if options["window"] else 0.5, seed=seed)}
    _, start = rfa_attention_reference(**before, **options, output_final_state=True)
    for name in ("segment_ids", "token_mask"):
        options.pop(name, None)
    options |= random_layout(random.Random(seed)) | {"initial_state": start}
    assert_equals_the_definition(inputs, 1e-10, 1e-9, **options)
    output, state = rfa_attention(**inputs, **options, output_final_state=True)
    want, want_state = rfa_attention_reference(**inputs, **options, output_final_state=True)
    assert_near(output, want, 1e-10)
    assert_equal_states(state, want_state, 1e-10)


@pytest.mark.parametrize("seed", range(20))
def test_every_mixture_may_be_split_anywhere(seed):
    inputs, options = random_call(2000 + seed, causal=True)
    leaves = {name: inputs.pop(name) for name in ("sink_logits", "gate_weight", "gate_bias") if name in inputs}
    options |= leaves
    whole, final = rfa_attention(**inputs, **options, output_final_state=True)
    assert_near(rfa_attention(**inputs, **options), whole, 1e-11)
    cut = random.Random(seed).randrange(1, N)
    segment_ids, token_mask = options.get("segment_ids"), options.get("token_mask")
    if segment_ids is not None:
        # The first document of a piece continues the state: the cut must go through one in every row, or behind none.
        present = torch.ones(ROWS, N, dtype=torch.bool) if token_mask is None else token_mask
        for row in range(ROWS):
            seen = [int(d) for d, v in zip(segment_ids[row], present[row], strict=True) if v]
            if seen and int(present[row, :cut].sum()) < len(seen):
                at = int(present[row, :cut].sum())
                segment_ids[row] = torch.where(
                    segment_ids[row] == (seen[at - 1] if at else seen[0]), seen[at], segment_ids[row]
                )
        whole, final = rfa_attention(**inputs, **options, output_final_state=True)
    output, state = run_in_pieces(inputs, [cut, N - cut], **options)
    assert_near(output, whole, 1e-10)
    assert_equal_states(state, final, 1e-10)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("seed", range(12))
def test_exact_heads_look_at_their_documents_alone_block_by_block(seed, causal, monkeypatch):
    monkeypatch.setattr(softmax, "QUERY_BLOCK", 16)
    inputs, options = random_call(3000 + seed, causal)
    options |= {name: inputs.pop(name) for name in ("gate_weight", "gate_bias") if name in inputs}
    options |= {"softmax_heads": (0, 1), "window": 8, "feature_map": "positive"}
    omega = inputs.pop("omega")  # has no gradient where all heads are exact
    attention = partial(rfa_attention, omega=omega)
    blocks = with_gradients(attention, inputs, **options)
    monkeypatch.setattr(softmax, "QUERY_BLOCK", N)
    monkeypatch.setattr(softmax, "_seen", lambda *args: None)
    whole = with_gradients(attention, inputs, **options)
    assert_near(blocks[0], whole[0], 1e-12)
    for leaf in ("query", "key", "value"):
        assert_near(blocks[1][leaf], whole[1][leaf], 1e-12, leaf)


def test_blocks_of_exact_heads_grow_with_documents_and_not_with_the_row(monkeypatch):
    widths = []
    original = softmax.F.scaled_dot_product_attention

    def attention(query, key, value, **options):
        widths.append(key.shape[2])
        return original(query, key, value, **options)

    monkeypatch.setattr(softmax.F, "scaled_dot_product_attention", attention)
    segment_ids = (torch.arange(1024) // 4)[None]
    rfa_attention(**random_inputs(1024, batch=1), segment_ids=segment_ids, softmax_heads=(0, 1), window=8)
    assert widths == [softmax.QUERY_BLOCK] * 4


# --- what it costs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 4, 16, 32, 64, 100, 128])
def test_short_documents_take_at_most_twice_their_tokens(length):
    segment_ids = (torch.arange(4096) // length)[None]
    plan = TokenLayout(None, segment_ids).short(1, 4096, ShortRule(128), CPU)
    assert plan.everything
    slots = sum(part.source.numel() for part in plan.tiles)
    assert 4096 <= slots < 2 * 4096
    assert (slots == 4096) == (length & (length - 1) == 0)


def test_a_tile_holds_whole_documents():
    draw = random.Random(0)
    for _ in range(20):
        layout = TokenLayout(**random_layout(draw))
        documents = layout.documents(ROWS, N)
        plan = short_plan(documents, ShortRule(40), CPU)
        if plan is None:
            assert layout.segment_ids is None
            continue
        placed = torch.cat([part.target[part.target < ROWS * N] for part in plan.tiles])
        short = documents.length <= 40
        assert sorted(placed.tolist()) == sorted(documents.select(short).tokens().tolist())
        for part in plan.tiles:
            for number in range(int(part.segment_ids.max()) + 1):
                in_tiles, slots = (part.segment_ids == number).nonzero(as_tuple=True)
                assert len(set(in_tiles.tolist())) == 1
                assert slots.tolist() == list(range(int(slots[0]), int(slots[-1]) + 1))


def test_only_long_documents_are_laid_out_in_chunks():
    segment_ids = torch.repeat_interleave(torch.arange(6), torch.tensor([4, 40, 4, 4, 17, 16]))[None]
    layout = TokenLayout(None, segment_ids)
    spec = PlanSpec(8, 4, history=False, final=False, short=ShortRule(16))
    plan = layout.plan(85, spec, torch.zeros(1, dtype=torch.int64), CPU)
    assert plan.token_mask.shape == (1, 5 + 3, 8)
    assert int(plan.placed.sum()) == int(plan.token_mask.sum()) == 57
    whole = layout.plan(85, PlanSpec(8, 4, history=False, final=False), torch.zeros(1, dtype=torch.int64), CPU)
    assert whole.token_mask.shape == (1, 1 + 5 + 1 + 1 + 3 + 2, 8)


@pytest.mark.parametrize("window", [0, 8])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_nothing_is_walked_through_where_all_documents_are_short(window, causal, monkeypatch):
    def walk(*args):
        raise AssertionError("walked")

    monkeypatch.setattr(linear, "_run_form", walk)
    inputs, segment_ids = random_inputs(64), (torch.arange(64) // 16).expand(2, -1)
    rfa_attention(**inputs, segment_ids=segment_ids, window=window, causal=causal)
    rfa_attention(**tokens(inputs, slice(0, 16)), window=window, causal=causal)  # a row is a document, too
    with pytest.raises(AssertionError, match="walked"):
        rfa_attention(**inputs, segment_ids=segment_ids, window=window, causal=causal, output_final_state=True)


def test_the_tables_of_documents_are_made_once_for_all_layers(monkeypatch):
    found = []
    original = Documents.find.__func__
    monkeypatch.setattr(Documents, "find", classmethod(lambda cls, *args: found.append(1) or original(cls, *args)))
    layout = TokenLayout(None, (torch.arange(60) // 20).expand(2, -1))
    for seed in range(3):
        rfa_attention(**random_inputs(60, seed=seed), window=8, layout=layout)
        rfa_attention(**random_inputs(60, seed=seed), window=16, layout=layout)
    assert len(found) == 1


# --- what else a caller sees ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [0, 64])
def test_blocks_of_tiles_are_independent_of_each_other(window, monkeypatch):
    inputs, segment_ids = random_inputs(200), (torch.arange(200) // 7).expand(2, -1)
    options = {"window": window, "segment_ids": segment_ids, "feature_map": "positive"}
    whole = with_gradients(rfa_attention, inputs, **options)
    monkeypatch.setattr(tiles, "BLOCK_SLOTS", 32)
    blocks = with_gradients(rfa_attention, inputs, **options)
    assert_near(blocks[0], whole[0], 1e-12)
    for leaf, gradient in whole[1].items():
        assert_near(blocks[1][leaf], gradient, 1e-12, leaf)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [0, 8])
def test_half_precision_inputs_are_computed_in_float32(dtype, window):
    inputs = random_inputs(64, dtype=dtype, size=0.5)
    options = {"window": window, "segment_ids": (torch.arange(64) // 5).expand(2, -1)}
    wide = {name: t.float() for name, t in inputs.items()}
    got, gradients = with_gradients(rfa_attention, inputs, **options)
    want, want_gradients = with_gradients(rfa_attention, wide, **options)
    assert got.dtype == dtype
    assert torch.equal(rfa_attention(**inputs, **options), got)
    assert torch.equal(got, want.to(dtype))
    for leaf in ("query", "key", "value"):
        assert gradients[leaf].dtype == dtype
        assert_near(gradients[leaf].float(), want_gradients[leaf], 2e-2, leaf)


def test_parameters_without_a_part_in_short_documents_get_zeros():
    # None would make DistributedDataParallel wait for a gradient that never comes.
    inputs, segment_ids = random_inputs(60), (torch.arange(60) // 4).expand(2, -1)
    omega = inputs["omega"].requires_grad_()
    alpha, gamma = (torch.ones(2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    rfa_attention(**inputs, window=8, segment_ids=segment_ids, alpha=alpha, gamma=gamma).sum().backward()
    for parameter in (omega, alpha, gamma):
        assert torch.equal(parameter.grad, torch.zeros_like(parameter))


@pytest.mark.parametrize("logits", [None, [0.5, -1.0]])
def test_second_derivatives_of_the_bidirectional_form(logits):
    inputs = random_inputs(11, batch=1, heads=2, key_heads=1, dim=3, value_dim=2, num_features=4)
    names = ["query", "key", "value"]
    if logits is not None:
        inputs["sink_logits"] = torch.tensor(logits, dtype=torch.float64)
        names.append("sink_logits")
    segment_ids = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, 2, 2, 2]])
    options = {"window": 3, "sink_tokens": 1, "causal": False, "segment_ids": segment_ids}

    def operator(*leaves):
        return rfa_attention(**{**inputs, **dict(zip(names, leaves, strict=True))}, **options)

    leaves = [inputs[name].requires_grad_() for name in names]
    assert torch.autograd.gradcheck(operator, leaves)
    assert torch.autograd.gradgradcheck(operator, leaves)

    def same(query, value, *others):  # keys that are made of the queries
        return operator(query, query[:, :1].sin(), value, *others)

    leaves.pop(1)
    assert torch.autograd.gradgradcheck(same, leaves)
    with_graph, alone = (
        torch.autograd.grad(same(*leaves).square().sum(), leaves[0], create_graph=kept)[0] for kept in (True, False)
    )
    assert_near(with_graph, alone, 1e-12)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("window", [0, 8])
def test_functional_gradients(window, causal):
    inputs, segment_ids = random_inputs(60, size=0.5), (torch.arange(60) // 6).expand(2, -1)

    def loss(query: torch.Tensor) -> torch.Tensor:
        output = rfa_attention(**{**inputs, "query": query}, window=window, segment_ids=segment_ids, causal=causal)
        return output.square().sum()

    query = inputs["query"].clone().requires_grad_()
    (want,) = torch.autograd.grad(loss(query), query)
    assert_near(torch.func.grad(loss)(inputs["query"]), want, 1e-12)


@pytest.mark.parametrize("window", [0, 8])
def test_queries_with_far_keys_are_counted_once(window):
    inputs, segment_ids = random_inputs(400, dtype=torch.float32), (torch.arange(400) // 7).expand(2, -1)
    token_mask = torch.arange(400).expand(2, -1) >= 13
    inputs["query"].requires_grad_()
    statistics = FarStatistics()
    output = rfa_attention(
        **inputs,
        window=window,
        segment_ids=segment_ids,
        token_mask=token_mask,
        feature_map="trigonometric",
        statistics=statistics,
    )
    output.sum().backward()
    seen, zero = int(statistics.queries), int((output == 0).all(-1)[:, :, 13:].sum())
    assert seen == (0 if window else 2 * 4 * 387)
    assert int(statistics.dropped) == zero
    assert (zero > 0) == (window == 0)
