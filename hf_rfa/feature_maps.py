"""The psi family: random features whose inner product estimates the softmax kernel exp(q'.k').

With `x' = x * sqrt(scaling)` and rows of omega ~ N(0, I), every map here satisfies `E[psi(q').psi(k')] = exp(q'.k')`.
A map is a pure function that returns `psi` in two pieces,

    psi(x') = exp(log_scale) * features,        features (..., N, F), log_scale (..., N)

with bounded `features`, so that the caller can stabilise: the exponential is never taken here.

| map              | F  | psi_i(x')                                                                           |
|------------------|----|-------------------------------------------------------------------------------------|
| trigonometric    | 2m | exp(+|x'|^2/2) sqrt(1/m) [sin(w_i.x'), cos(w_i.x')]                                 |
| positive         | m  | exp(-|x'|^2/2) sqrt(1/m) exp(w_i.x')                                                |
| hyperbolic       | 2m | exp(-|x'|^2/2) sqrt(1/2m) [exp(w_i.x'), exp(-w_i.x')]                               |
| optimal_positive | m  | (1-4A)^(D/4) sqrt(1/m) exp(A|w_i|^2 + sqrt(1-4A) w_i.x' - |x'|^2/2)                 |

Sources: trigonometric, Rahimi and Recht 2007 and Peng et al. 2021; positive and hyperbolic, Choromanski et al. 2021,
Lemma 1; optimal_positive, Likhosherstov et al. 2022.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch

from hf_rfa.errors import ConfigError

Features = tuple[torch.Tensor, torch.Tensor]


def trigonometric(x: torch.Tensor, projection: torch.Tensor, omega: torch.Tensor, proposal: torch.Tensor) -> Features:
    """psi itself: unbiased, bounded, but its estimates can be negative."""
    features = torch.cat([projection.sin(), projection.cos()], dim=-1) * omega.shape[-2] ** -0.5
    return features, x.square().sum(-1) / 2


def positive(x: torch.Tensor, projection: torch.Tensor, omega: torch.Tensor, proposal: torch.Tensor) -> Features:
    """FAVOR+: never negative; its variance grows like exp(|q'+k'|^2)."""
    return _normalised(projection, -x.square().sum(-1) / 2 - math.log(omega.shape[-2]) / 2)


def hyperbolic(x: torch.Tensor, projection: torch.Tensor, omega: torch.Tensor, proposal: torch.Tensor) -> Features:
    """FAVOR+ with antithetic pairs +-omega: twice the features of one projection."""
    both = torch.cat([projection, -projection], dim=-1)
    return _normalised(both, -x.square().sum(-1) / 2 - math.log(2 * omega.shape[-2]) / 2)


def optimal_positive(
    x: torch.Tensor, projection: torch.Tensor, omega: torch.Tensor, proposal: torch.Tensor
) -> Features:
    """FAVOR++: positive features drawn from the isotropic proposal with the least variance; `proposal` is A < 1/8."""
    dim = omega.shape[-1]
    shrink = 1 - 4 * proposal  # (heads, 1, ..., 1), aligned with projection (batch, heads, ..., m)
    square = omega.square().sum(-1).view(-1, *(1,) * (projection.dim() - 3), omega.shape[1])
    exponent = proposal * square + shrink.sqrt() * projection
    constant = (dim / 4 * shrink.log()).squeeze(-1) - math.log(omega.shape[-2]) / 2
    return _normalised(exponent, constant - x.square().sum(-1) / 2)


def optimal_proposal(mean_square_sum: torch.Tensor, head_dim: int) -> torch.Tensor:
    """The A that minimises the variance for nu = E|q'+k'|^2 (Likhosherstov et al. 2022, Theorem 3.1 and section 3.2).

    rho = (sqrt((2 nu + D)^2 + 8 D nu) - 2 nu - D) / (4 nu),        A = (1 - 1/rho) / 8
    """
    nu = mean_square_sum.clamp_min(1e-6 * head_dim)
    s = 2 * nu + head_dim
    # The same root written without the difference of two nearly equal numbers.
    rho = 2 * head_dim / ((s.square() + 8 * head_dim * nu).sqrt() + s)
    return (1 - 1 / rho) / 8


def _normalised(exponent: torch.Tensor, log_constant: torch.Tensor) -> Features:
    # The maximum is a stabiliser that cancels exactly (exp(e - m) exp(m)), hence a constant for autograd.
    peak = exponent.detach().amax(-1)
    return (exponent - peak.unsqueeze(-1)).exp(), log_constant + peak


@dataclass(frozen=True)
class FeatureMap:
    """A member of the family: its function and how many components it makes of one omega."""

    function: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], Features]
    components: int


FEATURE_MAPS = {
    "trigonometric": FeatureMap(trigonometric, 2),
    "positive": FeatureMap(positive, 1),
    "hyperbolic": FeatureMap(hyperbolic, 2),
    "optimal_positive": FeatureMap(optimal_positive, 1),
}


@dataclass(frozen=True)
class FarKernel:
    """The estimated kernel of the far keys, `gamma * psi(alpha q').psi(alpha k')`, of all key heads of a layer.

    Args:
        feature_map: A name of `FEATURE_MAPS`.
        omega: (key_heads, m, D), rows N(0, I) (or learned).
        alpha: (key_heads,) tempering; 1 = unbiased, 0 = every far key weighs the same.
        gamma: (key_heads,) weight of the far part; 0 = none.
        proposal: (key_heads,) A of the optimal positive features; the other maps do not read it.
    """

    feature_map: str
    omega: torch.Tensor
    alpha: torch.Tensor
    gamma: torch.Tensor
    proposal: torch.Tensor
    query_center: torch.Tensor
    key_center: torch.Tensor

    @property
    def num_components(self) -> int:
        """F, the length of psi."""
        return FEATURE_MAPS[self.feature_map].components * self.omega.shape[1]

    def query_features(self, query: torch.Tensor, scaling: float) -> Features:
        """psi of queries (batch, key_heads, ..., N, D), as (features, log_scale)."""
        return self._features(query, self.query_center, self.key_center, scaling, shift=False)

    def key_features(self, key: torch.Tensor, scaling: float) -> Features:
        """psi of keys (batch, key_heads, ..., N, D), as (features, log_scale)."""
        return self._features(key, self.key_center, self.query_center, scaling, shift=True)

    def _features(
        self, x: torch.Tensor, center: torch.Tensor, other: torch.Tensor, scaling: float, shift: bool
    ) -> Features:
        heads = (-1,) + (1,) * (x.dim() - 2)
        center = center.view(-1, *(1,) * (x.dim() - 3), x.shape[-1])
        other = other.view(-1, *(1,) * (x.dim() - 3), x.shape[-1])
        centred = x - center
        # q.k = (q - b).(k - c) + q.c + b.(k - c): the first term is estimated, the others are exact.
        exact = ((centred if shift else x) * other).sum(-1) * scaling
        x = centred * (self.alpha * math.sqrt(scaling)).view(heads)
        projection = torch.einsum("bh...d,hmd->bh...m", x, self.omega)
        features, log_scale = FEATURE_MAPS[self.feature_map].function(
            x, projection, self.omega, self.proposal.view(heads)
        )
        return features, log_scale + exact

    def log_gamma(self) -> torch.Tensor:
        """log gamma (key_heads,), with a finite placeholder where gamma is 0 (see `alive`)."""
        return torch.where(self.alive(), self.gamma, torch.ones_like(self.gamma)).log()

    def alive(self) -> torch.Tensor:
        """Which key heads have a far part at all (key_heads,) bool."""
        return self.gamma > 0

    def to(self, dtype: torch.dtype) -> "FarKernel":
        """The same kernel with its tensors in `dtype`."""
        return self._map(lambda tensor: tensor.to(dtype))

    def select(self, heads: torch.Tensor) -> "FarKernel":
        """The kernel of some key heads (indices)."""
        return self._map(lambda tensor: tensor[heads])

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "FarKernel":
        tensors = {f.name: function(getattr(self, f.name)) for f in fields(self) if f.name != "feature_map"}
        return FarKernel(self.feature_map, **tensors)


def check_feature_map(name: str) -> None:
    """Raise `ConfigError` unless `name` is a known map."""
    if name not in FEATURE_MAPS:
        raise ConfigError(f"`feature_map` must be one of {sorted(FEATURE_MAPS)}. Got {name!r}. Choose one of them.")
