"""How large the far part of each head ever is: the limit that its estimate gets."""

from collections.abc import Callable

import torch

#: The limit is that ratio of far to exact weight which this share of the queries that have far keys does not exceed,
#: times SLACK: in heads that average, the ratio grows with the position, and the last queries have the largest one.
QUANTILE, SLACK = 0.95, 1.25
#: Bins of a histogram of the ratio's logarithm. Below the least of them a far part is nothing.
LEAST, MOST, BINS = -16.0, 16.0, 512


class FarShares:
    """A histogram per key head of log(p / (1 - p)), p the softmax weight of all far keys of a query."""

    def __init__(self) -> None:
        self.counts = torch.zeros(0)

    def add(self, shares: torch.Tensor) -> None:
        """Count the weights (B, Hk, G, N) of far keys; queries without any, of weight 0, are left out."""
        shares = shares.transpose(0, 1).flatten(1).double()
        place = ((shares.clamp(0, 1).logit() - LEAST) * (BINS / (MOST - LEAST))).clamp(0, BINS - 1).long()
        counts = torch.zeros(len(shares), BINS, dtype=torch.float64, device=shares.device)
        counts.scatter_add_(1, place, (shares > 0).double())
        self.counts = counts if not self.counts.numel() else self.counts + counts

    def merge(self, reduce: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Add the counts of other processes: `reduce(tensor)` gives the sum over all of them."""
        self.counts = reduce(self.counts)

    def limits(self) -> torch.Tensor:
        """(Hk,) float32, SLACK times the upper end of the quantile's bin; 0, no limit, for heads without far keys."""
        total = self.counts.sum(1, keepdim=True)
        place = (self.counts.cumsum(1) < QUANTILE * total).sum(1)
        ratio = (LEAST + (place + 1) * ((MOST - LEAST) / BINS)).exp()
        return torch.where(total[:, 0] > 0, SLACK * ratio, 0.0).float()
