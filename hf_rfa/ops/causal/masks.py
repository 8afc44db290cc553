"""Additive masks (0 or -inf) of the keys that a chunk sees exactly; all regular chunks share one."""

import math

import torch
import torch.nn.functional as F

from hf_rfa.ops.layout import Plan


class ExactMasks:
    """Masks of each chunk's queries over their near keys `[sinks, chunk before, (sinks,) own chunk]`."""

    def __init__(self, plan: Plan, sinks: int, heads: int, groups: int, dtype: torch.dtype) -> None:
        self._plan, self._sinks, self._heads, self._groups, self._dtype = plan, sinks, heads, groups, dtype
        same = plan.segment_ids[:, 1:] == plan.segment_ids[:, :-1]
        #: (R, n) whether the previous chunk belongs to the same document.
        self.follows = F.pad(same, (1, 0))
        self._ordinary: dict[int, torch.Tensor] = {}

    def near(self, span: slice) -> torch.Tensor:
        """Masks (1 or A, 1 or n, R, W) of the chunks in a span; the second group of sinks is hidden."""
        if not all(self._plan.regular[span]):
            return self._make(span)
        if 0 not in self._ordinary:
            self._ordinary[0] = self._make(span)[:1, :1]
        return self._ordinary[0]

    def exact(self, span: slice, kept: torch.Tensor) -> torch.Tensor:
        """The same with the kept keys in front; `kept` (A, n, K) bool says which places hold one."""
        near, count = self.near(span), kept.shape[2]
        if bool(kept.all()):
            if not all(self._plan.regular[span]):
                return F.pad(near, (count, 0))
            if count not in self._ordinary:
                self._ordinary[count] = F.pad(near, (count, 0))
            return self._ordinary[count]
        hidden = torch.zeros_like(kept, dtype=self._dtype).masked_fill_(~kept, -math.inf)
        hidden = hidden.unsqueeze(2).expand(-1, -1, near.shape[2], -1)
        return torch.cat([hidden, near.expand(*hidden.shape[:3], -1)], dim=-1)

    def _make(self, span: slice) -> torch.Tensor:
        plan, (size, sinks) = self._plan, (self._plan.token_mask.shape[-1], self._sinks)
        token_mask, device = plan.token_mask[:, span], plan.token_mask.device
        causal = torch.ones(size, size, dtype=torch.bool, device=device).tril()
        # Padding sees itself, so that no row is empty; no other token sees padding.
        own = causal & (token_mask.unsqueeze(2) | torch.eye(size, dtype=torch.bool, device=device))
        before = F.pad(plan.token_mask, (0, 0, 1, 0))[:, span] & self.follows[:, span].unsqueeze(-1)
        sink = (plan.rank[:, span] > 1)[..., None, None].expand(-1, -1, size, sinks)
        visible = torch.cat(
            [sink, before.unsqueeze(2).expand(-1, -1, size, -1), torch.zeros_like(sink), own], dim=-1
        )  # fmt: skip
        mask = torch.where(visible, 0.0, -math.inf).to(self._dtype).repeat(1, 1, self._groups, 1)
        return mask.repeat_interleave(self._heads, 0) if len(mask) > 1 else mask
