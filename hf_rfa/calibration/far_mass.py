"""How much exact softmax attends to far keys, token by token: the mass that the far part has to estimate."""

import torch

from hf_rfa.ops.layout import TokenLayout

#: Query rows that are scored at once, so that memory stays linear in the number of tokens.
ROWS = 256


def far_masses(
    query: torch.Tensor, key: torch.Tensor, *, layout: TokenLayout, window: int, sink_tokens: int, scaling: float,
    causal: bool, sink_logits: torch.Tensor | None, every: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Softmax weight of all far keys per query, and of each key as a far key over all queries.

        given_i = sum_{j in far(i)} p_ij,        taken_j = sum_{i: j in far(i)} p_ij,        p = softmax(scaling q.k)

    Args:
        query: (B, Hk, G, N, D); key: (B, Hk, N, D).
        sink_logits: (Hk * G,) or None.
        layout, window, sink_tokens, scaling, causal: Those of `rfa_attention`; `window = 0`: every visible key is far.
        every: Only every so many-th query is asked, and counts as so many: the others give 0.

    Returns:
        given (B, Hk, G, N) and taken (B, Hk, N), float32. Time quadratic in N, memory linear.
    """
    batch, heads, groups, length, _ = query.shape
    given = query.new_zeros(batch, heads, groups, length, dtype=torch.float32)
    taken = query.new_zeros(batch, heads, length, dtype=torch.float32)
    token_mask, segment_ids, rank = places(layout, batch, length, query.device)
    chunk = rank // max(window, 1)
    slots = torch.arange(length, device=query.device)
    for row in range(batch):
        for rows in slots[every // 2 :: every].split(ROWS):
            visible = token_mask[row] & (segment_ids[row] == segment_ids[row, rows, None])
            if causal:
                visible = visible & (slots <= rows[:, None])
            far = visible
            if window:
                near = (chunk[row] - chunk[row, rows, None]).abs() <= 1
                far = visible & ~near & (rank[row] >= sink_tokens)
            scores = torch.einsum("hgnd,hmd->hgnm", query[row][:, :, rows].float(), key[row].float()) * scaling
            scores = scores.masked_fill(~visible, -torch.inf)
            total = scores.logsumexp(-1, keepdim=True)
            if sink_logits is not None:
                total = torch.logaddexp(total, sink_logits.float().view(heads, groups, 1, 1))
            # Padding sees nothing: its -inf - -inf is masked.
            weights = (scores - total).exp_().masked_fill(~(far & token_mask[row, rows, None]), 0.0)
            weights *= every
            given[row][:, :, rows] = weights.sum(-1)
            taken[row] += weights.sum((1, 2))
    return given, taken


def places(
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
