"""95 % intervals of R@1, and of the ratio of two, by a bootstrap over identities.

Queries of one identity are alike, so whole identities are drawn again with replacement, not queries. Two directions
of search are compared over the same queries: what makes a query hard for both then cancels in their ratio.
"""

from collections.abc import Sequence

import numpy as np

from hf_rfa.embeddings.index import unit
from hf_rfa.embeddings.retrieval import split_queries

#: Draws of the bootstrap, and the share that the interval holds.
DRAWS, SHARE = 2000, 0.95

Interval = tuple[float, float]


def first_found(queries: np.ndarray, index: np.ndarray, labels: Sequence[int]) -> np.ndarray:
    """(queries,) bool: whether the nearest text in the index is of the query's identity; their mean is R@1.

    Args:
        queries, index: Embeddings of all n texts; of each the part that `split_queries` names is used.
    """
    asked, held = split_queries(labels)
    names = np.asarray(labels)
    nearest = (unit(queries)[asked] @ unit(index)[held].T).argmax(1)
    found: np.ndarray = names[held][nearest] == names[asked]
    return found


def recall_interval(found: np.ndarray, labels: Sequence[int], seed: int = 0) -> Interval:
    """Of the mean of `found` (`first_found`).

    Example:
        >>> import numpy as np
        >>> from hf_rfa.embeddings.intervals import recall_interval
        >>> labels = [number for number in range(100) for _ in range(2)]  # one query of each identity
        >>> low, high = recall_interval(np.arange(100) % 4 == 0, labels)
        >>> 0.14 < low < 0.19 and 0.31 < high < 0.36
        True
    """
    return ratio_interval(found, np.ones_like(found), labels, seed)


def ratio_interval(found: np.ndarray, others: np.ndarray, labels: Sequence[int], seed: int = 0) -> Interval:
    """Of the mean of `found` divided by that of `others`, two directions' answers to the same queries.

    NaN if the others find nothing in one of the draws.
    """
    asked, _ = split_queries(labels)
    identities, of_query = np.unique(np.asarray(labels)[asked], return_inverse=True)
    sums = np.stack([np.bincount(of_query, weights=hits, minlength=len(identities)) for hits in (found, others)])
    drawn = np.random.default_rng(seed).integers(len(identities), size=(DRAWS, len(identities)))
    first, second = sums[:, drawn].sum(-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.where(second > 0, first / second, np.nan)
    low, high = np.quantile(ratios, [(1 - SHARE) / 2, (1 + SHARE) / 2])
    return float(low), float(high)
