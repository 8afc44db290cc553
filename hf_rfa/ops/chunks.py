"""Steps that the chunked operators share: tokens to chunks and back, and the end of a block."""

import torch
import torch.nn.functional as F

from hf_rfa.ops.call import OperatorCall
from hf_rfa.ops.combine import Part, combine
from hf_rfa.ops.layout import Plan

#: Chunk size without a window. It balances the two costs of a token, C (D + M) and F (D + M).
PURE_CHUNK = 64
#: Chunks per block. More give larger products, but the features and scores of a block must fit into the cache.
BLOCK_CHUNKS = 8


def to_chunks(x: torch.Tensor, plan: Plan) -> torch.Tensor:
    """(B, H, tokens, D) -> (B, H, n, C, D), aligned."""
    missing = plan.token_mask.shape[1] * plan.token_mask.shape[2] - x.shape[2]
    aligned = F.pad(x, (0, 0, 0, missing)) if plan.identity else take(x, plan.source)
    return aligned.unflatten(2, plan.token_mask.shape[1:])


def queries_to_chunks(query: torch.Tensor, plan: Plan) -> torch.Tensor:
    """(B, H, G, tokens, D) -> (B, H, n, G * C, D): the queries of a key head's group are concatenated."""
    chunks = to_chunks(query.flatten(1, 2), plan).unflatten(1, query.shape[1:3])
    return chunks.transpose(2, 3).flatten(3, 4)


def from_chunks(output: torch.Tensor, plan: Plan, groups: int, length: int) -> torch.Tensor:
    """(B, H, n, G * C, M) -> (B, H, G, N, M), padding set to zero."""
    return tokens_of(output.unflatten(3, (groups, -1)).transpose(2, 3).flatten(3, 4), plan, length)


def tokens_of(output: torch.Tensor, plan: Plan, length: int) -> torch.Tensor:
    """(B, H, G, aligned tokens, M) -> (B, H, G, N, M), padding set to zero."""
    if plan.identity:
        return output[:, :, :, :length]
    tokens = take(output.flatten(1, 2), plan.place).unflatten(1, output.shape[1:3])
    return tokens * plan.placed[:, None, None, :, None]


def sink_table(chunks: torch.Tensor, sinks_of_state: torch.Tensor, sinks: int) -> torch.Tensor:
    """(B, H, n + 1, s, D): the first s slots of every chunk, after the sinks of the state."""
    return torch.cat([sinks_of_state.to(chunks.dtype).unsqueeze(2), chunks[:, :, :, :sinks]], dim=2)


def take(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Gather the entries `index` (R, n) along dimension 2 of x (B, H, tokens or chunks, ...)."""
    if index.shape[0] == 1:
        return x.index_select(2, index[0])
    index = index.view(index.shape[0], 1, index.shape[1], *(1,) * (x.dim() - 3))
    return x.gather(2, index.expand(-1, x.shape[1], -1, *x.shape[3:]))


def finish(near: Part | None, far_part: Part, call: OperatorCall, plan: Plan, block: slice) -> torch.Tensor:
    """Both parts of a block under one normaliser, (B, Hk, n, G * C, M); the far part comes without gamma."""
    far, groups, chunk = call.far, call.query.shape[2], plan.token_mask.shape[-1]
    log_scale = far_part.log_scale + far.log_gamma().view(-1, 1, 1)
    far_part = Part(far_part.numerator, far_part.denominator, log_scale)
    sink_logits = call.sink_logits
    if sink_logits is not None:
        sink_logits = sink_logits.repeat_interleave(chunk, dim=-1)[:, None, :].to(log_scale.dtype)
    counted = plan.asked[:, None, block].repeat(1, 1, 1, groups)
    limit = far.log_limit()
    limit = None if limit is None else limit.view(-1, 1, 1)
    return combine(near, far_part, sink_logits, call.statistics, counted, limit)
