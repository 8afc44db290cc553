"""Kept keys of the bidirectional form: the far keys that all queries of a document see exactly.

An encoder sees its whole text at once, so the keys are chosen once per document. Asking all queries would cost N x N;
a fixed number of queries, spread evenly over the text, shows which keys many queries attend to:

    exact(i) = near(i) + sinks + kept,        far = every other key of the document
    score_j  = |v_j| max_g sum_i p_ij / #i  over the asked queries i of head g that do not have j in their near chunks,
    p_ij     = exp(s q_i.k_j) / sum_m exp(s q_i.k_m)  over all keys m of the document

Of the keys that are no sinks and for which some query counts, the K with the largest scores are kept. The maximum is
over the query heads that share the key head, as in `ops.kept_keys`; a learned sink logit is part of the normaliser. A
kept key that is near to a query anyway is attended to once.

Padding and other documents never compete, and no gradient flows through a choice. Of two equal scores the later key
stays; a NaN loses to all other scores. The keys of an initial state exist only as far sums and have no part in the
choice. A final state, too, holds only sums: those of all keys, kept ones included.

For the causal form see `ops.kept_keys`.
"""

import numpy as np
import torch

from hf_rfa.ops.kept_keys import NOTHING

#: Queries asked per document. The time of the choice grows in proportion.
QUERIES = 128


def asked_ranks(lengths: np.ndarray) -> np.ndarray:
    """(d, S) int64: the asked tokens of documents of `lengths` (d,), ascending, then -1.

    All tokens of a document of at most `QUERIES` tokens; else the middle one of each of `QUERIES` equal parts.
    """
    lengths = lengths[:, None]
    count = np.minimum(lengths, QUERIES)
    number = np.arange(count.max())
    return np.where(number < count, (2 * number + 1) * lengths // (2 * count), -1)


def scores(mass: torch.Tensor, length: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """score_j (..., L); `NOTHING` for keys that cannot be kept.

    Args:
        mass: (..., G, L) sum_i p_ij, per query head.
        length: (..., L) |v_j|.
        count: (..., L) number of queries that count; 0 for sinks and where there is no key.
    """
    return torch.nan_to_num(mass.amax(-2) * length / count, nan=-1.0).masked_fill(count == 0, NOTHING)


def best(score: torch.Tensor, kept_keys: int) -> torch.Tensor:
    """Indices (..., K) of the kept keys, ascending; empty places come first and hold -1."""
    index = score.argsort(dim=-1, stable=True)[..., max(0, score.shape[-1] - kept_keys) :]
    return index.masked_fill(score.gather(-1, index) == NOTHING, -1).sort(dim=-1).values
