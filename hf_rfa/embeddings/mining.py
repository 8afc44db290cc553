"""What the triplets of a batch are like: hard, semi-hard or easy (FaceNet, section 3.2), and whether all is alike."""

import dataclasses

import torch
import torch.nn.functional as F

#: The mean squared distance of texts of different identities below which embeddings are called collapsed: cosine 0.99.
COLLAPSED = 0.02


@dataclasses.dataclass(frozen=True)
class TripletCounts:
    """All triplets (a, p, n) of a batch by d(a, n), squared distances of unit vectors.

    Attributes:
        hard: d(a, n) <= d(a, p).
        semi_hard: d(a, p) < d(a, n) < d(a, p) + margin.
        easy: The others, whose loss is zero.
        spread: Mean squared distance of texts of different identities, 0 to 4; 0 where all embeddings are alike.
    """

    hard: int
    semi_hard: int
    easy: int
    spread: float

    @property
    def collapsed(self) -> bool:
        """Whether all embeddings are alike, whatever they are of (FaceNet: f(x) = 0)."""
        return self.spread < COLLAPSED

    @property
    def total(self) -> int:
        return self.hard + self.semi_hard + self.easy


@torch.no_grad()
def count_triplets(embeddings: torch.Tensor, labels: torch.Tensor, margin: float) -> TripletCounts:
    """Count all triplets of embeddings (B, d) with labels (B,), in O(B^2 log B).

    Example:
        >>> import torch
        >>> from hf_rfa.embeddings import count_triplets
        >>> f = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.6, 0.8]])
        >>> count_triplets(f, torch.tensor([0, 0, 1]), margin=0.5)  # (0, 1, 2): .4 < .8 < .9; (1, 0, 2): .08 < .4
        TripletCounts(hard=1, semi_hard=1, easy=0, spread=0.4...)
    """
    unit = F.normalize(embeddings.double(), dim=-1)
    norms = unit.square().sum(1)  # 1, or 0 of zeros, which are all alike
    distances = (norms[:, None] + norms - 2 * unit @ unit.T).clamp_min(0)
    same = labels[:, None] == labels
    negatives = distances.masked_fill(same, torch.inf).sort(dim=1).values
    positive = same & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    number = (~same).sum(1, keepdim=True)
    up_to = torch.searchsorted(negatives, distances, right=True)  # negatives with d(a, n) <= d(a, p)
    below = torch.searchsorted(negatives, distances + margin)  # negatives with d(a, n) < d(a, p) + margin
    hard = int((up_to * positive).sum())
    semi = int(((below - up_to) * positive).sum())
    everything = int((number * positive).sum())
    different = (~same).sum()
    spread = float((distances * ~same).sum() / different) if different else float("nan")
    return TripletCounts(hard, semi, everything - hard - semi, spread)
