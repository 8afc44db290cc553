"""Kept keys: the few far keys per head that its queries continue to see exactly.

When a chunk leaves the window, its keys compete with the K kept ones. Those with the largest scores stay; all others
are added to the far sums for good. Nothing is dropped, and the size of the state is constant.

    exact(i) = near(i) + sinks + kept(chunk of i),        far = every other key that i may see
    score_j  = |v_j| max_g sum_i p_ij / #i  over the queries i >= j + d so far, of query head g,
    p_ij     = exp(s q_i.k_j) / sum_{exact(i)} exp(s q_i.k_m)

The maximum is over the query heads that share the key head; a learned sink logit is part of the normaliser. The
error of estimating a key in the far sums grows with its weight and with its value. The nearest d queries of a key are
left out: most attend to it because it is near, which says nothing about later queries. Far keys have no part in p_ij,
so that the choice needs neither features nor sums.

Keys are chosen at chunk boundaries only, so that a sequence may be split anywhere: the choice depends on one number
per key, its `mass`, and on its position. Padding, sinks and other documents never compete, and no gradient flows
through a choice. Of two equal scores the later key stays; a NaN loses to all other scores.

`scripts/experiments/kept_keys.py` measures what it gives on a model.
"""

import torch

#: Score of entries that hold no key: below every other.
NOTHING = -torch.inf


def least_distance(window: int) -> int:
    """d, the distance in tokens from which on queries count."""
    return min(8, window)


def scores(
    mass: torch.Tensor, length: torch.Tensor, position: torch.Tensor, count: torch.Tensor | int, window: int
) -> torch.Tensor:
    """score_j (..., L) after `count` tokens of the document; `NOTHING` where there is no key.

    Args:
        mass: (..., G, L) sum_i p_ij so far, per query head.
        length: (..., L) |v_j|.
        position: (..., L) int64, number of the token in its document; -1 where there is none.
        count: Tokens so far, a multiple of C.
        window: C, tokens per chunk.
    """
    queries = count - position - least_distance(window)
    score = torch.nan_to_num(mass.amax(-2) * length / queries, nan=-1.0)
    return score.masked_fill(position < 0, NOTHING)


def split(score: torch.Tensor, kept_keys: int, all_keys: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of the evicted (..., L - K) and of the kept keys (..., K), the latter in order, empty entries first.

    all_keys: True if it is known that no entry is empty.
    """
    ascending, order = score.sort(dim=-1, stable=True)
    size = score.shape[-1]
    going, staying = order.split([size - kept_keys, kept_keys], dim=-1)
    if all_keys:
        return going, staying.sort(-1).values
    filled = ascending[..., size - kept_keys :] > NOTHING
    return going, (staying + size * filled).sort(-1).values % size


def number_kept(count: int, window: int, sink_tokens: int, kept_keys: int) -> int:
    """The number of keys that are kept after `count` tokens of a document."""
    left = (count // window - 1) * window - sink_tokens  # tokens that have left the window
    return min(kept_keys, max(0, left)) if kept_keys else 0
