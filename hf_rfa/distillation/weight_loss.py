"""A loss on sampled attention weights: unlike the output error, it says which keys a query attends to."""

import torch

from hf_rfa.features.far_kernel import FarKernel
from hf_rfa.ops.call import OperatorCall
from hf_rfa.ops.exact_keys import ExactKeys


def sampled_weight_loss(call: OperatorCall, rows: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy, in nats, of softmax's weights with those of the estimate, on some queries.

        - p_exact log w_exact - sum_{j far} p_j log w_j,        p = softmax(scaling q.k),
        w_j = gamma kernel(q, k_j) / Z,  w_exact = sum_exact exp(scaling q.k) / Z,  Z such that all add up to 1

    All keys that a query sees exactly (see `ops.exact_keys`) count as one, since the weights among them are exact.
    Learned sink logits have no part in the weights, only in the choice of kept keys. Memory and time are linear in N
    for a fixed number of rows.

    Args:
        call: In float32 or float64, without an earlier state and without exact heads; the features of its far kernel,
            which is differentiable, must not be negative.
        rows: (S,) int64, the sampled positions; those that hold padding are left out.

    Source: Zhang et al. 2024 (Hedgehog, section 4), there over all pairs.
    """
    key, kernel, scaling, exact_keys = call.key, call.far, call.scaling, ExactKeys.of(call)
    visible, exact = (mask.unsqueeze(2) for mask in exact_keys.pairs(rows))
    far = visible & ~exact
    counted = exact_keys.token_mask[:, rows] & visible[:, 0, 0].any(-1)
    chosen = call.query[:, :, :, rows]
    scores = torch.einsum("bhgnd,bhmd->bhgnm", chosen, key) * scaling
    # A far part that is switched off is matched as if it were on: weights of 0 have an infinite cross-entropy.
    log_gamma = torch.where(kernel.alive(), kernel.log_gamma(), 0.0)
    far_scores = _log_kernel(kernel, chosen, key, scaling) + log_gamma.view(-1, 1, 1, 1)
    lowest = torch.finfo(scores.dtype).min
    target = scores.masked_fill(~visible, lowest).log_softmax(-1)
    exact_scores = scores.masked_fill(~exact, lowest).logsumexp(-1)
    log_total = torch.logaddexp(exact_scores, far_scores.masked_fill(~far, lowest).logsumexp(-1))
    far_weights = target.exp() * far
    loss = (far_weights * (log_total.unsqueeze(-1) - far_scores)).sum(-1)
    loss = loss + (target.exp() * exact).sum(-1) * (log_total - exact_scores)
    return (loss * counted[:, None, None]).sum() / (counted.sum() * loss.shape[1] * loss.shape[2]).clamp_min(1)


def _log_kernel(kernel: FarKernel, query: torch.Tensor, key: torch.Tensor, scaling: float) -> torch.Tensor:
    """log of the positive far kernel (B, Hk, G, S, N), without gamma."""
    query_features, query_scale = kernel.query_features(query, scaling)
    key_features, key_scale = kernel.key_features(key, scaling)
    products = torch.einsum("bhgsf,bhnf->bhgsn", query_features, key_features)
    floor = torch.finfo(products.dtype).tiny
    return products.clamp_min(floor).log() + query_scale.unsqueeze(-1) + key_scale[:, :, None, None]
