"""Clusters of a layer's keys, the start of the clustered map: omega is their centroids, and no draw."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from hf_rfa.adapter import RFAAdapter
from hf_rfa.geometry import Geometry
from hf_rfa.ops.layout import TokenLayout

#: How sharply a key belongs to its nearest centroid: shares are softmax(-SHARPNESS / 2 |k' - w|^2). With 4 the loss of
#: `distill` begins lower than with 2, and 8 gives gradients to nobody but the nearest.
SHARPNESS = 4.0
#: The kernel's exponent is multiplied by one of these: a centroid says more than is known of a key.
TEMPERS = (0.0, 0.15, 0.3, 0.5, 0.7, 0.85, 1.0)
#: Keys of a head that are clustered, in each process, and rounds of k-means.
MAX_KEYS, ROUNDS = 16384, 15


class KeyClusters:
    """Observer that keeps a layer's keys; `merge` clusters them by k-means.

    With centre c, centroids w_f and sharpness s the clustered kernel then is

        sum_f exp(scaling q.w_f) share_f(k),        share_f(k) = softmax_f(-s scaling |k - w_f|^2 / 2)
    """

    def __init__(self, adapter: RFAAdapter) -> None:
        self.adapter = adapter
        self.planted = 0  # set by the caller: tokens at the end of each row that repeat earlier ones
        self.keys: list[torch.Tensor] = []
        self.scaling = 1.0  # that of the layer, once it was seen
        self.center = torch.empty(0)  # (Hk, D), the mean key
        self.omega = torch.empty(0)  # (Hk, rows, D), the centroids as the clustered map wants them

    def __call__(
        self, adapter: RFAAdapter, module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        layout: TokenLayout, options: dict[str, Any], exact: torch.Tensor,
    ) -> None:  # fmt: skip
        self.scaling = options["scaling"]
        key = key[:, :, : key.shape[2] - self.planted].transpose(0, 1)  # (Hk, B, N, D)
        if layout.valid is not None:
            tokens = key[:, layout.valid[:, : key.shape[2]].to(key.device)]
        else:
            tokens = key.flatten(1, 2)
        self.keys.append(tokens.float())

    def merge(self, reduce: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Cluster; `reduce(tensor)` gives the sum over all processes."""
        keys = torch.cat(self.keys, dim=1)
        self.keys = []
        generator = torch.Generator().manual_seed(self.adapter.config.seed)
        keys = keys[:, torch.randperm(keys.shape[1], generator=generator)[:MAX_KEYS].to(keys.device)]
        heads, rows = self.adapter.omega.shape[:2]
        ones = torch.ones(heads, keys.shape[1], 1, dtype=torch.float64, device=keys.device)
        sums = reduce(torch.cat([keys.double(), ones], dim=-1).sum(1))
        self.center = (sums[:, :-1] / sums[:, -1:]).float()
        keys = keys - self.center.unsqueeze(1)
        self.omega = k_means(keys, rows, generator, reduce) * (SHARPNESS * self.scaling) ** 0.5

    def geometries(self) -> list[Geometry]:
        """One for each temper: keys to the scale of omega, queries so that the product is tempered q.w."""
        heads, dim = self.center.shape
        eye = torch.eye(dim, device=self.center.device).repeat(heads, 1, 1)
        none = torch.zeros(heads, device=self.center.device)
        zero = torch.zeros_like(self.center)
        root = SHARPNESS**0.5
        return [Geometry(zero, self.center, eye * (temper / root), eye * root, none, none) for temper in TEMPERS]


def k_means(
    keys: torch.Tensor, clusters: int, generator: torch.Generator, reduce: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Centroids (heads, clusters, D) of keys (heads, n, D), by `ROUNDS` rounds from keys picked at random.

    With several processes the first centroids are the mean of what each picks; a cluster that lost all of its keys
    keeps its centroid.
    """
    heads, count, dim = keys.shape
    picked = torch.randint(count, (clusters,), generator=generator).to(keys.device)
    ones = torch.ones(heads, count, 1, dtype=keys.dtype, device=keys.device)
    processes = reduce(torch.ones(1, device=keys.device)).item()
    centroids = reduce(keys[:, picked]) / processes
    for _ in range(ROUNDS):
        nearest = (keys @ centroids.mT - centroids.square().sum(-1).unsqueeze(1) / 2).argmax(-1)
        sums = torch.zeros(heads, clusters, dim + 1, dtype=keys.dtype, device=keys.device)
        index = nearest.unsqueeze(-1).expand(-1, -1, dim + 1)
        sums = reduce(sums.scatter_add_(1, index, torch.cat([keys, ones], dim=-1)))
        filled = sums[..., -1:] > 0
        centroids = torch.where(filled, sums[..., :-1] / sums[..., -1:].clamp_min(1), centroids)
    return centroids
