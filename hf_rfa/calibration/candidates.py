"""The candidates for a key head's far kernel: feature maps with the geometries, alphas and omegas of each."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from hf_rfa.calibration.clusters import KeyClusters
from hf_rfa.calibration.geometry import Geometry, Moments
from hf_rfa.calibration.layer_gradients import LayerInputs
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
    """Looks at the inputs of a layer, and takes the statistics of queries and keys that its maps need.

    Attributes:
        planted: Set by the caller: tokens at the end of each row that repeat earlier ones.
        tokens: Of all calls; those behind the first two windows; those that see more keys than a head keeps, too.
        scaling: The layer's, set by its first call.
    """

    def __init__(self, adapter: RFAAdapter) -> None:
        self.adapter = adapter
        name = adapter.config.feature_map
        self.maps = AUTO_MAPS if name == "auto" else (name,)
        self.statistics = KeyClusters(adapter) if name == "clustered" else Moments()
        self.planted, self.scaling, self.tokens = 0, 1.0, torch.zeros(3, dtype=torch.float64)

    def __call__(self, inputs: LayerInputs) -> None:
        self.scaling, self.statistics.planted = inputs.settings.scaling, self.planted
        rows, _, length, _ = inputs.query.shape
        config, kept = self.adapter.config, self.adapter.kept_keys
        behind = max(0, length - 2 * config.window)
        exact = config.sink_tokens + (kept if isinstance(kept, int) else min(kept)) if config.window else 0
        self.tokens += rows * torch.tensor([length, behind, max(0, behind - exact)], dtype=torch.float64)
        self.statistics(
            inputs.adapter, inputs.module, inputs.query, inputs.key, inputs.value, inputs.layout, inputs.settings,
            inputs.exact,
        )  # fmt: skip

    def merge(self, reduce: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Add the sums of other processes: `reduce(tensor)` gives the sum over all of them."""
        self.statistics.merge(reduce)

    def far_limits(self) -> torch.Tensor:
        """`FarKernel.far_limit` (key_heads,): none without a window, where nothing is exact."""
        moments = self.statistics.moments if isinstance(self.statistics, KeyClusters) else self.statistics
        limits = moments.shares.limits()
        return limits if self.adapter.config.window else torch.zeros_like(limits)

    def candidates(self) -> list[Candidate]:
        """All candidates; alpha = 0 appears once, because all maps are the same there."""
        geometries = self.statistics.geometries()
        if isinstance(self.statistics, KeyClusters):  # tempered already
            return [Candidate("clustered", geometry, 1.0, self.statistics.omega) for geometry in geometries]
        runs = itertools.product(self.maps, geometries, ALPHAS)
        omega = self.adapter.omega
        return [Candidate(*run, omega) for run in runs if run[2] or run[0] == self.maps[0]]
