"""The features of queries in fewer steps, for repeated calls with one far kernel."""

import math

import torch

from hf_rfa.features.far_kernel import FarKernel, pull_in, squared_bound
from hf_rfa.features.maps import Features


class PreparedQueries:
    """`FarKernel.query_features` with everything that does not depend on the query computed in advance.

    All terms that are linear in a query q come from one product: with a = alpha sqrt(s), the projections
    a omega A (q - b), the exact part s q.c and, unless A is the identity, y = A (q - b), whose length decides what is
    clipped. That length is not tempered: with alpha = 0 it would always be 0.
    """

    def __init__(self, far: FarKernel, scaling: float) -> None:
        size = far.alpha * math.sqrt(scaling)
        omega, center = far.omega * size[:, None, None], far.query_center.unsqueeze(1)
        rows, shift = [omega], -center
        if far.query_transform is not None:
            rows = [omega @ far.query_transform, far.query_transform]
        rows.append(far.key_center.unsqueeze(1) * scaling)
        self._rows = torch.cat(rows, dim=1).mT.contiguous()
        self._shift = shift @ self._rows
        self._shift[..., -1] = 0.0  # the exact part depends on q, not on q - b
        self._far, self._scaling, self._projections = far, scaling, far.omega.shape[1]
        self._center, self._square_size = far.query_center.unsqueeze(1), size.square().view(-1, 1)
        self._proposal = far.proposal.view(-1, 1, 1)
        self._bound = None if far.query_radius is None else squared_bound(far.query_radius).view(-1, 1)

    def __call__(self, query: torch.Tensor, scaling: float) -> Features:
        """psi of queries (B, Hk, G, D), as (features, log_scale); `scaling` must be the one given at construction."""
        assert scaling == self._scaling
        batch, heads, groups, dim = query.shape
        tokens = query.transpose(0, 1).reshape(heads, batch * groups, dim)
        product = torch.baddbmm(self._shift, tokens, self._rows).view(heads, batch, groups, -1).transpose(0, 1)
        projection, exact = product[..., : self._projections], product[..., -1]
        plain = self._far.query_transform is None
        moved = query - self._center if plain else product[..., self._projections : -1]
        square = torch.linalg.vector_norm(moved, dim=-1).square()
        if self._bound is not None:
            projection = projection * pull_in(square, self._bound).unsqueeze(-1)
            square = torch.minimum(square, self._bound)
        square = square * self._square_size
        features, log_scale = self._far.map_heads(square, projection, self._proposal, keys=False)
        return features, log_scale + exact
