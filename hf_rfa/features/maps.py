"""The psi family: random features whose inner product estimates the softmax kernel exp(q'.k').

With `x' = x * sqrt(scaling)` and rows of omega ~ N(0, I), every map here satisfies `E[psi(q').psi(k')] = exp(q'.k')`.
A map is a pure function that returns `psi` in two pieces,

    psi(x') = exp(log_scale) * features,        features (..., N, F), log_scale (..., N)

with bounded `features`, so that the caller can stabilise: the exponential is never taken here. What it is handed is
|x'|^2 (..., N) and w.x' (..., N, m).

| map              | F  | psi_i(x')                                                                           |
|------------------|----|-------------------------------------------------------------------------------------|
| trigonometric    | 2m | exp(+|x'|^2/2) sqrt(1/m) [sin(w_i.x'), cos(w_i.x')]                                 |
| positive         | m  | exp(-|x'|^2/2) sqrt(1/m) exp(w_i.x')                                                |
| hyperbolic       | 2m | exp(-|x'|^2/2) sqrt(1/2m) [exp(w_i.x'), exp(-w_i.x')]                               |
| optimal_positive | m  | (1-4A)^(D/4) sqrt(1/m) exp(A|w_i|^2 + sqrt(1-4A) w_i.x' - |x'|^2/2)                 |
| clustered        | 2m | exp(w_i.q') for queries, softmax_i(w_i.k' - |w_i|^2/2) for keys                     |

The last is the exception, for 2m rows w_i that are no draw but the centroids of clusters of keys: it reads the kernel
of each key off the centroid it is nearest to. It is biased, but needs far fewer components for heads that look things
up.

Sources: trigonometric, Rahimi and Recht 2007 and Peng et al. 2021; positive and hyperbolic, Choromanski et al. 2021,
Lemma 1; optimal_positive, Likhosherstov et al. 2022; clustered, normalised features of keys as in Hedgehog (Zhang et
al. 2024), with one exponential of a query for each cluster as in Vyas et al. 2020.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F

from hf_rfa.errors import ConfigError

Features = tuple[torch.Tensor, torch.Tensor]
MapFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], Features]


def trigonometric(
    square: torch.Tensor, projection: torch.Tensor, omega: torch.Tensor, proposal: torch.Tensor
) -> Features:
    """psi itself: unbiased, bounded, but its estimates can be negative."""
    features = torch.cat([projection.sin(), projection.cos()], dim=-1) * omega.shape[-2] ** -0.5
    return features, square / 2


def positive(square: torch.Tensor, projection: torch.Tensor, omega: torch.Tensor, proposal: torch.Tensor) -> Features:
    """FAVOR+: never negative; its variance grows like exp(|q'+k'|^2)."""
    return _normalised(projection, square / -2 - math.log(omega.shape[-2]) / 2)


def hyperbolic(
    square: torch.Tensor, projection: torch.Tensor, omega: torch.Tensor, proposal: torch.Tensor
) -> Features:
    """FAVOR+ with antithetic pairs +-omega: twice the features of one projection."""
    both = torch.cat([projection, -projection], dim=-1)
    return _normalised(both, square / -2 - math.log(2 * omega.shape[-2]) / 2)


def optimal_positive(
    square: torch.Tensor, projection: torch.Tensor, omega: torch.Tensor, proposal: torch.Tensor
) -> Features:
    """FAVOR++: positive features drawn from the isotropic proposal with the least variance; `proposal` is A < 1/8."""
    dim = omega.shape[-1]
    shrink = 1 - 4 * proposal  # (heads, 1, ..., 1), aligned with projection (batch, heads, ..., m)
    length = omega.square().sum(-1).view(-1, *(1,) * (projection.dim() - 3), omega.shape[1])
    exponent = proposal * length + shrink.sqrt() * projection
    constant = (dim / 4 * shrink.log()).squeeze(-1) - math.log(omega.shape[-2]) / 2
    return _normalised(exponent, constant - square / 2)


def cluster_logits(
    square: torch.Tensor, projection: torch.Tensor, omega: torch.Tensor, proposal: torch.Tensor
) -> Features:
    """What each cluster gives a query: exp(w.q')."""
    return _normalised(projection, torch.zeros_like(projection[..., 0]))


def cluster_shares(
    square: torch.Tensor, projection: torch.Tensor, omega: torch.Tensor, proposal: torch.Tensor
) -> Features:
    """How much a key belongs to each cluster: the posterior of a mixture of unit Gaussians around omega's rows."""
    size = omega.square().sum(-1).view(-1, *(1,) * (projection.dim() - 3), omega.shape[1])
    return (projection - size / 2).softmax(-1), torch.zeros_like(projection[..., 0])


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


def squared_bound(radius: torch.Tensor) -> torch.Tensor:
    """The bound of |y|^2 that a radius says, never 0 and never infinite; a radius of 0 is no bound."""
    # Not infinite, since inf / inf is no number; not smaller, since the square of a tiny radius is 0.
    return torch.where(radius > 0, radius.square().clamp_min(1e-30), torch.finfo(radius.dtype).max)


def pull_in(square: torch.Tensor, bound: torch.Tensor) -> torch.Tensor:
    """min(1, radius / |y|), by which what lies outside of the bound is pulled in to it.

    square: |y|^2, before any tempering; bound: `squared_bound`. Every form of the operator takes the factor from here:
    |y| is 0 where a query equals its centre, alpha |y| where alpha is 0, and neither value nor gradient may then be
    0 / 0.
    """
    return (bound / torch.maximum(square, bound)).sqrt()


def _of_heads(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """x (B, H, ..., D) times the rows (H, E, D) of its head: (B, H, ..., E)."""
    tokens = x.transpose(0, 1)
    product = torch.bmm(tokens.reshape(len(rows), -1, x.shape[-1]), rows.mT)
    return product.view(*tokens.shape[:-1], rows.shape[1]).transpose(0, 1)


@dataclass(frozen=True)
class FeatureMap:
    """A member of the family: its function, and how many components a random feature has.

    `rows` of omega belong to one random feature. `key_function` is that of keys where it differs from the queries'.
    """

    function: MapFunction
    components: int
    rows: int = 1
    key_function: MapFunction | None = None


FEATURE_MAPS = {
    "trigonometric": FeatureMap(trigonometric, 2),
    "positive": FeatureMap(positive, 1),
    "hyperbolic": FeatureMap(hyperbolic, 2),
    "optimal_positive": FeatureMap(optimal_positive, 1),
    "clustered": FeatureMap(cluster_logits, 2, rows=2, key_function=cluster_shares),
}


def rows_per_feature(names: Sequence[str]) -> int:
    """Rows of omega for one random feature in a layer with these maps."""
    return max([FEATURE_MAPS[name].rows for name in names] or [1])


def _function(name: str, keys: bool) -> MapFunction:
    feature_map = FEATURE_MAPS[name]
    return feature_map.key_function or feature_map.function if keys else feature_map.function


@dataclass(frozen=True, eq=False)
class FarKernel:
    """The estimated kernel of the far keys of all key heads of a layer.

        kernel(q, k) = gamma exp(s q.c) exp(s b.(k - c)) psi(alpha A (q - b)').psi(alpha A^-T (k - c)')

    with s = scaling and x' = x sqrt(s). For alpha = 1 its mean is exp(s q.k): what b and c say is exact, and only the
    rest is estimated and tempered. Two kernels are equal if they are one object: what is prepared from a kernel's
    tensors is kept for as long as the kernel is.

    Args:
        feature_maps: A name of `FEATURE_MAPS` for each key head; all make equally many components.
        omega: (key_heads, m, D), rows N(0, I) (or learned). (key_heads, 2m, D) if a head is clustered: the others
            then use the first m rows.
        alpha: (key_heads,) tempering; 1 = unbiased, 0 = only b and c tell far keys apart.
        gamma: (key_heads,) weight of the far part; 0 = none (a switch: gamma has no gradient there).
        proposal: (key_heads,) A of the optimal positive features; the other maps do not read it.
        query_center, key_center: (key_heads, D) b and c.
        query_transform, key_transform: (key_heads, D, D) the change of variable A and A^-T; None for the identity.
        query_radius, key_radius: (key_heads,) bound of |A (q - b)| and |A^-T (k - c)|: what lies further out is pulled
            in to it. The variance of every map grows exponentially with these norms, so that a few outliers would
            drown what all others say. 0 or None = no bound.
        gate_weight, gate_bias: (key_heads, D), (key_heads,) of the forget gate, see `log_gate`; None = no gate.
    """

    feature_maps: tuple[str, ...]
    omega: torch.Tensor
    alpha: torch.Tensor
    gamma: torch.Tensor
    proposal: torch.Tensor
    query_center: torch.Tensor
    key_center: torch.Tensor
    query_transform: torch.Tensor | None = None
    key_transform: torch.Tensor | None = None
    query_radius: torch.Tensor | None = None
    key_radius: torch.Tensor | None = None
    gate_weight: torch.Tensor | None = None
    gate_bias: torch.Tensor | None = None

    @property
    def num_components(self) -> int:
        """F, the length of psi."""
        components = FEATURE_MAPS[self.feature_maps[0]].components if self.feature_maps else 1
        return components * self.omega.shape[1] // rows_per_feature(self.feature_maps)

    def query_features(self, query: torch.Tensor, scaling: float) -> Features:
        """psi of queries (batch, key_heads, ..., N, D), as (features, log_scale)."""
        exact, x = self._split(query, self.query_center, self.key_center, self.query_transform, scaling, shift=False)
        return self._features(x, exact, self.query_radius, scaling, keys=False)

    def key_features(self, key: torch.Tensor, scaling: float) -> Features:
        """psi of keys (batch, key_heads, ..., N, D), as (features, log_scale)."""
        exact, x = self._split(key, self.key_center, self.query_center, self.key_transform, scaling, shift=True)
        return self._features(x, exact, self.key_radius, scaling, keys=True)

    def _split(
        self, x: torch.Tensor, center: torch.Tensor, other: torch.Tensor, transform: torch.Tensor | None,
        scaling: float, shift: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """What is exact of a token, as a log-weight, and what is left to be estimated."""
        center = center.view(-1, *(1,) * (x.dim() - 3), x.shape[-1])
        other = other.view(-1, *(1,) * (x.dim() - 3), x.shape[-1])
        centred = x - center
        # q.k = (q - b).(k - c) + q.c + b.(k - c): the first term is estimated, the others are exact.
        exact = ((centred if shift else x) * other).sum(-1) * scaling
        if transform is not None:
            centred = _of_heads(centred, transform)
        return exact, centred

    def _features(
        self, x: torch.Tensor, exact: torch.Tensor, radius: torch.Tensor | None, scaling: float, keys: bool
    ) -> Features:
        heads = (-1,) + (1,) * (x.dim() - 2)
        size = (self.alpha * math.sqrt(scaling)).view(heads)
        square = x.square().sum(-1, keepdim=True)
        if radius is not None:
            size = size * pull_in(square, squared_bound(radius).view(heads))
        projection = _of_heads(x, self.omega) * size
        square = (square * size.square()).squeeze(-1)
        features, log_scale = self.map_heads(square, projection, self.proposal.view(heads), keys)
        return features, log_scale + exact

    def map_heads(
        self, square: torch.Tensor, projection: torch.Tensor, proposal: torch.Tensor, keys: bool
    ) -> Features:
        """The map of each head on its own slice."""
        names = sorted(set(self.feature_maps))
        if len(names) <= 1:
            return _function(names[0] if names else "positive", keys)(square, projection, self.omega, proposal)
        parts, order = [], []
        for name in names:
            heads = [head for head, other in enumerate(self.feature_maps) if other == name]
            function = _function(name, keys)
            used = self.omega.shape[1] * FEATURE_MAPS[name].rows // rows_per_feature(self.feature_maps)
            own = (square[:, heads], projection[:, heads, ..., :used], self.omega[heads, :used], proposal[heads])
            parts.append(function(*own))
            order += heads
        back = [order.index(head) for head in range(len(order))]
        features, log_scale = (torch.cat(tensors, dim=1)[:, back] for tensors in zip(*parts, strict=True))
        return features, log_scale

    def log_gate(self, key: torch.Tensor) -> torch.Tensor | None:
        """log g of tokens with keys (batch, key_heads, ..., N, D), as (batch, key_heads, ..., N); None = no gate.

            g_t = sigmoid(w.k_t + b),       weight of far key j for query i:  times prod_{t = j+1..i} g_t

        Source: Peng et al. 2021, section 3.2; there the gate reads the layer's input, here the token's key.
        """
        if self.gate_weight is None or self.gate_bias is None:
            return None
        logit = torch.einsum("bh...d,hd->bh...", key, self.gate_weight)
        return F.logsigmoid(logit + self.gate_bias.view(-1, *(1,) * (logit.dim() - 2)))

    def log_gamma(self) -> torch.Tensor:
        """log gamma (key_heads,), -inf (and without a gradient) for heads without a far part (see `alive`)."""
        alive = self.alive()
        return torch.where(alive, self.gamma, torch.ones_like(self.gamma)).log().masked_fill(~alive, -torch.inf)

    def alive(self) -> torch.Tensor:
        """Which key heads have a far part at all (key_heads,) bool."""
        return self.gamma > 0

    def to(self, dtype: torch.dtype, device: torch.device | None = None) -> "FarKernel":
        """The same kernel with its tensors in `dtype`, and on `device` unless that is None."""
        device = self.omega.device if device is None else device
        if all(t.dtype == dtype and t.device == device for t in self.tensors().values()):
            return self
        return self._map(lambda tensor: tensor.to(device, dtype))

    def select(self, heads: Sequence[int]) -> "FarKernel":
        """The kernel of some key heads."""
        chosen = list(heads)
        kernel = self._map(lambda tensor: tensor[chosen])
        return replace(kernel, feature_maps=tuple(self.feature_maps[head] for head in chosen))

    def tensors(self) -> dict[str, torch.Tensor]:
        """Its tensors by name, without those that are None."""
        named = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "feature_maps"}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "FarKernel":
        mapped: dict[str, Any] = {name: function(t) for name, t in self.tensors().items()}
        return replace(self, **mapped)


def feature_map_of_heads(names: str | Sequence[str], key_heads: int) -> tuple[str, ...]:
    """One name for each key head; `ConfigError` unless all are known and make equally many components."""
    maps = (names,) * key_heads if isinstance(names, str) else tuple(names)
    for name in maps:
        if name not in FEATURE_MAPS:
            raise ConfigError(
                f"`feature_map` must be one of {sorted(FEATURE_MAPS)}. Got {name!r}. Choose one of them."
            )
    if len(maps) != key_heads:
        raise ConfigError(
            f"`feature_map` must be one name, or one for each of {key_heads} key heads. Got {len(maps)} names."
        )
    if len({FEATURE_MAPS[name].components for name in maps}) > 1:
        raise ConfigError(
            "The feature maps of one layer must make equally many components of a feature: 'trigonometric', "
            f"'hyperbolic' and 'clustered', or 'positive' and 'optimal_positive'. Got {sorted(set(maps))}."
        )
    return maps
