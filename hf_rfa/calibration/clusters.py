"""Clusters of a layer's keys, the start of the clustered map: omega is their centroids and is not drawn."""

from collections.abc import Callable

import torch
from torch import nn

from hf_rfa.calibration.geometry import Geometry, Moments, root_metric
from hf_rfa.ops.layout import TokenLayout
from hf_rfa.ops.settings import AttentionSettings
from hf_rfa.runtime.adapter import RFAAdapter

#: How sharply a key belongs to its nearest centroid: shares are softmax(-SHARPNESS / 2 |k' - w|^2). With 4 the error
#: before training is a tenth larger. With 16 it is no smaller, and hardly a key has a second cluster to train.
SHARPNESS = 8.0
#: The kernel's exponent is multiplied by one of these: below 1 because a centroid is not exactly its keys, above 1
#: because the means of clusters lie closer together than their keys.
TEMPERS = (0.0, 0.15, 0.3, 0.5, 0.7, 0.85, 1.0, 1.15, 1.3)
#: The weight of a key in its cluster is this power of the attention it gets as a far key. With 0, keys that nobody
#: attends to get clusters of their own; with 1, only the most attended keys of the calibration text do.
MASS_POWER, LEAST_MASS = 0.25, 1e-8
#: Keys per head and process that are clustered, and rounds of k-means.
MAX_KEYS, ROUNDS = 16384, 15


class KeyClusters:
    """Observer that keeps a layer's keys and the attention they get as far keys; `merge` clusters them by k-means.

    Two keys are close if queries give them nearly the same weight: distances are those of R (k - c), where R R is the
    covariance of the far queries. This has a third less error than |k - c|. With the mean far query b, the mean key c
    that far queries attend to, centroids w_f and sharpness s, the clustered kernel is

        exp(scaling q.c) exp(scaling b.(k - c)) sum_f exp(scaling R^-1 (q - b).w_f) share_f(k),
        share_f(k) = softmax_f(-s scaling |R (k - c) - w_f|^2 / 2)
    """

    def __init__(self, adapter: RFAAdapter) -> None:
        self.adapter = adapter
        self.planted = 0  # set by the caller: tokens at the end of each row that repeat earlier ones
        self.moments = Moments()
        self.keys: list[torch.Tensor] = []
        self.masses: list[torch.Tensor] = []
        self.scaling = 1.0  # the layer's, set by its first call
        self.query_center = self.center = torch.empty(0)  # (Hk, D), b and c
        self.metric = self.inverse_metric = torch.empty(0)  # (Hk, D, D), R
        self.omega = torch.empty(0)  # (Hk, rows, D), the centroids in the scale of the clustered map

    def __call__(
        self, adapter: RFAAdapter, module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        layout: TokenLayout, settings: AttentionSettings, exact: torch.Tensor,
    ) -> None:  # fmt: skip
        self.scaling = settings.scaling
        self.moments.planted = self.planted
        mass = self.moments(adapter, module, query, key, value, layout, settings, exact).clamp_min(LEAST_MASS)
        kept = torch.ones_like(mass[:, 0], dtype=torch.bool)
        if layout.token_mask is not None:
            kept = layout.token_mask[:, : mass.shape[2]].to(mass.device)
        self.masses.append(mass.transpose(0, 1)[:, kept])  # (Hk, tokens)
        self.keys.append(key[:, :, : mass.shape[2]].transpose(0, 1)[:, kept].float())

    def merge(self, reduce: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Cluster; `reduce(tensor)` gives the sum over all processes."""
        self.moments.merge(reduce)
        query_center, center, covariance = self.moments.attended()
        self.query_center, self.center = query_center.float(), center.float()
        self.metric, self.inverse_metric = (matrix.float() for matrix in root_metric(covariance))
        keys, weights = torch.cat(self.keys, dim=1), torch.cat(self.masses, dim=1) ** MASS_POWER
        self.keys, self.masses = [], []
        generator = torch.Generator().manual_seed(self.adapter.config.seed)
        kept = torch.randperm(keys.shape[1], generator=generator)[:MAX_KEYS].to(keys.device)
        keys = (keys[:, kept] - self.center.unsqueeze(1)) @ self.metric.mT
        rows = self.adapter.omega.shape[1]
        centroids = k_means(keys, rows, generator, reduce, weights[:, kept])
        self.omega = centroids * (SHARPNESS * self.scaling) ** 0.5

    def geometries(self) -> list[Geometry]:
        """One geometry per temper: it scales keys as omega, and queries so that the product is the tempered q.w."""
        none = torch.zeros(len(self.center), device=self.center.device)
        root = SHARPNESS**0.5
        centers = (self.query_center, self.center)
        return [
            Geometry(*centers, self.inverse_metric * (temper / root), self.metric * root, none, none)
            for temper in TEMPERS
        ]


def k_means(
    keys: torch.Tensor, clusters: int, generator: torch.Generator, reduce: Callable[[torch.Tensor], torch.Tensor],
    weights: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """Centroids (heads, clusters, D) of keys (heads, n, D) with weights (heads, n), by `ROUNDS` rounds of k-means.

    The first centroids are keys picked by weight; with several processes, the mean of the picks of each. A cluster
    that loses all of its keys keeps its centroid.
    """
    heads, _, dim = keys.shape
    # On the CPU, where the generator is.
    picked = torch.multinomial(weights.cpu(), clusters, replacement=True, generator=generator).to(keys.device)
    processes = reduce(torch.ones(1, device=keys.device)).item()
    centroids = reduce(keys.gather(1, picked.unsqueeze(-1).expand(-1, -1, dim))) / processes
    weighed = torch.cat([keys * weights.unsqueeze(-1), weights.unsqueeze(-1)], dim=-1)
    for _ in range(ROUNDS):
        nearest = (keys @ centroids.mT - centroids.square().sum(-1).unsqueeze(1) / 2).argmax(-1)
        sums = torch.zeros(heads, clusters, dim + 1, dtype=keys.dtype, device=keys.device)
        index = nearest.unsqueeze(-1).expand(-1, -1, dim + 1)
        sums = reduce(sums.scatter_add_(1, index, weighed))
        filled = sums[..., -1:] > 0
        centroids = torch.where(filled, sums[..., :-1] / torch.where(filled, sums[..., -1:], 1.0), centroids)
    return centroids
