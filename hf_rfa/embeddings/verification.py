"""Same or different: FaceNet's VAL, FAR (section 4) and ROC (its figure 5), over all pairs of texts.

    VAL(d) = |{same pairs within distance d}| / |same pairs|        FAR(d) = |{different pairs within d}| / |different|

d is the squared distance of unit vectors. VAL at a FAR is cross-validated over folds of identities: the threshold is
the largest d at which the FAR of the pairs within the other nine folds is at most the wanted one, VAL is that of the
same pairs of the tenth.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hf_rfa.embeddings.index import unit
from hf_rfa.errors import ConfigError

#: FaceNet's false accept rate, and its number of folds.
FAR, FOLDS = 1e-3, 10


@dataclass(frozen=True)
class Verification:
    """VAL at a FAR.

    Attributes:
        val: Mean over the folds of the share of same pairs that are accepted.
        error: Standard error of that mean.
        far: Mean over the folds of the measured share of different pairs that are accepted: of those with at least
            one text in the fold.
    """

    val: float
    error: float
    far: float


def pair_distances(embeddings: np.ndarray, others: np.ndarray | None = None) -> np.ndarray:
    """Squared distances (n, n) of unit vectors; from those of one encoder to another's of the same texts, if given."""
    left = unit(embeddings).astype(np.float64)
    right = left if others is None else unit(others).astype(np.float64)
    found: np.ndarray = np.maximum(2 - 2 * left @ right.T, 0)
    return found


def val_at_far(
    distances: np.ndarray, labels: Sequence[int], *, far: float = FAR, folds: int = FOLDS, seed: int = 0
) -> Verification:
    """VAL at a FAR of distances (n, n), see the module; the diagonal does not count.

    Raises:
        ConfigError: Fewer identities than folds, or a fold without a same pair.

    Example:
        >>> import numpy as np
        >>> from hf_rfa.embeddings.verification import pair_distances, val_at_far
        >>> labels = [i for i in range(20) for _ in range(3)]
        >>> val_at_far(pair_distances(np.eye(20)[labels]), labels)
        Verification(val=1.0, error=0.0, far=0.0)
    """
    names = np.asarray(labels)
    fold = _folds(names, folds, seed)
    same = names[:, None] == names
    pairs = ~np.eye(len(names), dtype=bool)
    vals, fars = [], []
    for number in range(folds):
        inside = fold == number
        training = ~inside[:, None] & ~inside & pairs
        threshold = _threshold(distances[training & ~same], far)
        held_out = inside[:, None] & inside & pairs & same
        touching = (inside[:, None] | inside) & ~same
        if not held_out.any():
            raise ConfigError(f"Fold {number} has no two texts of one identity. Pass more texts of each.")
        vals.append(float((distances[held_out] <= threshold).mean()))
        fars.append(float((distances[touching] <= threshold).mean()))
    return Verification(float(np.mean(vals)), float(np.std(vals, ddof=1) / np.sqrt(folds)), float(np.mean(fars)))


def roc(distances: np.ndarray, labels: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """FAR and VAL at every threshold, over all pairs, for a plot: FaceNet's figure 5."""
    from sklearn.metrics import roc_curve

    names = np.asarray(labels)
    pairs = ~np.eye(len(names), dtype=bool)
    same = (names[:, None] == names)[pairs]
    far, val, _ = roc_curve(same, -distances[pairs])
    return far, val


def _threshold(different: np.ndarray, far: float) -> float:
    """The largest distance that accepts at most a share `far` of these pairs."""
    allowed = int(far * len(different))
    first_refused = np.partition(different, allowed)[allowed]
    return float(np.nextafter(first_refused, -np.inf))


def _folds(labels: np.ndarray, folds: int, seed: int) -> np.ndarray:
    identities = np.unique(labels)
    if folds < 2 or len(identities) < folds:
        raise ConfigError(
            f"VAL is cross-validated over {folds} folds of identities. Got {len(identities)}. Pass texts of more "
            "identities, or lower `folds` (to 2 at least)."
        )
    order = np.random.default_rng(seed).permutation(len(identities))
    number = np.empty(len(identities), dtype=int)
    number[order] = np.arange(len(identities)) % folds
    found: np.ndarray = number[np.searchsorted(identities, labels)]
    return found
