"""Kept keys: the few far keys of a head that its queries go on seeing exactly.

When a chunk leaves the window, its keys compete with the K that are kept. Those with the largest scores stay, all
others are added to the far sums, once and for good: nothing is dropped, and the state is of constant size.

    exact(i) = near(i) + sinks + kept(chunk of i),        far = every other key that i may see
    score_j  = |v_j| max_g sum_i p_ij / #i  over the queries i >= j + d so far, of query head g,
    p_ij     = exp(s q_i.k_j) / sum_{exact(i)} exp(s q_i.k_m)

The maximum is over the query heads that share the key head; a learned sink logit counts in the normaliser. What the
far sums lose of a key grows with its weight and with its value. The nearest d queries of a key are left out: most
of them look at it for being near, which says nothing about those to come. Far keys have no part in p_ij, so that a
choice needs neither features nor sums.

Keys are chosen at chunk boundaries only, so that a sequence may be split anywhere: what decides is a number per key,
its `mass`, and where it stands. Padding, sinks and other documents never compete, and no gradient flows through a
choice. Of two equal scores the later key stays; a score that is not a number loses to all others.

Measured on SmolLM2-135M (`scripts/experiments/kept_keys.py`).
"""

import torch

#: Of entries that hold no key: below every score.
NOTHING = -torch.inf


def least_distance(window: int) -> int:
    """d: from how many tokens on queries count."""
    return min(8, window)


def scores(
    mass: torch.Tensor, length: torch.Tensor, position: torch.Tensor, count: torch.Tensor | int, window: int
) -> torch.Tensor:
    """score_j (..., L) after so many tokens of the document; `NOTHING` where there is no key.

    Args:
        mass: (..., G, L) sum_i p_ij so far, of each query head.
        length: (..., L) |v_j|.
        position: (..., L) int64, number of the token in its document; -1 where there is none.
        count: Tokens so far, whole chunks.
        window: C, tokens per chunk.
    """
    queries = count - position - least_distance(window)
    score = torch.nan_to_num(mass.amax(-2) * length / queries, nan=-1.0)
    return score.masked_fill(position < 0, NOTHING)


def split(score: torch.Tensor, kept_keys: int, all_keys: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of those that go (..., L - K) and of those that stay (..., K), the latter in order, no keys first.

    all_keys: Whether it is known that no entry is empty.
    """
    ascending, order = score.sort(dim=-1, stable=True)
    size = score.shape[-1]
    going, staying = order.split([size - kept_keys, kept_keys], dim=-1)
    if all_keys:
        return going, staying.sort(-1).values
    filled = ascending[..., size - kept_keys :] > NOTHING
    return going, (staying + size * filled).sort(-1).values % size


def number_kept(count: int, window: int, sink_tokens: int, kept_keys: int) -> int:
    """How many keys are kept after `count` tokens of a document."""
    left = (count // window - 1) * window - sink_tokens  # tokens of the chunks behind the window
    return min(kept_keys, max(0, left)) if kept_keys else 0
