"""The operator in pieces that hand on a state, and what makes two states equal."""

import dataclasses

import torch
from operator_inputs import Tensors, assert_near, tokens

from hf_rfa import rfa_attention
from hf_rfa.ops.state import RFAState, accumulation_dtype


def run_in_pieces(inputs: Tensors, lengths: list[int], function=rfa_attention, state=None, **options):
    """The output of all pieces, each continued from the state of the one before, and the last state."""
    outputs, start = [], 0
    per_token = {name: options.pop(name) for name in ("token_mask", "segment_ids") if name in options}
    for length in lengths:
        part = slice(start, start + length)
        laid_out = {name: table[:, part] for name, table in per_token.items()}
        output, state = function(
            **tokens(inputs, part), **laid_out, **options, initial_state=state, output_final_state=True
        )
        outputs.append(output)
        start += length
    return torch.cat(outputs, dim=2), state


def true_sums(state: RFAState) -> torch.Tensor:
    return state.kv_state * state.log_max.exp()[..., None, None]


def assert_equal_states(got: RFAState, want: RFAState, tolerance: float = 1e-11) -> None:
    """Field by field; the far sums as numbers, whatever they were divided by."""
    assert torch.equal(got.count, want.count)
    assert_near(true_sums(got), true_sums(want), tolerance, "kv_state")
    assert len(got.beside) == len(want.beside)
    for one, two in zip(got.beside, want.beside, strict=True):
        assert_equal_states(one, two, tolerance)
    for field in dataclasses.fields(RFAState):
        if field.name in ("kv_state", "log_max", "beside"):
            continue
        one, two = getattr(got, field.name), getattr(want, field.name)
        assert (one is None) == (two is None), field.name
        if one is not None:
            assert one.shape == two.shape, field.name
            assert one.dtype == two.dtype, field.name
            assert_near(
                one.to(accumulation_dtype(one.dtype)), two.to(accumulation_dtype(two.dtype)), tolerance, field.name
            )
