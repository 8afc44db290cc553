"""Draws of omega: all of the project's randomness is here.

`omega` is a pure function of (seed, layer, draw number): it is drawn on the CPU in float32 from its own
generator, so that every rank, device and recomputed forward pass gets the same directions.
"""

import numpy as np
import torch


def draw_omega(
    num_heads: int, num_features: int, head_dim: int, *, kind: str, seed: int, layer: int, draw: int
) -> torch.Tensor:
    """omega (num_heads, num_features, head_dim), float32 on the CPU; rows N(0, I) (except for "sphere").

    `kind="gaussian"` draws the rows independently. `kind="orthogonal"` makes blocks of `head_dim` rows whose
    directions are orthogonal (Choromanski et al. 2021, section 2.4): each row by itself is still N(0, I), so the
    estimate stays unbiased, and its variance falls. `kind="sphere"` gives all of these directions the length
    sqrt(head_dim), their root mean square: a full block then has no error in the kernel's first and second order, at
    the price of a bias of higher order (the regularised softmax kernel of Choromanski et al. 2021).
    """
    words = np.random.SeedSequence((seed, layer, draw)).generate_state(2)
    generator = torch.Generator().manual_seed(int(words[0]) << 31 ^ int(words[1]))
    make = {"orthogonal": _orthogonal, "sphere": _sphere, "learned": _sphere, "gaussian": _gaussian}[kind]
    # Head by head, so that the omega of a head does not depend on how many heads follow.
    return torch.stack([make(num_features, head_dim, generator) for _ in range(num_heads)])


def _gaussian(rows: int, dim: int, generator: torch.Generator) -> torch.Tensor:
    # Explicit, because `from_pretrained` builds models under other default dtypes and devices.
    return torch.randn(rows, dim, generator=generator, dtype=torch.float32, device="cpu")


def _orthogonal(rows: int, dim: int, generator: torch.Generator) -> torch.Tensor:
    directions = _directions(rows, dim, generator)
    # The length of a row of N(0, I) is chi-distributed with `dim` degrees of freedom.
    return directions * _gaussian(rows, dim, generator).norm(dim=-1, keepdim=True)


def _sphere(rows: int, dim: int, generator: torch.Generator) -> torch.Tensor:
    return _directions(rows, dim, generator) * dim**0.5


def _directions(rows: int, dim: int, generator: torch.Generator) -> torch.Tensor:
    """Unit vectors, orthogonal within each block of `dim` rows."""
    return torch.cat([_haar(dim, generator) for _ in range(-(-rows // dim))])[:rows]


def _haar(dim: int, generator: torch.Generator) -> torch.Tensor:
    """A uniformly distributed orthogonal matrix (dim, dim)."""
    q, r = torch.linalg.qr(_gaussian(dim, dim, generator))
    # LAPACK's Q alone is not uniform: the signs of R's diagonal must be moved into it (Mezzadri 2007, section 5).
    return q * r.diagonal().sign()
