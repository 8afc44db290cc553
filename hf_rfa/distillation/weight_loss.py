"""A loss on sampled attention weights: unlike the output error, it says which keys a query attends to."""

import torch

from hf_rfa.calibration.far_mass import places
from hf_rfa.features.far_kernel import FarKernel
from hf_rfa.ops.layout import TokenLayout


def sampled_weight_loss(
    query: torch.Tensor, key: torch.Tensor, kernel: FarKernel, rows: torch.Tensor, *, layout: TokenLayout,
    window: int, sink_tokens: int, scaling: float, causal: bool,
) -> torch.Tensor:  # fmt: skip
    """Mean cross-entropy, in nats, of softmax's weights with those of the estimate, on some queries.

        - p_near log w_near - sum_{j far} p_j log w_j,        p = softmax(scaling q.k),
        w_j = gamma kernel(q, k_j) / Z,  w_near = sum_near exp(scaling q.k) / Z,  Z such that all add up to 1

    All near keys count as one, since the weights among them are exact. Memory and time are linear in N for a fixed
    number of rows.

    Args:
        query: (B, Hk, G, N, D); key: (B, Hk, N, D), float32. Features must not be negative.
        kernel: The far kernel of the Hk key heads, differentiable.
        rows: (S,) int64, the sampled positions; those that hold padding are left out.
        layout, window, sink_tokens, scaling, causal: Those of `rfa_attention`.

    Source: Zhang et al. 2024 (Hedgehog, section 4), there over all pairs.
    """
    length = query.shape[3]
    token_mask, segment_ids, rank = places(layout, len(query), length, query.device)
    visible = token_mask[:, None] & (segment_ids[:, None] == segment_ids[:, rows, None])
    if causal:
        visible = visible & (torch.arange(length, device=rows.device) <= rows[:, None])
    far = visible
    if window:
        chunk = rank // window
        near = (chunk[:, None] - chunk[:, rows, None]).abs() <= 1
        far = visible & ~near & (rank[:, None] >= sink_tokens)
    counted = token_mask[:, rows] & visible.any(-1)
    visible, far, near = (mask[:, None, None] for mask in (visible, far, visible & ~far))
    chosen = query[:, :, :, rows]
    scores = torch.einsum("bhgnd,bhmd->bhgnm", chosen, key) * scaling
    # A far part that is switched off is matched as if it were on: weights of 0 have an infinite cross-entropy.
    log_gamma = torch.where(kernel.alive(), kernel.log_gamma(), 0.0)
    far_scores = _log_kernel(kernel, chosen, key, scaling) + log_gamma.view(-1, 1, 1, 1)
    lowest = torch.finfo(scores.dtype).min
    target = scores.masked_fill(~visible, lowest).log_softmax(-1)
    near_scores = scores.masked_fill(~near, lowest).logsumexp(-1)
    log_total = torch.logaddexp(near_scores, far_scores.masked_fill(~far, lowest).logsumexp(-1))
    far_weights = target.exp() * far
    loss = (far_weights * (log_total.unsqueeze(-1) - far_scores)).sum(-1)
    loss = loss + (target.exp() * near).sum(-1) * (log_total - near_scores)
    return (loss * counted[:, None, None]).sum() / (counted.sum() * loss.shape[1] * loss.shape[2]).clamp_min(1)


def _log_kernel(kernel: FarKernel, query: torch.Tensor, key: torch.Tensor, scaling: float) -> torch.Tensor:
    """log of the positive far kernel (B, Hk, G, S, N), without gamma."""
    query_features, query_scale = kernel.query_features(query, scaling)
    key_features, key_scale = kernel.key_features(key, scaling)
    products = torch.einsum("bhgsf,bhnf->bhgsn", query_features, key_features)
    floor = torch.finfo(products.dtype).tiny
    return products.clamp_min(floor).log() + query_scale.unsqueeze(-1) + key_scale[:, :, None, None]
