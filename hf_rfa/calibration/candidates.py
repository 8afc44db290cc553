"""The candidates for a key head's far kernel: feature maps with the geometries, alphas and omegas of each."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from hf_rfa.calibration.clusters import KeyClusters
from hf_rfa.calibration.geometry import Geometry, Moments
from hf_rfa.config import AUTO_MAPS
from hf_rfa.runtime.adapter import RFAAdapter

ALPHAS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.85, 1.0)


@dataclass(frozen=True)
class Candidate:
    """A far kernel for every key head of a layer, without gamma; omega (key_heads, rows, D)."""

    feature_map: str
    geometry: Geometry
    alpha: float
    omega: torch.Tensor


class CandidateSource:
    """Observer of the first pass over a layer: takes the statistics of queries and keys that its maps need."""

    def __init__(self, adapter: RFAAdapter) -> None:
        self.adapter = adapter
        name = adapter.config.feature_map
        self.maps = AUTO_MAPS if name == "auto" else (name,)
        self.statistics = KeyClusters(adapter) if name == "clustered" else Moments()
        self.planted = 0  # set by the caller: tokens at the end of each row that repeat earlier ones

    def __call__(self, *args: Any) -> None:
        self.statistics.planted = self.planted
        self.statistics(*args)

    def merge(self, reduce: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Add the sums of other processes: `reduce(tensor)` gives the sum over all of them."""
        self.statistics.merge(reduce)

    def candidates(self) -> list[Candidate]:
        """All candidates; alpha = 0 appears once, because all maps are the same there."""
        geometries = self.statistics.geometries()
        if isinstance(self.statistics, KeyClusters):  # tempered already
            return [Candidate("clustered", geometry, 1.0, self.statistics.omega) for geometry in geometries]
        runs = itertools.product(self.maps, geometries, ALPHAS)
        omega = self.adapter.omega
        return [Candidate(*run, omega) for run in runs if run[2] or run[0] == self.maps[0]]
