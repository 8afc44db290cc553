"""The linear heads of a call, by the form that `dispatch` picks."""

import dataclasses

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

    The output is float32 at least, or of value's type where the Triton kernels wrote it.
    """
    form = form_of_call(call)
    if form == "triton":
        # Not every machine has triton, and importing it takes a second.
        from hf_rfa.ops.triton.causal import triton_causal

        return triton_causal(call.replace(far=call.far.to(torch.float32)), output_final_state, statistics)
    wide = call.to(accumulation_dtype(call.query.dtype))
    if form == "recurrent":
        heads = RecurrentHeads(wide, call.state or call.empty_state())
        output = heads.step(wide.query, wide.key, wide.value, call.layout.valid, statistics)
        return output, heads.state() if output_final_state else None
    run = chunked_causal if form == "chunked" else chunked_bidirectional
    output, final = run(wide, output_final_state, statistics)
    if final is not None:  # the near keys are kept as they came: half the bytes for bfloat16
        like = {"near_key": call.key, "sink_key": call.key, "near_value": call.value, "sink_value": call.value}
        final = dataclasses.replace(final, **{name: getattr(final, name).to(t.dtype) for name, t in like.items()})
    return output, final
