"""The psi family: random features whose inner product estimates the softmax kernel exp(q'.k').

With `x' = x * sqrt(scaling)` and rows of omega ~ N(0, I), every map here satisfies `E[psi(q').psi(k')] = exp(q'.k')`.
A map is a pure function of |x'|^2 (..., N), w.x' (..., N, m), omega (heads, m, D) and the proposal; it returns `psi`
in two pieces,

    psi(x') = exp(log_scale) * features,        features (..., N, F), log_scale (..., N)

with bounded `features`, so that the caller can stabilise: exp(log_scale) is never computed here. To add a map, write
its function and add an entry to `FEATURE_MAPS` below.

| map              | F  | psi_i(x')                                                                           |
|------------------|----|-------------------------------------------------------------------------------------|
| trigonometric    | 2m | exp(+|x'|^2/2) sqrt(1/m) [sin(w_i.x'), cos(w_i.x')]                                 |
| positive         | m  | exp(-|x'|^2/2) sqrt(1/m) exp(w_i.x')                                                |
| hyperbolic       | 2m | exp(-|x'|^2/2) sqrt(1/2m) [exp(w_i.x'), exp(-w_i.x')]                               |
| optimal_positive | m  | (1-4A)^(D/4) sqrt(1/m) exp(A|w_i|^2 + sqrt(1-4A) w_i.x' - |x'|^2/2)                 |
| clustered        | 2m | exp(w_i.q') for queries, softmax_i(w_i.k' - |w_i|^2/2) for keys                     |

`clustered` is the exception: its 2m rows w_i are not random but the centroids of clusters of keys, and each key is
represented by the centroids nearest to it. It is biased, but needs far fewer components for heads that look single
tokens up.

Sources: trigonometric, Rahimi and Recht 2007 and Peng et al. 2021; positive and hyperbolic, Choromanski et al. 2021,
Lemma 1; optimal_positive, Likhosherstov et al. 2022; clustered, normalised features of keys as in Hedgehog (Zhang et
al. 2024), with one exponential of a query for each cluster as in Vyas et al. 2020.
"""

import math
from collections.abc import Sequence

import torch

from hf_rfa.errors import CheckpointError, ConfigError
from hf_rfa.registry import FEATURE_MAPS, FeatureMap

Features = tuple[torch.Tensor, torch.Tensor]


def trigonometric(
    square: torch.Tensor, projection: torch.Tensor, omega: torch.Tensor, proposal: torch.Tensor
) -> Features:
    """The trigonometric psi: unbiased and bounded, but its estimates can be negative."""
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
    """The weight of each cluster for a query: exp(w.q')."""
    return _normalised(projection, torch.zeros_like(projection[..., 0]))


def cluster_shares(
    square: torch.Tensor, projection: torch.Tensor, omega: torch.Tensor, proposal: torch.Tensor
) -> Features:
    """Share of each cluster in a key: the posterior of a mixture of unit Gaussians centred on omega's rows."""
    size = omega.square().sum(-1).view(-1, *(1,) * (projection.dim() - 3), omega.shape[1])
    return (projection - size / 2).softmax(-1), torch.zeros_like(projection[..., 0])


def optimal_proposal(mean_square_sum: torch.Tensor, head_dim: int) -> torch.Tensor:
    """The A that minimises the variance for nu = E|q'+k'|^2 (Likhosherstov et al. 2022, Theorem 3.1 and section 3.2).

    rho = (sqrt((2 nu + D)^2 + 8 D nu) - 2 nu - D) / (4 nu),        A = (1 - 1/rho) / 8
    """
    nu = mean_square_sum.clamp_min(1e-6 * head_dim)
    s = 2 * nu + head_dim
    # The same root, written so that no two nearly equal numbers are subtracted.
    rho = 2 * head_dim / ((s.square() + 8 * head_dim * nu).sqrt() + s)
    return (1 - 1 / rho) / 8


def _normalised(exponent: torch.Tensor, log_constant: torch.Tensor) -> Features:
    # The maximum is a stabiliser that cancels exactly (exp(e - m) exp(m)), hence a constant for autograd.
    peak = exponent.detach().amax(-1)
    return (exponent - peak.unsqueeze(-1)).exp(), log_constant + peak


# The order is part of the saved format, which stores a map as its index: add new maps at the end.
FEATURE_MAPS.update({
    "trigonometric": FeatureMap(trigonometric, 2, "sin and cos, unbiased, may be negative", signed=True),
    "positive": FeatureMap(positive, 1, "exp"),
    "hyperbolic": FeatureMap(hyperbolic, 2, "exp of plus and minus"),
    "optimal_positive": FeatureMap(optimal_positive, 1, "exp with the least variance, Likhosherstov et al. 2022"),
    "clustered": FeatureMap(
        cluster_logits, 2, "omega are centroids of keys, found by `calibrate`: the best start for training",
        rows=2, key_function=cluster_shares,
    ),
})  # fmt: skip


#: Maps registered by others come after these.
_OWN_MAPS = len(FEATURE_MAPS)


def codes_of_maps(names: Sequence[str]) -> list[int]:
    """The places of maps in `FEATURE_MAPS`, which adapters save."""
    places = list(FEATURE_MAPS)
    return [places.index(name) for name in names]


def maps_of_codes(codes: Sequence[int], configured: str) -> tuple[str, ...]:
    """The maps at these places; `configured` is the config's.

    Raises:
        CheckpointError: A map that was registered by others has another place here, or is not there.
    """
    places = list(FEATURE_MAPS)
    for code in codes:
        found = places[code] if code < len(places) else None
        if code >= _OWN_MAPS and found != configured:
            raise CheckpointError(
                f"The conversion was saved with {configured!r} as map number {code} of `FEATURE_MAPS`. Got {found!r} "
                "there. Register the maps in the same order before the model is loaded."
            )
    return tuple(places[code] for code in codes)


def rows_per_feature(names: Sequence[str]) -> int:
    """Rows of omega per random feature in a layer with these maps."""
    return max([FEATURE_MAPS[name].rows for name in names] or [1])


def feature_map_of_heads(names: str | Sequence[str], key_heads: int) -> tuple[str, ...]:
    """One name per key head.

    Raises:
        ConfigError: A name is unknown, the number of names is not that of the key heads, or the maps have different
            numbers of components.
    """
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
    components = {name: FEATURE_MAPS[name].components for name in sorted(set(maps))}
    if len(set(components.values())) > 1:
        raise ConfigError(
            f"The feature maps of one layer must make equally many components per feature. Got {components}. Choose "
            "maps that do."
        )
    return maps
