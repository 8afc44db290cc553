"""The exact changes of variable of a far kernel, in closed form: the centres, and the balance between q and k.

Each key head can have one of two geometries:

- plain: centres at the mean query and the mean key;
- attended: centres at the means over the far pairs (i, j), weighted by their softmax weights p_ij, and balanced by the
  covariances of these pairs. The exact part of the kernel is then right where the attention is, and only the
  deviations from it are estimated and tempered. On a head that attends far away this has a quarter less error.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_rfa.calibration.far_mass import far_masses
from hf_rfa.calibration.far_shares import FarShares
from hf_rfa.calibration.parts import linear_settings
from hf_rfa.ops.call import OperatorCall
from hf_rfa.ops.layout import TokenLayout
from hf_rfa.ops.settings import AttentionSettings

#: This share of the mean variance is added to every variance: a few thousand tokens do not determine all directions.
RIDGE = 0.01
#: Of a row at least this many queries are asked which keys they attend to, and at least one in `EVERY`: that takes
#: time N^2.
FEW_QUERIES, EVERY = 128, 8
#: A head has an attended geometry only if its far pairs weigh at least as much as this many tokens.
LEAST_WEIGHT = 1.0


@dataclass(frozen=True)
class Geometry:
    """A change of variable for all key heads, float32: see `FarKernel`.

    The radii are the root mean squares of |A (q - b)| and |A^-T (k - c)|. About half of all tokens lie further out;
    pulling them in cost nothing on any head measured, and outliers of other texts no longer do harm.
    """

    query_center: torch.Tensor
    key_center: torch.Tensor
    query_transform: torch.Tensor
    key_transform: torch.Tensor
    query_radius: torch.Tensor
    key_radius: torch.Tensor


class Moments:
    """Observer that takes weighted means and covariances of a layer's queries and keys per key head, in float64."""

    def __init__(self) -> None:
        self.planted = 0  # set by the caller: tokens at the end of each row that repeat earlier ones
        self.shares = FarShares()
        self.sums: dict[tuple[str, str], tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    def __call__(
        self, adapter: Any, module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        layout: TokenLayout, settings: AttentionSettings, exact: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """Returns the attention (B, Hk, N) of keys before the planted repeats as far keys, see `far_masses`."""
        # The repeats at the end would count as retrieval, which the text itself does not have.
        query, key, value = (x[:, :, : x.shape[2] - self.planted] for x in (query, key, value))
        settings = linear_settings(adapter, settings)
        every = min(EVERY, max(1, query.shape[2] // FEW_QUERIES))
        given, taken = far_masses(OperatorCall.of(query, key, value, adapter.kernel, settings, layout), every)
        self.shares.add(given / every)
        query, key = query.unflatten(1, (key.shape[1], -1)), key.unsqueeze(2)
        plain = torch.ones_like(given[:, :, :1])
        if layout.token_mask is not None:
            plain = plain * layout.token_mask.to(plain)[:, None, None]
        for name, x, attended in (("query", query, given), ("key", key, taken.unsqueeze(2))):
            for kind, weight in (("plain", plain.expand_as(attended)), ("attended", attended)):
                self._add((kind, name), x.double(), weight.double())
        return taken

    def _add(self, key: tuple[str, str], x: torch.Tensor, weight: torch.Tensor) -> None:
        weighed = x * weight.unsqueeze(-1)
        new = (weight.sum((0, 2, 3)), weighed.sum((0, 2, 3)), torch.einsum("bhgnd,bhgne->hde", weighed, x))
        old = self.sums.get(key)
        self.sums[key] = new if old is None else (old[0] + new[0], old[1] + new[1], old[2] + new[2])

    def merge(self, reduce: Any) -> None:
        """Add the sums of other processes: `reduce(tensor)` gives the sum over all of them."""
        self.sums = {key: (reduce(a), reduce(b), reduce(c)) for key, (a, b, c) in sorted(self.sums.items())}
        self.shares.merge(reduce)

    def geometries(self) -> list[Geometry]:
        """Plain, then attended; a head without far pairs has the plain one twice."""
        plain_query, plain_key = self._stats("plain", "query"), self._stats("plain", "key")
        query, key = self._stats("attended", "query"), self._stats("attended", "key")
        eye = torch.eye(query[1].shape[-1], dtype=torch.float64, device=query[1].device).expand_as(query[2])
        plain = _geometry(plain_query, plain_key, eye, eye)
        attended = _geometry(query, key, *balance(query[2], key[2]))
        return [plain, Geometry(*self._where_enough(vars(attended).values(), vars(plain).values()))]

    def attended(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Mean query (Hk, D), mean key, and the covariance of the queries (Hk, D, D) over the far pairs.

        In heads without far pairs: over all queries and keys.
        """
        theirs, own = (
            (self._stats(kind, "query")[1], self._stats(kind, "key")[1], self._stats(kind, "query")[2])
            for kind in ("attended", "plain")
        )
        query, key, covariance = self._where_enough(theirs, own)
        return query, key, covariance

    def _where_enough(self, theirs: Iterable[torch.Tensor], own: Iterable[torch.Tensor]) -> list[torch.Tensor]:
        """`theirs` for the heads with enough far pairs, `own` for the others."""
        enough = (self.sums["attended", "query"][0] >= LEAST_WEIGHT) & (
            self.sums["attended", "key"][0] >= LEAST_WEIGHT
        )
        return [torch.where(enough.view(-1, *(1,) * (x.dim() - 1)), x, y) for x, y in zip(theirs, own, strict=True)]

    def _stats(self, kind: str, name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Total weight (Hk,), mean (Hk, D), covariance (Hk, D, D)."""
        weight, total, outer = self.sums[kind, name]
        safe = weight.clamp_min(torch.finfo(torch.float64).tiny).unsqueeze(-1)
        mean = total / safe
        return weight, mean, outer / safe.unsqueeze(-1) - mean.unsqueeze(-1) * mean.unsqueeze(-2)


def balance(query_cov: torch.Tensor, key_cov: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The A (..., D, D), and its A^-T, that minimise E|A q|^2 + E|A^-T k|^2; A q and A^-T k then covary alike.

    A^T A = Cq^-1/2 (Cq^1/2 Ck Cq^1/2)^1/2 Cq^-1/2
    """
    query_cov, key_cov = _ridge(query_cov), _ridge(key_cov)
    root, inverse_root = _power(query_cov, 0.5), _power(query_cov, -0.5)
    square = inverse_root @ _power(root @ key_cov @ root, 0.5) @ inverse_root
    return _power(square, 0.5), _power(square, -0.5)  # symmetric: A^-T = A^-1


def root_metric(covariance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """R (..., D, D) and its inverse: |R d|^2 is how much d changes a product with a query of this covariance.

    R = (C / mean variance)^1/2, so that lengths keep their scale.
    """
    covariance = _ridge(covariance)
    covariance = covariance / covariance.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    return _power(covariance, 0.5), _power(covariance, -0.5)


def _geometry(query: Any, key: Any, query_transform: torch.Tensor, key_transform: torch.Tensor) -> Geometry:
    def radius(matrix: torch.Tensor, covariance: torch.Tensor) -> torch.Tensor:
        return torch.einsum("hij,hjk,hik->h", matrix, covariance, matrix).clamp_min(0).sqrt()

    radii = (radius(query_transform, query[2]), radius(key_transform, key[2]))
    return Geometry(*(x.float() for x in (query[1], key[1], query_transform, key_transform, *radii)))


def _ridge(covariance: torch.Tensor) -> torch.Tensor:
    dim = covariance.shape[-1]
    level = covariance.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-12)
    return covariance + RIDGE * level[..., None, None] * torch.eye(dim, dtype=covariance.dtype, device=level.device)


def _power(matrix: torch.Tensor, power: float) -> torch.Tensor:
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    floor = 1e-12 * values.amax(-1, keepdim=True).clamp_min(1e-30)
    return (vectors * values.clamp_min(floor).pow(power).unsqueeze(-2)) @ vectors.mT
