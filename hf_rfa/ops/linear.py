"""The linear heads of a call: one token by the recurrent step, more by the chunked forms."""

import dataclasses

import torch

from hf_rfa.ops.bidirectional import chunked_bidirectional
from hf_rfa.ops.call import OperatorCall
from hf_rfa.ops.chunked import chunked_causal
from hf_rfa.ops.combine import FarStatistics
from hf_rfa.ops.recurrent import recurrent_step
from hf_rfa.ops.state import RFAState, accumulation_dtype


def linear_heads(
    call: OperatorCall, output_final_state: bool, statistics: FarStatistics | None
) -> tuple[torch.Tensor, RFAState | None]:
    """Output (B, Hk, G, N, M), in float32 at least, and the state after the last token, if wanted."""
    wide = call.to(accumulation_dtype(call.query.dtype))
    if call.causal and call.query.shape[3] == 1 and call.layout.document is None:
        state = call.state or call.empty_state()
        output, state = recurrent_step(wide.replace(state=state), statistics)
        return output, state if output_final_state else None
    run = chunked_causal if call.causal else chunked_bidirectional
    output, final = run(wide, output_final_state, statistics)
    if final is not None:  # the near keys are kept as they came: half the bytes for bfloat16
        like = {"near_key": call.key, "sink_key": call.key, "near_value": call.value, "sink_value": call.value}
        final = dataclasses.replace(final, **{name: getattr(final, name).to(t.dtype) for name, t in like.items()})
    return output, final
