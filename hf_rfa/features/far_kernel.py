"""The far kernel of a layer: one feature map per key head, and the parameters around it.

Centring and the change of variable are exact; norm bounds and tempering keep the variance of the estimate small; gamma
weighs the far part, and the gate makes it forget.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F

from hf_rfa.features.maps import FEATURE_MAPS, Features, rows_per_feature
from hf_rfa.registry import MapFunction


def squared_bound(radius: torch.Tensor) -> torch.Tensor:
    """Bound of |y|^2 for a given radius, never 0 and never infinite; a radius of 0 means no bound."""
    # Finite, because inf / inf is NaN; clamped from below, because the square of a tiny radius underflows to 0.
    return torch.where(radius > 0, radius.square().clamp_min(1e-30), torch.finfo(radius.dtype).max)


def pull_in(square: torch.Tensor, bound: torch.Tensor) -> torch.Tensor:
    """min(1, radius / |y|), the factor that clips |y| to the radius.

    square: |y|^2, before any tempering; bound: see `squared_bound`. Every form of the operator takes the factor from
    here: |y| is 0 if a query equals its centre, alpha |y| is 0 if alpha is, and neither the value nor the gradient may
    then become 0 / 0.
    """
    return (bound / torch.maximum(square, bound)).sqrt()


def _of_heads(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Products of x (B, H, ..., D) with the rows (H, E, D) of each head: (B, H, ..., E)."""
    tokens = x.transpose(0, 1)
    product = torch.bmm(tokens.reshape(len(rows), -1, x.shape[-1]), rows.mT)
    return product.view(*tokens.shape[:-1], rows.shape[1]).transpose(0, 1)


def _function(name: str, keys: bool) -> MapFunction:
    feature_map = FEATURE_MAPS[name]
    return feature_map.key_function or feature_map.function if keys else feature_map.function


@dataclass(frozen=True, eq=False)
class FarKernel:
    """The estimated kernel over the far keys, for all key heads of a layer.

        kernel(q, k) = gamma exp(s q.c) exp(s b.(k - c)) psi(alpha A (q - b)').psi(alpha A^-T (k - c)')

    with s = scaling and x' = x sqrt(s). For alpha = 1 its mean is exp(s q.k): the terms in b and c are exact, only the
    rest is estimated and tempered. Kernels compare by identity, because results prepared from a kernel's tensors are
    kept for as long as the kernel object lives.

    Args:
        feature_maps: One name from `FEATURE_MAPS` per key head; all must have the same number of components.
        omega: (key_heads, m, D), rows N(0, I) (or learned). (key_heads, 2m, D) if any head is
            clustered: the other heads then use the first m rows.
        alpha: (key_heads,) tempering; 1 = unbiased, 0 = far keys differ by b and c only.
        gamma: (key_heads,) weight of the far part; 0 = no far part (and no gradient of gamma).
        proposal: (key_heads,) A of the optimal positive features; the other maps ignore it.
        query_center, key_center: (key_heads, D) b and c.
        query_transform, key_transform: (key_heads, D, D) the change of variable A and A^-T; None for the identity.
        query_radius, key_radius: (key_heads,) bounds of |A (q - b)| and |A^-T (k - c)|: longer vectors are clipped.
            The variance of every map grows exponentially with these norms, so a few outliers would drown all other
            keys. 0 or None = no bound.
        gate_weight, gate_bias: (key_heads, D), (key_heads,) of the forget gate, see `log_gate`; None = no gate.
        far_limit: (key_heads,) how many times the weight of the exact keys (with a learned sink's) that of the far
            part may be; where its estimate is more, it is scaled down to that. Centres are means of rotated keys, so
            that in texts longer than those they were taken from estimates grow exponentially with the position.
            0 or None = no limit. The factor is a constant in the backward pass.
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
    far_limit: torch.Tensor | None = None

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
        """Split a token into its exact part, a log-weight, and the rest, which is estimated."""
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
        """Apply each head's feature map to its own slice."""
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
        """log g of tokens with keys (batch, key_heads, ..., N, D), as (batch, key_heads, ..., N); None without a gate.

            g_t = sigmoid(w.k_t + b),       weight of far key j for query i:  times prod_{t = j+1..i} g_t

        Source: Peng et al. 2021, section 3.2; there the gate reads the layer's input, here it reads the key.
        """
        if self.gate_weight is None or self.gate_bias is None:
            return None
        logit = torch.einsum("bh...d,hd->bh...", key, self.gate_weight)
        return F.logsigmoid(logit + self.gate_bias.view(-1, *(1,) * (logit.dim() - 2)))

    def log_gamma(self) -> torch.Tensor:
        """log gamma (key_heads,), -inf (and without a gradient) for heads without a far part (see `alive`)."""
        alive = self.alive()
        return torch.where(alive, self.gamma, torch.ones_like(self.gamma)).log().masked_fill(~alive, -torch.inf)

    def log_limit(self) -> torch.Tensor | None:
        """log of `far_limit` (key_heads,), inf for heads without one; None if no head can have one."""
        if self.far_limit is None:
            return None
        limited = self.far_limit > 0
        return (
            torch.where(limited, self.far_limit, torch.ones_like(self.far_limit))
            .log()
            .masked_fill(~limited, torch.inf)
        )

    def alive(self) -> torch.Tensor:
        """Which key heads have a far part, (key_heads,) bool."""
        return self.gamma > 0

    def to(self, dtype: torch.dtype, device: torch.device | None = None) -> "FarKernel":
        """The same kernel in `dtype`, and on `device` if one is given."""
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
        """The tensors by name, leaving out those that are None."""
        named = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "feature_maps"}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "FarKernel":
        mapped: dict[str, Any] = {name: function(t) for name, t in self.tensors().items()}
        return replace(self, **mapped)
