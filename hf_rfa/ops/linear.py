"""Runs the linear heads of a call in the form that `dispatch` picks."""

import torch

from hf_rfa.ops.bidirectional import chunked_bidirectional
from hf_rfa.ops.call import OperatorCall
from hf_rfa.ops.causal.chunked import chunked_causal
from hf_rfa.ops.chunks import PURE_CHUNK
from hf_rfa.ops.dispatch import causal_form, form_of_call
from hf_rfa.ops.recurrent import RecurrentHeads
from hf_rfa.ops.short_documents import short_documents
from hf_rfa.ops.short_estimates import short_estimates
from hf_rfa.ops.state import RFAState, accumulation_dtype
from hf_rfa.ops.tiles import ShortRule


def linear_heads(call: OperatorCall) -> tuple[torch.Tensor, RFAState | None]:
    """Output (B, Hk, G, N, M), and the state after the last token, or None if it is not wanted.

    The output is in float32 or wider, or in value's dtype if it was written block by block.
    """
    form = form_of_call(call)
    wide = accumulation_dtype(call.query.dtype)
    if form == "recurrent":
        call = call.to(wide).replace(state=call.state or call.empty_state())  # the state's near keys keep their dtype
        assert call.state is not None
        heads = RecurrentHeads(call, call.state)
        output = heads.step(call.query, call.key, call.value, call.layout.token_mask, call.statistics)
        return output, heads.state() if call.output_final_state else None
    # Documents without far keys; without a window, when all keys are far, those that fit into a chunk.
    longest = 2 * call.window or PURE_CHUNK
    rule = ShortRule(longest, first=call.state is None, last=not call.output_final_state)
    short = call.layout.short(len(call.query), call.query.shape[3], rule, call.query.device)
    if short is None:
        return _run_form(form, call, None)
    if call.window:
        output = short_documents(call, short)
    else:
        output = short_estimates(call.replace(far=call.far.to(wide)), short)
    if short.everything and not call.output_final_state:
        return output, None
    others, state = _run_form(form, call, rule)
    return output + others, state


def _run_form(form: str, call: OperatorCall, short: ShortRule | None) -> tuple[torch.Tensor, RFAState | None]:
    """`linear_heads` for all documents except the short ones, whose output is zero."""
    wide = accumulation_dtype(call.query.dtype)
    if form == "bidirectional":
        call = call.to(wide).replace(state=call.state or call.empty_state())
        return chunked_bidirectional(call, short)
    if causal_form(call) == "triton":
        # Imported here: not every machine has Triton, and the import takes a second.
        from hf_rfa.ops.triton.causal import triton_causal

        return triton_causal(call.replace(far=call.far.to(torch.float32)), short)
    return chunked_causal(call.replace(far=call.far.to(wide)), short)
