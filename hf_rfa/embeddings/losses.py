"""The losses, each from sentence-transformers, on embeddings that may come from several processes and two encoders.

FaceNet's triplet loss (its equation 3) over unit vectors f, with squared distances:

    L = mean over anchor-positive pairs (a, p) of max(0, |f_a - f_p|^2 - |f_a - f_n|^2 + margin)

`triplet` takes for each pair the semi-hard negative (its equation 4) that is nearest: the least |f_a - f_n|^2 above
|f_a - f_p|^2; beyond the margin it costs nothing, and where no negative is farther than the positive it is the
farthest one. `batch_hard` (Hermans et al. 2017) takes the farthest positive and nearest negative of each anchor.
`multiple_negatives` is the cross-entropy of each first text's partner among all second ones, at scale 20. `harmonic`
is `triplet` over the new embeddings and the old ones of the same texts together, so that anchors, positives and
negatives are drawn from both in every mixture (FaceNet's figure 9); old ones have no gradient.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from hf_rfa.embeddings.config import MetricConfig

#: (embeddings (B, d), labels (B,) int64, old embeddings (B, d) or None) -> the loss
Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


def squared_distances(embeddings: torch.Tensor) -> torch.Tensor:
    """|f_i - f_j|^2 (B, B) of the rows (B, d) at unit length, in float32 at least."""
    from sentence_transformers.sentence_transformer.losses import BatchHardTripletLossDistanceFunction as Distance

    distances: torch.Tensor = Distance.euclidean_distance(F.normalize(embeddings, dim=-1), squared=True)
    return distances


def make_loss(config: MetricConfig) -> Loss:
    """The loss of `config.loss`.

    Example:
        >>> import pytest, torch
        >>> _ = pytest.importorskip("sentence_transformers")
        >>> from hf_rfa.embeddings import MetricConfig, make_loss
        >>> loss = make_loss(MetricConfig(steps=1, loss="triplet", margin=0.5))
        >>> f = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.6, 0.8], [0.0, 1.0]])
        >>> round(loss(f, torch.tensor([0, 0, 1, 1]), None).item(), 4)  # each pair: 0.4 - 0.8 + 0.5
        0.1
    """
    from sentence_transformers.sentence_transformer import losses

    # Their losses hold an encoder to call; embeddings are at hand here.
    options: Any = {"model": None, "margin": config.margin, "distance_metric": squared_distances}
    if config.loss == "multiple_negatives":
        return partial(_pairs, losses.MultipleNegativesRankingLoss(model=None))  # type: ignore[arg-type]
    if config.loss == "batch_hard":
        return partial(_labelled, losses.BatchHardTripletLoss(**options))
    return partial(_labelled, losses.BatchSemiHardTripletLoss(**options))


def both(
    embeddings: torch.Tensor, labels: torch.Tensor, old: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """New and old embeddings in one table (2B, d), with their labels; the new ones alone if there are no old ones."""
    if old is None:
        return embeddings, labels
    return torch.cat([embeddings, old.detach().to(embeddings)]), torch.cat([labels, labels])


def _labelled(loss: Any, embeddings: torch.Tensor, labels: torch.Tensor, old: torch.Tensor | None) -> torch.Tensor:
    rows, names = both(embeddings, labels, old)
    found: torch.Tensor = loss.compute_loss_from_embeddings([rows], names)
    return found


def _pairs(loss: Any, embeddings: torch.Tensor, labels: torch.Tensor, old: torch.Tensor | None) -> torch.Tensor:
    found: torch.Tensor = loss.compute_loss_from_embeddings([embeddings[0::2], embeddings[1::2]], labels)
    return found
