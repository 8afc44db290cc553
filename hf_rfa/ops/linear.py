"""The linear heads of a call, by the form that `dispatch` picks."""

import torch

from hf_rfa.ops.bidirectional import chunked_bidirectional
from hf_rfa.ops.call import OperatorCall
from hf_rfa.ops.chunked import chunked_causal
from hf_rfa.ops.combine import FarStatistics
from hf_rfa.ops.dispatch import form_of_call
from hf_rfa.ops.recurrent import RecurrentHeads
from hf_rfa.ops.state import RFAState, accumulation_dtype


def linear_heads(
    call: OperatorCall, output_final_state: bool, statistics: FarStatistics | None
) -> tuple[torch.Tensor, RFAState | None]:
    """Output (B, Hk, G, N, M), and the state after the last token, if wanted.

    The output is float32 at least, or of value's type where it was written block by block.
    """
    form = form_of_call(call)
    if form == "triton":
        # Not every machine has triton, and importing it takes a second.
        from hf_rfa.ops.triton.causal import triton_causal

        return triton_causal(call.replace(far=call.far.to(torch.float32)), output_final_state, statistics)
    wide = accumulation_dtype(call.query.dtype)
    if form == "chunked":
        return chunked_causal(call.replace(far=call.far.to(wide)), output_final_state, statistics)
    call = call.to(wide).replace(state=call.state or call.empty_state())  # whose near keys stay in their own type
    assert call.state is not None
    if form == "recurrent":
        heads = RecurrentHeads(call, call.state)
        output = heads.step(call.query, call.key, call.value, call.layout.valid, statistics)
        return output, heads.state() if output_final_state else None
    return chunked_bidirectional(call, output_final_state, statistics)
