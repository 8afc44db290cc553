"""The features of queries in fewer steps, for many calls with one far kernel."""

import math

import torch

from hf_rfa.feature_maps import FarKernel, Features


class PreparedQueries:
    """`FarKernel.query_features` with all that does not depend on the query worked out beforehand.

    Everything that is linear in a query q is one product: with a = alpha sqrt(s), its projections a omega A (q - b),
    its exact part s q.c and, where A is not the identity, y = a A (q - b), whose square the maps read.
    """

    def __init__(self, far: FarKernel, scaling: float) -> None:
        size = far.alpha * math.sqrt(scaling)
        omega, center = far.omega * size[:, None, None], far.query_center.unsqueeze(1)
        rows, shift = [omega], -center
        if far.query_transform is not None:
            rows = [omega @ far.query_transform, far.query_transform * size[:, None, None]]
        rows.append(far.key_center.unsqueeze(1) * scaling)
        self._rows = torch.cat(rows, dim=1).mT.contiguous()
        self._shift = shift @ self._rows
        self._shift[..., -1] = 0.0  # the exact part is that of q, not of q - b
        self._far, self._scaling, self._projections = far, scaling, far.omega.shape[1]
        self._center, self._size = far.query_center.unsqueeze(1), size.view(-1, 1)
        self._proposal = far.proposal.view(-1, 1, 1)
        self._bound: torch.Tensor | None = None
        if far.query_radius is not None:
            radius = torch.where(far.query_radius > 0, far.query_radius, torch.inf)
            self._bound = (radius * size).square().unsqueeze(-1)

    def __call__(self, query: torch.Tensor, scaling: float) -> Features:
        """psi of queries (B, Hk, G, D), as (features, log_scale); `scaling` is the one that was prepared for."""
        assert scaling == self._scaling
        batch, heads, groups, dim = query.shape
        tokens = query.transpose(0, 1).reshape(heads, batch * groups, dim)
        product = torch.baddbmm(self._shift, tokens, self._rows).view(heads, batch, groups, -1).transpose(0, 1)
        projection, exact = product[..., : self._projections], product[..., -1]
        if self._far.query_transform is None:
            length = torch.linalg.vector_norm(query - self._center, dim=-1) * self._size
        else:
            length = torch.linalg.vector_norm(product[..., self._projections : -1], dim=-1)
        square = length.square()
        if self._bound is not None:
            shrink = (self._bound / square).clamp_max_(1.0)
            projection, square = projection * shrink.sqrt().unsqueeze(-1), square * shrink
        features, log_scale = self._far.map_heads(square, projection, self._proposal, keys=False)
        return features, log_scale + exact
