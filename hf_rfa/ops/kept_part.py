"""Adds the kept keys of a bidirectional call to its near part, block by block."""

import torch

from hf_rfa.ops.call import OperatorCall
from hf_rfa.ops.chunks import BLOCK_CHUNKS, to_chunks
from hf_rfa.ops.combine import Part
from hf_rfa.ops.encoder_selection import EncoderChoice
from hf_rfa.ops.layout import Plan


class KeptPart:
    """Keys and values (B, Hk, t, K, D or M) of the documents, t = 1 if no row has two, else t = n (per chunk).

    One table per document would be smaller, but the gradient of a block's part of it would be as large as all tables.
    """

    def __init__(self, call: OperatorCall, plan: Plan, choice: EncoderChoice) -> None:
        slots = choice.of_chunks(plan.segment_ids)
        filled, index = slots >= 0, slots.clamp_min(0).flatten(2)
        self._scaling = call.scaling
        # Split, not sliced, as in `BidirectionalPass.blocks`.
        self._keys, self._values = (
            x.gather(2, index.unsqueeze(-1).expand(-1, -1, -1, x.shape[-1]))
            .unflatten(2, slots.shape[2:])
            .split(BLOCK_CHUNKS, dim=2)
            for x in (call.key, call.value)
        )
        place = plan.place.expand(len(index), -1).unsqueeze(1).expand(-1, index.shape[1], -1)
        chunk = (place.gather(2, index) // plan.token_mask.shape[2]).view_as(slots)
        center = torch.arange(plan.token_mask.shape[1], device=slots.device).unsqueeze(1)
        self._seen = filled & ((chunk - center).abs() > 1)  # (B, Hk, n, K): those near to a chunk are already seen
        self._kept = to_chunks(choice.kept.unsqueeze(-1), plan).squeeze(-1)  # (B, Hk, n, C)

    def without(self, log_scale: torch.Tensor) -> torch.Tensor:
        """The features' log-scales (B, Hk, n, C), with -inf for kept keys."""
        return log_scale.masked_fill(self._kept, -torch.inf)

    def joined(self, near: Part, queries: torch.Tensor, span: slice) -> Part:
        """The near part (B, Hk, n, R [, M]) of a block with queries (B, Hk, n, R, D), extended by the kept keys."""
        table = span.start // BLOCK_CHUNKS if len(self._keys) > 1 else 0
        scores = _product(queries * self._scaling, self._keys[table].mT)
        scores = scores.masked_fill(~self._seen[:, :, span].unsqueeze(3), -torch.inf)
        highest = torch.maximum(near.log_scale, scores.detach().amax(-1))
        weights, factor = (scores - highest.unsqueeze(-1)).exp(), (near.log_scale - highest).exp()
        numerator = _product(weights, self._values[table]) + factor.unsqueeze(-1) * near.numerator
        return Part(numerator, weights.sum(-1) + factor * near.denominator, highest)


def _product(rows: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """rows (B, Hk, n, R, D) @ table (B, Hk, n or 1, D, K); a table shared by all chunks is not repeated."""
    if table.shape[2] > 1:
        return rows @ table
    return (rows.flatten(2, 3) @ table.squeeze(2)).unflatten(2, rows.shape[2:4])
