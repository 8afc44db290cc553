"""Kept keys of the bidirectional form: the far keys that all queries of a document see exactly.

An encoder has its whole text before it, so that its keys are chosen once for a document. To ask all queries would cost
N x N; a fixed number of them, spread evenly over the text, says which keys many queries look at:

    exact(i) = near(i) + sinks + kept,        far = every other key of the document
    score_j  = |v_j| sum_i p_ij / #i  over the queries i that are asked and do not have j in their near chunks,
    p_ij     = exp(s q_i.k_j) / sum_m exp(s q_i.k_m)  over all keys m of the document

The K keys with the largest score are kept, of those that a query was asked about and that are no sinks. The sum runs
over the queries of all heads that share the key head; a learned sink logit counts in the normaliser. A kept key that
is near to a query anyway counts once.

Padding and other documents never compete, and no gradient flows through a choice. Of two equal scores the later key
stays; a score that is not a number loses to all others. The keys of an initial state are a bag of far keys, and have
no part in the choice. A final state is such a bag again, of all keys: the kept ones are in its sums, too.

`ops.kept_keys` has the rule of the causal form.
"""

import numpy as np
import torch

from hf_rfa.ops.kept_keys import NOTHING

#: Queries of a document that are asked. On all-MiniLM-L6-v2 (512 tokens, window 64, K = 64, one fixed far kernel) the
#: square error of the layers' outputs is 0.0217, 0.0200, 0.0166 of their square with 64, 128, 256 of them, and the
#: embedding's cosine distance 0.0143, 0.0144, 0.0135 (without kept keys 0.0532 and 0.0286). The choice takes as many
#: times longer.
QUERIES = 128


def asked_ranks(lengths: np.ndarray) -> np.ndarray:
    """(d, S) int64: which tokens of documents of `lengths` (d,) are asked, ascending; -1 where no more are.

    All tokens of a document of at most `QUERIES`; of others the middle one of each of `QUERIES` equal parts.
    """
    lengths = lengths[:, None]
    count = np.minimum(lengths, QUERIES)
    number = np.arange(count.max())
    return np.where(number < count, (2 * number + 1) * lengths // (2 * count), -1)


def scores(mass: torch.Tensor, length: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """score_j (..., L), `NOTHING` for keys that may not be kept.

    Args:
        mass: (..., L) sum_i p_ij.
        length: (..., L) |v_j|.
        count: (..., L) how many queries count; 0 for sinks and where there is no key.
    """
    return torch.nan_to_num(mass * length / count, nan=-1.0).masked_fill(count == 0, NOTHING)


def best(score: torch.Tensor, kept_keys: int) -> torch.Tensor:
    """Indices (..., K) of the keys that are kept, ascending; -1, before all others, where there are no more."""
    index = score.argsort(dim=-1, stable=True)[..., max(0, score.shape[-1] - kept_keys) :]
    return index.masked_fill(score.gather(-1, index) == NOTHING, -1).sort(dim=-1).values
