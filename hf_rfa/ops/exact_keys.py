"""Which keys each query of a call sees exactly: those near to it, the sinks, and those that are kept for it.

The kept keys are those that the operator chooses, taken from its own choice. Every other key that a query sees is far.
"""

import dataclasses

import torch

from hf_rfa.ops.call import OperatorCall
from hf_rfa.ops.causal.chunked import align
from hf_rfa.ops.encoder_selection import choose_encoder_keys
from hf_rfa.ops.layout import TokenLayout
from hf_rfa.ops.state import accumulation_dtype


@dataclasses.dataclass(frozen=True)
class ExactKeys:
    """The keys of a call without an earlier state and without exact heads, for B rows of N slots and Hk key heads.

    Attributes:
        causal, window, sink_tokens: Those of the call.
        token_mask: (B, N) bool: whether a slot holds a token.
        segment_ids: (B, N) its document.
        rank: (B, N) its number in the document.
        kept: (B, Hk, n, K) int64: slots of the keys that are kept for the queries of each of n chunks; N in empty
            places. None if no head keeps any.
        chunk: (B, N) int64: the chunk of each query in `kept`.
        kept_once: (B, Hk, N) bool, without causality: the keys that are kept for all queries of their document. None
            if no head keeps any.
    """

    causal: bool
    window: int
    sink_tokens: int
    token_mask: torch.Tensor
    segment_ids: torch.Tensor
    rank: torch.Tensor
    kept: torch.Tensor | None = None
    chunk: torch.Tensor | None = None
    kept_once: torch.Tensor | None = None

    @classmethod
    @torch.no_grad()
    def of(cls, call: OperatorCall) -> "ExactKeys":
        """The exact keys of a call; the choice of kept keys costs as much as the exact part of the operator."""
        assert call.state is None
        assert not call.softmax_heads
        batch, length = len(call.query), call.query.shape[3]
        own = cls(call.causal, call.window, call.sink_tokens, *_places(call.layout, batch, length, call.query.device))
        if not any(call.kept_of_heads):
            return own
        return own._with_causal_choice(call) if call.causal else own._with_encoder_choice(call)

    def pairs(self, queries: torch.Tensor, rows: slice = slice(None)) -> tuple[torch.Tensor, torch.Tensor]:
        """For the queries in the slots (S,) of some rows: which keys they see, and which of those they see exactly.

        Returns (B, 1, S, N) and (B, 1 or Hk, S, N), bool. Queries that are padding may see keys here.
        """
        token_mask, segment_ids, rank = self.token_mask[rows], self.segment_ids[rows], self.rank[rows]
        visible = token_mask[:, None] & (segment_ids[:, None] == segment_ids[:, queries, None])
        if self.causal:
            visible = visible & (torch.arange(visible.shape[2], device=queries.device) <= queries[:, None])
        visible = visible.unsqueeze(1)
        if not self.window:
            return visible, torch.zeros_like(visible)
        chunk = rank // self.window
        near = (chunk[:, None] - chunk[:, queries, None]).abs() <= 1
        exact = (near | (rank[:, None] < self.sink_tokens)).unsqueeze(1)
        if self.kept_once is not None:
            exact = exact | self.kept_once[rows].unsqueeze(2)
        if self.kept is not None and self.chunk is not None:
            slots, chunk = self.kept[rows], self.chunk[rows][:, queries]
            slots = slots.gather(2, chunk[:, None, :, None].expand(-1, slots.shape[1], -1, slots.shape[3]))
            kept = visible.new_zeros(*slots.shape[:3], visible.shape[3] + 1)
            exact = exact | kept.scatter_(3, slots, True)[..., :-1]
        return visible, visible & exact

    def _with_causal_choice(self, call: OperatorCall) -> "ExactKeys":
        (batch, length), heads = self.rank.shape, call.key.shape[1]
        kept, chunk = None, None
        for own, group in call.groups():
            if not group.kept_keys:
                continue
            aligned = align(group)
            plan, choice = aligned.plan, aligned.choice
            assert choice is not None
            # A choice points into a pool: the kept keys of a state, all of them empty here, and the aligned tokens.
            index = (choice.kept - group.kept_keys).clamp_min(0).unflatten(0, (batch, -1))
            source = plan.source.expand(batch, -1).unsqueeze(1).expand(-1, len(own), -1)
            slots = source.gather(2, index.flatten(2)).view_as(index)
            slots = slots.masked_fill(~choice.kept_mask.unflatten(0, (batch, -1)), length)
            if kept is None:
                most = max(call.kept_of_heads)
                kept = slots.new_full((batch, heads, slots.shape[2], most), length)
                chunk = (plan.place // plan.token_mask.shape[2]).expand(batch, -1)
            kept[:, own, :, : group.kept_keys] = slots
        return dataclasses.replace(self, kept=kept, chunk=chunk)

    def _with_encoder_choice(self, call: OperatorCall) -> "ExactKeys":
        kept = self.token_mask.new_zeros(*call.key.shape[:3])
        for own, group in call.groups():
            choice = choose_encoder_keys(group.to(accumulation_dtype(group.query.dtype)))
            if choice is not None:
                kept[:, own] = choice.kept
        return dataclasses.replace(self, kept_once=kept)


def _places(
    layout: TokenLayout, batch: int, length: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Per slot: whether it holds a token, its document, and its number in the document; (B, N) each."""
    ones = torch.ones(batch, length, dtype=torch.bool, device=device)
    token_mask = ones if layout.token_mask is None else layout.token_mask.to(device)
    ordinal = layout.ordinal
    segment_ids = (
        torch.zeros(batch, length, dtype=torch.int64, device=device) if ordinal is None else ordinal.to(device)
    )
    before = token_mask.long().cumsum(1) - token_mask.long()
    starts = torch.cat([ones[:, :1], segment_ids[:, 1:] != segment_ids[:, :-1]], dim=1)
    return token_mask, segment_ids, before - torch.where(starts, before, 0).cummax(1).values
