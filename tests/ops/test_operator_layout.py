"""Padding and packing: a padded or packed row gives what the bare sequences give, and padding gives zeros."""

import pytest
import torch
from operator_inputs import (
    FEATURE_MAPS,
    Tensors,
    assert_equals_the_definition,
    assert_near,
    random_inputs,
    tokens,
)

from hf_rfa import rfa_attention
from hf_rfa.ops.layout import TokenLayout

N = 60
CAUSAL = pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
WINDOW = pytest.mark.parametrize("window", [0, 8])
EXTRAS = pytest.mark.parametrize(
    "extras", [{}, {"softmax_heads": [1]}, {"sink_logits": torch.tensor([0.5, -1.0, 2.0, 0.0])}],
    ids=["plain", "softmax_heads", "sink_logits"],
)  # fmt: skip


def left(count: int) -> torch.Tensor:
    return torch.arange(N) >= count


def right(count: int) -> torch.Tensor:
    return torch.arange(N) < N - count


def holes() -> torch.Tensor:
    mask = torch.ones(N, dtype=torch.bool)
    mask[[0, 1, 5, 6, 7, 8, 9, 20, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42, 43, 50, 59]] = False
    return mask


def only(*positions: int) -> torch.Tensor:
    mask = torch.zeros(N, dtype=torch.bool)
    mask[list(positions)] = True
    return mask


PADDINGS = {
    "left": [left(0), left(1), left(8), left(13), left(59)],
    "right": [right(0), right(1), right(8), right(13), right(59)],
    "holes": [holes(), holes().flip(0), left(3) & right(5), only(30), only(0, 59)],
    "all": [left(0), left(60), holes()],  # a row without any token
}
PADDING = pytest.mark.parametrize("name", PADDINGS)


def assert_rows_equal_bare_sequences(inputs: Tensors, pieces: list[list[torch.Tensor]], output, **options) -> None:
    """`pieces[row]` holds the slots of each document of the row; all other outputs must be zero."""
    for row, documents in enumerate(pieces):
        covered = torch.zeros(N, dtype=torch.bool)
        for slots in documents:
            covered[slots] = True
            if len(slots):
                alone = rfa_attention(**tokens(inputs, slots, slice(row, row + 1)), **options)
                assert_near(output[row : row + 1, :, slots], alone, 1e-11, f"row {row}")
        assert bool((output[row][:, ~covered] == 0).all()), f"padding of row {row}"


@CAUSAL
@WINDOW
@EXTRAS
@PADDING
def test_padding(name, extras, window, causal):
    token_mask = torch.stack(PADDINGS[name])
    inputs = random_inputs(N, batch=len(token_mask))
    options = {"window": window, "alpha": 0.6, "causal": causal, **extras}
    output = rfa_attention(**inputs, **options, token_mask=token_mask)
    assert_rows_equal_bare_sequences(inputs, [[mask.nonzero()[:, 0]] for mask in token_mask], output, **options)


@CAUSAL
@WINDOW
@PADDING
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_padding_equals_the_definition_in_gradients(feature_map, name, window, causal):
    token_mask = torch.stack(PADDINGS[name])
    inputs = random_inputs(N, batch=len(token_mask), size=1.0 if window else 0.5)
    options = {"feature_map": feature_map, "window": window, "alpha": 0.6, "causal": causal, "token_mask": token_mask}
    gradients = assert_equals_the_definition(inputs, **options)
    for leaf in ("query", "key", "value"):
        assert bool((gradients[leaf].transpose(1, 2)[~token_mask] == 0).all()), f"padding's gradient of {leaf}"


@CAUSAL
@WINDOW
@EXTRAS
@PADDING
def test_what_padding_holds_does_not_matter(name, extras, window, causal):
    token_mask = torch.stack(PADDINGS[name])
    inputs = random_inputs(N, batch=len(token_mask), dtype=torch.float32)
    garbage = {n: t.clone() for n, t in inputs.items()}
    for leaf in ("query", "key", "value"):
        garbage[leaf].transpose(1, 2)[~token_mask] = 1000.0
    options = {"window": window, "alpha": 0.6, "causal": causal, "token_mask": token_mask, **extras}
    assert torch.equal(rfa_attention(**garbage, **options), rfa_attention(**inputs, **options))


@CAUSAL
@EXTRAS
def test_valid_may_be_a_mask_of_numbers(extras, causal):
    # A tokenizer's `attention_mask` is int64.
    token_mask = torch.stack(PADDINGS["left"])
    inputs = random_inputs(N, batch=len(token_mask))
    options = {"window": 8, "causal": causal, **extras}
    number = rfa_attention(**inputs, **options, token_mask=token_mask.long())
    assert torch.equal(number, rfa_attention(**inputs, **options, token_mask=token_mask))


@CAUSAL
@WINDOW
@EXTRAS
def test_a_mask_without_padding_changes_nothing(extras, window, causal):
    inputs = random_inputs(N)
    options = {"window": window, "alpha": 0.6, "causal": causal, **extras}
    everything = torch.ones(2, N, dtype=torch.bool)
    plain = rfa_attention(**inputs, **options)
    assert_near(rfa_attention(**inputs, **options, token_mask=everything), plain, 1e-12)
    assert_near(rfa_attention(**inputs, **options, segment_ids=torch.full((2, N), 3)), plain, 1e-12)


# --- packed documents -----------------------------------------------------------------------------------------------


def packed(*lengths: int, numbers: list[int] | None = None) -> torch.Tensor:
    assert sum(lengths) == N
    numbers = list(range(len(lengths))) if numbers is None else numbers
    return torch.repeat_interleave(torch.tensor(numbers), torch.tensor(lengths))


PACKINGS = {
    "short": [packed(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 5), packed(60)],
    "long": [packed(29, 31), packed(40, 20)],
    "aligned": [packed(8, 16, 24, 12), packed(16, 8, 8, 28)],
    "numbers": [packed(20, 10, 30, numbers=[7, -2, 100]), packed(20, 40, numbers=[5, 4])],
    # Only neighbours must differ.
    "repeated": [packed(20, 20, 20, numbers=[0, 1, 0]), packed(10, 10, 10, 10, 20, numbers=[1, 0, 1, 0, 1])],
}


def slots_of_documents(segment_ids: torch.Tensor, token_mask: torch.Tensor) -> list[torch.Tensor]:
    """Runs of equal numbers among the tokens that are no padding."""
    runs: list[list[int]] = []
    before = None
    for slot in token_mask.nonzero()[:, 0].tolist():
        if before is None or int(segment_ids[slot]) != before:
            runs.append([])
        runs[-1].append(slot)
        before = int(segment_ids[slot])
    return [torch.tensor(run) for run in runs]


@CAUSAL
@WINDOW
@EXTRAS
@pytest.mark.parametrize("name", PACKINGS)
def test_packing(name, extras, window, causal):
    segment_ids = torch.stack(PACKINGS[name])
    inputs = random_inputs(N)
    options = {"window": window, "alpha": 0.6, "causal": causal, **extras}
    output = rfa_attention(**inputs, **options, segment_ids=segment_ids)
    everything = torch.ones(N, dtype=torch.bool)
    pieces = [slots_of_documents(row, everything) for row in segment_ids]
    assert_rows_equal_bare_sequences(inputs, pieces, output, **options)


@CAUSAL
@WINDOW
@EXTRAS
@pytest.mark.parametrize("padding", ["left", "right", "holes"])
@pytest.mark.parametrize("name", PACKINGS)
def test_packing_and_padding(name, padding, extras, window, causal):
    segment_ids = torch.stack(PACKINGS[name])
    token_mask = torch.stack([PADDINGS[padding][3], PADDINGS[padding][0]])
    inputs = random_inputs(N)
    options = {"window": window, "alpha": 0.6, "causal": causal, **extras}
    output = rfa_attention(**inputs, **options, segment_ids=segment_ids, token_mask=token_mask)
    pieces = [slots_of_documents(*row) for row in zip(segment_ids, token_mask, strict=True)]
    assert_rows_equal_bare_sequences(inputs, pieces, output, **options)


@CAUSAL
@WINDOW
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize("name", PACKINGS)
def test_packing_equals_the_definition_in_gradients(name, feature_map, window, causal):
    segment_ids = torch.stack(PACKINGS[name])
    inputs = random_inputs(N, size=1.0 if window else 0.5)
    token_mask = torch.stack([left(5), holes()])
    options = {"feature_map": feature_map, "window": window, "alpha": 0.6, "causal": causal}
    options |= {"segment_ids": segment_ids, "token_mask": token_mask}
    assert_equals_the_definition(inputs, **options)


@CAUSAL
@WINDOW
@pytest.mark.parametrize("softmax_heads", [(), (1,), (0, 1)])
def test_documents_do_not_see_each_other(softmax_heads, window, causal):
    segment_ids = torch.stack([packed(20, 17, 23), packed(30, 20, 10)])
    inputs = random_inputs(N)
    options = {"window": window, "causal": causal, "segment_ids": segment_ids, "softmax_heads": softmax_heads}
    before = rfa_attention(**inputs, **options)
    changed = {name: tensor.clone() for name, tensor in inputs.items()}
    inside = (segment_ids == 1)[:, None, :, None]
    for name in ("query", "key", "value"):
        changed[name] = torch.where(inside, 5.0, changed[name])
    after = rfa_attention(**changed, **options)
    # Not bit for bit: the sums are scaled by maxima of whole blocks of chunks.
    same = ((after - before).abs() < 1e-12).all(-1).all(1)
    assert torch.equal(same, segment_ids != 1)


@CAUSAL
@WINDOW
@EXTRAS
@pytest.mark.parametrize("number", [-1, 0, 1, 9])
def test_the_document_number_of_padding_does_not_matter(number, extras, window, causal):
    segment_ids, token_mask = torch.stack([packed(20, 40), packed(31, 29)]), torch.stack([left(5) & right(6), holes()])
    inputs = random_inputs(N)
    options = {"window": window, "alpha": 0.6, "causal": causal, "token_mask": token_mask, **extras}
    other = torch.where(token_mask, segment_ids, number)
    got = rfa_attention(**inputs, **options, segment_ids=other)
    assert_near(got, rfa_attention(**inputs, **options, segment_ids=segment_ids), 1e-12)


@pytest.mark.parametrize("width", [1, 5, 16])
@pytest.mark.parametrize("name", ["short", "long", "aligned", "numbers"])
def test_sliding_windows_in_packed_documents(name, width):
    segment_ids = torch.stack(PACKINGS[name])
    inputs = random_inputs(N)
    options = {"softmax_heads": [0, 1], "sliding_window": width}
    token_mask = torch.stack([left(13), right(8)])
    output = rfa_attention(**inputs, **options, segment_ids=segment_ids, token_mask=token_mask)
    pieces = [slots_of_documents(*row) for row in zip(segment_ids, token_mask, strict=True)]
    assert_rows_equal_bare_sequences(inputs, pieces, output, **options)


# --- the layout object ----------------------------------------------------------------------------------------------


@CAUSAL
@WINDOW
def test_a_shared_layout_gives_what_its_parts_give(window, causal):
    token_mask, segment_ids = torch.stack([left(5), holes()]), torch.stack([packed(20, 40), packed(31, 29)])
    layout = TokenLayout(token_mask, segment_ids)
    for seed in range(3):  # as the layers of one forward do
        inputs = random_inputs(N, seed=seed)
        shared = rfa_attention(**inputs, window=window, causal=causal, layout=layout)
        parts = rfa_attention(**inputs, window=window, causal=causal, token_mask=token_mask, segment_ids=segment_ids)
        assert torch.equal(shared, parts)


def test_a_layout_serves_calls_with_other_windows_and_directions():
    # Plans are kept, so that what one call needs must not be handed to another.
    layout = TokenLayout(torch.stack([left(5), holes()]), torch.stack([packed(20, 40), packed(31, 29)]))
    inputs = random_inputs(N)
    for window, sinks, causal, final in [
        (8, 4, True, False), (8, 4, False, False), (8, 0, True, False), (0, 0, True, False), (16, 4, True, True),
        (8, 4, True, True), (0, 0, True, True), (0, 0, False, True), (8, 4, False, True), (8, 4, True, False),
    ]:  # fmt: skip
        options = {"window": window, "sink_tokens": sinks, "causal": causal, "output_final_state": final}
        shared = rfa_attention(**inputs, **options, layout=layout)
        fresh = rfa_attention(**inputs, **options, layout=TokenLayout(layout.token_mask, layout.segment_ids))
        assert torch.equal(shared[0] if final else shared, fresh[0] if final else fresh)


def test_is_plain():
    assert TokenLayout().is_plain
    assert not TokenLayout(token_mask=torch.ones(1, 2, dtype=torch.bool)).is_plain
    assert not TokenLayout(segment_ids=torch.zeros(1, 2)).is_plain
