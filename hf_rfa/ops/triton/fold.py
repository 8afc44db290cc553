"""The far kernel in the form that the Triton kernels read: one affine map, and a size and a log-scale per token.

With y = A (x - c), the clipped size r = 1 / max(1, |y| / radius) and t = alpha sqrt(scaling), a feature's argument is

    omega_i . (t r y) = r (W_i . x + b_i),        W = t omega A,  b = -W c

and the log-scale of psi (without the maximum of the exponents) is

    +-(t r |y|)^2 / 2  +  (exact part of the kernel)  +  (constants of the map)

W and b are small tensors per head; r and the log-scale are one number each per token. All of them are computed in
plain differentiable torch, so that gradients of alpha, gamma, centres, transforms and radii follow from those that the
kernels return.
"""

import functools
import math
from dataclasses import dataclass

import torch

from hf_rfa.features.far_kernel import FarKernel, pull_in, squared_bound

#: Form of the components, see `pieces`.
FORMS = {"positive": "EXP", "optimal_positive": "EXP", "hyperbolic": "PAIR", "trigonometric": "WAVE",
         "clustered": "CLUSTER"}  # fmt: skip


@dataclass(frozen=True)
class Side:
    """The far kernel for queries, or for keys: weight (Hk, P, D), bias and shift (Hk, P) of the arguments
    r (W x + b) + shift; r and log_scale (B, Hk, ..., T) per token, float32."""

    weight: torch.Tensor
    bias: torch.Tensor
    shift: torch.Tensor
    r: torch.Tensor
    log_scale: torch.Tensor


def form_of(far: FarKernel) -> str:
    """The kernels' name for a layer's feature maps; `dispatch` sends maps they do not cover elsewhere."""
    forms = {FORMS[name] for name in far.feature_maps}
    return "MIXED" if len(forms) > 1 else forms.pop()


def fold_queries(query: torch.Tensor, far: FarKernel, scaling: float) -> Side:
    """Fold queries (B, Hk, G, T, D); gamma is part of their log-scale, which is -inf for heads without a far part."""
    side = _fold(query, far, scaling, keys=False)
    log_scale = side.log_scale + far.log_gamma().view(-1, 1, 1)
    return Side(side.weight, side.bias, side.shift, side.r, log_scale)


def fold_keys(key: torch.Tensor, far: FarKernel, scaling: float) -> Side:
    """Fold keys (B, Hk, T, D)."""
    return _fold(key, far, scaling, keys=True)


@dataclass(frozen=True)
class Affine:
    """What a side has per head, whatever the token: W (Hk, P, D), b and shift (Hk, P), the sign of |t r y|^2 / 2 and
    the constants of the log-scale (Hk,), t = alpha sqrt(scaling) (Hk,)."""

    weight: torch.Tensor
    bias: torch.Tensor
    shift: torch.Tensor
    sign: torch.Tensor
    constant: torch.Tensor
    size: torch.Tensor


def affine(far: FarKernel, scaling: float, keys: bool) -> Affine:
    """The affine map of queries, or of keys; gamma is not part of it."""
    center, transform = (far.key_center, far.key_transform) if keys else (far.query_center, far.query_transform)
    size = far.alpha * math.sqrt(scaling)
    weight = far.omega * size.view(-1, 1, 1)
    if transform is not None:
        weight = weight @ transform
    bias = -torch.einsum("hmd,hd->hm", weight, center)
    device, dtype = far.omega.device, far.omega.dtype
    sign, constant = _constants(far.feature_maps, far.omega.shape[1], device, dtype)
    shift = torch.zeros_like(bias)
    if "optimal_positive" in far.feature_maps:  # the positive map is the case of proposal 0
        optimal = _is(far.feature_maps, "optimal_positive", device, dtype)
        proposal = far.proposal * optimal
        shrink = 1 - 4 * proposal
        weight, bias = weight * shrink.sqrt().view(-1, 1, 1), bias * shrink.sqrt().view(-1, 1)
        shift = proposal.view(-1, 1) * far.omega.square().sum(-1)
        constant = constant + far.omega.shape[2] / 4 * shrink.log()
    elif keys and "clustered" in far.feature_maps:
        shift = -far.omega.square().sum(-1) / 2
    return Affine(weight, bias, shift, sign, constant, size)


def _fold(x: torch.Tensor, far: FarKernel, scaling: float, keys: bool) -> Side:
    center, other = (far.key_center, far.query_center) if keys else (far.query_center, far.key_center)
    transform, radius = (
        (far.key_transform, far.key_radius) if keys else (far.query_transform, far.query_radius)
    )  # fmt: skip
    side = affine(far, scaling, keys)
    heads = (-1, *(1,) * (x.dim() - 3))  # broadcasts against (B, Hk, ..., T), one number per token
    wide = x.to(far.omega.dtype)
    centred = wide - center.view(*heads, x.shape[-1])
    moved = centred if transform is None else torch.einsum("bh...d,hed->bh...e", centred, transform)
    square = moved.square().sum(-1)
    r = torch.ones_like(square)
    if radius is not None:
        r = pull_in(square, squared_bound(radius).view(heads))
    square = square * (side.size.view(heads) * r).square() / 2
    exact = ((centred if keys else wide) * other.view(*heads, x.shape[-1])).sum(-1)
    log_scale = side.sign.view(heads) * square + exact * scaling + side.constant.view(heads)
    return Side(side.weight, side.bias, side.shift, r, log_scale)


@functools.lru_cache(maxsize=64)
def _constants(
    maps: tuple[str, ...], count: int, device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Per head: the sign of |x'|^2 / 2, and half the log of the number that psi.psi is divided by."""
    signs = {"trigonometric": 1.0, "clustered": 0.0}
    half = -math.log(count) / 2
    logs = {"hyperbolic": half - math.log(2) / 2, "clustered": 0.0}
    sign, constant = [signs.get(name, -1.0) for name in maps], [logs.get(name, half) for name in maps]
    return torch.tensor(sign, dtype=dtype, device=device), torch.tensor(constant, dtype=dtype, device=device)


@functools.lru_cache(maxsize=64)
def _is(maps: tuple[str, ...], wanted: str, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor([float(name == wanted) for name in maps], dtype=dtype, device=device)
